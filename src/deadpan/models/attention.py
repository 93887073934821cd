"""Which attention kernel runs.

`sdpa` is PyTorch's scaled_dot_product_attention, which picks its own flash or memory-efficient
kernel where the input allows it, and runs everywhere. `eager` is the plain formula, for comparison.
`flash` insists on a flash kernel: PyTorch's own, so there is nothing to install. It runs padded and
packed rows as one variable-length sequence.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from deadpan.errors import DeadpanError, did_you_mean

CHOICES = ("auto", "eager", "sdpa", "flash")
VARLEN = "deadpan_varlen"
"""Our implementation's name within transformers, which takes every name with `flash` in it for a package."""


def kernels() -> AbstractContextManager[None]:
    """Within it, `sdpa` chooses among the kernels that take any length at once.

    cuDNN's is left out: it plans anew for every new shape, and generation has one with each token
    (measured on an H200: one picture and 32 tokens in 2.3 s with it, 1.1 s with plain eager).
    """
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def implementation(attention: str) -> str:
    """The name by which transformers knows an attention choice.

    Raises:
        DeadpanError: If the choice is unknown, or `flash` is asked for without a CUDA device.
    """
    if attention not in CHOICES:
        raise DeadpanError(
            f"The attention {attention!r} is unknown.", fix=did_you_mean(attention, CHOICES)
        )
    if attention == "flash":
        if not torch.cuda.is_available():
            raise DeadpanError(
                "Flash attention needs a CUDA device, and there is none.",
                fix="use --attention sdpa, which picks the fastest kernel that runs here",
            )
        return VARLEN
    return "sdpa" if attention == "auto" else attention


def _flash_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over (batch, head, token, dim); returns (batch, token, head, dim)."""
    causal = bool(module.is_causal if is_causal is None else is_causal)
    batch, heads, width, dim = query.shape
    if attention_mask is None and cu_seq_lens_q is None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            out = nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=causal and width > 1,
                scale=scaling,
                enable_gqa=key.shape[1] != heads,
            )
        return out.transpose(1, 2).contiguous(), None
    from torch.nn.attention.varlen import varlen_attn

    groups = heads // key.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (batch, token, head, dim)
    k, v = (t.repeat_interleave(groups, dim=2) if groups > 1 else t for t in (k, v))

    def variable_length(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Any, longest: Any
    ) -> Any:
        window = (-1, 0) if causal and width > 1 else (-1, -1)
        return varlen_attn(q, k, v, *starts, *longest, scale=scaling, window_size=window)

    if cu_seq_lens_q is not None:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = variable_length(q, k, v, [cu_seq_lens_q] * 2, [max_length_q] * 2)
        return out.view(batch, width, heads, dim), None
    assert attention_mask is not None
    keep_k = attention_mask.bool()  # (batch, key token)
    keep_q = keep_k[:, -width:]
    lengths = [keep.sum(dim=1, dtype=torch.int32) for keep in (keep_q, keep_k)]
    starts = [nn.functional.pad(n.cumsum(0, dtype=torch.int32), (1, 0)) for n in lengths]
    longest = [int(n.max()) for n in lengths]
    packed = variable_length(q[keep_q], k[keep_k], v[keep_k], starts, longest)
    out = packed.new_zeros(batch, width, heads, dim)
    out[keep_q] = packed
    return out, None


AttentionInterface.register(VARLEN, _flash_forward)
AttentionMaskInterface.register(VARLEN, flash_attention_mask)
