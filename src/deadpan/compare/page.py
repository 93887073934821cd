"""The page that shows what tellers said; the demo's report and `deadpan compare` are this page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deadpan import __version__
from deadpan.compare.tellers import Teller
from deadpan.data.records import IMAGE_TAG
from deadpan.evaluate.answers import Answer, Question
from deadpan.evaluate.evaluation import Evaluation, rows
from deadpan.evaluate.memorisation import sources, verbatim
from deadpan.evaluate.statistics import Metric
from deadpan.report import comparison
from deadpan.report.curves import Curve
from deadpan.report.words import Bilingual, bilingual


@dataclass(frozen=True)
class Column:
    """A teller with what it said.

    Attributes:
        teller: The teller.
        answers: By question, as many as samples were asked for.
        evaluation: Its figures, if it was evaluated.
    """

    teller: Teller
    answers: Sequence[Sequence[Answer]]
    evaluation: Evaluation | None


def page_of(
    *,
    title: str,
    asked: Sequence[Question],
    columns: Sequence[Column],
    settings: Mapping[str, str],
    summary: Bilingual | str = "",
    notes: Sequence[Bilingual] = (),
    language: comparison.Language = "en",
) -> comparison.Comparison:
    """Lay out what tellers said.

    Args:
        title: The page's heading.
        asked: The questions.
        columns: What each teller said to them.
        settings: How they were asked, and what else to know, by a word for what it is.
        summary: A sentence below the heading.
        notes: What could not be done, and why, beside what is missing of the tellers' runs.
        language: That of the page's own words when it is opened.
    """
    curves = _curves([column.teller for column in columns])
    drawn = list(curves)
    words = [question.turns[-1].text.replace(IMAGE_TAG, "").strip() for question in asked]
    shared = words[0] if len(set(words)) == 1 else None
    said = [_said(column) for column in columns]
    evaluations = {
        column.teller.label: column.evaluation
        for column in columns
        if column.evaluation is not None
    }
    return comparison.Comparison(
        title=title,
        question=shared,
        tellers=[
            comparison.Teller(
                column.teller.label,
                column.teller.facts,
                column.teller.tuned,
                column.teller.learned is not None,
                drawn.index(column.teller.curve.source) if column.teller.curve else None,
            )
            for column in columns
        ],
        rows=[
            comparison.Row(
                question.pictures,
                [answers[position] for answers in said],
                words[position] if shared is None else None,
            )
            for position, question in enumerate(asked)
        ],
        settings=settings,
        version=__version__,
        summary=summary,
        figures=[
            comparison.Figure(row.name, [_cell(metric) for metric in row.cells], row.chance)
            for row in rows(list(evaluations.values()))
        ],
        skipped=_skipped(evaluations),
        notes=[*notes, *(note for column in columns for note in column.teller.notes)],
        curves=list(curves.values()),
        language=language,
    )


def _said(column: Column) -> list[list[comparison.Said]]:
    """A teller's answers to each question, with the training answers that they repeat."""
    texts = [answer.text for answers in column.answers for answer in answers]
    learned = column.teller.learned or ()
    marks = iter(zip(sources(texts, learned), verbatim(texts, learned), strict=True))
    return [
        [comparison.Said(answer.text, answer.finished, *next(marks)) for answer in answers]
        for answers in column.answers
    ]


def _curves(named: Sequence[Teller]) -> dict[Path, Curve]:
    """The curves to draw, by their run: tellers of one run share its curve, which then has all their names."""
    labels: dict[Path, list[str]] = {}
    found: dict[Path, Curve] = {}
    for teller in named:
        if teller.curve is not None:
            labels.setdefault(teller.curve.source, []).append(teller.label)
            found[teller.curve.source] = teller.curve
    return {
        source: replace(curve, name=", ".join(labels[source])) for source, curve in found.items()
    }


def _skipped(evaluations: Mapping[str, Evaluation]) -> list[tuple[str, Bilingual]]:
    """What could not be measured, and why; with the tellers' names where it is not all of them."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for label, evaluation in evaluations.items():
        for task_and_reason in evaluation.skipped.items():
            lacking.setdefault(task_and_reason, []).append(label)
    return [
        (task, _of(labels if len(labels) < len(evaluations) else [], bilingual(reason)))
        for (task, reason), labels in lacking.items()
    ]


def _of(labels: Sequence[str], text: Bilingual) -> Bilingual:
    """A text with the names of those that it holds for, if there are any."""
    names = ", ".join(labels)
    return Bilingual(f"{names}: {text.en}", f"{names}：{text.zh}") if names else text


def _cell(metric: Metric | None) -> comparison.Cell | None:
    if metric is None:
        return None
    if metric.low is None or metric.high is None:
        return comparison.Cell(metric.text)
    interval = f"{metric.told(metric.low)}–{metric.told(metric.high)}"
    span = (metric.value, metric.low, metric.high) if metric.unit == "share" else None
    return comparison.Cell(metric.text, interval, span)
