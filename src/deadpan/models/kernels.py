"""What lies between two products, on a GPU: the functions of `deadpan.models.elementwise` as kernels.

Each is bound by memory: it should read its inputs once and write its outputs once. A row (a token's
2,048 to 2 x 8,192 numbers) fits into one program's registers. So one program has one row, finds the
row's mean square or largest number, and goes on with what it holds; a compiler's kernels read the row
again. Arithmetic is in float32, and rounds where the outputs do.
"""

from typing import Any

import torch
import triton

from deadpan.models.frozen import FP8, FP8_MAX
from deadpan.models.triton_kernels import (
    add_dropped_kernel,
    add_layer_norm_kernel,
    norm_backward_kernel,
    norm_kernel,
    rotate_back_kernel,
    rotate_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
)


def _width(columns: int) -> dict[str, Any]:
    """A program's size: the columns as a power of two, 16 to a thread as far as warps go."""
    width = triton.next_power_of_2(columns)
    return {"width": width, "num_warps": min(max(width // 512, 4), 16)}


def _chances(share: float) -> tuple[int, float]:
    """Dropout as the kernels take it: the hash below which an element is left out, and the factor of the others."""
    return int(share * 2**31), 1 / (1 - share)


Outputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _room(
    x: torch.Tensor, share: float, fp8: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Room for an input after dropout, in FP8, and for the scales of that."""
    kept = torch.empty_like(x) if share else None
    return kept, *_room_fp8(x, fp8)


def _room_fp8(x: torch.Tensor, fp8: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not fp8:
        return None, None
    return torch.empty_like(x, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)


def _norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    share: float,
    seed: torch.Tensor,
    fp8: bool,
) -> tuple[torch.Tensor, Outputs]:
    """The sum x + y, and what products read of it, after RMSNorm if there is a weight."""
    total = x if y is None else torch.empty_like(x)
    out = total if weight is None else torch.empty_like(x)
    kept, quantised, scales = _room(x, share, fp8)
    norm_kernel[(len(x),)](
        x,
        y,
        weight,
        total,
        out,
        kept,
        quantised,
        scales,
        seed,
        x.shape[1],
        eps,
        *_chances(share),
        FP8_MAX,
        add=y is not None,
        normalise=weight is not None,
        drop=kept is not None,
        fp8=fp8,
        **_width(x.shape[1]),
    )
    return total, (out, kept, quantised, scales)


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, share: float, seed: torch.Tensor, fp8: bool
) -> Outputs:
    return _norm(x, None, weight, eps, share, seed, fp8)[1]


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    share: float,
    seed: torch.Tensor,
    fp8: bool,
) -> tuple[torch.Tensor | None, ...]:
    total, outputs = _norm(x, y, weight, eps, share, seed, fp8)
    return total, *outputs


def add_layer_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    columns = x.shape[1]
    add_layer_norm_kernel[(len(x),)](
        x, y, scale, weight, bias, total, out, columns, eps, **_width(columns)
    )
    return total, out


def quantise(x: torch.Tensor, share: float, seed: torch.Tensor, fp8: bool) -> Outputs:
    if not share and not fp8:
        return x, None, None, None
    return _norm(x, None, None, 0.0, share, seed, fp8)[1]


def norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    low: torch.Tensor | None,
    residual: torch.Tensor,
    share: float,
    seed: torch.Tensor,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    total = torch.empty_like(x)
    quantised, scales = _room_fp8(x, fp8)
    norm_backward_kernel[(len(x),)](
        x,
        weight,
        grad,
        low,
        residual,
        total,
        quantised,
        scales,
        seed,
        x.shape[1],
        eps,
        *_chances(share),
        FP8_MAX,
        masked=low is not None,
        fp8=fp8,
        **_width(x.shape[1]),
    )
    return total, quantised, scales


def add_dropped(x: torch.Tensor, y: torch.Tensor, share: float, seed: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    columns = x.shape[1]
    add_dropped_kernel[(len(x),)](x, y, out, seed, columns, *_chances(share), **_width(columns))
    return out


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    key_heads: int,
    slots: torch.Tensor | None = None,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """In place."""
    tokens, _, dim = qkv.shape
    pairs = (heads + key_heads) * dim // 2
    rotate_kernel[(tokens,)](
        qkv,
        cos,
        sin,
        slots,
        cache,
        qkv.stride(0),
        pairs,
        dim // 2,
        heads * dim,
        key_heads * dim,
        keep=cache is not None,
        **_width(max(pairs, key_heads * dim)),
    )
    return qkv


def rotate_back(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    dq, dk, dv = (grad.contiguous().flatten(1) for grad in (dq, dk, dv))
    q_columns, k_columns = dq.shape[1], dk.shape[1]
    columns = q_columns + 2 * k_columns
    out = dq.new_empty(len(dq), columns)
    quantised, scales = _room_fp8(out, fp8)
    rotate_back_kernel[(len(dq),)](
        dq,
        dk,
        dv,
        cos,
        sin,
        out,
        quantised,
        scales,
        q_columns,
        k_columns,
        cos.shape[1] // 2,
        FP8_MAX,
        fp8=fp8,
        **_width(columns),
    )
    return out, quantised, scales


def swiglu(gate_up: torch.Tensor, share: float, seed: torch.Tensor, fp8: bool) -> Outputs:
    columns = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), columns)
    kept, quantised, scales = _room(out, share, fp8)
    swiglu_kernel[(len(out),)](
        gate_up,
        out,
        kept,
        quantised,
        scales,
        seed,
        columns,
        *_chances(share),
        FP8_MAX,
        drop=kept is not None,
        fp8=fp8,
        **_width(columns),
    )
    return out, kept, quantised, scales


def swiglu_backward(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    low: torch.Tensor | None,
    share: float,
    seed: torch.Tensor,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    rows, columns = grad.shape
    both, product = torch.empty_like(gate_up), torch.empty_like(grad)
    quantised, scales = _room_fp8(gate_up, fp8)
    swiglu_backward_kernel[(rows,)](
        gate_up,
        grad,
        low,
        seed,
        both,
        product,
        quantised,
        scales,
        columns,
        *_chances(share),
        FP8_MAX,
        masked=low is not None,
        fp8=fp8,
        **_width(columns),
    )
    return both, product, quantised, scales
