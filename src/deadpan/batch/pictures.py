"""What a batch is asked about: the pictures of a folder, or the lines of a file."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deadpan.data.pictures import open_picture
from deadpan.data.records import IMAGE_TAG, Turn, read_text
from deadpan.engines.base import Request
from deadpan.errors import DeadpanError
from deadpan.nano import records_file

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""What marks a picture in a folder; other files there are passed over."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: Tells it from the others, also in a later run.
        images: The picture files as they are written, a folder's from the folder on.
        paths: Where they are.
        prompt: What is asked.
    """

    id: str
    images: tuple[str, ...]
    paths: tuple[Path, ...]
    prompt: str

    def open(self) -> list[Image.Image]:
        """The pictures.

        Raises:
            DeadpanError: If one is broken.
        """
        return [open_picture(path) for path in self.paths]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The question, with the pictures in front of it unless it says where they stand."""
        text = self.prompt
        if IMAGE_TAG not in text:
            text = f"{IMAGE_TAG}\n" * len(self.paths) + text
        return (Turn("human", text),)

    def request(self, images: list[Image.Image]) -> Request:
        """The question about the opened pictures."""
        return Request(images, self.turns, self.id)


def find(source: Path, prompt: str, images: Path | None = None) -> list[Item]:
    """Find what is to be asked, in a fixed order.

    Args:
        source: A folder, searched with its subfolders; or a file with a JSON object a line (or an array
            of them): `image`, and if wanted `id` and `prompt`. In a file of records the first
            question is the prompt. `nano:train` and `nano:held-out` are such files.
        prompt: What is asked where a line does not say.
        images: The folder that a file's picture paths start from; by default that of the file.

    Raises:
        DeadpanError: If there is nothing, a line cannot be understood, or two have the same id.
    """
    source = records_file(source)
    if source.is_dir():
        items = [Item(name, (name,), (source / name,), prompt) for name in _files(source)]
        if not items:
            raise DeadpanError(
                "The folder has no pictures.",
                where=source,
                expected="files ending in " + ", ".join(sorted(SUFFIXES)),
            )
        return items
    items = []
    places: dict[str, str] = {}
    for place, value in _values(source):
        item = _item(value, f"{source} {place}", images or source.parent, prompt)
        if item.id in places:
            raise DeadpanError(
                f"Two questions are called {item.id!r}.",
                where=f"{source} {places[item.id]} and {place}",
                fix='give each an "id" of its own; without one it is called by its picture',
            )
        places[item.id] = place
        items.append(item)
    if not items:
        raise DeadpanError("The file asks nothing.", where=source)
    return items


def _files(folder: Path) -> list[str]:
    """The pictures below a folder, by their paths in it; hidden files and folders are passed over."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place).relative_to(folder)
        found += [
            (here / name).as_posix()
            for name in files
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _values(path: Path) -> Iterator[tuple[str, object]]:
    """The JSON values of a file, each with its place."""
    if not path.exists():
        raise DeadpanError("There is no such folder or file of pictures.", where=path)
    text = read_text(path)
    if text.lstrip().startswith("["):
        values = _parsed(text, path)
        for number, value in enumerate(values if isinstance(values, list) else []):
            yield f"record {number}", value
        return
    # Not splitlines, which would also cut at U+2028, as a prompt may hold it.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"{path} line {number}")


def _parsed(text: str, where: Path | str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DeadpanError(
            f"Not valid JSON: {error}.",
            where=where,
            expected='a picture a line, such as {"image": "dog.png"}',
        ) from None


def _item(value: object, where: str, folder: Path, prompt: str) -> Item:
    entry: dict[str, Any] = value if isinstance(value, dict) else {}
    image = entry.get("image")
    names: list[Any] = image if isinstance(image, list) else [image]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DeadpanError(
            "The line names no picture.",
            where=where,
            expected='{"image": "dog.png", "id": optional, "prompt": optional}',
            found=json.dumps(value, ensure_ascii=False)[:80],
        )
    asked = entry.get("prompt", _first_question(entry))
    if asked is None:
        asked = prompt
    if not isinstance(asked, str) or asked.count(IMAGE_TAG) not in (0, len(names)):
        raise DeadpanError(
            "The prompt does not fit.",
            where=where,
            expected=f"a text with {IMAGE_TAG} once a picture, or without",
            found=json.dumps(asked, ensure_ascii=False)[:80],
        )
    identifier = entry.get("id")
    name = ", ".join(names) if identifier is None else str(identifier)
    return Item(name, tuple(names), tuple(folder / name for name in names), asked)


def _first_question(entry: dict[str, object]) -> object:
    """What a record asks first."""
    turns = entry.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    return first.get("value") if isinstance(first, dict) else None
