"""The kernels give what the functions of `elementwise` give, on a GPU in bfloat16.

Without one, where Triton is, its interpreter runs them: TRITON_INTERPRET=1 pytest tests/parity/test_kernels.py
"""

import os
from collections.abc import Iterable

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")

from deadpan.models import elementwise, kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts bfloat16 off where a GPU rounds it.
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
# The functions round to bfloat16 between their operations, the kernels at the end.
PRECISION = 1e-5 if INTERPRETED else 2**-6
ROWS, HIDDEN = 7, 96  # not a power of two
EPS = 1e-5

pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]
)


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)


def seed() -> torch.Tensor:
    return torch.tensor(-77, dtype=torch.int32, device=DEVICE)


def assert_same(
    found: Iterable[torch.Tensor | None], expected: Iterable[torch.Tensor | None]
) -> None:
    """Equal but for the last bit, and for FP8 numbers that it moves over a boundary."""
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
        elif one.dtype is torch.float8_e4m3fn:
            assert other.dtype is one.dtype
            if not INTERPRETED:  # which loses the carry of a mantissa that it rounds up
                torch.testing.assert_close(one.float(), other.float(), rtol=2**-2, atol=2**-6)
            assert (one.float() != other.float()).float().mean() < 0.1
        else:
            torch.testing.assert_close(one, other, rtol=PRECISION, atol=PRECISION)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize(
    "name", ["norm", "add_norm", "norm_backward", "quantise", "swiglu", "swiglu_backward"]
)
def test_a_row_at_a_time(name: str, share: float, fp8: bool) -> None:
    x, y, grad = drawn(ROWS, HIDDEN), 2 * drawn(ROWS, HIDDEN), drawn(ROWS, HIDDEN).flip(0)
    weight, low = 1 + 0.1 * drawn(HIDDEN), drawn(ROWS, HIDDEN).flip(1) if share else None
    gate_up = drawn(ROWS, 2 * HIDDEN)
    arguments = {
        "norm": (x, weight, EPS),
        "add_norm": (x, y, weight, EPS),
        "norm_backward": (x, weight, EPS, grad, low, y),
        "quantise": (x,),
        "swiglu": (gate_up,),
        "swiglu_backward": (gate_up, grad, low),
    }[name]
    found = getattr(kernels, name)(*arguments, share, seed(), fp8)
    assert_same(found, getattr(elementwise, name)(*arguments, share, seed(), fp8))


def test_a_scaled_sum_and_its_layer_norm() -> None:
    x, y, scale = drawn(ROWS, HIDDEN) + 3, drawn(ROWS, HIDDEN).flip(0), drawn(HIDDEN)
    arguments = (x, y, scale, 1 + 0.1 * drawn(HIDDEN), drawn(HIDDEN).flip(0), EPS)
    assert_same(kernels.add_layer_norm(*arguments), elementwise.add_layer_norm(*arguments))


def test_what_dropout_leaves_is_added() -> None:
    x, y = drawn(ROWS, HIDDEN), drawn(ROWS, HIDDEN).flip(0)
    found = kernels.add_dropped(x, y, 0.25, seed())
    assert_same([found], [elementwise.add_dropped(x, y, 0.25, seed())])


@pytest.mark.parametrize("fp8", [False, True])
def test_the_rotation_and_its_gradient(fp8: bool) -> None:
    heads, key_heads, dim = 3, 2, 16
    qkv = drawn(ROWS, heads + 2 * key_heads, dim)
    angles = drawn(ROWS, dim // 2).float().repeat(1, 2)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    dq, dk, dv = qkv.flip(0).split([heads, key_heads, key_heads], dim=1)
    back = elementwise.rotate_back(dq, dk, dv, cos, sin, fp8)
    assert_same(kernels.rotate_back(dq, dk, dv, cos, sin, fp8), back)
    turned = elementwise.rotate(qkv, cos, sin, heads, key_heads)
    caches = [torch.full((2 * ROWS, 2 * key_heads, dim), 7.0, device=DEVICE).to(DTYPE)] * 2
    caches = [cache.clone() for cache in caches]
    slots = torch.randperm(2 * ROWS, generator=torch.Generator().manual_seed(0))[:ROWS].to(DEVICE)
    into = elementwise.rotate(qkv, cos, sin, heads, key_heads, slots, caches[0])
    assert torch.equal(into, turned)
    assert torch.equal(caches[0][slots], turned[:, heads:])
    own = qkv.clone()
    assert_same([kernels.rotate(qkv, cos, sin, heads, key_heads)], [turned])
    assert_same([kernels.rotate(own, cos, sin, heads, key_heads, slots, caches[1])], [turned])
    assert_same([caches[1]], [caches[0]])
