"""Hold records out by picture: no picture is ever on both sides.

A picture is its file's bytes: copies under two names are one picture. Records that share a picture
belong together, and so do records that are linked by others, as one with pictures a and b links those
of a to those of b. Such a group goes to one side whole. A record without a picture goes by its
question.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deadpan.data.pictures import digest
from deadpan.data.records import Record
from deadpan.errors import DeadpanError

_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """Positions in a list of records, each ascending.

    Attributes:
        training: Those to train on.
        held_out: Those to measure with.
    """

    training: tuple[int, ...]
    held_out: tuple[int, ...]


def hold_out(records: Sequence[Record], share: float, seed: int) -> Split:
    """Hold a share of the records out.

    Which groups are held out depends on the seed and on what their pictures are, not on the order
    of the records: groups are drawn in the order of a keyed hash, and one that would exceed the
    share is passed over. At least one group is held out.

    Args:
        records: All records; their pictures can be read.
        share: Of the records, between 0 and 1.
        seed: Decides which groups are drawn.

    Raises:
        DeadpanError: If all records hang together, so that there is nothing to hold out.
    """
    groups = _groups(_identities(records))
    if len(groups) < 2:
        raise DeadpanError(
            "No record can be held out: all of them share pictures with one another.",
            where=records[0].file,
            found=f"{len(records)} records in one group",
            fix="name a file of other records with data.validation=FILE, or set data.validation=null",
        )
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    most = max(1, math.floor(share * len(records) + 0.5))
    drawn: list[int] = []
    for name in order:
        if len(drawn) + len(groups[name]) <= most:
            drawn += groups[name]
    if not drawn:
        drawn = min((groups[name] for name in order), key=len)
    held_out = set(drawn)
    training = tuple(index for index in range(len(records)) if index not in held_out)
    return Split(training, tuple(sorted(held_out)))


def refuse_shared(training: Sequence[Record], held_out: Sequence[Record]) -> None:
    """Make sure that no held-out record is about a training picture.

    Raises:
        DeadpanError: If one is; the first few are named with the training record of that picture.
    """
    of_training: dict[str, Record] = {}
    for record, identity in zip(training, _identities(training), strict=True):
        for part in identity:
            of_training.setdefault(part, record)
    shared = []
    for record, identity in zip(held_out, _identities(held_out), strict=True):
        twin = next((of_training[part] for part in identity if part in of_training), None)
        if twin is not None:
            shared.append(f"{record.name} and {twin.name}")
    if shared:
        more = f"\n    and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        raise DeadpanError(
            f"{len(shared)} of {len(held_out)} held-out records are about pictures that are trained on.",
            where=held_out[0].file,
            expected="pictures that no training record has; copies under other names count as the same",
            found="".join(f"\n    {pair}" for pair in shared[:_SHOWN]) + more,
            fix="take them out of either file, or let deadpan hold records out by picture: "
            "data.validation=0.05",
        )


def _identities(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """For each record, what it must not share with one on the other side: its pictures, or its question.

    A file that several records name is read once.
    """
    known: dict[Path, str] = {}
    for record in records:
        for path in record.image_paths:
            if path not in known:
                known[path] = digest(path)
    return [
        tuple(known[path] for path in record.image_paths) or (_question(record),)
        for record in records
    ]


def _question(record: Record) -> str:
    question = repr(record.turns[:-1]).encode(errors="surrogatepass")
    return f"question {hashlib.sha256(question).hexdigest()}"


def _groups(identities: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Records that hang together, by a name that does not depend on their order (union-find)."""
    parent: dict[str, str] = {}

    def root(part: str) -> str:
        parent.setdefault(part, part)
        while parent[part] != part:
            parent[part] = parent[parent[part]]
            part = parent[part]
        return part

    for first, *others in identities:
        for other in others:
            # The smaller name wins, so that the group is called the same in any order.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    groups: dict[str, list[int]] = defaultdict(list)
    for index, (first, *_) in enumerate(identities):
        groups[root(first)].append(index)
    return groups
