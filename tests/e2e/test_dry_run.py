"""`deadpan train --dry-run` as a user types it, held against the run that it foretells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deadpan.cli.main import app
from deadpan.train.memory import Meter

COMMAND = [str(Path(sys.executable).with_name("deadpan")), "train", "nano"]


def test_nano_takes_the_memory_that_was_foretold(tmp_path: Path) -> None:
    recipe = ["max_steps=4", "run=run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # What starts them is larger than they are, and none of it theirs.
    large = b"x" * 2**30
    # Side by side: they do not need one another, and each imports PyTorch for seconds.
    for folder in ("forecast", "real"):
        (tmp_path / folder).mkdir()
    running = [
        subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=tmp_path / folder,
            env=environment,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        for folder, arguments in (
            ("forecast", [*recipe, "--dry-run", "--json"]),
            ("real", recipe),
        )
    ]
    del large
    Meter(torch.device("cpu")).reset()  # for the tests that follow in this process
    forecast, _ = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert list((tmp_path / "forecast").iterdir()) == []
    figures = json.loads(forecast)
    log = (tmp_path / "real" / "run" / "metrics.jsonl").read_text().splitlines()
    measured = json.loads(log[-1])["memory_gib"]
    # A third of it is activations; without them the forecast would be that much too low.
    assert figures["peak"] / 2**30 == pytest.approx(measured, rel=0.15)
    assert figures["steps"] == 4
    assert figures["whole"]["samples"] == 4 * 16
    assert figures["pace"]["steps"] == 3


def test_a_run_that_does_not_fit_ends_with_exit_code_1_and_what_to_change(
    tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Meter, "limit", lambda self: 2**20)
    overrides = [f"model={tiny}", f"data.train={records}", "device=cpu", "data.workers=0"]
    command = ["train", "internvl2-2b-lora", *overrides, "max_tiles=4", "max_steps=1"]
    outcome = CliRunner().invoke(app, [*command, "--dry-run"])
    assert outcome.exit_code == 1
    assert "does not fit: 0." in outcome.stdout
    assert "what to change" in outcome.stdout
    assert "max_tiles=2" in outcome.stdout
    assert "quantization=nf4" in outcome.stdout
    assert "samples/s" not in outcome.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_without_a_dry_run_is_a_mistyped_command() -> None:
    outcome = CliRunner().invoke(app, ["train", "nano", "--json"])
    assert outcome.exit_code == 2
    assert "--json goes with --dry-run" in outcome.stderr
