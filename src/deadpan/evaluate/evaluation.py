"""A teller in figures: what it says about pictures it has not been trained on; and how likely it finds jokes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deadpan.data.records import normalised
from deadpan.evaluate.answers import Answer, Question
from deadpan.evaluate.form import Grounding, is_description, is_joke_form
from deadpan.evaluate.memorisation import nearly_verbatim, verbatim

_RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """A share of answers with its uncertainty.

    Attributes:
        value: From 0 to 1.
        low: The lower end of the 95% bootstrap interval.
        high: Its upper end.
        of: How many answers it is a share of.
    """

    value: float
    low: float
    high: float
    of: int


@dataclass(frozen=True)
class Evaluation:
    """The figures of one teller on one file of records.

    Attributes:
        questions: How many questions it was asked.
        joke_form: Answers in the form of a joke (`deadpan.evaluate.form`).
        grounded: Answers that name or pun on something pictured; None where the records do not say what is.
        grounded_jokes: Both at once.
        descriptions: Answers that describe the picture.
        verbatim: Answers that are training answers word for word; None without training records.
        nearly_verbatim: The same, or nearly.
        distinct_1: Different characters over all characters of all answers.
        distinct_2: Different pairs of neighbouring characters over all pairs.
        characters: Mean length of an answer.
        loss: Mean -log p of the reference answers' tokens, in nats; None if it was not computed.
        perplexity: exp(loss).
    """

    questions: int
    joke_form: Share
    grounded: Share | None
    grounded_jokes: Share | None
    descriptions: Share
    verbatim: Share | None
    nearly_verbatim: Share | None
    distinct_1: float
    distinct_2: float
    characters: float
    loss: float | None
    perplexity: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    asked: Sequence[Question],
    answers: Sequence[Answer],
    training: Sequence[str] | None = None,
    loss: float | None = None,
) -> Evaluation:
    """Put answers into figures.

    Args:
        asked: The questions.
        answers: The answers to them, in the same order.
        training: The answers that the teller was trained on, for the shares it has by heart.
        loss: The held-out loss, if it was computed.
    """
    texts = [answer.text for answer in answers]
    jokes = [is_joke_form(answer.text, answer.finished) for answer in answers]
    known = {name: puns for question in asked for name, puns in question.concepts.items()}
    grounding = Grounding(known)
    about = [
        grounding.is_grounded(text, question.concepts)
        for text, question in zip(texts, asked, strict=True)
    ]
    both = [a and b for a, b in zip(jokes, about, strict=True)]
    return Evaluation(
        questions=len(asked),
        joke_form=share(jokes),
        grounded=share(about) if known else None,
        grounded_jokes=share(both) if known else None,
        descriptions=share([is_description(text) for text in texts]),
        verbatim=None if training is None else share(verbatim(texts, training)),
        nearly_verbatim=None if training is None else share(nearly_verbatim(texts, training)),
        distinct_1=_distinct(texts, 1),
        distinct_2=_distinct(texts, 2),
        characters=round(sum(map(len, texts)) / len(texts), 2),
        loss=loss,
        perplexity=None if loss is None else math.exp(loss),
    )


def share(values: Sequence[bool], seed: int = 0) -> Share:
    """The share of true values, with a 95% percentile bootstrap interval over the answers."""
    array = np.array(values, dtype=float)
    resampled = np.random.default_rng(seed).choice(array, (_RESAMPLES, len(array))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    value, low, high = (round(float(x), 4) for x in (array.mean(), low, high))
    return Share(value, low, high, len(array))


def _distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of characters over all of them (Li et al. 2016, arXiv 1510.03055)."""
    grams = [text[i : i + n] for text in map(normalised, texts) for i in range(len(text) - n + 1)]
    return round(len(set(grams)) / len(grams), 4) if grams else 0.0


def rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    """A table of evaluations, for people: a label and a cell for each; what none of them has is left out."""
    table: list[tuple[str, list[str]]] = []
    for label, name in (
        ("joke form", "joke_form"),
        ("grounded", "grounded"),
        ("grounded and in joke form", "grounded_jokes"),
        ("describes the picture", "descriptions"),
        ("verbatim from training", "verbatim"),
        ("nearly verbatim", "nearly_verbatim"),
    ):
        shares = [getattr(evaluation, name) for evaluation in evaluations]
        if any(shares):
            table.append((label, [_percent(share) for share in shares]))
    for label, name, digits in (
        ("distinct-1", "distinct_1", 2),
        ("distinct-2", "distinct_2", 2),
        ("characters an answer", "characters", 1),
        ("held-out loss", "loss", 3),
        ("perplexity", "perplexity", 1),
    ):
        values = [getattr(evaluation, name) for evaluation in evaluations]
        if any(value is not None for value in values):
            table.append((label, ["-" if v is None else f"{v:,.{digits}f}" for v in values]))
    return table


def _percent(share: Share | None) -> str:
    if share is None:
        return "-"
    return f"{share.value:.1%} ({share.low:.0%} to {share.high:.0%})"
