# mypy: disable-error-code="no-untyped-def"
"""Tiles made on a GPU, bit for bit what Pillow makes of them.

Resizing a picture to its tiles takes a CPU core longer than the vision tower takes for them. Pillow
resizes in whole numbers, first along the rows and then down the columns: a new pixel is a sum of old ones
times weights, rounded to a byte. Whole numbers are the same anywhere. The second pass also cuts and
normalises.

    pixels    (row, column, 3)              a picture
    resized   (row, new column, 3)          after the first pass
    out       (tile, 3, row, column)        what the vision tower reads
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from deadpan.processing.resampling import BITS, weights_on
from deadpan.processing.tiles import normalised_bytes

_BLOCK = 1024

# A picture's size must not lead to kernels of its own.
_SIZES = ["size", "width", "taps"]


@triton.jit
def _rounded(total, bits: tl.constexpr):
    return tl.minimum(tl.maximum(total >> bits, 0), 255)


@triton.jit(do_not_specialize=_SIZES)
def _along_kernel(
    pixels, first, weights, out, size, width, taps, bits: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width * 3
    column, channel = at // 3, at % 3
    begin = tl.load(first + column, inside, 0)
    total = tl.full((block,), 1 << (bits - 1), tl.int32)
    tap = 0
    while tap < taps:  # the interpreter has no range up to an argument
        old = begin + tap
        seen = inside & (old < size)
        value = tl.load(pixels + row * size * 3 + old * 3 + channel, seen, 0).to(tl.int32)
        total += value * tl.load(weights + tap * width + column, inside, 0)
        tap += 1
    tl.store(out + row * width * 3 + at, _rounded(total, bits).to(tl.uint8), inside)


@triton.jit(do_not_specialize=["size", "height", "width", "taps"])
def _down_kernel(
    pixels,
    first,
    weights,
    table,
    out,
    size,
    height,
    width,
    taps,
    edge: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
):
    row, channel, across = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = tl.arange(0, block)
    inside = at < edge
    begin = tl.load(first + row)
    total = tl.full((block,), 1 << (bits - 1), tl.int32)
    column = (across * edge + at) * 3 + channel
    tap = 0
    while tap < taps:  # the interpreter has no range up to an argument
        old = begin + tap
        place = tl.minimum(old, size - 1).to(tl.int64) * width * 3 + column
        value = tl.load(pixels + place, inside, 0).to(tl.int32)
        total += value * tl.load(weights + tap * height + row)
        tap += 1
    value = tl.load(table + channel * 256 + _rounded(total, bits), inside, 0.0)
    tile = (row // edge) * (width // edge) + across
    tl.store(out + ((tile * 3 + channel) * edge + row % edge) * edge + at, value, inside)


@lru_cache(8)
def _table(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return normalised_bytes().to(device, dtype)


def _resized(pixels: torch.Tensor, columns: int, rows: int, out: torch.Tensor) -> None:
    """Resize to columns x rows tiles, cut and normalise."""
    edge = out.shape[-1]
    height, width = rows * edge, columns * edge
    old_height, old_width, _ = pixels.shape
    first, weights = weights_on(pixels.device, old_width, width)
    resized = pixels.new_empty(old_height, width, 3)
    _along_kernel[(old_height, triton.cdiv(width * 3, _BLOCK))](
        pixels,
        first,
        weights,
        resized,
        old_width,
        width,
        len(weights),
        bits=BITS,
        block=_BLOCK,
    )
    first, weights = weights_on(pixels.device, old_height, height)
    _down_kernel[(height, 3, columns)](
        resized,
        first,
        weights,
        _table(pixels.device, out.dtype),
        out,
        old_height,
        height,
        width,
        len(weights),
        edge=edge,
        bits=BITS,
        block=triton.next_power_of_2(edge),
    )


def put_pixel_values(pixels: torch.Tensor, grid: tuple[int, int], out: torch.Tensor) -> None:
    """Make what `tiles.pixel_values` makes of a picture, rounded to another type.

    Args:
        pixels: The picture, uint8 of shape (row, column, 3) on a GPU.
        grid: Its tiles' columns and rows.
        out: Where they go, of shape (tile, 3, tile_size, tile_size). If there is one tile more than the grid
            has, it becomes the thumbnail.
    """
    columns, rows = grid
    count = columns * rows
    _resized(pixels, columns, rows, out[:count])
    if len(out) > count:
        _resized(pixels, 1, 1, out[count:])
