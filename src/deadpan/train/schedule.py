"""How the learning rate moves: a linear warm-up, then a cosine down to zero, or level."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from deadpan.config.schema import LEARNING_RATE_FREE, Schedule

_WARMUP = 0.03


def factor(done: int, name: str, warmup: int, total: int) -> float:
    """The share of the peak rate in the step after `done` steps.

    The first step already moves: with w warm-up steps the shares are 1/w, 2/w, ..., 1.
    """
    if done < warmup:
        return (done + 1) / warmup
    if name == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total - warmup)))


def resolve(settings: Schedule, algorithm: str) -> tuple[str, float]:
    """A schedule's name and its share of warm-up, each `auto` resolved for an optimizer's name."""
    name, ratio = settings.name, settings.warmup_ratio
    if name == "auto":
        name = "cosine" if algorithm == "adamw" else "constant"
    if ratio == "auto":
        ratio = 0.0 if algorithm in LEARNING_RATE_FREE else _WARMUP
    return name, ratio


def schedule(
    optimizer: Optimizer, settings: Schedule, total: int, algorithm: str = "adamw"
) -> LambdaLR:
    """The scheduler of a run of `total` optimizer steps."""
    name, ratio = resolve(settings, algorithm)
    warmup = math.ceil(ratio * total)
    return LambdaLR(optimizer, lambda done: factor(done, name, warmup, total))
