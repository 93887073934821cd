import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deadpan.checkpoints.load import load as load_model
from deadpan.config.schema import Evaluation
from deadpan.data.records import load
from deadpan.errors import DeadpanError
from deadpan.evaluate.answers import Answer
from deadpan.evaluate.likelihood import answer_loss
from deadpan.evaluate.memorisation import Reading, sign
from deadpan.teller import Teller
from deadpan.train.evaluation import Figures, interval, judge
from deadpan.train.state import Evaluations
from deadpan.train.watcher import Watcher
from training import MakeRecipe, evaluations, logged, train


def figures(held_out: float, training: float, share: float | None = None) -> Figures:
    return Figures(held_out, training, share, share, ())


def course(*values: tuple[float, float, float | None]) -> list[tuple[Evaluations, bool, bool]]:
    """What a run's evaluations come to, one every ten steps: state, best so far, memorising."""
    now, found = Evaluations(), []
    for number, value in enumerate(values, start=1):
        now, best, reason = judge(now, 10 * number, figures(*value))
        found.append((now, best, reason is not None))
    return found


def test_auto_is_an_epoch_or_200_steps() -> None:
    assert interval(Evaluation(), 34) == 34
    assert interval(Evaluation(), 3000) == 200
    assert interval(Evaluation(every_steps=7), 34) == 7


def test_the_best_is_the_lowest_and_patience_counts_from_it() -> None:
    found = course((3.0, 3, None), (2.0, 2, None), (2.5, 2, None), (2.0, 2, None), (1.9, 1.9, None))
    assert [best for _, best, _ in found] == [True, True, False, False, True]
    assert [now.since_best for now, _, _ in found] == [0, 0, 1, 2, 0]
    assert [now.best and now.best.step for now, _, _ in found] == [10, 20, 20, 20, 50]
    assert [now.step for now, _, _ in found] == [10, 20, 30, 40, 50]


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    found = course((math.nan, 3, None), (2.0, 2, None), (math.nan, 2, None))
    assert [best for _, best, _ in found] == [False, True, False]


@pytest.mark.parametrize(
    ("second", "memorises"),
    [
        ((2.05, 1.0, None), True),  # held-out loss up, training loss down
        ((2.01, 1.0, None), False),  # up by chance
        ((2.05, 1.6, None), False),  # both up: it diverges, which is something else
        ((1.9, 0.5, 0.2), False),  # a gap, but it does not recite
        ((1.9, 1.5, 0.9), False),  # it recites, but is as good on new pictures
        ((1.9, 1.4, 0.5), True),  # both
        ((1.9, 0.1, None), False),  # nobody asked what it recites
    ],
)
def test_when_a_run_memorises(second: tuple[float, float, float | None], memorises: bool) -> None:
    first, then = course((2.0, 1.5, 0.0), second)
    assert not first[2]
    assert then[2] == memorises
    assert then[0].warned == memorises


def test_the_reason_is_given_in_figures() -> None:
    best = Reading(10, 2.0, 1.5, 0.0)
    assert sign(Reading(20, 2.5, 1.0, 0.0), best) == (
        "since step 10 the held-out loss has risen from 2.000 to 2.500, while that of training "
        "records fell from 1.500 to 1.000"
    )
    assert sign(Reading(20, 2.0, 1.0, 0.75), best) == (
        "75% of its answers to training pictures are training answers, and its loss is 1.00 higher "
        "on held-out pictures than on those"
    )


class Witness(Watcher):
    def __init__(self) -> None:
        self.measured: list[tuple[int, int]] = []
        self.told: list[list[str]] = []
        self.warnings: list[tuple[int, str]] = []

    def evaluating(self, done: int, total: int) -> None:
        self.measured.append((done, total))

    def evaluated(self, metrics: dict[str, Any], jokes: Sequence[Answer]) -> None:
        self.told.append([joke.text for joke in jokes])

    def memorising(self, step: int, reason: str) -> None:
        self.warnings.append((step, reason))


@pytest.fixture(scope="module")
def learned(
    make: MakeRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Witness, Path]:
    """A run that learns three answers by heart and is measured with the fourth. Read only."""
    run = tmp_path_factory.mktemp("learned") / "run"
    recipe = make(
        run,
        data={"validation": 0.25},
        optimizer={"lr": 5e-3},
        lora={"lora_dropout": 0.0},
        micro_batch_size=3,
        gradient_accumulation_steps=1,
        max_steps=18,
        epochs=100,
        save_every_steps=1000,
        keep_checkpoints=1,
        evaluation={"every_steps": 3, "max_new_tokens": 24},
    )
    witness = Witness()
    train(recipe, watcher=witness)
    return run, witness, recipe.data.train


def test_memorising_is_seen_and_said_once(learned: tuple[Path, Witness, Path]) -> None:
    run, witness, _ = learned
    lines = evaluations(run)
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18]
    assert lines[-1]["memorisation"] == lines[-1]["verbatim"] == 1.0
    assert lines[0]["memorisation"] == 0.0
    for line in lines:
        assert line["loss_gap"] == line["eval_loss"] - line["train_loss"]
        assert line["samples"] == 3 * line["step"]
    flags = [line["memorising"] for line in lines]
    assert flags[0] is False
    assert flags[-1] is True
    ((step, reason),) = witness.warnings
    assert step == 3 * (flags.index(True) + 1)
    assert "loss" in reason


def test_progress_counts_every_record_and_picture(learned: tuple[Path, Witness, Path]) -> None:
    _, witness, _ = learned
    # One held-out record, three training records, three training pictures, one probe.
    once = witness.measured[: len(witness.measured) // 6]
    assert once[-1] == (8, 8)
    assert [done for done, _ in once] == sorted(done for done, _ in once)


def test_the_best_checkpoint_is_there_and_is_what_a_run_stands_for(
    learned: tuple[Path, Witness, Path],
) -> None:
    run, _, records = learned
    lines = evaluations(run)
    best = min(lines, key=lambda line: line["eval_loss"])
    assert [line["step"] for line in lines if line["best"]][-1] == best["step"]
    assert best["step"] < 18
    assert (run / "best").resolve().name == f"step-{best['step']:06d}"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{best['step']:06d}",
        "step-000018",
    ]
    # The loss is the one that `deadpan evaluate` computes, with the weights as saved.
    jokes = [json.loads(line) for line in (run / "jokes.jsonl").read_text().splitlines()]
    (held_out,) = [r for r in load(records) if str(r.image_paths[0]) == jokes[0]["picture"]]
    for name, line in (("best", best), ("latest", lines[-1])):
        loaded = load_model(run / name, device="cpu", max_tiles=4)
        loss, _ = answer_loss(loaded.model, loaded.processor, [held_out])
        assert loss == pytest.approx(line["eval_loss"], rel=1e-5)
    assert load_model(run, device="cpu").folder == (run / "best").resolve()


def test_jokes_are_what_the_model_says(learned: tuple[Path, Witness, Path]) -> None:
    run, witness, _ = learned
    jokes = [json.loads(line) for line in (run / "jokes.jsonl").read_text().splitlines()]
    assert [joke["step"] for joke in jokes] == [3, 6, 9, 12, 15, 18]
    assert [[joke["answer"]] for joke in jokes] == witness.told
    assert all(joke.keys() == {"step", "picture", "prompt", "answer"} for joke in jokes)
    teller = Teller(load_model(run / "latest", device="cpu", max_tiles=4))
    told = teller.tell(jokes[-1]["picture"], jokes[-1]["prompt"], max_new_tokens=24)
    assert told == jokes[-1]["answer"]


def test_training_stops_early_and_stays_stopped(
    learned: tuple[Path, Witness, Path], make: MakeRecipe, tmp_path: Path
) -> None:
    run, _, _ = learned
    settings: dict[str, Any] = {
        "data": {"validation": 0.25},
        "optimizer": {"lr": 5e-3},
        "lora": {"lora_dropout": 0.0},
        "micro_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "max_steps": 18,
        "epochs": 100,
        "save_every_steps": 1000,
    }
    frugal = {"every_steps": 3, "memorisation_pictures": 0, "probe_pictures": 0}
    patient = make(
        tmp_path / "run", **settings, evaluation={**frugal, "early_stopping_patience": 2}
    )
    result = train(patient)
    best = min(evaluations(run), key=lambda line: line["eval_loss"])
    assert result.best == (best["step"], pytest.approx(best["eval_loss"]))
    assert (result.steps, result.stopped_early) == (best["step"] + 6, True)
    assert not result.interrupted
    assert "memorisation" not in evaluations(tmp_path / "run")[0]
    assert train(patient, resume=True) == result
    # With more patience it goes on.
    more = make(tmp_path / "run", **settings, evaluation=frugal)
    assert train(more, resume=True).steps == 18
    assert [line["step"] for line in logged(tmp_path / "run") if "loss" in line][-1] == 18


def test_a_validation_file_with_training_pictures_is_refused_before_weights_are_read(
    make: MakeRecipe, tmp_path: Path, records: Path
) -> None:
    with pytest.raises(DeadpanError, match="4 of 4 held-out records are about pictures"):
        train(make(tmp_path / "run", data={"validation": records}))
    assert not (tmp_path / "run").exists()


def test_without_validation_nothing_is_evaluated(make: MakeRecipe, tmp_path: Path) -> None:
    result = train(make(tmp_path / "run", max_steps=1))
    assert result.best is None
    assert not (tmp_path / "run" / "jokes.jsonl").exists()
    assert not (tmp_path / "run" / "best").exists()
    assert evaluations(tmp_path / "run") == []
