"""A full disk ends a run by one clear message, its last checkpoint is whole, and with space it goes on as ever.

On a real file system of a few megabytes where one may be mounted, and everywhere by a limit on the size of files.
"""

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.train import state
from deadpan.train.watcher import Watcher
from training import MakeRecipe, SignalAfter, course, identical, result_of, train

STEPS = 40
PAGE = 4096


def recipe_of(make: MakeRecipe, run: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "lora": {"lora_dropout": 0.05},
        "max_steps": STEPS,
        "epochs": STEPS,
    }
    return make(run, **{**settings, "micro_batch_size": 1, "keep_checkpoints": STEPS, **changes})


@pytest.fixture(scope="module")
def whole(make: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that had space enough. Read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(recipe_of(make, run))
    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "deadpan-test", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # A checkpoint that was read may still be mapped into memory, so not before it is let go.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all of a disk but some pages."""
    space = os.statvfs(disk)
    pages = space.f_bavail * space.f_frsize // PAGE - leave
    filler = disk / "filler"
    filler.write_bytes(bytes(pages * PAGE))
    return filler


class FillAfter(Watcher):
    """Fills a disk up to some pages after a step, or before the first one."""

    def __init__(self, disk: Path, step: int, leave: int) -> None:
        self._disk, self._step, self._leave = disk, step, leave

    def starting(self, *_: object) -> None:
        self.stepped({"step": 0})

    def stepped(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self._step:
            fill(self._disk, self._leave)


def stopped(recipe: Recipe, resume: bool = False, watcher: Watcher | None = None) -> DeadpanError:
    with pytest.raises(DeadpanError) as caught:
        train(recipe, resume, watcher)
    return caught.value


def assert_goes_on(recipe: Recipe, whole: Path) -> None:
    run = Path(recipe.run)
    for checkpoint in state.checkpoints(run):
        state.verify(checkpoint)
    assert train(recipe, resume=bool(state.checkpoints(run))).steps == STEPS
    assert course(run) == course(whole)
    assert identical(result_of(run / "latest"), result_of(whole / "latest"))


def test_checkpoints_that_fill_the_disk(make: MakeRecipe, disk: Path, whole: Path) -> None:
    recipe = recipe_of(make, disk / "run", save_every_steps=1)
    error = stopped(recipe)
    left = state.checkpoints(disk / "run")
    assert 1 <= len(left) < STEPS
    assert error.what.startswith(f"The checkpoint of step {len(left) + 1} could not be written: ")
    assert error.fix == (
        f"free some space, then deadpan train {disk / 'run' / 'recipe.yaml'} --resume; "
        f"{left[-1].name} is intact"
    )
    assert not list((disk / "run" / "checkpoints").glob(".*"))
    # Once more, with as little space: it says so again, and loses nothing.
    assert stopped(recipe, resume=True).fix == error.fix
    assert state.checkpoints(disk / "run") == left
    enlarge(disk)
    assert_goes_on(recipe, whole)


def test_the_disk_is_full_wherever_a_save_has_come_to(make: MakeRecipe, disk: Path) -> None:
    recipe = recipe_of(make, disk / "run", max_steps=2, save_every_steps=1)
    train(recipe_of(make, disk / "measured", max_steps=1))
    files = (disk / "measured" / "latest").resolve().iterdir()
    pages = sum(-(-path.stat().st_size // PAGE) for path in files)
    causes = set()
    for leave in range(0, pages, max(1, pages // 12)):
        error = stopped(recipe, bool(leave), FillAfter(disk, 2, leave))
        causes.add(error.what)
        assert [path.name for path in state.checkpoints(disk / "run")] == ["step-000001"]
        state.verify(disk / "run" / "latest")
        (disk / "filler").unlink()
    said = "The checkpoint of step 2 could not be written: "
    assert causes == {f"{said}No space left on device.", f"{said}the disk is full."}
    assert train(recipe, resume=True).steps == 2


def test_a_log_that_fills_the_disk(make: MakeRecipe, disk: Path, whole: Path) -> None:
    recipe = recipe_of(make, disk / "run", save_every_steps=STEPS)
    error = stopped(recipe, watcher=FillAfter(disk, 0, leave=1))
    assert error.what == "The run folder cannot be written: No space left on device."
    assert error.found == "0.0 MiB free"
    assert error.fix == "free some space, or choose another folder with run=runs/NAME"
    assert 0 < len((disk / "run" / "metrics.jsonl").read_bytes()) <= PAGE
    (disk / "filler").unlink()
    enlarge(disk)
    assert_goes_on(recipe, whole)


def test_a_run_that_finds_the_disk_full(make: MakeRecipe, disk: Path, whole: Path) -> None:
    recipe = recipe_of(make, disk / "run", save_every_steps=STEPS)
    train(recipe, watcher=SignalAfter(20))
    log = (disk / "run" / "metrics.jsonl").read_bytes()
    filler = fill(disk, 0)
    error = stopped(recipe, resume=True)
    assert error.what == "The run folder cannot be written: No space left on device."
    assert error.fix is not None
    assert error.fix.endswith("recipe.yaml --resume; step-000020 is intact")
    assert (disk / "run" / "metrics.jsonl").read_bytes() == log
    assert not list((disk / "run").glob(".*.tmp"))
    filler.unlink()
    enlarge(disk)
    assert_goes_on(recipe, whole)


class LimitFiles(Watcher):
    """From the first step on, no file may grow beyond a size."""

    def __init__(self, size: int) -> None:
        self._size = size

    def starting(self, *_: object) -> None:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, most))


@pytest.fixture
def any_size() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# TensorBoard writes in a thread of its own, which would tell its error by a traceback as it dies.
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("trackers", [[], ["tensorboard"]])
def test_metrics_that_cannot_be_written_end_the_run(
    make: MakeRecipe, tmp_path: Path, whole: Path, trackers: list[str]
) -> None:
    if trackers:
        pytest.importorskip("tensorboard")
    recipe = recipe_of(make, tmp_path / "run", save_every_steps=STEPS, trackers=trackers)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Too little for three lines, and the third is cut.
    error = stopped(recipe, watcher=LimitFiles(600))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.what == "The run folder cannot be written: File too large."
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    # TensorBoard's file, with more in it, is full earlier.
    assert 0 < len(log) < 600 if trackers else len(log) == 600
    assert_goes_on(recipe, whole)


@pytest.mark.usefixtures("any_size")
def test_jokes_that_cannot_be_written_end_the_run(make: MakeRecipe, tmp_path: Path) -> None:
    class Long(LimitFiles):
        def evaluating(self, done: int, total: int) -> None:
            # What the model says next goes beyond this, and its loss does not.
            (tmp_path / "run" / "jokes.jsonl").write_bytes(b" " * 2000)

    recipe = recipe_of(
        make,
        tmp_path / "run",
        data={"validation": 0.25},
        evaluation={"every_steps": 1, "max_new_tokens": 4},
    )
    assert stopped(recipe, watcher=Long(2001)).what == (
        "The run folder cannot be written: File too large."
    )
