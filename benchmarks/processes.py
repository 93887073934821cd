"""What a second process brings: samples a second and memory, and whether it trains the same.

    python benchmarks/processes.py OUT.json

Three runs of the same records: one process; two processes with the same micro-batches each, so with
twice the samples a step; and one process that accumulates as many as the two. The losses of the last
two must agree. The model has InternVL2-2B's size and random weights, every picture makes 7 tiles, and
each process has a GPU of its own (NCCL). With --tiny it all runs on a CPU, with nano (gloo), where two
processes share the cores. Exit code 1 if the losses differ.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deadpan.checkpoints.processor_files import write_json
from deadpan.data.records import PROMPT
from deadpan.environment import devices, versions
from forecast import ANSWERS, full_size_model

COMMAND = "from deadpan.cli.main import run; run()"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TOLERANCE = {"bf16": 0.02, "fp32": 1e-5}
"""Of the losses, relative. In bf16 other sums round otherwise, and steps carry that on."""
SETTLED = 6
"""Steps at the end of which the median speed is taken."""


def write_records(folder: Path, count: int) -> Path:
    """Pictures of 3 x 2 tiles and a thumbnail."""
    folder.mkdir()
    records = []
    for number in range(count):
        tint = (number * 5 % 256, 90, 200 - number)
        Image.new("RGB", (1344, 896), tint).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{PROMPT}"},
            {"from": "gpt", "value": ANSWERS[number % len(ANSWERS)]},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    write_json(folder / "records.json", records)
    return folder / "records.json"


def train(scratch: Path, recipe: list[str], processes: int, passes: int) -> dict[str, Any]:
    """Make a run and read its log."""
    run = scratch / f"run-{processes}-{passes}"
    program = scratch / "train.py"
    program.write_text(COMMAND + "\n")
    began = time.perf_counter()
    made = subprocess.run(
        [
            *(sys.executable, *(TORCHRUN if processes > 1 else []), str(program), "train", *recipe),
            *(f"gradient_accumulation_steps={passes}", f"run={run}"),
        ],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")},
        check=False,
    )
    if made.returncode:
        raise SystemExit(made.stderr)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    row = {
        "processes": processes,
        "gradient_accumulation_steps": passes,
        "samples_per_second": statistics.median(m["samples_per_second"] for m in log[-SETTLED:]),
        "tokens_per_second": statistics.median(m["tokens_per_second"] for m in log[-SETTLED:]),
        "data_wait_fraction": statistics.median(m["data_wait_fraction"] for m in log[-SETTLED:]),
        "memory_gib": log[-1]["memory_gib"],
        "losses": [m["loss"] for m in log],
        "wall_seconds": round(time.perf_counter() - began, 1),
    }
    print(
        f"{processes} process{'es' * (processes > 1)} x {passes} passes: "
        f"{row['samples_per_second']:.2f} samples/s, {row['memory_gib']:.2f} GiB, "
        f"waiting for data {row['data_wait_fraction']:.0%}, {row['wall_seconds']} s in all",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--passes", type=int, default=2, help="of each process, a step")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--tiny", action="store_true", help="nano on the CPU")
    arguments = parser.parse_args()
    on_gpu = not arguments.tiny
    passes, precision = arguments.passes, "bf16" if on_gpu else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        records = write_records(scratch / "data", 48)
        recipe = ["nano", "device=cpu", "data.workers=0"]
        if on_gpu:
            model = full_size_model(scratch)
            recipe = ["internvl2-2b-lora", f"model={model}", "device=cuda", "max_tiles=6"]
            torch.cuda.empty_cache()  # what drew the weights is not in the way of what is measured
        recipe += [
            *(f"data.train={records}", f"precision={precision}", "lora.lora_dropout=0"),
            *("trackers=[]", "data.validation=null", f"quantization={arguments.quantization}"),
            *(f"max_steps={arguments.steps}", f"epochs={arguments.steps}"),
            f"micro_batch_size={arguments.micro_batch}",
        ]
        one = train(scratch, recipe, 1, passes)
        two = train(scratch, recipe, 2, passes)
        alike = train(scratch, recipe, 1, 2 * passes)
    ratio = two["samples_per_second"] / one["samples_per_second"]
    off = max(abs(a - b) / abs(b) for a, b in zip(two["losses"], alike["losses"], strict=True))
    same = off <= TOLERANCE[precision]
    print(f"speed ratio {ratio:.3f}; losses differ by at most {off:.2e} (same: {same})")
    hardware = devices()
    write_json(
        arguments.out,
        {
            "device": hardware["cuda"] if on_gpu else hardware["cpu"],
            "python": platform.python_version(),
            "versions": versions(),
            "precision": precision,
            "micro_batch_size": arguments.micro_batch,
            "rows": [one, two, alike],
            "speed_ratio": ratio,
            "largest_relative_difference": off,
            "same": same,
        },
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
