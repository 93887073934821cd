"""The training loop.

One optimizer step is: gather the step's micro-batches, count their supervised tokens, and for each
micro-batch add the gradient of (sum of its tokens' losses) / (tokens of the whole step). So eight
samples at once and one sample eight times give the same gradient, however the tokens are spread, and
a short last step weighs each token like any other.
"""

import json
import math
import resource
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch.utils.data import DataLoader

from deadpan import nano
from deadpan.checkpoints.load import choose_device, choose_dtype, load_base
from deadpan.checkpoints.source import Layout, detect, resolve
from deadpan.config.loader import dump_recipe, inline_yaml, load_recipe
from deadpan.config.schema import Recipe
from deadpan.data.records import load as load_records
from deadpan.environment import describe
from deadpan.errors import DeadpanError
from deadpan.models import lora
from deadpan.models.answer_loss import AnswerLoss
from deadpan.models.attention import kernels
from deadpan.models.build import checkpoint_layers
from deadpan.processing.collate import Batch
from deadpan.processing.processor import load_processor
from deadpan.train import memory, optimizers, state
from deadpan.train.loader import MicroBatches, batches, worker_count
from deadpan.train.plan import MicroBatch, Plan
from deadpan.train.rehearsal import choose_micro_batch_size
from deadpan.train.schedule import resolve as resolve_schedule
from deadpan.train.schedule import schedule
from deadpan.train.survey import Survey, survey
from deadpan.train.watcher import Watcher

_MAY_CHANGE = {
    "attention", "data.workers", "device", "gradient_checkpointing", "keep_checkpoints",
    "log_every_steps", "run", "save_every_steps",
}  # fmt: skip
"""Recipe keys that a resumed run may have otherwise than before."""
_CUTS_A_STEP = {"micro_batch_size", "gradient_accumulation_steps", "samples_per_step"}
"""Recipe keys that a resumed run may have otherwise as long as a step has as many samples."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        run: The run folder.
        checkpoint: Its newest checkpoint.
        steps: Optimizer steps done in all.
        loss: The last step's loss.
        interrupted: Whether it was stopped by a signal before its last step.
    """

    run: Path
    checkpoint: Path
    steps: int
    loss: float
    interrupted: bool


class Trainer:
    """One training run.

    Args:
        recipe: What to do.
        resume: Go on from the run folder's newest checkpoint.
        watcher: Is told what happens.
        dry_run: No run will follow, so one that is in the folder is not in the way.

    Raises:
        DeadpanError: If the data, the model, or the run folder is not in order.
    """

    def __init__(
        self, recipe: Recipe, resume: bool, watcher: Watcher, dry_run: bool = False
    ) -> None:
        self.watcher = watcher
        self.run = Path(recipe.run)
        self._checkpoint = None
        if resume or not dry_run:
            self._checkpoint, recipe = _open_run(self.run, recipe, resume)
        self.recipe = recipe
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
        self.survey: Survey = survey(
            records,
            self.processor,
            recipe.data.overlong,
            watcher.surveying,
        )
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
            self.model = self._load_model(folder)
        self._prepare()

    def _load_model(self, folder: Path) -> PeftModel:
        recipe = self.recipe
        plain = load_base(
            folder,
            detect(folder),
            self.processor,
            self.device,
            self.dtype,
            self._attention(),
            recipe.quantization,
            self.watcher.loading,
        )
        # A folder is recorded by its full path, so that the adapter finds it from anywhere; a Hub id stays one.
        local = recipe.model != nano.MODEL and Path(recipe.model).expanduser().is_dir()
        base = str(folder.resolve()) if local else recipe.model
        model = lora.attach(
            plain, base, train_projector=recipe.train_projector, **recipe.lora.model_dump()
        )
        if recipe.gradient_checkpointing:
            # The frozen vision tower keeps no activations; only the language model has something to recompute.
            checkpoint_layers(plain.model.language_model)
        return model.train()

    def _attention(self) -> str:
        """`auto` keeps the samples of packed rows apart without a mask, which takes time and memory."""
        auto = self.recipe.attention == "auto" and self.recipe.packing
        return "varlen" if auto else self.recipe.attention

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
        self.position = state.Position(records=state.digest(self.survey.records))
        if self._checkpoint is not None:
            before = state.restore(self._checkpoint, self.model, self.optimizer, self.scheduler)
            if before.records != self.position.records:
                raise DeadpanError(
                    "The records are not those that the run was started with.",
                    where=recipe.data.train,
                    expected=f"SHA-256 {before.records[:16]}... of texts and picture names",
                    found=f"{self.position.records[:16]}...",
                    fix="put the old file back, or start a new run with run=runs/NAME",
                )
            self.position = before
        # Prepared without its optimizer: gradients are scaled and accumulated here, not by accelerate.
        self.loss = self.accelerator.prepare_model(AnswerLoss(self.model))
        self.trainable = trainable

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
        last = self._open_log()
        metrics = last or {"loss": math.nan}
        saved = self._checkpoint
        self.watcher.starting(self.plan, self.position.step, self.survey)
        with self._log.open("a", encoding="utf-8") as log, _stop_signal() as stop:
            for metrics in self.steps():
                step = metrics["step"]
                if step % recipe.log_every_steps == 0 or step == self.plan.steps:
                    log.write(json.dumps(metrics) + "\n")
                    log.flush()
                self.watcher.stepped(metrics)
                saved = self._save() if step % recipe.save_every_steps == 0 else None
                if stop.is_set():
                    break
            if saved is None:
                saved = self._save()
        return Result(
            self.run,
            saved,
            self.position.step,
            metrics["loss"],
            self.position.step < self.plan.steps,
        )

    def _open_log(self) -> dict[str, Any] | None:
        """Write what the run folder says of the run; returns the last metrics before the first step.

        What was logged after the checkpoint resumed from is dropped: those steps are done again.
        """
        self._log = self.run / "metrics.jsonl"
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            state.write_whole(self.run / "recipe.yaml", dump_recipe(self.recipe))
            environment = json.dumps(describe(), ensure_ascii=False, indent=2)
            state.write_whole(self.run / "environment.json", environment + "\n")
            kept = _metrics_until(self._log, self.position.step)
            state.write_whole(self._log, "".join(json.dumps(line) + "\n" for line in kept))
        except OSError as error:
            raise DeadpanError(
                f"The run folder cannot be written: {error}.", where=self.run
            ) from None
        return kept[-1] if kept else None

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
            seconds, began = now - began, now
            samples = sum(len(micro_batch.indices) for micro_batch, _ in step)
            tokens = sum(batch.tokens for _, batch in step)
            self.position = state.Position(
                step[0][0].step,
                self.position.samples + samples,
                self.position.seconds + seconds,
                self.position.records,
            )
            yield {
                **metrics,
                "samples_per_second": round(samples / seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "data_wait_fraction": round(waited / seconds, 4),
                "memory_gib": round(self._memory(), 3),
            }
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
            raise DeadpanError(
                f"The loss or its gradient is no longer finite at step {step[0][0].step}.",
                where="; ".join(name for _, batch in step for name in batch.names),
                found=f"loss {mean}, gradient norm {norm.item()}",
                fix="look at these records, lower optimizer.lr, or set precision=fp32"
                + ("; the last checkpoint is intact" if state.checkpoints(self.run) else ""),
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


def _open_run(run: Path, recipe: Recipe, resume: bool) -> tuple[Path | None, Recipe]:
    """The checkpoint to resume from, or None for a fresh run; and the recipe.

    A resumed run whose recipe says micro_batch_size: auto goes on with the size that was chosen at first.

    Raises:
        DeadpanError: If a fresh run would overwrite one, or there is nothing to resume, or another recipe was trained.
    """
    existing = state.checkpoints(run)
    if not resume:
        if existing:
            raise DeadpanError(
                "The run folder holds a run already.",
                where=run,
                found=f"checkpoints up to {existing[-1].name}",
                fix="add --resume to go on with it, or choose another folder with run=runs/NAME",
            )
        return None, recipe
    if not existing:
        raise DeadpanError(
            "There is no checkpoint to resume from.", where=run, fix="leave out --resume to start"
        )
    state.verify(existing[-1])
    started = load_recipe(run / "recipe.yaml")
    may_change = set(_MAY_CHANGE)
    if recipe.effective_batch_size == started.effective_batch_size:
        may_change |= _CUTS_A_STEP
        if recipe.micro_batch_size == "auto":
            recipe = recipe.model_copy(update={key: getattr(started, key) for key in _CUTS_A_STEP})
    before, now = _leaves(started), _leaves(recipe)
    changed = [key for key in now if key not in may_change and now[key] != before[key]]
    if changed:
        raise DeadpanError(
            "The recipe is not the one that the run was started with.",
            where=run / "recipe.yaml",
            expected="; ".join(f"{key}: {inline_yaml(before[key])}" for key in changed),
            found="; ".join(f"{key}: {inline_yaml(now[key])}" for key in changed),
            fix=f"resume with deadpan train {run / 'recipe.yaml'} --resume, or start a new run",
        )
    return existing[-1], recipe


def _leaves(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            leaves |= {f"{key}.{inner}": leaf for inner, leaf in value.items()}
        else:
            leaves[key] = value
    return leaves


def _metrics_until(log: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a log up to a step; a half-written last line, left by a crash, is passed over."""
    lines: list[dict[str, Any]] = []
    if log.exists():
        for text in log.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return [line for line in lines if line["step"] <= step]


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step; a second one interrupts at once."""
    stop = threading.Event()
    previous = {}

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
