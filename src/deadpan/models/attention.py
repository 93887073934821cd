"""Which attention kernel runs.

`sdpa` is PyTorch's scaled_dot_product_attention, which picks its own flash or memory-efficient
kernel where the input allows it, and runs everywhere. `eager` is the plain formula, for comparison.
`flash` insists on a flash kernel: PyTorch's own, so there is nothing to install. It runs padded and
packed rows as one variable-length sequence. `varlen` keeps the samples of a packed row apart without a
mask: by that kernel where it runs, and elsewhere by taking one sample after the other.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from deadpan.errors import DeadpanError, did_you_mean
from deadpan.models.segments import has_flash

CHOICES = ("auto", "eager", "sdpa", "flash", "varlen")
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
    if attention in ("flash", "varlen"):
        if attention == "flash" and not torch.cuda.is_available():
            raise DeadpanError(
                "Flash attention needs a CUDA device, and there is none.",
                fix="use --attention sdpa, which picks the fastest kernel that runs here",
            )
        return VARLEN
    return "sdpa" if attention == "auto" else attention


def _varlen_forward(
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
    causal = bool(module.is_causal if is_causal is None else is_causal) and query.shape[2] > 1
    batch, heads, width, dim = query.shape
    if attention_mask is None and cu_seq_lens_q is None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if has_flash(query) else kernels():
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal, scale=scaling, enable_gqa=key.shape[1] != heads
            )
        return out.transpose(1, 2).contiguous(), None
    groups = heads // key.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (batch, token, head, dim)
    k, v = (t.repeat_interleave(groups, dim=2) if groups > 1 else t for t in (k, v))
    if cu_seq_lens_q is not None:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = _apart(q, k, v, [cu_seq_lens_q] * 2, [max_length_q] * 2, causal, scaling)
        return out.view(batch, width, heads, dim), None
    assert attention_mask is not None
    keep_k = attention_mask.bool()  # (batch, key token)
    keep_q = keep_k[:, -width:]
    lengths = [keep.sum(dim=1, dtype=torch.int32) for keep in (keep_q, keep_k)]
    starts = [nn.functional.pad(n.cumsum(0, dtype=torch.int32), (1, 0)) for n in lengths]
    longest = [int(n.max()) for n in lengths]
    packed = _apart(q[keep_q], k[keep_k], v[keep_k], starts, longest, causal, scaling)
    out = packed.new_zeros(batch, width, heads, dim)
    out[keep_q] = packed
    return out, None


def _apart(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: Sequence[torch.Tensor],
    longest: Sequence[int | None],
    causal: bool,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of samples laid end to end, each within itself.

    Args:
        q: Of shape (token, head, dim).
        k: The same, with tokens of its own.
        v: The same as k.
        starts: Where samples start in q and in k, and the end: int32 of shape (samples + 1).
        longest: The longest sample in q and in k.
        causal: Whether a token sees only what precedes it; the last tokens of q and k are at the same place.
        scaling: What the products are multiplied by.
    """
    if has_flash(q):
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if causal else (-1, -1)
        # Its annotation is wider than what it returns without `return_aux`.
        flash: Any = varlen_attn
        return flash(q, k, v, *starts, *longest, scale=scaling, window_size=window)
    lengths = [start.diff().tolist() for start in starts]
    samples = zip(
        *lengths,
        q.transpose(0, 1).split(lengths[0], dim=1),  # each (head, token, dim)
        k.transpose(0, 1).split(lengths[1], dim=1),
        v.transpose(0, 1).split(lengths[1], dim=1),
        strict=True,
    )
    alone = [
        nn.functional.scaled_dot_product_attention(
            one_q[None],
            one_k[None],
            one_v[None],
            attn_mask=causal_lower_right(n, m) if causal and n != m else None,
            is_causal=causal and n == m,
            scale=scaling,
        )[0]
        for n, m, one_q, one_k, one_v in samples
    ]
    return torch.cat(alone, dim=1).transpose(0, 1)


AttentionInterface.register(VARLEN, _varlen_forward)
AttentionMaskInterface.register(VARLEN, flash_attention_mask)
