"""Which picture files show the same picture, though their bytes differ: recompressed, resized, renamed.

Two pictures are the same if their difference hashes (dHash, Neal Krawetz, "Kind of Like That", hackerfactor.com, 2013)
are near and small copies of them have nearly the same colours. The hash finds candidates quickly; the colours prove
them, since on flat drawings a hash alone is equal for pictures that are not. The hash is a few lines with Pillow
and NumPy; the library imagehash would bring SciPy with it.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

BITS = 64
_BANDS = 4
NEAR_BITS = _BANDS - 1
"""The most bits in which hashes of one picture differ: so many that one of four bands is surely equal."""
NEAR_COLOURS = 4.0
"""The largest mean difference of the small copies' colours, of 255."""
NEAR_EDGES = 24.0
"""The largest mean difference within any cell of 4x4 pixels of the small copies: a small thing that moved is another
picture."""
_SMALL = 32
_MARGIN = 5


@dataclass(frozen=True)
class Fingerprint:
    """What a picture is compared by.

    Attributes:
        hash: The dHash: for each of 8x8 places, whether it is brighter by a margin than the one to its left.
        small: uint8 of shape (32, 32, 3), the picture scaled down.
        aspect: Width over height.
    """

    hash: int
    small: np.ndarray
    aspect: float


def fingerprint(picture: Image.Image) -> Fingerprint:
    """Take a picture's fingerprint."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=int)
    # On an even ground the sign of a difference is chance, so a margin is asked for.
    bits = (grey[:, 1:] > grey[:, :-1] + _MARGIN).ravel()
    small = picture.convert("RGB").resize((_SMALL, _SMALL), Image.Resampling.LANCZOS)
    value = int.from_bytes(np.packbits(bits).tobytes(), "big")
    return Fingerprint(value, np.asarray(small), picture.width / picture.height)


def same(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of the same picture."""
    if (one.hash ^ other.hash).bit_count() > NEAR_BITS:
        return False
    if not 0.95 < one.aspect / other.aspect < 1.05:
        return False
    difference = np.abs(one.small.astype(float) - other.small.astype(float))
    cells = difference.mean(axis=2).reshape(8, 4, 8, 4).mean(axis=(1, 3))
    return bool(difference.mean() <= NEAR_COLOURS and cells.max() <= NEAR_EDGES)


def same_pictures(prints: Mapping[str, Fingerprint]) -> dict[str, str]:
    """Map each picture to the first one, in the mapping's order, that shows the same.

    A picture is compared with those that stand for others, never with their likes, so that no chain of small
    differences joins two pictures that differ.
    """
    bands: dict[tuple[int, int], list[str]] = defaultdict(list)
    first: dict[str, str] = {}
    for name, found in prints.items():
        keys = [(band, found.hash >> (16 * band) & 0xFFFF) for band in range(_BANDS)]
        candidates = dict.fromkeys(other for key in keys for other in bands[key])
        twin = next((other for other in candidates if same(found, prints[other])), None)
        first[name] = name if twin is None else twin
        if twin is None:
            for key in keys:
                bands[key].append(name)
    return first
