"""The one error a user may ever see.

A message answers four questions, each on its own line: what is wrong, where (file, record, key), what was
expected against what was found, and what to do about it. The command line prints it without a traceback; anything
that is not a `DeadpanError` is a bug in deadpan and keeps its traceback.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class DeadpanError(Exception):
    """A mistake or a circumstance that the user can mend.

    Args:
        what: One sentence: what is wrong.
        where: The file, record, key or option it is about.
        expected: What would have been right.
        found: What is there instead.
        fix: What to do, ideally a command to run.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = expected
        self.found = found
        self.fix = fix
        self.told_elsewhere = False
        """Whether another process of the same run meets it too, and tells the user."""
        super().__init__(what)

    def details(self) -> list[tuple[str, str]]:
        """The labelled lines below the first one, in reading order."""
        pairs = [
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("fix", self.fix),
        ]
        return [(label, text) for label, text in pairs if text is not None]

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {label}: {text}" for label, text in self.details())])

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and data-loader workers pickle their errors.
        return _rebuild, (type(self), self.what, dict(self.details()))


def _rebuild(kind: type[DeadpanError], what: str, details: dict[str, str]) -> DeadpanError:
    return kind(what, **details)


@contextmanager
def writing(what: str, path: Path, fix: str | None = None) -> Iterator[None]:
    """Make the folder of a file that is about to be written; turn what the system says against it into one message.

    Args:
        what: What is written, such as "figures".
        path: The file.
        fix: What to do about it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DeadpanError(
            f"The {what} cannot be written: {error.strerror or error}.", where=path, fix=fix
        ) from None


def refuse_unwritable(what: str, path: Path) -> None:
    """Tell before the work that what comes of it could not be written.

    Args:
        what: What will be written, such as "figures".
        path: The file or the folder.

    Raises:
        DeadpanError: If the folder that it is to lie in is none, or may not be written to.
    """
    above = next(place for place in path.absolute().parents if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise DeadpanError(
            f"The {what} cannot be written there.",
            where=path,
            found=f"{above} is " + ("not yours to write to" if above.is_dir() else "no folder"),
            fix="choose another place",
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The advice for a misspelt name: the nearest known ones, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(word) for word in near) + "?"
    return "choose one of " + ", ".join(known)
