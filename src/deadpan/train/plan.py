"""Which records meet in which step.

The whole run is decided beforehand by the seed: every epoch is a permutation of the records, cut into
optimizer steps of micro_batch_size x gradient_accumulation_steps x processes samples, and each step
into micro-batches, which the processes take in turn. Only the last step of an epoch may be smaller;
since the loss is a mean over the step's supervised tokens, it needs no special care. A plan is a pure
function of its arguments, so a resumed run only has to know how many steps are done.

Records that share a prefix follow one another in an epoch's order, and meet behind one copy of it as far as
they fall in one micro-batch. The cuts stay where they are, so a step has as many samples as without; a
group that a cut goes through has its prefix twice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby

import torch

from deadpan.processing.prefix import Groups


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass.

    Attributes:
        step: The optimizer step it belongs to, counted from 1.
        epoch: The epoch, counted from 0.
        groups: Which records; those of a group share a prefix.
    """

    step: int
    epoch: int
    groups: Groups

    @property
    def indices(self) -> tuple[int, ...]:
        """Which records, group by group."""
        return tuple(chain(*self.groups))


@dataclass(frozen=True)
class Plan:
    """All micro-batches of a run.

    Attributes:
        records: The number of training records.
        epochs: Passes over them.
        micro_batch_size: Samples of a forward pass.
        accumulation: Forward passes of a step, of all processes together.
        seed: Decides the order.
        max_steps: Where to stop early, or None.
        groups: Records that share a prefix, each record in one group; None if none are to share.
    """

    records: int
    epochs: int
    micro_batch_size: int
    accumulation: int
    seed: int
    max_steps: int | None = None
    groups: Groups | None = None

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.records / self.samples_per_step)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.steps_per_epoch * self.epochs
        return total if self.max_steps is None else min(total, self.max_steps)

    def divided(self, micro_batch_size: int) -> "Plan":
        """The same steps of the same samples, cut into micro-batches of another size that divides them."""
        accumulation = self.samples_per_step // micro_batch_size
        assert accumulation * micro_batch_size == self.samples_per_step
        return replace(self, micro_batch_size=micro_batch_size, accumulation=accumulation)

    def order(self, epoch: int) -> list[int]:
        """The records in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

        def shuffled(count: int) -> list[int]:
            return torch.randperm(count, generator=generator).tolist()

        if self.groups is None:
            return shuffled(self.records)
        groups = [self.groups[i] for i in shuffled(len(self.groups))]
        # Within a group too, so that a cut does not always go through it at the same place.
        return [group[i] for group in groups for i in shuffled(len(group))]

    @cached_property
    def _group_of(self) -> list[int]:
        """For each record its group."""
        of = {index: number for number, group in enumerate(self.groups or ()) for index in group}
        return [of.get(index, index) for index in range(self.records)]

    def micro_batches(self, done: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches after a number of finished steps."""
        return chain.from_iterable(self.steps_after(done))

    def steps_after(self, done: int) -> Iterator[list[MicroBatch]]:
        """The same, step by step."""
        order: list[int] = []
        for step in range(done, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if not order or place == 0:
                order = self.order(epoch)
            start = place * self.samples_per_step
            samples = order[start : start + self.samples_per_step]
            size = self.micro_batch_size
            yield [
                MicroBatch(step + 1, epoch, self._grouped(samples[i : i + size]))
                for i in range(0, len(samples), size)
            ]

    def _grouped(self, samples: list[int]) -> Groups:
        runs = groupby(samples, key=self._group_of.__getitem__)
        return tuple(tuple(group) for _, group in runs)
