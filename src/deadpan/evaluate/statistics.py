"""Figures with intervals, and whether two tellers differ.

Answers about one picture are not independent, so both questions are asked of pictures: the bootstrap draws pictures
with all their items (cluster bootstrap; Field and Welsh 2007, doi:10.1111/j.1467-9868.2007.00593.x), and the paired
test exchanges the two tellers' results picture by picture (approximate randomisation; Noreen 1989, "Computer-Intensive
Methods for Testing Hypotheses"). Where each picture has one item that is right or wrong, that test is McNemar's exact
test, up to the number of draws.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 10_000
_CHUNK = 2_000_000

Unit = Literal["share", "number"]


@dataclass(frozen=True)
class Items:
    """One measure of one teller, item by item; its figure is sum(values) / sum(weights).

    Attributes:
        name: What is measured.
        values: For each item, such as 1 for right and 0 for wrong, or -log p of an answer.
        pictures: For each item, what it is about; items of one picture stay together.
        weights: For each item, such as an answer's tokens; by default 1.
        chance: What guessing would give.
        unit: "share" if the figure is from 0 to 1 and is told in percent.
    """

    name: str
    values: Sequence[float]
    pictures: Sequence[str]
    weights: Sequence[float] | None = None
    chance: float | None = None
    unit: Unit = "number"


@dataclass(frozen=True)
class Metric:
    """A figure with its uncertainty.

    Attributes:
        name: What is measured.
        value: The figure.
        low: The lower end of its 95% bootstrap interval; None where none is computed.
        high: Its upper end.
        n: How many items it is taken over.
        chance: What guessing would give; None where guessing has no meaning.
        unit: As of `Items`.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    chance: float | None = None
    unit: Unit = "number"

    @property
    def text(self) -> str:
        """The figure for people."""
        return self.told(self.value)

    @property
    def interval(self) -> str | None:
        """Its interval for people, if it has one."""
        if self.low is None or self.high is None:
            return None
        return f"{self.told(self.low)} to {self.told(self.high)}"

    def told(self, value: float) -> str:
        """A value of this figure's unit for people."""
        return f"{value:.1%}" if self.unit == "share" else f"{value:,.3g}"

    def to_json(self) -> dict[str, Any]:
        """The figure in JSON's own types."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """How one teller's figure differs from another's, on the same items.

    Attributes:
        name: What is measured.
        value: The second teller's figure less the first's.
        low: The lower end of the 95% paired bootstrap interval.
        high: Its upper end.
        p: Of the two-sided paired randomisation test: how often chance alone gives as large a difference.
        n: How many items both were measured on.
        unit: As of `Items`.
    """

    name: str
    value: float
    low: float
    high: float
    p: float
    n: int
    unit: Unit = "number"

    def to_json(self) -> dict[str, Any]:
        """The difference in JSON's own types."""
        return asdict(self)


def metric(items: Items, seed: int = 0, resamples: int = RESAMPLES) -> Metric:
    """The figure of some items, with a 95% percentile interval of the bootstrap over pictures."""
    sums, weights = _by_picture(items)  # (picture,), (picture,)
    low, high = _interval(
        [
            sums[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
            for drawn in _draws(len(sums), seed, resamples)
        ]
    )
    value = float(sums.sum() / weights.sum())
    return Metric(items.name, value, low, high, len(items.values), items.chance, items.unit)


def difference(
    first: Items, second: Items, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """Compare two tellers on the same items.

    Raises:
        ValueError: If the items are not the same ones.
    """
    if (first.name, list(first.pictures)) != (second.name, list(second.pictures)):
        raise ValueError(f"{first.name} and {second.name} are not of the same items")
    a, a_weights = _by_picture(first)
    b, b_weights = _by_picture(second)
    value = float(b.sum() / b_weights.sum() - a.sum() / a_weights.sum())
    low, high = _interval(
        [
            b[drawn].sum(axis=1) / b_weights[drawn].sum(axis=1)
            - a[drawn].sum(axis=1) / a_weights[drawn].sum(axis=1)
            for drawn in _draws(len(a), seed, resamples)
        ]
    )
    random = np.random.default_rng(seed)
    extreme = 0
    for size in _chunks(len(a), resamples):
        swapped = random.integers(0, 2, (size, len(a)), dtype=bool)
        exchanged = np.where(swapped, a, b).sum(axis=1) / np.where(
            swapped, a_weights, b_weights
        ).sum(axis=1) - np.where(swapped, b, a).sum(axis=1) / np.where(
            swapped, b_weights, a_weights
        ).sum(axis=1)
        # Equal up to rounding counts as equal.
        extreme += int((np.abs(exchanged) >= abs(value) - 1e-12).sum())
    p = (extreme + 1) / (resamples + 1)
    return Difference(first.name, value, low, high, p, len(first.values), first.unit)


def ndcg(relevance: Sequence[float]) -> float:
    """Normalised discounted cumulative gain of candidates in the order that a teller ranks them.

    Järvelin and Kekäläinen 2002 (doi:10.1145/582415.582418), with the gain itself (likes run to thousands, of which
    powers of two would let the first place alone decide) over log2(place + 1).

    Args:
        relevance: Of each candidate, best ranked first; not all 0.
    """
    gains = np.asarray(relevance, dtype=float)
    discounts = _discounts(len(gains))
    return float((gains * discounts).sum() / (np.sort(gains)[::-1] * discounts).sum())


def chance_ndcg(relevance: Sequence[float]) -> float:
    """The mean of `ndcg` over all orders of the candidates."""
    gains = np.asarray(relevance, dtype=float)
    discounts = _discounts(len(gains))
    return float(gains.mean() * discounts.sum() / (np.sort(gains)[::-1] * discounts).sum())


def _discounts(places: int) -> np.ndarray:
    return 1 / np.log2(np.arange(2, places + 2))


def _by_picture(items: Items) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values and of weights, each float64 of shape (picture,), in the order of first appearance."""
    number = {name: index for index, name in enumerate(dict.fromkeys(items.pictures))}
    places = [number[name] for name in items.pictures]
    weights = items.weights if items.weights is not None else np.ones(len(places))
    return (
        np.bincount(places, np.asarray(items.values, dtype=float)),
        np.bincount(places, np.asarray(weights, dtype=float)),
    )


def _draws(pictures: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Indices of shape (resample, picture), in parts that fit in memory."""
    random = np.random.default_rng(seed)
    for size in _chunks(pictures, resamples):
        yield random.integers(0, pictures, (size, pictures))


def _chunks(pictures: int, resamples: int) -> list[int]:
    most = max(1, _CHUNK // max(1, pictures))
    return [min(most, resamples - start) for start in range(0, resamples, most)]


def _interval(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    low, high = np.percentile(np.concatenate(parts), [2.5, 97.5])
    return float(low), float(high)
