"""The training loop.

One optimizer step is: gather the step's micro-batches, count their supervised tokens, and for each
micro-batch add the gradient of (sum of its tokens' losses) / (tokens of the whole step). So eight
samples at once and one sample eight times give the same gradient, however the tokens are spread, and
a short last step weighs each token like any other. Of several processes each takes some of the
micro-batches, and their gradients are summed, which is the same gradient again.
"""

import math
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from deadpan.checkpoints.load import choose_dtype
from deadpan.config.schema import Recipe
from deadpan.data.records import Record
from deadpan.environment import GIB
from deadpan.errors import DeadpanError
from deadpan.models import lora
from deadpan.models.answer_loss import plain_model
from deadpan.models.attention import kernels
from deadpan.processing.collate import Batch
from deadpan.processing.prefix import shared_prefixes
from deadpan.train import (
    memory,
    nonfinite,
    optimizers,
    parallel,
    references,
    state,
    trackers,
    validation,
)
from deadpan.train.features import FeatureCache
from deadpan.train.loader import (
    MicroBatches,
    Prepared,
    batches,
    blank,
    prepared,
    share,
    worker_count,
)
from deadpan.train.model import TrainingLoss, build
from deadpan.train.objective import Answers, Objective, Preferences
from deadpan.train.plan import MicroBatch, Plan
from deadpan.train.processes import Processes, check_recipe, without_traceback
from deadpan.train.references import References
from deadpan.train.rehearsal import choose_micro_batch_size
from deadpan.train.run_folder import RunLog, open_run
from deadpan.train.schedule import resolve as resolve_schedule
from deadpan.train.schedule import schedule
from deadpan.train.split import split
from deadpan.train.start import open_model, with_adapter
from deadpan.train.stopping import stop_signal
from deadpan.train.survey import Survey
from deadpan.train.watcher import Watcher

_SEED_STRIDE = 1_000_003
"""Keeps the ranks' seeds apart, and those of runs with neighbouring seeds."""


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
        self.processes = Processes(recipe.device)
        recipe = self.processes.together(lambda: with_adapter(recipe))
        self.accelerator, self.device = self.processes.accelerator, self.processes.device
        # Rank 0 alone tells how it goes.
        self.watcher = watcher = watcher if self.processes.rank == 0 else Watcher()
        self.run = Path(recipe.run)
        self.checkpoint = None
        world = self.processes.world
        if resume or not dry_run:
            self.checkpoint, recipe = self.processes.lead(
                lambda: open_run(self.run, recipe, resume, world)
            )
        if world > 1:
            self.processes.together(lambda: check_recipe(recipe, world, dry_run))
        self.recipe = recipe
        self.parallel = self.processes.together(lambda: parallel.choose(recipe, self.processes))
        self._trackers = self.processes.lead(lambda: trackers.choose(recipe))
        self.dtype = choose_dtype(recipe.precision, self.device)
        set_seed(recipe.seed)
        folder, self.processor = self.processes.together(lambda: open_model(recipe))
        # Before the weights are read: that takes minutes, and a bad record none of them.
        self.survey, self.held_out = self.processes.lead(self._look_at_records)
        self.plan = Plan(
            len(self.survey.records),
            recipe.epochs,
            # `auto` starts as the whole step at once; `divide` cuts it.
            recipe.effective_batch_size
            if recipe.micro_batch_size == "auto"
            else recipe.micro_batch_size,
            1 if recipe.micro_batch_size == "auto" else recipe.gradient_accumulation_steps * world,
            recipe.seed,
            recipe.max_steps,
            shared_prefixes(self.survey.records) if recipe.shared_prefix else None,
        )
        self.processes.together(lambda: self._build_model(folder))
        found = None
        if recipe.objective == "dpo":
            self.processes.together(self._build_loss)
            # Before a checkpoint's weights take the place of those that the run starts from.
            found = references.of_run(self, asked=not dry_run)
        self.processes.together(self._restore_weights)
        self.processes.check_equal(self._trained())
        self.processes.together(self._build_optimizer)
        if found is None:
            # Not before the weights are in parts, if they are to be; with pairs they are not.
            self.processes.together(self._build_loss)
        self.processes.together(self._restore)
        self.objective = self._objective(found)

    def _look_at_records(self) -> tuple[Survey, list[Record]]:
        return split(self.recipe, self.processor, self.watcher.surveying)

    def _build_model(self, folder: Path) -> None:
        recipe, rank = self.recipe, self.processes.rank
        with self._memory_explained():
            self.model = build(
                recipe,
                folder,
                self.processor,
                self.parallel.loads_on,
                self.dtype,
                self.watcher.loading,
            )
        if rank:
            # Fresh weights are the same in all ranks; what dropout leaves out must not be.
            set_seed((recipe.seed + _SEED_STRIDE * rank) % 2**32)

    def _restore_weights(self) -> None:
        rank = self.processes.rank
        if self.checkpoint is not None:
            if rank and not self.checkpoint.is_dir():
                raise DeadpanError(
                    "A host has not the checkpoint to resume from.",
                    where=self.checkpoint.absolute(),
                    found=f"rank {rank} finds no such folder",
                    fix="put the run folder where all hosts see it, under the same path",
                )
            state.restore_weights(self.checkpoint, self.model)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _build_optimizer(self) -> None:
        recipe, algorithm = self.recipe, self.recipe.optimizer.name
        with self._memory_explained():
            self.parallel.share_model(self.model)
        self.trainable = self._trained()
        _, warmup = resolve_schedule(recipe.schedule, algorithm)
        self.optimizer = optimizers.build(self.trainable, recipe.optimizer, warms_up=warmup > 0)
        self.scheduler = schedule(self.optimizer, recipe.schedule, self.plan.steps, algorithm)
        self.parallel.share_optimizer(self.optimizer, self.trainable)

    def _build_loss(self) -> None:
        # Prepared without its optimizer and without DistributedDataParallel: gradients are scaled,
        # accumulated and summed here.
        self.loss = TrainingLoss(
            self.recipe,
            self.model,
            self.processor,
            self.device,
            self.dtype,
            lambda module: self.accelerator.prepare_model(module, evaluation_mode=True),
        )
        self.cache = self._roomy(self.loss.cache)
        records, packing = self.survey.records, self.recipe.packing
        self.prepare = MicroBatches(records, self.processor, packing, self.cache)

    def _objective(self, found: References | None) -> Objective:
        if found is None:
            return Answers(self.model, self.processor, self.loss)
        return Preferences(self.loss, self.prepare, self.recipe.dpo, self.survey.records, found)

    def _restore(self) -> None:
        self.position = state.Position(
            records=state.digest(self.survey.records),
            held_out=state.digest(self.held_out) if self.held_out else "",
            processes=self.processes.world,
        )
        if self.checkpoint is not None:
            before = state.restore(
                self.checkpoint, self.parallel.load_optimizer, self.scheduler, self.processes.rank
            )
            self._check_records(before)
            self.position = before

    def _roomy(self, cache: FeatureCache | None) -> FeatureCache | None:
        """The cache, if the disk has room for what it will hold."""
        if cache is None:
            return None
        tiles = sum(size.tiles for size in self.survey.sizes)
        size = cache.bytes_of(tiles, plain_model(self.model))
        roomy = cache.has_room(size)
        self.watcher.caching(cache.folder, size, roomy)
        return cache if roomy else None

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
        with self.processes.losses_explained(), self._memory_explained():
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
        self._step(1, [self.prepare.batch(micro_batch) for micro_batch in micro_batches])

    def steps(self) -> Generator[dict[str, Any], None, None]:
        """Do the run's steps, yielding each one's metrics."""
        loader = batches(
            self.survey.records,
            self.processor,
            self.plan,
            self.position.step,
            self.recipe.packing,
            worker_count(self.recipe.data.workers, self.device, self.processes.local),
            self.processes.rank,
            self.processes.world,
            self.cache,
            pin_memory=self.device.type == "cuda",
            pictured=self.parallel.in_step,
        )
        with prepared(loader) as ready:
            yield from self._steps(ready)

    def _memory_explained(self) -> AbstractContextManager[None]:
        return memory.explained(self.recipe, self.run, self.processor.tile_policy.max_tiles)

    def _train(self) -> Result:
        recipe = self.recipe
        saved = self.checkpoint
        with ExitStack() as logs, stop_signal() as stop:
            log: RunLog | None = None

            def open_log() -> dict[str, Any] | None:
                nonlocal log
                log = self._open_log(logs)
                return log.last_step

            metrics = self.processes.lead(open_log) or {"loss": math.nan}
            self.watcher.starting(self.plan, self.position.step, self.survey, len(self.held_out))
            # It was stopped before, or in, an evaluation.
            if validation.is_due(self) and validation.evaluate(self, log, stop) is not None:
                saved = self._save()
            steps = nonfinite.kept(self.steps(), self.run) if log else self.steps()
            for metrics in () if validation.is_over(self) else steps:
                step = metrics["step"]
                if log and (step % recipe.log_every_steps == 0 or step == self.plan.steps):
                    log.write(metrics)
                self.watcher.stepped(metrics)
                is_best = validation.is_due(self) and validation.evaluate(self, log, stop)
                saved = self._save() if is_best or step % recipe.save_every_steps == 0 else None
                # A signal reaches the ranks at different moments.
                if self.processes.any(stop.is_set()) or validation.is_over(self):
                    break
            if saved is None:
                saved = self._save()
        best = self.position.evaluations.best
        return Result(
            self.run,
            saved,
            self.position.step,
            metrics["loss"],
            interrupted=validation.is_due(self) or not validation.is_over(self),
            best=None if best is None else (best.step, best.held_out),
            stopped_early=validation.is_over(self) and self.position.step < self.plan.steps,
        )

    def _open_log(self, logs: ExitStack) -> RunLog:
        recipe, position = self.recipe, self.position
        log = logs.enter_context(RunLog(self.run, recipe, position))
        tracked = logs.enter_context(
            trackers.Trackers(self.accelerator, self._trackers, self.run, recipe, position.step)
        )
        log.also(tracked.write)
        self.watcher.set_aside(log.set_aside)
        return log

    def _steps(self, ready: Prepared) -> Generator[dict[str, Any], None, None]:
        began = time.perf_counter()
        rank, world = self.processes.rank, self.processes.world
        nothing = blank(self.processor) if self.parallel.in_step else None
        for whole in self.plan.steps_after(self.position.step):
            number = len(share(whole, rank, world))
            step = [batch for _, batch in islice(ready, number)]
            if nothing is not None:
                # In a short step some have a micro-batch less than rank 0.
                step += [nothing] * (len(share(whole, 0, world)) - number)
            waited = time.perf_counter() - began
            metrics, tokens = self._step(whole[0].step, step)
            seconds = time.perf_counter() - began
            samples = sum(len(micro_batch.indices) for micro_batch in whole)
            memory_gib = self.processes.largest(memory.Meter(self.device).peak() / GIB)
            self.position = replace(
                self.position,
                step=whole[0].step,
                samples=self.position.samples + samples,
                seconds=self.position.seconds + seconds,
            )
            yield {
                **metrics,
                "samples": self.position.samples,
                "samples_per_second": round(samples / seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "data_wait_fraction": round(waited / seconds, 4),
                "memory_gib": round(memory_gib, 3),
            }
            # What was done meanwhile, saving and evaluating, is no part of the next step.
            began = time.perf_counter()

    def _step(
        self, step: int, answers: Sequence[Batch | DeadpanError]
    ) -> tuple[dict[str, Any], int]:
        """Do an optimizer step with this process's share of it; its metrics, and the tokens of all."""
        failures = [batch for batch in answers if isinstance(batch, DeadpanError)]
        share = [batch for batch in answers if not isinstance(batch, DeadpanError)]
        supervised, tokens, pictured, failed = self.processes.sum(
            sum(self.objective.weight(batch) for batch in share),
            sum(batch.tokens for batch in share),
            sum(batch.pictured for batch in share),
            len(failures),
        )
        if failed:
            self.processes.share(failures[0] if failures else None)
        loss = self._gradients(share, supervised)
        own = self.objective.figures()
        figures = self.processes.gather(own) if own else []
        if not pictured:
            # Blank pictures left zeros, by which an optimizer would move the projector all the same.
            for parameter in lora.projector_parameters(self.model):
                parameter.grad = None
        norm = self.parallel.clip(self.recipe.optimizer.max_grad_norm)
        # Not before: to read it is to wait for the device, which is to have the next work by then.
        mean = loss.item()
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise self._not_finite(step, share, mean, norm)
        rates = {
            "lr": self.scheduler.get_last_lr()[0],
            **optimizers.estimates(self.optimizer),
        }
        self.parallel.step()
        self.scheduler.step()
        metrics = {
            "step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 4),
            "loss": mean,
            **self.objective.metrics(figures),
            **rates,
            "grad_norm": norm,
        }
        return metrics, tokens

    def _gradients(self, share: Sequence[Batch], supervised: int) -> torch.Tensor:
        """The gradients of the whole step's mean loss, in the trainable parameters; the loss."""
        if self.processes.world == 1 or self.parallel.in_step:
            # In step, a process that fails ends, and the launcher ends those that wait for it.
            own = self._accumulate(share, supervised)
            total, _ = self.parallel.sum(own, failed=False)
            return total / supervised
        total, failure = torch.zeros((), device=self.device), None
        try:
            with self._memory_explained():
                total = self._accumulate(share, supervised)
        except DeadpanError as error:
            failure = without_traceback(error)
        total, failed = self.parallel.sum(total, failure is not None)
        if failed:
            self.processes.share(failure)
        return total / supervised

    def _accumulate(self, share: Sequence[Batch], supervised: int) -> torch.Tensor:
        """Add up this process's gradients; returns the sum of its tokens' losses."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(share, start=1):
            with kernels():
                loss = self.objective.loss(batch)
                # Under the same kernels, since checkpointed layers run again here.
                self.parallel.backward(loss / supervised, last=number == len(share))
            total += loss.detach()
        return total

    def _not_finite(
        self, step: int, share: Sequence[Batch], loss: float, norm: float
    ) -> DeadpanError:
        by_name = {record.name: record for record in self.survey.records}
        names = [name for batch in share for name in dict.fromkeys(batch.names)]
        if self.parallel.shares_weights:
            # All go through all of them in step.
            names = [name for of_rank in self.processes.gather(names) for name in of_rank]
        own = nonfinite.one_by_one(
            self.model,
            self.objective,
            self.processor,
            [by_name[name] for name in names],
            self.parallel.gradient_norm,
        )
        readings = own
        if not self.parallel.shares_weights:
            readings = [reading for of_rank in self.processes.gather(own) for reading in of_rank]
        return self.processes.shared(nonfinite.NotFinite(step, loss, norm, readings))

    def _save(self) -> Path:
        _, *others = self.processes.gather(
            state.random_state(own_gpu=True) if self.processes.rank else None
        )
        gathered = self.parallel.gathered(self.model)
        return self.processes.lead(
            lambda: state.save(
                self.run,
                self.position,
                self.model,
                self.processor,
                self.optimizer,
                self.scheduler,
                self.recipe.quantization,
                self.recipe.keep_checkpoints,
                [random for random in others if random is not None],
                gathered,
            )
        )
