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
from deadpan.errors import DeadpanError
from deadpan.nano import records_file

_EXPECTED = '{"image": "dog.png", "prompt": optional, "chosen": "...", "rejected": "..."}'
_SHOWN = 5


@dataclass(frozen=True)
class Rated:
    """An answer and how much it was liked.

    Attributes:
        picture: The picture's path.
        prompt: What was asked.
        answer: What was answered.
        stars: How often it was liked; None if nobody counted.
    """

    picture: str
    prompt: str
    answer: str
    stars: float | None


@dataclass(frozen=True)
class Preference:
    """A pair.

    Attributes:
        picture: The picture's path.
        prompt: What was asked.
        chosen: The answer that was liked more.
        rejected: The other one.
    """

    picture: str
    prompt: str
    chosen: str
    rejected: str

    def to_json(self) -> dict[str, str]:
        """The pair as a file has it."""
        return {
            "image": self.picture,
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
        }


def from_stars(
    answers: Iterable[Rated],
    least_gap: float = 1,
    most: int | None = None,
    seed: int = 0,
) -> list[Preference]:
    """Pair more-liked answers with less-liked ones to the same picture and question.

    Answers without a count are passed over: not counted is not disliked. Of an answer that stands
    several times the highest count is taken.

    Args:
        answers: In any order.
        least_gap: By how many stars the two of a pair must differ at least.
        most: The most pairs of a picture and question, drawn from all its pairs; None: all. Without
            a limit a picture of k answers has up to k (k - 1) / 2, and a few pictures would outweigh
            all others.
        seed: Decides the draw.

    Returns:
        The pairs, pictures in the order in which they come first.
    """
    stars: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for each in answers:
        if each.stars is not None:
            known = stars[each.picture, each.prompt]
            known[each.answer] = max(each.stars, known.get(each.answer, each.stars))
    draw = random.Random(seed)
    pairs: list[Preference] = []
    for (picture, prompt), liked in stars.items():
        ranked = sorted(liked.items(), key=lambda pair: (-pair[1], pair[0]))
        found = [
            Preference(picture, prompt, better, worse)
            for place, (better, more) in enumerate(ranked)
            for worse, less in ranked[place + 1 :]
            if more - less >= max(least_gap, 0) and more > less
        ]
        if most is not None and len(found) > most:
            found = [found[i] for i in sorted(draw.sample(range(len(found)), most))]
        pairs += found
    return pairs


def write(pairs: Sequence[Preference], path: Path) -> None:
    """Write pairs as JSON lines."""
    lines = [json.dumps(pair.to_json(), ensure_ascii=False) + "\n" for pair in pairs]
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
