"""Likelihoods as the engine gives them, and the verb that puts models side by side."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deadpan.checkpoints.load import Loaded
from deadpan.checkpoints.load import load as load_checkpoint
from deadpan.cli.main import app
from deadpan.data.records import Record, Turn, load
from deadpan.engines.builtin import BuiltinEngine
from deadpan.errors import DeadpanError
from deadpan.evaluate.choices import draw
from deadpan.evaluate.likelihood import answer_loss, likelihoods
from deadpan.evaluate.statistics import metric


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load_checkpoint(tiny, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def held_out(records: Path) -> list[Record]:
    """Four pictures, one of them with a second answer and one with a conversation of two."""
    first, second, *rest = load(records)
    again = replace(first, turns=(*first.turns[:-1], Turn("gpt", "又是周一。")))
    more = (*second.turns, Turn("human", "再说"), Turn("gpt", "冷。"))
    return [first, again, replace(second, turns=more), *rest]


def test_the_loss_is_that_of_training_with_the_records_told_apart(
    loaded: Loaded, held_out: list[Record]
) -> None:
    found = likelihoods(
        BuiltinEngine(loaded), lambda text: len(loaded.processor.choice(text)), held_out
    )
    expected, tokens = answer_loss(loaded.model, loaded.processor, held_out)
    (loss,) = found
    assert sum(loss.weights or ()) == tokens
    assert metric(loss).value == pytest.approx(expected, abs=1e-4)
    assert len(set(loss.pictures)) == 4


def test_each_picture_is_asked_of_the_engine_once(loaded: Loaded, held_out: list[Record]) -> None:
    asked: list[str] = []

    class Counting(BuiltinEngine):
        def score(self, request, choices):  # type: ignore[no-untyped-def]
            asked.append(request.name)
            return super().score(request, choices)

    drawn = draw(held_out)
    found = likelihoods(Counting(loaded), len, held_out, drawn.questions)
    assert "2T1 accuracy" in [items.name for items in found]
    # The conversation of two answers is asked twice: after its first question and after its second.
    assert len(asked) == 5


def test_models_meet_the_same_questions_and_are_compared(
    tiny: Path, records: Path, tmp_path: Path
) -> None:
    options = ["--device", "cpu", "--max-new-tokens", "4"]
    kept, out = tmp_path / "questions.jsonl", tmp_path / "new" / "figures.json"
    one = ["evaluate", tiny, records, "--questions-out", kept, "--answers", tmp_path / "said.jsonl"]
    two = ["evaluate", tiny, f"{tiny}/.", records, "--questions", kept, "--out", out]
    for command in (one, two):
        result = CliRunner().invoke(app, [*map(str, command), *options], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.exception
    figures = json.loads(out.read_text())
    assert figures["questions_sha256"] == json.loads(kept.read_text().splitlines()[0])["sha256"]
    first, second = figures["models"].values()
    assert first == second
    assert set(first["skipped"]) == {"5T2", "ranking", "grounded", "verbatim from training"}
    against = figures["differences"][f"{tiny}/."]
    assert against["from"] == str(tiny)
    assert {one["value"] for one in against["metrics"]} == {0.0}
    assert {one["p"] for one in against["metrics"]} == {1.0}
    assert "no ranking: the records have no stars" in result.stdout
    strange = tmp_path / "others.json"
    strange.write_text(records.read_text().replace("讲一个", "讲两个"))
    refused = [*map(str, ["evaluate", tiny, strange, "--questions", kept])]
    refusal = CliRunner().invoke(app, refused).exception
    assert isinstance(refusal, DeadpanError)
    assert "are not about these records" in refusal.what


@pytest.mark.parametrize("option", ["--out", "--answers", "--questions-out"])
def test_what_could_not_be_written_is_not_computed(
    records: Path, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("")
    command = ["evaluate", "no-such-model", records, option, tmp_path / "file" / "x.json"]
    refusal = CliRunner().invoke(app, [*map(str, command)]).exception
    assert isinstance(refusal, DeadpanError)
    assert "cannot be written there" in refusal.what


def test_a_model_is_not_compared_with_itself(records: Path) -> None:
    refusal = CliRunner().invoke(app, ["evaluate", "nano", "nano", str(records)]).exception
    assert isinstance(refusal, DeadpanError)
    assert refusal.what == "A model is named twice."
