"""What several answers behind one picture bring on a CPU, with nano.

    python benchmarks/shared_prefix.py [--steps 12]

One process, one thread. The rows take turns, a step each, so that what else the machine does falls on all
alike, and what is counted is the process's CPU time, not the clock's. Two sets of records: the starter set
as it is, and its first pictures with five answers each. Steps of 20 samples, packed, no dropout; the first
step of each row, in which kernels are set up, is left out, and features are in the cache before.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from deadpan.config.loader import load_recipe
from deadpan.nano import records_file
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher

ROWS: dict[str, list[str]] = {
    "transformers": ["decoder=transformers"],
    "fused": ["decoder=fused", "feature_cache=null"],
    "fused, features cached": ["decoder=fused"],
    "and shared_prefix": ["decoder=fused", "shared_prefix=true"],
}
SAMPLES, PICTURES, ANSWERS = 20, 100, 5


def five_answers(folder: Path) -> Path:
    """Records with five answers to each of a hundred pictures: its own, then those of the next ones."""
    source = records_file(Path("nano:train"))
    by_picture = {record["image"]: record for record in json.loads(source.read_text("utf-8"))}
    chosen = list(by_picture.values())[: PICTURES + ANSWERS]
    records = [
        {
            "image": str(source.parent / chosen[picture]["image"]),
            "conversations": [
                chosen[picture]["conversations"][0],
                chosen[picture + answer]["conversations"][1],
            ],
        }
        for picture in range(PICTURES)
        for answer in range(ANSWERS)
    ]
    path = folder / "five.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def trainer(data: str, row: str, folder: Path) -> Trainer:
    settings = [
        f"data.train={data}",
        f"micro_batch_size={SAMPLES}",
        f"run={folder / 'run'}",
        *ROWS[row],
    ]
    if "feature_cache=null" not in settings:
        settings.append(f"feature_cache={folder / 'features'}")
    return Trainer(load_recipe("nano", settings), False, Watcher(), dry_run=True)


def measure(data: str, steps: int, folder: Path) -> None:
    runs: dict[str, Iterator[dict[str, Any]]] = {}
    for row in ROWS:
        one = trainer(data, row, folder)
        if one.cache is not None and not any(one.cache.folder.iterdir()):
            # An epoch for the features alone, which the later rows and records find; then anew.
            for micro_batches in islice(one.plan.steps_after(0), one.plan.steps_per_epoch):
                one.rehearse(micro_batches)
            one = trainer(data, row, folder)
        runs[row] = one.steps()
    seconds, tokens, first = dict.fromkeys(ROWS, 0.0), dict.fromkeys(ROWS, 0.0), {}
    for step in range(steps + 1):
        for row, run in runs.items():
            began = time.process_time()
            metrics = next(run)
            if step:
                seconds[row] += time.process_time() - began
                # Of a step: its tokens a second times its seconds.
                tokens[row] += (
                    metrics["tokens_per_second"] * SAMPLES / metrics["samples_per_second"]
                )
            else:
                first[row] = metrics["loss"]
    print(f"\n{data}")
    for row in ROWS:
        print(
            f"{row:24} {SAMPLES * steps / seconds[row]:7.2f} samples a CPU second"
            f" {seconds['transformers'] / seconds[row]:6.2f} times transformers"
            f" {tokens[row] / steps:8.0f} tokens a step   first loss {first[row]:.9f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure("nano:train", steps, Path(scratch))
        measure(str(five_answers(Path(scratch))), steps, Path(scratch))


if __name__ == "__main__":
    main()
