"""What several test tiers need: the reference data, tiny models, pictures and records."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image, ImageDraw

from make_tiny_model import make_official

if TYPE_CHECKING:
    from training import MakeRecipe

torch.set_num_threads(1)
"""The tiny models have nothing to share out, and threads that wait for one another are slow."""

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
"""Reference data made with the official code; it stands beside the checkout and is never part of it."""


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference data; the test is skipped where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"reference data not found: {GOLDEN}")
    return GOLDEN


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny official InternVL2 with InternLM2 and random weights. Read only."""
    return make_official(tmp_path_factory.mktemp("tiny") / "official")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four drawn pictures of different shapes. Read only."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, size in enumerate([(64, 64), (130, 60), (60, 150), (200, 180)]):
        image = Image.new("RGB", size, (40 * number, 90, 200 - 40 * number))
        draw = ImageDraw.Draw(image)
        draw.ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=(250, 220, 40))
        paths.append(folder / f"picture-{number}.png")
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def records(pictures: list[Path]) -> Path:
    """A record file with one joke for each picture. Read only."""
    jokes = ["上班第一天，我就想退休。", "冷得像周一。", "一只猫。", "Why is it funny?"]
    path = pictures[0].parent / "records.json"
    samples = [
        {
            "id": f"r{number}",
            "image": picture.name,
            "conversations": [
                {"from": "human", "value": "<image>\n请你根据这张图片，讲一个脑洞大开的梗。"},
                {"from": "gpt", "value": joke},
            ],
        }
        for number, (picture, joke) in enumerate(zip(pictures, jokes, strict=True))
    ]
    path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make(tiny: Path, records: Path) -> "MakeRecipe":
    """Makes recipes that train the tiny model on these records."""
    # Here, since it imports the training loop, which not every test waits for.
    from training import recipes

    return recipes(tiny, records)
