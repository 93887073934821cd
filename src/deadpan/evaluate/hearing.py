"""One teller heard: its weights loaded, records scored, questions asked.

`deadpan evaluate`, `deadpan compare` and `deadpan demo` all hear tellers this way.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deadpan.checkpoints.load import load
from deadpan.data.pictures import digest
from deadpan.data.records import Record
from deadpan.engines.base import Engine, GenerationSettings
from deadpan.engines.builtin import BuiltinEngine
from deadpan.evaluate.answers import Answer, Question, ask
from deadpan.evaluate.choices import ChoiceQuestion
from deadpan.evaluate.kept import Kept
from deadpan.evaluate.likelihood import likelihoods
from deadpan.evaluate.statistics import Items

_ANSWERS = 8
"""Answers of a batch. The same on every device, as a batch's place decides its seed, and it is kept whole."""

Bars = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Shows how far a stage is: takes its name, and gives what takes how much is done, and of how much."""


@dataclass(frozen=True)
class Asking:
    """Questions, and how to ask them.

    Attributes:
        questions: What to ask.
        settings: How answers are drawn. A batch's seed is this one plus the position of its first question, so
            that a batch says the same whichever were asked before it.
        samples: Answers to each question.
    """

    questions: Sequence[Question]
    settings: GenerationSettings
    samples: int = 1


@dataclass(frozen=True)
class Heard:
    """What one teller said.

    Attributes:
        answers: By asking and question, as many answers as samples were asked for.
        likelihood: The held-out loss and the measures of the choice questions; empty without records.
    """

    answers: list[list[list[Answer]]]
    likelihood: list[Items]


@dataclass
class _Batch:
    """Questions that are answered, and kept, together."""

    questions: Sequence[Question]
    settings: GenerationSettings
    samples: int
    answers: list[Answer] | None = None

    @cached_property
    def what(self) -> dict[str, Any]:
        """All that the answers depend on, beside the teller."""
        return {
            "pictures": [[digest(path) for path in q.pictures] for q in self.questions],
            "turns": [[asdict(turn) for turn in q.turns] for q in self.questions],
            "samples": self.samples,
            **asdict(self.settings),
        }

    def recall(self, kept: Kept) -> None:
        """Take the answers from what is kept, if they are there."""
        if (said := kept.recall(self.what)) is not None:
            self.answers = [Answer(**answer) for answer in said]

    def ask(self, engine: Engine, kept: Kept | None) -> None:
        """Have the questions answered, and keep the answers."""
        repeated = [question for question in self.questions for _ in range(self.samples)]
        self.answers = list(ask(engine, repeated, self.settings))
        if kept is not None:
            kept.keep(self.what, [asdict(answer) for answer in self.answers])

    def by_question(self) -> list[list[Answer]]:
        said = self.answers or []
        return [said[i : i + self.samples] for i in range(0, len(said), self.samples)]


def hear(
    model: str | Path,
    askings: Sequence[Asking],
    records: Sequence[Record] = (),
    choices: Sequence[ChoiceQuestion] = (),
    *,
    bars: Bars,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    max_tiles: int | None = None,
    kept: Kept | None = None,
) -> Heard:
    """Load a teller, score records, ask questions, and let it go again.

    Args:
        model: A folder in any layout, a run folder, or a Hub id.
        askings: What to ask.
        records: What to take the loss of.
        choices: Questions with given options about the records' pictures.
        bars: Shows loading, scoring and asking.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, bf16, fp16 or fp32.
        quantization: none, nf4 or fp8.
        max_tiles: Overrides the checkpoint's own tile limit.
        kept: Where what was heard before is, and what is heard now goes. If nothing is missing, the weights are
            not even loaded.

    Raises:
        DeadpanError: If the model, a picture or a record is not in order.
    """
    groups = [list(_batches(asking)) for asking in askings]
    scoring = _scoring(records, choices) if kept is not None else {}
    likelihood: list[Items] | None = None if records else []
    if kept is not None:
        for batch in (batch for group in groups for batch in group):
            batch.recall(kept)
        if records and (scored := kept.recall(scoring)) is not None:
            likelihood = [Items(**items) for items in scored]
    missing = [batch for group in groups for batch in group if batch.answers is None]
    if missing or likelihood is None:
        with bars("loading weights") as progress:
            loaded = load(
                model,
                device=device,
                dtype=dtype,
                quantization=quantization,
                max_tiles=max_tiles,
                progress=progress,
            )
        engine, processor = BuiltinEngine(loaded), loaded.processor
        del loaded
        if likelihood is None:
            with bars("scoring answers") as progress:
                likelihood = likelihoods(
                    engine, lambda text: len(processor.choice(text)), records, choices, progress
                )
            if kept is not None:
                kept.keep(scoring, [asdict(items) for items in likelihood])
        with bars("asking") as progress:
            total, done = sum(len(batch.questions) for batch in missing), 0
            for batch in missing:
                batch.ask(engine, kept)
                done += len(batch.questions)
                progress(done, total)
        engine.close()
    answers = [[said for batch in group for said in batch.by_question()] for group in groups]
    return Heard(answers, likelihood)


def _batches(asking: Asking) -> Iterator[_Batch]:
    size, settings = max(1, _ANSWERS // asking.samples), asking.settings
    for start in range(0, len(asking.questions), size):
        # Without drawing, a seed changes nothing.
        drawn = settings.temperature > 0 and settings.seed is not None
        seed = (settings.seed or 0) + start if drawn else None
        part = asking.questions[start : start + size]
        yield _Batch(part, replace(settings, seed=seed), asking.samples)


def _scoring(records: Sequence[Record], choices: Sequence[ChoiceQuestion]) -> dict[str, Any]:
    """All that likelihoods depend on, beside the teller."""
    told = hashlib.sha256()
    for record in records:
        pictures = [digest(path) for path in record.image_paths]
        told.update(repr((pictures, record.images, record.turns)).encode(errors="surrogatepass"))
    for choice in choices:
        told.update(repr(choice).encode(errors="surrogatepass"))
    return {"records": told.hexdigest()}
