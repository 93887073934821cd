"""What is found out when the loss or its gradient is no longer a number.

The step is not taken, so the weights are still those that spoilt it: each of its records goes through
them by itself, which tells a record that cannot be learned from weights that have run away.
"""

import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from deadpan.data.records import Record
from deadpan.errors import DeadpanError
from deadpan.models.attention import kernels
from deadpan.processing.collate import collate
from deadpan.processing.processor import Processor
from deadpan.train import state
from deadpan.train.objective import Objective

REPORT = "nonfinite.json"


@dataclass(frozen=True)
class Reading:
    """A record by itself.

    Attributes:
        record: The record.
        loss: The mean over its supervised tokens, or a pair's.
        grad_norm: The norm of that loss's gradient.
    """

    record: Record
    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class NotFinite(DeadpanError):
    """A step whose loss or gradient is not finite.

    Args:
        step: Which one.
        loss: Its loss.
        grad_norm: Its gradient's norm.
        readings: Its records one by one.
    """

    def __init__(
        self, step: int, loss: float, grad_norm: float, readings: Sequence[Reading]
    ) -> None:
        guilty = [reading for reading in readings if not reading.is_finite]
        if not guilty:
            why = "each of these records is finite by itself"
        elif len(guilty) == len(readings) > 1:
            why = "none of the step's records is finite by itself: the weights have run away"
        else:
            why = f"of the step's {len(readings)} records these alone are not finite by themselves"
        super().__init__(
            f"The loss or its gradient is no longer finite at step {step}.",
            where="; ".join(reading.record.name for reading in guilty or readings),
            found=f"loss {loss}, gradient norm {grad_norm}; {why}",
            fix="look at these records; a new run may leave them out, have a lower optimizer.lr, "
            "or precision=fp32",
        )
        self.report = {
            "step": step,
            "loss": _number(loss),
            "grad_norm": _number(grad_norm),
            "records": [
                {
                    "record": reading.record.name,
                    "id": reading.record.id,
                    "images": list(reading.record.images),
                    "turns": [[turn.role, turn.text] for turn in reading.record.turns],
                    "loss": _number(reading.loss),
                    "grad_norm": _number(reading.grad_norm),
                    "finite": reading.is_finite,
                }
                for reading in readings
            ],
        }


def _number(value: float) -> float | str:
    # JSON has no word for nan and inf.
    return value if math.isfinite(value) else str(value)


def one_by_one(
    model: PeftModel,
    objective: Objective,
    processor: Processor,
    records: Sequence[Record],
    gradient_norm: Callable[[torch.Tensor], float],
) -> list[Reading]:
    """Loss and gradient of each record by itself.

    Args:
        model: The model, in training mode: its dropout is on, as in the step.
        objective: What it is trained for.
        processor: Makes its inputs.
        records: The step's records.
        gradient_norm: Takes a loss back to the weights.
    """
    model.zero_grad(set_to_none=True)
    readings = []
    for record in records:
        batch = collate(processor.samples(record), processor.pad_id)
        with kernels():
            mean = objective.loss(batch) / objective.weight(batch)
            readings.append(Reading(record, mean.item(), gradient_norm(mean)))
    return readings


def kept(
    steps: Generator[dict[str, Any], None, None], run: Path
) -> Generator[dict[str, Any], None, None]:
    """The steps of a run; if one is not finite, its records are left in the run folder to look at."""
    try:
        yield from steps
    except NotFinite as error:
        report = json.dumps(error.report, ensure_ascii=False, indent=2)
        try:
            state.write_whole(run / REPORT, report + "\n")
        except OSError:
            # A full disk is not what the run ends by.
            raise error from None
        saved = state.checkpoints(run)
        error.fix = (
            f"{error.fix}; {run / REPORT} has their texts, and the loss of every record of the step"
            + (f"; {saved[-1].name} is intact" if saved else "")
        )
        raise
