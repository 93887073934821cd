"""Preference pairs: their file, and how they come of stars."""

import json
from pathlib import Path
from typing import Any

import pytest

from deadpan.data import preferences
from deadpan.data.preferences import Preference, from_stars
from deadpan.data.records import PROMPT, Record, Turn, read
from deadpan.errors import DeadpanError

PAIR = {"image": "a.png", "prompt": "Why?", "chosen": "good", "rejected": "bad"}


def file(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_a_pair_is_a_record_with_two_sides(tmp_path: Path) -> None:
    path = file(tmp_path / "pairs.jsonl", PAIR, {**PAIR, "image": None, "id": 7})
    first, second = preferences.load(path)
    assert first.turns == (Turn("human", "<image>\nWhy?"), Turn("gpt", "good"))
    assert (first.image_paths, first.name) == ((tmp_path / "a.png",), "pairs.jsonl line 1")
    chosen, rejected = first.sides
    assert (chosen.answers, rejected.answers) == (("good",), ("bad",))
    assert chosen.turns[:-1] == rejected.turns[:-1]
    assert chosen.sides == (chosen,)
    assert (second.id, second.images, second.turns[0].text) == ("7", (), "Why?")


def test_an_array_is_read_too_and_a_prompt_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{k: v for k, v in PAIR.items() if k != "prompt"}]))
    (record,) = preferences.load(path, tmp_path)
    assert record.turns[0].text == f"<image>\n{PROMPT}"
    assert record.name == "pairs.json record 0"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rejected": "good "}, "line 2: chosen and rejected are the same"),
        ({"chosen": " "}, "line 2: chosen: expected text"),
        ({"rejected": "<|im_end|>"}, "line 2: rejected: holds <|im_end|>, which no answer may"),
        ({"rejected": "<image>"}, "line 2: rejected: holds <image>, which no answer may"),
        ({"image": [3]}, "line 2: image: expected a path, a list of paths or null"),
        ({"prompt": "<image><image>"}, "line 2: prompt: expected <image> once a picture, or never"),
        ({"prompt": ""}, "line 2: prompt: expected text"),
    ],
)
def test_a_line_that_is_no_pair_is_named(
    tmp_path: Path, change: dict[str, Any], found: str
) -> None:
    path = file(tmp_path / "pairs.jsonl", PAIR, PAIR | change)
    with pytest.raises(DeadpanError, match="does not hold preference pairs") as caught:
        preferences.load(path)
    assert (caught.value.where, caught.value.found) == (str(path), found)


def test_all_is_told_of_a_file_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("[3]\n")
    with pytest.raises(DeadpanError) as caught:
        preferences.load(path)
    assert caught.value.found == "record 0: not a JSON object"
    path.write_text("nonsense\n" * 9)
    with pytest.raises(DeadpanError) as caught:
        preferences.load(path)
    assert str(caught.value.found).count("not valid JSON") == 5
    assert "and 4 more" in str(caught.value.found)


def test_a_pair_among_records_is_called_one(tmp_path: Path) -> None:
    (problem,) = read(file(tmp_path / "pairs.jsonl", PAIR))[1]
    assert "found a preference pair, which is trained on with objective: dpo" in problem.message


def rated(
    picture: str | None, question: str, answer: str, stars: int | None, *more: Turn
) -> Record:
    images = () if picture is None else (picture,)
    asked = "<image>\n" * len(images) + question
    turns = (Turn("human", asked), Turn("gpt", answer), *more)
    return Record(None, images, turns, Path("/r.jsonl"), 0, 1, Path("/"), stars=stars)


def test_stars_make_pairs_of_more_liked_over_less_liked() -> None:
    records = [
        rated("a", "?", "best", 9),
        rated("a", "?", "worst", 1),
        rated("a", "?", "not counted", None),
        rated("a", "?", "middle", 4),
        rated("a", "?", "middle too", 4),
        rated("a", "another question", "alone", 4),
        rated("b", "?", "only", 4),
        rated("b", "?", "long", 1, Turn("human", "And?"), Turn("gpt", "No.")),
    ]
    made = from_stars(records)
    assert made.pairs == [
        Preference(("/a",), "?", "best", "middle"),
        Preference(("/a",), "?", "best", "middle too"),
        Preference(("/a",), "?", "best", "worst"),
        Preference(("/a",), "?", "middle", "worst"),
        Preference(("/a",), "?", "middle too", "worst"),
    ]
    assert (made.pictures, made.uncounted, made.longer, made.single) == (1, 1, 1, 2)
    made = from_stars(records, least_gap=5)
    assert made.pairs == [
        Preference(("/a",), "?", "best", "middle"),
        Preference(("/a",), "?", "best", "middle too"),
        Preference(("/a",), "?", "best", "worst"),
    ]
    assert made.single == 2


def test_a_picture_with_many_answers_does_not_outweigh_the_others() -> None:
    records = [rated("a", "?", str(stars), stars) for stars in range(20)]
    drawn = from_stars(records, most=4).pairs
    assert len(drawn) == len(set(drawn)) == 4
    assert drawn == from_stars(records, most=4).pairs
    assert drawn != from_stars(records, most=4, seed=1).pairs
    assert all(int(pair.chosen) > int(pair.rejected) for pair in drawn)


def test_an_answer_given_twice_has_its_highest_count() -> None:
    records = [
        rated("a", "?", "twice", 1),
        rated("a", "?", " twice", 8),
        rated("a", "?", "once", 3),
    ]
    assert from_stars(records).pairs == [Preference(("/a",), "?", "twice", "once")]


def test_written_pairs_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    # U+2028 separates lines for Python, and does not in JSON.
    below, beside = str(tmp_path / "more" / "b.png"), str(tmp_path.parent / "c.png")
    images: list[tuple[str, ...]] = [("a.png",), (below, beside), ()]
    preferences.write([Preference(i, "为什么？", "好\u2028笑", "坏") for i in images], path)
    assert '["more/b.png", "/' in path.read_text()
    records = preferences.load(path)
    assert [record.rejected for record in records] == ["坏"] * 3
    assert [record.answers for record in records] == [("好\u2028笑",)] * 3
    assert [record.image_paths for record in records] == [
        (tmp_path / "a.png",),
        (Path(below), Path(beside)),
        (),
    ]


def test_nano_has_pairs_on_pictures_of_their_own() -> None:
    training = preferences.load(Path("nano:preferences"))
    held_out = preferences.load(Path("nano:preferences-held-out"))
    assert all(path.is_file() for record in training + held_out for path in record.image_paths)
    assert not {r.images for r in training} & {r.images for r in held_out}
