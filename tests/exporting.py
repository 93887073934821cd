"""Exports that are reloaded in the test's own process: a fresh one takes seconds to import PyTorch."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deadpan.checkpoints import probe


@contextmanager
def reloaded_here() -> Iterator[None]:
    """Within it an export's probe runs in this process, by the command that a fresh one would be given."""
    with pytest.MonkeyPatch.context() as patch:

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            python, option, module, *arguments = command
            assert (python, option, module) == (sys.executable, "-m", probe.__name__)
            patch.setattr(sys, "argv", [module, *arguments])
            runpy.run_path(str(probe.__file__), run_name="__main__")
            return subprocess.CompletedProcess(command, 0, "", "")

        patch.setattr("deadpan.checkpoints.export.subprocess.run", run)
        yield
