"""One web page on which tellers stand side by side: figures, loss curves, and every picture with what each said.

The page needs no other file and no network: pictures and curves are inside it, and nothing in it is a script.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deadpan.data.pictures import data_uri, open_picture
from deadpan.errors import DeadpanError

_LONG_EDGE = 360
"""Of a picture on the page, in pixels."""


@dataclass(frozen=True)
class Said:
    """One answer on the page.

    Attributes:
        text: What was said.
        marks: What to say about it, a word or two each, such as `verbatim`.
    """

    text: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Teller:
    """One teller on the page.

    Attributes:
        name: What to call it.
        note: A line about it.
        said: Its answers, by picture.
    """

    name: str
    note: str
    said: Mapping[Path, Sequence[Said]]


@dataclass(frozen=True)
class Comparison:
    """What the page shows.

    Attributes:
        title: Its heading.
        summary: A sentence below it.
        question: What all were asked.
        pictures: In the order to show them.
        tellers: In the order of the columns.
        figures: A table: a label and a cell for each teller.
        facts: What else to know, a label and a value each: models, times, versions.
        version: Of deadpan, for the foot of the page.
        curves: Loss curves as SVG, or None.
    """

    title: str
    summary: str
    question: str
    pictures: Sequence[Path]
    tellers: Sequence[Teller]
    figures: Sequence[tuple[str, Sequence[str]]]
    facts: Sequence[tuple[str, str]]
    version: str
    curves: str | None = None


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
    cards = [
        (
            path.name,
            data_uri(open_picture(path), _LONG_EDGE),
            [teller.said.get(path, ()) for teller in comparison.tellers],
        )
        for path in comparison.pictures
    ]
    return environment.get_template("comparison.html.jinja").render(
        page=comparison,
        cards=cards,
        curves=None if comparison.curves is None else Markup(comparison.curves),
    )


def write(comparison: Comparison, out: Path) -> None:
    """Write the page.

    Raises:
        DeadpanError: If it cannot be written, or a picture cannot be opened.
    """
    page = render(comparison)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DeadpanError(f"The report cannot be written: {error.strerror}.", where=out) from None
