"""The optimizers: one that is given its learning rate, two that find it, and one that needs no schedule.

`adamw` is PyTorch's (Loshchilov and Hutter 2019, arXiv 1711.05101). `dadapt_adam` (Defazio and Mishchenko
2023, arXiv 2301.07733) and `prodigy` (Mishchenko and Defazio 2023, arXiv 2306.06101) estimate the distance
d from the first weights to the solution, and step by d times `lr`. `schedulefree_adamw` (Defazio et al.
2024, arXiv 2405.15682) has two sets of weights: gradients are taken at one, and the other, an average of
where the steps led, is what the model is in the end.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from deadpan.config import schema

_RATES = {"adamw": 1e-5, "dadapt_adam": 1.0, "prodigy": 1.0, "schedulefree_adamw": 5e-5}
"""What `lr: auto` is. Schedule-free wants 1 to 10 times the rate of a schedule, by its authors' experience."""


def learning_rate(settings: schema.Optimizer) -> float:
    """The peak learning rate, `auto` resolved."""
    return _RATES[settings.name] if settings.lr == "auto" else settings.lr


def build(
    parameters: Sequence[nn.Parameter], settings: schema.Optimizer, warms_up: bool
) -> Optimizer:
    """The optimizer of a recipe.

    Args:
        parameters: What is trained, all on one device.
        settings: The recipe's section.
        warms_up: Whether the schedule begins with small rates.
    """
    common: dict[str, Any] = {
        "lr": learning_rate(settings),
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(
            parameters, **common, fused=all(p.device.type == "cuda" for p in parameters)
        )
    if settings.name == "schedulefree_adamw":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(parameters, **common)
        optimizer.train()
        return optimizer
    for key in ("d0", "d_coef", "growth_rate"):
        if (value := getattr(settings, key)) is not None:
            common[key] = value
    # Both libraries print that weight decay is decoupled, to stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        if settings.name == "dadapt_adam":
            from dadaptation import DAdaptAdam

            return DAdaptAdam(parameters, **common, decouple=True)
        from prodigyopt import Prodigy

        # Without the safeguard, the small rates of a warm-up would blow the estimate up.
        return Prodigy(parameters, **common, decouple=True, safeguard_warmup=warms_up)


def estimates(optimizer: Optimizer) -> dict[str, float]:
    """What a learning-rate-free optimizer has found: `d`, and the rate of its next step, d times `lr`."""
    group = optimizer.param_groups[0]
    if "d" not in group:
        return {}
    return {"d": float(group["d"]), "effective_lr": float(group["d"]) * group["lr"]}


def _averages(optimizer: Optimizer) -> bool:
    return "train_mode" in optimizer.param_groups[0]


@contextlib.contextmanager
def weights_to_use(optimizer: Optimizer) -> Iterator[None]:
    """Within it, the model has the weights that it is to be saved, measured and heard with.

    Only schedule-free training has others while it steps. Going there and back by arithmetic would
    round twice, and a run that was saved on the way would no longer be the run that was not; so the
    training weights are put aside and put back.
    """
    if not _averages(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    aside = [p.detach().clone() for p in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, kept in zip(parameters, aside, strict=True):
                parameter.copy_(kept)


def training_weights(optimizer: Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that training goes on from, where the saved adapter does not hold them; else nothing."""
    if not _averages(optimizer):
        return {}
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def put_training_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model the weights that `training_weights` kept."""
    with torch.no_grad():
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)
