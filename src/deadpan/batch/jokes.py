"""The file that a batch writes: a line a picture, never one twice, whatever happens in between.

Beside `jokes.jsonl` stand `jokes.settings.json`, by what the lines were told; `jokes.broken.jsonl`,
the pictures that could not be opened; and, while several processes write, `jokes.part-N.jsonl`, one
of each. A line is written at once and whole; what a kill leaves of one is cut off at the next start.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from io import FileIO
from pathlib import Path
from typing import IO, Any

from deadpan.batch.pictures import Item
from deadpan.errors import DeadpanError
from deadpan.evaluate.kept import whole_lines
from deadpan.train.state import write_whole

_CALLED = {"weights": "the model's weights"}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Settings in 16 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Broken:
    """A picture that could not be opened, and why."""

    item: Item
    error: str


class Jokes:
    """A file of jokes, its parts and its companions.

    Args:
        path: The file.
        settings: What decides the answers.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self._settings = path, dict(settings)
        self._record = path.with_suffix(".settings.json")
        self.broken = path.with_suffix(".broken.jsonl")

    def open(self) -> set[str]:
        """Begin, or go on with what is there; returns the ids that have been told.

        Raises:
            DeadpanError: If the file was told by other settings, is something else, or is being
                written by another process.
        """
        files = self._files()
        if self._record.is_file():
            self._check(_read_settings(self._record))
        elif any(path.stat().st_size for path in files):
            raise DeadpanError(
                "The file holds something already, and nothing says how it was made.",
                where=self.path,
                expected=f"its settings in {self._record.name}",
                fix="choose another file with --out",
            )
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in files:
                with path.open("r+b") as file:
                    _lock(file, path)
                    whole_lines(file)
            if not self._record.is_file():
                text = json.dumps(self._settings, ensure_ascii=False, indent=2)
                write_whole(self._record, text + "\n")
        return {line["id"] for path in files for line in self._lines(path)}

    def chosen(self, key: str) -> Any:
        """A setting of the file as it is there; None if it does not say."""
        return _read_settings(self._record).get(key) if self._record.is_file() else None

    def writer(self, rank: int, world: int) -> "Writer":
        """Where one of so many processes writes."""
        path = self.path if world == 1 else self.path.with_suffix(f".part-{rank}.jsonl")
        return Writer(path, fingerprint(self._settings))

    def close(self, items: Sequence[Item], broken: Iterable[Broken]) -> int:
        """Lay the parts together in the items' order, and list what was broken; returns the lines.

        Lines of pictures that are no longer asked about stay, in front.
        """
        place = {item.id: number for number, item in enumerate(items)}
        files = self._files()
        # A kill between the file's renaming and its parts' removal leaves a line in both.
        found = {line["id"]: line for path in files for line in self._lines(path)}
        lines = sorted(found.values(), key=lambda line: place.get(line["id"], -1))
        text = "".join(map(_text, lines))
        with _writing(self.path):
            if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
                write_whole(self.path, text)
            for path in files:
                if path != self.path:
                    path.unlink()
            listed = "".join(
                _text({"id": b.item.id, "picture": _picture(b.item), "error": b.error})
                for b in sorted(broken, key=lambda b: place[b.item.id])
            )
            if listed:
                write_whole(self.broken, listed)
            else:
                self.broken.unlink(missing_ok=True)
        return len(lines)

    def _files(self) -> list[Path]:
        parts = sorted(self.path.parent.glob(f"{escape(self.path.stem)}.part-*.jsonl"))
        return [*([self.path] if self.path.exists() else []), *parts]

    def _check(self, before: Mapping[str, Any]) -> None:
        changed = [key for key in self._settings if before.get(key) != self._settings[key]]
        if changed:
            raise DeadpanError(
                "The file was made with other settings; a file has one kind of answers.",
                where=self.path,
                expected=_in_words(before, changed),
                found=_in_words(self._settings, changed),
                fix="repeat them to go on with the file, or choose another one with --out",
            )

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        lines = []
        for number, text in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
            try:
                line = json.loads(text)
                known = line["settings"] == fingerprint(self._settings) and bool(line["id"])
            except (ValueError, TypeError, KeyError):
                known = False
            if not known:
                raise DeadpanError(
                    "The line was not written with these settings.",
                    where=f"{path} line {number}",
                    expected=f'a line with "settings": "{fingerprint(self._settings)}"',
                    found=text[:80],
                    fix="choose another file with --out",
                )
            lines.append(line)
        return lines


class Writer:
    """Appends lines to a file; a context manager."""

    def __init__(self, path: Path, settings: str) -> None:
        self._path, self._settings = path, settings
        with _writing(path):
            self._file = path.open("ab", buffering=0)
            _lock(self._file, path)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, item: Item, answers: Sequence[str], reasons: Sequence[str]) -> None:
        """Add a picture's answers, each with the reason why it ended."""
        line = {
            "id": item.id,
            "picture": _picture(item),
            "prompt": item.prompt,
            "answers": list(answers),
            "finish_reasons": list(reasons),
            "settings": self._settings,
        }
        with _writing(self._path):
            rest = memoryview(_text(line).encode())
            while rest:  # on a nearly full disk, a write may take a part
                rest = rest[self._file.write(rest) :]


def _picture(item: Item) -> str | list[str]:
    return item.images[0] if len(item.images) == 1 else list(item.images)


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _lock(file: IO[bytes] | FileIO, path: Path) -> None:
    """Keep others from writing a file until it is closed; of no effect where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DeadpanError(
            "Another process is writing the jokes.",
            where=path,
            fix="wait for it, or end it; then the same command goes on",
        ) from None
    except OSError:
        return


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise DeadpanError(
            "The settings of the jokes cannot be read.",
            where=path,
            fix="remove it together with the jokes, or choose another file with --out",
        )
    return values


def _in_words(settings: Mapping[str, Any], keys: Iterable[str]) -> str:
    return "; ".join(
        f"{_CALLED.get(key, key)}: {json.dumps(settings.get(key), ensure_ascii=False)}"
        for key in keys
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DeadpanError(
            f"The jokes cannot be written: {error.strerror or error}.",
            where=error.filename or path,
            fix="make room or choose another place with --out; the same command goes on",
        ) from None
