"""Oogiri-GO as records. The rows and pictures are our own, in the published layout."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from deadpan.cli.main import app
from deadpan.data import preferences
from deadpan.data.fingerprint import fingerprint, same, same_pictures
from deadpan.data.oogiri import Selection, Summary, import_oogiri
from deadpan.data.records import PROMPT, Record, load
from deadpan.errors import DeadpanError


def drawing(number: int) -> Image.Image:
    size = 160
    picture = Image.new("RGB", (size, size), (250, 240 - 9 * number, 40 + 19 * number))
    draw = ImageDraw.Draw(picture)
    left = size * (number % 4) // 5
    top = size * (number // 4) // 4
    draw.ellipse((left, top, left + size // 3, top + size // 3), fill=(30 * number % 255, 60, 90))
    draw.rectangle((size - left // 2 - 40, 20 + top // 2, size - 10, size - 20), fill=(9, 90, 160))
    return picture


def row(image: str | None, text: str, star: int | None = None, **keys: Any) -> dict[str, Any]:
    return {"type": "I2T", "question": None, "image": image, "text": text, "star": star, **keys}


def put(path: Path, rows: list[Any]) -> None:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten pictures, of which one is missing, one broken and one a smaller copy of another."""
    folder = tmp_path / "oogiri"
    (folder / "images" / "more").mkdir(parents=True)
    for number in range(7):
        suffix = [".jpg", ".png", ".webp", ""][number % 4]
        with (folder / "images" / f"10{number}{suffix}").open("wb") as file:
            drawing(number).save(file, "PNG")
    drawing(0).resize((96, 96)).save(folder / "images" / "more" / "200.jpg", quality=70)
    (folder / "images" / "300.jpg").write_bytes(b"no picture")
    rows: list[Any] = [
        row(f"10{n}", f"第{n}张图的第{k}句。", n + k) for n in range(7) for k in range(3)
    ]
    rows += [
        row("200", "第0张图的第1句！", 99),
        row("200", "只有这里有。"),
        row("300", "坏了。"),
        row("400", "没了。", 1),
        row("101", "别的玩法。", 4, type="IT2T"),
        {"type": "T2T", "question": "为什么？", "image": None, "text": "因为冷。", "star": 7},
        "{",
        row("101", " "),
        row("101", "<|im_end|>", 3),
        row("101", "赞太多。", star=-1),
    ]
    put(folder / "cn.jsonl", rows)
    put(folder / "en.jsonl", [row("106", "It was cold.", 2)])
    return folder


def made(source: Path, out: Path, **choice: Any) -> tuple[Summary, list[Record], list[Record]]:
    selection = Selection(**{"languages": ("cn",), "held_out": 0.2, **choice})
    summary = import_oogiri(source, out, selection)
    return summary, load(out / "train.jsonl"), load(out / "held-out.jsonl")


def dropped(summary: Summary) -> dict[str, int]:
    return {entry.reason: entry.rows for entry in summary.dropped}


def test_what_is_read_dropped_and_why(source: Path, tmp_path: Path) -> None:
    summary, training, held_out = made(source, tmp_path / "out")
    assert summary.rows == 31
    assert dropped(summary) == {
        "another type than I2T": 2,
        "the picture is broken": 1,
        "the picture is missing": 1,
        "the same answer to the same picture or question": 1,
        "not valid JSON": 1,
        "no answer": 1,
        "the text holds the name of a control token": 1,
        "star is not a number of likes": 1,
    }
    assert summary.rows - sum(dropped(summary).values()) == len(training) + len(held_out) == 22
    assert (summary.pictures, summary.merged_pictures, summary.with_stars) == (7, 1, 21)
    missing = next(e for e in summary.dropped if e.reason == "the picture is missing")
    assert missing.examples == ("cn.jsonl line 25 (image 400)",)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"] == 31


def test_answers_keep_their_likes_and_the_most_liked_of_equals_stays(
    source: Path, tmp_path: Path
) -> None:
    _, training, held_out = made(source, tmp_path / "out")
    stars = {record.answers[0]: record.stars for record in training + held_out}
    assert stars["第3张图的第2句。"] == 5
    assert stars["第0张图的第1句！"] == 99
    assert "第0张图的第1句。" not in stars
    assert stars["只有这里有。"] is None
    assert {record.turns[0].text for record in training} == {f"<image>\n{PROMPT}"}


def test_a_picture_and_its_copies_lie_on_one_side(source: Path, tmp_path: Path) -> None:
    for seed in range(4):
        _, training, held_out = made(source, tmp_path / str(seed), seed=seed)
        sides = [{record.images[0] for record in side} for side in (training, held_out)]
        assert sides[0].isdisjoint(sides[1])
        assert len(sides[0] | sides[1]) == 7
        of_first = [
            r for r in training + held_out if r.answers[0] in ("只有这里有。", "第0张图的第0句。")
        ]
        assert len({record.images for record in of_first}) == 1


def test_the_same_seed_gives_the_same_files_and_another_does_not(
    source: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        made(source, tmp_path / name, seed=seed, limit=10)
    texts = [(tmp_path / name / "train.jsonl").read_text() for name in "abcd"]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_limit_draws_whole_pictures(source: Path, tmp_path: Path) -> None:
    summary, training, held_out = made(source, tmp_path / "out", limit=10)
    assert len(training) + len(held_out) in (9, 10)
    assert "beyond the limit of 10" in dropped(summary)
    whole = made(source, tmp_path / "whole")
    answers = {r.answers[0] for r in training + held_out}
    of_drawn = {r.images for r in training + held_out}
    assert {r.answers[0] for r in whole[1] + whole[2] if r.images in of_drawn} == answers


def test_filters(source: Path, tmp_path: Path) -> None:
    summary, training, held_out = made(source, tmp_path / "liked", min_stars=5)
    assert all((record.stars or 0) >= 5 for record in training + held_out)
    assert dropped(summary)["stars unknown"] == 2
    _, training, held_out = made(source, tmp_path / "types", types=("IT2T", "T2T"))
    assert {record.answers[0] for record in training + held_out} == {"别的玩法。", "因为冷。"}
    _, training, held_out = made(source, tmp_path / "all", languages=())
    questions = {record.turns[0].text for record in training + held_out}
    assert len(questions) == 2


def test_nothing_is_written_where_something_is_wrong(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DeadpanError, match="No row is left") as raised:
        made(source, out, min_stars=1000)
    assert "fewer than 1000 stars" in (raised.value.found or "")
    with pytest.raises(DeadpanError, match="not laid out") as raised:
        made(source, out, languages=("cn", "jp"))
    assert raised.value.found == "no jp.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == ["oogiri"]
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(DeadpanError, match="already holds something"):
        made(source, out)


def test_an_archive_that_is_not_unpacked_is_named(source: Path, tmp_path: Path) -> None:
    (source / "images").rename(tmp_path / "elsewhere")
    (source / "images.zip").touch()
    with pytest.raises(DeadpanError, match="folder of pictures does not exist") as raised:
        made(source, tmp_path / "out")
    assert raised.value.fix == f"unpack {source / 'images.zip'} there"


def test_two_files_of_one_id_are_not_guessed_between(source: Path, tmp_path: Path) -> None:
    drawing(9).save(source / "images" / "more" / "101.png")
    summary, *_ = made(source, tmp_path / "out")
    assert dropped(summary)["several files could be the picture"] == 3


def test_copies_are_recognised_and_different_drawings_are_not() -> None:
    prints = {str(n): fingerprint(drawing(n)) for n in range(12)}
    assert same_pictures(prints) == {name: name for name in prints}
    for number in range(12):
        assert same(prints[str(number)], fingerprint(drawing(number).resize((90, 90))))
    # The hash of a blank picture is that of any other; their colours differ.
    blank = [fingerprint(Image.new("RGB", (50, 50), colour)) for colour in ("white", "navy")]
    assert blank[0].hash == blank[1].hash
    assert not same(*blank)


def test_the_verb_says_what_it_did(source: Path, tmp_path: Path) -> None:
    arguments = ["data", "import", "oogiri", source, tmp_path / "out", "--language", "cn"]
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert (
        "31 rows read; 22 records on 7 pictures (1 copies merged), 21 with stars" in result.stdout
    )
    assert "the picture is missing" in result.stdout


def test_likes_become_pairs_by_a_verb(source: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "out", types=("I2T", "T2T"))
    records, pairs = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "pairs.jsonl"
    arguments = ["data", "pairs", str(records), str(pairs)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert f"wrote {pairs}: " in result.stdout
    found = preferences.load(pairs)
    assert (
        f": {len(found)} pairs on {len({pair.images for pair in found})} pictures" in result.stdout
    )
    stars = {(r.image_paths, r.turns[0], r.answers[0]): r.stars for r in load(records)}
    assert found
    for pair in found:
        liked, other = (
            stars[pair.image_paths, pair.turns[0], side.answers[0]] for side in pair.sides
        )
        assert liked is not None
        assert other is not None
        assert liked > other
        assert all(path.is_file() for path in pair.image_paths)
    # Each picture's three answers have n, n + 1 and n + 2 stars.
    CliRunner().invoke(app, [*arguments, "--min-gap", "2"])
    wider = preferences.load(pairs)
    assert 0 < len(wider) < len(found)
    again = CliRunner().invoke(app, [*arguments, "--min-gap", "2", "--json"])
    assert json.loads(again.stdout)["pairs"] == len(wider)


def test_records_without_differences_make_no_pairs(source: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "out")
    records, pairs = tmp_path / "out" / "train.jsonl", tmp_path / "pairs.jsonl"
    result = CliRunner().invoke(
        app, ["data", "pairs", str(records), str(pairs), "--min-gap", "999"]
    )
    assert isinstance(result.exception, DeadpanError)
    assert "by 999 or more" in str(result.exception.expected)
    assert not pairs.exists()
    before = records.read_bytes()
    result = CliRunner().invoke(app, ["data", "pairs", str(records), str(records)])
    assert isinstance(result.exception, DeadpanError)
    assert records.read_bytes() == before
