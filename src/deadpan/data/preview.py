"""A contact sheet of a data set: one HTML file to look through before training."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from deadpan.data.pictures import PictureError, data_uri, open_picture
from deadpan.data.records import Record
from deadpan.errors import DeadpanError, writing

LONG_EDGE = 320
"""The longer edge of a thumbnail in pixels."""


@dataclass(frozen=True)
class _Thumbnail:
    """A picture on the sheet: either `source`, a data URI, or the `fault` that takes its place."""

    path: str
    source: str | None
    size: str
    fault: str | None


def preview(records: Sequence[Record], out: Path, limit: int = 200, seed: int = 0) -> Path:
    """Write a contact sheet that needs no other file and no network.

    Pictures are shown as the model sees them: EXIF orientation ignored, transparency dropped. A
    broken one is shown as a red box that says why.

    Args:
        records: What to show.
        out: The HTML file to write; an older one is replaced.
        limit: The most records to show; of more, a random sample in the order of the file.
        seed: Chooses the sample.

    Returns:
        `out`.

    Raises:
        DeadpanError: If `out` is not named like a web page or cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        # Anything else is likelier to be the user's data in the wrong place than a page.
        raise DeadpanError(
            "The preview is a web page.",
            where=out,
            expected="a name that ends in .html",
            fix=f"--out {out.with_suffix('.html')}",
        )
    shown = list(records)
    if len(shown) > limit:
        chosen = sorted(random.Random(seed).sample(range(len(shown)), limit))
        shown = [shown[position] for position in chosen]
    page = _page(records, shown, seed)
    with writing("preview", out):
        out.write_text(page, encoding="utf-8")
    return out


def _page(records: Sequence[Record], shown: Sequence[Record], seed: int) -> str:
    paths = dict.fromkeys(path for record in shown for path in record.image_paths)
    thumbnails = {path: _thumbnail(path) for path in paths}
    environment = Environment(
        loader=PackageLoader("deadpan", "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("preview.html.jinja").render(
        title=", ".join(dict.fromkeys(record.file.name for record in records)),
        total=len(records),
        seed=seed,
        pictures=len(thumbnails),
        text_only=sum(not record.images for record in shown),
        broken=sum(thumbnail.fault is not None for thumbnail in thumbnails.values()),
        question=_shared_question(shown),
        cards=[(record, [thumbnails[path] for path in record.image_paths]) for record in shown],
    )


def _shared_question(records: Iterable[Record]) -> str | None:
    """The question, if every record asks the same single one: then it is shown once."""
    questions = {
        tuple(turn.text.strip() for turn in record.turns if turn.role == "human")
        for record in records
    }
    only = questions.pop() if len(questions) == 1 else ()
    return only[0] if len(only) == 1 else None


def _thumbnail(path: Path) -> _Thumbnail:
    try:
        picture = open_picture(path)
    except PictureError as error:
        details = [f"{label}: {text}" for label, text in error.details() if label != "where"]
        return _Thumbnail(str(path), None, "", "\n".join([error.what, *details]))
    size = f"{picture.width} × {picture.height}"
    return _Thumbnail(str(path), data_uri(picture, LONG_EDGE), size, None)
