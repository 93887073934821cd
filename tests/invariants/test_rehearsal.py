"""A rehearsal foretells a run and leaves no trace in it.

The run after a search for the micro-batch size is, bit for bit, the run that was given that size; a
dry run writes nothing; and when memory runs out, what was saved is kept and can be gone on with.
"""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from deadpan.config.loader import load_recipe
from deadpan.config.schema import Optimizer
from deadpan.errors import DeadpanError
from deadpan.processing.collate import Batch
from deadpan.train.forecast import Forecast
from deadpan.train.loop import Trainer
from deadpan.train.memory import Meter
from deadpan.train.model import TrainingLoss
from deadpan.train.rehearsal import Rehearsal
from deadpan.train.watcher import Watcher
from training import MakeRecipe, course, identical, result_of, train

AUTO: dict[str, Any] = {"micro_batch_size": "auto", "samples_per_step": 4, "max_steps": 3}


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes memory run out, as on a GPU, beyond so many samples at a time; returns what was tried."""

    def limit(samples: int) -> list[int]:
        tried: list[int] = []
        real = Trainer._step

        def step(self: Trainer, number: int, share: list[Batch]) -> tuple[dict[str, Any], int]:
            tried.append(max(len(batch.names) for batch in share))
            if tried[-1] > samples:
                # What the passes before have left, as when the error comes in the midst of a step.
                self.trainable[0].grad = torch.ones_like(self.trainable[0])
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(self, number, share)

        monkeypatch.setattr(Trainer, "_step", step)
        return tried

    return limit


def forecast(recipe: Any, resume: bool = False) -> Forecast:
    return Rehearsal(Trainer(recipe, resume, Watcher(), dry_run=True)).forecast()


@pytest.mark.parametrize(("room", "size"), [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_auto_is_bit_for_bit_the_run_with_the_size_it_chooses(
    make: MakeRecipe,
    tmp_path: Path,
    room_for: Callable[[int], list[int]],
    room: int,
    size: int,
) -> None:
    given = {"micro_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 3}
    explicit = train(make(tmp_path / "explicit", **given))
    tried = room_for(room)
    result = train(make(tmp_path / "auto", **AUTO))
    assert max(tried) == 4  # the whole step at once was tried
    assert course(tmp_path / "auto") == course(tmp_path / "explicit")  # dropout and all
    assert identical(result_of(result.checkpoint), result_of(explicit.checkpoint))
    settled = load_recipe(tmp_path / "auto" / "recipe.yaml")
    assert settled.micro_batch_size == size
    assert settled.gradient_accumulation_steps == 4 // size


@pytest.mark.parametrize("name", get_args(Optimizer.model_fields["name"].annotation))
def test_no_optimizer_remembers_the_rehearsal(
    make: MakeRecipe, tmp_path: Path, room_for: Callable[[int], list[int]], name: str
) -> None:
    optimizer = {"optimizer": {"name": name, "lr": 0.01}}
    given = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    explicit = train(make(tmp_path / "explicit", **given, **optimizer))
    room_for(2)
    result = train(make(tmp_path / "auto", **AUTO, **optimizer))
    assert course(tmp_path / "auto") == course(tmp_path / "explicit")
    assert identical(result_of(result.checkpoint), result_of(explicit.checkpoint))


def test_resuming_keeps_the_size_that_was_chosen_at_first(
    make: MakeRecipe, tmp_path: Path, room_for: Callable[[int], list[int]]
) -> None:
    room_for(2)
    whole = train(make(tmp_path / "whole", **AUTO))
    changes = {**AUTO, "save_every_steps": 1}
    train(make(tmp_path / "run", **changes))
    for step in (2, 3):
        newest = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        newest.rename(tmp_path / f"lost-{step}")
    tried = room_for(4)
    result = train(make(tmp_path / "run", **changes), resume=True)
    assert tried == [2, 2]  # steps two and three, and no rehearsal
    assert course(tmp_path / "run") == course(tmp_path / "whole")
    assert identical(result_of(result.checkpoint), result_of(whole.checkpoint))


def test_a_run_that_ran_out_of_memory_goes_on_with_smaller_micro_batches(
    make: MakeRecipe, tmp_path: Path, room_for: Callable[[int], list[int]]
) -> None:
    settings = {"gradient_accumulation_steps": 1, "lora": {"lora_dropout": 0.0}, "max_steps": 3}
    train(make(tmp_path / "whole", micro_batch_size=4, **settings))
    recipe = make(tmp_path / "run", micro_batch_size=4, save_every_steps=1, **settings)

    class Shrink(Watcher):
        def stepped(self, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 2:
                room_for(2)

    with pytest.raises(DeadpanError) as caught:
        train(recipe, watcher=Shrink())
    assert caught.value.what == "The memory ran out."
    assert caught.value.fix is not None
    assert "step-000002 is intact" in caught.value.fix
    change = "micro_batch_size=2 gradient_accumulation_steps=2"
    assert change in caught.value.fix
    # As the message says it.
    again = load_recipe(tmp_path / "run" / "recipe.yaml", change.split())
    assert train(again, resume=True).steps == 3
    for mine, theirs in zip(course(tmp_path / "run"), course(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_another_number_of_samples_is_another_run(make: MakeRecipe, tmp_path: Path) -> None:
    train(make(tmp_path / "run", micro_batch_size=2, max_steps=1))
    for changes in ({"micro_batch_size": 4}, {**AUTO, "max_steps": 1, "samples_per_step": 2}):
        with pytest.raises(DeadpanError) as caught:
            train(make(tmp_path / "run", **{"max_steps": 1, **changes}), resume=True)
        assert caught.value.found is not None
        assert "micro_batch_size: " in caught.value.found


def test_where_not_even_one_sample_fits_the_run_does_not_start(
    make: MakeRecipe, tmp_path: Path, room_for: Callable[[int], list[int]]
) -> None:
    room_for(0)
    with pytest.raises(DeadpanError) as caught:
        train(make(tmp_path / "run", **AUTO))
    assert caught.value.what == "Not even one sample at a time fits in memory."
    assert caught.value.fix is not None
    assert "quantization=nf4 or max_tiles=2" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing_and_tells_what_the_run_will_do(
    make: MakeRecipe, tmp_path: Path
) -> None:
    found = forecast(make(tmp_path / "run", micro_batch_size=2, epochs=3))
    assert found.fits
    assert list(tmp_path.iterdir()) == []
    assert (found.records, found.steps) == (4, 3)
    trainer = Trainer(make(tmp_path / "run"), False, Watcher())
    assert found.whole.tokens == 3 * sum(trainer.survey.lengths)
    assert found.heaviest.computed == 2 * max(trainer.survey.lengths)
    assert found.pace is not None
    assert found.pace.timed.samples == 8  # two steps; the first warmed up
    assert found.memory is not None
    trainable = sum(p.nbytes for p in trainer.trainable)
    assert found.memory.trainable == found.memory.gradients == trainable
    # AdamW's two moments, and a step count of four bytes for each tensor.
    assert found.memory.optimizer == 2 * trainable + 4 * len(trainer.trainable)
    whole = sum(p.nbytes for p in trainer.model.parameters())
    assert found.memory.frozen == whole - trainable


def test_time_that_was_spent_on_recording_is_not_in_the_pace(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = Trainer._step, 0

    def step(self: Trainer, number: int, share: list[Batch]) -> tuple[dict[str, Any], int]:
        nonlocal steps
        steps += 1
        return real(self, number, share)

    monkeypatch.setattr(Trainer, "_step", step)
    # As if each step had taken a thousand seconds beside.
    monkeypatch.setattr(TrainingLoss, "recording_seconds", property(lambda self: -1000 * steps))
    pace = forecast(make(tmp_path / "run", micro_batch_size=2, epochs=3)).pace
    assert pace is not None
    assert pace.seconds // 1000 == pace.steps


def test_a_dry_run_may_look_at_a_folder_that_holds_a_run(make: MakeRecipe, tmp_path: Path) -> None:
    train(make(tmp_path / "run", max_steps=2, save_every_steps=1))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert forecast(make(tmp_path / "run", max_steps=2)).steps == 2
    newest = tmp_path / "run" / "checkpoints" / "step-000002"
    newest.rename(tmp_path / "lost")
    assert forecast(make(tmp_path / "run", max_steps=2), resume=True).steps == 1
    (tmp_path / "lost").rename(newest)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {k: v for k, v in after.items() if k.name != "checkpoints"} == {
        k: v for k, v in before.items() if k.name != "checkpoints"
    }


def test_of_a_finished_run_there_is_nothing_to_foretell(make: MakeRecipe, tmp_path: Path) -> None:
    train(make(tmp_path / "run", max_steps=1))
    with pytest.raises(DeadpanError, match="The run is finished"):
        forecast(make(tmp_path / "run", max_steps=1), resume=True)


def test_a_size_that_was_too_large_is_not_in_the_peak_of_the_one_that_was_chosen(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int] = []
    real = Trainer._step

    def step(self: Trainer, number: int, share: list[Batch]) -> tuple[dict[str, Any], int]:
        peaks.append(max(len(batch.names) for batch in share))
        return real(self, number, share)

    def reset(self: Meter) -> None:
        peaks.clear()

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(Meter, "reset", reset)
    # From one sample four do not seem to fit; from two they do, and then they do not.
    gib = {0: 0.0, 1: 1.0, 2: 1.1, 4: 9.0}
    monkeypatch.setattr(Meter, "now", lambda self: 2**30)
    monkeypatch.setattr(Meter, "peak", lambda self: 2**30 + int(gib[max(peaks, default=0)] * 2**30))
    monkeypatch.setattr(Meter, "limit", lambda self: int(3.6 * 2**30))
    found = forecast(make(tmp_path / "run", **AUTO))
    assert [trial.fits for trial in found.sizes] == [True, True, False]
    assert found.micro_batch_size == 2
    assert found.peak == 2**30 + int(1.1 * 2**30)


def test_what_does_not_fit_gets_changes_that_do(
    make: MakeRecipe,
    tmp_path: Path,
    room_for: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def longest(**changes: Any) -> int:
        trainer = Trainer(make(tmp_path / "run", **changes), False, Watcher())
        return max(trainer.survey.lengths)

    tried = room_for(2)
    # The tiny model's own activations are lost in what an interpreter takes.
    monkeypatch.setattr(Meter, "peak", lambda self: self.now() + 2**30 * sum(tried[-1:]))
    found = forecast(
        make(tmp_path / "run", micro_batch_size=4, gradient_checkpointing=False, max_steps=2)
    )
    assert not found.fits
    assert (found.measured, found.pace) == (False, None)
    assert found.memory is not None
    # Scaled up from one sample, the longest, to four rows as long.
    assert found.memory.activations == pytest.approx(4 * 2**30, rel=0.02)
    changes = {trial.change: trial for trial in found.changes}
    assert list(changes) == [
        "micro_batch_size=2 gradient_accumulation_steps=4",
        *("quantization=nf4", "max_tiles=2", "gradient_checkpointing=true"),
    ]
    smaller = changes["micro_batch_size=2 gradient_accumulation_steps=4"]
    assert (smaller.measured, smaller.fits) == (True, True)
    quantised, tiles = changes["quantization=nf4"], changes["max_tiles=2"]
    assert not quantised.measured
    assert quantised.peak is not None
    assert tiles.peak is not None
    assert found.memory.frozen > found.memory.peak - quantised.peak > 0
    ratio = longest(max_tiles=2) / longest()
    assert ratio < 0.95
    assert found.memory.peak - tiles.peak == pytest.approx(
        (1 - ratio) * found.memory.activations, rel=0.01
    )
    assert not changes["gradient_checkpointing=true"].fits  # that was tried, and ran out too
    assert tried[-1] == 4


def test_a_step_of_the_runs_own_order_that_runs_out_is_no_fit_either(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.steps

    def steps(self: Trainer) -> Generator[dict[str, Any], None, None]:
        yield from real(self)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "steps", steps)
    found = forecast(make(tmp_path / "run", micro_batch_size=2, max_steps=3))
    assert (found.fits, found.pace) == (False, None)
    assert found.changes[0].change == "micro_batch_size=1 gradient_accumulation_steps=4"


def test_on_a_cpu_nothing_is_tried_that_should_not_fit(
    make: MakeRecipe,
    tmp_path: Path,
    room_for: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = room_for(4)
    monkeypatch.setattr(
        Rehearsal, "_below_limit", lambda self, outcome: outcome.heaviest.samples <= 2
    )
    assert not forecast(make(tmp_path / "a", micro_batch_size=4, max_steps=2)).fits
    assert max(tried) == 2
    train(make(tmp_path / "b", **AUTO))
    assert max(tried) == 2
    assert load_recipe(tmp_path / "b" / "recipe.yaml").micro_batch_size == 2
