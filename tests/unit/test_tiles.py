"""Tiles without reference data: bounds, order, thumbnail, modes."""

import random

import pytest
import torch
from PIL import Image, ImageDraw

from deadpan.processing import tiles

SEEDED_SIZES = [
    (round(2 ** random.Random(n).uniform(0, 12)), round(2 ** random.Random(-n - 1).uniform(0, 12)))
    for n in range(200)
]
"""Widths and heights from 1 to 4096, small ones as often as large ones."""


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 6), (1, 12), (2, 6), (5, 5), (11, 11)])
def test_a_grid_stays_within_its_bounds(least: int, most: int) -> None:
    for size in SEEDED_SIZES:
        columns, rows = tiles.grid(*size, least, most)
        assert least <= columns * rows <= most, size


def test_no_grid_within_bounds_has_a_nearer_aspect_ratio() -> None:
    grids = [(c, r) for c in range(1, 13) for r in range(1, 13) if c * r <= 12]
    for width, height in SEEDED_SIZES:
        columns, rows = tiles.grid(width, height)
        nearest = min(abs(width / height - c / r) for c, r in grids)
        assert abs(width / height - columns / rows) == nearest, (width, height)


@pytest.mark.parametrize("tile_size", [56, 448])
@pytest.mark.parametrize(("tiles_before", "edge"), [(1, 2), (2, 3)])
def test_a_larger_grid_needs_more_than_half_of_its_pixels(
    tile_size: int, tiles_before: int, edge: int
) -> None:
    # Of two grids with the same ratio, the larger wins where width * height > half of edge * edge tiles.
    limit = int((0.5 * tile_size**2 * edge**2) ** 0.5)
    at_most = tiles.grid(limit, limit, tile_size=tile_size)
    above = tiles.grid(limit + 1, limit + 1, tile_size=tile_size)
    assert (at_most, above) == ((tiles_before, tiles_before), (edge, edge))


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 9999), (1, 12)), ((9999, 1), (12, 1)), ((1, 1), (1, 1))]
)
def test_extreme_shapes_have_a_grid(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert tiles.grid(*size) == expected


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"positive size, found {size[0]}x{size[1]}"):
        tiles.grid(*size)


@pytest.mark.parametrize(("least", "most"), [(0, 6), (7, 6), (1, 0), (-1, 1)])
def test_impossible_bounds_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"found {least} and {most}"):
        tiles.grid(10, 10, least, most)


@pytest.mark.parametrize(
    ("size", "thumbnail", "expected"),
    [((60, 60), True, 1), ((120, 60), True, 3), ((120, 60), False, 2), ((60, 60), False, 1)],
)
def test_only_a_picture_of_several_tiles_has_a_thumbnail(
    size: tuple[int, int], thumbnail: bool, expected: int
) -> None:
    values = tiles.pixel_values(Image.new("RGB", size), tile_size=56, thumbnail=thumbnail)
    assert values.shape == (expected, 3, 56, 56)
    assert tiles.count(*size, tile_size=56, thumbnail=thumbnail) == expected


def test_tiles_go_row_by_row_and_the_thumbnail_of_the_whole_comes_last() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (90, 90, 90)]
    image = Image.new("RGB", (3 * 56, 2 * 56))  # exactly its grid: nothing is resampled
    draw = ImageDraw.Draw(image)
    for place, colour in enumerate(colours):
        left, top = place % 3 * 56, place // 3 * 56
        draw.rectangle((left, top, left + 55, top + 55), fill=colour)
    *cut, thumbnail = tiles.split(image, tile_size=56)
    assert [tile.getcolors() for tile in cut] == [[(56 * 56, colour)] for colour in colours]
    assert thumbnail.tobytes() == image.resize((56, 56)).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr", "F"])
def test_a_picture_of_any_mode_becomes_rgb_tiles(mode: str) -> None:
    image = Image.new(mode, (130, 60))
    before = image.tobytes()
    values = tiles.pixel_values(image, tile_size=56)
    assert (values.dtype, values.shape) == (torch.float32, (3, 3, 56, 56))
    assert values.is_contiguous()
    assert torch.equal(values, tiles.pixel_values(image.convert("RGB"), tile_size=56))
    assert (image.mode, image.size, image.tobytes()) == (mode, (130, 60), before)


def test_alpha_is_dropped_and_not_laid_on_white() -> None:
    clear = Image.new("RGBA", (56, 56), (10, 20, 30, 0))
    solid = Image.new("RGB", (56, 56), (10, 20, 30))
    found = tiles.pixel_values(clear, tile_size=56)
    assert torch.equal(found, tiles.pixel_values(solid, tile_size=56))


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_values_are_normalised_by_imagenets_mean_and_deviation(level: int) -> None:
    values = tiles.pixel_values(Image.new("RGB", (56, 56), (level,) * 3), tile_size=56)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.tensor(level) / 255 - mean) / std
    assert torch.equal(values, expected.view(1, 3, 1, 1).expand(1, 3, 56, 56))


def test_the_count_is_that_of_the_tiles_made() -> None:
    for size in SEEDED_SIZES[:40]:
        small = (size[0] // 4 + 1, size[1] // 4 + 1)
        made = tiles.pixel_values(Image.new("L", small), 6, 28, min_tiles=2)
        assert len(made) == tiles.count(*small, min_tiles=2, max_tiles=6, tile_size=28), size
