"""How likely a model finds the answers that people gave."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deadpan.data.records import Record
from deadpan.models.answer_loss import AnswerLoss, plain_model
from deadpan.models.attention import kernels
from deadpan.processing.collate import collate
from deadpan.processing.processor import Processor


@torch.inference_mode()
def answer_loss(
    model: Any,
    processor: Processor,
    records: Sequence[Record],
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """The cross-entropy of the records' answers, as training computes it.

    Args:
        model: InternVL, plain or wrapped by PEFT.
        processor: Makes its inputs.
        records: What to score.
        batch: Records of a forward pass.
        progress: Called with the number of records scored and their total.

    Returns:
        The mean of -log p over supervised tokens, in nats, and their number.
    """
    loss_of = AnswerLoss(model).eval()
    device = plain_model(model).lm_head.weight.device
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(records), batch):
        samples = [processor.record(record) for record in records[start : start + batch]]
        rows = collate(samples, processor.pad_id).to(device)
        pixels = rows.pixel_values
        if pixels is not None:
            pixels = pixels.to(plain_model(model).dtype)
        with kernels():
            loss = loss_of(rows.input_ids, rows.labels, rows.position_ids, pixels)
        total += loss.double().cpu()
        tokens += rows.supervised
        if progress is not None:
            progress(min(start + batch, len(records)), len(records))
    return (total / tokens).item(), tokens
