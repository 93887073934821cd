"""How the learning rate moves: a linear warm-up, then a cosine down to zero, or level."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from deadpan.config.schema import Schedule


def factor(done: int, name: str, warmup: int, total: int) -> float:
    """The share of the peak rate in the step after `done` steps.

    The first step already moves: with w warm-up steps the shares are 1/w, 2/w, ..., 1.
    """
    if done < warmup:
        return (done + 1) / warmup
    if name == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total - warmup)))


def schedule(optimizer: Optimizer, settings: Schedule, total: int) -> LambdaLR:
    """The scheduler of a run of `total` optimizer steps."""
    warmup = math.ceil(settings.warmup_ratio * total)
    return LambdaLR(optimizer, lambda done: factor(done, settings.name, warmup, total))
