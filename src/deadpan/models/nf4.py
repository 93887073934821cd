"""NF4: the language model's linear layers in 4 bits, through bitsandbytes, on CPU and GPU.

Weights are stored as 4-bit NormalFloat in blocks of 64 with doubly quantised scales, and multiplied
in the compute type (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). The vision tower, the projector,
the embeddings and the head stay as they are: they are small, and the projector is trained.
"""

import bitsandbytes as bnb
import torch
from torch import nn


def prepare(language_model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of a language model on the meta device by NF4 ones, still empty."""
    for name, module in list(language_model.named_modules()):
        if type(module) is nn.Linear:
            with torch.device("meta"):
                layer = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=compute_dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                )
            parent, _, leaf = name.rpartition(".")
            setattr(language_model.get_submodule(parent), leaf, layer)


def quantised(weight: torch.Tensor) -> bnb.nn.Params4bit:
    """Quantise a weight on its device."""
    parameter = bnb.nn.Params4bit(
        weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return parameter.to(weight.device)
