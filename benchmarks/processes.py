"""What a second process brings: samples a second and memory, whether it trains the same, and goes on as it was.

    python benchmarks/processes.py OUT.json

Three runs of the same records: one process; two processes with the same micro-batches each, so with
twice the samples a step; and one process that accumulates as many as the two. The losses of the last
two must agree. Then two processes train through transformers' decoder, and through the same in parts, under
FSDP2, ZeRO-1 and ZeRO-2 (as far as DeepSpeed is installed); each run in parts is resumed from the middle and
compared with itself. The model has
InternVL2-2B's size and random weights, every picture makes 7 tiles, and each process has a GPU of its
own (NCCL). With --tiny it all runs on a CPU, with nano (gloo), where two processes share the cores. OUT
is written anew after every run. Exit code 1 if losses differ, or a run in parts fails.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

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


def deadpan(program: Path, processes: int, *arguments: str) -> None:
    """Train as a user does."""
    launcher = TORCHRUN if processes > 1 else []
    made = subprocess.run(
        [sys.executable, *launcher, str(program), "train", *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")},
        check=False,
    )
    if made.returncode:
        raise Failed(f"{made.stdout}\n{made.stderr}")


class Failed(Exception):
    """A run that did not end well; its text is what it said."""


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(
    scratch: Path, recipe: list[str], processes: int, passes: int, *more: str
) -> dict[str, Any]:
    """Make a run and read its log."""
    run = scratch / "-".join(["run", str(processes), str(passes), *more]).replace("=", "-")
    began = time.perf_counter()
    made = (*recipe, *more, f"gradient_accumulation_steps={passes}", f"run={run}")
    deadpan(scratch / "train.py", processes, *made)
    log = read_log(run)
    row = {
        "processes": processes,
        "gradient_accumulation_steps": passes,
        "settings": list(more),
        "samples_per_second": statistics.median(m["samples_per_second"] for m in log[-SETTLED:]),
        "tokens_per_second": statistics.median(m["tokens_per_second"] for m in log[-SETTLED:]),
        "data_wait_fraction": statistics.median(m["data_wait_fraction"] for m in log[-SETTLED:]),
        "memory_gib": max(m["memory_gib"] for m in log),
        "losses": [m["loss"] for m in log],
        "wall_seconds": round(time.perf_counter() - began, 1),
        "run": str(run),
    }
    print(
        f"{processes} process{'es' * (processes > 1)} x {passes} passes {' '.join(more)}: "
        f"{row['samples_per_second']:.2f} samples/s, {row['memory_gib']:.2f} GiB, "
        f"waiting for data {row['data_wait_fraction']:.0%}, {row['wall_seconds']} s in all",
        flush=True,
    )
    return row


def resume(scratch: Path, row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Do the second half of a finished run again, from its checkpoint in the middle; what came otherwise."""
    run, middle = Path(row["run"]), f"step-{steps // 2:06d}"
    before = read_log(run)
    with safe_open(run / "latest" / "adapter_model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    deadpan(
        scratch / "train.py", row["processes"], str(run / "recipe.yaml"), "--resume-from", middle
    )
    after = read_log(run)
    with safe_open(run / "latest" / "adapter_model.safetensors", "pt") as file:
        off = max((file.get_tensor(name) - w).abs().max().item() for name, w in weights.items())
    pairs = zip(before, after, strict=True)
    gaps = [abs(m["loss"] - n["loss"]) / abs(m["loss"]) for m, n in pairs]
    found = {"from": middle, "largest_loss_difference": max(gaps), "largest_weight_difference": off}
    print(f"  resumed from {middle}: {found}", flush=True)
    return found


def difference(row: dict[str, Any], other: dict[str, Any]) -> float:
    """By how much the losses of two runs differ at most, relatively."""
    pairs = zip(row["losses"], other["losses"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| processes x passes | settings | samples/s | against one | GiB a process | losses differ by | resumed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"{row['processes']} x {row['gradient_accumulation_steps']}"
        settings = " ".join(row["settings"]) or "-"
        if "error" in row:
            lines.append(f"| {name} | {settings} | failed | | | | |")
            continue
        ratio = row["samples_per_second"] / rows[0]["samples_per_second"]
        off = f"{row['differs_by']:.1e}" if "differs_by" in row else ""
        resumed = row.get("resumed")
        same = ""
        if resumed:
            apart = resumed["largest_loss_difference"], resumed["largest_weight_difference"]
            same = "bit for bit" if apart == (0, 0) else f"{apart[0]:.1e}, weights {apart[1]:.1e}"
        lines.append(
            f"| {name} | {settings} | {row['samples_per_second']:.2f} | {ratio:.2f} | "
            f"{row['memory_gib']:.2f} | {off} | {same} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--passes", type=int, default=2, help="of each process, a step")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument(
        "--only", nargs="*", choices=["fsdp2", "zero-1", "zero-2"], help="of the ways in parts"
    )
    parser.add_argument("--tiny", action="store_true", help="nano on the CPU")
    arguments = parser.parse_args()
    if arguments.steps % 2:
        parser.error("--steps must be even: a run is resumed from its middle")
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
            # Else the first run alone would go through the vision tower.
            "feature_cache=null",
            *("trackers=[]", "data.validation=null", f"quantization={arguments.quantization}"),
            *(f"max_steps={arguments.steps}", f"epochs={arguments.steps}"),
            f"micro_batch_size={arguments.micro_batch}",
        ]
        (scratch / "train.py").write_text(COMMAND + "\n")
        hardware = devices()
        report: dict[str, Any] = {
            "device": hardware["cuda"] if on_gpu else hardware["cpu"],
            "python": platform.python_version(),
            "versions": versions(),
            "precision": precision,
            "micro_batch_size": arguments.micro_batch,
            "steps": arguments.steps,
        }
        rows: list[dict[str, Any]] = []
        report["rows"] = rows

        def keep(row: dict[str, Any]) -> dict[str, Any]:
            rows.append(row)
            write_json(arguments.out, report)
            return row

        one = keep(train(scratch, recipe, 1, passes))
        two = keep(train(scratch, recipe, 2, passes))
        alike = keep(train(scratch, recipe, 1, 2 * passes))
        two["differs_by"] = difference(two, alike)
        report["speed_ratio"] = two["samples_per_second"] / one["samples_per_second"]
        # What trains in parts does so through this decoder, so it is compared with the same.
        plain = keep(train(scratch, recipe, 2, passes, "decoder=transformers"))
        plain["differs_by"] = difference(plain, alike)
        for settings in in_parts(arguments.only):
            row = {"processes": 2, "gradient_accumulation_steps": passes, "settings": settings}
            try:
                half = f"save_every_steps={arguments.steps // 2}"
                row = train(scratch, [*recipe, half], 2, passes, *settings)
                row["differs_by"] = difference(row, alike)
                row["resumed"] = resume(scratch, row, arguments.steps)
                shutil.rmtree(row["run"])
            except Failed as failed:
                # The rest is measured all the same: the machine may not be had again.
                row["error"] = str(failed)[-4000:]
                print(row["error"], flush=True)
            keep(row)
    apart = [row["differs_by"] for row in rows if "differs_by" in row]
    same = max(apart) <= TOLERANCE[precision] and not any("error" in row for row in rows)
    report["same"] = same
    write_json(arguments.out, report)
    print(table(rows))
    print(f"speed ratio {report['speed_ratio']:.3f}; same: {same}")
    sys.exit(0 if same else 1)


def in_parts(only: list[str] | None) -> list[list[str]]:
    """The settings of the ways to train in parts that can be had here."""
    ways = {"fsdp2": ["distributed.engine=fsdp2"]}
    if importlib.util.find_spec("deepspeed") is not None:
        for stage in (1, 2):
            settings = ["distributed.engine=deepspeed", f"distributed.zero_stage={stage}"]
            ways[f"zero-{stage}"] = settings
    return [settings for name, settings in ways.items() if only is None or name in only]


if __name__ == "__main__":
    main()
