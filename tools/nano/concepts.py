"""The things that nano knows: an emoji, its Chinese name, and the measure word it is counted with."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Concept:
    """One kind of thing.

    Attributes:
        emoji: The character that Noto Color Emoji draws.
        name: What it is called.
        measure: The word between a number and the name: 一把雨伞.
    """

    emoji: str
    name: str
    measure: str

    def counted(self, count: int) -> str:
        """So many of it: 两只猫."""
        return f"{NUMBERS[count]}{self.measure}{self.name}"


NUMBERS = ("零", "一", "两", "三", "四")


@cache
def concepts() -> tuple[Concept, ...]:
    """All of them, in the order of `concepts.tsv`."""
    with (HERE / "concepts.tsv").open(encoding="utf-8", newline="") as file:
        return tuple(Concept(**row) for row in csv.DictReader(file, delimiter="\t"))


@cache
def facts() -> dict[str, tuple[str, ...]]:
    """Plain sentences about each concept, by its name."""
    found: dict[str, list[str]] = {}
    with (HERE / "facts.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            found.setdefault(row["name"], []).append(row["fact"])
    return {name: tuple(sentences) for name, sentences in found.items()}
