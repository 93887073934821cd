"""What a teller says about a file of records: one answer a picture, kept as JSON lines."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deadpan.data.pictures import open_picture
from deadpan.data.records import Record, Turn
from deadpan.engines.base import Engine, GenerationSettings, Request
from deadpan.errors import DeadpanError, writing


@dataclass(frozen=True)
class Question:
    """One thing to ask, and what people answered.

    Attributes:
        pictures: The picture files.
        turns: The conversation up to its last question.
        references: The answers in the records, which several records on one picture give together.
        concepts: What the pictures show: each name with the puns on it; empty if it is not known.
        name: What to call it in messages.
    """

    pictures: tuple[Path, ...]
    turns: tuple[Turn, ...]
    references: tuple[str, ...]
    concepts: dict[str, tuple[str, ...]]
    name: str


@dataclass(frozen=True)
class Answer:
    """What was said.

    Attributes:
        picture: The first picture's path as the records write it, or empty.
        question: The last question.
        text: The answer.
        finished: Whether the model ended it; otherwise the token limit did.
    """

    picture: str
    question: str
    text: str
    finished: bool


def questions(records: Sequence[Record]) -> list[Question]:
    """The questions of a file, each once: records with the same pictures and the same question are one.

    Order is that of the file.
    """
    found: dict[tuple[tuple[Path, ...], tuple[Turn, ...]], list[Record]] = {}
    for record in records:
        found.setdefault((record.image_paths, record.turns[:-1]), []).append(record)
    return [
        Question(
            pictures,
            turns,
            tuple(dict.fromkeys(record.turns[-1].text.strip() for record in group)),
            {name: puns for record in group for name, puns in record.concepts.items()},
            group[0].name,
        )
        for (pictures, turns), group in found.items()
    ]


def ask(
    engine: Engine,
    asked: Sequence[Question],
    settings: GenerationSettings,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Answer]:
    """Put questions to an engine, a batch of them at a time; the answers come in the questions' order."""
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        requests = [
            Request([open_picture(path) for path in q.pictures], q.turns, q.name) for q in part
        ]
        for question, joke in zip(part, engine.generate(requests, settings), strict=True):
            picture = str(question.pictures[0]) if question.pictures else ""
            yield Answer(picture, question.turns[-1].text, joke.text, joke.finish_reason == "stop")
        if progress is not None:
            progress(min(start + batch, len(asked)), len(asked))


def write(answers: Sequence[Answer], path: Path) -> None:
    """Write answers as JSON lines.

    Raises:
        DeadpanError: If the file cannot be written.
    """
    lines = [json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers]
    with writing("answers", path):
        path.write_text("".join(lines), encoding="utf-8")


def read(path: Path) -> list[Answer]:
    """Read answers back.

    Raises:
        DeadpanError: If the file cannot be read, or a line is not an answer.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DeadpanError(
            f"The file of answers cannot be read: {error.strerror}.", where=path
        ) from None
    answers = []
    # In bytes: str.splitlines would also cut at U+2028, as a joke may hold it.
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            answers.append(Answer(**json.loads(line)))
        except (ValueError, TypeError):
            raise DeadpanError(
                "The line is not an answer.",
                where=f"{path} line {number}",
                expected='{"picture": ..., "question": ..., "text": ..., "finished": ...}',
                found=line[:80].decode(errors="replace"),
                fix="remove the file and ask again",
            ) from None
    return answers
