"""Evaluation watches a run and does not move it; an interrupted run is evaluated as if it had not been."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deadpan.config.schema import Recipe
from deadpan.data.records import load
from deadpan.evaluate.answers import Answer
from deadpan.evaluate.likelihood import answer_loss
from deadpan.train import state
from deadpan.train.loop import Trainer
from deadpan.train.rehearsal import Rehearsal
from deadpan.train.split import trained_on
from deadpan.train.watcher import Watcher
from training import (
    SETTINGS,
    MakeRecipe,
    SignalAfter,
    course,
    evaluations,
    identical,
    result_of,
    train,
)

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 1e-3},
    {"name": "prodigy", "lr": 1.0, "d0": 1e-5},
    {"name": "schedulefree_adamw", "lr": 1e-3},
]
EVALUATION = {"every_steps": 2, "max_new_tokens": 8, "memorisation_pictures": 2}
LAST = 6


@pytest.fixture(scope="module")
def held_out(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records with pictures of their own."""
    folder = tmp_path_factory.mktemp("held-out")
    samples = []
    for number, picture in enumerate(pictures[:2]):
        # The same picture to look at, but not the same bytes: a comment after the end of the PNG.
        (folder / picture.name).write_bytes(picture.read_bytes() + b"held out")
        turns = [
            {"from": "human", "value": "<image>\n请你根据这张图片，讲一个脑洞大开的梗。"},
            {"from": "gpt", "value": f"第{number}个冷笑话。"},
        ]
        samples.append({"image": picture.name, "conversations": turns})
    path = folder / "held-out.json"
    path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return path


def evaluated(
    make: MakeRecipe, run: Path, held_out: Path, optimizer: dict[str, Any], **changes: Any
) -> Recipe:
    settings = {**SETTINGS, "evaluation": EVALUATION, **changes}
    return make(run, data={"validation": held_out}, optimizer=optimizer, **settings)


class StopAmidEvaluation(Watcher):
    """Sends this process a signal while an evaluation is under way."""

    def __init__(self, evaluation: int) -> None:
        self._left = evaluation

    def evaluating(self, done: int, total: int) -> None:
        if done == total:
            return
        self._left -= 1
        if self._left == 0:
            SignalAfter(0).stepped({"step": 0})


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
def test_a_run_that_is_evaluated_is_the_run_that_is_not(
    make: MakeRecipe, tmp_path: Path, held_out: Path, optimizer: dict[str, Any]
) -> None:
    train(make(tmp_path / "plain", optimizer=optimizer, **SETTINGS))
    train(evaluated(make, tmp_path / "run", held_out, optimizer))
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [2, 4, 6]
    assert course(tmp_path / "run") == course(tmp_path / "plain")
    assert identical(
        result_of(tmp_path / "run" / "latest"), result_of(tmp_path / "plain" / "latest")
    )


@pytest.fixture(scope="module")
def whole(make: MakeRecipe, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluated run that nothing happened to. Read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(evaluated(make, run, held_out, OPTIMIZERS[0]))
    return run


def assert_same(run: Path, whole: Path) -> None:
    assert course(run) == course(whole)
    assert evaluations(run) == evaluations(whole)
    assert (run / "jokes.jsonl").read_text() == (whole / "jokes.jsonl").read_text()
    assert identical(result_of(run / "latest"), result_of(whole / "latest"))
    assert (run / "best").resolve().name == (whole / "best").resolve().name
    states = [json.loads((r / "latest/state.json").read_text()) for r in (run, whole)]
    for values in states:
        del values["seconds"]
    assert states[0] == states[1]


def test_a_dry_run_foretells_the_evaluations(
    make: MakeRecipe, tmp_path: Path, held_out: Path, whole: Path
) -> None:
    recipe = evaluated(make, tmp_path / "run", held_out, OPTIMIZERS[0])
    pace = Rehearsal(Trainer(recipe, False, Watcher(), dry_run=True)).forecast().pace
    assert pace is not None
    assert pace.evaluations == len(evaluations(whole)) == 3
    assert pace.evaluation_seconds > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [2, 3, 6])
def test_stopped_after_a_step_and_resumed(
    make: MakeRecipe, tmp_path: Path, held_out: Path, whole: Path, step: int
) -> None:
    recipe = evaluated(make, tmp_path / "run", held_out, OPTIMIZERS[0])
    result = train(recipe, watcher=SignalAfter(step))
    # Even after the last step: its evaluation is still to be made.
    assert (result.steps, result.interrupted) == (step, True)
    assert not train(recipe, resume=True).interrupted
    assert_same(tmp_path / "run", whole)


def test_stopped_amid_an_evaluation_and_resumed(
    make: MakeRecipe, tmp_path: Path, held_out: Path, whole: Path
) -> None:
    recipe = evaluated(make, tmp_path / "run", held_out, OPTIMIZERS[0])
    result = train(recipe, watcher=StopAmidEvaluation(3))
    assert (result.steps, result.interrupted) == (2, True)
    assert evaluations(tmp_path / "run") == []
    train(recipe, resume=True)
    assert_same(tmp_path / "run", whole)


class Crash(Watcher):
    """Ends the run after an evaluation, without a chance to save."""

    def __init__(self, step: int) -> None:
        self._step = step

    def evaluated(self, metrics: dict[str, Any], jokes: Sequence[Answer]) -> None:
        if metrics["step"] == self._step:
            raise MemoryError


def test_an_evaluation_lost_in_a_crash_is_made_and_logged_again(
    make: MakeRecipe, tmp_path: Path, held_out: Path, whole: Path
) -> None:
    recipe = evaluated(make, tmp_path / "run", held_out, OPTIMIZERS[0], save_every_steps=3)
    with pytest.raises(MemoryError):
        train(recipe, watcher=Crash(4))
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [2, 4]
    train(recipe, resume=True)
    assert_same(tmp_path / "run", whole)


def test_an_evaluation_made_up_for_and_lost_in_a_crash_is_logged_once(
    make: MakeRecipe, tmp_path: Path, held_out: Path, whole: Path
) -> None:
    recipe = evaluated(make, tmp_path / "run", held_out, OPTIMIZERS[0])
    train(recipe, watcher=SignalAfter(2))  # saved before its evaluation
    with pytest.raises(MemoryError):
        train(recipe, resume=True, watcher=Crash(2))
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [2]
    train(recipe, resume=True)
    assert_same(tmp_path / "run", whole)


def test_random_numbers_drawn_in_an_evaluation_are_put_back(
    make: MakeRecipe,
    tmp_path: Path,
    held_out: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draws(*arguments: Any) -> tuple[float, int]:
        torch.rand(3)
        return answer_loss(*arguments)

    monkeypatch.setattr("deadpan.train.objective.answer_loss", draws)
    train(evaluated(make, tmp_path / "run", held_out, OPTIMIZERS[0]))
    assert_same(tmp_path / "run", whole)


def test_resuming_a_finished_run_changes_nothing(
    make: MakeRecipe, tmp_path: Path, held_out: Path
) -> None:
    recipe = evaluated(make, tmp_path / "run", held_out, OPTIMIZERS[0])
    first = train(recipe)
    files = [tmp_path / "run" / name for name in ("metrics.jsonl", "jokes.jsonl")]
    before = [file.read_bytes() for file in files]
    assert train(recipe, resume=True) == first
    assert [file.read_bytes() for file in files] == before


def test_a_share_is_split_the_same_way_when_resumed(make: MakeRecipe, tmp_path: Path) -> None:
    settings = {**SETTINGS, "evaluation": EVALUATION}
    recipe = make(tmp_path / "run", data={"validation": 0.25}, **settings)
    other = make(tmp_path / "whole", data={"validation": 0.25}, **settings)
    train(other)
    train(recipe, watcher=SignalAfter(1))
    train(recipe, resume=True)
    assert_same(tmp_path / "run", tmp_path / "whole")
    position = json.loads((tmp_path / "run/latest/state.json").read_text())
    assert position["samples"] == 9  # three of four records, three epochs
    everything = state.digest(load(recipe.data.train))
    assert everything not in (position["records"], position["held_out"], "")


def test_what_counts_as_learned_by_heart_is_what_was_trained_on(
    make: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make(tmp_path / "run", data={"validation": 0.25})
    trainer = Trainer(recipe, False, Watcher())
    assert len(trainer.held_out) == 1
    learned = [record.name for record in trained_on(recipe)]
    assert learned == [record.name for record in trainer.survey.records]
    assert trainer.held_out[0].name not in learned
    assert len(trained_on(make(tmp_path / "run"))) == 4
