"""What a decoder layer does between two products, element by element and row by row.

With FP8 it ends by quantising what the next product reads. Run as they stand on a CPU; on a GPU
`deadpan.models.kernels` has the same functions, each in one pass over memory.
"""

import torch
from torch.nn import functional

from deadpan.models.frozen import quantise_rows


def dropped(x: torch.Tensor, share: float, seed: torch.Tensor) -> torch.Tensor:
    """Leave out a share of x: its elements become zero, the others larger.

    An element's fate is its index and the seed through MurmurHash3's finaliser (Appleby 2011, public
    domain), in 32-bit arithmetic that wraps around.
    """
    rows, columns = x.shape
    row = torch.arange(rows, device=x.device, dtype=torch.int32)[:, None] * columns
    place = row + torch.arange(columns, device=x.device, dtype=torch.int32)
    bits = (place ^ seed) * -1640531535
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) & 0x7FFFFFFF
    return torch.where(bits >= int(share * 2**31), x / (1 - share), 0)


def _outputs(
    x: torch.Tensor, share: float, seed: torch.Tensor, fp8: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What the products read of an input: itself, after dropout, in FP8, and the scales of that."""
    kept = dropped(x, share, seed) if share else None
    quantised, scale = quantise_rows(x) if fp8 else (None, None)
    return x, kept, quantised, scale


def _with_low(
    grad: torch.Tensor, low: torch.Tensor | None, share: float, seed: torch.Tensor
) -> torch.Tensor:
    """A gradient in float32, with the adapters' part of it, which dropout's mask is still to meet."""
    grad = grad.float()
    return grad if low is None else grad + dropped(low, share, seed).float()


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, share: float, seed: torch.Tensor, fp8: bool
) -> tuple[torch.Tensor | None, ...]:
    """RMSNorm of (token, channel)."""
    return _outputs(_normed(x, weight, eps), share, seed, fp8)


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    share: float,
    seed: torch.Tensor,
    fp8: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Add x + y, and RMSNorm of it."""
    total = x + y
    return total, *_outputs(_normed(total, weight, eps), share, seed, fp8)


def add_layer_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x + scale y, with a scale for each channel, and LayerNorm of it."""
    total = torch.addcmul(x, scale, y)
    return total, functional.layer_norm(total, total.shape[-1:], weight, bias, eps)


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
    """Sum of residual and the gradient through RMSNorm; `low` is the adapters' part, before dropout's mask."""
    grad = _with_low(grad, low, share, seed)
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    grad = grad * weight.float()
    through = scale * (grad - wide * scale.pow(2) * (grad * wide).mean(dim=-1, keepdim=True))
    total = (residual.float() + through).to(x.dtype)
    quantised, scales = quantise_rows(total) if fp8 else (None, None)
    return total, quantised, scales


def quantise(
    x: torch.Tensor, share: float, seed: torch.Tensor, fp8: bool
) -> tuple[torch.Tensor | None, ...]:
    return _outputs(x, share, seed, fp8)


def add_dropped(x: torch.Tensor, y: torch.Tensor, share: float, seed: torch.Tensor) -> torch.Tensor:
    return x + dropped(y, share, seed)


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    key_heads: int,
    slots: torch.Tensor | None = None,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotary embedding of q and k: (token, head + 2 key head, dim), cos and sin (token, dim).

    With a cache (slot, 2 key head, dim), k and v go into its slots, one a token.
    """
    rotated = qkv[:, : heads + key_heads]
    one, two = rotated.chunk(2, dim=-1)
    turned = torch.cat([-two, one], dim=-1)
    rotated = rotated * cos[:, None] + turned * sin[:, None]
    qkv = torch.cat([rotated, qkv[:, heads + key_heads :]], dim=1)
    if slots is not None and cache is not None:
        cache.index_copy_(0, slots, qkv[:, heads:])
    return qkv


def rotate_back(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of q, k and v before the rotation, stacked: (token, channel)."""

    def back(grad: torch.Tensor) -> torch.Tensor:
        one, two = (grad * sin[:, None]).chunk(2, dim=-1)
        return (grad * cos[:, None] + torch.cat([two, -one], dim=-1)).flatten(1)

    grad = torch.cat([back(dq), back(dk), dv.flatten(1)], dim=1)
    quantised, scale = quantise_rows(grad) if fp8 else (None, None)
    return grad, quantised, scale


def swiglu(
    gate_up: torch.Tensor, share: float, seed: torch.Tensor, fp8: bool
) -> tuple[torch.Tensor | None, ...]:
    """silu(gate) up of (token, gate + up)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _outputs(functional.silu(gate) * up, share, seed, fp8)


def swiglu_backward(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    low: torch.Tensor | None,
    share: float,
    seed: torch.Tensor,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradient of gate and up; SwiGLU's output after dropout; the gradient in FP8 and its scales."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    grad = _with_low(grad, low, share, seed)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    to_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    both = torch.cat([to_gate, grad * silu], dim=-1).to(gate_up.dtype)
    out = (silu * up).to(gate_up.dtype)
    quantised, scale = quantise_rows(both) if fp8 else (None, None)
    return both, dropped(out, share, seed) if share else out, quantised, scale
