"""A batch that is killed, torn, fed broken pictures or spread over processes comes to the same file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from command import DEADPAN, ENVIRONMENT
from deadpan.batch import jokes
from deadpan.batch.jokes import Writer
from deadpan.batch.pictures import find
from deadpan.batch.run import Summary, tell_all
from deadpan.engines.base import Engine, GenerationSettings, Joke, Request
from deadpan.errors import DeadpanError
from deadpan.train.processes import Processes
from forked import fork

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COUNT = 23
DRAWN = GenerationSettings(temperature=1.0, seed=7)


class Parrot:
    """An engine that names the picture, where it stands in its batch, and the seed, as drawing would."""

    batch_size = 8

    def __init__(self, pause: float = 0.0) -> None:
        self.asked: list[str] = []
        self._pause = pause

    def prepare(self, request: Request) -> Request:
        return request

    def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        time.sleep(self._pause)
        self.asked += [request.name for request in requests]
        return [
            Joke(f"{request.name} {place} of {len(requests)}, {settings.seed}", 1, 1, "stop")
            for place, request in enumerate(requests)
        ]

    def stream(self, *_: Any) -> Any:
        raise NotImplementedError

    def score(self, *_: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for number in range(COUNT):
        place = folder / "inner" if number % 3 == 0 else folder
        Image.new("RGB", (60, 40), (10 * number, 90, 0)).save(place / f"{number:02d}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def batch(
    folder: Path,
    out: Path,
    engine: Engine | None = None,
    settings: GenerationSettings = DRAWN,
    **decisive: Any,
) -> Summary:
    items = find(folder, "为什么？")
    processes = Processes("cpu")
    loaded = engine or Parrot()
    return tell_all(items, lambda: loaded, out, settings, decisive, processes, n=2, batch_size=4)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def whole(folder: Path, tmp_path: Path) -> str:
    """The file of a run that nothing happened to."""
    summary = batch(folder, tmp_path / "whole.jsonl")
    assert (summary.told, summary.new, summary.broken) == (COUNT, COUNT, [])
    return (tmp_path / "whole.jsonl").read_text(encoding="utf-8")


def test_every_picture_has_a_line_in_order(folder: Path, whole: str) -> None:
    told = [json.loads(line) for line in whole.splitlines()]
    expected = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.png")
        if not path.name.startswith(".")
    )
    assert [line["picture"] for line in told] == [line["id"] for line in told] == expected
    assert [len(set(line["answers"])) for line in told] == [2] * COUNT
    assert {line["prompt"] for line in told} == {"为什么？"}


class Slow(Writer):
    """Takes its time, so that a kill strikes within a batch."""

    def write(self, *arguments: Any) -> None:
        time.sleep(0.01)
        super().write(*arguments)


def test_killed_again_and_again_the_file_is_the_same(
    folder: Path, whole: str, tmp_path: Path
) -> None:
    out, log = tmp_path / "out.jsonl", tmp_path / "log.txt"

    def work() -> None:
        setattr(jokes, "Writer", Slow)  # noqa: B010 - mypy forbids the assignment
        batch(folder, out)

    def told() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    struck_within = 0
    for enough in (1, 6, 11, 14, 19):
        child = fork(work, log)
        deadline = time.monotonic() + 60
        while told() < enough:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), log.read_text()
        struck_within += told() % 4 > 0
    assert struck_within >= 2
    batch(folder, out)
    assert out.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_line_is_told_again_and_no_other(
    folder: Path, whole: str, tmp_path: Path, cut: int
) -> None:
    out = tmp_path / "out.jsonl"
    batch(folder, out)
    kept = whole.splitlines(keepends=True)[:10]
    out.write_text("".join(kept)[:-cut], encoding="utf-8")
    assert batch(folder, out).new == COUNT - 9
    assert out.read_text(encoding="utf-8") == whole


def test_a_finished_file_needs_no_model(folder: Path, whole: str, tmp_path: Path) -> None:
    def none() -> Engine:
        raise AssertionError

    items = find(folder, "为什么？")
    summary = tell_all(
        items, none, tmp_path / "whole.jsonl", DRAWN, {}, Processes("cpu"), n=2, batch_size=4
    )
    assert (summary.told, summary.new) == (COUNT, 0)


def test_broken_pictures_are_listed_and_told_once_they_are_mended(
    folder: Path, tmp_path: Path
) -> None:
    out, aside = tmp_path / "out.jsonl", tmp_path / "aside.png"
    victim = folder / "01.png"
    shutil.copy(victim, aside)
    victim.write_bytes(victim.read_bytes()[:40])
    summary = batch(folder, out)
    assert (summary.told, [b.item.id for b in summary.broken]) == (COUNT - 1, ["01.png"])
    (listed,) = lines(tmp_path / "out.broken.jsonl")
    assert listed["picture"] == "01.png"
    assert str(victim) in listed["error"]
    # Still broken: nothing else is asked for its sake.
    parrot = Parrot()
    assert batch(folder, out, parrot).new == 0
    assert parrot.asked == []
    shutil.copy(aside, victim)
    assert (batch(folder, out).new, batch(folder, out).new) == (1, 0)
    assert [line["id"] for line in lines(out)] == [item.id for item in find(folder, "?")]
    assert not (tmp_path / "out.broken.jsonl").exists()


def test_only_broken_pictures_are_an_error(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(DeadpanError, match="None of the pictures can be opened"):
        batch(folder, tmp_path / "out.jsonl")
    assert len(lines(tmp_path / "out.broken.jsonl")) == COUNT


def test_other_settings_are_refused_and_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    batch(folder, out, weights="one")
    before = out.read_bytes()
    for changes, expected, found in (
        ({"weights": "two"}, "the model's weights: \"one\"", "the model's weights: \"two\""),
        ({"weights": "one", "settings": GenerationSettings(temperature=0.5, seed=7)},
         "temperature: 1.0", "temperature: 0.5"),
    ):  # fmt: skip
        with pytest.raises(DeadpanError, match="other settings") as caught:
            batch(folder, out, **changes)
        assert (caught.value.expected, caught.value.found) == (expected, found)
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ['{"a": 1}\n', '{"a": 1}', "a poem"])
def test_a_file_that_is_something_else_stays_as_it_is(
    folder: Path, tmp_path: Path, content: str
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(DeadpanError, match="holds something already"):
        batch(folder, out)
    assert out.read_text() == content


def test_two_commands_do_not_write_one_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    class Other(Parrot):
        def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
            with pytest.raises(DeadpanError, match="Another process is writing"):
                batch(folder, out)
            return super().generate(requests, settings)

    assert batch(folder, out, Other()).told == COUNT


def test_without_a_seed_a_run_that_goes_on_draws_on(folder: Path, tmp_path: Path) -> None:
    files = []
    for number in range(2):
        out = tmp_path / f"out-{number}.jsonl"
        batch(folder, out, settings=GenerationSettings(temperature=1.0))
        whole = out.read_text(encoding="utf-8")
        out.write_text(whole[:300], encoding="utf-8")
        batch(folder, out, settings=GenerationSettings(temperature=1.0))
        assert out.read_text(encoding="utf-8") == whole
        files.append(whole)
    assert files[0] != files[1]


def command(tiny: Path, folder: Path, out: Path) -> list[str]:
    settings = ["--max-new-tokens", "4", "--batch-size", "2", "--max-tiles", "1"]
    drawing = ["--temperature", "1.5", "--seed", "3", "-n", "2", "--device", "cpu"]
    return ["tell", str(tiny), "--pictures", str(folder), "--out", str(out), *settings, *drawing]


@pytest.mark.slow
def test_two_processes_killed_and_gone_on_with_by_one_make_the_file_of_one(
    tiny: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "05.png").write_bytes(b"nothing")
    alone = [str(DEADPAN), *command(tiny, folder, tmp_path / "one.jsonl")]
    one = subprocess.run(alone, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert f"{COUNT - 1} answered" in one.stdout
    expected = (tmp_path / "one.jsonl").read_bytes()

    two = [*TORCHRUN, "--no-python", str(DEADPAN), *command(tiny, folder, tmp_path / "two.jsonl")]
    done = subprocess.run(two, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.count("answered") == 1
    assert "left out as broken: 1" in done.stdout
    assert (tmp_path / "two.jsonl").read_bytes() == expected
    assert not list(tmp_path.glob("*.part-*"))

    # Killed: each process has left a part.
    killed = [*TORCHRUN, "--no-python", str(DEADPAN), *command(tiny, folder, tmp_path / "k.jsonl")]
    process = subprocess.Popen(
        killed, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    parts = [tmp_path / f"k.part-{rank}.jsonl" for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not all(part.exists() and part.stat().st_size for part in parts):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    # The workers have sessions of their own, and would go on.
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()
    assert any(part.exists() for part in parts)
    rest = [str(DEADPAN), *command(tiny, folder, tmp_path / "k.jsonl")]
    subprocess.run(rest, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert (tmp_path / "k.jsonl").read_bytes() == expected
    assert not list(tmp_path.glob("*.part-*"))
