"""Prepare micro-batches off the training process's path."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from deadpan.data.records import IMAGE_TAG, Record, Turn
from deadpan.environment import usable_cores
from deadpan.errors import DeadpanError
from deadpan.processing.collate import Batch, collate
from deadpan.processing.prefix import join
from deadpan.processing.processor import Processor, Sample
from deadpan.train.features import FeatureCache
from deadpan.train.plan import MicroBatch, Plan

_MOST_WORKERS = 8

Prepared = Iterator[tuple[MicroBatch, Batch | DeadpanError]]


class MicroBatches(Dataset[tuple[MicroBatch, Batch | DeadpanError]]):
    """Makes the tensors of a micro-batch; its index is the micro-batch itself.

    An error is returned rather than raised: PyTorch would carry it out of a worker as a traceback.

    Args:
        records: What the micro-batches' indices mean.
        processor: Makes the tensors.
        packing: Lay a micro-batch's samples end to end.
        cache: Where the pictures' features are kept, if they are.
        pictured: Add a blank picture, of which nothing is learned, where there is none. Processes that
            share weights go through the vision tower together or not at all.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Processor,
        packing: bool,
        cache: FeatureCache | None = None,
        pictured: bool = False,
    ) -> None:
        self._records, self._processor, self._packing = records, processor, packing
        self._cache = cache
        self._blank = _blank_sample(processor) if pictured else None

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[MicroBatch, Batch | DeadpanError]:
        try:
            return micro_batch, self.batch(micro_batch)
        except DeadpanError as error:
            return micro_batch, error

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """The tensors of a micro-batch.

        Raises:
            DeadpanError: If a picture has become unreadable since the survey.
        """
        return self._batch([[self._records[i] for i in group] for group in micro_batch.groups])

    def of(self, records: Sequence[Record]) -> Batch:
        """The tensors of any records; a preference pair's two conversations are neighbours.

        Raises:
            DeadpanError: If a picture has become unreadable since the survey.
        """
        return self._batch([[record] for record in records])

    def _batch(self, groups: Sequence[Sequence[Record]]) -> Batch:
        names = [side.name for group in groups for record in group for side in record.sides]
        return replace(self._tensors(groups), names=names)

    def _tensors(self, groups: Sequence[Sequence[Record]]) -> Batch:
        if self._blank is not None:
            return self._pictured(self._live(groups), self._blank)
        if self._cache is None:
            return self._collated(self._live(groups))
        laid = [together for group in groups for together in _laid(group)]
        # Records that lie together have the pictures of their first.
        firsts = [records[0] for records in laid]
        files = [self._cache.paths(record) for record in firsts]
        known = [self._cache.read(paths) for paths in files]
        if any(features is None for features in known):
            batch = self._collated(self._live(groups))
            return replace(batch, feature_files=self._files(firsts, files))
        samples = [
            self._texts(records, [len(picture) for picture in features or ()])
            for records, features in zip(laid, known, strict=True)
        ]
        pictures = [picture for features in known for picture in features or ()]
        batch = self._collated(samples)
        features = torch.cat(pictures) if pictures else None
        return replace(batch, features=features, pictured=bool(pictures))

    def _live(self, groups: Sequence[Sequence[Record]]) -> list[Sample]:
        """The samples, with the pictures of each group decoded once."""
        samples = []
        for first, *others in groups:
            if others:
                counts = self._processor.tile_counts(first)
                texts = (self._processor.text(record, counts) for record in others)
                samples.append(join([self._processor.record(first), *texts]))
            else:
                samples += self._processor.samples(first)
        return samples

    def _texts(self, records: Sequence[Record], counts: Sequence[int]) -> Sample:
        return join([self._processor.text(record, counts) for record in records])

    def _collated(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self._processor.pad_id, self._packing)

    def _pictured(self, samples: list[Sample], blank: Sample) -> Batch:
        if any(sample.pixel_values is not None for sample in samples):
            return self._collated(samples)
        batch = self._collated([*samples, blank])
        return replace(batch, tokens=batch.tokens - len(blank.input_ids), pictured=False)

    def _files(
        self, records: Sequence[Record], files: Sequence[list[Path]]
    ) -> list[tuple[Path, int]]:
        """Where the features of a batch's pictures go, and how many tiles each has."""
        return [
            place
            for record, paths in zip(records, files, strict=True)
            for place in zip(paths, self._processor.tile_counts(record), strict=True)
        ]


def _laid(group: Sequence[Record]) -> list[Sequence[Record]]:
    """Which conversations of a group lie behind one prefix: all, or of a preference pair each by itself."""
    return [group] if len(group) > 1 else [[side] for side in group[0].sides]


def blank(processor: Processor) -> Batch:
    """A micro-batch of which nothing is learned, for a process that has none when others do."""
    batch = collate([_blank_sample(processor)], processor.pad_id)
    return replace(batch, names=[], tokens=0, pictured=False)


def _blank_sample(processor: Processor) -> Sample:
    edge = processor.tile_policy.tile_size
    return processor.sample([Image.new("RGB", (edge, edge))], [Turn("human", IMAGE_TAG)], "blank")


class _Order(Sampler[MicroBatch]):
    def __init__(self, plan: Plan, done: int, rank: int, world: int) -> None:
        self._plan, self._done, self._rank, self._world = plan, done, rank, world

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self._plan.steps_after(self._done):
            yield from share(step, self._rank, self._world)


def share(step: list[MicroBatch], rank: int, world: int) -> list[MicroBatch]:
    """What one of several processes has to do of a step; in a short one, perhaps nothing."""
    return step[rank::world]


def worker_count(workers: int | Literal["auto"], device: torch.device, processes: int = 1) -> int:
    """The workers of one of several training processes on this host.

    `auto` leaves a core for each training process, and on a CPU, which is busy training, uses none.
    """
    if workers != "auto":
        return workers
    if device.type == "cpu":
        return 0
    return max(1, min(_MOST_WORKERS, usable_cores() // processes - 1))


def batches(
    records: Sequence[Record],
    processor: Processor,
    plan: Plan,
    done: int,
    packing: bool,
    workers: int,
    rank: int = 0,
    world: int = 1,
    cache: FeatureCache | None = None,
    pin_memory: bool = False,
    pictured: bool = False,
) -> DataLoader:
    """A loader of (MicroBatch, Batch or DeadpanError) for a process's share of all steps after the finished ones."""
    return DataLoader(
        MicroBatches(records, processor, packing, cache, pictured),
        batch_size=None,
        sampler=_Order(plan, done, rank, world),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        # Batches are decided by the plan alone; without this, each loader would draw from the run's random numbers.
        generator=torch.Generator(),
    )


@contextmanager
def prepared(loader: DataLoader) -> Iterator[Prepared]:
    """A loader's micro-batches. Afterwards its workers have ended, also where an error still holds them.

    They ignore the signal by which Python ends its children when it exits, and would be waited for.
    """
    ready = iter(loader)
    try:
        yield ready
    finally:
        if isinstance(ready, _MultiProcessingDataLoaderIter):
            ready._shutdown_workers()


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A signal to the whole process group asks the training process to save and stop; it needs its
    # workers until then, and ends them itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
