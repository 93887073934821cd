"""What is measured while a run goes on, so that memorising cannot pass for learning.

At each evaluation: the loss of the held-out records, and of training records, by the same definition
as the training loss; whether training pictures get their training answers back word for word; and
what the model says about a few held-out pictures. Nothing of it moves the run: weights, modes and
random numbers are afterwards as before.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel

from deadpan.checkpoints.load import Loaded
from deadpan.config import schema
from deadpan.data.records import Record
from deadpan.engines.base import GenerationSettings
from deadpan.engines.builtin import BuiltinEngine
from deadpan.evaluate.answers import Answer, ask, questions
from deadpan.evaluate.memorisation import Reading, nearly_verbatim, sign, verbatim
from deadpan.processing.processor import Processor
from deadpan.train import state
from deadpan.train.objective import Objective

_LONGEST_INTERVAL = 200
_TRAINING_RECORDS = 64
"""How many training records' loss is taken: of short answers, about a thousand tokens."""
_LARGEST_BATCH = 16

Progress = Callable[[int, int], None]
T = TypeVar("T")


def interval(settings: schema.Evaluation, steps_per_epoch: int) -> int:
    """The steps between two evaluations, `auto` resolved."""
    if settings.every_steps != "auto":
        return settings.every_steps
    return min(steps_per_epoch, _LONGEST_INTERVAL)


@dataclass(frozen=True)
class Figures:
    """What one evaluation found.

    Attributes:
        eval_loss: The loss of the held-out records: mean -log p of their answers' tokens, in nats, or
            the mean loss of pairs.
        train_loss: The same of a fixed sample of training records, without dropout.
        memorisation: The share of answers to training pictures that are training answers, or
            nearly; None if none was asked.
        verbatim: The share that are word for word.
        jokes: The answers to the probe pictures.
        beside: Of the held-out records, what the objective measures besides the loss.
    """

    eval_loss: float
    train_loss: float
    memorisation: float | None
    verbatim: float | None
    jokes: tuple[Answer, ...]
    beside: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The figures as metrics.jsonl has them."""
        figures = {
            "eval_loss": self.eval_loss,
            "train_loss": self.train_loss,
            "loss_gap": self.eval_loss - self.train_loss,
            **{f"eval_{name}": value for name, value in self.beside.items()},
        }
        if self.memorisation is not None and self.verbatim is not None:
            figures |= {"memorisation": self.memorisation, "verbatim": self.verbatim}
        return figures


class Evaluator:
    """Measures a model that is being trained.

    Args:
        model: The model.
        processor: Makes its inputs.
        objective: What the losses are.
        training: The records it is trained on.
        held_out: The records it is not.
        settings: What to measure.
        seed: Decides which training and probe pictures are asked; they stay the same over the run.
        batch: Records of a forward pass in training.
        dtype: What training computes in.
    """

    def __init__(
        self,
        model: PeftModel,
        processor: Processor,
        objective: Objective,
        training: Sequence[Record],
        held_out: Sequence[Record],
        settings: schema.Evaluation,
        seed: int,
        batch: int,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._processor, self._dtype = model, processor, dtype
        self._objective = objective
        self._held_out = held_out
        self._training = some(training, _TRAINING_RECORDS, seed)
        self._by_heart = [answer for record in training for answer in record.answers]
        self._asked = some(questions(training), settings.memorisation_pictures, seed)
        self._probes = some(questions(held_out), settings.probe_pictures, seed)
        self._settings = GenerationSettings(settings.max_new_tokens)
        self._batch = min(batch, _LARGEST_BATCH)
        self._device = next(model.parameters()).device

    def evaluate(self, progress: Progress | None = None) -> Figures:
        """Measure the model as it is now.

        Args:
            progress: Called with the number of records and pictures done and their total; what it
                raises ends the evaluation.
        """
        before = state.random_state()
        autocast = torch.autocast(
            self._device.type, self._dtype, enabled=self._dtype is torch.bfloat16
        )
        try:
            with autocast:
                self._model.eval()
                return self._evaluate(progress or (lambda done, total: None))
        finally:
            self._model.train()
            state.set_random_state(before)

    def _evaluate(self, progress: Progress) -> Figures:
        parts = (self._held_out, self._training, self._asked, self._probes)
        total = sum(map(len, parts))
        finished = 0

        def part(done: int, of: int) -> None:
            nonlocal finished
            progress(finished + done, total)
            if done == of:
                finished += of

        held_out, beside = self._objective.measure(self._held_out, self._batch, part)
        training, _ = self._objective.measure(self._training, self._batch, part)
        loaded = Loaded(self._model, self._processor, Path(), Path())
        with closing(BuiltinEngine(loaded, self._batch, kept_bytes=0)) as engine:
            told, jokes = (
                list(ask(engine, asked, self._settings, self._batch, part))
                for asked in (self._asked, self._probes)
            )
        texts = [answer.text for answer in told]
        return Figures(
            held_out,
            training,
            _share(nearly_verbatim(texts, self._by_heart)) if texts else None,
            _share(verbatim(texts, self._by_heart)) if texts else None,
            tuple(jokes),
            beside,
        )


def judge(
    before: state.Evaluations, step: int, figures: Figures
) -> tuple[state.Evaluations, bool, str | None]:
    """What an evaluation means for the run.

    Returns:
        The state after it; whether it is the best so far; and why the run counts as memorising, or
        None if it does not.
    """
    now = Reading(step, figures.eval_loss, figures.train_loss, figures.memorisation)
    reason = sign(now, before.best)
    best = math.isfinite(now.held_out) and (
        before.best is None or now.held_out < before.best.held_out
    )
    after = replace(
        before,
        step=step,
        best=now if best else before.best,
        since_best=0 if best else before.since_best + 1,
        warned=before.warned or reason is not None,
    )
    return after, best, reason


def some(values: Sequence[T], count: int, seed: int) -> list[T]:
    """A sample in the values' order, from random numbers of its own."""
    chosen = random.Random(seed).sample(range(len(values)), min(count, len(values)))
    return [values[i] for i in sorted(chosen)]


def _share(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)
