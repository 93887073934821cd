# mypy: disable-error-code="no-untyped-def"
"""Kernels of our own, where the compiler's are far from the memory's speed.

SwiGLU's backward pass reads gate, up and the gradient of their product, and writes the gradients of
gate and up, the same in FP8, and the product itself: 7 bytes in and 7 out for each of two numbers. The
FP8 scale needs the largest gradient of the whole row first, for which a compiler reads and computes
everything twice, in kernels apart. A row of 2 x 8,192 fits into one program's registers, which here
does it once.
"""

import torch
import triton
import triton.language as tl

from deadpan.models.frozen import FP8, FP8_MAX


@triton.jit
def _keeps(place, seed, threshold):
    """Whether dropout keeps an element: the hash of `elementwise.dropped`."""
    bits = (place.to(tl.uint32) ^ seed.to(tl.uint32)) * 2654435761
    bits = (bits ^ (bits >> 16)) * 2246822507
    bits = (bits ^ (bits >> 13)) * 3266489909
    bits = (bits ^ (bits >> 16)) & 0x7FFFFFFF
    return bits >= threshold


@triton.jit
def _swiglu_backward_kernel(
    gate_up,
    grad,
    low,
    seed,
    both,
    product,
    quantised,
    scales,
    columns,
    threshold,
    factor,
    masked: tl.constexpr,
    limit: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < columns
    wide = row * columns * 2 + at
    gate = tl.load(gate_up + wide, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + wide + columns, inside, 0.0).to(tl.float32)
    g = tl.load(grad + row * columns + at, inside, 0.0).to(tl.float32)
    if masked:
        place = (row * columns + at).to(tl.int32)
        keeps = _keeps(place, tl.load(seed), threshold)
        part = tl.load(low + row * columns + at, inside, 0.0).to(tl.float32)
        g += tl.where(keeps, part * factor, 0.0)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    to_gate = (g * up * (sigmoid + silu * (1 - sigmoid))).to(both.dtype.element_ty)
    to_up = (g * silu).to(both.dtype.element_ty)
    tl.store(both + wide, to_gate, inside)
    tl.store(both + wide + columns, to_up, inside)
    out = silu * up
    if masked:
        out = tl.where(keeps, out * factor, 0.0)
    tl.store(product + row * columns + at, out.to(product.dtype.element_ty), inside)
    one, two = to_gate.to(tl.float32), to_up.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(one)), tl.max(tl.abs(two)))
    scale = tl.maximum(largest, 1e-12) / limit
    tl.store(scales + row, scale)
    tl.store(quantised + wide, (one / scale).to(quantised.dtype.element_ty), inside)
    tl.store(quantised + wide + columns, (two / scale).to(quantised.dtype.element_ty), inside)


def swiglu_backward(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    low: torch.Tensor | None,
    share: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward pass of silu(gate) up, on a GPU.

    Args:
        gate_up: bfloat16 of shape (token, gate + up).
        grad: Of the product: (token, up).
        low: The adapters' part of it, before dropout's mask; None without dropout.
        share: The share that dropout leaves out.
        seed: Dropout's seed, int32 scalar.

    Returns:
        The gradient of gate and up, the product after dropout, the gradient in FP8, and its scales (token, 1).
    """
    rows, columns = grad.shape
    both, product = torch.empty_like(gate_up), torch.empty_like(grad)
    quantised = torch.empty_like(gate_up, dtype=FP8)
    scales = torch.empty(rows, 1, device=grad.device)
    _swiglu_backward_kernel[(rows,)](
        gate_up,
        grad,
        grad if low is None else low,
        seed,
        both,
        product,
        quantised,
        scales,
        columns,
        int(share * 2**31),
        1 / (1 - share),
        low is not None,
        FP8_MAX,
        triton.next_power_of_2(columns),
        num_warps=16,
    )
    return both, product, quantised, scales
