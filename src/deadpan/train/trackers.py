"""Experiment trackers, through accelerate: the figures of metrics.jsonl where people already look.

A resumed run goes on in the tracker's old run. Which run that is, is kept in the run folder
(`trackers.json`); TensorBoard needs no more than its folder and the step from which on its old
lines no longer count.
"""

import importlib.util
import json
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    SwanLabTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.train.run_folder import closing, is_full, leaves, writing
from deadpan.train.state import write_whole

_PROJECT = "deadpan"
_IDS = "trackers.json"


def choose(recipe: Recipe) -> list[str]:
    """The names of the trackers to write to, `auto` resolved.

    Raises:
        DeadpanError: If one that is named is not installed.
    """
    if recipe.trackers == "auto":
        return ["tensorboard"] if _is_installed("tensorboard") else []
    missing = [name for name in recipe.trackers if not _is_installed(name)]
    if missing:
        raise DeadpanError(
            f"The tracker {' and '.join(missing)} is not installed."
            if len(missing) == 1
            else f"The trackers {' and '.join(missing)} are not installed.",
            where="trackers",
            fix=f"pip install {' '.join(missing)}, or set trackers=[]",
        )
    return list(dict.fromkeys(recipe.trackers))


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class Trackers:
    """The trackers of a run; a context manager that closes them.

    Args:
        accelerator: Runs them.
        names: What `choose` returned.
        run: The run folder, which gives the tracked run its name.
        recipe: Is recorded as the run's configuration.
        done: Steps that were done before; what was tracked after them is done again.
    """

    def __init__(
        self, accelerator: Accelerator, names: Sequence[str], run: Path, recipe: Recipe, done: int
    ) -> None:
        self._accelerator, self._run = accelerator, run
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_ends
        try:
            with writing(run, only_full=True):
                self._start(names, recipe, done)
        except BaseException:
            threading.excepthook = self._excepthook
            raise

    def _start(self, names: Sequence[str], recipe: Recipe, done: int) -> None:
        accelerator, run = self._accelerator, self._run
        ids = _ids(run) if done else {}
        known = dict(ids)
        accelerator.log_with = [_tracker(name, run, ids, done) for name in names]
        accelerator.init_trackers(_PROJECT)
        for tracker in accelerator.trackers:
            if tracker.name == MLflowTracker.name:
                ids[tracker.name] = tracker.tracker.info.run_id
            # TensorBoard would make a second run of it, and what is known is not said twice.
            if tracker.name != TensorBoardTracker.name and tracker.name not in known:
                tracker.store_init_configuration(_configuration(recipe))
        if ids != known:
            write_whole(run / _IDS, json.dumps(ids, indent=2) + "\n")

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with closing(self._run, error, only_full=True):
                # Not end_training, which would end the process group as well.
                for tracker in self._accelerator.trackers:
                    tracker.finish()
        finally:
            threading.excepthook = self._excepthook

    def _thread_ends(self, arguments: threading.ExceptHookArgs) -> None:
        """Leave a full disk to be told by the next call, which TensorBoard's thread hands its error to."""
        if not is_full(arguments.exc_value):
            self._excepthook(arguments)

    def write(self, metrics: dict[str, Any]) -> None:
        """Track the metrics of a step or of an evaluation."""
        figures = {name: float(value) for name, value in metrics.items() if name != "step"}
        with writing(self._run, only_full=True):
            self._accelerator.log(figures, step=metrics["step"])


def _tracker(name: str, run: Path, ids: dict[str, str], done: int) -> GeneralTracker:
    """A tracker that starts a new run, or goes on with the one whose id is known."""
    label = run.resolve().name
    if name == TensorBoardTracker.name:
        # Lines from this step on, of steps that will be done again, are hidden.
        return TensorBoardTracker("", run / "tensorboard", purge_step=done + 1 if done else None)
    if name == MLflowTracker.name:
        return MLflowTracker(_PROJECT, run_id=ids.get(name), run_name=label)
    if name == TrackioTracker.name:
        # It knows runs by their names; two folders of one name must not become one run.
        ids.setdefault(name, f"{label}-{_new_id()}")
        return TrackioTracker(_PROJECT, name=ids[name], resume="allow")
    ids.setdefault(name, _new_id())
    kind = {WandBTracker.name: WandBTracker, SwanLabTracker.name: SwanLabTracker}[name]
    words = {"name": label} if kind is WandBTracker else {"experiment_name": label}
    return kind(_PROJECT, id=ids[name], resume="allow", **words)


def _new_id() -> str:
    # SwanLab wants 21 lower-case letters and digits, and the others take them.
    return uuid.uuid4().hex[:21]


def _ids(run: Path) -> dict[str, str]:
    path = run / _IDS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _configuration(recipe: Recipe) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {
        key: value if isinstance(value, plain) else json.dumps(value)
        for key, value in leaves(recipe).items()
    }
