"""Whether faster ways to train learn the same: loss curves of the same samples from the same weights.

    python benchmarks/learning.py OUT.json OUT.png [--steps 200] [--rows kept cached fp8 nf4] [--also OTHER.json ...]

The model, its adapter and the rows are those of benchmarks/train.py: InternVL2-2B's size, random weights.
It learns 64 samples of one tile and random tokens by heart, eight a step, so that the loss goes from
that of a guess to that of a memory. `apart` is the largest distance between a row's curve and the first
row's, of means over eight steps (an epoch), as a share of the first row's fall. --also takes rows from
other runs' files, made at the same time by other processes; their first row stays the first. With --tiny it
all runs on a CPU, with miniature layers.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from deadpan.checkpoints.processor_files import write_json
from deadpan.environment import devices, versions
from deadpan.models.answer_loss import plain_model
from deadpan.models.attention import kernels
from deadpan.models.fused_loss import picture_features
from deadpan.processing.collate import collate
from train import ROWS, SAMPLES, Row, build, loss_function, pinned, sample, with_features

BATCHES = 8
WARM_UP = 10


def curve(row: Row, steps: int, rate: float, tiny: bool) -> list[float]:
    """The loss of each step, nats a supervised token."""
    device = torch.device("cpu" if tiny else "cuda")
    draw = random.Random(2)
    model = build(row, device, tiny)
    batches = []
    for _ in range(BATCHES):
        batch = pinned(collate([sample(1, tiny, draw) for _ in range(SAMPLES)], 0, row.packing))
        if row.fused and row.cached:
            assert batch.pixel_values is not None
            with torch.no_grad():
                seen = picture_features(plain_model(model), batch.pixel_values.to(device))
            batch = with_features(batch, seen)
        batches.append(batch)
    loss_of = loss_function(row, model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, fused=not tiny)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARM_UP)
        batch = batches[step % BATCHES]
        with kernels():
            loss = loss_of(batch) / batch.supervised
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def epochs(losses: list[float]) -> list[float]:
    """Means over the batches."""
    return [
        statistics.mean(losses[i : i + BATCHES])
        for i in range(0, len(losses) - BATCHES + 1, BATCHES)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=["kept", "cached", "fp8", "nf4"])
    parser.add_argument("--tiny", action="store_true", help="miniature layers on the CPU")
    parser.add_argument(
        "--also", nargs="*", type=Path, default=[], help="OUT.jsons with former rows"
    )
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for other in arguments.also:
        rows |= json.loads(other.read_text())["rows"]
    for name in arguments.rows:
        start = time.perf_counter()
        losses = curve(ROWS[name], arguments.steps, arguments.rate, arguments.tiny)
        means = epochs(losses)
        first = epochs(next(iter(rows.values()))["losses"]) if rows else means
        apart = max(abs(a - b) for a, b in zip(means, first, strict=True)) / (first[0] - min(first))
        seconds = time.perf_counter() - start
        rows[name] = {"row": ROWS[name].name, "losses": losses, "apart": apart, "seconds": seconds}
        shown = ", ".join(f"{means[int(i * (len(means) - 1) / 4)]:.3f}" for i in range(5))
        print(f"{ROWS[name].name:30} {shown}  apart {apart:.1%}  {seconds:.0f} s", flush=True)
        if not arguments.tiny:
            torch.cuda.empty_cache()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in rows.values():
        axes.plot(row["losses"], label=row["row"], linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.legend()
    figure.savefig(arguments.figure, dpi=120)
    hardware = devices()
    write_json(
        arguments.out,
        {
            "device": hardware["cpu"]
            if arguments.tiny or not hardware["cuda"]
            else hardware["cuda"][0],
            "python": platform.python_version(),
            "versions": versions(),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
