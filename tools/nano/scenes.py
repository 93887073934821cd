"""What is in a picture, and the sentence that says so.

A scene shows one to three kinds of thing, each in its own place (左边, 右边, 上面, 下面, 中间) and one to four times.
Its description is a function of the scene and can be read back, so that an answer is right or wrong, never a matter
of taste:

    图里左边有两只猫，右边有一把雨伞。

Some pairs of concepts, and some (concept, number, place), are held out: pretraining never composes a scene with one of
them, and the test composes nothing else.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nano.concepts import NUMBERS, concepts

PLACES = ("上面", "左边", "中间", "右边", "下面")
"""In the order in which a description goes through them."""

_CENTRES = {
    "上面": (0.5, 0.20),
    "左边": (0.20, 0.5),
    "中间": (0.5, 0.5),
    "右边": (0.80, 0.5),
    "下面": (0.5, 0.80),
}
_SIZES = {  # by kinds in the scene, then by number: from and to, as shares of the picture's shorter edge
    1: {1: (0.26, 0.60), 2: (0.22, 0.36), 3: (0.20, 0.32), 4: (0.19, 0.29)},
    2: {1: (0.24, 0.42), 2: (0.18, 0.25), 3: (0.17, 0.22)},
    3: {1: (0.21, 0.33), 2: (0.17, 0.21)},
}
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Group:
    """Some of one concept in one place."""

    concept: int
    count: int
    place: str


@dataclass(frozen=True)
class Sprite:
    """One drawn thing.

    Attributes:
        concept: Which.
        x: Its centre, as a share of the picture's width.
        y: Its centre, as a share of the picture's height.
        size: Its edge, as a share of the picture's shorter edge.
        angle: Its rotation in radians.
    """

    concept: int
    x: float
    y: float
    size: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """A picture to be drawn.

    Attributes:
        groups: What it shows, in the order of `PLACES`.
        sprites: Where everything is.
        width: In pixels.
        height: In pixels.
    """

    groups: tuple[Group, ...]
    sprites: tuple[Sprite, ...]
    width: int
    height: int


def describe(groups: Sequence[Group]) -> str:
    """The sentence for a scene."""
    known = concepts()
    parts = [f"{g.place}有{known[g.concept].counted(g.count)}" for g in groups]
    return f"图里{'，'.join(parts)}。"


def read_description(text: str) -> tuple[Group, ...] | None:
    """What a description says, or None if it is not one."""
    match = re.fullmatch(r"图里(.+)。", text)
    if match is None:
        return None
    groups = []
    for part in match[1].split("，"):
        found = re.fullmatch(f"({'|'.join(PLACES)})有(.)(.+)", part)
        if found is None or found[2] not in NUMBERS or found[3] not in _counted_names():
            return None
        groups.append(Group(_counted_names()[found[3]], NUMBERS.index(found[2]), found[1]))
    return tuple(groups)


@cache
def _counted_names() -> dict[str, int]:
    return {c.measure + c.name: index for index, c in enumerate(concepts())}


def _draw(*parts: object) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return random.Random(repr(parts)).random()


def pair_is_held_out(first: int, second: int) -> bool:
    """Whether two concepts never meet in a scene of pretraining."""
    return _draw("pair", *sorted((first, second))) < _HELD_OUT_SHARE


def group_is_held_out(group: Group) -> bool:
    """Whether that many of a concept never stand in that place in pretraining."""
    return _draw("group", group.concept, group.count, group.place) < _HELD_OUT_SHARE


def is_held_out(groups: Sequence[Group]) -> bool:
    """Whether a scene has anything that pretraining never composes."""
    pairs = [(a.concept, b.concept) for i, a in enumerate(groups) for b in groups[:i]]
    return any(map(group_is_held_out, groups)) or any(pair_is_held_out(*pair) for pair in pairs)


def compose(
    random_: random.Random,
    kinds: int,
    size: tuple[int, int],
    choices: Sequence[int],
    held_out: bool | None = None,
) -> Scene:
    """Think of a scene.

    Args:
        random_: Decides.
        kinds: How many concepts, 1 to 3.
        size: Width and height in pixels.
        choices: The concepts to choose from.
        held_out: True for a scene that pretraining never composes, False for one it may, None for any.
    """
    while True:
        places = sorted(random_.sample(PLACES, kinds), key=PLACES.index)
        most = max(_SIZES[kinds])
        groups = tuple(
            Group(concept, random_.choices(range(1, most + 1), [4, 2, 1, 1][:most])[0], place)
            for concept, place in zip(random_.sample(choices, kinds), places, strict=True)
        )
        if held_out is None or is_held_out(groups) == held_out:
            return arrange(random_, groups, size)


def arrange(random_: random.Random, groups: Sequence[Group], size: tuple[int, int]) -> Scene:
    """Lay out given groups, which stand in the order of `PLACES`."""
    return Scene(tuple(groups), _lay_out(random_, groups, size), *size)


def _pattern(random_: random.Random, count: int, place: str) -> list[tuple[float, float]]:
    """Where the things of a group stand, in multiples of their size around its centre."""
    if count == 1:
        return [(0, 0)]
    upright = place in ("左边", "右边") or (place == "中间" and random_.random() < 0.5)
    if count == 4:
        return [(-0.53, -0.53), (0.53, -0.53), (-0.53, 0.53), (0.53, 0.53)]
    line = [(index - (count - 1) / 2) * 1.06 for index in range(count)]
    if count == 3 and random_.random() < 0.6:
        corner = random_.choice([-0.5, 0.5])
        return [(-0.53, -corner), (0.53, -corner), (0, corner)]
    return [(0, offset) if upright else (offset, 0) for offset in line]


def _lay_out(
    random_: random.Random, groups: Sequence[Group], size: tuple[int, int]
) -> tuple[Sprite, ...]:
    """Give every thing a centre, a size and an angle; groups do not overlap."""
    width, height = size
    short = min(size)
    shrink = 1.0
    while True:
        sprites, boxes = [], []
        for group in groups:
            low, high = _SIZES[len(groups)][group.count]
            edge = random_.uniform(low, high) * shrink * short  # pixels
            pattern = _pattern(random_, group.count, group.place)
            reach_x, reach_y = (
                (max(abs(offset[axis]) for offset in pattern) + 0.5) * edge for axis in (0, 1)
            )
            centre_x, centre_y = _CENTRES[group.place]
            x = (centre_x + random_.uniform(-0.06, 0.06)) * width
            y = (centre_y + random_.uniform(-0.06, 0.06)) * height
            x = min(max(x, reach_x), max(width - reach_x, width / 2))
            y = min(max(y, reach_y), max(height - reach_y, height / 2))
            boxes.append((x, y, reach_x, reach_y))
            for across, down in pattern:
                angle = random_.gauss(0, 0.17)
                shake_x, shake_y = (random_.uniform(-0.04, 0.04) for _ in range(2))
                sprites.append(
                    Sprite(
                        group.concept,
                        (x + (across + shake_x) * edge) / width,
                        (y + (down + shake_y) * edge) / height,
                        edge * random_.uniform(0.93, 1.04) / short,
                        angle,
                    )
                )
        apart = all(
            abs(a[0] - b[0]) >= 0.97 * (a[2] + b[2]) or abs(a[1] - b[1]) >= 0.97 * (a[3] + b[3])
            for i, a in enumerate(boxes)
            for b in boxes[:i]
        )
        if apart:
            return tuple(sprites)
        shrink = max(0.72, shrink * 0.97)
