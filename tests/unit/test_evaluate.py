"""The figures of a teller, and the definitions behind them."""

from pathlib import Path

import pytest

from deadpan.data.records import Turn
from deadpan.errors import DeadpanError
from deadpan.evaluate.answers import Answer, Question, read, write
from deadpan.evaluate.evaluation import evaluate
from deadpan.evaluate.form import Grounding, is_description, is_joke_form
from deadpan.evaluate.memorisation import nearly_verbatim, verbatim
from deadpan.report.words import bilingual


@pytest.mark.parametrize(
    "text", ["图里左边有两只猫，右边有一把雨伞。", "左边有一只狗。", "这张图片很好看。"]
)
def test_a_description_is_no_joke(text: str) -> None:
    assert is_description(text)
    assert not is_joke_form(text)


@pytest.mark.parametrize("text", ["雨伞分手时只说四个字：好聚好伞。", "猫说：恕我猫昧。"])
def test_a_short_finished_line_has_joke_form(text: str) -> None:
    assert is_joke_form(text)
    assert not is_joke_form(text, finished=False)
    assert not is_joke_form(text.rstrip("。"))
    assert not is_joke_form(text * 8)
    assert not is_joke_form(f"{text}\n{text}")


def test_the_longest_name_counts_and_a_pun_counts_as_the_name() -> None:
    grounding = Grounding({"猫": [], "熊猫": [], "雨伞": ["好聚好伞"]})
    assert grounding.named("熊猫说：好聚好伞。") == {"熊猫", "雨伞"}
    assert not grounding.is_grounded("熊猫说话。", ["猫"])
    assert grounding.is_grounded("好聚好伞。", ["雨伞"])
    assert not Grounding({}).is_grounded("猫", ["猫"])


def test_punctuation_does_not_make_a_new_joke_and_near_is_not_equal() -> None:
    training = ["雨伞说：好聚好伞。"]
    answers = ["雨伞说，好聚好伞", "大雨伞说：好聚好伞。", "猫说：恕我猫昧。"]
    assert verbatim(answers, training) == [True, False, False]
    assert nearly_verbatim(answers, training) == [True, True, False]


def test_an_evaluation_counts_answers() -> None:
    turns = (Turn("human", "说"),)
    asked = [Question((Path(name),), turns, (), {name: ()}, name) for name in ("猫", "狗")]
    answers = [Answer("", "?", "猫说：猫。", True), Answer("", "?", "图里左边有一只狗。", True)]
    figures = evaluate(asked, answers, training=["猫说猫"], loss=1.0)
    values = {found.name: found.value for found in figures.metrics}
    assert values["joke form"] == values["describes the picture"] == 0.5
    assert values["grounded"] == 1.0
    assert values["grounded and in joke form"] == values["verbatim from training"] == 0.5
    assert values["characters an answer"] == 7.0
    assert values["distinct-1"] == 10 / 11
    assert values["perplexity"] == pytest.approx(2.71828, abs=1e-4)
    assert figures.skipped == {}
    whole = evaluate([Question((), turns, (), {}, "x")], answers[:1])
    assert whole.skipped.keys() == {"grounded", "verbatim from training"}
    assert all(bilingual(reason).zh != reason for reason in whole.skipped.values())
    assert whole.get("held-out loss") is None


def test_answers_are_read_back_whatever_they_hold(tmp_path: Path) -> None:
    answers = [
        Answer("猫.png", "?", "第一行\u2028第二行\n第三行", True),
        Answer("", "?", "", False),
    ]
    path = tmp_path / "new" / "answers.jsonl"
    write(answers, path)
    assert read(path) == answers
    with pytest.raises(DeadpanError, match="cannot be read: No such file"):
        read(tmp_path / "gone.jsonl")
    path.write_bytes(b'{"picture": "\xff"}\n')
    with pytest.raises(DeadpanError, match="not an answer"):
        read(path)
