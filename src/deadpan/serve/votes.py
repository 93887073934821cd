"""What people prefer: matches between two tellers, and the votes on them, in SQLite.

A *match* is one picture and one question, and what two tellers answered. It is stored before anyone sees it, and who
stands on which side stays here until the vote. A vote refers to its match by an id that cannot be guessed, once.

Many threads and processes may share a database. A vote that is acknowledged is on the disk: SQLite's write-ahead log
with `synchronous=FULL` is flushed before a commit returns (https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

import contextlib
import hashlib
import os
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from PIL import Image

from deadpan.data.pictures import open_picture
from deadpan.data.preferences import Preference, write
from deadpan.errors import DeadpanError

_VERSION = 1
"""Of the tables; a database of another version is not touched."""
_MARK = 0x64656164
"""SQLite's application_id: "dead"."""
_PATIENCE = 30.0
"""Seconds to wait for another process that writes."""
_ID_BYTES = 16

_TABLES = f"""
CREATE TABLE matches (
    id TEXT PRIMARY KEY,
    picture TEXT NOT NULL,
    prompt TEXT NOT NULL,
    left_teller TEXT NOT NULL,
    right_teller TEXT NOT NULL,
    left_answer TEXT NOT NULL,
    right_answer TEXT NOT NULL,
    told_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE votes (
    match TEXT PRIMARY KEY REFERENCES matches (id),
    outcome TEXT NOT NULL CHECK (outcome IN ('left', 'right', 'both dry', 'both bad')),
    voted_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
PRAGMA application_id = {_MARK};
PRAGMA user_version = {_VERSION};
"""


class Outcome(StrEnum):
    """What a vote says. In the ranking both kinds of tie are half a win for each; neither is exported as a pair."""

    LEFT = "left"
    RIGHT = "right"
    BOTH_DRY = "both dry"
    BOTH_BAD = "both bad"


class UnknownMatch(DeadpanError):
    """An id that no match has."""


class AlreadyVoted(DeadpanError):
    """A match that has its vote."""


@dataclass(frozen=True)
class Match:
    """Two answers to one picture.

    Attributes:
        picture: The picture's file.
        prompt: The question.
        left: The teller on the left.
        right: The teller on the right.
        left_answer: What the teller on the left said.
        right_answer: What the teller on the right said.
    """

    picture: Path
    prompt: str
    left: str
    right: str
    left_answer: str
    right_answer: str


@dataclass(frozen=True)
class Vote:
    """A match and what was voted."""

    match: Match
    outcome: Outcome


class Votes:
    """A database of matches and votes, open.

    Pictures lie in a folder beside it, named after the database: `votes.db` has `votes-pictures/`. A picture is kept as
    it was given, byte for byte, once, and is called after the SHA-256 of its content.

    Args:
        path: The database's file.
        create: Whether to make one where there is none.

    Raises:
        DeadpanError: If there is none, or the file is something else.
    """

    def __init__(self, path: Path, create: bool = True) -> None:
        self._path = path
        self._pictures = path.absolute().with_name(f"{path.stem}-pictures")
        self._turn = threading.Lock()
        if not create and not path.is_file():
            raise DeadpanError(
                "There is no such database of votes.",
                where=path,
                fix=f"deadpan serve MODEL MODEL --votes {path} makes one",
            )
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
            try:
                self._open()
            except BaseException:
                self._database.close()
                raise

    def _open(self) -> None:
        database = self._database
        database.execute("PRAGMA foreign_keys = ON")
        # Looked at under the lock: of two processes that start together, one makes the tables.
        database.execute("BEGIN IMMEDIATE")
        with self._transaction():
            (mark,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not (mark, version, tables) == (0, 0, 0) and (mark, version) != (_MARK, _VERSION):
                raise DeadpanError(
                    "The file is not a database of votes that this version knows.",
                    where=self._path,
                    expected=f"deadpan's votes, version {_VERSION}",
                    found=f"deadpan's votes, version {version}"
                    if mark == _MARK
                    else "another program's database",
                    fix="name another file",
                )
            if not tables:
                for statement in filter(None, map(str.strip, _TABLES.split(";"))):
                    database.execute(statement)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")

    def __enter__(self) -> "Votes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        with self._turn:
            self._database.close()

    def add_match(
        self, picture: Path, prompt: str, left: tuple[str, str], right: tuple[str, str]
    ) -> str:
        """Store a match, to be shown afterwards.

        Args:
            picture: Its file, which is copied.
            prompt: The question.
            left: The teller on the left, and its answer.
            right: The teller on the right, and its answer.

        Returns:
            The id that its vote has to name: 128 random bits, as text.

        Raises:
            DeadpanError: If the picture is broken, or something cannot be written.
        """
        match = secrets.token_urlsafe(_ID_BYTES)
        name = self._keep(picture)
        row = (match, name, prompt, left[0], right[0], left[1], right[1], time.time())
        with self._writing() as database:
            database.execute("INSERT INTO matches VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return match

    def vote(self, match: str, outcome: Outcome) -> Match:
        """Vote on a match. When this returns, the vote is on the disk.

        Returns:
            The match, with who told what.

        Raises:
            UnknownMatch: If there is no such match.
            AlreadyVoted: If it has its vote; the first one counts.
            DeadpanError: If the vote cannot be written; then it does not count.
        """
        with self._writing() as database:
            row = database.execute(
                "SELECT picture, prompt, left_teller, right_teller, left_answer, right_answer"
                " FROM matches WHERE id = ?",
                (match,),
            ).fetchone()
            if row is None:
                raise UnknownMatch("There is no such match.")
            added = database.execute(
                "INSERT INTO votes VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (match, outcome.value, time.time()),
            )
            if not added.rowcount:
                raise AlreadyVoted("This match has its vote already; the first one counts.")
        return self._match(row)

    def all(self) -> list[Vote]:
        """Every vote, oldest first."""
        with self._explained(), self._turn:
            rows = self._database.execute(
                "SELECT picture, prompt, left_teller, right_teller, left_answer, right_answer,"
                " outcome FROM votes JOIN matches ON match = id ORDER BY voted_at, id"
            ).fetchall()
        return [Vote(self._match(row[:-1]), Outcome(row[-1])) for row in rows]

    def _match(self, row: tuple[str, ...]) -> Match:
        return Match(self._pictures / row[0], *row[1:])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._explained(), self._turn:
            self._database.execute("BEGIN IMMEDIATE")
            with self._transaction():
                yield self._database

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit what has begun, or undo it if something is wrong."""
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DeadpanError(
                f"The database of votes cannot be used: {error}.", where=self._path
            ) from None
        except OSError as error:
            raise DeadpanError(
                f"The database of votes cannot be used: {error.strerror}.", where=self._path
            ) from None

    def _keep(self, picture: Path) -> str:
        """Copy a picture into the folder, if it is not there yet; its name there."""
        open_picture(picture)
        with self._explained():
            content = picture.read_bytes()
            with Image.open(picture) as image:
                ending = (image.format or "bin").lower()
            name = f"{hashlib.sha256(content).hexdigest()}.{ending}"
            if not (self._pictures / name).exists():
                self._pictures.mkdir(exist_ok=True)
                _write_whole(self._pictures / name, content)
        return name


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that under its name there is ever all of it or nothing, whoever else writes it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class Exported:
    """What became of the votes.

    Attributes:
        pairs: Written.
        ties: Left out, since they prefer neither.
        equal: Left out, since both tellers had said the same.
    """

    pairs: int
    ties: int
    equal: int


def export(votes: Votes, out: Path) -> Exported:
    """Write the votes as preference pairs, oldest first, to be trained on.

    A line is a JSON object of `image`, `prompt`, `chosen` and `rejected`. Pictures are not copied; their paths are
    relative to the file's folder if they lie under it, else absolute.

    Raises:
        DeadpanError: If the file cannot be written.
    """
    pairs, ties, equal = [], 0, 0
    for vote in votes.all():
        match = vote.match
        if vote.outcome not in (Outcome.LEFT, Outcome.RIGHT):
            ties += 1
            continue
        if match.left_answer == match.right_answer:
            equal += 1
            continue
        answers = [match.left_answer, match.right_answer]
        if vote.outcome is Outcome.RIGHT:
            answers.reverse()
        pairs.append(Preference((match.picture.as_posix(),), match.prompt, *answers))
    write(pairs, out)
    return Exported(len(pairs), ties, equal)
