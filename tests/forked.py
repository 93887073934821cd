"""Runs in child processes that have everything imported already, so that they may be killed by the dozen."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch import distributed

from deadpan.config.schema import Recipe
from deadpan.train import state
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher

OPENING, STEPPING, SAVING, EVALUATING = b"o", b"s", b"w", b"e"
"""What a run may be about to do: to open its folder, do a step, write a checkpoint, evaluate."""


def fork(work: Callable[[], int | None], output: Path, error: Path | None = None) -> int:
    """Do something in a child process, whose id is returned; what it prints goes to a file, or to two."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        # A runner of tests may have its own handlers.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, file in ((1, output), (2, error or output)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        code = work() or 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0
    except BaseException:  # noqa: BLE001 - nothing may leave this process for the runner's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_ranks(recipe: Recipe, resume: bool | str, output: Path, world: int = 2) -> list[int]:
    """A run in several child processes, as a launcher starts them; their ids, in the order of ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> int:
        def work() -> None:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
            }
            # The parent may have made an accelerator for itself.
            AcceleratorState._reset_state(reset_partial_state=True)
            Trainer(recipe, resume, Watcher()).train()
            distributed.destroy_process_group()

        return fork(work, output)

    return [start(rank) for rank in range(world)]


def exit_code(child: int, patience: float | None = None) -> int:
    """Wait for a child process: its exit code, or minus the number of the signal that ended it.

    Args:
        child: Its id.
        patience: Seconds after which it is killed.
    """
    if patience is not None:
        until = time.monotonic() + patience
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Teller(Watcher):
    """Tells the parent what the run is about to do, and waits until it may."""

    def __init__(self, told: int, allowed: int) -> None:
        self._told, self._allowed = told, allowed

    def about_to(self, what: bytes) -> None:
        os.write(self._told, what)
        if not os.read(self._allowed, 1):
            os._exit(71)  # the parent is gone

    def loading(self, done: int, total: int) -> None:
        if done == total:
            self.about_to(OPENING)

    def starting(self, *_: object) -> None:
        self.about_to(STEPPING)

    def evaluating(self, done: int, total: int) -> None:
        self.about_to(EVALUATING)


class ForkedRun:
    """A run in a child process that goes on only as far as the parent lets it.

    Args:
        recipe: What to do.
        resume: Go on from the newest checkpoint.
        output: Where what it prints goes.
    """

    def __init__(self, recipe: Recipe, resume: bool, output: Path) -> None:
        self._about, told = os.pipe()
        allowed, self._allow = os.pipe()

        def work() -> None:
            os.close(self._about)
            os.close(self._allow)
            teller = Teller(told, allowed)
            save = state.save

            def watched(*arguments: Any) -> Path:
                teller.about_to(SAVING)
                saved = save(*arguments)
                teller.about_to(STEPPING)
                return saved

            setattr(state, "save", watched)  # noqa: B010 - mypy forbids the assignment
            Trainer(recipe, resume, teller).train()

        self.process = fork(work, output)
        os.close(told)
        os.close(allowed)

    def next(self) -> bytes:
        """What the run is about to do and waits for leave to; nothing once it has ended."""
        return os.read(self._about, 1)

    def allow(self) -> None:
        os.write(self._allow, b".")

    def end(self, kill: bool = False) -> int:
        """Wait for the end, which is brought about if asked: the exit code, or minus the signal's number."""
        if kill:
            os.kill(self.process, signal.SIGKILL)
        code = exit_code(self.process)
        os.close(self._about)
        os.close(self._allow)
        return code
