"""The weights with which Pillow resizes a picture, so that a GPU can do it bit for bit alike.

Source: `precompute_coeffs`, `normalize_coeffs_8bpc` and `bicubic_filter` in `src/libImaging/Resample.c`
of Pillow 12. Pillow 13 rounds upright pictures otherwise.
"""

from functools import lru_cache

import numpy as np
import PIL
import torch

BITS = 22
"""Binary places of a weight."""


def is_pillows() -> bool:
    """Whether the installed Pillow resizes with these weights."""
    return int(PIL.__version__.split(".")[0]) < 13


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """How `new` pixels are made of `old` ones in a row.

    Each operation and its order are Pillow's, as the last bit depends on them.

    Returns:
        The first old pixel of each new one, int32 of shape (new); and the weights of it and of those that
        follow, int32 of shape (tap, new), zero beyond the row's end.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), old)
    at = first + np.arange((end - first).max())[:, None]
    wanted = np.where(at < end, _bicubic((at - centre + 0.5) * (1.0 / stretch)), 0.0)
    total = np.zeros(new)
    for tap in wanted:  # numpy's own sum adds in another order
        total += tap
    wanted /= total
    rounded = np.trunc(wanted * (1 << BITS) + np.where(wanted < 0, -0.5, 0.5))
    return first.astype(np.int32), rounded.astype(np.int32)


@lru_cache(256)
def weights_on(device: torch.device, old: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`weights` on a device."""
    first, rounded = weights(old, new)
    return torch.from_numpy(first).to(device), torch.from_numpy(rounded).to(device)
