"""The figures of a teller, and the definitions behind them."""

import pytest

from deadpan.evaluate.answers import Answer, Question
from deadpan.evaluate.evaluation import evaluate, share
from deadpan.evaluate.form import Grounding, is_description, is_joke_form
from deadpan.evaluate.memorisation import nearly_verbatim, verbatim


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
    asked = [Question((), (), (), {name: ()}, name) for name in ("猫", "狗")]
    answers = [Answer("", "?", "猫说：早。", True), Answer("", "?", "图里左边有一只狗。", True)]
    figures = evaluate(asked, answers, training=["猫说早"])
    assert figures.joke_form.value == figures.descriptions.value == 0.5
    assert figures.grounded is not None
    assert figures.grounded.value == 1.0
    assert figures.grounded_jokes is not None
    assert figures.grounded_jokes.value == 0.5
    assert figures.verbatim is not None
    assert figures.verbatim.value == 0.5
    assert figures.loss is None


def test_the_interval_holds_the_share_and_is_the_same_each_time() -> None:
    values = [True] * 30 + [False] * 10
    found = share(values)
    assert found.low < found.value == 0.75 < found.high
    assert found == share(values)
