"""The evaluations of a run: when one is due, how it is made on the way, and when they end the run."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from deadpan.data.records import Record
from deadpan.train import evaluation, memory, optimizers, state
from deadpan.train.run_folder import RunLog

if TYPE_CHECKING:
    from deadpan.train.loop import Trainer


class _Stopped(Exception):
    """Ends an evaluation in the middle, because the run is asked to stop."""


def is_due(trainer: "Trainer") -> bool:
    """Whether the step done last calls for an evaluation that has not been made."""
    step = trainer.position.step
    return step > trainer.position.evaluations.step and _is_called_for(trainer, step)


def count_after(trainer: "Trainer", done: int) -> int:
    """How many evaluations the steps after `done` call for, if the run goes to its end."""
    return sum(_is_called_for(trainer, step) for step in range(done + 1, trainer.plan.steps + 1))


def _is_called_for(trainer: "Trainer", step: int) -> bool:
    plan = trainer.plan
    every = evaluation.interval(trainer.recipe.evaluation, plan.steps_per_epoch)
    return bool(trainer.held_out) and (step % every == 0 or step == plan.steps)


def is_over(trainer: "Trainer") -> bool:
    """Whether no step is left, or the held-out loss has not fallen for too long."""
    patience = trainer.recipe.evaluation.early_stopping_patience
    tired = patience is not None and trainer.position.evaluations.since_best >= patience
    return tired or trainer.position.step == trainer.plan.steps


def evaluate(trainer: "Trainer", log: RunLog | None, stop: threading.Event) -> bool | None:
    """Measure the model as it would be saved now, and log what is found.

    Args:
        trainer: The run; its position takes note.
        log: Where it is logged, on rank 0.
        stop: Ends the evaluation when it is set.

    Returns:
        Whether the model is the best so far, or None if the evaluation was stopped in the middle.
    """

    def measure() -> tuple[state.Evaluations, bool | None]:
        tiles = trainer.processor.tile_policy.max_tiles
        with memory.explained(trainer.recipe, trainer.run, tiles):
            return _measure(trainer, log, stop)

    if trainer.parallel.shares_weights:
        # All measure the same records in step, and rank 0's word holds.
        measured = measure()
        evaluations, is_best = trainer.processes.lead(lambda: measured)
    else:
        evaluations, is_best = trainer.processes.lead(measure)
    trainer.position = replace(trainer.position, evaluations=evaluations)
    return is_best


def _measure(
    trainer: "Trainer", log: RunLog | None, stop: threading.Event
) -> tuple[state.Evaluations, bool | None]:
    before = trainer.position.evaluations

    def stops() -> bool:
        is_set = stop.is_set()
        return trainer.processes.any(is_set) if trainer.parallel.shares_weights else is_set

    if stops():
        return before, None

    def progress(done: int, total: int) -> None:
        if stops():
            raise _Stopped
        trainer.watcher.evaluating(done, total)

    began, step = time.perf_counter(), trainer.position.step
    try:
        figures = _figures(trainer, trainer.held_out, progress)
    except _Stopped:
        return before, None
    after, is_best, reason = evaluation.judge(before, step, figures)
    metrics = {
        "step": step,
        "epoch": round(step / trainer.plan.steps_per_epoch, 4),
        "samples": trainer.position.samples,
        **figures.to_json(),
        "best": is_best,
        "memorising": reason is not None,
        "evaluation_seconds": round(time.perf_counter() - began, 3),
    }
    if log:
        log.write(metrics)
        log.tell(step, figures.jokes)
    trainer.watcher.evaluated(metrics, figures.jokes)
    if reason is not None and not before.warned:
        trainer.watcher.memorising(step, reason)
    return after, is_best


def seconds(trainer: "Trainer", most: int) -> float:
    """How long an evaluation takes of the model as it is now.

    Args:
        trainer: The run.
        most: Held-out records whose loss is taken; the time of the others is reckoned from these.
    """
    taken = evaluation.some(trainer.held_out, most, trainer.recipe.seed)
    losses: list[float] = []

    def progress(done: int, total: int) -> None:
        if done == len(taken):  # the held-out records are the first of what is measured
            losses.append(time.perf_counter() - began)

    began = time.perf_counter()
    _figures(trainer, taken, progress)
    whole = time.perf_counter() - began
    return whole + losses[0] * (len(trainer.held_out) / len(taken) - 1)


def _figures(
    trainer: "Trainer", held_out: Sequence[Record], progress: evaluation.Progress
) -> evaluation.Figures:
    evaluator = evaluation.Evaluator(
        trainer.model,
        trainer.processor,
        trainer.objective,
        trainer.survey.records,
        held_out,
        trainer.recipe.evaluation,
        trainer.recipe.seed,
        trainer.plan.micro_batch_size,
        trainer.dtype,
    )
    trainer.loss.free()
    with optimizers.weights_to_use(trainer.optimizer):
        return evaluator.evaluate(progress)
