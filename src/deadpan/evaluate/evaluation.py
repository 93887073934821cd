"""A teller in figures: what it says about pictures it has not been trained on; and how likely it finds jokes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deadpan.data.records import normalised
from deadpan.evaluate.answers import Answer, Question
from deadpan.evaluate.choices import picture_name
from deadpan.evaluate.form import Grounding, is_description, is_joke_form
from deadpan.evaluate.likelihood import LOSS
from deadpan.evaluate.memorisation import nearly_verbatim, verbatim
from deadpan.evaluate.statistics import Difference, Items, Metric, difference, metric

JOKE_FORM = "joke form"
GROUNDED = "grounded"
GROUNDED_JOKES = "grounded and in joke form"
DESCRIPTIONS = "describes the picture"
VERBATIM = "verbatim from training"
NEARLY_VERBATIM = "nearly verbatim"
CHARACTERS = "characters an answer"
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Evaluation:
    """The figures of one teller on one file of records.

    Attributes:
        questions: How many questions it was asked.
        metrics: The figures, as they are to be shown.
        skipped: What the records cannot carry, and why.
        items: What the figures with intervals are taken over, for comparing two tellers.
    """

    questions: int
    metrics: tuple[Metric, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    items: tuple[Items, ...] = field(default=(), repr=False)

    def get(self, name: str) -> Metric | None:
        """A figure by its name, or None if it was not taken."""
        return next((found for found in self.metrics if found.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """The figures in JSON's own types."""
        return {
            "questions": self.questions,
            "metrics": [found.to_json() for found in self.metrics],
            "skipped": dict(self.skipped),
        }


def evaluate(
    asked: Sequence[Question],
    answers: Sequence[Answer],
    training: Sequence[str] | None = None,
    loss: float | None = None,
    likelihood: Sequence[Items] = (),
    skipped: Mapping[str, str] | None = None,
) -> Evaluation:
    """Put answers and likelihoods into figures.

    Args:
        asked: The questions.
        answers: The answers to them, in the same order.
        training: The answers that the teller was trained on, for the shares it has by heart.
        loss: The held-out loss, where only that was computed.
        likelihood: What `deadpan.evaluate.likelihood.likelihoods` returns.
        skipped: The tasks that the records cannot carry, and why.
    """
    items = [*_of_answers(asked, answers, training), *likelihood]
    metrics = [metric(one) for one in items]
    texts = [answer.text for answer in answers]
    # No interval: drawing answers with repetition makes repetitions that the teller did not make.
    distinct = [
        Metric(f"distinct-{n}", _distinct(texts, n), None, None, len(texts)) for n in (1, 2)
    ]
    if loss is not None:
        metrics.append(Metric(LOSS, loss, None, None, len(asked)))
    for found in [found for found in metrics if found.name == LOSS]:
        ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
        metrics.append(Metric(PERPLEXITY, math.exp(found.value), ends[0], ends[1], found.n))
    missing = dict(skipped or {})
    if not any(question.concepts for question in asked):
        missing[GROUNDED] = "the records do not say what is pictured (concepts)"
    if training is None:
        missing[VERBATIM] = "it is not known what it was trained on"
    return Evaluation(len(asked), (*metrics, *distinct), missing, tuple(items))


def _of_answers(
    asked: Sequence[Question], answers: Sequence[Answer], training: Sequence[str] | None
) -> list[Items]:
    texts = [answer.text for answer in answers]
    pictures = [picture_name(question.pictures, question.turns) for question in asked]
    known = {name: puns for question in asked for name, puns in question.concepts.items()}
    jokes = [is_joke_form(answer.text, answer.finished) for answer in answers]
    shares = {JOKE_FORM: jokes}
    if known:
        grounding = Grounding(known)
        about = [
            grounding.is_grounded(text, question.concepts)
            for text, question in zip(texts, asked, strict=True)
        ]
        shares[GROUNDED] = about
        shares[GROUNDED_JOKES] = [a and b for a, b in zip(jokes, about, strict=True)]
    shares[DESCRIPTIONS] = [is_description(text) for text in texts]
    if training is not None:
        shares[VERBATIM] = verbatim(texts, training)
        shares[NEARLY_VERBATIM] = nearly_verbatim(texts, training)
    found = [
        Items(name, [float(value) for value in values], pictures, unit="share")
        for name, values in shares.items()
    ]
    return [*found, Items(CHARACTERS, [float(len(text)) for text in texts], pictures)]


def _distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of characters over all of them (Li et al. 2016, arXiv 1510.03055)."""
    grams = [text[i : i + n] for text in map(normalised, texts) for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def differences(first: Evaluation, second: Evaluation) -> list[Difference]:
    """Compare two tellers that were asked the same, figure by figure; figures that only one has are left out."""
    of_second = {items.name: items for items in second.items}
    return [
        difference(items, of_second[items.name]) for items in first.items if items.name in of_second
    ]


@dataclass(frozen=True)
class Row:
    """One figure of several tellers.

    Attributes:
        name: What is measured.
        chance: What guessing would give, for people; None where guessing has no meaning.
        cells: What each teller has of it.
    """

    name: str
    chance: str | None
    cells: tuple[Metric | None, ...]


def rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """A table of evaluations, for people."""
    # The longest first, for its order: the others have gaps.
    longest_first = sorted(evaluations, key=lambda one: len(one.metrics), reverse=True)
    named = {found.name: found for one in longest_first for found in one.metrics}
    return [
        Row(
            name,
            None if found.chance is None else found.told(found.chance),
            tuple(one.get(name) for one in evaluations),
        )
        for name, found in named.items()
    ]


def difference_rows(found: Sequence[Difference]) -> list[tuple[str, str, str, str]]:
    """A table of differences, for people: label, difference, 95% interval, p."""
    return [
        (
            one.name,
            _signed(one, one.value) + (" points" if one.unit == "share" else ""),
            f"{_signed(one, one.low)} to {_signed(one, one.high)}",
            f"{one.p:.4f}" if one.p >= 0.0002 else "< 0.0002",
        )
        for one in found
    ]


def _signed(found: Difference, value: float) -> str:
    return f"{100 * value:+.1f}" if found.unit == "share" else f"{value:+.3g}"
