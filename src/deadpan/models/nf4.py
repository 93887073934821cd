"""NF4: the language model's linear layers in 4 bits, through bitsandbytes, on CPU and GPU.

Weights are stored as 4-bit NormalFloat in blocks of 64 with doubly quantised scales, and multiplied
in the compute type (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). The vision tower, the projector,
the embeddings and the head stay as they are: they are small, and the projector is trained.

bitsandbytes is imported where a layer is made: it brings PyTorch's compiler along, which takes more than a second.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from deadpan.errors import DeadpanError

if TYPE_CHECKING:
    from bitsandbytes.nn import Params4bit

_BLOCK = 64
"""Weights that share a scale; bitsandbytes' CPU kernel wants whole blocks in a row."""


def prepare(language_model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of a language model on the meta device by NF4 ones, still empty.

    Raises:
        DeadpanError: If a layer is too narrow.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in list(language_model.named_modules()):
        if type(module) is nn.Linear:
            if module.in_features % _BLOCK:
                raise DeadpanError(
                    f"The layer {name!r} cannot be held in NF4.",
                    expected=f"an input width that is a multiple of {_BLOCK}",
                    found=str(module.in_features),
                    fix="use quantization none",
                )
            with torch.device("meta"):
                layer = Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=compute_dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                )
            # On some CPUs bitsandbytes would compute in bfloat16 whatever was asked for, and shuffle
            # the stored codes on the way.
            layer.support_avx512bf16_for_cpu = False
            parent, _, leaf = name.rpartition(".")
            setattr(language_model.get_submodule(parent), leaf, layer)


def dequantised(parameter: torch.Tensor) -> torch.Tensor:
    """The numbers that an NF4 weight stands for, in its compute type; any other parameter as it is."""
    if not is_quantised(parameter):
        return parameter.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def is_quantised(parameter: torch.Tensor) -> TypeGuard["Params4bit"]:
    """Whether a parameter is an NF4 weight."""
    return hasattr(parameter, "quant_state")


def bytes_of(parameter: torch.Tensor) -> int:
    """The memory that a parameter takes, an NF4 weight's scales included."""
    if not is_quantised(parameter):
        return parameter.nbytes
    state = parameter.quant_state
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return parameter.nbytes + sum(t.nbytes for t in [state.absmax, state.code, *nested])


def saved_bytes(language_model: nn.Module) -> int:
    """The memory that NF4 would save on a language model: its frozen linear layers at 4 bits a weight.

    Each block of weights has a scale of 8 bits, and 256 blocks a float32 to scale those.
    """
    frozen = [
        module.weight
        for module in language_model.modules()
        if type(module) is nn.Linear and not module.weight.requires_grad
    ]
    per_weight = 0.5 + 1 / _BLOCK + 4 / (256 * _BLOCK)
    return round(sum(weight.nbytes - weight.numel() * per_weight for weight in frozen))


def quantised(weight: torch.Tensor) -> "Params4bit":
    """Quantise a weight on its device."""
    from bitsandbytes.nn import Params4bit

    parameter = Params4bit(
        weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return parameter.to(weight.device)
