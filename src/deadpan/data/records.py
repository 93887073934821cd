r"""Records: one picture or more, a question, an answer; and the reader of LLaVA/XTuner files.

A file is a JSON array or JSON lines; the first character decides, not the file's name. A record is

    {"id": "dog-1", "image": "dog.png", "conversations": [
        {"from": "human", "value": "<image>\nSay something dry."},
        {"from": "gpt", "value": "He is the one who reads the small print."}]}

where `id` is optional, `image` is a path, a list of paths or null, and each `<image>` marks where a
picture goes. `concepts`, also optional, names what the pictures show, each with the puns on it that
count as naming it: `{"雨伞": ["好聚好伞"]}`; evaluation asks it whether an answer is about the
picture. `stars`, optional too, counts the likes that the answer got; null is unknown. Other keys are
metadata and are left alone.
"""

import codecs
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from deadpan.errors import DeadpanError
from deadpan.nano import records_file

Severity = Literal["error", "warning"]

PROMPT = "请你根据这张图片，讲一个脑洞大开的梗"
"""What a teller is asked if nothing else is said: the question of CLoT_cn_2000."""

IMAGE_TAG = "<image>"
"""What marks the place of a picture in a question."""

CONTROL_TOKENS = (
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|action_start|>",
    "<|action_end|>",
    "<|plugin|>",
    "<|interpreter|>",
    "<|endoftext|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    *(f"[UNUSED_TOKEN_{number}]" for number in range(141, 147)),
)
"""The names of tokens that steer a chat. InternLM2 reads `[UNUSED_TOKEN_146]` as `<|im_start|>`."""

_CONTROL_TOKEN = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_WORDS = re.compile(r"[\W_]+")
_JSON_SPACE = " \t\r\n"
_OTHER_PICTURE_KEYS = ("images", "img", "image_path", "picture", "pictures", "video")
_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file of records.

    Attributes:
        code: A short name for the kind of problem, such as "missing-picture".
        severity: "error": it must be mended. "warning": it may be what was meant.
        where: The file and the record or records, as a person would say it.
        message: What is wrong, what was expected and what was found.
        records: The positions in the file (from 0) of the records concerned.
    """

    code: str
    severity: Severity
    where: str
    message: str
    records: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One side's words in a conversation."""

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Record:
    """One sample, as it stands in its file.

    Attributes:
        id: The record's own name, if it has one.
        images: The picture paths as written.
        turns: The conversation.
        file: The file that holds the record.
        index: The position in the file, from 0, unreadable records counted.
        line: The line number, from 1, in JSON lines; None in a JSON array.
        folder: What relative picture paths start from.
        concepts: What the pictures show: each name with the puns on it.
        stars: How many people liked the answer; None if it is not known.
        rejected: Of a preference pair, the answer that was liked less than the last turn's.
    """

    id: str | None
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    file: Path
    index: int
    line: int | None
    folder: Path
    concepts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stars: int | None = None
    rejected: str | None = None

    @property
    def sides(self) -> tuple["Record", ...]:
        """The conversations to compute: this one, or a pair's two, the one with the liked answer first."""
        if self.rejected is None:
            return (self,)
        other = (*self.turns[:-1], Turn("gpt", self.rejected))
        return replace(self, rejected=None), replace(self, turns=other, rejected=None)

    @property
    def name(self) -> str:
        """What to call the record in a message: `train.json record 17 (id 'abc')`."""
        return _place(self.file, self.index, self.line, self.id)

    @property
    def image_paths(self) -> tuple[Path, ...]:
        """Where the pictures are."""
        return tuple(self.folder / image for image in self.images)

    @property
    def answers(self) -> tuple[str, ...]:
        """What gpt says, turn by turn."""
        return tuple(turn.text for turn in self.turns if turn.role == "gpt")


def normalised(text: str) -> str:
    """A text's letters and characters alone: punctuation and spaces do not make a new joke."""
    return _NOT_WORDS.sub("", text).lower()


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half a character, which no encoding can write."""
    return _LONE_SURROGATE.search(text) is not None


def read(path: Path, images: Path | None = None) -> tuple[list[Record], list[Problem]]:
    """Read a whole file, collecting its problems instead of stopping at the first.

    No picture is opened. A record that breaks a rule but can be understood is returned too, so that
    its pictures can still be checked; one that cannot be understood is in the problems only.

    Args:
        path: A JSON array or JSON lines, or `nano:train` or `nano:held-out` for the starter set.
        images: The folder that picture paths start from; by default the folder of `path`.

    Returns:
        The records and the problems, both in the order of the file.

    Raises:
        DeadpanError: If the file is missing, empty, not UTF-8 or not JSON at all, or if `images` is
            not a folder.
    """
    check_images(images)
    path = records_file(path)
    folder = path.parent if images is None else images
    text = read_text(path)
    start = text.lstrip(_JSON_SPACE)[:1]
    if not start:
        raise DeadpanError("The file is empty.", where=path, expected="a JSON array or JSON lines")
    entries = _array(path, text) if start == "[" else _lines(path, text)
    records: list[Record] = []
    problems: list[Problem] = []
    for entry in entries:
        if isinstance(entry, Problem):
            problems.append(entry)
            continue
        record, found = _record(entry, path, folder)
        problems.extend(found)
        if record is not None:
            records.append(record)
    if not records and not problems:
        raise DeadpanError("The file holds no records.", where=path, found="an empty JSON array")
    return records, problems


def load(path: Path, images: Path | None = None) -> list[Record]:
    """Read a file for training: every record is sound, or there is an error.

    Args:
        path: A JSON array or JSON lines.
        images: The folder that picture paths start from; by default the folder of `path`.

    Raises:
        DeadpanError: If `read` raises it or finds an error; the first few errors are named.
    """
    records, problems = read(path, images)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        shown = [f"{error.where}: {error.message}" for error in errors[:_SHOWN_ERRORS]]
        if len(errors) > _SHOWN_ERRORS:
            shown.append(f"and {len(errors) - _SHOWN_ERRORS:,} more")
        count = "1 error" if len(errors) == 1 else f"{len(errors):,} errors"
        raise DeadpanError(
            f"The records have {count}.",
            where=path,
            found="\n    ".join(shown),
            fix=check_command(path, images),
        )
    return records


def check_command(path: Path, images: Path | None) -> str:
    """The command that shows every problem of a file, as a user would type it."""
    option = "" if images is None else f" --images {shlex.quote(str(images))}"
    return f"deadpan data check {shlex.quote(str(path))}{option}"


@dataclass(frozen=True)
class _Entry:
    """A JSON value where a record should be."""

    value: object
    index: int
    line: int | None


@dataclass
class _Findings:
    """The problems of one record, filed under its name."""

    where: str
    index: int
    problems: list[Problem] = field(default_factory=list)

    def error(self, code: str, message: str) -> None:
        self.problems.append(Problem(code, "error", self.where, message, (self.index,)))

    def warning(self, code: str, message: str) -> None:
        self.problems.append(Problem(code, "warning", self.where, message, (self.index,)))


def _place(file: Path, index: int, line: int | None, identifier: str | None) -> str:
    place = f"record {index}" if line is None else f"line {line}"
    return f"{file.name} {place}" + ("" if identifier is None else f" (id {identifier!r})")


def check_images(images: Path | None) -> None:
    """Refuse a folder of pictures that is none.

    Raises:
        DeadpanError: If it does not exist.
    """
    if images is not None and not images.is_dir():
        raise DeadpanError(
            "The folder of pictures does not exist.",
            where=images,
            fix="pass the folder that the picture paths in the records start from",
        )


def read_text(path: Path) -> str:
    """The text of a file of records.

    Raises:
        DeadpanError: If it cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DeadpanError("The file of records does not exist.", where=path) from None
    except OSError as error:
        raise DeadpanError(
            f"The file of records cannot be read: {error.strerror}.", where=path
        ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        encoding, found = "GB18030", f"byte 0x{content[error.start]:02x} at offset {error.start:,}"
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding, found = "UTF-16", "the byte order mark of UTF-16"
        # Beside it, where the paths of its pictures start from.
        whole = shlex.quote(str(path.with_suffix(f".utf8{path.suffix}")))
        raise DeadpanError(
            "The file of records is not UTF-8.",
            where=f"{path} line {line}",
            found=found,
            fix=f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {whole}"
            + (" (if the file comes from Chinese Windows)" if encoding == "GB18030" else ""),
        ) from None


def _parse(text: str, path: Path, line: int, records: tuple[int, ...]) -> object | Problem:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path.name} line {line + error.lineno - 1} column {error.colno}"
        return Problem("json-syntax", "error", where, f"not valid JSON: {error.msg}", records)
    except (ValueError, RecursionError) as error:
        # Valid JSON that Python declines: a number of thousands of digits, nesting as deep.
        where = f"{path.name} line {line}"
        return Problem("json-syntax", "error", where, f"cannot be read: {error}", records)
    return value


def _array(path: Path, text: str) -> Iterator[_Entry | Problem]:
    value = _parse(text, path, 1, ())
    if isinstance(value, Problem):
        yield value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield _Entry(item, index, None)


def _lines(path: Path, text: str) -> list[_Entry | Problem]:
    entries: list[_Entry | Problem] = []
    # str.splitlines would also cut at U+2028 and U+0085, which JSON allows inside a string.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip(_JSON_SPACE):
            index = len(entries)
            value = _parse(content, path, line, (index,))
            entries.append(value if isinstance(value, Problem) else _Entry(value, index, line))
    objects = (isinstance(entry, _Entry) and isinstance(entry.value, dict) for entry in entries)
    if len(entries) > 1 and not any(objects):
        # One object over many lines would otherwise be reported once a line.
        whole = _parse(text, path, 1, ())
        raise DeadpanError(
            "The file is neither a JSON array nor JSON lines.",
            where=path,
            expected="[record, record, ...], or one record a line",
            found=f"one JSON object with the keys {_excerpt(list(whole))}"
            if isinstance(whole, dict)
            else "no line that is a JSON object",
        )
    return entries


def _record(entry: _Entry, path: Path, folder: Path) -> tuple[Record | None, list[Problem]]:
    findings = _Findings(_place(path, entry.index, entry.line, None), entry.index)
    value = entry.value
    if not isinstance(value, dict):
        findings.error("not-an-object", f"expected a JSON object, found {_excerpt(value)}")
        return None, findings.problems
    identifier = _identifier(value, findings)
    findings.where = _place(path, entry.index, entry.line, identifier)
    images = _images(value, findings)
    turns = _turns(value, findings)
    concepts = _concepts(value, findings)
    stars = _stars(value, findings)
    if images is None or turns is None or concepts is None:
        return None, findings.problems
    _check_order(turns, findings)
    _check_texts(turns, images, findings)
    record = Record(
        identifier, images, turns, path, entry.index, entry.line, folder, concepts, stars
    )
    return record, findings.problems


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole(text: str, key: str, findings: _Findings) -> bool:
    """Whether the text can be encoded: half a surrogate pair cannot."""
    half = _LONE_SURROGATE.search(text)
    if half is None:
        return True
    findings.error(
        "broken-text",
        f"{key} holds half a character, {half.group()!r} at position {half.start()}:"
        " the remains of a cut emoji?",
    )
    return False


def _identifier(value: dict[str, object], findings: _Findings) -> str | None:
    identifier = value.get("id")
    if identifier is None:
        return None
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        findings.error("bad-id", f"id: expected text or a number, found {_excerpt(identifier)}")
        return None
    return str(identifier) if _whole(str(identifier), "id", findings) else None


def _images(value: dict[str, object], findings: _Findings) -> tuple[str, ...] | None:
    image = value.get("image")
    if image is None:
        other = [key for key in _OTHER_PICTURE_KEYS if value.get(key)]
        if other:
            findings.warning(
                "unread-pictures",
                f"there is no image, but {', '.join(other)}: only image is read, so the record"
                " counts as text",
            )
        return ()
    listed = image if isinstance(image, list) else [image]
    paths = [path for path in listed if isinstance(path, str) and path.strip()]
    if len(paths) < len(listed):
        findings.error(
            "bad-image", f"image: expected a path or a list of paths, found {_excerpt(image)}"
        )
        return None
    if not all(_whole(path, "image", findings) for path in paths):
        return None
    urls = [path for path in paths if "://" in path or path.startswith("data:")]
    if urls:
        findings.error(
            "picture-url", f"image: expected the path of a local file, found {_excerpt(urls[0])}"
        )
        return None
    return tuple(paths)


def _concepts(value: dict[str, object], findings: _Findings) -> dict[str, tuple[str, ...]] | None:
    given = value.get("concepts")
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(
        name and isinstance(puns, list) and all(isinstance(pun, str) and pun for pun in puns)
        for name, puns in given.items()
    ):
        findings.error(
            "bad-concepts",
            f'concepts: expected {{"name": ["pun", ...], ...}}, found {_excerpt(given)}',
        )
        return None
    return {name: tuple(puns) for name, puns in given.items()}


def _stars(value: dict[str, object], findings: _Findings) -> int | None:
    stars = value.get("stars")
    if stars is None:
        return None
    if isinstance(stars, bool) or not isinstance(stars, int) or stars < 0:
        findings.error(
            "bad-stars", f"stars: expected a number of likes or null, found {_excerpt(stars)}"
        )
        return None
    return stars


def _turns(value: dict[str, object], findings: _Findings) -> tuple[Turn, ...] | None:
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        found = _excerpt(turns) if "conversations" in value else f"the keys {_excerpt(list(value))}"
        if "chosen" in value:
            found = "a preference pair, which is trained on with objective: dpo"
        findings.error(
            "bad-conversations", f"conversations: expected a list of turns, found {found}"
        )
        return None
    built = [_turn(turn, f"conversations[{index}]", findings) for index, turn in enumerate(turns)]
    whole = tuple(turn for turn in built if turn is not None)
    return whole if len(whole) == len(built) else None


def _turn(turn: object, key: str, findings: _Findings) -> Turn | None:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        findings.error(
            "bad-turn", f'{key}: expected {{"from": ..., "value": ...}}, found {_excerpt(turn)}'
        )
        return None
    role, text = turn["from"], turn["value"]
    if role not in ("human", "gpt"):
        findings.error(
            "unknown-speaker", f"{key}.from: expected 'human' or 'gpt', found {_excerpt(role)}"
        )
        return None
    if not isinstance(text, str):
        findings.error("bad-turn", f"{key}.value: expected text, found {_excerpt(text)}")
        return None
    return Turn(role, text) if _whole(text, f"{key}.value", findings) else None


def _check_order(turns: tuple[Turn, ...], findings: _Findings) -> None:
    if turns[0].role != "human":
        findings.error("first-turn", "conversations[0] is from 'gpt'; expected a question first")
    for index in range(1, len(turns)):
        if turns[index].role == turns[index - 1].role:
            findings.error(
                "turn-order",
                f"conversations[{index - 1}] and [{index}] are both from {turns[index].role!r};"
                " expected human and gpt in turn",
            )
    if turns[-1].role != "gpt":
        findings.error(
            "last-turn",
            f"conversations[{len(turns) - 1}], the last, is from 'human'; expected an answer",
        )


def _check_texts(turns: tuple[Turn, ...], images: tuple[str, ...], findings: _Findings) -> None:
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    # As in the official code: a single picture without a tag goes in front of the first question.
    untagged = tags == 0 and len(images) == 1
    if tags != len(images) and not untagged:
        findings.error(
            "image-count",
            f"image: {len(images)} given, but {tags} {IMAGE_TAG} in the questions;"
            f" expected one {IMAGE_TAG} a picture",
        )
    for index, turn in enumerate(turns):
        key = f"conversations[{index}].value"
        tokens = ", ".join(dict.fromkeys(_CONTROL_TOKEN.findall(turn.text)))
        named = f"{key} holds {tokens}, the name of a control token"
        if turn.role == "human":
            if not turn.text.strip() and not (untagged and index == 0):
                findings.error("empty-question", f"{key} is empty; expected a question")
            if tokens:
                findings.warning("control-token", f"{named}; it is read as plain text")
            continue
        if not turn.text.strip():
            findings.error("empty-answer", f"{key} is empty; expected an answer")
        if IMAGE_TAG in turn.text:
            findings.error(
                "image-in-answer", f"{key}, an answer, holds {IMAGE_TAG}; only questions may"
            )
        if tokens:
            findings.error("control-token", f"{named}; the model would learn to spell it")
