"""What a run makes smaller: the loss of answers, or of preferences between them.

The loop knows batches, a sum of losses, and what to divide it by; here is what these are.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from deadpan.config import schema
from deadpan.data.records import Record
from deadpan.evaluate.likelihood import answer_loss
from deadpan.models.preference_loss import PairLosses, dpo_losses
from deadpan.processing.collate import Batch
from deadpan.processing.processor import Processor
from deadpan.train.loader import MicroBatches
from deadpan.train.model import TrainingLoss
from deadpan.train.references import References, pairs_in_batches

Progress = Callable[[int, int], None]

_FIGURES = ("reward_margin", "reward_accuracy", "preferred", "logps_chosen", "logps_rejected")


class Objective(Protocol):
    """What is trained for."""

    def weight(self, batch: Batch) -> int:
        """What a batch counts for in the mean over a step."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """The sum of a batch's losses, float32 scalar; the batch is on the CPU."""

    def figures(self) -> list[float]:
        """What the batches since the last call come to besides losses, to be summed over processes."""

    def metrics(self, figures: Sequence[Sequence[float]]) -> dict[str, float]:
        """For the log: what the figures of all processes mean."""

    def measure(
        self, records: Sequence[Record], batch: int, progress: Progress
    ) -> tuple[float, dict[str, float]]:
        """The mean loss of records, without training on them, and metrics beside it."""


class Answers:
    """Maximum likelihood: the cross-entropy of the answers' tokens.

    Args:
        model: What is trained.
        processor: Makes its inputs.
        loss: The summed loss of a micro-batch.
    """

    def __init__(
        self, model: nn.Module, processor: Processor, loss: Callable[[Batch], torch.Tensor]
    ) -> None:
        self._model, self._processor, self._loss = model, processor, loss

    def weight(self, batch: Batch) -> int:
        return batch.supervised

    def loss(self, batch: Batch) -> torch.Tensor:
        return self._loss(batch)

    def figures(self) -> list[float]:
        return []

    def metrics(self, figures: Sequence[Sequence[float]]) -> dict[str, float]:
        return {}

    def measure(
        self, records: Sequence[Record], batch: int, progress: Progress
    ) -> tuple[float, dict[str, float]]:
        return answer_loss(self._model, self._processor, records, batch, progress)[0], {}


class Preferences:
    """DPO on pairs of answers; see `deadpan.models.preference_loss`.

    The two answers of a pair go through the model in one forward pass, as neighbours.

    Args:
        loss: Computes micro-batches of both.
        prepare: Makes them.
        settings: The recipe's section.
        training: The pairs trained on, each with a name of its own.
        references: Of these, and of whatever is measured.
    """

    def __init__(
        self,
        loss: TrainingLoss,
        prepare: MicroBatches,
        settings: schema.Dpo,
        training: Sequence[Record],
        references: References,
    ) -> None:
        self._loss, self._prepare, self._settings = loss, prepare, settings
        self._references = references
        self._by_name = {record.name: record for record in training}
        self._sums: torch.Tensor | None = None

    def weight(self, batch: Batch) -> int:
        return len(batch.names) // 2

    def loss(self, batch: Batch) -> torch.Tensor:
        found = self._losses(batch, [self._by_name[name] for name in batch.names[::2]])
        sums = _sums(found)
        self._sums = sums if self._sums is None else self._sums + sums
        return found.losses.sum()

    def _losses(self, batch: Batch, pairs: Sequence[Record]) -> PairLosses:
        now = self._loss.log_probabilities(batch).view(-1, 2)
        reference = now.new_tensor([self._references[pair] for pair in pairs])
        settings = self._settings
        return dpo_losses(now, reference, settings.beta, settings.label_smoothing)

    def figures(self) -> list[float]:
        sums, self._sums = self._sums, None
        return [0.0] * (len(_FIGURES) + 1) if sums is None else sums.tolist()

    def metrics(self, figures: Sequence[Sequence[float]]) -> dict[str, float]:
        *sums, pairs = [sum(values) for values in zip(*figures, strict=True)]
        return {name: value / pairs for name, value in zip(_FIGURES, sums, strict=True)}

    @torch.no_grad()
    def measure(
        self, records: Sequence[Record], batch: int, progress: Progress
    ) -> tuple[float, dict[str, float]]:
        losses, figures = 0.0, []
        for pairs, rows in pairs_in_batches(self._prepare, records, batch, progress):
            found = self._losses(rows, pairs)
            losses += found.losses.sum().item()
            figures.append(_sums(found).tolist())
        return losses / len(records), self.metrics(figures)


def _sums(found: PairLosses) -> torch.Tensor:
    """`_FIGURES` summed over pairs, then the number of these: float64 of shape (6,)."""
    chosen, rejected, margins = found.chosen, found.rejected, found.margins
    rows = (margins, margins > 0, chosen > rejected, chosen, rejected, torch.ones_like(margins))
    return torch.stack([row.double().sum() for row in rows])
