"""Intervals, paired tests and NDCG against what is known of them."""

from itertools import permutations
from math import comb, log2

import numpy as np
import pytest

from deadpan.evaluate.statistics import Items, chance_ndcg, difference, metric, ndcg


def items(values: list[float], pictures: list[str] | None = None, **keys: object) -> Items:
    return Items("x", values, pictures or [str(i) for i in range(len(values))], **keys)  # type: ignore[arg-type]


def test_a_figure_is_a_ratio_of_sums_within_its_interval() -> None:
    found = metric(items([2.0, 9.0, 4.0], weights=[1, 3, 2]))
    assert found.value == pytest.approx(15 / 6)
    assert found.low is not None
    assert found.high is not None
    assert (found.low, found.high) == pytest.approx((2.0, 3.0))
    assert found == metric(items([2.0, 9.0, 4.0], weights=[1, 3, 2]))


def test_the_interval_covers_the_truth_about_95_times_of_100() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found = metric(items(list(random.normal(3.0, 2.0, 60))), resamples=1000)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 3.0 <= found.high
    # A percentile interval over 60 values covers a little less than it says; the deviation of the count is 1.1%.
    assert 0.91 <= covered / 400 <= 0.98


def test_answers_of_one_picture_do_not_make_the_interval_narrower() -> None:
    values = list(np.random.default_rng(1).normal(size=40))
    once = metric(items(values))
    tenfold = metric(items(values * 10, [str(i) for i in range(40)] * 10))
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))
    assert tenfold.n == 400


@pytest.mark.parametrize(("worse", "better"), [(2, 9), (5, 5), (0, 6)])
def test_the_paired_test_is_mcnemars_where_items_are_right_or_wrong(
    worse: int, better: int
) -> None:
    first = [1.0] * worse + [0.0] * better + [1.0] * 20
    second = [0.0] * worse + [1.0] * better + [1.0] * 20
    found = difference(items(first), items(second))
    discordant = worse + better
    tail = sum(comb(discordant, k) for k in range(min(worse, better) + 1)) / 2**discordant
    assert found.value == pytest.approx((better - worse) / len(first))
    assert found.p == pytest.approx(min(1.0, 2 * tail), abs=0.015)


def test_no_difference_is_significant_about_5_times_of_100() -> None:
    random = np.random.default_rng(2)
    small = 0
    for _ in range(400):
        shared = random.normal(size=40)
        one, other = (items(list(shared + random.normal(size=40))) for _ in range(2))
        small += difference(one, other, resamples=400).p <= 0.05
    assert 0.02 <= small / 400 <= 0.09


def test_other_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="not of the same items"):
        difference(items([1.0], ["a"]), items([1.0], ["b"]))


def test_ndcg_by_hand() -> None:
    assert ndcg([3, 2, 1]) == 1.0
    assert ndcg([1, 0]) == 1.0
    assert ndcg([0, 1]) == pytest.approx(1 / log2(3))
    ideal = 3 + 2 / log2(3) + 1 / 2
    assert ndcg([1, 2, 3]) == pytest.approx((1 + 2 / log2(3) + 3 / 2) / ideal)


def test_chance_ndcg_is_the_mean_over_all_orders() -> None:
    likes = [50, 7, 7, 1, 0]
    assert chance_ndcg(likes) == pytest.approx(np.mean([ndcg(o) for o in permutations(likes)]))
