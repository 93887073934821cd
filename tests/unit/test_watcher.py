import io
from pathlib import Path

import pytest
from rich.console import Console

from deadpan.data.records import Record, load
from deadpan.evaluate.answers import Answer
from deadpan.processing.processor import Size
from deadpan.train.plan import Plan
from deadpan.train.survey import Survey
from deadpan.train.watcher import ProgressWatcher


@pytest.fixture
def samples(records: Path) -> list[Record]:
    return load(records)


def drawn(samples: list[Record], skipped: int = 0, done: int = 0, last: int = 3) -> str:
    """What a run of four steps, `done` of them done before, leaves on a terminal after its `last`."""
    console = Console(record=True, file=io.StringIO(), width=160, force_terminal=True)
    sizes = [Size(tokens, 5, 1) for tokens in (10, 30, 20, 1000)]
    survey = Survey(samples[skipped:], sizes[skipped:], samples[:skipped])
    with ProgressWatcher(console) as watcher:
        for number in range(1, 56):
            watcher.loading(number, 55)
        for number in range(1, 5):
            watcher.surveying(number, 4)
        watcher.starting(Plan(len(survey.records), 4, 2, 2, seed=0), done, survey, 2)
        for step in range(done + 1, last + 1):
            speed = {"samples_per_second": 7.25, "memory_gib": 1.04}
            watcher.stepped({"step": step, "loss": 2.5 / step, **speed})
    return console.export_text()


def test_the_end_of_a_run_shows_loss_speed_memory_and_every_stage(samples: list[Record]) -> None:
    text = drawn(samples)
    assert "4 records, 1,060 tokens an epoch, longest 1,000; 4 steps of 4 samples" in text
    last = text[text.rindex("loading weights") :]
    assert "55/55" in last
    assert "checking records" in last
    assert "4/4" in last
    assert "3/4" in last
    assert "loss 0.8333  7.25 samples/s  1.0 GiB" in last
    assert "left out" not in text
    assert "resuming" not in text


def test_records_left_out_are_counted(samples: list[Record]) -> None:
    assert "left out 2 records for being too long" in drawn(samples, skipped=2)
    text = drawn(samples, skipped=3, last=1)
    assert "1 record, 1,000 tokens an epoch, longest 1,000; 4 steps of 1 sample" in text


def test_a_resumed_run_says_where_it_goes_on(samples: list[Record]) -> None:
    text = drawn(samples, done=2, last=2)
    assert "resuming after step 2" in text
    assert "2/4" in text[text.rindex("training") :]  # the bar does not start from nothing


def test_an_evaluation_is_told_in_a_line_with_a_joke_and_memorising_in_a_warning() -> None:
    console = Console(record=True, file=io.StringIO(), width=60, force_terminal=True)
    with ProgressWatcher(console) as watcher:
        watcher.evaluating(3, 12)
        figures = {"eval_loss": 2.5, "train_loss": 1.25, "memorisation": 0.0625}
        jokes = [Answer("pictures/dog.png", "?", "[bold]冷。", True), Answer("b", "?", "no", True)]
        watcher.evaluated({"step": 20, "best": True, **figures}, jokes)
        watcher.memorising(20, "its losses part [sic]")
    text = console.export_text()
    assert "3/12" in text
    # Bars are redrawn around each line on a terminal.
    first, second = (
        "step 20: held-out loss 2.5000 (best so far), of training records 1.2500, 6% told by heart\n",
        "  dog.png: [bold]冷。\n",
    )
    assert first in text
    assert second in text[text.index(first) :]
    assert "warning: from step 20 on the run memorises: its losses part [sic]. The best" in text
