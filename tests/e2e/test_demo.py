"""`deadpan demo` as a user has it, with a short training: stopped and gone on with, and refused."""

import json
import re
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from command import DEADPAN, ENVIRONMENT, forked
from deadpan import demo
from deadpan.nano import records_file
from exporting import reloaded_here
from training import SignalAfter

SHORT = ["max_steps=8", "save_every_steps=4"]
STEPS = [
    "check the data", "hear the base model", "fine-tune", "evaluate", "export and compare",
    "hear the export", "write the report",
]  # fmt: skip


def begin(out: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(DEADPAN), "demo", *SHORT, "--out", str(out)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, error = process.communicate(timeout=600)
    return process.returncode, out, error


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo that was stopped in the middle of training and gone on with: its folder, and what the second part said."""
    folder = tmp_path_factory.mktemp("demos") / "demo"
    stopped = begin(folder)
    log = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") >= 2):
        assert stopped.poll() is None, stopped.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    code, _, error = end(stopped)
    assert code == 130
    assert "the same command goes on" in error
    assert not (folder / "tuned.jsonl").exists()
    code, out, error = end(begin(folder))
    assert code == 0, error
    return folder, out


def test_every_step_is_told(told: tuple[Path, str]) -> None:
    folder, out = told
    assert out.count("done before") == 2
    for number, title in enumerate(STEPS, start=1):
        assert f"{number}/{len(STEPS)} {title}" in out
    assert f"Look at {folder / 'report.html'} in a browser" in " ".join(out.split())
    # Without the marks in answers that are nearly training answers.
    page = re.sub("</?mark>", "", (folder / "report.html").read_text(encoding="utf-8"))
    assert page.count("data:image/") == 120
    assert page.count("<svg") == 1
    for name in ("base", "export"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert json.loads(line)["text"].replace("'", "&#39;") in page
    # Nothing is asked of the network.
    assert not re.search(r'(src|href)="(?!#|data:)|url\((?!#)|<script|@import', page)


class Silent:
    """Shows nothing of how a demo goes."""

    def step(self, title: str) -> Any:
        return nullcontext(lambda done, total: None)

    def note(self, text: str) -> None: ...

    def done(self, title: str, line: str, seconds: float, before: bool) -> None: ...


def test_a_stopped_demo_goes_on_and_tells_the_same_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # About four of the sixty pictures, which are told of sooner.
    file = records_file(Path("nano:held-out"))
    few = json.loads(file.read_text(encoding="utf-8"))[:4]
    for record in few:
        record["image"] = str(file.parent / record["image"])
    (tmp_path / "few.json").write_text(json.dumps(few), encoding="utf-8")
    monkeypatch.setattr(demo, "_HELD_OUT", tmp_path / "few.json")

    def tell(name: str) -> None:
        demo.Demo(tmp_path / name, 0, SHORT, Silent()).tell()

    with reloaded_here():
        tell("whole")
        with monkeypatch.context() as patch:
            patch.setattr(demo, "_TrainingProgress", lambda *_: SignalAfter(2))
            with pytest.raises(demo.Stopped):
                tell("stopped")
        assert not (tmp_path / "stopped" / "tuned.jsonl").exists()
        tell("stopped")
    for name in ("base.jsonl", "tuned.jsonl", "export.jsonl", "tuned.json"):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "stopped"))
        assert one == other
    base, tuned = ((tmp_path / "whole" / f"{name}.json").read_text() for name in ("base", "tuned"))
    assert base != tuned


def test_another_demo_is_not_overwritten(told: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = told
    before = (folder / "demo.json").read_bytes()
    (tmp_path / "mine.txt").write_text("mine")
    command = ["demo", *SHORT, "--out"]
    outcomes = forked(
        tmp_path,
        [*command, folder, "--seed", "1"],
        [*command, tmp_path],
        [*command, tmp_path, "--fresh"],
    )
    texts = ("begun otherwise", "not a demo", "Only a demo's folder is removed")
    for outcome, text in zip(outcomes, texts, strict=True):
        assert (outcome.code, "Traceback" in outcome.error) == (1, False)
        assert text in outcome.error
    assert (folder / "demo.json").read_bytes() == before
    assert (tmp_path / "mine.txt").read_text() == "mine"
