"""What batches are filled up to, so that one recording serves many of them.

    tokens        real ones, then padding, at least one
    samples       real ones, then of padding: samples of one token, and one of what is left
    supervised    real ones, then some without a target, predicted by the last token
    image tokens  as many as tokens; those that are not there read zeros, and go to the last token

Samples see themselves alone, and what has no target is left out of the loss. So no gradient reaches the
padding, and it adds zeros to those of the weights: loss and gradients are the same but for rounding.
Dropout is too: it goes by an element's place in the row, and real tokens come first.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from deadpan.models.fused_loss import Tokens
from deadpan.processing.encoding import IGNORE_INDEX

_STEP = 256
"""Tokens are filled up to multiples of it: 5% of padding, and few shapes, where 2,500 tokens are usual."""

_FEWEST_SUPERVISED = 64


class Shape(NamedTuple):
    """What batches are filled up to.

    Attributes:
        tokens: Tokens in all.
        samples: Samples in all.
        longest: The length that no sample exceeds.
        supervised: Supervised tokens in all.
        pictured: Whether there are pictures.
    """

    tokens: int
    samples: int
    longest: int
    supervised: int
    pictured: bool

    @classmethod
    def of(cls, tokens: Tokens, pictured: bool) -> "Shape":
        """The smallest that a batch fits into."""
        real = len(tokens.segments.starts) - 1
        samples = _power_of_two(real + 1)
        count = -(-(len(tokens.ids) + samples - real) // _STEP) * _STEP
        supervised = _power_of_two(max(len(tokens.targets), _FEWEST_SUPERVISED))
        return cls(
            tokens=count,
            samples=samples,
            longest=_power_of_two(max(tokens.segments.longest, _STEP)),
            supervised=min(supervised, count),
            pictured=pictured,
        )

    def filled(self, tokens: Tokens) -> list[torch.Tensor]:
        """Ids, positions, image tokens, wanted tokens, targets, and where samples begin: int64, on the CPU."""
        count, real = len(tokens.ids), len(tokens.segments.starts) - 1
        single = torch.arange(count + 1, count + self.samples - real)
        starts = [tokens.segments.starts, single, torch.tensor([self.tokens])]
        last = self.tokens - 1
        return [
            _padded(tokens.ids, self.tokens, 0),
            _padded(tokens.positions, self.tokens, 0),
            _padded(tokens.image_tokens, self.tokens, last),
            _padded(tokens.wanted, self.supervised, last),
            _padded(tokens.targets, self.supervised, IGNORE_INDEX),
            torch.cat(starts),
        ]


def _power_of_two(count: int) -> int:
    """The smallest that is not less."""
    return 1 << (count - 1).bit_length()


def _padded(values: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return functional.pad(values, (0, length - len(values)), value=value)
