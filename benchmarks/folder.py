"""Pictures a second that `deadpan tell --pictures` answers, in one process and in several.

    python benchmarks/folder.py OUT.json [--processes 2] [--model nano] [--device cpu]

The same pictures are answered by one process, by several (through torchrun, each on a GPU of its own
where the device is cuda), and by one again. Loading is left out: timed is from the first line written
to the last. The files must be equal. Figures are ratios within this one call.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from deadpan.checkpoints.processor_files import write_json
from deadpan.environment import devices, versions

COMMAND = "from deadpan.cli.main import run; run()"


def draw(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        tint = (number * 5 % 256, 90, 200 - number % 200)
        Image.new("RGB", (336, 224), tint).save(folder / f"{number:04d}.png")


class Clock:
    """Notes when the lines of a file and its parts were seen."""

    def __init__(self, out: Path) -> None:
        self._out, self._ended = out, threading.Event()
        self.seen: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Clock":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            parts = [self._out, *self._out.parent.glob(f"{self._out.stem}.part-*.jsonl")]
            lines = sum(part.read_bytes().count(b"\n") for part in parts if part.exists())
            if lines and (not self.seen or lines > self.seen[-1][1]):
                self.seen.append((time.perf_counter(), lines))

    def pace(self) -> float:
        (began, first), (ended, last) = self.seen[0], self.seen[-1]
        return (last - first) / (ended - began)


def tell(scratch: Path, out: Path, processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    program = scratch / "tell.py"
    program.write_text(COMMAND + "\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        *(sys.executable, *(launcher if processes > 1 else []), str(program), "tell"),
        *(arguments.model, "--pictures", str(scratch / "pictures"), "--out", str(out)),
        *("--device", arguments.device, "--batch-size", str(arguments.batch_size)),
        *("--max-new-tokens", str(arguments.tokens)),
    ]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    began = time.perf_counter()
    with Clock(out) as clock:
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, check=True)
    row = {
        "processes": processes,
        "pictures_per_second": round(clock.pace(), 3),
        "wall_seconds": round(time.perf_counter() - began, 1),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        draw(scratch / "pictures", arguments.pictures)
        counts = [1, arguments.processes, 1]
        outs = [scratch / f"{number}.jsonl" for number in range(len(counts))]
        rows = [tell(scratch, o, count, arguments) for o, count in zip(outs, counts, strict=True)]
        same = len({out.read_bytes() for out in outs}) == 1
    alone = (rows[0]["pictures_per_second"] + rows[2]["pictures_per_second"]) / 2
    ratio = rows[1]["pictures_per_second"] / alone
    print(f"{arguments.processes} processes against one: {ratio:.2f}; files equal: {same}")
    hardware = devices()
    write_json(
        arguments.out,
        {
            "device": hardware["cuda"] if arguments.device != "cpu" else hardware["cpu"],
            "python": platform.python_version(),
            "versions": versions(),
            "model": arguments.model,
            "rows": rows,
            "speed_ratio": ratio,
            "same": same,
        },
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
