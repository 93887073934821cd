"""`deadpan demo` as a user has it, with a short training: told in one go, stopped and gone on with, and refused."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from command import DEADPAN, ENVIRONMENT

SHORT = ["max_steps=12", "save_every_steps=4"]
STEPS = [
    "check the data", "hear the base model", "fine-tune", "evaluate", "export and compare",
    "hear the export", "write the report",
]  # fmt: skip


def begin(out: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(DEADPAN), "demo", *SHORT, "--out", str(out), *more],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, error = process.communicate(timeout=600)
    return process.returncode, out, error


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, list[int]]]:
    """One demo told in one go and one stopped in the middle of training, side by side: folder, output, exit codes."""
    folder = tmp_path_factory.mktemp("demos")
    whole, stopped = begin(folder / "whole"), begin(folder / "stopped")
    log = folder / "stopped" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") >= 2):
        assert stopped.poll() is None, stopped.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    first = end(stopped)
    assert "the same command goes on" in first[2]
    assert not (folder / "stopped" / "tuned.jsonl").exists()
    second = end(begin(folder / "stopped"))
    once = end(whole)
    return {
        "whole": (folder / "whole", once[1], [once[0]]),
        "stopped": (folder / "stopped", second[1], [first[0], second[0]]),
    }


def test_every_step_is_told(told: dict[str, tuple[Path, str, list[int]]]) -> None:
    folder, out, codes = told["whole"]
    assert codes == [0], out
    for number, title in enumerate(STEPS, start=1):
        assert f"{number}/{len(STEPS)} {title}" in out
    assert f"Look at {folder / 'report.html'} in a browser" in " ".join(out.split())
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") == 120
    assert page.count("<svg") == 1
    for name in ("base", "export"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert json.loads(line)["text"].replace("'", "&#39;") in page
    # Nothing is asked of the network.
    assert not re.search(r'(src|href)="(?!#|data:)|url\((?!#)|<script|@import', page)


def test_a_stopped_demo_goes_on_and_tells_the_same_story(
    told: dict[str, tuple[Path, str, list[int]]],
) -> None:
    (whole, _, _), (stopped, out, codes) = told["whole"], told["stopped"]
    assert codes == [130, 0]
    assert out.count("done before") == 2
    for name in ("base.jsonl", "tuned.jsonl", "export.jsonl", "tuned.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    base, tuned = ((whole / f"{name}.jsonl").read_text() for name in ("base", "tuned"))
    assert base != tuned


def test_another_demo_is_not_overwritten(
    told: dict[str, tuple[Path, str, list[int]]], tmp_path: Path
) -> None:
    folder = told["whole"][0]
    before = (folder / "demo.json").read_bytes()
    (tmp_path / "mine.txt").write_text("mine")
    seed, mine, fresh = (
        begin(folder, "--seed", "1"),
        begin(tmp_path),
        begin(tmp_path, "--fresh"),
    )
    for process, text in (
        (seed, "begun otherwise"),
        (mine, "not a demo"),
        (fresh, "Only a demo's folder is removed"),
    ):
        code, _, error = end(process)
        assert (code, "Traceback" in error) == (1, False)
        assert text in error
    assert (folder / "demo.json").read_bytes() == before
    assert (tmp_path / "mine.txt").read_text() == "mine"
