import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deadpan.data.pictures import PictureError
from deadpan.data.records import Record, Turn
from deadpan.processing.statistics import Spread, statistics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in {"small": (448, 448), "wide": (896, 448), "large": (1344, 896)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    return tmp_path


def record(folder: Path, images: tuple[str, ...], *answers: str, index: int = 0) -> Record:
    turns = [turn for text in answers for turn in (Turn("human", "?"), Turn("gpt", text))]
    return Record(None, images, tuple(turns), folder / "train.json", index, None, folder)


class Counter:
    """Stands in for a processor: a sample is as long as its answers."""

    max_length = 9

    def length(self, record: Record) -> int:
        return sum(map(len, record.answers))


def test_the_figures(folder: Path) -> None:
    records = [
        record(folder, ("small.png",), "一二三"),
        record(folder, ("wide.png",), " 冷 \n", "得"),
        record(folder, ("wide.png", "small.png"), "一二三四五"),
        record(folder, ("large.png",), "一"),
        record(folder, (), "一二"),
    ]
    seen: list[tuple[int, int]] = []
    figures = statistics(records, progress=lambda *counts: seen.append(counts))
    assert (figures.records, figures.text_only, figures.pictures) == (5, 1, 3)
    assert figures.answers_per_picture == {1: 1, 2: 1, 3: 1}
    assert figures.picture_sizes == ((448, 448), (896, 448), (1344, 896))
    # small: 1; wide: 2 + thumbnail; both together: 1 + 3; large: 3x2 + thumbnail; text: none
    assert figures.tiles_per_sample == {0: 1, 1: 1, 3: 1, 4: 1, 7: 1}
    assert figures.answer_characters == Spread(1, 1, 5, 5)
    assert figures.sample_tokens is figures.max_length is figures.over_max_length is None
    assert seen == [(done, 5) for done in range(1, 6)]


@pytest.mark.parametrize(
    ("images", "options", "tiles"),
    [
        (("large.png",), {"max_tiles": 1}, 1),
        (("large.png",), {"thumbnail": False}, 6),
        (("large.png",), {"tile_size": 112}, 7),
        (("wide.png",), {"min_tiles": 8}, 9),
        # Pictures share the tiles: two have six each, and thirteen no less than one each.
        (("large.png",) * 2, {"max_tiles": 12}, 14),
        (("large.png",) * 13, {"max_tiles": 12}, 13),
        (("wide.png", "wide.png"), {"max_tiles": 3}, 2),
    ],
)
def test_tiles_follow_the_policy(
    folder: Path, images: tuple[str, ...], options: dict[str, Any], tiles: int
) -> None:
    assert statistics([record(folder, images, "一")], **options).tiles_per_sample == {tiles: 1}


def test_tokens_with_a_processor(folder: Path) -> None:
    records = [record(folder, (), "字" * length) for length in (8, 9, 10, 30)]
    figures = statistics(records, Counter())
    assert figures.sample_tokens == Spread(8, 9, 30, 30)
    assert (figures.max_length, figures.over_max_length) == (9, 2)


def test_p95_is_the_value_that_one_in_twenty_exceeds(folder: Path) -> None:
    records = [record(folder, (), "字" * length) for length in range(1, 101)]
    assert statistics(records).answer_characters == Spread(1, 50, 95, 100)


def test_text_alone_has_no_picture_sizes(folder: Path) -> None:
    figures = statistics([record(folder, (), "一")])
    assert figures.picture_sizes is None
    assert figures.answers_per_picture == {}
    assert json.loads(json.dumps(figures.to_json()))["tiles_per_sample"] == {"0": 1}


def test_a_broken_picture_is_named_with_its_record(folder: Path) -> None:
    with pytest.raises(PictureError, match="missing") as caught:
        statistics([record(folder, ("gone.png",), "一", index=4)])
    assert caught.value.where == f"{folder / 'gone.png'}, in train.json record 4"


def test_no_records_have_no_statistics() -> None:
    with pytest.raises(ValueError, match="at least one"):
        statistics([])
