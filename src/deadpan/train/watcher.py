"""Who is told how a run goes: silently, or as progress bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deadpan.environment import GIB
from deadpan.evaluate.answers import Answer
from deadpan.train.plan import Plan
from deadpan.train.survey import Survey


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number of things in words: `1 record`, `2,000 records`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


class Watcher:
    """Takes note of nothing; subclasses do."""

    def loading(self, done: int, total: int) -> None:
        """Weights are being read."""

    def surveying(self, done: int, total: int) -> None:
        """Records are being looked at."""

    def referring(self, done: int, total: int) -> None:
        """The reference is being asked about preference pairs."""

    def starting(self, plan: Plan, done: int, survey: Survey, held_out: int) -> None:
        """The first step is about to begin, `done` steps having been done before."""

    def set_aside(self, checkpoints: Sequence[Path]) -> None:
        """Checkpoints after the one that the run goes on from have been renamed to these."""

    def caching(self, folder: Path, size: int, roomy: bool) -> None:
        """Pictures' features, of so many bytes, will be kept in a folder, or would be if it had room."""

    def measuring(self, what: str) -> None:
        """Something is being measured before the first step."""

    def stepped(self, metrics: dict[str, Any]) -> None:
        """A step is done."""

    def evaluating(self, done: int, total: int) -> None:
        """Held-out and training records are being measured, and pictures asked."""

    def evaluated(self, metrics: dict[str, Any], jokes: Sequence[Answer]) -> None:
        """An evaluation is done."""

    def memorising(self, step: int, reason: str) -> None:
        """An evaluation has found, for the first time, that the run memorises."""


class ProgressWatcher(Watcher):
    """Draws progress bars on a console; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressWatcher":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _advance(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, note="")
        self._progress.update(self._tasks[what], completed=done, total=total, note=note)

    def loading(self, done: int, total: int) -> None:
        self._advance("loading weights", done, total)

    def surveying(self, done: int, total: int) -> None:
        self._advance("checking records", done, total)

    def referring(self, done: int, total: int) -> None:
        self._advance("asking the reference", done, total)

    def measuring(self, what: str) -> None:
        if "measuring" not in self._tasks:
            self._tasks["measuring"] = self._progress.add_task("measuring", total=None, note="")
        self._progress.update(self._tasks["measuring"], advance=1, note=what)

    def starting(self, plan: Plan, done: int, survey: Survey, held_out: int) -> None:
        tokens = sum(survey.lengths)
        self._console.print(
            f"{counted(plan.records, 'record')}, {tokens:,} tokens an epoch, longest {max(survey.lengths):,}; "
            f"{counted(plan.steps, 'step')} of {counted(min(plan.samples_per_step, plan.records), 'sample')}"
        )
        if plan.groups is not None:
            self._console.print(
                f"the records share {counted(len(plan.groups), 'prefix', 'prefixes')}"
            )
        if held_out:
            self._console.print(f"{counted(held_out, 'record')} held out, to measure with")
        if survey.skipped:
            skipped = counted(len(survey.skipped), "record")
            self._console.print(f"[yellow]left out {skipped} for being too long")
        if done:
            self._console.print(f"resuming after step {done}")

        self._advance("training", done, plan.steps)

    def stepped(self, metrics: dict[str, Any]) -> None:
        note = (
            f"loss {metrics['loss']:.4f}  {metrics['samples_per_second']:.2f} samples/s  "
            f"{metrics['memory_gib']:.1f} GiB"
        )
        task = self._progress.tasks[self._tasks["training"]]
        self._advance("training", metrics["step"], int(task.total or 0), note)

    def set_aside(self, checkpoints: Sequence[Path]) -> None:
        for checkpoint in checkpoints:
            self._say(f"set aside, remove it when you like: {checkpoint}")

    def caching(self, folder: Path, size: int, roomy: bool) -> None:
        size_in_gib = f"{size / GIB:.1f} GiB"
        if roomy:
            self._say(f"pictures' features ({size_in_gib}) are kept in {folder}")
        else:
            self._say(f"pictures' features ({size_in_gib}) are not kept: {folder} has no room")

    def evaluating(self, done: int, total: int) -> None:
        self._advance("evaluating", done, total)

    def evaluated(self, metrics: dict[str, Any], jokes: Sequence[Answer]) -> None:
        parts = [
            f"held-out loss {metrics['eval_loss']:.4f}" + " (best so far)" * metrics["best"],
            f"of training records {metrics['train_loss']:.4f}",
        ]
        if "eval_preferred" in metrics:
            parts.append(f"prefers the liked answer of {metrics['eval_preferred']:.0%} of pairs")
        if "memorisation" in metrics:
            parts.append(f"{metrics['memorisation']:.0%} told by heart")
        self._say(f"step {metrics['step']}: " + ", ".join(parts))
        for joke in jokes[:1]:
            self._say(f"  {Path(joke.picture).name}: {joke.text}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def memorising(self, step: int, reason: str) -> None:
        self._console.print(
            f"[yellow]warning:[/] from step {step} on the run memorises: {escape(reason)}. The best "
            "checkpoint is kept; evaluation.early_stopping_patience=N would end the run.",
            soft_wrap=True,
        )
