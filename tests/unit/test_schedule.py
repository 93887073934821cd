import math
from itertools import pairwise
from typing import Literal

import pytest
import torch

from deadpan.config.schema import Schedule
from deadpan.train.schedule import factor, schedule

PEAK = 1e-3
Name = Literal["cosine", "constant"]


def rates(settings: Schedule, total: int) -> list[float]:
    """The learning rate of each step of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = schedule(optimizer, settings, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize(
    ("ratio", "total", "warmup"), [(0.5, 8, 4), (0.03, 1000, 30), (0.03, 10, 1), (0.9, 1, 1)]
)
def test_the_warm_up_climbs_evenly_from_the_first_step_to_the_peak(
    name: Name, ratio: float, total: int, warmup: int
) -> None:
    seen = rates(Schedule(name=name, warmup_ratio=ratio), total)
    assert seen[:warmup] == pytest.approx([PEAK * (i + 1) / warmup for i in range(warmup)])
    assert seen[warmup - 1] == PEAK


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_no_step_is_wasted_at_rate_zero_and_none_exceeds_the_peak(
    name: Name, ratio: float, total: int
) -> None:
    seen = rates(Schedule(name=name, warmup_ratio=ratio), total)
    assert len(seen) == total
    assert all(0 < rate <= PEAK for rate in seen)
    assert PEAK in seen


def test_cosine_falls_from_the_peak_through_half_to_zero_behind_the_last_step() -> None:
    shares = [factor(done, "cosine", warmup=10, total=110) for done in range(10, 111)]
    assert shares[0] == 1.0
    assert shares[50] == pytest.approx(0.5)
    assert shares[-1] == pytest.approx(0.0, abs=1e-15)
    assert all(later < earlier for earlier, later in pairwise(shares))
    expected = [(1 + math.cos(math.pi * share / 100)) / 2 for share in range(101)]
    assert shares == pytest.approx(expected)


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    assert rates(Schedule(name="constant", warmup_ratio=0.2), 10)[2:] == [PEAK] * 8


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(Schedule(warmup_ratio=0.0), 5)[0] == PEAK
