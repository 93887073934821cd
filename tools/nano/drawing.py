"""Scenes as pixels, many at once, on whatever device PyTorch has.

Every sprite is one warped lookup in an atlas of emoji. A sprite drawn small would alias, so the atlas holds each emoji
at several blurs, and a sprite takes the one that suits its size.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional

from nano.concepts import concepts
from nano.scenes import Scene

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Where Debian's package fonts-noto-color-emoji puts it."""

_EDGE = 128
_STRIKE = 109
"""The one size that the font's bitmaps come in."""

_LEVELS = 5


def atlas(font: Path = FONT, device: str | torch.device = "cpu") -> torch.Tensor:
    """All emoji, transparent around, colours premultiplied by their opacity.

    Returns:
        float16 on a GPU, else float32, of shape (concept, level, 4, 128, 128): level n is blurred for a sprite
        that is drawn at 1 / 2^n of its size.
    """
    face = ImageFont.truetype(font, _STRIKE)
    pictures = []
    for concept in concepts():
        canvas = Image.new("RGBA", (2 * _EDGE, 2 * _EDGE))
        ImageDraw.Draw(canvas).text((20, 20), concept.emoji, font=face, embedded_color=True)
        box = canvas.getbbox()
        assert box is not None, f"the font draws nothing for {concept.emoji}"
        drawn = canvas.crop(box)
        square = Image.new("RGBA", (max(drawn.size), max(drawn.size)))
        square.paste(
            drawn, ((square.width - drawn.width) // 2, (square.height - drawn.height) // 2)
        )
        pictures.append(np.asarray(square.resize((_EDGE, _EDGE)), dtype=np.float32) / 255)
    sheet = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (concept, 4, row, column)
    sheet = torch.cat([sheet[:, :3] * sheet[:, 3:], sheet[:, 3:]], dim=1)
    levels = [sheet]
    for level in range(1, _LEVELS):
        small = functional.interpolate(
            sheet, size=_EDGE >> level, mode="bilinear", antialias=True, align_corners=False
        )
        levels.append(
            functional.interpolate(small, size=_EDGE, mode="bicubic", align_corners=False).clamp(
                0, 1
            )
        )
    stacked = torch.stack(levels, dim=1).to(device)
    return stacked.half() if stacked.is_cuda else stacked


def sprites(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers that drawing needs.

    Returns:
        Concepts, int64 of shape (scene, sprite), -1 where there is no more sprite; and x, y, size, angle and the
        picture's width over height, float32 of shape (scene, sprite, 5).
    """
    most = max(len(scene.sprites) for scene in scenes)
    which = torch.full((len(scenes), most), -1)
    places = torch.zeros(len(scenes), most, 5)
    for row, scene in enumerate(scenes):
        for column, s in enumerate(scene.sprites):
            which[row, column] = s.concept
            places[row, column] = torch.tensor(
                [s.x, s.y, s.size, s.angle, scene.width / scene.height]
            )
    return which, places


def draw(
    sheet: torch.Tensor,
    which: torch.Tensor,
    places: torch.Tensor,
    size: tuple[int, int],
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw scenes.

    Args:
        sheet: The atlas.
        which: From `sprites`.
        places: From `sprites`.
        size: Width and height in pixels of the output; a scene of another aspect ratio is stretched to it.
        generator: Decides the backgrounds; on the atlas's device.

    Returns:
        float32 in [0, 1] of shape (scene, 3, height, width).
    """
    width, height = size
    device = sheet.device
    which, places = which.to(device), places.to(device)
    canvas = backgrounds(len(which), size, generator)
    across = (torch.arange(width, device=device) + 0.5) / width
    down = (torch.arange(height, device=device) + 0.5) / height
    for column in range(which.shape[1]):
        rows = (which[:, column] >= 0).nonzero().flatten()
        x, y, edge, angle, ratio = places[rows, column].T[..., None, None]
        # A sprite's edge as a share of the picture's width and height.
        edge_x, edge_y = edge / ratio.clamp(min=1), edge * ratio.clamp(max=1)
        local_x = (across - x) / edge_x * 2  # (scene, 1, width)
        local_y = (down[:, None] - y) / edge_y * 2  # (scene, height, 1)
        cosine, sine = angle.cos(), angle.sin()
        grid = torch.stack(
            [cosine * local_x + sine * local_y, cosine * local_y - sine * local_x], dim=-1
        )  # (scene, height, width, 2)
        pixels = torch.maximum(edge_x * width, edge_y * height).flatten()
        level = (_EDGE / pixels).log2().floor().clamp(0, _LEVELS - 1).long()
        layer = functional.grid_sample(
            sheet[which[rows, column], level], grid.to(sheet.dtype), align_corners=False
        ).float()
        canvas[rows] = canvas[rows] * (1 - layer[:, 3:]) + layer[:, :3]
    return canvas.clamp(0, 1)


def backgrounds(count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Quiet backgrounds: two colours, mixed evenly, along a line, in stripes, checks, dots, clouds, or at a horizon.

    Returns:
        float32 in [0, 1] of shape (picture, 3, height, width).
    """
    width, height = size
    device = generator.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator, device=device) * (high - low) + low

    x = torch.linspace(-1, 1, width, device=device)
    y = torch.linspace(-1, 1, height, device=device)[:, None]
    turn = uniform(1, 1, high=math.tau)
    along = turn.cos() * x + turn.sin() * y  # (picture, height, width)
    across = turn.cos() * y - turn.sin() * x
    pitch = uniform(1, 1, low=4, high=16)
    phase = uniform(1, 1, high=math.tau)
    coarse = uniform(1, 5, 5)
    clouds = functional.interpolate(coarse, size=(height, width), mode="bicubic")[:, 0]
    mixtures = torch.stack(
        [
            torch.zeros_like(along),
            along / 2.8 + 0.5,
            ((along * pitch + phase).sin() * 4).sigmoid(),
            ((along * pitch + phase).sin() * (across * pitch).sin() * 8).sigmoid(),
            (((along * pitch).sin() + (across * pitch).sin() - 1) * 6).sigmoid(),
            clouds.clamp(0, 1),
            ((y - uniform(1, 1, low=-0.4, high=0.6)) * 60).sigmoid().expand_as(along),
        ],
        dim=1,
    )  # (picture, kind, height, width)
    kind = torch.randint(mixtures.shape[1], (count,), generator=generator, device=device)
    mixture = mixtures[torch.arange(count, device=device), kind][:, None]
    # Pastel or dusky: grey of some lightness, tinted; the second colour is a neighbour of the first.
    light = uniform(1, 1, 1).sqrt() * 0.75 + 0.22
    first = light + (uniform(3, 1, 1) - 0.5) * 0.36
    second = first + (uniform(1, 1, 1) - 0.5) * 0.3 + (uniform(3, 1, 1) - 0.5) * 0.2
    noise = torch.randn(count, 3, height, width, generator=generator, device=device)
    grain = uniform(1, 1, 1, high=0.015)
    return (first + (second - first) * mixture + noise * grain).clamp(0, 1)
