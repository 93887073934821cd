"""How likely the reference of a preference run finds the answers, computed once and kept.

The reference is the model that the run starts from, without dropout: the base, or the base with the
adapter that training goes on from. A fresh adapter adds nothing to the base, so both are the model
before its first step, and no second model is held in memory (docs/adr/0018).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deadpan.data.records import Record
from deadpan.errors import DeadpanError
from deadpan.models.attention import kernels
from deadpan.processing.collate import Batch
from deadpan.train import memory, state
from deadpan.train.loader import MicroBatches
from deadpan.train.model import TrainingLoss
from deadpan.train.run_folder import writing

if TYPE_CHECKING:
    from deadpan.train.loop import Trainer

FILE = "reference.json"
_LARGEST_BATCH = 16

Progress = Callable[[int, int], None]


class References:
    """Log-probabilities of (chosen, rejected) answers under the reference, in nats, by pair.

    Args:
        values: By the pair's digest.
    """

    def __init__(self, values: Mapping[str, tuple[float, float]]) -> None:
        self._values = dict(values)

    def __getitem__(self, pair: Record) -> tuple[float, float]:
        return self._values[state.digest([pair])]

    def has(self, pairs: Sequence[Record]) -> bool:
        """Whether all pairs are among them."""
        return all(state.digest([pair]) in self._values for pair in pairs)

    def save(self, run: Path) -> None:
        """Keep them in a run folder."""
        run.mkdir(parents=True, exist_ok=True)
        # JSON has a float's shortest text that reads back as the same float.
        text = json.dumps(self._values, indent=1)
        state.write_whole(run / FILE, text + "\n")

    @classmethod
    def load(cls, run: Path) -> "References":
        """Those that a run folder keeps; none if there is no file, or it is damaged."""
        try:
            values = json.loads((run / FILE).read_text(encoding="utf-8"))
            return cls({name: (float(a), float(b)) for name, (a, b) in values.items()})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls({})


def of_run(trainer: "Trainer", asked: bool) -> References:
    """The references of a run that is about to start or to go on.

    They are those that the folder of a run keeps that goes on. Else each process asks the model, which has
    not moved yet, about its share of the pairs, and they are kept.

    Args:
        trainer: The run, with its model as it starts.
        asked: Whether they matter; else they are zeros, and nothing is written.

    Raises:
        DeadpanError: If they are lost and cannot be asked for again.
    """
    pairs, processes = [*trainer.survey.records, *trainer.held_out], trainer.processes
    if not asked:
        return References({state.digest([pair]): (0.0, 0.0) for pair in pairs})
    if trainer.checkpoint is not None:
        kept = processes.lead(lambda: References.load(trainer.run))
        if kept.has(pairs):
            return kept
        if trainer.recipe.adapter is not None:
            # It may have been trained on since; the base has not.
            raise processes.shared(
                DeadpanError(
                    "The run's reference is gone: what the adapter it started from had found.",
                    where=trainer.run / FILE,
                    fix="put the file back, or start a new run with run=runs/NAME",
                )
            )
    size = trainer.recipe.micro_batch_size
    batch = 1 if size == "auto" else min(size, _LARGEST_BATCH)
    share = pairs[processes.rank :: processes.world]
    before = state.random_state()

    def ask() -> dict[str, tuple[float, float]]:
        tiles = trainer.processor.tile_policy.max_tiles
        with memory.explained(trainer.recipe, trainer.run, tiles):
            return compute(
                *(trainer.model, trainer.loss, trainer.prepare, share, batch),
                trainer.watcher.referring,
            )

    found = processes.together(ask)
    state.set_random_state(before)
    values: dict[str, tuple[float, float]] = {}
    for part in processes.gather(found):
        values |= part
    references = References(values)

    def keep() -> None:
        with writing(trainer.run):
            references.save(trainer.run)

    processes.lead(keep)
    return references


def compute(
    model: nn.Module,
    loss: TrainingLoss,
    prepare: MicroBatches,
    pairs: Sequence[Record],
    batch: int,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Ask a model for its log-probabilities, with dropout off; it is in training mode afterwards.

    It is asked by way of the decoder that trains it, so that both round alike.

    Args:
        model: The model as training starts from it.
        loss: Computes its micro-batches.
        prepare: Makes them.
        pairs: The pairs.
        batch: Pairs of a forward pass.
        progress: Called with the number of pairs done and their total.

    Returns:
        By each pair's digest, those of its chosen and of its rejected answer.
    """
    found = {}
    model.eval()
    try:
        with torch.no_grad():
            for part, rows in pairs_in_batches(prepare, pairs, batch, progress):
                both = loss.log_probabilities(rows).view(-1, 2)
                for pair, (chosen, rejected) in zip(part, both.tolist(), strict=True):
                    found[state.digest([pair])] = (chosen, rejected)
    finally:
        model.train()
    return found


def pairs_in_batches(
    prepare: MicroBatches, pairs: Sequence[Record], batch: int, progress: Progress
) -> Iterator[tuple[Sequence[Record], Batch]]:
    """Pairs and their tensors, on the CPU, so many pairs at a time."""
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        with kernels():
            yield part, prepare.of(part)
        progress(min(start + batch, len(pairs)), len(pairs))
