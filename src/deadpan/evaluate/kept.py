"""What tellers said, kept as JSON lines, so that no teller is asked the same thing twice."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from deadpan.errors import DeadpanError


class Kept:
    """A file of what was heard, each line under a digest of all that it depends on.

    Several tellers may share one file. A half-written last line, left by a crash, is cut off; lines
    of other settings stay, and are found again when those settings come back.

    Args:
        file: The file; it need not exist yet.
        identity: What every answer of this teller depends on, such as its weights; JSON values.

    Raises:
        DeadpanError: If a line of the file is damaged, or the file cannot be read or written.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        self._file, self._identity = file, dict(identity)
        self._values: dict[str, Any] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a+b") as lines:
                content = whole_lines(lines)
        except OSError as error:
            raise _unusable(file, error) from None
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["heard"]
            except (ValueError, KeyError, TypeError):
                raise DeadpanError(
                    "A line of the kept answers is damaged.",
                    where=f"{file} line {number}",
                    expected='{"key": ..., "heard": ...}',
                    found=line[:60].decode(errors="replace"),
                    fix="remove the file; everything is then asked anew",
                ) from None

    def recall(self, what: Mapping[str, Any]) -> Any | None:
        """What was heard when this was asked, or None."""
        return self._values.get(self._key(what))

    def keep(self, what: Mapping[str, Any], heard: Any) -> None:
        """Write down what was heard, at once and for good."""
        key = self._key(what)
        line = json.dumps({"key": key, **what, "heard": heard}, ensure_ascii=False) + "\n"
        try:
            with self._file.open("ab") as file:
                file.write(line.encode(errors="surrogatepass"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unusable(self._file, error) from None
        self._values[key] = heard

    def _key(self, what: Mapping[str, Any]) -> str:
        told = json.dumps([self._identity, dict(what)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


def whole_lines(file: BinaryIO) -> bytes:
    """Cut off what a crash has left of a file's last line, and read the others.

    A line that another process is writing looks just like it, so none may be.

    Args:
        file: Open for reading and writing.
    """
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
    return content[:whole]


def _unusable(file: Path, error: OSError) -> DeadpanError:
    return DeadpanError(
        f"Answers cannot be kept in this file: {error.strerror or error}.",
        where=file,
        fix="choose another place with --out",
    )
