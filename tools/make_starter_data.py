r"""Make nano's starter set: pictures of drawn scenes, with jokes, in the LLaVA/XTuner format.

    python tools/make_starter_data.py OUT [--font NotoColorEmoji.ttf]

Writes OUT/train.json, OUT/held-out.json and their pictures. What is pictured has jokes in `tools/nano/jokes`; a
held-out picture is a new scene of the same things, and two things that meet in it meet in no training picture. The
same seed gives the same files, byte for byte, with the same versions of PyTorch and Pillow.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deadpan.checkpoints.processor_files import write_json
from deadpan.data.records import PROMPT
from nano import drawing
from nano.concepts import concepts
from nano.jokes import answers, favourites, written
from nano.scenes import Group, Scene, arrange, compose

TRAIN = {1: 160, 2: 200, 3: 60}
HELD_OUT = {1: 24, 2: 66, 3: 30}
"""Pictures by the number of concepts in them."""

_SHAPES = (
    *((150, 150), (156, 140), (140, 156), (152, 148)) * 4,
    (224, 112),
    (112, 224),
    (200, 200),
)
"""Mostly of one tile, so that training takes a minute."""

_QUALITY = 88


def scenes(random_: random.Random) -> tuple[list[Scene], list[Scene]]:
    """The training and the held-out scenes; no pair of concepts is in both."""
    known = {concept.name: index for index, concept in enumerate(concepts())}
    _, together = written()
    pool = [known[name] for name in favourites()]
    favourite = [tuple(known[name] for name in sorted(pair)) for pair in together]
    favourite = [pair for pair in favourite if set(pair) <= set(pool)]
    random_.shuffle(favourite)
    train: list[Scene] = []
    met: set[frozenset[int]] = set()

    def pairs(scene: Scene) -> set[frozenset[int]]:
        present = [group.concept for group in scene.groups]
        return {frozenset((a, b)) for i, a in enumerate(present) for b in present[:i]}

    def fill(kinds: int, count: int, fresh: bool) -> list[Scene]:
        """Scenes that show every concept equally often."""
        found: list[Scene] = []
        queue: list[int] = []
        while len(found) < count:
            if len(queue) < kinds:
                queue += random_.sample(pool, len(pool))
            chosen, rest = queue[:kinds], queue[kinds:]
            scene = compose(random_, kinds, random_.choice(_SHAPES), chosen)
            if len(set(chosen)) < kinds or (fresh and pairs(scene) & met):
                random_.shuffle(queue)
                continue
            queue = rest
            found.append(scene)
        return found

    # Two that have a joke together meet in training, half of them; the rest may meet in held-out pictures.
    together_pictures = favourite[: TRAIN[2] // 3]
    for pair in together_pictures:
        places = random_.choice(
            (("左边", "右边"), ("上面", "下面"), ("左边", "中间"), ("中间", "右边"))
        )
        groups = [Group(concept, 1, place) for concept, place in zip(pair, places, strict=True)]
        train.append(arrange(random_, groups, random_.choice(_SHAPES)))
    for kinds, count in TRAIN.items():
        drawn = len(together_pictures) if kinds == 2 else 0
        train += fill(kinds, count - drawn, fresh=False)
    for scene in train:
        met |= pairs(scene)
    return train, [s for kinds, count in HELD_OUT.items() for s in fill(kinds, count, fresh=True)]


def record(identifier: str, image: str, scene: Scene, answer: str) -> dict[str, Any]:
    """One sample."""
    singles, _ = written()
    names = [concepts()[group.concept].name for group in scene.groups]
    return {
        "id": identifier,
        "image": image,
        "concepts": {name: list(singles[name].puns) for name in names},
        "conversations": [
            {"from": "human", "value": f"<image>\n{PROMPT}"},
            {"from": "gpt", "value": answer},
        ],
    }


def write(
    out: Path, part: str, chosen: Sequence[Scene], sheet: torch.Tensor, random_: random.Random
) -> int:
    """Draw the scenes of a part and write its records; returns their number."""
    (out / part).mkdir(parents=True, exist_ok=True)
    records = []
    for number, scene in enumerate(chosen, start=1):
        name = f"{part}/{number:03d}.webp"
        generator = torch.Generator().manual_seed(random_.getrandbits(48))
        size = (scene.width, scene.height)
        drawn = drawing.draw(sheet, *drawing.sprites([scene]), size, generator)[0]
        pixels = (drawn.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(out / name, quality=_QUALITY, method=6)
        # Some pictures have several answers, as in CLoT.
        most = random_.choice((1, 1, 2)) if part == "train" else 2
        for place, answer in enumerate(answers(random_, scene.groups, most)):
            records.append(record(f"{part}-{number:03d}-{place}", name, scene, answer))
    write_json(out / f"{part}.json", records)
    return len(records)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--font", type=Path, default=drawing.FONT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random_ = random.Random(arguments.seed)
    sheet = drawing.atlas(arguments.font)
    for part, chosen in zip(("train", "held-out"), scenes(random_), strict=True):
        count = write(arguments.out, part, chosen, sheet, random_)
        print(f"{arguments.out / part}.json: {count} records on {len(chosen)} pictures")


if __name__ == "__main__":
    main()
