"""From hand-written jokes to answers for a picture.

`jokes/*.yaml` holds whole jokes on one thing, whole jokes on two that meet, and what each thing says by itself. On a
picture of several things that have no joke together, one of them speaks its line in a frame from below, so there are
more answers than anybody wrote, and a new pair gets a new one.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import yaml

from nano.concepts import HERE, Concept, concepts
from nano.scenes import Group

_MARKS = "，。？：、“”"
_WHOLE = 2
"""Whole jokes on a thing that the starter set takes. What is written beyond that is there for larger sets: a small
model has a minute, and remembers what it meets often."""

FRAMES_1 = (
    "{a}想了很久，说：{line}",
    "{a}只留下一句话：{line}",
)
"""For one thing that has something to say."""

FRAMES_2 = (
    "{a}问{b}最近怎么样，{b}说：{line}",
    "{a}请{b}吃饭，{b}坐下就说：{line}",
    "{a}的婚礼上，{b}致辞：{line}",
    "{a}给{b}写了封长信，{b}回了一句：{line}",
    "{a}面试{b}，问有什么优点，{b}说：{line}",
)
"""For two things: the second speaks."""

FRAMES_3 = (
    "{a}、{b}和{c}开会，{c}总结：{line}",
    "{a}请{b}吃饭，{c}买单，{c}说：{line}",
    "{a}和{b}吵了一架，{c}劝道：{line}",
)
"""For three: the third speaks."""


@dataclass(frozen=True)
class Jokes:
    """What was written about one concept.

    Attributes:
        jokes: Whole jokes.
        lines: What it says.
        many: A joke on several of it, with {many} for how many.
        puns: The puns in all of these.
    """

    jokes: tuple[str, ...]
    lines: tuple[str, ...]
    many: str
    puns: tuple[str, ...]


@cache
def written() -> tuple[dict[str, Jokes], dict[frozenset[str], str]]:
    """All jokes: by concept, and by pair of concepts.

    Raises:
        AssertionError: If a text breaks a rule of `jokes/README.md`.
    """
    singles: dict[str, Jokes] = {}
    pairs: dict[frozenset[str], str] = {}
    for path in sorted((HERE / "jokes").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, entry in content["concepts"].items():
            assert name not in singles, f"{name} stands twice"
            singles[name] = Jokes(
                jokes=tuple(entry["jokes"]),
                lines=tuple(entry["lines"]),
                many=entry["many"],
                puns=tuple(entry["puns"]),
            )
        for entry in content["pairs"]:
            pairs.setdefault(frozenset(entry["of"]), entry["joke"])
    _check(singles, pairs)
    return singles, pairs


def favourites(each: int = 16) -> list[str]:
    """The concepts of the starter set: from each file the first whose first line puns."""
    singles, _ = written()
    found = []
    for path in sorted((HERE / "jokes").glob("*.yaml")):
        names = yaml.safe_load(path.read_text(encoding="utf-8"))["concepts"]
        punning = [n for n in names if any(pun in singles[n].lines[0] for pun in singles[n].puns)]
        found += punning[:each]
    return found


def texts() -> list[str]:
    """Every text that was written, frames included."""
    singles, pairs = written()
    found = [t for jokes in singles.values() for t in (*jokes.jokes, *jokes.lines, jokes.many)]
    return [*found, *pairs.values(), *FRAMES_1, *FRAMES_2, *FRAMES_3]


def _check(singles: dict[str, Jokes], pairs: dict[frozenset[str], str]) -> None:
    names = {concept.name for concept in concepts()}
    owner: dict[str, str] = {}
    for name, jokes in singles.items():
        assert name in names, f"{name} is no concept"
        every = (*jokes.jokes, *jokes.lines, jokes.many)
        for pun in jokes.puns:
            assert any(pun in text for text in every), f"{name}: no text has the pun {pun}"
            assert owner.setdefault(pun, name) == name, f"{pun} is {owner[pun]}'s, not {name}'s"
        for text in (*jokes.jokes, jokes.many):
            about = name in text or "{many}" in text or any(pun in text for pun in jokes.puns)
            assert about, f"{name}: neither named nor punned on: {text}"
        for text, (least, most) in (
            *((t, (10, 36)) for t in jokes.jokes),
            *((t, (4, 14)) for t in jokes.lines),
            (jokes.many, (10, 40)),
        ):
            assert least <= len(text) <= most, f"{name}: {len(text)} characters: {text}"
            assert _allowed(text.replace("{many}", "")), f"{name}: odd characters: {text}"
    for pair, text in pairs.items():
        assert pair <= names, f"unknown: {pair}"
        assert 10 <= len(text) <= 40, f"{len(text)} characters: {text}"
        assert _allowed(text), f"odd characters: {text}"


def _allowed(text: str) -> bool:
    return re.fullmatch(f"[\u4e00-\u9fff{_MARKS}]+", text) is not None


def _called(group: Group, known: Sequence[Concept]) -> str:
    """A group in a joke: 猫, or 三只猫 if there are several."""
    concept = known[group.concept]
    return concept.name if group.count == 1 else concept.counted(group.count)


def answers(random_: random.Random, groups: Sequence[Group], most: int) -> list[str]:
    """Up to so many different answers for a picture.

    Args:
        random_: Decides.
        groups: What the picture shows; every concept in it must have jokes.
        most: How many at most.
    """
    known = concepts()
    singles, pairs = written()
    names = [known[group.concept].name for group in groups]
    if len(groups) == 1:
        (group,) = groups
        jokes = singles[names[0]]
        if group.count > 1:
            return [jokes.many.format(many=known[group.concept].counted(group.count))]
        spoken = [frame.format(a=names[0], line=jokes.lines[0]) for frame in FRAMES_1]
        # As often its own words as a whole joke about it.
        return random_.sample([*jokes.jokes[:_WHOLE], *spoken], most)
    together = pairs.get(frozenset(names))
    found = [together] if together and all(group.count == 1 for group in groups) else []
    frames = FRAMES_2 if len(groups) == 2 else FRAMES_3
    while len(found) < most:
        order = random_.sample(range(len(groups)), len(groups))
        speaker = names[order[-1]]
        called = dict(zip("abc", (_called(groups[i], known) for i in order), strict=False))
        text = random_.choice(frames).format(**called, line=singles[speaker].lines[0])
        if text not in found:
            found.append(text)
    return found
