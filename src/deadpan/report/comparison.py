"""One web page on which tellers stand side by side: figures, loss curves, and every picture with what each said.

The page needs no other file and no network: pictures and curves are inside it, and nothing in it is a script.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deadpan.data.pictures import data_uri, open_picture
from deadpan.errors import writing
from deadpan.report import figure
from deadpan.report.curves import Curve
from deadpan.report.style import Style
from deadpan.report.words import Bilingual, words

Language = Literal["en", "zh"]

_LONG_EDGES = ((24, 1080), (100, 640))
"""A picture's longer edge in pixels, on a page of at most so many; a page stays at a few megabytes."""
_LONG_EDGE_OF_MANY = 420
_MANY = 24
"""From more pictures than this on, each takes less of the page, and figures and curves come before them."""


@dataclass(frozen=True)
class Said:
    """One answer on the page.

    Attributes:
        text: What was said.
        finished: Whether the model ended it; otherwise the token limit did.
        source: The training answer that it repeats or nearly repeats, if it does.
        verbatim: Whether it repeats that word for word.
    """

    text: str
    finished: bool = True
    source: str | None = None
    verbatim: bool = False


@dataclass(frozen=True)
class Teller:
    """One teller on the page.

    Attributes:
        name: What to call it.
        facts: What to know of it, by a word for what it is.
        tuned: Whether a run is known to have made it.
        learned: Whether it is known what it was trained on, so that repetitions could be looked for.
        curve: Which of the page's loss curves is its run's, from 0, if one is.
    """

    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    tuned: bool = False
    learned: bool = False
    curve: int | None = None


@dataclass(frozen=True)
class Row:
    """A picture, or what else was asked about, with what each teller said.

    Attributes:
        pictures: The files.
        answers: By teller.
        question: What was asked, where it is not the page's question.
    """

    pictures: Sequence[Path]
    answers: Sequence[Sequence[Said]]
    question: str | None = None


@dataclass(frozen=True)
class Cell:
    """A figure of one teller.

    Attributes:
        text: As it is shown.
        interval: Its 95% interval, as it is shown, or None.
        span: The value and the ends of its interval, from 0 to 1, if it is a share: drawn as a bar.
    """

    text: str
    interval: str | None = None
    span: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of every teller.

    Attributes:
        name: What is measured.
        cells: By teller; None where it has none.
        chance: What guessing would give, as it is shown, if guessing has a meaning.
    """

    name: str
    cells: Sequence[Cell | None]
    chance: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What the page shows.

    Attributes:
        title: Its heading.
        question: What all were asked, if it was one thing.
        tellers: In the order of the columns.
        rows: What they said, in the order to show it.
        settings: How they were asked, and what else to know, by a word for what it is.
        version: Of deadpan, for the foot of the page.
        summary: A sentence below the heading.
        figures: The evaluation, in the order to show it.
        skipped: What could not be measured, and why.
        notes: What could not be done, and why.
        curves: The loss curves of runs.
        language: That of the page's own words when it is opened.
    """

    title: str
    question: str | None
    tellers: Sequence[Teller]
    rows: Sequence[Row]
    settings: Mapping[str, str]
    version: str
    summary: Bilingual | str = ""
    figures: Sequence[Figure] = ()
    skipped: Sequence[tuple[str, Bilingual | str]] = ()
    notes: Sequence[Bilingual | str] = ()
    curves: Sequence[Curve] = ()
    language: Language = "en"


@dataclass(frozen=True)
class _Picture:
    """A picture on the page."""

    name: str
    source: str
    width: int
    height: int


def render(comparison: Comparison) -> str:
    """The page as HTML.

    Raises:
        DeadpanError: If a picture cannot be opened.
    """
    environment = Environment(
        loader=PackageLoader("deadpan", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = sum(len(row.pictures) for row in comparison.rows)
    long_edge = next((edge for most, edge in _LONG_EDGES if shown <= most), _LONG_EDGE_OF_MANY)
    facts = dict.fromkeys(name for teller in comparison.tellers for name in teller.facts)
    colours = figure.colours(len(comparison.curves))
    return environment.get_template("comparison.html.jinja").render(
        page=comparison,
        rows=[
            (row, [_picture(path, long_edge) for path in row.pictures]) for row in comparison.rows
        ],
        repeated=[_repeated(comparison.rows, i) for i in range(len(comparison.tellers))],
        facts=list(facts),
        many=len(comparison.rows) > _MANY,
        counted=_counted,
        curves=_drawn(comparison.curves),
        colours=[
            None if teller.curve is None else colours[teller.curve].lower()
            for teller in comparison.tellers
        ],
        t=words,
        same=_same,
        differing=_differing,
        language_of=_language_of,
    )


def write(comparison: Comparison, out: Path) -> None:
    """Write the page.

    Raises:
        DeadpanError: If it cannot be written, or a picture cannot be opened.
    """
    page = render(comparison)
    with writing("report", out):
        # A model may say half a character, which no encoding has.
        out.write_text(page, encoding="utf-8", errors="replace")


def _drawn(curves: Sequence[Curve]) -> Markup | None:
    """Loss curves; several along samples, where they tell them, since their steps may differ in size."""
    if not curves:
        return None
    along_samples = len(curves) > 1 and all(curve.samples is not None for curve in curves)
    return Markup(figure.svg(curves, Style("sample" if along_samples else "step", narrow=True)))


def _picture(path: Path, long_edge: int) -> _Picture:
    picture = open_picture(path)
    return _Picture(path.name, data_uri(picture, long_edge), picture.width, picture.height)


def _repeated(rows: Sequence[Row], teller: int) -> tuple[int, int]:
    """How many answers of a teller are training answers, or nearly, and how many it gave."""
    answers = [said for row in rows for said in row.answers[teller]]
    return sum(said.source is not None for said in answers), len(answers)


def _same(comparison: Comparison, row: Row, teller: int, said: Said) -> str | None:
    """The first teller, left of this one, that said the same."""
    for other, answers in zip(comparison.tellers[:teller], row.answers, strict=False):
        if any(said.text == answer.text for answer in answers):
            return other.name
    return None


def _counted(answers: Sequence[Said]) -> list[tuple[Said, int]]:
    """Each different answer once, with how often it was given."""
    return list(Counter(answers).items())


def _differing(said: Said) -> list[tuple[str, bool]]:
    """An answer in pieces, each with whether the training answer has it otherwise."""
    if said.source is None or said.verbatim:
        return [(said.text, False)]
    matcher = SequenceMatcher(None, said.source, said.text, autojunk=False)
    return [
        (said.text[start:end], kind != "equal")
        for kind, _, _, start, end in matcher.get_opcodes()
        if start < end
    ]


def _language_of(text: str) -> str:
    """For the choice of fonts and of line breaks."""
    return "zh" if any("一" <= character <= "鿿" for character in text) else "en"
