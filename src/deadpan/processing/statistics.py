"""The figures of a data set: how many, how large, how long; pictures are measured, not decoded."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from deadpan.data.pictures import PictureError, picture_size
from deadpan.data.records import Record
from deadpan.processing import tiles


class Measures(Protocol):
    """The part of a processor that tells how long a sample is."""

    @property
    def max_length(self) -> int:
        """The most tokens a sample may have."""

    def length(self, record: Record) -> int:
        """The number of tokens of a whole sample."""


@dataclass(frozen=True)
class Spread:
    """Where the values lie; each figure is one of the values (nearest rank), not a mean of two."""

    minimum: int
    median: int
    p95: int
    maximum: int


@dataclass(frozen=True)
class Statistics:
    """The figures of a data set.

    Attributes:
        records: Samples.
        text_only: Samples without a picture.
        pictures: Distinct pictures, told apart by path.
        answers_per_picture: From a number of answers to how many pictures have so many.
        picture_sizes: (width, height) of the pictures of fewest, median and most pixels;
            None without pictures.
        tiles_per_sample: From a number of tiles, thumbnails included, to how many samples have it.
        answer_characters: Lengths of the answers, outer white space not counted.
        sample_tokens: Lengths of whole samples; None without a processor.
        max_length: The processor's limit; None without a processor.
        over_max_length: Samples longer than that; None without a processor.
    """

    records: int
    text_only: int
    pictures: int
    answers_per_picture: dict[int, int]
    picture_sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None
    tiles_per_sample: dict[int, int]
    answer_characters: Spread
    sample_tokens: Spread | None
    max_length: int | None
    over_max_length: int | None

    def to_json(self) -> dict[str, object]:
        """The figures in JSON's own types."""
        return asdict(self)


def statistics(
    records: Sequence[Record],
    processor: Measures | None = None,
    max_tiles: int = 12,
    tile_size: int = 448,
    thumbnail: bool = True,
    min_tiles: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Measure a data set.

    Args:
        records: Sound records, at least one, as `load` returns them.
        processor: Counts tokens; without it no token figures.
        max_tiles: The most tiles of a sample's pictures together, thumbnails not counted.
        tile_size: The edge of a tile in pixels.
        thumbnail: Whether a picture of several tiles is followed by a thumbnail.
        min_tiles: The fewest tiles of a picture, thumbnail not counted.
        progress: Called with (records done, records in all) after each record.

    Raises:
        PictureError: If the header of a picture cannot be read.
        ValueError: If there are no records.
    """
    sizes: dict[Path, tuple[int, int]] = {}
    answers: Counter[Path] = Counter()
    tile_counts: Counter[int] = Counter()
    tokens: list[int] = []
    for done, record in enumerate(records, start=1):
        share = max(min_tiles, max_tiles // max(1, len(record.images)))
        total = 0
        for path in record.image_paths:
            if path not in sizes:
                sizes[path] = _size(path, record)
            total += tiles.count(*sizes[path], min_tiles, share, tile_size, thumbnail)
        tile_counts[total] += 1
        for path in set(record.image_paths):
            answers[path] += len(record.answers)
        if processor is not None:
            tokens.append(processor.length(record))
        if progress is not None:
            progress(done, len(records))
    limit = None if processor is None else processor.max_length
    return Statistics(
        records=len(records),
        text_only=sum(not record.images for record in records),
        pictures=len(sizes),
        answers_per_picture=dict(sorted(Counter(answers.values()).items())),
        picture_sizes=_smallest_median_largest(list(sizes.values())),
        tiles_per_sample=dict(sorted(tile_counts.items())),
        answer_characters=_spread(
            [len(answer.strip()) for record in records for answer in record.answers]
        ),
        sample_tokens=_spread(tokens) if tokens else None,
        max_length=limit,
        over_max_length=None if limit is None else sum(length > limit for length in tokens),
    )


def _size(path: Path, record: Record) -> tuple[int, int]:
    try:
        return picture_size(path)
    except PictureError as error:
        raise PictureError(
            error.what,
            where=f"{path}, in {record.name}",
            expected=error.expected,
            found=error.found,
            fix="run `deadpan data check` to find every broken picture",
        ) from None


def _rank(count: int, share: float) -> int:
    """The position of the smallest value that at least this share of the values does not exceed."""
    return max(0, math.ceil(share * count) - 1)


def _spread(values: list[int]) -> Spread:
    if not values:
        raise ValueError("statistics need at least one record with an answer")
    values = sorted(values)
    count = len(values)
    return Spread(values[0], values[_rank(count, 0.5)], values[_rank(count, 0.95)], values[-1])


def _smallest_median_largest(
    sizes: list[tuple[int, int]],
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    if not sizes:
        return None
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return ordered[0], ordered[_rank(len(ordered), 0.5)], ordered[-1]
