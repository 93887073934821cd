"""Preference pairs: of two answers to one picture, which was liked more.

A file of pairs is JSON lines (or an array), as votes are exported:

    {"image": "dog.png", "prompt": "Say something dry.", "chosen": "He is the one who reads the
     small print.", "rejected": "A dog."}

`image` is a path, a list of paths or null, from the file's folder on; `prompt` may be left out; `id`
is optional. A pair becomes a `Record` whose answer is the chosen one.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deadpan.data.records import (
    CONTROL_TOKENS,
    IMAGE_TAG,
    PROMPT,
    Record,
    Turn,
    check_images,
    read_text,
)
from deadpan.errors import DeadpanError, writing
from deadpan.nano import records_file

_EXPECTED = '{"image": "dog.png", "prompt": optional, "chosen": "...", "rejected": "..."}'
_SHOWN = 5


@dataclass(frozen=True)
class Preference:
    """A pair.

    Attributes:
        images: The pictures' paths.
        prompt: What was asked.
        chosen: The answer that was liked more.
        rejected: The other one.
    """

    images: tuple[str, ...]
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Starred:
    """What was made of answers with stars.

    Attributes:
        pairs: The pairs, pictures in the order in which they come first.
        pictures: How many pictures, or questions without one, have pairs.
        uncounted: Records whose stars are not known: not counted is not disliked.
        longer: Records of several questions, which a pair cannot hold.
        single: Answers that no other answer to the picture and question can be set against.
    """

    pairs: list[Preference]
    pictures: int
    uncounted: int
    longer: int
    single: int


def from_stars(
    records: Iterable[Record], least_gap: int = 1, most: int | None = None, seed: int = 0
) -> Starred:
    """Pair more-liked answers with less-liked ones to the same picture and question.

    Of an answer that stands several times the highest count is taken.

    Args:
        records: Answers with their stars, in any order.
        least_gap: By how many stars the two of a pair must differ, at least 1.
        most: The most pairs of a picture and question, drawn from all its pairs; None: all. Without
            a limit a picture of k answers has up to k (k - 1) / 2, and a few pictures would outweigh
            all others.
        seed: Decides the draw.
    """
    stars: dict[tuple[tuple[str, ...], str], dict[str, int]] = defaultdict(dict)
    uncounted = longer = 0
    for record in records:
        if record.stars is None:
            uncounted += 1
        elif len(record.turns) != 2:
            longer += 1
        else:
            question, answer = (turn.text for turn in record.turns)
            images = tuple(path.absolute().as_posix() for path in record.image_paths)
            known = stars[images, question]
            answer = answer.strip()
            known[answer] = max(record.stars, known.get(answer, record.stars))
    draw = random.Random(seed)
    pairs: list[Preference] = []
    pictures = paired = 0
    for (images, question), liked in stars.items():
        ranked = sorted(liked.items(), key=lambda pair: (-pair[1], pair[0]))
        found = [
            Preference(images, _bare(question, len(images)), better, worse)
            for place, (better, more) in enumerate(ranked)
            for worse, less in ranked[place + 1 :]
            if more - less >= least_gap
        ]
        pictures += bool(found)
        paired += len({answer for pair in found for answer in (pair.chosen, pair.rejected)})
        if most is not None and len(found) > most:
            found = [found[i] for i in sorted(draw.sample(range(len(found)), most))]
        pairs += found
    distinct = sum(map(len, stars.values()))
    return Starred(pairs, pictures, uncounted, longer, single=distinct - paired)


def _bare(question: str, pictures: int) -> str:
    """A question without the marks that reading it puts in front again."""
    bare = question.removeprefix(f"{IMAGE_TAG}\n" * pictures)
    return bare if bare.strip() else question


def write(pairs: Sequence[Preference], path: Path) -> None:
    """Write pairs as JSON lines; pictures below the file's folder are named from there.

    Raises:
        DeadpanError: If the file cannot be written.
    """
    folder = path.absolute().parent
    lines = []
    for pair in pairs:
        names = [
            Path(name).relative_to(folder).as_posix() if Path(name).is_relative_to(folder) else name
            for name in pair.images
        ]
        value = {
            "image": names[0] if len(names) == 1 else names or None,
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
        }
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    with writing("pairs", path):
        path.write_text("".join(lines), encoding="utf-8")


def load(path: Path, images: Path | None = None) -> list[Record]:
    """Read a file of pairs.

    Args:
        path: The file, or `nano:preferences` or `nano:preferences-held-out`.
        images: The folder that picture paths start from; by default the file's.

    Raises:
        DeadpanError: If it is missing, or lines are not pairs; the first few are named.
    """
    check_images(images)
    path = records_file(path)
    text = read_text(path)
    if text.lstrip().startswith("["):
        array = _parsed(text)
        values = list(enumerate(array)) if isinstance(array, list) else [(0, array)]
        word = "record"
    else:
        # Not splitlines, which would also cut at U+2028, as an answer may hold it.
        lines = enumerate(text.split("\n"), start=1)
        values = [(number, _parsed(line)) for number, line in lines if line.strip()]
        word = "line"
    folder = path.parent if images is None else images
    records, mistakes = [], []
    for index, (number, value) in enumerate(values):
        mistake = _mistake(value)
        if mistake is not None:
            mistakes.append(f"{word} {number}: {mistake}")
        elif isinstance(value, dict):
            line = number if word == "line" else None
            records.append(_record(value, path, index, line, folder))
    if mistakes or not records:
        more = f"\n    and {len(mistakes) - _SHOWN:,} more" if len(mistakes) > _SHOWN else ""
        raise DeadpanError(
            "The file does not hold preference pairs.",
            where=path,
            expected=_EXPECTED,
            found="\n    ".join(mistakes[:_SHOWN]) + more or "nothing",
            fix="make one: of votes with deadpan votes export, of records with stars with deadpan data pairs",
        )
    return records


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        return error


def _mistake(value: object) -> str | None:
    """What is wrong with a pair, if anything."""
    if isinstance(value, ValueError):
        return f"not valid JSON: {value}"
    if not isinstance(value, dict):
        return "not a JSON object"
    names = _names(value)
    if not all(isinstance(name, str) and name for name in names):
        return "image: expected a path, a list of paths or null"
    prompt = value.get("prompt", PROMPT)
    if not isinstance(prompt, str) or not prompt.strip():
        return "prompt: expected text"
    if prompt.count(IMAGE_TAG) not in (0, len(names)):
        return f"prompt: expected {IMAGE_TAG} once a picture, or never"
    for key in ("chosen", "rejected"):
        answer = value.get(key)
        if not isinstance(answer, str) or not answer.strip():
            return f"{key}: expected text"
        for token in (IMAGE_TAG, *CONTROL_TOKENS):
            if token in answer:
                return f"{key}: holds {token}, which no answer may"
    if value["chosen"].strip() == value["rejected"].strip():
        return "chosen and rejected are the same"
    return None


def _names(value: dict[str, Any]) -> list[Any]:
    image = value.get("image")
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


def _record(
    value: dict[str, Any], path: Path, index: int, line: int | None, folder: Path
) -> Record:
    names, prompt = _names(value), value.get("prompt", PROMPT)
    if IMAGE_TAG not in prompt:
        prompt = f"{IMAGE_TAG}\n" * len(names) + prompt
    identifier = value.get("id")
    return Record(
        id=None if identifier is None else str(identifier),
        images=tuple(names),
        turns=(Turn("human", prompt), Turn("gpt", value["chosen"])),
        file=path,
        index=index,
        line=line,
        folder=folder,
        rejected=value["rejected"],
    )
