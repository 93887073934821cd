import errno
import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from deadpan.checkpoints.source import resolve
from deadpan.errors import DeadpanError
from deadpan.evaluate.memorisation import Reading
from deadpan.models import lora
from deadpan.train import state
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher
from training import recipes

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "deadpan.json",
    "manifest.json",
    "state.json",
    "state.pt",
    "tokenizer.json",
    "tokenizer_config.json",
}


class Run:
    """A run folder to write checkpoints into, of a model that has been trained for two steps."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.best: Reading | None = None
        folder.mkdir()

    def save(self, step: int, keep: int = 3) -> Path:
        t = self.trainer
        evaluations = state.Evaluations(best=self.best)
        position = state.Position(step, 4 * step, 0.5 * step, evaluations=evaluations)
        return state.save(
            self.folder, position, t.model, t.processor, t.optimizer, t.scheduler, "none", keep
        )

    @property
    def names(self) -> list[str]:
        """Everything in the folder of checkpoints, hidden files too."""
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def trainer(tiny: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    recipe = recipes(tiny, records)(tmp_path_factory.mktemp("trained") / "run", max_steps=2)
    trainer = Trainer(recipe, False, Watcher())
    trainer.train()
    return trainer


@pytest.fixture
def run(trainer: Trainer, tmp_path: Path) -> Run:
    return Run(trainer, tmp_path / "run")


def refused(checkpoint: Path) -> DeadpanError:
    with pytest.raises(DeadpanError) as caught:
        state.verify(checkpoint)
    return caught.value


def test_a_checkpoint_holds_the_adapter_its_processor_and_the_state(run: Run) -> None:
    checkpoint = run.save(7)
    assert checkpoint == run.folder / "checkpoints" / "step-000007"
    assert {path.name for path in checkpoint.iterdir()} == FILES
    saved = json.loads((checkpoint / "state.json").read_text())
    none = {"step": 0, "best": None, "since_best": 0, "warned": False}
    digests = {"records": "", "held_out": ""}
    assert saved == {
        "step": 7,
        "samples": 28,
        "seconds": 3.5,
        **digests,
        "evaluations": none,
        "processes": 1,
    }
    weights = load_file(checkpoint / "adapter_model.safetensors")
    expected = lora.adapter_state(run.trainer.model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_the_manifest_records_size_and_digest_of_every_other_file(run: Run) -> None:
    checkpoint = run.save(1)
    contents = {name: (checkpoint / name).read_bytes() for name in FILES - {"manifest.json"}}
    assert json.loads((checkpoint / "manifest.json").read_text()) == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }


def test_the_state_is_read_without_running_code(run: Run) -> None:
    tensors = torch.load(run.save(1) / "state.pt", weights_only=True)
    assert tensors.keys() == {"optimizer", "scheduler", "random"}
    assert len(tensors["optimizer"]["state"]) == len(run.trainer.trainable)


def test_restoring_puts_back_weights_optimizer_scheduler_and_random_numbers(run: Run) -> None:
    def draw() -> tuple[float, float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random(), random.gauss(0, 1)

    t = run.trainer
    random.gauss(0, 1)  # leaves a second number behind, which is part of the state too
    checkpoint = run.save(3)
    optimizer, scheduler = t.optimizer.state_dict(), t.scheduler.state_dict()
    weights = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    moments = {i: row["exp_avg"].clone() for i, row in optimizer["state"].items()}
    drawn = draw()
    with torch.no_grad():
        for parameter in t.trainable:
            parameter.add_(1)
            t.optimizer.state[parameter]["exp_avg"].add_(1)
    t.optimizer.param_groups[0]["lr"] = t.scheduler.last_epoch = 99

    state.restore_weights(checkpoint, t.model)
    restored = state.restore(checkpoint, t.optimizer.load_state_dict, t.scheduler)
    assert restored == state.Position(3, 12, 1.5)
    assert draw() == drawn
    assert all(torch.equal(p, weights[name]) for name, p in t.model.named_parameters())
    loaded = t.optimizer.state_dict()
    assert loaded["param_groups"] == optimizer["param_groups"]
    assert all(torch.equal(loaded["state"][i]["exp_avg"], moments[i]) for i in moments)
    assert t.scheduler.state_dict() == scheduler


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Turn over one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damage_to_any_file_is_named_and_the_other_checkpoint_offered(
    run: Run, damage: Callable[[Path], None]
) -> None:
    run.save(1)
    checkpoint = run.save(2)
    state.verify(checkpoint)
    for name in sorted(FILES - {"manifest.json"}):
        path = checkpoint / name
        content = path.read_bytes()
        damage(path)
        error = refused(checkpoint)
        path.write_bytes(content)
        assert (error.what, error.where) == ("The checkpoint is damaged.", str(path))
        assert error.expected is not None
        assert error.expected.startswith(f"{len(content)} bytes, SHA-256 ")
        assert (error.found == "no such file") is (damage is Path.unlink)
        assert error.fix == (
            f"deadpan train {run.folder / 'recipe.yaml'} --resume-from step-000001 "
            "goes on from the newest whole checkpoint and deletes none"
        )
    state.verify(checkpoint)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_without_a_manifest_a_checkpoint_is_refused(
    run: Run, damage: Callable[[Path], None]
) -> None:
    checkpoint = run.save(2)
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().rstrip())
    damage(manifest)
    error = refused(checkpoint)
    assert error.what == "The checkpoint's manifest is damaged."
    assert error.where == str(checkpoint / "manifest.json")
    assert error.fix == "no other checkpoint is whole: start a new run with run=runs/NAME"


def test_the_newest_whole_checkpoint_is_offered(run: Run) -> None:
    for step in (1, 2, 3, 4):
        run.save(step, keep=9)
    for step in (1, 3, 4):
        flip(run.folder / "checkpoints" / f"step-00000{step}" / "state.pt")
    error = refused(run.folder / "checkpoints" / "step-000004")
    assert error.fix is not None
    assert "--resume-from step-000002 " in error.fix


def test_a_checkpoint_struck_down_while_it_is_replaced_is_given_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1)
    rename = Path.rename
    renamed: list[Path] = []

    def only_one(path: Path, target: Path) -> Path:
        if renamed:
            raise Killed
        renamed.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", only_one)
    with pytest.raises(Killed):
        run.save(1)
    monkeypatch.undo()
    assert state.checkpoints(run.folder) == []
    state.recover(run.folder)
    (given_back,) = state.checkpoints(run.folder)
    assert given_back.name == "step-000001"
    state.verify(given_back)


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_any_turned_bit_of_a_manifest_is_reported(run: Run, bit: int) -> None:
    checkpoint = run.save(1)
    for name in FILES - {"manifest.json", "state.json"}:
        (checkpoint / name).write_bytes(b"")  # only so that two thousand digests take no time
    manifest = checkpoint / "manifest.json"
    manifest.unlink()
    state._write_manifest(checkpoint)
    content = manifest.read_bytes()
    for place, byte in enumerate(content):
        manifest.write_bytes(content[:place] + bytes([byte ^ bit]) + content[place + 1 :])
        refused(checkpoint)


def test_the_oldest_checkpoints_beyond_keep_are_removed(run: Run) -> None:
    for step in (9, 10, 11):
        run.save(step, keep=2)
    assert run.names == ["step-000010", "step-000011"]
    assert [path.name for path in state.checkpoints(run.folder)] == run.names


def test_checkpoints_are_in_the_order_of_their_steps(run: Run) -> None:
    for step in (999_999, 1_000_000):
        run.save(step)
    assert [path.name for path in state.checkpoints(run.folder)] == ["step-999999", "step-1000000"]


def test_the_best_is_pointed_at_and_never_removed(run: Run) -> None:
    for step in range(1, 6):
        run.best = Reading(2, 1.5, 1.0, None) if step >= 2 else None
        run.save(step, keep=2)
    assert run.names == ["step-000002", "step-000004", "step-000005"]
    best = run.folder / "best"
    assert best.readlink() == Path("checkpoints/step-000002")
    run.best = Reading(6, 1.4, 1.0, 0.25)
    run.save(6, keep=2)
    assert run.names == ["step-000005", "step-000006"]
    assert best.readlink() == Path("checkpoints/step-000006")
    t = run.trainer
    restored = state.restore(best, t.optimizer.load_state_dict, t.scheduler)
    assert restored.evaluations.best == run.best


def test_without_symbolic_links_a_file_says_where(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run.best = Reading(1, 1.5, 1.0, None)
    run.save(1)
    run.save(2)
    assert (run.folder / "latest").read_text() == "checkpoints/step-000002\n"
    checkpoints = run.folder.resolve() / "checkpoints"
    assert resolve(run.folder) == resolve(run.folder / "best") == checkpoints / "step-000001"
    assert resolve(run.folder / "latest") == checkpoints / "step-000002"


def test_latest_points_at_the_newest_and_moves_with_the_run_folder(run: Run) -> None:
    run.save(1)
    newest = run.save(2)
    latest = run.folder / "latest"
    assert latest.readlink() == Path("checkpoints/step-000002")
    assert latest.resolve() == newest.resolve()
    moved = run.folder.rename(run.folder.with_name("moved"))
    assert (moved / "latest").resolve() == (moved / "checkpoints/step-000002").resolve()


def test_every_file_is_flushed_before_the_checkpoint_gets_its_name(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    unflushed: list[str] = []
    flush, rename = os.fsync, Path.rename

    def watched_flush(descriptor: int) -> None:
        flush(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def watched_rename(path: Path, target: Path) -> Path:
        paths = [path, *path.iterdir()]
        unflushed.extend(p.name for p in paths if p.stat().st_ino not in flushed)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_flush)
    monkeypatch.setattr(Path, "rename", watched_rename)
    checkpoint = run.save(1)
    assert unflushed == []
    assert {path.stat().st_ino for path in checkpoint.iterdir()} < flushed


class Killed(BaseException):
    """Stands for a process that ends here: nothing may catch it and clean up."""


def killed(*_: object, **__: object) -> None:
    raise Killed


STAGES = [
    (lora, "save"),
    (state, "save_processor"),
    (torch, "save"),
    (state, "_write_manifest"),
    (Path, "rename"),
    (state, "point"),
    (Path, "replace"),
]
"""What `state.save` goes through, in this order."""


@pytest.mark.parametrize(("owner", "function"), STAGES, ids=[name for _, name in STAGES])
def test_killed_anywhere_a_save_leaves_only_whole_checkpoints(
    run: Run, owner: object, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1)
    monkeypatch.setattr(owner, function, killed)
    with pytest.raises(Killed):
        run.save(2)
    monkeypatch.undo()
    left = state.checkpoints(run.folder)
    assert left[0].name == "step-000001"
    for checkpoint in [*left, (run.folder / "latest").resolve()]:
        state.verify(checkpoint)
    newest = run.save(3)
    state.verify(newest)
    assert (run.folder / "latest").resolve() == newest.resolve()
    assert run.names == [*(path.name for path in left), "step-000003"]  # no temporary folder
    assert not list(run.folder.glob(".*"))


def test_killed_while_removing_an_old_checkpoint_leaves_only_whole_ones(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1)
    remove = shutil.rmtree

    def half(path: Path, *rest: object, **options: object) -> None:
        if not any(path.iterdir()):
            return remove(path)
        next(path.iterdir()).unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(Killed):
        run.save(2, keep=1)
    monkeypatch.undo()
    for checkpoint in state.checkpoints(run.folder):
        state.verify(checkpoint)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write files beyond a size, as it refuses on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cannot_be_written(run: Run) -> None:
    with pytest.raises(DeadpanError) as caught:
        run.save(2)
    error = caught.value
    assert error.what.startswith("The checkpoint of step 2 could not be written: ")
    assert error.where == str(run.folder / "checkpoints" / "step-000002")
    assert error.found is not None
    assert error.found.endswith(" MiB free")
    assert error.fix is not None
    assert error.fix.endswith("recipe.yaml --resume; step-000001 is intact")
    assert run.names == ["step-000001"]
    state.verify(run.folder / "latest")


def test_a_full_disk_is_a_clear_error_and_leaves_the_earlier_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run.save(1)
    monkeypatch.setattr(torch, "save", full)
    cannot_be_written(run)


@pytest.mark.parametrize(
    "file",
    ["adapter_model.safetensors", "state.pt"],
)
def test_every_writers_own_error_is_understood(run: Run, file: str) -> None:
    checkpoint = run.save(1)
    with largest_file((checkpoint / file).stat().st_size - 1):
        cannot_be_written(run)


def test_the_tokenizers_error_is_understood(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise Exception("No space left on device (os error 28)")  # as its Rust code raises it

    class Full:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> object:
            return full if name == "save" else getattr(self._tokenizer, name)

    run.save(1)
    tokenizer = run.trainer.processor.tokenizer
    monkeypatch.setattr(tokenizer, "_tokenizer", Full(tokenizer._tokenizer))
    cannot_be_written(run)


def test_without_an_earlier_checkpoint_the_error_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_write_manifest", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(DeadpanError, match="there is no earlier checkpoint"):
        run.save(1)
