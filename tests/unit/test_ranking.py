import math
from pathlib import Path

import numpy as np
import pytest

from deadpan.serve.ranking import fit, rank
from deadpan.serve.votes import Match, Outcome, Vote

POINTS = 400 / math.log(10)


def vote(left: str, right: str, outcome: Outcome) -> Vote:
    return Vote(Match(Path("p.png"), "?", left, right, "1", "2"), outcome)


def simulated(strengths: dict[str, float], number: int, seed: int, ties: float = 0.0) -> list[Vote]:
    """Votes as the model of Bradley and Terry has them; a share of them are ties instead."""
    random = np.random.default_rng(seed)
    votes = []
    for _ in range(number):
        left, right = map(str, random.choice(list(strengths), size=2, replace=False))
        if random.random() < ties:
            outcome = [Outcome.BOTH_DRY, Outcome.BOTH_BAD][random.integers(2)]
        else:
            wins = 1 / (1 + math.exp(strengths[right] - strengths[left]))
            outcome = Outcome.LEFT if random.random() < wins else Outcome.RIGHT
        votes.append(vote(left, right, outcome))
    return votes


def test_known_strengths_are_found_again() -> None:
    strengths = {"a": 0.9, "b": 0.3, "c": -0.2, "d": -1.0}
    standings = rank(simulated(strengths, 20_000, seed=1), resamples=200)
    assert [standing.teller for standing in standings] == ["a", "b", "c", "d"]
    assert [standing.rank for standing in standings] == [1, 2, 3, 4]
    for standing in standings:
        true = 1000 + POINTS * strengths[standing.teller]
        assert standing.rating == pytest.approx(true, abs=12)
    assert sum(standing.rating for standing in standings) == pytest.approx(4000)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    strengths = {"a": 0.5, "b": 0.0, "c": -0.5}
    held = []
    for seed in range(60):
        for row in rank(simulated(strengths, 300, seed), resamples=200, seed=seed):
            held.append(row.low <= 1000 + POINTS * strengths[row.teller] <= row.high)
    assert len(held) == 180
    assert 0.88 <= sum(held) / len(held) <= 0.995


def test_two_tellers_have_the_strengths_of_the_closed_form() -> None:
    """With p won of n, and the imagined teller, strengths are +-x: p + 1/2 = n s(2x) + s(x)."""
    wins = np.array([[[0.0, 30.0], [10.0, 0.0]]])
    x, minus_x = fit(wins)[0]
    assert minus_x == pytest.approx(-x)
    logistic = lambda y: 1 / (1 + math.exp(-y))  # noqa: E731
    assert 40 * logistic(2 * x) + logistic(x) == pytest.approx(30.5)
    assert 2 * x == pytest.approx(math.log(3), abs=0.03)


def test_a_tie_is_half_a_win_for_each() -> None:
    ties = [vote("a", "b", Outcome.BOTH_DRY), vote("b", "a", Outcome.BOTH_BAD)] * 10
    halves = [vote("a", "b", Outcome.LEFT), vote("a", "b", Outcome.RIGHT)] * 10
    more = [vote("a", "b", Outcome.LEFT)] * 30
    assert rank(ties + more)[0].rating == pytest.approx(rank(halves + more)[0].rating)
    assert [row.rating for row in rank(ties)] == pytest.approx([1000, 1000])
    assert (rank(ties)[0].both_dry, rank(ties)[0].both_bad, rank(ties)[0].won) == (10, 10, 0)


def test_sides_do_not_matter() -> None:
    votes = simulated({"a": 0.5, "b": -0.5}, 400, seed=2, ties=0.3)
    other = {Outcome.LEFT: Outcome.RIGHT, Outcome.RIGHT: Outcome.LEFT}
    turned = [vote(v.match.right, v.match.left, other.get(v.outcome, v.outcome)) for v in votes]
    before, after = rank(votes), rank(turned)
    assert [row.teller for row in before] == [row.teller for row in after]
    assert [row.rating for row in before] == pytest.approx([row.rating for row in after])


def test_a_teller_that_always_wins_is_strong_but_not_infinitely() -> None:
    best, worst = rank([vote("a", "b", Outcome.LEFT)] * 100_000, resamples=100)
    assert (best.teller, best.rank, worst.rank) == ("a", 1, 2)
    # It loses half a vote of so many to the imagined one, as the other wins half.
    assert best.rating - worst.rating == pytest.approx(POINTS * math.log(200_000), abs=2)


def test_one_vote_is_no_proof() -> None:
    best, worst = rank([vote("a", "b", Outcome.LEFT)])
    assert (best.teller, best.rank, worst.rank) == ("a", 1, 1)
    assert worst.low < best.low <= worst.high < best.high


def test_lopsided_chains_converge() -> None:
    """Newton's method alone diverges here."""
    wins = np.zeros((1, 6, 6))
    for better in range(5):
        wins[0, better, better + 1] = 10.0 ** (better + 1)
    strengths = fit(wins)[0]
    beats = 1 / (1 + np.exp(strengths[None] - strengths[:, None]))
    expected = ((wins[0] + wins[0].T) * beats).sum(axis=1) + 1 / (1 + np.exp(-strengths))
    np.testing.assert_allclose(expected, wins[0].sum(axis=1) + 0.5, rtol=1e-6)
    assert (np.diff(strengths) < 0).all()


def test_tellers_that_never_met_are_groups() -> None:
    votes = [vote("a", "b", Outcome.LEFT), vote("c", "d", Outcome.LEFT)]
    group = {row.teller: row.group for row in rank(votes, resamples=5)}
    assert group["a"] == group["b"] != group["c"] == group["d"]
    joined = [*votes, vote("d", "b", Outcome.BOTH_DRY)]
    assert len({row.group for row in rank(joined, resamples=5)}) == 1


def test_doubt_shares_a_rank_and_a_teller_against_itself_says_nothing() -> None:
    votes = [
        vote("a", "b", Outcome.LEFT),
        vote("b", "a", Outcome.LEFT),
        vote("a", "a", Outcome.LEFT),
    ]
    assert [row.rank for row in rank(votes)] == [1, 1]
    assert [row.votes for row in rank(votes)] == [2, 2]
    assert rank([]) == rank(votes[2:]) == []
