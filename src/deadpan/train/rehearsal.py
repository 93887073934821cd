"""Real steps on a run's heaviest micro-batches, before the run: does it fit, and how fast is it?

The steps are those of the training loop, with its model, optimizer and data loader, so that what is
measured is what will happen. Nothing is written, and where a run follows, all is put back before it.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from deadpan.environment import GIB, devices
from deadpan.errors import DeadpanError
from deadpan.models.answer_loss import plain_model
from deadpan.models.nf4 import bytes_of, saved_bytes
from deadpan.processing.processor import Processor, Size
from deadpan.train import state, validation
from deadpan.train.forecast import Forecast, Load, Memory, Pace, Trial, heaviest, load_of, split
from deadpan.train.memory import Meter, cut, divisors, ran_out, remedies
from deadpan.train.plan import MicroBatch

if TYPE_CHECKING:
    from deadpan.train.loop import Trainer

_TIMED_STEPS, _TIMED_SECONDS = 8, 20.0
"""The timing ends after so many steps or seconds, whichever comes first."""
_TIMED_RECORDS = 64
"""Held-out records whose loss is timed."""


def choose_micro_batch_size(trainer: "Trainer") -> int:
    """Find the largest micro-batch size that fits, and leave the trainer as it was.

    Raises:
        DeadpanError: If not even one sample at a time fits.
    """
    with _taken_back(trainer):
        rehearsal = Rehearsal(trainer)
        found = rehearsal.largest()
        fits = rehearsal.fits(found)
    if not fits:
        alike, other = remedies(trainer.recipe, trainer.processor.tile_policy.max_tiles)
        raise DeadpanError(
            "Not even one sample at a time fits in memory.",
            where="micro_batch_size: auto",
            expected=f"at most {rehearsal.limit / GIB:.2f} GiB",
            found="more" if found.memory is None else f"{found.memory.peak / GIB:.2f} GiB",
            fix=f"set {' or '.join([*alike, *other]) or 'a smaller model'}; "
            "deadpan train RECIPE --dry-run tells what each takes",
        )
    return found.size


@contextmanager
def _taken_back(trainer: "Trainer") -> Iterator[None]:
    """Afterwards weights, optimizer, schedule, random numbers and position are as before."""
    # On the CPU, so that they do not count in what is measured on a GPU.
    weights = [parameter.detach().to("cpu", copy=True) for parameter in trainer.trainable]
    # A state dictionary shares what it holds with its optimizer.
    optimizer = copy.deepcopy(trainer.optimizer.state_dict())
    scheduler = trainer.scheduler.state_dict()
    random, position = state.random_state(), trainer.position
    try:
        yield
    finally:
        trainer.loss.free()
        trainer.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, before in zip(trainer.trainable, weights, strict=True):
                parameter.copy_(before)
        trainer.optimizer.load_state_dict(optimizer)
        trainer.scheduler.load_state_dict(scheduler)
        state.set_random_state(random)
        trainer.position = position
        trainer.objective.figures()  # what a step that ran out of memory had begun to add up
        Meter(trainer.device).reset()


@dataclass(frozen=True)
class _Outcome:
    """What a micro-batch size takes.

    Attributes:
        size: Samples of a forward pass.
        heaviest: The load of the micro-batch of most tokens.
        whole: The load of the run.
        memory: The peak; None if memory ran out and there is nothing to estimate it from.
        measured: Whether it was run, and did not run out of memory.
    """

    size: int
    heaviest: Load
    whole: Load
    memory: Memory | None
    measured: bool

    @property
    def peak(self) -> int | None:
        return None if self.memory is None else self.memory.peak


class Rehearsal:
    """Measurements with a trainer that has not begun; its weights and optimizer move.

    Args:
        trainer: The trainer.

    Attributes:
        limit: The bytes that the run may plan with.

    Raises:
        DeadpanError: If the run is finished.
    """

    def __init__(self, trainer: "Trainer") -> None:
        if trainer.position.step == trainer.plan.steps:
            raise DeadpanError(
                "The run is finished: no step is left to measure.",
                where=trainer.run,
                fix="leave out --resume to forecast the run from its beginning",
            )
        self._trainer, self._done = trainer, trainer.position.step
        self._meter = Meter(trainer.device)
        self._loading = self._meter.peak()
        self._available, self.limit = self._meter.available(), self._meter.limit()
        self._outcomes: dict[int, _Outcome] = {}
        sizes = trainer.survey.sizes
        shortest = min(range(len(sizes)), key=lambda index: sizes[index].tokens)
        self._short = MicroBatch(1, 0, ((shortest,),))
        # With the first step the optimizer's state appears, and kernels are loaded.
        trainer.watcher.measuring("the shortest sample")
        self._ready = self._run([self._short])
        self._meter.reset()
        self._level = self._meter.now()

    def forecast(self) -> Forecast:
        """Measure the peak and the pace of the run, and if it does not fit, what would help."""
        trainer = self._trainer
        auto = trainer.recipe.micro_batch_size == "auto"
        if auto:
            chosen = self.largest()
            trainer.divide(chosen.size)
        else:
            self.attempt(1)
            chosen = self.attempt(trainer.plan.micro_batch_size)
        plan = trainer.plan
        found = Forecast(
            device=_name(trainer.device),
            run=str(trainer.run),
            records=plan.records,
            steps=plan.steps - self._done,
            micro_batch_size=plan.micro_batch_size,
            gradient_accumulation_steps=plan.accumulation,
            whole=chosen.whole,
            heaviest=chosen.heaviest,
            memory=chosen.memory,
            measured=chosen.measured,
            loading=self._loading,
            beside=self._meter.beside(),
            available=self._available,
            limit=self.limit,
            pace=None,
            sizes=[self._trial(outcome) for outcome in self._outcomes.values()] if auto else [],
            changes=[],
        )
        if found.fits:
            pace = self._pace(chosen.whole)
            assert found.memory is not None
            # Steps of all lengths in turn leave gaps between blocks of memory, which is seen here.
            highest = max(found.memory, self._peak(), key=lambda memory: memory.peak)
            found = replace(found, pace=pace, memory=highest, measured=pace is not None)
        if found.fits:
            return found
        return replace(found, pace=None, changes=list(self._changes(chosen)))

    def largest(self) -> _Outcome:
        """The largest micro-batch size that fits, or the outcome of 1 if none does.

        Sizes divide the samples of a step. Each attempt is the largest that should fit by the ones before,
        since on a CPU one that does not would end the process rather than fail.
        """
        best = self.attempt(1)
        untried = [size for size in divisors(self._trainer.plan.samples_per_step) if size > 1]
        while self.fits(best):
            should = [size for size in untried if self._below_limit(self._estimate(size))]
            if not should:
                break
            outcome = self.attempt(should[-1])
            if self.fits(outcome):
                best = outcome
                untried = [size for size in untried if size > outcome.size]
            else:
                untried = [size for size in untried if size < outcome.size]
        return best

    def fits(self, outcome: _Outcome) -> bool:
        """Whether it was seen to stay below the limit."""
        return outcome.measured and self._below_limit(outcome)

    def attempt(self, size: int) -> _Outcome:
        """Measure a micro-batch size, or estimate it where measuring would end the process."""
        if size not in self._outcomes:
            estimate = self._estimate(size)
            known_too_large = estimate.memory is not None and not self._below_limit(estimate)
            risky = self._trainer.device.type == "cpu" and known_too_large
            self._outcomes[size] = estimate if risky else self._measure(size, estimate)
        return self._outcomes[size]

    def _below_limit(self, outcome: _Outcome) -> bool:
        return outcome.peak is not None and outcome.peak <= self.limit

    def _estimate(self, size: int, sizes: Sequence[Size] | None = None) -> _Outcome:
        """Scale the nearest measured outcome that is not larger, with other sizes of the samples if given."""
        load, whole = self._heaviest(size, sizes)[1:]
        known = [each for each in self._outcomes.values() if each.measured and each.size <= size]
        if not known:
            return _Outcome(size, load, whole, None, measured=False)
        nearest = max(known, key=lambda outcome: outcome.size)
        assert nearest.memory is not None
        ratio = load.computed / nearest.heaviest.computed
        return _Outcome(size, load, whole, nearest.memory.scaled(ratio), measured=False)

    def _heaviest(
        self, size: int, sizes: Sequence[Size] | None = None
    ) -> tuple[list[MicroBatch], Load, Load]:
        trainer = self._trainer
        sizes = trainer.survey.sizes if sizes is None else sizes
        plan, packing = trainer.plan.divided(size), trainer.recipe.packing
        leaders, whole = heaviest(plan.micro_batches(self._done), sizes, packing)
        return leaders, load_of(leaders[0], sizes, packing), whole

    def _measure(self, size: int, estimate: _Outcome) -> _Outcome:
        trainer = self._trainer
        leaders, load, whole = self._heaviest(size)
        # In a step of several micro-batches the gradients of the first are there already.
        several = size < min(trainer.plan.samples_per_step, trainer.plan.records)
        trainer.watcher.measuring(f"{size} samples at a time" if size > 1 else "one at a time")
        self._meter.reset()
        for leader in leaders:
            step = [self._short, leader] if several else [leader]
            if not self._ready or not self._run(step):
                return estimate
        return _Outcome(size, load, whole, self._peak(), measured=True)

    def _peak(self) -> Memory:
        """What the peak since the meter's last reset is made of."""
        trainer = self._trainer
        return split(
            self._meter.peak(),
            self._level,
            sum(bytes_of(p) for p in trainer.model.parameters() if not p.requires_grad),
            sum(p.nbytes for p in trainer.trainable),
            sum(
                value.nbytes
                for values in trainer.optimizer.state.values()
                for value in values.values()
                if isinstance(value, torch.Tensor)
            ),
        )

    def _run(self, micro_batches: list[MicroBatch]) -> bool:
        """Do a step; False if memory ran out."""
        try:
            self._trainer.rehearse(micro_batches)
        except RuntimeError as error:
            if not ran_out(error):
                raise
        else:
            return True
        # Outside the handler, in which the error would keep the step's tensors alive.
        self._trainer.optimizer.zero_grad(set_to_none=True)
        self._meter.reset()
        return False

    def _trial(self, outcome: _Outcome) -> Trial:
        samples = self._trainer.plan.samples_per_step
        return Trial(cut(outcome.size, samples), outcome.peak, outcome.measured, self.fits(outcome))

    def _changes(self, chosen: _Outcome) -> Iterator[Trial]:
        """What saves memory: measured where that changes the model in place, else estimated."""
        trainer = self._trainer
        for size in reversed(divisors(trainer.plan.samples_per_step)):
            if size < chosen.size and self.fits(outcome := self.attempt(size)):
                yield self._trial(outcome)
                break
        memory = chosen.memory
        if trainer.recipe.quantization == "none":
            language_model = plain_model(trainer.model).model.language_model
            peak = None if memory is None else memory.peak - saved_bytes(language_model)
            yield self._estimated("quantization=nf4", peak)
        processor = trainer.processor
        tiles = processor.tile_policy.max_tiles // 2
        if tiles:
            policy = replace(processor.tile_policy, max_tiles=tiles)
            other = Processor(processor.tokenizer, processor.template, policy, processor.max_length)
            sizes = [other.size(record) for record in trainer.survey.records]
            yield self._estimated(f"max_tiles={tiles}", self._estimate(chosen.size, sizes).peak)
        # Last, since it cannot be undone.
        if not trainer.recipe.gradient_checkpointing:
            trainer.loss.checkpoint()
            self._outcomes.clear()
            self.attempt(1)
            outcome = self.attempt(chosen.size)
            change = "gradient_checkpointing=true"
            yield Trial(change, outcome.peak, outcome.measured, self.fits(outcome))

    def _estimated(self, change: str, peak: int | None) -> Trial:
        return Trial(change, peak, measured=False, fits=peak is not None and peak <= self.limit)

    def _pace(self, whole: Load) -> Pace | None:
        """Time steps of the run's own order, the first left out if there are more, and an evaluation.

        Returns:
            None if memory ran out.
        """
        trainer = self._trainer
        trainer.watcher.measuring("speed")
        self._meter.reset()
        sizes, packing, done = trainer.survey.sizes, trainer.recipe.packing, self._done
        loads = (
            sum((load_of(micro_batch, sizes, packing) for micro_batch in step), Load())
            for step in trainer.plan.steps_after(done)
        )
        only_one = trainer.plan.steps - done == 1
        timed, steps, seconds = Load(), 0, 0.0

        def clock() -> float:
            return time.perf_counter() - trainer.loss.recording_seconds

        began = clock()
        try:
            with closing(trainer.steps()) as running:
                for number, (load, _) in enumerate(zip(loads, running, strict=True)):
                    now = clock()
                    if number or only_one:
                        timed, steps, seconds = timed + load, steps + 1, seconds + now - began
                    began = now
                    if steps == _TIMED_STEPS or seconds > _TIMED_SECONDS:
                        break
            count = validation.count_after(trainer, done)
            evaluation_seconds = self._evaluation_seconds() if count else 0.0
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return None
        return Pace(steps, seconds, timed, whole, count, evaluation_seconds)

    def _evaluation_seconds(self) -> float:
        self._trainer.watcher.measuring("an evaluation")
        # On a GPU the first one prepares kernels.
        validation.seconds(self._trainer, 1)
        return validation.seconds(self._trainer, _TIMED_RECORDS)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = devices()["cpu"]
    return f"{cpu['name']}, {cpu['cores']} cores"
