"""The questions with given options: how they are drawn, kept and judged."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from deadpan.data.records import Record, Turn
from deadpan.errors import DeadpanError
from deadpan.evaluate.choices import TASKS, ChoiceQuestion, QuestionSet, draw, read, results
from deadpan.evaluate.statistics import Items, metric
from deadpan.report.words import bilingual

QUESTION = Turn("human", "<image>\n说")


def record(
    picture: int, answer: str, stars: int | None = None, concept: str | None = None
) -> Record:
    return Record(
        None,
        (f"{picture}.png",),
        (QUESTION, Turn("gpt", answer)),
        Path("held-out.json"),
        0,
        None,
        Path(),
        {} if concept is None else {concept: ()},
        stars,
    )


def some(pictures: int, answers: int, starred: bool = True) -> list[Record]:
    return [
        record(picture, f"图{picture}句{number}。", number * 3 if starred else None)
        for picture in range(pictures)
        for number in range(answers)
    ]


def of(drawn: QuestionSet, task: str) -> list[ChoiceQuestion]:
    return [question for question in drawn.questions if question.task == task]


def judged(drawn: QuestionSet, score: object) -> dict[str, Items]:
    scores: dict[object, dict[str, float]] = {}
    for question in drawn.questions:
        for text in question.options:
            scores.setdefault(question.context, {})[text] = score(question, text)  # type: ignore[operator]
    return {items.name: items for items in results(drawn.questions, scores)}  # type: ignore[arg-type]


def test_each_task_offers_what_its_name_says() -> None:
    drawn = draw(some(6, 7))
    assert not drawn.skipped
    for task, (options, right) in TASKS.items():
        asked = of(drawn, task)
        assert len(asked) == 6
        for question in asked:
            own = f"图{question.images[0][0]}"
            assert len(set(question.options)) == options
            assert question.origins.count("answer") == right
            for text, origin in zip(question.options, question.origins, strict=True):
                assert text.startswith(own) == (origin == "answer")
    for question in of(drawn, "ranking"):
        assert len(question.options) == len(question.stars) == 5
        assert all(
            text.endswith(f"句{stars // 3}。")
            for text, stars in zip(question.options, question.stars, strict=True)
        )


def test_wrong_options_are_nested_and_the_right_one_may_stand_anywhere() -> None:
    drawn = draw(some(40, 2))
    two, three = of(drawn, "2T1"), of(drawn, "3T1")
    assert all(set(a.options) < set(b.options) for a, b in zip(two, three, strict=True))
    assert {question.origins.index("answer") for question in three} == {0, 1, 2}


def test_no_answer_that_could_be_right_is_offered_as_wrong() -> None:
    records = [record(n, "雨伞。" if n < 5 else f"第{n}句。", concept="雨伞") for n in range(9)]
    records += [record(n, f"猫{n}。", concept="猫") for n in range(9, 12)]
    # Also an answer to the first picture, though another picture was given it too.
    records += [record(0, "猫9！", concept="雨伞")]
    for question in draw(records).questions:
        own = {r.answers[0] for r in records if r.images == question.images}
        concept = next(iter(next(r.concepts for r in records if r.images == question.images)))
        for text, origin in zip(question.options, question.origins, strict=True):
            if origin == "other picture":
                assert text.startswith("猫") == (concept == "雨伞")
                assert text not in own
                assert not (question.images == ("0.png",) and text == "猫9。")


def test_a_caption_is_the_first_wrong_option() -> None:
    records = some(5, 2)
    captions = {f"{n}.png": f"图里有{n}。" for n in range(5)}
    for question in of(draw(records, captions), "2T1"):
        assert set(question.origins) == {"answer", "caption"}
        assert f"图里有{question.images[0][0]}。" in question.options


@pytest.mark.parametrize(
    ("records", "skipped"),
    [
        (some(6, 1, starred=False), {"5T2": "no picture has 2", "ranking": "have no stars"}),
        (some(6, 4), {"ranking": "no picture has 5 answers whose stars are known and differ"}),
        ([record(n, f"{n}-{k}", 5) for n in range(6) for k in range(6)], {"ranking": "differ"}),
        (some(1, 2), dict.fromkeys(["2T1", "3T1", "4T1", "5T2"], "not") | {"ranking": "5 answers"}),
        (some(2, 2), {"3T1": "not 2", "4T1": "not 3", "5T2": "not 3", "ranking": "5 answers"}),
    ],
)
def test_what_the_records_cannot_carry_is_skipped_with_the_reason(
    records: Sequence[Record], skipped: dict[str, str]
) -> None:
    found = draw(records).skipped
    assert found.keys() == skipped.keys()
    assert all(part in found[task] for task, part in skipped.items())
    for reason in found.values():
        assert bilingual(reason).zh != reason


def test_five_of_equal_likes_are_never_ranked() -> None:
    records = [record(n, f"{n}-{k}", 9 if k == 30 else 5) for n in range(5) for k in range(31)]
    assert all(len(set(q.stars)) == 2 for q in of(draw(records), "ranking"))
    assert len(of(draw(records), "ranking")) == 5


def test_the_seed_draws_and_a_file_keeps(tmp_path: Path) -> None:
    drawn = draw(some(6, 7), seed=3)
    assert drawn == draw(some(6, 7), seed=3)
    assert drawn.sha256 != draw(some(6, 7), seed=4).sha256
    path = tmp_path / "questions.jsonl"
    drawn.write(path)
    assert read(path) == drawn
    path.write_text(path.read_text().replace("图1句", "图2句", 1))
    with pytest.raises(DeadpanError, match="not those that were written"):
        read(path)
    path.write_text('{"id": 1}\n')
    with pytest.raises(DeadpanError, match="does not hold questions"):
        read(path)
    with pytest.raises(DeadpanError, match="cannot be read: No such file"):
        read(tmp_path / "gone.jsonl")


def test_an_answer_may_hold_a_line_separator(tmp_path: Path) -> None:
    drawn = draw([record(n, f"第一行\u2028第{n}行", None) for n in range(6)])
    drawn.write(tmp_path / "questions.jsonl")
    assert read(tmp_path / "questions.jsonl") == drawn


def test_one_who_knows_is_always_right() -> None:
    drawn = draw(some(6, 7))

    def score(question: ChoiceQuestion, text: str) -> float:
        own = text.startswith(f"图{question.images[0][0]}")
        return -1.0 / (2 + int(text[-2])) if own else -9.0

    assert {m.value for m in map(metric, judged(drawn, score).values())} == {1.0}


def test_one_who_guesses_is_right_as_often_as_chance_says() -> None:
    dice = random.Random(0)
    found = judged(draw(some(500, 6)), lambda *_: -dice.random())
    assert found["4T1 accuracy"].chance == 0.25
    assert found["5T2 accuracy"].chance == 0.1
    assert found["ranking top-1"].chance == pytest.approx(0.2)
    for items in found.values():
        taken = metric(items, resamples=1000)
        assert taken.low is not None
        assert taken.high is not None
        assert items.chance is not None
        # Half as far again as the 95% interval reaches: 12 measures are looked at.
        assert abs(taken.value - items.chance) < 0.75 * (taken.high - taken.low)


def test_length_counts_in_one_score_and_not_in_the_other() -> None:
    question = ChoiceQuestion(
        "2T1", ("a.png",), (QUESTION,), ("长长长长", "短"), ("answer", "other picture")
    )
    found = results([question], {question.context: {"长长长长": -8.0, "短": -4.0}})
    assert {items.name: list(items.values) for items in found} == {
        "2T1 accuracy": [0.0],
        "2T1 accuracy, per character": [1.0],
    }
