"""Exports that are reloaded in the test's own process: a fresh one takes seconds to import PyTorch."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deadpan.checkpoints import probe


@contextmanager
def reloaded_here() -> Iterator[None]:
    """Within it an export's probe runs in this process, by the command that a fresh one would be given."""
    real = subprocess.run
    with pytest.MonkeyPatch.context() as patch:

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            if command[:3] != [sys.executable, "-m", probe.__name__]:
                return real(command, **options)
            patch.setattr(sys, "argv", command[2:])
            runpy.run_path(str(probe.__file__), run_name="__main__")
            return subprocess.CompletedProcess(command, 0, "", "")

        patch.setattr(subprocess, "run", run)
        yield
