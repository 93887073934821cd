"""Several answers to one picture behind one copy of it.

Records of the same pictures and the same question begin with the same tokens, most of which are the
pictures'. Laid behind one *prefix* they cost it once:

    token     <img> ... </img> Q  A1 A1 A1  A2 A2 A2
    position    0   ...   9    10 11 12 13  11 12 13

`deadpan.models.segments` keeps the answers apart, so each is trained on as if it had the prefix to itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from deadpan.data.records import IMAGE_TAG, Record, Turn
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Sample, Size

Groups = tuple[tuple[int, ...], ...]
"""Places of records, each in one group; those of a group share a prefix."""


def shared_prefixes(records: Sequence[Record]) -> Groups:
    """Put records together that have the same pictures and the same question, in the order of the first of each."""
    groups: dict[object, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(_prefix(record) or index, []).append(index)
    return tuple(map(tuple, groups.values()))


def _prefix(record: Record) -> tuple[tuple[Path, ...], tuple[Turn, ...]] | None:
    """What a record begins with, up to the first answer; None if not all of its pictures are in it."""
    turns = record.turns
    end = next((i for i, turn in enumerate(turns) if turn.role == "gpt"), 0)
    if not end or any(IMAGE_TAG in turn.text for turn in turns[end:] if turn.role == "human"):
        return None
    return record.image_paths, turns[:end]


def join(samples: Sequence[Sample]) -> Sample:
    """Lay samples with the same prefix behind one copy of it.

    Args:
        samples: The first has the pictures; all begin with its tokens up to the first supervised one.
    """
    first, *others = samples
    if not others:
        return first
    start = next(i for i, label in enumerate(first.labels) if label != IGNORE_INDEX)
    assert all(sample.input_ids[:start] == first.input_ids[:start] for sample in others)
    return replace(
        first,
        input_ids=[*first.input_ids, *chain(*(sample.input_ids[start:] for sample in others))],
        labels=[*first.labels, *chain(*(sample.labels[start:] for sample in others))],
        position_ids=[
            *range(len(first.input_ids)),
            *chain(*(range(start, len(sample.input_ids)) for sample in others)),
        ],
    )


def join_sizes(sizes: Sequence[Size]) -> Size:
    """The size of the sample that `join` makes of samples of these sizes."""
    first = sizes[0]
    return Size(
        tokens=sum(size.tokens for size in sizes) - (len(sizes) - 1) * first.prefix,
        supervised=sum(size.supervised for size in sizes),
        tiles=first.tiles,
        prefix=first.prefix,
    )
