"""A picture resized in whole numbers is the picture that Pillow resizes."""

import numpy as np
import pytest
from PIL import Image

from deadpan.processing import resampling

SIZES = [(1200, 800), (33, 700), (448, 448), (1, 1), (7, 2), (640, 5), (500, 375)]


def along(pixels: np.ndarray, width: int) -> np.ndarray:
    """Resize (row, column, 3) along its rows."""
    first, weights = resampling.weights(pixels.shape[1], width)
    total = np.full((len(pixels), width, 3), 1 << (resampling.BITS - 1), dtype=np.int32)
    for tap, weight in enumerate(weights):
        places = np.minimum(first + tap, pixels.shape[1] - 1)
        total += pixels[:, places].astype(np.int32) * weight[:, None]
    return np.clip(total >> resampling.BITS, 0, 255).astype(np.uint8)


@pytest.mark.skipif(not resampling.is_pillows(), reason="this Pillow rounds otherwise")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("new", [(112, 224), (448, 336)])
def test_every_byte_is_pillows(size: tuple[int, int], new: tuple[int, int]) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize(new))
    found = along(along(noise, new[0]).swapaxes(0, 1), new[1]).swapaxes(0, 1)
    np.testing.assert_array_equal(found, expected)
