"""The training loop.

One optimizer step is: gather the step's micro-batches, count their supervised tokens, and for each
micro-batch add the gradient of (sum of its tokens' losses) / (tokens of the whole step). So eight
samples at once and one sample eight times give the same gradient, however the tokens are spread, and
a short last step weighs each token like any other.
"""

import math
import resource
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from deadpan.checkpoints.load import choose_device, choose_dtype
from deadpan.checkpoints.source import Layout, detect, resolve
from deadpan.config.schema import Recipe
from deadpan.data.records import load as load_records
from deadpan.errors import DeadpanError
from deadpan.models.answer_loss import AnswerLoss
from deadpan.models.attention import kernels
from deadpan.processing.collate import Batch
from deadpan.processing.processor import load_processor
from deadpan.train import evaluation, memory, nonfinite, optimizers, state, trackers
from deadpan.train.loader import MicroBatches, batches, worker_count
from deadpan.train.model import build
from deadpan.train.plan import MicroBatch, Plan
from deadpan.train.rehearsal import choose_micro_batch_size
from deadpan.train.run_folder import RunLog, open_run
from deadpan.train.schedule import resolve as resolve_schedule
from deadpan.train.schedule import schedule
from deadpan.train.split import split
from deadpan.train.stopping import stop_signal
from deadpan.train.survey import survey
from deadpan.train.watcher import Watcher


class _Stopped(Exception):
    """Ends an evaluation in the middle, because the run is asked to stop."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        run: The run folder.
        checkpoint: Its newest checkpoint.
        steps: Optimizer steps done in all.
        loss: The last step's loss.
        interrupted: Whether it was stopped by a signal before its end.
        best: The step and the held-out loss of the best evaluation, if there was one.
        stopped_early: Whether it ended because the held-out loss had stopped falling.
    """

    run: Path
    checkpoint: Path
    steps: int
    loss: float
    interrupted: bool
    best: tuple[int, float] | None
    stopped_early: bool


class Trainer:
    """One training run.

    Args:
        recipe: What to do.
        resume: Go on from the run folder's newest checkpoint, or from the one named here.
        watcher: Is told what happens.
        dry_run: No run will follow, so one that is in the folder is not in the way.

    Raises:
        DeadpanError: If the data, the model, or the run folder is not in order.
    """

    def __init__(
        self, recipe: Recipe, resume: bool | str, watcher: Watcher, dry_run: bool = False
    ) -> None:
        self.watcher = watcher
        self.run = Path(recipe.run)
        self._checkpoint = None
        if resume or not dry_run:
            self._checkpoint, recipe = open_run(self.run, recipe, resume)
        self.recipe = recipe
        self._trackers = trackers.choose(recipe)
        self.device = choose_device(recipe.device)
        self.dtype = choose_dtype(recipe.precision, self.device)
        set_seed(recipe.seed)
        records = load_records(recipe.data.train, recipe.data.images)
        folder = resolve(recipe.model)
        if detect(folder) is Layout.ADAPTER:
            raise DeadpanError(
                "Training starts from a whole model, and this is an adapter.",
                where=folder,
                fix="export it with --layout hf and train on that, or resume its run with --resume",
            )
        self.processor = load_processor(folder, recipe.max_tiles, recipe.max_length)
        # Before the weights are read: that takes minutes, and a bad record none of them.
        surveyed = survey(records, self.processor, recipe.data.overlong, watcher.surveying)
        self.survey, self.held_out = split(recipe, surveyed, self.processor, watcher.surveying)
        self.plan = Plan(
            len(self.survey.records),
            recipe.epochs,
            # `auto` starts as the whole step at once; `divide` cuts it.
            recipe.effective_batch_size
            if recipe.micro_batch_size == "auto"
            else recipe.micro_batch_size,
            1 if recipe.micro_batch_size == "auto" else recipe.gradient_accumulation_steps,
            recipe.seed,
            recipe.max_steps,
        )
        with self._memory_explained():
            self.model = build(
                recipe, folder, self.processor, self.device, self.dtype, watcher.loading
            )
        self._prepare()

    def _prepare(self) -> None:
        recipe = self.recipe
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        if self.accelerator.num_processes > 1:
            raise DeadpanError(
                "Training runs in one process for now.",
                found=f"{self.accelerator.num_processes} processes",
                fix="start it with `deadpan train`, not through torchrun or accelerate launch",
            )
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        algorithm = recipe.optimizer.name
        _, warmup = resolve_schedule(recipe.schedule, algorithm)
        self.optimizer = optimizers.build(trainable, recipe.optimizer, warms_up=warmup > 0)
        self.scheduler = schedule(self.optimizer, recipe.schedule, self.plan.steps, algorithm)
        self.position = state.Position(
            records=state.digest(self.survey.records),
            held_out=state.digest(self.held_out) if self.held_out else "",
        )
        if self._checkpoint is not None:
            before = state.restore(self._checkpoint, self.model, self.optimizer, self.scheduler)
            self._check_records(before)
            self.position = before
        # Prepared without its optimizer: gradients are scaled and accumulated here, not by accelerate.
        self.loss = self.accelerator.prepare_model(AnswerLoss(self.model))
        self.trainable = trainable

    def _check_records(self, before: state.Position) -> None:
        now, data = self.position, self.recipe.data
        for what, file, expected, found in (
            ("records", data.train, before.records, now.records),
            ("held-out records", data.validation, before.held_out, now.held_out),
        ):
            if expected != found:
                raise DeadpanError(
                    f"The {what} are not those that the run was started with.",
                    where=str(file),
                    expected=f"SHA-256 {expected[:16]}... of texts and picture names",
                    found=f"{found[:16]}...",
                    fix="put the old file and pictures back, or start a new run with run=runs/NAME",
                )

    def train(self) -> Result:
        """Run to the end, or until SIGINT or SIGTERM asks to stop; either way the last step is saved."""
        if self.recipe.micro_batch_size == "auto":
            self.divide(choose_micro_batch_size(self))
        with self._memory_explained():
            return self._train()

    def divide(self, micro_batch_size: int) -> None:
        """Settle the micro-batch size; a step keeps its samples."""
        self.plan = self.plan.divided(micro_batch_size)
        settled = {
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation_steps": self.plan.accumulation,
        }
        self.recipe = self.recipe.model_copy(update=settled)

    def rehearse(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Do an optimizer step on micro-batches of any choice, which is neither logged nor saved."""
        prepare = MicroBatches(self.survey.records, self.processor, self.recipe.packing)
        self._step([(micro_batch, prepare.batch(micro_batch)) for micro_batch in micro_batches])

    def steps(self) -> Generator[dict[str, Any], None, None]:
        """Do the run's steps, yielding each one's metrics."""
        loader = batches(
            self.survey.records,
            self.processor,
            self.plan,
            self.position.step,
            self.recipe.packing,
            worker_count(self.recipe.data.workers, self.device),
        )
        return self._steps(loader)

    def _memory_explained(self) -> AbstractContextManager[None]:
        return memory.explained(self.recipe, self.run, self.processor.tile_policy.max_tiles)

    def _train(self) -> Result:
        recipe = self.recipe
        saved = self._checkpoint
        with (
            RunLog(self.run, recipe, self.position) as log,
            trackers.Trackers(
                self.accelerator, self._trackers, self.run, recipe, self.position.step
            ) as tracked,
            stop_signal() as stop,
        ):
            log.also(tracked.write)
            self.watcher.set_aside(log.set_aside)
            metrics = log.last_step or {"loss": math.nan}
            self.watcher.starting(self.plan, self.position.step, self.survey, len(self.held_out))
            # It was stopped before, or in, an evaluation.
            if self._is_due() and self._evaluate(log, stop) is not None:
                saved = self._save()
            for metrics in () if self._is_over() else nonfinite.kept(self.steps(), self.run):
                step = metrics["step"]
                if step % recipe.log_every_steps == 0 or step == self.plan.steps:
                    log.write(metrics)
                self.watcher.stepped(metrics)
                is_best = self._is_due() and not stop.is_set() and self._evaluate(log, stop)
                saved = self._save() if is_best or step % recipe.save_every_steps == 0 else None
                if stop.is_set() or self._is_over():
                    break
            if saved is None:
                saved = self._save()
        best = self.position.evaluations.best
        return Result(
            self.run,
            saved,
            self.position.step,
            metrics["loss"],
            interrupted=self._is_due() or not self._is_over(),
            best=None if best is None else (best.step, best.held_out),
            stopped_early=self._is_over() and self.position.step < self.plan.steps,
        )

    def _is_due(self) -> bool:
        """Whether the step done last calls for an evaluation that has not been made."""
        step = self.position.step
        every = evaluation.interval(self.recipe.evaluation, self.plan.steps_per_epoch)
        return (
            bool(self.held_out)
            and step > self.position.evaluations.step
            and (step % every == 0 or step == self.plan.steps)
        )

    def _is_over(self) -> bool:
        """Whether no step is left, or the held-out loss has not fallen for too long."""
        patience = self.recipe.evaluation.early_stopping_patience
        tired = patience is not None and self.position.evaluations.since_best >= patience
        return tired or self.position.step == self.plan.steps

    def _evaluate(self, log: RunLog, stop: threading.Event) -> bool | None:
        """Measure the model as it would be saved now; whether it is the best so far, or None if stopped amid it."""

        def progress(done: int, total: int) -> None:
            if stop.is_set():
                raise _Stopped
            self.watcher.evaluating(done, total)

        began, step = time.perf_counter(), self.position.step
        evaluator = evaluation.Evaluator(
            self.model,
            self.processor,
            self.survey.records,
            self.held_out,
            self.recipe.evaluation,
            self.recipe.seed,
            self.plan.micro_batch_size,
            self.dtype,
        )
        try:
            with optimizers.weights_to_use(self.optimizer):
                figures = evaluator.evaluate(progress)
        except _Stopped:
            return None
        before = self.position.evaluations
        after, is_best, reason = evaluation.judge(before, step, figures)
        self.position = replace(self.position, evaluations=after)
        metrics = {
            "step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 4),
            "samples": self.position.samples,
            **figures.to_json(),
            "best": is_best,
            "memorising": reason is not None,
            "evaluation_seconds": round(time.perf_counter() - began, 3),
        }
        log.write(metrics)
        log.tell(step, figures.jokes)
        self.watcher.evaluated(metrics, figures.jokes)
        if reason is not None and not before.warned:
            self.watcher.memorising(step, reason)
        return is_best

    def _steps(self, loader: DataLoader) -> Generator[dict[str, Any], None, None]:
        began = time.perf_counter()
        waited = 0.0
        step: list[tuple[MicroBatch, Batch]] = []
        for micro_batch, batch in loader:
            if isinstance(batch, DeadpanError):
                raise batch
            step.append((micro_batch, batch))
            if not micro_batch.last:
                continue
            waited = time.perf_counter() - began
            metrics = self._step(step)
            now = time.perf_counter()
            seconds = now - began
            samples = sum(len(micro_batch.indices) for micro_batch, _ in step)
            tokens = sum(batch.tokens for _, batch in step)
            self.position = replace(
                self.position,
                step=step[0][0].step,
                samples=self.position.samples + samples,
                seconds=self.position.seconds + seconds,
            )
            yield {
                **metrics,
                "samples": self.position.samples,
                "samples_per_second": round(samples / seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "data_wait_fraction": round(waited / seconds, 4),
                "memory_gib": round(self._memory(), 3),
            }
            # What was done meanwhile, saving and evaluating, is no part of the next step.
            began = time.perf_counter()
            step = []

    def _step(self, step: list[tuple[MicroBatch, Batch]]) -> dict[str, Any]:
        supervised = sum(batch.supervised for _, batch in step)
        total = torch.zeros((), device=self.device)
        for _, batch in step:
            on_device = batch.to(self.device)
            autocast = torch.autocast(
                self.device.type, self.dtype, enabled=self.dtype is torch.bfloat16
            )
            with kernels():
                with autocast:
                    loss = self.loss(
                        on_device.input_ids,
                        on_device.labels,
                        on_device.position_ids,
                        on_device.pixel_values,
                    )
                # Under the same kernels, since checkpointed layers run again here.
                self.accelerator.backward(loss / supervised)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.recipe.optimizer.max_grad_norm)
        mean = (total / supervised).item()
        if not (math.isfinite(mean) and math.isfinite(norm.item())):
            records = [self.survey.records[i] for part, _ in step for i in part.indices]
            raise nonfinite.NotFinite(
                step[0][0].step,
                mean,
                norm.item(),
                nonfinite.one_by_one(self.model, self.processor, records, self.device, self.dtype),
            )
        rates = {
            "lr": self.scheduler.get_last_lr()[0],
            **optimizers.estimates(self.optimizer),
        }
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step[0][0].step,
            "epoch": round(step[0][0].step / self.plan.steps_per_epoch, 4),
            "loss": mean,
            **rates,
            "grad_norm": norm.item(),
        }

    def _memory(self) -> float:
        """Peak memory in GiB: of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _save(self) -> Path:
        return state.save(
            self.run,
            self.position,
            self.model,
            self.processor,
            self.optimizer,
            self.scheduler,
            self.recipe.quantization,
            self.recipe.keep_checkpoints,
        )
