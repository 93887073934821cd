"""From samples to one micro-batch: padded rows, or one packed row.

Padding goes to the right for training. No attention mask is needed then: attention is causal, so no real token ever
sees the padding behind it, and padding has no labels. That keeps PyTorch's fast causal kernels in play.

Packing lays samples end to end in one row whose position ids start again at 0 with every sample; transformers derives
the mask that keeps samples apart from those restarts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
        features: What the vision tower gives for the pictures, of shape (tile, image token, channel), where
            it is known; there are no `pixel_values` then.
        feature_files: Where else they are to be kept: for each picture a file, and its number of tiles.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    names: list[str]
    tokens: int
    supervised: int
    pictured: bool
    features: torch.Tensor | None = None
    feature_files: Sequence[tuple[Path, int]] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch where a GPU can fetch it by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        pixels, features = self.pixel_values, self.features
        return replace(
            self,
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            position_ids=function(self.position_ids),
            pixel_values=None if pixels is None else function(pixels),
            features=None if features is None else function(features),
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
        if sample.position_ids is not None:
            positions = torch.tensor(sample.position_ids)
            position_ids[row, begin : begin + length] = positions
            # Padding goes on where the last answer ends, or it would count as a further answer.
            position_ids[row, begin + length : end] -= length - 1 - positions[-1]
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
