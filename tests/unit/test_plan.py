from collections import Counter
from itertools import groupby

import pytest
import torch

from deadpan.processing.prefix import Groups
from deadpan.train.plan import MicroBatch, Plan

SHAPES = [(1, 1, 1), (4, 2, 1), (7, 2, 2), (5, 2, 2), (8, 2, 2), (3, 8, 2)]
"""(records, micro_batch_size, accumulation): dividing evenly, unevenly, and larger than the epoch."""


def by_step(plan: Plan) -> list[list[MicroBatch]]:
    return [list(group) for _, group in groupby(plan.micro_batches(), lambda batch: batch.step)]


@pytest.mark.parametrize(("records", "size", "accumulation"), SHAPES)
def test_every_record_is_met_once_an_epoch(records: int, size: int, accumulation: int) -> None:
    plan = Plan(records, 3, size, accumulation, seed=5)
    met = Counter((batch.epoch, index) for batch in plan.micro_batches() for index in batch.indices)
    assert met == {(epoch, index): 1 for epoch in range(3) for index in range(records)}


@pytest.mark.parametrize(("records", "size", "accumulation"), SHAPES)
def test_steps_are_counted_from_one_and_each_has_one_last_micro_batch(
    records: int, size: int, accumulation: int
) -> None:
    plan = Plan(records, 3, size, accumulation, seed=5)
    steps = by_step(plan)
    assert [step[0].step for step in steps] == list(range(1, plan.steps + 1))
    for step in steps:
        assert len({batch.epoch for batch in step}) == 1


@pytest.mark.parametrize(
    ("records", "sizes"),
    [
        (8, [[2, 2], [2, 2]]),
        (7, [[2, 2], [2, 1]]),
        (6, [[2, 2], [2]]),
        (5, [[2, 2], [1]]),
        (1, [[1]]),
    ],
)
def test_only_the_last_step_of_an_epoch_is_short(records: int, sizes: list[list[int]]) -> None:
    plan = Plan(records, 2, micro_batch_size=2, accumulation=2, seed=0)
    assert [[len(batch.indices) for batch in step] for step in by_step(plan)] == sizes * 2
    assert (plan.steps_per_epoch, plan.steps) == (len(sizes), 2 * len(sizes))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    orders = {
        (seed, epoch): Plan(50, 9, 2, 2, seed).order(epoch) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for (seed, epoch), order in orders.items():
        assert Plan(50, 3, 7, 1, seed, max_steps=2).order(epoch) == order
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_is_the_same_however_an_epoch_is_cut_into_steps() -> None:
    def flat(size: int, accumulation: int) -> list[tuple[int, int]]:
        batches = Plan(11, 3, size, accumulation, seed=2).micro_batches()
        return [(batch.epoch, index) for batch in batches for index in batch.indices]

    assert flat(1, 1) == flat(4, 1) == flat(2, 3) == flat(16, 1)


@pytest.mark.parametrize(("max_steps", "steps"), [(1, 1), (3, 3), (6, 6), (7, 6), (None, 6)])
def test_max_steps_cuts_the_run_and_changes_nothing_before(
    max_steps: int | None, steps: int
) -> None:
    whole = by_step(Plan(7, 3, 2, 2, seed=1))
    plan = Plan(7, 3, 2, 2, seed=1, max_steps=max_steps)
    assert plan.steps == steps
    assert by_step(plan) == whole[:steps]


@pytest.mark.parametrize(("records", "size", "accumulation"), SHAPES)
def test_a_resumed_plan_is_the_tail_of_the_whole(
    records: int, size: int, accumulation: int
) -> None:
    plan = Plan(records, 3, size, accumulation, seed=9)
    steps = by_step(plan)
    for done in range(plan.steps + 1):
        tail = [batch for step in steps[done:] for batch in step]
        assert list(plan.micro_batches(done)) == tail


GROUPS = ((0, 4, 7), (1,), (2, 3), (5, 6, 8, 9, 10))


@pytest.mark.parametrize(("size", "accumulation"), [(1, 1), (4, 1), (2, 3), (16, 1)])
def test_groups_follow_one_another_and_are_cut_where_steps_are(
    size: int, accumulation: int
) -> None:
    def plan(groups: Groups | None) -> Plan:
        return Plan(11, 3, size, accumulation, seed=2, groups=groups)

    grouped, plain = by_step(plan(GROUPS)), by_step(plan(None))
    lengths = [[[len(batch.indices) for batch in step] for step in run] for run in (grouped, plain)]
    assert lengths[0] == lengths[1]
    of = {index: number for number, group in enumerate(GROUPS) for index in group}
    for epoch in range(3):
        order = plan(GROUPS).order(epoch)
        assert sorted(order) == list(range(11))
        assert len([number for number, _ in groupby(order, key=of.__getitem__)]) == len(GROUPS)
        batches = [batch for step in grouped for batch in step if batch.epoch == epoch]
        assert [index for batch in batches for index in batch.indices] == order
        for batch in batches:
            numbers = [{of[index] for index in group} for group in batch.groups]
            assert all(len(number) == 1 for number in numbers)
            assert len(set.union(*numbers)) == len(numbers)
    # Within a group the order changes too.
    assert len({tuple(i for i in plan(GROUPS).order(e) if of[i] == 3) for e in range(3)}) > 1
