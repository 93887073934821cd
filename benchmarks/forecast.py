"""How near `deadpan train --dry-run` comes to the run that it foretells.

    python benchmarks/forecast.py OUT.json --quantization none nf4 --micro-batch 8 auto --checkpointing on off

For every combination the forecast and the run are made as a user makes them, each in a process of its
own, and compared: the peak memory with `memory_gib` in metrics.jsonl, the time with that of the steps.
The model has InternVL2-2B's size and random weights, drawn on the GPU; the pictures are drawn as well,
of shapes that make 1 to 13 tiles. With --tiny it all runs on a CPU, with nano. What should not fit is
run too on a GPU, to see how it ends. Exit code 1 if a peak is off by more than 10%.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deadpan.checkpoints.processor_files import write_json
from deadpan.data.records import PROMPT
from deadpan.environment import GIB, devices, versions
from full_size import write_model
from make_tiny_model import make_official

SAMPLES_PER_STEP = 16
TOLERANCE = 0.1
SHAPES = [(448, 448), (900, 448), (448, 1400), (1000, 800), (1300, 900), (1800, 1350), (3000, 700)]
ANSWERS = ["热狗：今天的我，供不应求。", "它不难过，只是眼睛漏水。", "买大送小，概不退换。" * 4]
DEADPAN = [sys.executable, "-c", "from deadpan.cli.main import run; run()", "train"]


def write_records(folder: Path, count: int) -> Path:
    """Records of mixed lengths, in no order."""
    folder.mkdir()
    draw = random.Random(0)
    records = []
    for number in range(count):
        width, height = draw.choice(SHAPES)
        tint = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (width, height), tint).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{PROMPT}"},
            {"from": "gpt", "value": draw.choice(ANSWERS)},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    write_json(folder / "records.json", records)
    return folder / "records.json"


def full_size_model(scratch: Path) -> Path:
    """InternVL2-2B's size; the tokenizer is the tiny model's, which costs what another does."""
    tokenizer = scratch / "tokenizer"
    tokenizer.mkdir()
    tiny = make_official(scratch / "tiny")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tiny / name, tokenizer)
    write_model(scratch / "model", tokenizer)
    return scratch / "model"


def deadpan(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEADPAN, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "160"},
        check=False,
    )


def compare(recipe: list[str], settings: list[str], run: Path, on_gpu: bool) -> dict[str, Any]:
    """Foretell a run and make it."""
    recipe = [*recipe, *settings]
    foretold = deadpan([*recipe, f"run={run}", "--dry-run", "--json"])
    if not foretold.stdout.startswith("{"):
        raise SystemExit(foretold.stderr)
    forecast = json.loads(foretold.stdout)
    row: dict[str, Any] = {"recipe": " ".join(settings), "forecast": forecast}
    if not (forecast["fits"] or on_gpu):
        return row
    # In the size that was found: otherwise the run would search again.
    size, passes = forecast["micro_batch_size"], forecast["gradient_accumulation_steps"]
    found = [f"micro_batch_size={size}", f"gradient_accumulation_steps={passes}"]
    made = deadpan([*recipe, *found, f"run={run}"])
    row["exit_code"] = made.returncode
    if made.returncode:
        row["error"] = made.stderr[made.stderr.rfind("error:") :]
        return row
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    row["memory_gib"] = log[-1]["memory_gib"]
    settled = log[1:]
    row["samples_per_second"] = len(settled) / sum(1 / m["samples_per_second"] for m in settled)
    row["peak_ratio"] = forecast["peak"] / GIB / row["memory_gib"]
    row["speed_ratio"] = forecast["pace"]["samples_per_second"] / row["samples_per_second"]
    return row


def table(row: dict[str, Any]) -> str:
    forecast = row["forecast"]
    size = f"{forecast['micro_batch_size']} x {forecast['gradient_accumulation_steps']}"
    peak = "?" if forecast["peak"] is None else f"{forecast['peak'] / GIB:.2f}"
    limit = f"{forecast['limit'] / GIB:.1f}"
    text = f"{row['recipe']}\n  {size}; forecast {peak} GiB of {limit} to plan with"
    if "memory_gib" in row:
        text += (
            f", measured {row['memory_gib']:.2f} ({row['peak_ratio']:.3f}); "
            f"forecast {forecast['pace']['samples_per_second']:.2f} samples/s, "
            f"measured {row['samples_per_second']:.2f} ({row['speed_ratio']:.3f})"
        )
    for change in forecast["changes"]:
        peak = "?" if change["peak"] is None else f"{change['peak'] / GIB:.2f}"
        known = "measured" if change["measured"] else "estimated"
        text += f"\n    {change['change']}: {peak} GiB, {known}, fits: {change['fits']}"
    return text + (f"\n  the run ended: {row['error']}" if "error" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--quantization", nargs="+", choices=["none", "nf4", "fp8"], default=["none"]
    )
    parser.add_argument("--checkpointing", nargs="+", choices=["on", "off"], default=["on"])
    parser.add_argument("--micro-batch", nargs="+", default=["8"], metavar="N|auto")
    parser.add_argument("--packing", nargs="+", choices=["on", "off"], default=["on"])
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of 16 samples")
    parser.add_argument("--tiny", action="store_true", help="nano on the CPU")
    arguments = parser.parse_args()
    on_gpu = not arguments.tiny
    switch = {"on": "true", "off": "false"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        records = write_records(scratch / "data", 48)
        recipe = ["nano", f"data.train={records}"]
        if on_gpu:
            model = full_size_model(scratch)
            recipe = ["internvl2-2b-lora", f"model={model}", f"data.train={records}", "device=cuda"]
            torch.cuda.empty_cache()  # what drew the weights is not in the way of what is measured
        combinations = product(
            arguments.quantization,
            arguments.checkpointing,
            arguments.packing,
            arguments.micro_batch,
        )
        for number, (quantization, checkpointing, packing, size) in enumerate(combinations):
            passes = 1 if size == "auto" else SAMPLES_PER_STEP // int(size)
            settings = [
                f"max_steps={arguments.steps}",
                f"quantization={quantization}",
                f"gradient_checkpointing={switch[checkpointing]}",
                f"packing={switch[packing]}",
                f"micro_batch_size={size}",
                f"gradient_accumulation_steps={passes}",
                f"samples_per_step={SAMPLES_PER_STEP}",
            ]
            rows.append(compare(recipe, settings, scratch / f"run-{number}", on_gpu))
            print(table(rows[-1]), flush=True)
    hardware = devices()
    write_json(
        arguments.out,
        {
            "device": hardware["cuda"][0] if on_gpu else hardware["cpu"],
            "python": platform.python_version(),
            "versions": versions(),
            "rows": rows,
        },
    )
    off = [row for row in rows if abs(row.get("peak_ratio", 1) - 1) > TOLERANCE]
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
