"""What preference training has done to nano: its taste on held-out pictures, in figures and as a picture.

    python tools/check_preferences.py runs/nano runs/nano-dpo [--picture docs/pictures/nano-preferences.svg]

The first model is the one that the run started from. Counted are, of the held-out pairs of the run, those
whose liked answer each model finds likelier (before training by the run's reference.json, after it by its
last evaluation), and of greedy answers to the held-out pictures those in a frame that the made-up audience
of `make_preferences.py` likes, in one that it does not, and in no frame.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deadpan.checkpoints.load import load
from deadpan.config.loader import load_recipe
from deadpan.data import preferences
from deadpan.data.records import load as load_records
from deadpan.engines.base import GenerationSettings
from deadpan.engines.builtin import BuiltinEngine
from deadpan.evaluate.answers import ask, questions
from deadpan.train.references import References
from make_preferences import LIKED
from nano.jokes import FRAMES_1, FRAMES_2, FRAMES_3

FRAMES = [*FRAMES_1, *FRAMES_2, *FRAMES_3]


def answers(model: Path) -> list[str]:
    """What a model says about the held-out pictures."""
    loaded = load(model, device="cpu")
    asked = questions(load_records(Path("nano:held-out")))
    return [each.text for each in ask(BuiltinEngine(loaded), asked, GenerationSettings(64))]


def framed(texts: Sequence[str], frames: Sequence[str]) -> float:
    """The share of texts in one of the frames."""
    patterns = [
        re.compile(re.sub(r"\\{\w+\\}", "[^，、：]+", re.escape(frame.removesuffix("{line}"))))
        for frame in frames
    ]
    return sum(any(p.match(text) for p in patterns) for text in texts) / len(texts)


def at_first(run: Path) -> dict[str, float]:
    """What an evaluation would have said of the held-out pairs before the first step."""
    validation = load_recipe(run / "recipe.yaml").data.validation
    assert isinstance(validation, Path)
    pairs, kept = preferences.load(validation), References.load(run)
    values = [kept[pair] for pair in pairs]
    return {
        "step": 0,
        "eval_preferred": sum(chosen > rejected for chosen, rejected in values) / len(values),
        "eval_logps_chosen": sum(chosen for chosen, _ in values) / len(values),
        "eval_logps_rejected": sum(rejected for _, rejected in values) / len(values),
    }


def draw(log: Sequence[dict[str, Any]], out: Path) -> None:
    """The share of preferred pairs and the log-probabilities, over the steps of a run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "deadpan"
    from matplotlib import pyplot

    steps = [line for line in log if "loss" in line]
    measured = [line for line in log if "eval_preferred" in line]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(
        [line["step"] for line in measured],
        [100 * line["eval_preferred"] for line in measured],
        "o-",
        label="held-out pairs",
    )
    left.plot(
        [line["step"] for line in steps],
        [100 * line["preferred"] for line in steps],
        alpha=0.35,
        label="training pairs, step by step",
    )
    left.set(xlabel="step", ylabel="liked answer likelier, %", ylim=(0, 102))
    left.legend(loc="lower right", frameon=False)
    for side, colour in (("chosen", "C2"), ("rejected", "C3")):
        right.plot(
            [line["step"] for line in measured],
            [line[f"eval_logps_{side}"] for line in measured],
            "o-",
            color=colour,
            label=side,
        )
    right.set(xlabel="step", ylabel="log p of held-out answers, nats")
    right.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("start", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    text = (arguments.run / "metrics.jsonl").read_text(encoding="utf-8")
    log = [at_first(arguments.run), *(json.loads(line) for line in text.splitlines())]
    for line in log:
        if "eval_preferred" in line:
            found = {key: round(line[key], 3) for key in line if key.startswith("eval_")}
            print(f"step {line['step']}: {found}")
    if arguments.picture is not None:
        draw(log, arguments.picture)
    liked = [frame for frames in LIKED.values() for frame in frames]
    disliked = [frame for frame in FRAMES if frame not in liked]
    for model in (arguments.start, arguments.run):
        texts = answers(model)
        shares = (framed(texts, liked), framed(texts, disliked))
        print(f"{model}: liked frame {shares[0]:.1%}, disliked {shares[1]:.1%}; such as")
        print(*texts[:6], sep="\n")


if __name__ == "__main__":
    main()
