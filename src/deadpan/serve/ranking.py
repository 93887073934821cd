"""How good tellers are, from votes on pairs of them: the model of Bradley and Terry, with bootstrap intervals.

A teller of strength a beats one of strength b with probability 1 / (1 + exp(b - a)) (R. A. Bradley and M. E. Terry,
Rank analysis of incomplete block designs, Biometrika 39, 1952). Strengths are those of the greatest likelihood, a tie
being half a win for each, as in Chatbot Arena (W.-L. Chiang et al., arXiv:2403.04132), whose scale and way to count
ranks are used too: 400 points are odds of ten to one.

Unlike there, each teller is also given one tie with an imagined one in the middle. Without it a teller that has won all
its votes would be infinitely strong, and tellers that no chain of votes connects could not be fitted at all. It weighs
as much as one vote of many.

And the bootstrap is the parametric one (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, section
6.5): outcomes are drawn by the fitted strengths, each pair meeting as often as it did. Votes drawn again from the votes
would all be wins for a teller that has won its only one, which would then be better beyond doubt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deadpan.serve.votes import Outcome, Vote

RESAMPLES = 1000
_CONFIDENCE = 0.95
_POINTS = 400 / math.log(10)
_MIDDLE = 1000
_ACCURACY = 1e-9
_ITERATIONS = 1000


@dataclass(frozen=True)
class Standing:
    """A teller's place.

    Attributes:
        rank: One more than the tellers that are better beyond doubt: whose whole interval lies above its own.
        teller: Its name.
        rating: Its strength in points; the mean of all is 1000.
        low: Where the 95% interval of the rating begins.
        high: Where it ends.
        votes: Votes on its matches.
        won: Those it won.
        both_dry: Ties of two good jokes.
        both_bad: Ties of two bad ones.
        group: Tellers that a chain of votes connects have the same number. Ratings of different groups cannot be
            compared.
    """

    rank: int
    teller: str
    rating: float
    low: float
    high: float
    votes: int
    won: int
    both_dry: int
    both_bad: int
    group: int


def rank(votes: Sequence[Vote], resamples: int = RESAMPLES, seed: int = 0) -> list[Standing]:
    """Rank tellers, the best first.

    Args:
        votes: Those of a teller against itself are left out.
        resamples: Outcomes drawn for the intervals.
        seed: Of the drawing.
    """
    votes = [vote for vote in votes if vote.match.left != vote.match.right]
    names = sorted({name for vote in votes for name in (vote.match.left, vote.match.right)})
    if not names:
        return []
    index = {name: number for number, name in enumerate(names)}
    won, dry, bad = np.zeros((3, len(names), len(names)))  # (teller, teller)
    for vote in votes:
        left, right = index[vote.match.left], index[vote.match.right]
        match vote.outcome:
            case Outcome.LEFT:
                won[left, right] += 1
            case Outcome.RIGHT:
                won[right, left] += 1
            case Outcome.BOTH_DRY:
                dry[[left, right], [right, left]] += 1
            case Outcome.BOTH_BAD:
                bad[[left, right], [right, left]] += 1
    ties = dry + bad
    strengths = fit((won + ties / 2)[None])
    drawn = _draw(strengths[0], won + won.T + ties, ties.sum() / 2, resamples, seed)
    ratings, resampled = _points(strengths)[0], _points(fit(drawn))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    groups = _groups(won + ties)
    standings = [
        Standing(
            rank=1 + int((low > high[number]).sum()),
            teller=name,
            rating=float(ratings[number]),
            low=float(low[number]),
            high=float(high[number]),
            votes=int((won + won.T + ties)[number].sum()),
            won=int(won[number].sum()),
            both_dry=int(dry[number].sum()),
            both_bad=int(bad[number].sum()),
            group=groups[number],
        )
        for number, name in enumerate(names)
    ]
    return sorted(standings, key=lambda standing: -standing.rating)


def fit(wins: np.ndarray) -> np.ndarray:
    """The strengths of greatest likelihood, by Newton's method.

    Steps are damped by ln(1 + d) / d, d being the most that a difference of strengths would change: with this step the
    method converges from anywhere, since the loss is generalised self-concordant (T. Sun and Q. Tran-Dinh,
    Mathematical Programming 178, 2019).

    Args:
        wins: (sample, teller, teller): how often the first beat the second, ties being half a win.

    Returns:
        (sample, teller): natural logarithms of odds against the imagined teller in the middle.
    """
    samples, tellers, _ = wins.shape
    games = wins + wins.transpose(0, 2, 1)
    won = wins.sum(axis=2) + 0.5  # the tie with the imagined teller
    strengths = np.zeros((samples, tellers))
    diagonal = np.arange(tellers)
    for _ in range(_ITERATIONS):
        beats = _logistic(strengths[:, :, None] - strengths[:, None, :])  # (sample, teller, teller)
        beats_middle = _logistic(strengths)
        gradient = won - (games * beats).sum(axis=2) - beats_middle
        weights = games * beats * (1 - beats)
        curvature = -weights
        curvature[:, diagonal, diagonal] = weights.sum(axis=2) - weights[:, diagonal, diagonal]
        curvature[:, diagonal, diagonal] += beats_middle * (1 - beats_middle)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        # The imagined teller's own step is none.
        most = np.maximum(step.max(axis=1), 0) - np.minimum(step.min(axis=1), 0)
        if most.max() < _ACCURACY:
            break
        damping = np.ones(samples)
        np.divide(np.log1p(most), most, out=damping, where=most > 0)
        strengths += damping[:, None] * step
    return strengths


def _logistic(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2


def _draw(
    strengths: np.ndarray, games: np.ndarray, ties: float, samples: int, seed: int
) -> np.ndarray:
    """Draw outcomes as the model has them.

    Args:
        strengths: (teller,)
        games: (teller, teller): how often each pair has met, symmetric.
        ties: How many of all votes were ties. All pairs are drawn as even: a share of their own would say from one
            vote that a pair always ties.
        samples: How many to draw.
        seed: Of the drawing.

    Returns:
        (sample, teller, teller): wins of the first over the second, ties being half a win.
    """
    one, other = np.nonzero(np.triu(games))
    beats = _logistic(strengths[one] - strengths[other])  # (pair,)
    share = (ties + 1) / (games.sum() / 2 + 2)
    # Half the ties are wins, so that unequal tellers tie less often.
    tied = np.minimum(share, 2 * np.minimum(beats, 1 - beats))
    outcomes = np.stack([beats - tied / 2, 1 - beats - tied / 2, tied], axis=1)  # (pair, outcome)
    outcomes = outcomes.clip(0, 1)
    drawn = np.random.default_rng(seed).multinomial(
        games[one, other].astype(int), outcomes, size=(samples, len(one))
    )  # (sample, pair, outcome)
    wins = np.zeros((samples, *games.shape))
    wins[:, one, other] = drawn[..., 0] + drawn[..., 2] / 2
    wins[:, other, one] = drawn[..., 1] + drawn[..., 2] / 2
    return wins


def _points(strengths: np.ndarray) -> np.ndarray:
    return _MIDDLE + _POINTS * (strengths - strengths.mean(axis=1, keepdims=True))


def _groups(met: np.ndarray) -> list[int]:
    """For each teller, the number of the first one that a chain of votes connects it with."""
    groups = list(range(len(met)))
    for one, other in np.argwhere(met):
        first, second = sorted((groups[one], groups[other]))
        groups = [first if group == second else group for group in groups]
    return groups
