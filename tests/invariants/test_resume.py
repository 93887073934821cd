"""A run that was stopped and resumed is, bit for bit, the run that never was.

Dropout is on, so the random numbers count. A step takes three samples of four records, so every other
step is a short one that ends an epoch.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from deadpan.cli import main
from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.train import state
from deadpan.train.watcher import Watcher
from forked import fork
from training import SETTINGS, MakeRecipe, SignalAfter, course, identical, result_of, train

LAST = 6


@pytest.fixture(scope="module")
def uninterrupted(make: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to. Read only."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = train(make(run, **SETTINGS))
    assert (result.steps, result.interrupted) == (LAST, False)
    return run


@pytest.fixture
def recipe(make: MakeRecipe, tmp_path: Path) -> Recipe:
    return make(tmp_path / "run", **SETTINGS)


def assert_same(run: Path, other: Path) -> None:
    """Not within a tolerance: the same numbers."""
    assert course(run) == course(other)
    assert identical(result_of(run / "latest"), result_of(other / "latest"))
    positions = [json.loads((path / "latest/state.json").read_text()) for path in (run, other)]
    assert positions[0]["samples"] == positions[1]["samples"]


class Crash(Watcher):
    """Ends the run without a chance to save."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self._step:
            raise MemoryError


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_interrupted_and_resumed_is_uninterrupted(
    uninterrupted: Path, recipe: Recipe, step: int
) -> None:
    assert train(recipe, watcher=SignalAfter(step)).steps == step
    assert train(recipe, resume=True).steps == LAST
    assert_same(Path(recipe.run), uninterrupted)


def test_interrupted_after_every_step_is_uninterrupted(uninterrupted: Path, recipe: Recipe) -> None:
    for step in range(1, LAST + 1):
        train(recipe, resume=step > 1, watcher=SignalAfter(step))
    assert_same(Path(recipe.run), uninterrupted)


def test_with_worker_processes_too(uninterrupted: Path, make: MakeRecipe, tmp_path: Path) -> None:
    # They prepare batches ahead of the step at which the run is stopped.
    recipe = make(tmp_path / "run", data={"workers": 2}, **SETTINGS)
    assert train(recipe, watcher=SignalAfter(2)).steps == 2
    train(recipe, resume=True)
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(("crash", "resumed_from"), [(3, 2), (4, 2), (5, 4)])
def test_steps_lost_in_a_crash_are_done_and_logged_again(
    uninterrupted: Path, make: MakeRecipe, tmp_path: Path, crash: int, resumed_from: int
) -> None:
    recipe = make(tmp_path / "run", save_every_steps=2, **SETTINGS)
    with pytest.raises(MemoryError):
        train(recipe, watcher=Crash(crash))
    assert (tmp_path / "run" / "latest").resolve().name == f"step-{resumed_from:06d}"
    assert course(tmp_path / "run") == course(uninterrupted)[:crash]
    train(recipe, resume=True)
    assert_same(tmp_path / "run", uninterrupted)


def test_a_damaged_checkpoint_is_refused_and_the_advice_leads_back_to_the_same_run(
    uninterrupted: Path, make: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make(tmp_path / "run", save_every_steps=1, **SETTINGS)
    train(recipe, watcher=SignalAfter(4))
    damaged = (tmp_path / "run" / "latest").resolve()
    (damaged / "state.pt").write_bytes(b"")
    with pytest.raises(DeadpanError) as caught:
        train(recipe, resume=True)
    assert caught.value.where == str(tmp_path / "run" / "checkpoints" / "step-000004" / "state.pt")
    assert caught.value.fix == (
        f"deadpan train {tmp_path / 'run' / 'recipe.yaml'} --resume-from step-000003 "
        "goes on from the newest whole checkpoint and deletes none"
    )
    assert damaged.is_dir()
    command, _ = caught.value.fix.split(" goes on ")

    def as_advised() -> None:
        sys.argv = shlex.split(command)
        main.run()

    _, status = os.waitpid(fork(as_advised, tmp_path / "output.txt"), 0)
    output = (tmp_path / "output.txt").read_text()
    assert status == 0, output
    assert f"set aside, remove it when you like: {damaged}.aside" in output
    assert "resuming after step 3" in output
    assert_same(tmp_path / "run", uninterrupted)
    assert (tmp_path / "run" / "checkpoints" / "step-000004.aside" / "state.pt").exists()


def test_a_run_goes_back_to_an_older_checkpoint_and_keeps_the_newer_ones_aside(
    uninterrupted: Path, make: MakeRecipe, tmp_path: Path
) -> None:
    # One checkpoint is kept: were the newer ones still in the way, it would be theirs.
    settings = {**SETTINGS, "save_every_steps": 1}
    run = tmp_path / "run"
    train(make(run, keep_checkpoints=9, **settings))
    for again in range(2):
        assert train(make(run, keep_checkpoints=9, **settings), resume="2").steps == LAST
        assert len(list((run / "checkpoints").glob("*.aside*"))) == 4 * (again + 1)
        assert_same(run, uninterrupted)
    train(make(run, keep_checkpoints=1, **settings), resume="step-000003", watcher=SignalAfter(4))
    assert [path.name for path in state.checkpoints(run)] == ["step-000004"]
    assert (run / "latest").resolve().name == "step-000004"
    aside = sorted(path.name for path in (run / "checkpoints").glob("*.aside*"))
    endings = {3: 2, 4: 3, 5: 3, 6: 3}
    assert aside == [
        f"step-00000{step}.aside" + (f"-{n}" if n > 1 else "")
        for step, count in endings.items()
        for n in range(1, count + 1)
    ]
    train(make(run, **settings), resume=True)
    assert_same(run, uninterrupted)
    with pytest.raises(DeadpanError, match=r"There is no checkpoint step-000099\.") as caught:
        train(make(run, **settings), resume="99")
    assert caught.value.found == "step-000004, step-000005, step-000006"


def test_a_moved_run_folder_resumes(
    uninterrupted: Path, recipe: Recipe, make: MakeRecipe, tmp_path: Path
) -> None:
    train(recipe, watcher=SignalAfter(2))
    moved = Path(recipe.run).rename(tmp_path / "elsewhere")
    train(make(moved, **SETTINGS), resume=True)
    assert_same(moved, uninterrupted)


def test_a_half_written_line_of_the_log_is_no_obstacle(uninterrupted: Path, recipe: Recipe) -> None:
    train(recipe, watcher=SignalAfter(2))
    with (Path(recipe.run) / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')
    train(recipe, resume=True)
    assert_same(Path(recipe.run), uninterrupted)


def test_resuming_a_finished_run_changes_nothing(recipe: Recipe) -> None:
    first = train(recipe)
    log = (Path(recipe.run) / "metrics.jsonl").read_bytes()
    assert train(recipe, resume=True) == first
    assert (Path(recipe.run) / "metrics.jsonl").read_bytes() == log


def test_resuming_with_other_records_in_the_file_is_refused(
    make: MakeRecipe, records: Path, tmp_path: Path
) -> None:
    path = tmp_path / "records.json"
    samples = json.loads(records.read_text(encoding="utf-8"))
    path.write_text(json.dumps(samples), encoding="utf-8")
    data = {"train": path, "images": records.parent}
    recipe = make(tmp_path / "run", data=data, **SETTINGS)
    train(recipe, watcher=SignalAfter(2))
    path.write_text(json.dumps(samples[::-1]), encoding="utf-8")
    with pytest.raises(DeadpanError, match="records"):
        train(recipe, resume=True)


def test_the_random_numbers_are_part_of_it(
    uninterrupted: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without this, the other tests would not see whether they are restored.
    train(recipe, watcher=SignalAfter(2))
    monkeypatch.setattr(state, "set_random_state", lambda _: None)
    train(recipe, resume=True)
    assert course(Path(recipe.run))[:2] == course(uninterrupted)[:2]
    losses = zip(course(Path(recipe.run))[2:], course(uninterrupted)[2:], strict=True)
    assert all(one[1] != other[1] for one, other in losses)
