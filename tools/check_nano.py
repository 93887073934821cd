r"""Measure how well nano's base model describes scenes that its pretraining never composed.

    python tools/check_nano.py [--scenes 1000] [--out figures.json]

Every scene has something held out: a pair of concepts that never met in pretraining, or a (concept, number, place) that
never occurred. Each is drawn as a picture of its own size, saved as WebP, and shown to the model as any user's picture
is: through `deadpan.load("nano").tell`. About two minutes on two CPU cores.
"""

import argparse
import io
import json
import random
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track

import deadpan
from nano import drawing
from nano.concepts import concepts
from nano.scenes import Scene, compose, read_description
from pretrain_nano import GRIDS, picture_size

_BATCH = 40


def picture(scene: Scene, sheet: torch.Tensor, seed: int) -> Image.Image:
    """Draw a scene and store it as a web site would."""
    generator = torch.Generator().manual_seed(seed)
    size = (scene.width, scene.height)
    drawn = drawing.draw(sheet, *drawing.sprites([scene]), size, generator)[0]
    file = io.BytesIO()
    Image.fromarray((drawn.permute(1, 2, 0) * 255).round().byte().numpy()).save(
        file, "WEBP", quality=88
    )
    return Image.open(file).convert("RGB")


def judge(scene: Scene, answer: str) -> dict[str, bool]:
    """What is right about an answer.

    Returns:
        names: all and only the pictured concepts are named; places: each of them where it is, too; counts: as many
        as there are, too; all: everything, that is, the answer is the description.
    """
    said = read_description(answer)
    if said is None:
        return dict.fromkeys(("names", "places", "counts", "all"), False)
    names, places, counts = (
        [{pick(group) for group in groups} for groups in (said, scene.groups)]
        for pick in (
            lambda group: group.concept,
            lambda group: (group.concept, group.place),
            lambda group: (group.concept, group.count),
        )
    )
    same_number = len(said) == len(scene.groups)
    return {
        "names": same_number and names[0] == names[1],
        "places": same_number and places[0] == places[1],
        "counts": same_number and counts[0] == counts[1],
        "all": said == scene.groups,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--font", type=Path, default=drawing.FONT)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    random_ = random.Random(f"check/{arguments.seed}")
    everything = range(len(concepts()))
    scenes = []
    for number in range(arguments.scenes):
        grid = random_.choices(list(GRIDS), list(GRIDS.values()))[0]
        size = picture_size(random_, grid)
        scenes.append(compose(random_, 1 + number % 3, size, everything, held_out=True))
    sheet = drawing.atlas(arguments.font)
    teller = deadpan.load(arguments.model)
    right: dict[int, Counter[str]] = {kinds: Counter() for kinds in (1, 2, 3)}
    for start in track(range(0, len(scenes), _BATCH), "describing"):
        part = scenes[start : start + _BATCH]
        drawn = [picture(scene, sheet, start + place) for place, scene in enumerate(part)]
        for scene, answer in zip(part, teller.tell(drawn, "请描述这张图片。"), strict=True):
            assert isinstance(answer, str)
            right[len(scene.groups)].update(["scenes"])
            right[len(scene.groups)].update(k for k, v in judge(scene, answer).items() if v)
    figures = {
        f"{kinds} concepts": {
            "scenes": counter["scenes"],
            **{
                what: round(counter[what] / counter["scenes"], 4)
                for what in ("names", "places", "counts", "all")
            },
        }
        for kinds, counter in right.items()
        if counter
    }
    print(json.dumps(figures, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
