import io
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from deadpan.processing.processor import Size
from deadpan.train import evaluation, validation
from deadpan.train.forecast import Forecast, Load, Memory, Pace, Trial, heaviest, load_of, split
from deadpan.train.forecast_table import duration, tables
from deadpan.train.plan import MicroBatch, Plan

GIB = 2**30
SIZES = [Size(100, 20, 1), Size(300, 10, 5), Size(250, 200, 2), Size(40, 5, 0)]


def batch(*indices: int) -> MicroBatch:
    return MicroBatch(1, 0, tuple((index,) for index in indices))


def test_padding_is_computed_on_and_packing_has_none() -> None:
    padded = Load(samples=2, tokens=400, computed=600, tiles=6, supervised=30, pairs=2 * 300**2)
    packed = Load(samples=2, tokens=400, computed=400, tiles=6, supervised=30, pairs=400**2)
    assert load_of(batch(0, 1), SIZES, packing=False) == padded
    assert load_of(batch(0, 1), SIZES, packing=True) == packed
    assert padded + packed == Load(4, 800, 1000, 12, 60, 2 * 300**2 + 400**2)


def test_the_heaviest_lead_in_tokens_tiles_or_answers_and_the_load_is_summed_up() -> None:
    first, second, third = batch(0, 1), batch(2, 3), batch(3)
    leaders, whole = heaviest([third, second, first], SIZES, packing=False)
    assert leaders == [first, second]  # most tokens, tiles and pairs; most supervised tokens
    assert whole == Load(
        samples=5,
        tokens=100 + 300 + 250 + 40 + 40,
        computed=600 + 500 + 40,
        tiles=8,
        supervised=30 + 205 + 5,
        pairs=2 * 300**2 + 2 * 250**2 + 40**2,
    )


def test_nothing_the_plan_ever_does_is_heavier() -> None:
    sizes = [Size(10 + 7 * i % 90, i % 11, i % 5) for i in range(50)]
    plan = Plan(50, epochs=3, micro_batch_size=4, accumulation=2, seed=0)
    leaders, whole = heaviest(plan.micro_batches(), sizes, packing=False)
    of_leaders = [load_of(leader, sizes, packing=False) for leader in leaders]
    loads = [load_of(each, sizes, packing=False) for each in plan.micro_batches()]
    for name in ("computed", "tiles", "supervised", "pairs"):
        most = max(getattr(load, name) for load in loads)
        assert most == max(getattr(load, name) for load in of_leaders)
    assert of_leaders[0].computed == max(load.computed for load in loads)
    assert whole.samples == 3 * 50
    assert sum(loads, Load()) == whole


def test_a_peak_is_split_into_parts_that_sum_up_to_it() -> None:
    memory = split(peak=1000, level=500, frozen=300, trainable=50, optimizer=100)
    assert memory == Memory(300, 50, 50, 100, other=50, activations=450)
    assert memory.peak == 1000


def test_activations_alone_grow_with_the_batch() -> None:
    memory = Memory(300, 50, 50, 100, other=50, activations=450)
    assert memory.scaled(2.0) == Memory(300, 50, 50, 100, other=50, activations=900)


def test_the_time_goes_by_computed_tokens() -> None:
    timed = Load(samples=32, tokens=3_000, computed=4_000)
    whole = Load(samples=1600, tokens=180_000, computed=400_000)
    pace = Pace(steps=2, seconds=8.0, timed=timed, whole=whole)
    assert pace.run_seconds == 800.0
    assert (pace.samples_per_second, pace.tokens_per_second) == (2.0, 225.0)


def of_gib(activations: float, **changes: Any) -> Forecast:
    memory = Memory(4 * GIB, GIB, GIB, 2 * GIB, GIB, round(activations * GIB))
    whole = Load(samples=1600, tokens=180_000, computed=400_000)
    found = Forecast(
        device="GPU",
        run="runs/x",
        records=200,
        steps=100,
        micro_batch_size=8,
        gradient_accumulation_steps=2,
        whole=whole,
        heaviest=Load(8, 15_000, 16_000, 60),
        memory=memory,
        measured=True,
        loading=5 * GIB,
        beside=GIB // 2,
        available=20 * GIB,
        limit=19 * GIB,
        pace=Pace(2, 8.0, Load(32, 3_000, 4_000), whole),
        sizes=[],
        changes=[],
    )
    return replace(found, **changes)


def shown(forecast: Forecast) -> str:
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(tables(forecast))
    return console.export_text()


def test_it_fits_up_to_the_limit_and_when_measured() -> None:
    assert of_gib(10).fits  # 19 GiB
    assert not of_gib(10.01).fits
    assert not of_gib(10, measured=False).fits
    assert not of_gib(10, memory=None).fits
    assert not of_gib(1, loading=20 * GIB).fits
    assert of_gib(1, loading=12 * GIB).peak == 12 * GIB


def test_the_tables_tell_memory_and_time_on_eighty_columns() -> None:
    text = shown(of_gib(6))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "200 records, 100 steps of 8 x 2 samples, 180,000 tokens in all" in lines
    assert "the largest batch: 8 samples, 16,000 tokens with padding, 60 tiles" in lines
    for row in (
        *("weights, frozen 4.00", "weights, trainable 1.00 float32", "gradients 1.00"),
        *("optimizer state 2.00", "activations 6.00", "buffers, workspaces 1.00"),
        "peak 15.00 memory_gib in metrics.jsonl",
        "CUDA context 0.50 beside it, with other programs' memory",
        "fits: 15.00 GiB of 20.00 available, 19.00 to plan with",
        "speed 2.00 samples/s 225 tokens/s, from 2 of its steps",
        "the whole run 13 min 20 s and what saving takes",
    ):
        assert row in lines
    assert "evaluating" not in text
    assert "what to change" not in text


def test_evaluations_are_part_of_the_run_and_not_of_its_speed() -> None:
    whole = Load(samples=1600, tokens=180_000, computed=400_000)
    pace = Pace(2, 8.0, Load(32, 3_000, 4_000), whole, evaluations=9, evaluation_seconds=70.0)
    assert (pace.training_seconds, pace.run_seconds) == (800.0, 800.0 + 9 * 70.0)
    lines = [" ".join(line.split()) for line in shown(of_gib(6, pace=pace)).splitlines()]
    for row in (
        "speed 2.00 samples/s 225 tokens/s, from 2 of its steps",
        "training 13 min 20 s",
        "evaluating 10 min 30 s 9 times 1 min 10 s",
        "the whole run 23 min 50 s and what saving takes",
    ):
        assert row in lines


def test_the_loss_of_many_held_out_records_is_reckoned_from_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, taken = 100.0, []

    class Evaluator:
        def __init__(self, *arguments: Any) -> None:
            self._held_out = arguments[4]

        def evaluate(self, progress: Callable[[int, int], None]) -> None:
            nonlocal clock
            taken.extend(self._held_out)
            for done in range(1, len(self._held_out) + 1):
                clock += 0.5
                progress(done, 50)
            clock += 7.0  # training records and pictures, of which there are always as many
            progress(50, 50)

    monkeypatch.setattr(evaluation, "Evaluator", Evaluator)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    trainer: Any = MagicMock(held_out=range(1000))
    trainer.recipe.seed = 0
    assert validation.seconds(trainer, 40) == 1000 * 0.5 + 7.0
    assert len(set(taken)) == 40
    assert validation.seconds(trainer, 2000) == 1000 * 0.5 + 7.0


@pytest.mark.parametrize(
    ("held_out", "done", "count"), [(5, 0, 3), (5, 3, 2), (5, 6, 1), (5, 7, 0), (0, 0, 0)]
)
def test_the_evaluations_to_come_are_counted(held_out: int, done: int, count: int) -> None:
    trainer: Any = MagicMock(held_out=range(held_out))
    trainer.plan.steps = 7  # of which steps 3, 6 and the last are evaluated
    trainer.recipe.evaluation.every_steps = 3
    assert validation.count_after(trainer, done) == count


def test_what_does_not_fit_says_what_to_change_and_how_that_is_known() -> None:
    changes = [
        Trial("micro_batch_size=4 gradient_accumulation_steps=4", 12 * GIB, True, True),
        Trial("quantization=nf4", 18 * GIB, False, True),
        Trial("max_tiles=6", 21 * GIB, False, False),
        Trial("gradient_checkpointing=true", None, False, False),
    ]
    text = shown(of_gib(11, measured=False, pace=None, changes=changes))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "activations 11.00 estimated from fewer samples" in lines
    assert "does not fit: 20.00 GiB of 20.00 available, 19.00 to plan with" in lines
    assert "micro_batch_size=4 gradient_accumulation_steps=4 12.00 fits" in lines
    assert "quantization=nf4 18.00 fits, estimated" in lines
    assert "max_tiles=6 21.00 does not fit, estimated" in lines
    assert "gradient_checkpointing=true ? no figure" in lines
    assert "samples/s" not in text


def test_no_figure_is_made_up_where_nothing_fits() -> None:
    text = shown(of_gib(1, memory=None, measured=False, pace=None))
    assert "memory ran out with one sample at a time" in text
    assert "does not fit" in text


def test_json_has_every_figure_in_bytes_and_seconds() -> None:
    figures = of_gib(6).to_json()
    assert (figures["peak"], figures["fits"]) == (15 * GIB, True)
    assert figures["memory"]["activations"] == 6 * GIB
    assert figures["pace"]["run_seconds"] == 800.0
    assert of_gib(6, pace=None).to_json()["pace"] is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (7.25, "7.2 s"),
        (59.97, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.6, "1 h 0 min"),
        (6500, "1 h 48 min"),
        (400_000, "111 h 7 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
