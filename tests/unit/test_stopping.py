"""`deadpan train` under signals, in a process of its own."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from deadpan.cli import main
from deadpan.config.loader import dump_recipe
from deadpan.train import state
from deadpan.train.stopping import stop_signal
from forked import fork
from training import logged, recipes


@pytest.fixture
def command(tiny: Path, records: Path, tmp_path: Path) -> list[str]:
    recipe = recipes(tiny, records)(tmp_path / "run", max_steps=5000, epochs=5000)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return ["deadpan", "train", str(tmp_path / "recipe.yaml")]


def begin(command: list[str], output: Path) -> int:
    """The command in a child process, which is in the middle of its steps when this returns."""

    def work() -> None:
        sys.argv = command
        main.run()

    process = fork(work, output)
    log = output.parent / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert os.waitpid(process, os.WNOHANG) == (0, 0), output.read_text()
        time.sleep(0.01)
    return process


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_130(
    command: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    process = begin(command, tmp_path / "output.txt")
    os.kill(process, number)
    assert exit_code(process) == 130
    output = (tmp_path / "output.txt").read_text()
    (saved,) = state.checkpoints(tmp_path / "run")
    state.verify(saved)
    step = logged(tmp_path / "run")[-1]["step"]
    assert saved.name == f"step-{step:06d}"
    assert f"stopped after step {step}; saved {saved}" in output
    assert f"go on with: deadpan train {tmp_path / 'run' / 'recipe.yaml'} --resume" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_does_not_wait_for_the_step(
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    # After the second step nothing is done for a minute, so only an interruption can end it.
    forever = threading.Event()
    monkeypatch.setattr(
        "deadpan.train.watcher.ProgressWatcher.stepped",
        lambda _, metrics: forever.wait(60) if metrics["step"] == 2 else None,
    )
    process = begin(command, tmp_path / "output.txt")
    os.kill(process, number)
    time.sleep(0.5)
    assert os.waitpid(process, os.WNOHANG) == (0, 0)
    os.kill(process, number)
    assert exit_code(process) == 130
    output = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in output
    assert state.checkpoints(tmp_path / "run") == []


def test_handlers_are_as_before_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before
