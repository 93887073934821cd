"""A run's folder: whether it may be written, and what a run logs there."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from deadpan.config.loader import dump_recipe, inline_yaml, load_recipe
from deadpan.config.schema import Recipe
from deadpan.environment import describe
from deadpan.errors import DeadpanError, refuse_unwritable
from deadpan.evaluate.answers import Answer
from deadpan.processing.tokenizer import read_json
from deadpan.train import state

_MAY_CHANGE = {
    "attention", "data.workers", "device", "feature_cache", "gradient_checkpointing", "keep_checkpoints",
    "log_every_steps", "run", "save_every_steps", "trackers",
}  # fmt: skip
"""Recipe keys that a resumed run may have otherwise than before; so may all of `evaluation`."""
_CUTS_A_STEP = {"micro_batch_size", "gradient_accumulation_steps", "samples_per_step"}
"""Recipe keys that a resumed run may have otherwise as long as a step has as many samples."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_of(checkpoint: Path) -> Path | None:
    """The run that a model comes from, as far as it is still here.

    Args:
        checkpoint: A checkpoint's folder, as `deadpan.checkpoints.source.resolve` gives it, or an
            export's, which says what it was made of.
    """
    if (export := checkpoint / "export.json").is_file():
        checkpoint = Path(read_json(export).get("source", ""))
    run = checkpoint.parent.parent
    if checkpoint.parent.name == "checkpoints" and (run / "recipe.yaml").is_file():
        return run
    return None


def open_run(
    run: Path, recipe: Recipe, resume: bool | str, processes: int = 1
) -> tuple[Path | None, Recipe]:
    """The checkpoint to resume from, or None for a fresh run; and the recipe.

    A resumed run whose recipe says micro_batch_size: auto goes on with the size that was chosen at first.

    Args:
        run: The run folder.
        recipe: What is to be trained.
        resume: Whether to go on with the run, from its newest checkpoint or from the one that is named.
        processes: How many train.

    Raises:
        DeadpanError: If a fresh run would overwrite one or cannot be written, or there is nothing to resume, or
            another recipe was trained, or by another number of processes.
    """
    state.recover(run)
    existing = state.checkpoints(run)
    if not resume:
        if existing:
            raise DeadpanError(
                "The run folder holds a run already.",
                where=run,
                found=f"checkpoints up to {existing[-1].name}",
                fix="add --resume to go on with it, or choose another folder with run=runs/NAME",
            )
        refuse_unwritable("run folder", run / "recipe.yaml")
        return None, recipe
    if not existing:
        raise DeadpanError(
            "There is no checkpoint to resume from.", where=run, fix="leave out --resume to start"
        )
    checkpoint = state.named(run, resume) if isinstance(resume, str) else existing[-1]
    state.verify(checkpoint)
    if processes != (before_it := state.position(checkpoint).processes):
        raise DeadpanError(
            "The run was started with another number of processes.",
            where=checkpoint,
            expected=_processes(before_it),
            found=_processes(processes),
            fix="resume with "
            + ("deadpan train" if before_it == 1 else f"torchrun, {before_it} processes in all")
            + ", or start a new run with run=runs/NAME",
        )
    started = load_recipe(run / "recipe.yaml")
    may_change = set(_MAY_CHANGE)
    if recipe.effective_batch_size == started.effective_batch_size:
        may_change |= _CUTS_A_STEP
        if recipe.micro_batch_size == "auto":
            recipe = recipe.model_copy(update={key: getattr(started, key) for key in _CUTS_A_STEP})
    before, now = leaves(started), leaves(recipe)
    changed = [
        key
        for key in now
        if key not in may_change and not key.startswith("evaluation.") and now[key] != before[key]
    ]
    if changed:
        raise DeadpanError(
            "The recipe is not the one that the run was started with.",
            where=run / "recipe.yaml",
            expected="; ".join(f"{key}: {inline_yaml(before[key])}" for key in changed),
            found="; ".join(f"{key}: {inline_yaml(now[key])}" for key in changed),
            fix=f"resume with {state.resume_command(run)}, or start a new run",
        )
    return checkpoint, recipe


def _processes(number: int) -> str:
    return f"{number} process" + "es" * (number > 1)


def leaves(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": leaf for inner, leaf in value.items()}
        else:
            found[key] = value
    return found


def is_full(error: BaseException | None) -> bool:
    """Whether the system says that no more may be written."""
    return isinstance(error, OSError) and error.errno in _FULL


@contextmanager
def writing(run: Path, only_full: bool = False) -> Iterator[None]:
    """Turn what the system says when a file cannot be written into one message.

    Args:
        run: The run folder.
        only_full: Leave any other error than a full disk alone: one of the network is an OSError too.
    """
    try:
        yield
    except OSError as error:
        if only_full and not is_full(error):
            raise
        # A failure may name the temporary file, and that of an open file names none.
        saved = state.checkpoints(run) if run.is_dir() else []
        raise DeadpanError(
            f"The run folder cannot be written: {error.strerror or error}.",
            where=error.filename or run,
            found=f"{shutil.disk_usage(run).free / 2**20:.1f} MiB free" if run.is_dir() else None,
            fix=f"free some space, then {state.resume_command(run)}; {saved[-1].name} is intact"
            if saved
            else "free some space, or choose another folder with run=runs/NAME",
        ) from None


@contextmanager
def closing(run: Path, error: BaseException | None, only_full: bool = False) -> Iterator[None]:
    """Like `writing`, at the end of a run: a file tries once more to write what it could not.

    Args:
        run: The run folder.
        error: What the run ends by, if anything; a second failure is then not told.
        only_full: As for `writing`.
    """
    try:
        with writing(run, only_full):
            yield
    except DeadpanError:
        if error is None:
            raise


class RunLog:
    """What a run writes beside its checkpoints: recipe, environment, metrics, and what it said.

    What was logged after the checkpoint resumed from is dropped: those steps are done again. Newer
    checkpoints, if an older one was asked for, are set aside.

    Args:
        run: The run folder.
        recipe: The resolved recipe.
        position: Where the run begins or goes on.

    Raises:
        DeadpanError: If the folder cannot be written; so do the methods.

    Attributes:
        set_aside: The checkpoints that were.
    """

    def __init__(self, run: Path, recipe: Recipe, position: state.Position) -> None:
        metrics, jokes = run / "metrics.jsonl", run / "jokes.jsonl"
        evaluated = position.evaluations.step
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
            self.set_aside = state.set_aside(run, position.step)
            state.point_best(run, position)
            state.write_whole(run / "recipe.yaml", dump_recipe(recipe))
            environment = json.dumps(describe(), ensure_ascii=False, indent=2)
            state.write_whole(run / "environment.json", environment + "\n")
            kept = [
                line
                for line in _lines(metrics)
                if line["step"] <= (evaluated if "eval_loss" in line else position.step)
            ]
            state.write_whole(metrics, "".join(map(_line, kept)))
            if jokes.exists():
                told = [line for line in _lines(jokes) if line["step"] <= evaluated]
                state.write_whole(jokes, "".join(map(_line, told)))
            self._metrics = metrics.open("a", encoding="utf-8")
        steps = [line for line in kept if "loss" in line]
        self.last_step: dict[str, Any] | None = steps[-1] if steps else None
        """The metrics of the last step before the first one to come."""
        self._run, self._jokes = run, jokes
        self._others: list[Callable[[dict[str, Any]], None]] = []

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with closing(self._run, error):
            self._metrics.close()

    def also(self, write: Callable[[dict[str, Any]], None]) -> None:
        """Hand what is logged to another writer too."""
        self._others.append(write)

    def write(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step or of an evaluation."""
        with writing(self._run):
            self._metrics.write(_line(metrics))
            self._metrics.flush()
        for other in self._others:
            other(metrics)

    def tell(self, step: int, jokes: tuple[Answer, ...]) -> None:
        """Log what the model said about the probe pictures."""
        with writing(self._run), self._jokes.open("a", encoding="utf-8") as file:
            for joke in jokes:
                said = {"picture": joke.picture, "prompt": joke.question, "answer": joke.text}
                file.write(_line({"step": step, **said}))


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _lines(log: Path) -> list[dict[str, Any]]:
    """The lines of a log; a half-written last one, left by a crash, is passed over."""
    lines: list[dict[str, Any]] = []
    if log.exists():
        for text in log.read_text(encoding="utf-8").split("\n"):
            # Not splitlines, which would also cut at U+2028, as a joke may hold it.
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
