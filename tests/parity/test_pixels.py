"""Tiles are those of the official code, bit for bit."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from packaging.version import Version

from deadpan.data.pictures import open_picture
from deadpan.processing import tiles

ROUNDING = (
    "max_num_6" if Version(PIL.__version__) >= Version("13") else "max_num_6_pillow_before_13"
)
"""Pillow 13 changed the rounding of `resize` for upright pictures; either block holds for its side."""

AT = [0, 149, 298, 447]
"""The rows and columns of a tile that were written down."""


@pytest.fixture(scope="module")
def reference(golden: Path) -> list[dict[str, Any]]:
    content = json.loads((golden / "preprocess" / "expected.json").read_text(encoding="utf-8"))
    images: list[dict[str, Any]] = content["images"]
    assert len(images) == 18
    return images


@pytest.fixture(scope="module")
def pixels(golden: Path, reference: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """pixel_values of every picture for at most 6 tiles."""
    return {
        image["file"]: tiles.pixel_values(open_picture(golden / "preprocess" / image["file"]), 6)
        for image in reference
    }


def expected(image: dict[str, Any]) -> dict[str, Any]:
    # null where both versions of Pillow agree
    block: dict[str, Any] = image[ROUNDING] or image["max_num_6"]
    return block


def test_a_picture_is_decoded_as_the_official_code_does(
    golden: Path, reference: list[dict[str, Any]]
) -> None:
    # EXIF orientation ignored, alpha and palette transparency dropped, 16-bit grey clipped, a GIF's first frame.
    for image in reference:
        opened = open_picture(golden / "preprocess" / image["file"])
        assert list(opened.size) == image["rgb_size"], image["file"]
        digest = hashlib.sha256(opened.tobytes()).hexdigest()
        assert digest == image["rgb_sha256"], image["file"]


@pytest.mark.parametrize(("max_tiles", "column"), [(6, 2), (12, 4)])
def test_the_grid_is_the_official_one_for_every_size(
    golden: Path, max_tiles: int, column: int
) -> None:
    table = json.loads((golden / "preprocess" / "grid_table.json").read_text())["rows"]
    assert len(table) == 4000
    wrong = [
        row
        for row in table
        if list(tiles.grid(row[0], row[1], max_tiles=max_tiles)) != row[column : column + 2]
    ]
    assert wrong == []


@pytest.mark.parametrize("max_tiles", [1, 6, 12])
def test_every_picture_gets_the_official_grid_and_number_of_tiles(
    reference: list[dict[str, Any]], max_tiles: int
) -> None:
    for image in reference:
        grid = image["grids"][str(max_tiles)]
        width, height = image["rgb_size"]
        found = tiles.grid(width, height, max_tiles=max_tiles)
        assert found == (grid["columns"], grid["rows"]), image["file"]
        count = tiles.count(width, height, max_tiles=max_tiles)
        assert count == grid["tiles"], image["file"]


def test_pixel_values_are_bit_equal(
    reference: list[dict[str, Any]], pixels: dict[str, torch.Tensor]
) -> None:
    for image in reference:
        values, block = pixels[image["file"]], expected(image)
        assert values.dtype is torch.float32
        assert list(values.shape) == block["shape"], image["file"]
        digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
        assert digest == block["pixel_values_sha256"], image["file"]


def test_sampled_pixels_and_statistics_agree(
    reference: list[dict[str, Any]], pixels: dict[str, torch.Tensor]
) -> None:
    # Says where and by how much, when the digests differ. 1e-6 is a few units in the last place of values up to 2.7.
    for image in reference:
        values = pixels[image["file"]].numpy()
        for tile, facts in zip(values, expected(image)["tiles"], strict=True):
            sample = tile[:, AT][:, :, AT]  # (3, row, column)
            np.testing.assert_allclose(sample, facts["sample"], 0, 1e-6, err_msg=image["file"])
            wide = tile.astype(np.float64)
            mean, std = wide.mean(axis=(1, 2)), wide.std(axis=(1, 2))
            np.testing.assert_allclose(mean, facts["mean"], 0, 1e-6, err_msg=image["file"])
            np.testing.assert_allclose(std, facts["std"], 0, 1e-6, err_msg=image["file"])
