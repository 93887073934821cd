"""The tiles that a GPU makes are those that Pillow makes, bit for bit.

Without a GPU, where Triton is, its interpreter runs them: TRITON_INTERPRET=1 pytest tests/parity/test_gpu_tiles.py
"""

import os

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")

from deadpan.processing import gpu_tiles, resampling, tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter takes its time.
EDGE, SIZES = 8, [(19, 13), (8, 8), (3, 20)]
if not INTERPRETED:
    EDGE, SIZES = 448, [(1200, 800), (300, 2000), (448, 448), (4000, 3000), (17, 900), (1, 1)]

pytestmark = [
    pytest.mark.skipif(not resampling.is_pillows(), reason="this Pillow rounds otherwise")
]
if not INTERPRETED:
    pytestmark += [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
)
@pytest.mark.parametrize("size", SIZES)
def test_every_value_is_the_processors(size: tuple[int, int], dtype: torch.dtype) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = tiles.pixel_values(Image.fromarray(noise), 12, EDGE).to(dtype)
    out = torch.full_like(expected, 7).to(DEVICE)
    grid = tiles.grid(*size, tile_size=EDGE)
    gpu_tiles.put_pixel_values(torch.from_numpy(noise).to(DEVICE), grid, out)
    assert torch.equal(out.cpu(), expected)
