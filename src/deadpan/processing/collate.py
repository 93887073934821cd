"""From samples to one micro-batch: padded rows, or one packed row.

Padding goes to the right for training. No attention mask is needed then: attention is causal, so no real token ever
sees the padding behind it, and padding has no labels. That keeps PyTorch's fast causal kernels in play.

Packing lays samples end to end in one row whose position ids start again at 0 with every sample; transformers derives
the mask that keeps samples apart from those restarts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Sample


@dataclass
class Batch:
    """A micro-batch.

    Attributes:
        input_ids: int64 of shape (row, token).
        labels: int64 of shape (row, token).
        position_ids: int64 of shape (row, token).
        pixel_values: float32 of shape (tile, 3, tile_size, tile_size), or None.
        names: The records in it.
        tokens: Tokens that are not padding.
        supervised: Tokens with a label, as far as one precedes them.
        pictured: Whether a record has a picture.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    names: list[str]
    tokens: int
    supervised: int
    pictured: bool

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        pixels = self.pixel_values
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            None if pixels is None else pixels.to(device, non_blocking=True),
            self.names,
            self.tokens,
            self.supervised,
            self.pictured,
        )


def collate(samples: Sequence[Sample], pad_id: int, packing: bool = False) -> Batch:
    """Make a micro-batch of samples.

    Args:
        samples: At least one.
        pad_id: The token that fills rows up.
        packing: Lay the samples end to end in one row rather than padding each to the longest.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    rows = 1 if packing else len(samples)
    width = sum(lengths) if packing else max(lengths)
    input_ids = torch.full((rows, width), pad_id)  # (row, token)
    labels = torch.full((rows, width), IGNORE_INDEX)
    position_ids = torch.zeros((rows, width), dtype=torch.long)
    start = 0
    for index, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        row, begin = (0, start) if packing else (index, 0)
        end = begin + length if packing else width
        input_ids[row, begin : begin + length] = torch.tensor(sample.input_ids)
        # The first token of a sample has no predecessor within it, so nothing may predict it.
        labels[row, begin + 1 : begin + length] = torch.tensor(sample.labels[1:])
        position_ids[row, begin:end] = torch.arange(end - begin)
        start += length
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        pixel_values=torch.cat(pixels) if pixels else None,
        names=[sample.name for sample in samples],
        tokens=sum(lengths),
        supervised=int((labels != IGNORE_INDEX).sum()),
        pictured=bool(pixels),
    )
