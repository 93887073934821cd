"""From a picture to tiles: InternVL's "dynamic resolution".

A picture is resized to the grid of columns x rows tiles whose aspect ratio is nearest its own, cut row by row into
square tiles, and, where there is more than one tile, followed by a thumbnail of the whole. Each tile becomes
`(value / 255 - mean) / std` per channel.

Source: `dynamic_preprocess`, `find_closest_aspect_ratio` and `build_transform` in
`internvl_chat/internvl/train/dataset.py` of OpenGVLab/InternVL, commit 2410d1db. Kept from there, since the weights
were trained with it: the EXIF orientation is ignored, alpha is dropped rather than laid on white, and Pillow's
default filter (bicubic, antialiased) resizes. Pillow 13 changed the rounding of that filter for upright pictures, so
bit-equal pixels need the Pillow that the other side used.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@cache
def _candidates(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every grid of min_tiles to max_tiles tiles, fewest tiles first."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if min_tiles <= columns * rows <= max_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def grid(
    width: int, height: int, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 448
) -> tuple[int, int]:
    """Choose the tile grid for a picture.

    The grid with the nearest aspect ratio wins. Among grids of equal ratio (1x1, 2x2, 3x3) a larger one wins only
    if the picture has more than half of its pixels.

    Args:
        width: The picture's width in pixels.
        height: The picture's height in pixels.
        min_tiles: The fewest tiles a grid may have, thumbnail not counted.
        max_tiles: The most tiles a grid may have, thumbnail not counted.
        tile_size: The edge of a tile in pixels.

    Returns:
        (columns, rows).

    Raises:
        ValueError: If a size is not positive or min_tiles exceeds max_tiles.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture needs a positive size, found {width}x{height}")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"expected 1 <= min_tiles <= max_tiles, found {min_tiles} and {max_tiles}")
    ratio = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _candidates(min_tiles, max_tiles):
        difference = abs(ratio - columns / rows)
        larger_and_filled = width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or (difference == best_difference and larger_and_filled):
            best, best_difference = (columns, rows), difference
    return best


def count(
    width: int,
    height: int,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile_size: int = 448,
    thumbnail: bool = True,
) -> int:
    """The number of tiles a picture becomes, the thumbnail included."""
    columns, rows = grid(width, height, min_tiles, max_tiles, tile_size)
    return columns * rows + int(thumbnail and columns * rows > 1)


def split(
    image: Image.Image,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile_size: int = 448,
    thumbnail: bool = True,
) -> list[Image.Image]:
    """Cut a picture into RGB tiles of tile_size x tile_size, row by row, the thumbnail last."""
    image = image.convert("RGB")
    columns, rows = grid(*image.size, min_tiles, max_tiles, tile_size)
    resized = image.resize((columns * tile_size, rows * tile_size))
    tiles = [
        resized.crop(
            (column * tile_size, row * tile_size, (column + 1) * tile_size, (row + 1) * tile_size)
        )
        for row in range(rows)
        for column in range(columns)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size)))
    return tiles


def pixel_bytes(
    image: Image.Image,
    max_tiles: int = 12,
    tile_size: int = 448,
    thumbnail: bool = True,
    min_tiles: int = 1,
) -> torch.Tensor:
    """Cut a picture into tiles, not normalised yet; see `pixel_values` for the arguments.

    Returns:
        uint8 of shape (tile, tile_size, tile_size, 3).
    """
    tiles = split(image, min_tiles, max_tiles, tile_size, thumbnail)
    return torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))


@cache
def normalised_bytes() -> torch.Tensor:
    """What each of the 256 values of each channel becomes, float32 of shape (3, 256)."""
    # Division first, then mean, then std, each in float32: any other order differs in the last bit from upstream.
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    mean, std = (np.array(c, dtype=np.float32) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.from_numpy((values - mean[:, None]) / std[:, None])


def normalise(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Turn tiles into the vision tower's input, on their device.

    Every value is looked up, so that a GPU gives bit for bit what a CPU gives.

    Args:
        pixels: uint8 of shape (tile, row, column, 3).
        dtype: What the float32 values are rounded to.

    Returns:
        Of shape (tile, 3, row, column).
    """
    table = normalised_bytes().to(pixels.device, dtype)
    out = pixels.new_empty((len(pixels), 3, *pixels.shape[1:3]), dtype=dtype)
    for channel in range(3):
        places = pixels[..., channel].to(torch.int32).flatten()
        out[:, channel] = table[channel].index_select(0, places).view(pixels.shape[:3])
    return out


def pixel_values(
    image: Image.Image,
    max_tiles: int = 12,
    tile_size: int = 448,
    thumbnail: bool = True,
    min_tiles: int = 1,
) -> torch.Tensor:
    """Turn a picture into the vision tower's input.

    Args:
        image: A PIL picture of any mode.
        max_tiles: The most tiles, thumbnail not counted.
        tile_size: The edge of a tile in pixels.
        thumbnail: Whether a picture of more than one tile is followed by a thumbnail of the whole.
        min_tiles: The fewest tiles, thumbnail not counted.

    Returns:
        float32 of shape (tile, 3, tile_size, tile_size).
    """
    return normalise(pixel_bytes(image, max_tiles, tile_size, thumbnail, min_tiles))
