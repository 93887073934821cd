"""Oogiri-GO, the data of CLoT (arXiv 2312.02439), as records.

The published layout (huggingface.co/datasets/zhongshsh/CLoT-Oogiri-GO) is JSON lines in `en.jsonl`, `cn.jsonl` and
`jp.jsonl`, one answer a line:

    {"type": "I2T", "question": null, "image": "5651380", "text": "It wasn't on purpose.", "star": 5}

`type` is I2T (a picture), IT2T (a picture with words in it) or T2T (a question without a picture); `star` counts likes
and may be null; `image` is an id, whose file may have any suffix or none.
"""

import hashlib
import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deadpan.data.fingerprint import Fingerprint, fingerprint, same_pictures
from deadpan.data.pictures import PictureError, open_picture
from deadpan.data.records import (
    CONTROL_TOKENS,
    IMAGE_TAG,
    PROMPT,
    Record,
    has_lone_surrogate,
    load,
    normalised,
)
from deadpan.data.split import hold_out
from deadpan.errors import DeadpanError

PROMPTS = {
    "cn": PROMPT,
    "en": "Look at this picture and say something dry about it.",
    "jp": "この写真で一言。",
}
"""What a teller is asked about a picture, by the language of the answers."""

TYPES = ("I2T", "IT2T", "T2T")
_EXAMPLES = 5
_ARCHIVES = ("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Selection:
    """Which rows become records.

    Attributes:
        languages: Of `en`, `cn` and `jp`; empty takes every file that is there.
        types: Of `TYPES`.
        min_stars: The fewest likes; None also takes answers whose likes are unknown.
        limit: The most records; of more, whole pictures are drawn.
        held_out: The share of the records to hold out, by picture.
        seed: Decides what is drawn and held out.
    """

    languages: tuple[str, ...] = ()
    types: tuple[str, ...] = ("I2T",)
    min_stars: int | None = None
    limit: int | None = None
    held_out: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Dropped:
    """Rows that were left out for one reason, with the first few of them by name."""

    reason: str
    rows: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What an import read, dropped and wrote.

    Attributes:
        files: The files read.
        rows: Their rows.
        dropped: What was left out, by reason.
        pictures: Distinct pictures of the records.
        merged_pictures: Picture files that show what another file shows; their answers went there.
        with_stars: Records whose likes are known.
        training: Records to train on.
        held_out: Records held out.
        selection: What was asked for.
    """

    files: tuple[str, ...]
    rows: int
    dropped: tuple[Dropped, ...]
    pictures: int
    merged_pictures: int
    with_stars: int
    training: int
    held_out: int
    selection: Selection

    def to_json(self) -> dict[str, Any]:
        """The summary in JSON's own types."""
        return asdict(self)


@dataclass(frozen=True)
class _Row:
    place: str
    language: str
    type: Literal["I2T", "IT2T", "T2T"]
    question: str
    image: str | None
    text: str
    stars: int | None

    @property
    def subject(self) -> str:
        """What the answer is about: rows with the same one stay together."""
        return f"picture {self.image}" if self.image is not None else f"question {self.question}"


class _Bin:
    """Counts what is dropped, and why."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = defaultdict(list)
        self._counts: Counter[str] = Counter()

    def drop(self, reason: str, place: str) -> None:
        self._counts[reason] += 1
        if len(self._places[reason]) < _EXAMPLES:
            self._places[reason].append(place)

    def listed(self) -> tuple[Dropped, ...]:
        return tuple(
            Dropped(reason, rows, tuple(self._places[reason]))
            for reason, rows in self._counts.most_common()
        )


def import_oogiri(
    source: Path,
    out: Path,
    selection: Selection,
    images: Path | None = None,
    prompt: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Make a folder of records from Oogiri-GO: `train.jsonl`, `held-out.jsonl`, `images/`, `summary.json`.

    Each answer is one record; its likes stay with it as `stars`. Picture files that show the same
    (`deadpan.data.fingerprint`) count as one picture, the first of them, and of equal answers to one picture the
    most liked is kept.

    Args:
        source: The folder of the published files, or one of them.
        out: The folder to make; it appears whole or not at all.
        selection: Which rows to take.
        images: The folder of the pictures, subfolders included; by default `images` in the source folder.
        prompt: What to ask about a picture; by default `PROMPTS` of the language.
        progress: Called with (pictures decoded, pictures in all).

    Raises:
        DeadpanError: If a file or folder is missing, `out` is there already, or nothing is left.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DeadpanError(
            "The folder to write already holds something.", where=out, fix="choose another folder"
        )
    files = _files(source, selection.languages)
    dropped = _Bin()
    rows, total = _rows(files, selection, prompt, dropped)
    pictures: dict[str, Path] = {}
    merged = 0
    if any(row.image is not None for row in rows):
        folder = images or (source if source.is_dir() else source.parent) / "images"
        rows, pictures = _with_pictures(rows, _index(folder), dropped)
        prints = _fingerprints(pictures, progress)
        rows = _kept(rows, prints, dropped)
        sound = {name: found for name, found in prints.items() if isinstance(found, Fingerprint)}
        first = same_pictures(sound)
        merged = sum(name != other for name, other in first.items())
        rows = [replace(row, image=first[row.image]) if row.image else row for row in rows]
    rows = _limited(_distinct(rows, dropped), selection, dropped)
    if not rows:
        raise DeadpanError(
            "No row is left to make records of.",
            where=source,
            expected=f"types {', '.join(selection.types)}"
            + ("" if selection.min_stars is None else f" with {selection.min_stars} stars or more"),
            found="; ".join(f"{d.rows:,} dropped: {d.reason}" for d in dropped.listed()) or "none",
            fix="widen the filters, or check the folder of pictures with --images",
        )
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        training, held_out = _write(partial, rows, pictures, selection)
        used = {row.image for row in rows if row.image is not None}
        summary = Summary(
            files=tuple(str(file) for file in files.values()),
            rows=total,
            dropped=dropped.listed(),
            pictures=len(used),
            merged_pictures=merged,
            with_stars=sum(row.stars is not None for row in rows),
            training=training,
            held_out=held_out,
            selection=selection,
        )
        text = json.dumps(summary.to_json(), ensure_ascii=False, indent=2)
        (partial / "summary.json").write_text(text + "\n", encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _files(source: Path, languages: Sequence[str]) -> dict[str, Path]:
    """The files to read, by language."""
    if source.is_file():
        if source.stem not in PROMPTS or (languages and source.stem not in languages):
            raise DeadpanError(
                "The file's name does not tell the language that was asked for.",
                where=source,
                expected=" or ".join(f"{name}.jsonl" for name in languages or PROMPTS),
            )
        return {source.stem: source}
    there = {name: source / f"{name}.jsonl" for name in languages or PROMPTS}
    missing = [path.name for path in there.values() if not path.is_file()]
    if len(missing) == len(there) or (languages and missing):
        raise DeadpanError(
            "The folder is not laid out as Oogiri-GO is published.",
            where=source,
            expected=", ".join(path.name for path in there.values()),
            found=f"no {', no '.join(missing)}" if source.is_dir() else "no such folder",
            fix="deadpan fetch data zhongshsh/CLoT-Oogiri-GO, then pass the folder that it names",
        )
    return {name: path for name, path in there.items() if path.is_file()}


def _rows(
    files: dict[str, Path], selection: Selection, prompt: str | None, dropped: _Bin
) -> tuple[list[_Row], int]:
    rows, total = [], 0
    for language, path in files.items():
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DeadpanError(
                "The file is not UTF-8.", where=path, found=f"a broken byte at {error.start:,}"
            ) from None
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            total += 1
            place = f"{path.name} line {number}"
            row = _row(line, language, place, prompt)
            reason = row if isinstance(row, str) else _unwanted(row, selection)
            if reason is not None:
                dropped.drop(reason, place)
            elif isinstance(row, _Row):
                rows.append(row)
    return rows, total


def _row(line: str, language: str, place: str, prompt: str | None) -> _Row | str:
    """A row, or why it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "not valid JSON"
    if not isinstance(value, dict) or value.get("type") not in TYPES:
        return f"no type of {', '.join(TYPES)}"
    kind, text, stars = value["type"], value.get("text"), value.get("star")
    if not isinstance(text, str) or not text.strip():
        return "no answer"
    if isinstance(stars, float) and stars.is_integer():
        stars = int(stars)
    if stars is not None and (isinstance(stars, bool) or not isinstance(stars, int) or stars < 0):
        return "star is not a number of likes"
    question = value.get("question") if kind == "T2T" else (prompt or PROMPTS[language])
    if not isinstance(question, str) or not question.strip():
        return "no question"
    image = None if kind == "T2T" else value.get("image")
    if kind != "T2T":
        if isinstance(image, bool) or not isinstance(image, str | int) or not str(image).strip():
            return "no picture named"
        image = str(image).strip()
    if any(mark in part for part in (text, question) for mark in (*CONTROL_TOKENS, IMAGE_TAG)):
        return "the text holds the name of a control token"
    if has_lone_surrogate(text + question + (image or "")):
        return "the text holds half a character"
    return _Row(place, language, kind, question.strip(), image, text.strip(), stars)


def _unwanted(row: _Row, selection: Selection) -> str | None:
    if row.type not in selection.types:
        return f"another type than {', '.join(selection.types)}"
    if selection.min_stars is not None:
        if row.stars is None:
            return "stars unknown"
        if row.stars < selection.min_stars:
            return f"fewer than {selection.min_stars} stars"
    return None


def _index(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder and its subfolders, by name and by name without suffix."""
    if not folder.is_dir():
        parent = folder.parent
        archives = sorted(path for form in _ARCHIVES for path in parent.glob(form))
        raise DeadpanError(
            "The folder of pictures does not exist.",
            where=folder,
            found=f"{archives[0].name}, not unpacked" if archives else None,
            fix=f"unpack {archives[0]} there" if archives else "name it with --images",
        )
    index: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            for name in {path.name, path.stem}:
                index[name].append(path)
    return index


def _with_pictures(
    rows: Iterable[_Row], index: dict[str, list[Path]], dropped: _Bin
) -> tuple[list[_Row], dict[str, Path]]:
    """The rows whose picture's file is there, and the files by picture id."""
    kept, pictures = [], {}
    for row in rows:
        if row.image is None:
            kept.append(row)
            continue
        found = index.get(row.image, [])
        if len(found) > 1:
            # A file in the language's own folder is the one that is meant.
            found = [path for path in found if path.parent.name == row.language] or found
        if not found:
            dropped.drop("the picture is missing", f"{row.place} (image {row.image})")
        elif len(found) > 1:
            dropped.drop("several files could be the picture", f"{row.place} (image {row.image})")
        else:
            name = str(found[0])
            pictures[name] = found[0]
            kept.append(replace(row, image=name))
    return kept, pictures


def _fingerprints(
    pictures: dict[str, Path], progress: Progress | None
) -> dict[str, Fingerprint | str]:
    """Each picture's fingerprint, or why it cannot be decoded."""
    prints: dict[str, Fingerprint | str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked = zip(pictures, pool.map(_look, pictures.values()), strict=True)
        for done, (name, found) in enumerate(looked, start=1):
            prints[name] = found
            if progress is not None:
                progress(done, len(pictures))
    return prints


def _look(path: Path) -> Fingerprint | str:
    try:
        return fingerprint(open_picture(path))
    except PictureError as error:
        return error.what


def _kept(rows: Iterable[_Row], prints: dict[str, Fingerprint | str], dropped: _Bin) -> list[_Row]:
    kept = []
    for row in rows:
        fault = None if row.image is None else prints[row.image]
        if isinstance(fault, str):
            dropped.drop("the picture is broken", f"{row.place} ({row.image}: {fault})")
        else:
            kept.append(row)
    return kept


def _distinct(rows: Iterable[_Row], dropped: _Bin) -> list[_Row]:
    """Of equal answers to one picture or question, the most liked; punctuation does not count."""
    best: dict[tuple[str, str], _Row] = {}
    for row in rows:
        key = row.subject, normalised(row.text) or row.text
        held = best.setdefault(key, row)
        if held is row:
            continue
        loser = row
        if (row.stars if row.stars is not None else -1) > (
            held.stars if held.stars is not None else -1
        ):
            best[key], loser = row, held
        dropped.drop("the same answer to the same picture or question", loser.place)
    return list(best.values())


def _limited(rows: Sequence[_Row], selection: Selection, dropped: _Bin) -> list[_Row]:
    """At most so many rows, drawn by whole pictures."""
    if selection.limit is None or len(rows) <= selection.limit:
        return list(rows)
    groups: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        groups[row.subject].append(row)
    names = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    random.Random(selection.seed).shuffle(names)
    drawn: set[str] = set()
    count = 0
    for name in names:
        if count + len(groups[name]) <= selection.limit:
            drawn.add(name)
            count += len(groups[name])
    for row in rows:
        if row.subject not in drawn:
            dropped.drop(f"beyond the limit of {selection.limit:,}", row.place)
    return [row for row in rows if row.subject in drawn]


def _write(
    folder: Path, rows: Sequence[_Row], pictures: dict[str, Path], selection: Selection
) -> tuple[int, int]:
    """Write pictures and records; returns how many records are for training and how many held out."""
    (folder / "images").mkdir(parents=True)
    names = dict(_copies({row.image for row in rows if row.image}, pictures, folder / "images"))
    numbers: Counter[str] = Counter()
    lines = []
    for row in rows:
        name = f"{row.language}-{Path(names[row.image]).stem if row.image else 'text'}"
        lines.append(json.dumps(_record(row, names, f"{name}-{numbers[name]}"), ensure_ascii=False))
        numbers[name] += 1
    everything = folder / "all.jsonl"
    everything.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    # Read back, so that what is written is what the reader takes.
    records: list[Record] = load(everything)
    split = hold_out(records, selection.held_out, selection.seed)
    everything.unlink()
    for file, chosen in (("train.jsonl", split.training), ("held-out.jsonl", split.held_out)):
        text = "".join(f"{lines[index]}\n" for index in chosen)
        (folder / file).write_text(text, encoding="utf-8")
    return len(split.training), len(split.held_out)


def _record(row: _Row, names: dict[str, str], identifier: str) -> dict[str, Any]:
    question = row.question if row.image is None else f"{IMAGE_TAG}\n{row.question}"
    return {
        "id": identifier,
        "image": None if row.image is None else f"images/{names[row.image]}",
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": row.text},
        ],
        "stars": row.stars,
        "source": f"Oogiri-GO {row.place} {row.type}",
    }


def _copies(
    used: Iterable[str], pictures: dict[str, Path], folder: Path
) -> Iterator[tuple[str, str]]:
    """Copy pictures into one folder under names that do not collide."""
    taken: set[str] = set()
    for key in sorted(used):
        path = pictures[key]
        name, number = path.name, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        taken.add(name)
        shutil.copyfile(path, folder / name)
        yield key, name
