"""Make nano's preference pairs: which of two jokes about a starter picture a made-up audience likes more.

    python tools/make_preferences.py src/deadpan/nano/starter

The audience has a taste that can be written down: it likes a scene better than a conversation. Both
answers say the same kind of line; the chosen one is a letter, a wedding speech or a meeting, the
rejected one an interview, small talk or a meal. Of the training pairs one in ten is the wrong way
round, as votes are; the held-out pairs, on the held-out pictures, are all by the rule.

Reads train.json and held-out.json there, writes preferences.jsonl and preferences-held-out.jsonl.
"""

import argparse
import random
from pathlib import Path

from deadpan.data import preferences
from deadpan.data.preferences import Preference
from deadpan.data.records import PROMPT, load
from nano.jokes import FRAMES_1, FRAMES_2, FRAMES_3, written

LIKED = {1: FRAMES_1[1:], 2: FRAMES_2[2:4], 3: FRAMES_3[:1]}
"""Frames by the number of things in the picture."""
NOISE = 0.1
_PAIRS = 2
"""Of a picture, as far as they differ."""


def of_picture(random_: random.Random, image: str, names: list[str]) -> list[Preference]:
    """The pairs of a picture."""
    singles, _ = written()
    frames = {1: FRAMES_1, 2: FRAMES_2, 3: FRAMES_3}[len(names)]
    liked = LIKED[len(names)]
    disliked = [frame for frame in frames if frame not in liked]
    found: dict[tuple[str, str], Preference] = {}
    for _ in range(_PAIRS):
        texts = []
        for frame in (random_.choice(liked), random_.choice(disliked)):
            order = random_.sample(names, len(names))
            called = dict(zip("abc", order, strict=False))
            texts.append(frame.format(**called, line=singles[order[-1]].lines[0]))
        found[texts[0], texts[1]] = Preference((image,), PROMPT, *texts)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random_ = random.Random(arguments.seed)
    for part, noise, suffix in (("train", NOISE, ""), ("held-out", 0.0, "-held-out")):
        pictures: dict[str, list[str]] = {}
        for record in load(arguments.folder / f"{part}.json"):
            pictures[record.images[0]] = list(record.concepts)
        pairs = []
        for image, names in pictures.items():
            for pair in of_picture(random_, image, names):
                if random_.random() < noise:
                    pair = Preference(pair.images, pair.prompt, pair.rejected, pair.chosen)
                pairs.append(pair)
        path = arguments.folder / f"preferences{suffix}.jsonl"
        preferences.write(pairs, path)
        print(f"{path}: {len(pairs)} pairs on {len(pictures)} pictures")


if __name__ == "__main__":
    main()
