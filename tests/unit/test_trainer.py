import json
import math
import multiprocessing
import multiprocessing.connection
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import load_file

from deadpan.config.loader import load_recipe
from deadpan.environment import versions
from deadpan.errors import DeadpanError
from deadpan.models.answer_loss import AnswerLoss
from deadpan.train import state
from deadpan.train.loop import Trainer
from deadpan.train.rehearsal import Rehearsal
from deadpan.train.watcher import Watcher
from training import MakeRecipe, SignalAfter, course, identical, logged, result_of, train


class Diary(Watcher):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def loading(self, done: int, total: int) -> None:
        self.events.append("loading")

    def surveying(self, done: int, total: int) -> None:
        self.events.append("surveying")

    def starting(self, *_: object) -> None:
        self.events.append("starting")

    def stepped(self, metrics: dict[str, Any]) -> None:
        self.events.append(f"step {metrics['step']}")


@pytest.fixture(scope="module")
def finished(make: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps with a checkpoint after each. Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    result = train(make(run, max_steps=3, micro_batch_size=2, save_every_steps=1))
    assert (result.steps, result.interrupted) == (3, False)
    assert result.checkpoint == run / "checkpoints" / "step-000003"
    assert result.loss == logged(run)[-1]["loss"]
    return run


@pytest.fixture
def started(finished: Path, tmp_path: Path) -> Path:
    """The same run as it was after its second step."""
    run = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    shutil.rmtree(run / "checkpoints" / "step-000003")
    return run


def refused(recipe: Any, resume: bool = False, watcher: Watcher | None = None) -> DeadpanError:
    with pytest.raises(DeadpanError) as caught:
        train(recipe, resume, watcher)
    return caught.value


def test_the_run_folder_holds_the_whole_resolved_recipe(finished: Path, make: MakeRecipe) -> None:
    recipe = make(finished, max_steps=3, micro_batch_size=2, save_every_steps=1)
    assert load_recipe(finished / "recipe.yaml") == recipe
    text = (finished / "recipe.yaml").read_text(encoding="utf-8")
    assert "\n  weight_decay: 0.05\n" in text  # a default, written out


def test_the_run_folder_tells_the_environment(finished: Path) -> None:
    environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    assert environment.keys() == {"versions", "devices", "git_revision", "command"}
    assert environment["versions"] == versions()


def test_every_step_is_logged_with_every_metric(finished: Path) -> None:
    lines = logged(finished)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["epoch"] for line in lines] == [1.0, 2.0, 3.0]  # four records, four a step
    assert [line["samples"] for line in lines] == [4, 8, 12]
    for line in lines:
        assert line.keys() == {
            *("step", "epoch", "loss", "samples", "lr", "grad_norm", "samples_per_second"),
            *("tokens_per_second", "data_wait_fraction", "memory_gib"),
        }
        assert all(math.isfinite(value) and value > 0 for value in line.values())
        assert line["data_wait_fraction"] < 1
        ratio = line["tokens_per_second"] / line["samples_per_second"]
        assert ratio == pytest.approx(185 / 4, rel=0.05)  # both are rounded


def test_the_log_may_be_thinner_and_always_has_the_last_step(
    make: MakeRecipe, tmp_path: Path
) -> None:
    train(make(tmp_path / "run", max_steps=5, log_every_steps=2))
    assert [line["step"] for line in logged(tmp_path / "run")] == [2, 4, 5]


def test_events_come_in_order(make: MakeRecipe, tmp_path: Path) -> None:
    diary = Diary()
    train(make(tmp_path / "run", max_steps=2), watcher=diary)
    assert list(dict.fromkeys(diary.events)) == [
        *("surveying", "loading", "starting", "step 1", "step 2")
    ]


def test_a_fresh_run_never_overwrites_another(finished: Path, make: MakeRecipe) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    error = refused(make(finished, seed=7))
    assert error.what == "The run folder holds a run already."
    assert (error.where, error.found) == (str(finished), "checkpoints up to step-000003")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_place_that_cannot_be_written_is_told_before_a_record_is_looked_at(
    make: MakeRecipe, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    diary = Diary()
    with pytest.raises(DeadpanError, match="The run folder cannot be written there") as caught:
        train(make(tmp_path / "file" / "run"), watcher=diary)
    assert caught.value.found == f"{tmp_path / 'file'} is no folder"
    assert diary.events == []


def test_a_mistake_in_the_validation_file_is_told_before_a_record_is_looked_at(
    make: MakeRecipe, tmp_path: Path
) -> None:
    diary = Diary()
    recipe = make(tmp_path / "run", data={"validation": tmp_path / "gone.json"})
    with pytest.raises(DeadpanError, match="The file of records does not exist"):
        train(recipe, watcher=diary)
    assert diary.events == []


def test_a_run_that_died_before_its_first_checkpoint_starts_afresh(
    started: Path, make: MakeRecipe, finished: Path
) -> None:
    shutil.rmtree(started / "checkpoints")
    train(make(started, max_steps=3, micro_batch_size=2))
    assert course(started) == course(finished)  # and the lines of its first life are gone


def test_resuming_needs_a_checkpoint(make: MakeRecipe, tmp_path: Path) -> None:
    error = refused(make(tmp_path / "run"), resume=True)
    assert error.what == "There is no checkpoint to resume from."
    assert error.where == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "before", "now"),
    [
        ("seed", 1, "seed: 0", "seed: 1"),
        ("optimizer", {"lr": 2e-3}, "optimizer.lr: 0.001", "optimizer.lr: 0.002"),
        ("lora", {"lora_dropout": 0.1}, "lora.lora_dropout: 0.05", "lora.lora_dropout: 0.1"),
        ("max_steps", 4, "max_steps: 3", "max_steps: 4"),
        ("packing", True, "packing: false", "packing: true"),
    ],
)
def test_resuming_with_another_recipe_is_refused_and_names_the_key(
    started: Path, make: MakeRecipe, key: str, value: object, before: str, now: str
) -> None:
    changes = {"max_steps": 3, "micro_batch_size": 2, "save_every_steps": 1, key: value}
    diary = Diary()
    error = refused(make(started, **changes), resume=True, watcher=diary)
    assert error.where == str(started / "recipe.yaml")
    assert error.expected is not None
    assert error.found is not None
    assert error.expected == before
    assert error.found == now
    assert diary.events == []


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "eager"},
        {"log_every_steps": 3, "save_every_steps": 50, "keep_checkpoints": 1},
        {"data": {"workers": 1}},
    ],
)
def test_what_does_not_decide_the_result_may_change(
    started: Path, make: MakeRecipe, changes: dict[str, Any]
) -> None:
    settings = {"max_steps": 3, "micro_batch_size": 2, "save_every_steps": 1, **changes}
    result = train(make(started, **settings), resume=True)
    assert (result.steps, result.interrupted) == (3, False)


def test_training_on_an_adapter_is_refused(
    finished: Path, make: MakeRecipe, tmp_path: Path
) -> None:
    error = refused(make(tmp_path / "run", model=str(finished)))
    assert error.what == "Training starts from a whole model, and this is an adapter."
    assert error.where == str((finished / "latest").resolve())
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_records_are_found_before_weights_are_read(
    make: MakeRecipe, tmp_path: Path
) -> None:
    path = tmp_path / "records.json"
    path.write_text('[{"conversations": [{"from": "human", "value": "?"}]}]')
    diary = Diary()
    error = refused(make(tmp_path / "run", data={"train": path}), watcher=diary)
    assert error.what == "The records have 1 error."
    assert diary.events == []
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_records(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = AnswerLoss.forward

    def spoilt(self: AnswerLoss, *inputs: Any) -> torch.Tensor:
        calls.append(inputs)
        return forward(self, *inputs) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(AnswerLoss, "forward", spoilt)
    recipe = make(tmp_path / "run", micro_batch_size=1, max_steps=9, save_every_steps=1)
    trainer = Trainer(recipe, False, Watcher())
    with pytest.raises(DeadpanError) as caught:
        trainer.train()
    batches = [batch for batch in trainer.plan.micro_batches() if batch.step == 2]
    names = [trainer.survey.records[i].name for batch in batches for i in batch.indices]
    assert len(names) == 2
    assert caught.value.what == "The loss or its gradient is no longer finite at step 2."
    assert caught.value.where == "; ".join(names)
    assert caught.value.found == (
        "loss nan, gradient norm nan; each of these records is finite by itself"
    )
    assert [line["step"] for line in logged(tmp_path / "run")] == [1]
    # The spoilt gradient reached no weight: they are still those of the first checkpoint.
    saved = load_file(tmp_path / "run" / "latest" / "adapter_model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".modules_to_save", "").replace(".default", "")
            assert torch.equal(parameter, saved[key])


def overflow(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, guilty: int, what: str) -> None:
    """Let the loss, or only its gradient, of one record overflow wherever the record appears."""
    ids = trainer.processor.record(trainer.survey.records[guilty]).input_ids
    needle = torch.tensor(ids)
    forward = AnswerLoss.forward

    def poisoned(self: AnswerLoss, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        loss = forward(self, input_ids, *rest)
        rows = [row[: len(ids)] for row in input_ids]
        if not any(torch.equal(row, needle) for row in rows):
            return loss
        if what == "loss":
            return loss * 1e38 * 1e38
        # Zero at zero, and steeper there than a float can say.
        return loss + (loss - loss.detach()).abs().sqrt()

    monkeypatch.setattr(AnswerLoss, "forward", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_one_record_that_is_not_finite_is_found_and_kept_to_look_at(
    make: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    micro_batch_size: int,
) -> None:
    run = tmp_path / "run"
    recipe = make(
        run,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=4 // micro_batch_size,
    )
    trainer = Trainer(recipe, False, Watcher())
    overflow(monkeypatch, trainer, 2, what)
    stepped = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: stepped.append(1))
    with pytest.raises(DeadpanError) as caught:
        trainer.train()
    assert stepped == []
    assert caught.value.where == trainer.survey.records[2].name
    assert caught.value.where.endswith("(id 'r2')")
    assert "of the step's 4 records these alone" in str(caught.value.found)
    assert str(run / "nonfinite.json") in str(caught.value.fix)

    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((run / "nonfinite.json").read_text(), parse_constant=strict)
    assert report["step"] == 1
    assert report["grad_norm"] in ("inf", "nan")
    by_id = {record["id"]: record for record in report["records"]}
    assert sorted(by_id) == ["r0", "r1", "r2", "r3"]
    assert [name for name, record in by_id.items() if not record["finite"]] == ["r2"]
    assert by_id["r2"]["grad_norm"] in ("inf", "nan")
    assert (by_id["r2"]["loss"] == "inf") is (what == "loss")
    assert by_id["r2"]["images"] == ["picture-2.png"]
    assert by_id["r2"]["turns"][-1] == ["gpt", "一只猫。"]
    assert all(record["loss"] > 1 for name, record in by_id.items() if name != "r2")


def test_weights_that_have_run_away_are_told_from_a_bad_record(
    make: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make(
        tmp_path / "run",
        micro_batch_size=4,
        gradient_accumulation_steps=1,
        epochs=9,
        save_every_steps=1,
        optimizer={"lr": 1e30},
        schedule={"warmup_ratio": 0.0},
    )
    error = refused(recipe)
    assert "the weights have run away" in str(error.found)
    assert str(error.where).count("record") >= 4
    assert "is intact" in str(error.fix)
    state.verify(tmp_path / "run" / "latest")


def test_a_rehearsal_that_is_not_finite_writes_nothing(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make(tmp_path / "run"), False, Watcher(), dry_run=True)
    for record in range(4):
        overflow(monkeypatch, trainer, record, "loss")
    with pytest.raises(DeadpanError, match="no longer finite"):
        Rehearsal(trainer).forecast()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_at_hand_and_the_run_can_go_on(
    make: MakeRecipe, tmp_path: Path, finished: Path, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    recipe = make(tmp_path / "run", max_steps=3, micro_batch_size=2)
    result = train(recipe, watcher=SignalAfter(1, number))
    assert (result.steps, result.interrupted) == (1, True)
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-000001"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    result = train(recipe, resume=True)
    assert (result.steps, result.interrupted) == (3, False)
    assert course(tmp_path / "run") == course(finished)


def test_a_signal_to_the_whole_process_group_saves_too(make: MakeRecipe, tmp_path: Path) -> None:
    class Scancel(SignalAfter):
        def stepped(self, metrics: dict[str, Any]) -> None:
            for child in multiprocessing.active_children():
                # From without: a worker takes a signal from its parent for a dismissal.
                subprocess.run(["kill", "-TERM", str(child.pid)], check=True)
                # Time to die in; one that lives on is what is wanted.
                multiprocessing.connection.wait([child.sentinel], timeout=1)
            super().stepped(metrics)

    recipe = make(tmp_path / "run", max_steps=9, data={"workers": 1})
    result = train(recipe, watcher=Scancel(1, signal.SIGTERM))
    assert (result.steps, result.interrupted) == (1, True)


def test_a_signal_in_the_last_step_is_no_interruption(make: MakeRecipe, tmp_path: Path) -> None:
    result = train(make(tmp_path / "run", max_steps=2), watcher=SignalAfter(2))
    assert (result.steps, result.interrupted) == (2, False)


def test_a_second_signal_interrupts_at_once(make: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make(tmp_path / "run", max_steps=2), watcher=SignalAfter(1, times=2))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("projector", [True, False])
def test_only_the_adapter_and_the_projector_change(
    make: MakeRecipe, tmp_path: Path, projector: bool
) -> None:
    recipe = make(tmp_path / "run", max_steps=3, train_projector=projector)
    trainer = Trainer(recipe, False, Watcher())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapter = {name for name in before if ".lora_A." in name or ".lora_B." in name}
    copy = {name for name in before if "multi_modal_projector.modules_to_save." in name}
    assert len(adapter) == 2 * 7 * 2  # A and B of q, k, v, o, gate, up and down, in two layers
    assert bool(copy) is projector
    assert changed == adapter | copy
    saved = load_file(tmp_path / "run" / "latest" / "adapter_model.safetensors")
    assert len(saved) == len(changed)


def test_the_loss_goes_down(make: MakeRecipe, tmp_path: Path) -> None:
    train(make(tmp_path / "run", max_steps=12, epochs=12, lora={"lora_dropout": 0.0}))
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_worker_processes_change_nothing(make: MakeRecipe, finished: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path / "run", max_steps=3, micro_batch_size=2, data={"workers": 2})
    result = train(recipe)
    assert course(tmp_path / "run") == course(finished)
    assert identical(result_of(result.checkpoint), result_of(finished / "latest"))


@pytest.mark.parametrize(
    "workers",
    [
        0,
        1,
    ],
)
def test_a_picture_lost_on_the_way_is_named(
    make: MakeRecipe, records: Path, tmp_path: Path, workers: int
) -> None:
    folder = Path(shutil.copytree(records.parent, tmp_path / "data"))

    class Thief(Watcher):
        def starting(self, *_: object) -> None:
            (folder / "picture-1.png").unlink()

    data = {"train": folder / "records.json", "workers": workers}
    error = refused(make(tmp_path / "run", data=data), watcher=Thief())
    assert error.what == "The picture is missing."
    assert error.where == str(folder / "picture-1.png")
    # Or Python would wait for it when it exits.
    assert multiprocessing.active_children() == []


def test_bf16_trains_float32_adapters_on_a_frozen_bf16_model(
    make: MakeRecipe, tmp_path: Path, finished: Path
) -> None:
    recipe = make(tmp_path / "run", max_steps=3, micro_batch_size=2, precision="bf16")
    trainer = Trainer(recipe, False, Watcher())
    types = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    trainer.train()
    # bfloat16 has 8 significant bits, 0.4 % a rounding.
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert losses == pytest.approx([line["loss"] for line in logged(finished)], rel=0.02)
    assert losses[-1] < losses[0]


def test_runs_of_different_precision_may_share_a_process(make: MakeRecipe, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        train(make(tmp_path / precision, max_steps=1, precision=precision))


def test_nf4_trains_an_adapter_on_four_bit_weights(
    make: MakeRecipe, tmp_path: Path, finished: Path
) -> None:
    recipe = make(tmp_path / "run", max_steps=2, micro_batch_size=2, quantization="nf4")
    trainer = Trainer(recipe, False, Watcher())
    quantised = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
    assert len(quantised) == 7 * 2
    before = [layer.weight.clone() for layer in quantised]
    trainer.train()
    for layer, weight in zip(quantised, before, strict=True):
        assert isinstance(layer.weight, Params4bit)
        assert torch.equal(layer.weight, weight)
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert losses[1] < losses[0]
    # Four bits move the loss a little, but not much.
    assert losses[0] != logged(finished)[0]["loss"]
    assert losses[0] == pytest.approx(logged(finished)[0]["loss"], rel=0.1)
    policy = json.loads((tmp_path / "run" / "latest" / "deadpan.json").read_text(encoding="utf-8"))
    assert policy["trained_on"] == "nf4"
