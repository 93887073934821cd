"""Draw four pictures and write a record for each: something to train on where there is nothing.

python tools/make_demo_data.py OUT
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from deadpan.checkpoints.processor_files import write_json
from deadpan.data.records import PROMPT

JOKES = {
    "sun.png": "太阳说它今天不上班，因为它已经够红了。",
    "moon.png": "月亮减肥成功，又胖回来了，大家管这叫中秋。",
    "ball.png": "球说它不是在滚，是在努力。",
    "wall.png": "这面墙什么都没做，但它一直在这里。",
}


def draw(name: str) -> Image.Image:
    """Draw one of the pictures."""
    image = Image.new("RGB", (300, 200), {"moon.png": "midnightblue"}.get(name, "skyblue"))
    pen = ImageDraw.Draw(image)
    if name == "sun.png":
        pen.ellipse((100, 50, 200, 150), fill="orangered")
    elif name == "moon.png":
        pen.ellipse((100, 50, 200, 150), fill="lightyellow")
        pen.ellipse((130, 40, 230, 140), fill="midnightblue")
    elif name == "ball.png":
        pen.rectangle((0, 150, 300, 200), fill="forestgreen")
        pen.ellipse((180, 90, 240, 150), fill="crimson")
    else:
        for row in range(10):
            for column in range(-1, 10):
                left, top = column * 40 + row % 2 * 20, row * 20
                pen.rectangle((left, top, left + 37, top + 17), fill="firebrick")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for name, joke in JOKES.items():
        draw(name).save(out / name)
        turns = [
            {"from": "human", "value": f"<image>\n{PROMPT}"},
            {"from": "gpt", "value": joke},
        ]
        records.append({"id": Path(name).stem, "image": name, "conversations": turns})
    write_json(out / "records.json", records)
    print(f"wrote {out / 'records.json'} and {len(records)} pictures")


if __name__ == "__main__":
    main()
