"""The `deadpan` command, run by tests as a user runs it: in a process of its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants

from deadpan.cli.main import run
from forked import exit_code, fork

DEADPAN = Path(sys.executable).with_name("deadpan")
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
    # Commands run side by side; each with threads for all cores, they would be in each other's way.
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Outcome:
    code: object
    out: str
    error: str


def deadpan(folder: Path, *commands: Sequence[object]) -> list[Outcome]:
    """Run commands that do not need one another, two at a time; importing PyTorch takes each of them seconds."""
    outcomes = []
    for start in range(0, len(commands), 2):
        processes = [
            subprocess.Popen(
                [str(DEADPAN), *map(str, command)],
                cwd=folder,
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
            for command in commands[start : start + 2]
        ]
        for process in processes:
            out, error = process.communicate(timeout=600)
            outcomes.append(Outcome(process.returncode, out, error))
    return outcomes


def forked(folder: Path, *commands: Sequence[object]) -> list[Outcome]:
    """The same, one after the other, by the script's entry point in children of this process.

    They have PyTorch already, whose import takes a process of its own longer than most verbs do. Each verb
    has a test that goes without this.
    """
    outcomes = []
    for command in commands:

        def work(arguments: Sequence[str] = tuple(map(str, command))) -> None:
            os.chdir(folder)
            os.environ |= ENVIRONMENT
            huggingface_hub.constants.HF_HUB_OFFLINE = True
            sys.argv = ["deadpan", *arguments]
            run()

        with tempfile.TemporaryDirectory() as scratch:
            out, error = Path(scratch, "out"), Path(scratch, "error")
            code = exit_code(fork(work, out, error))
            outcomes.append(Outcome(code, out.read_text("utf-8"), error.read_text("utf-8")))
    return outcomes
