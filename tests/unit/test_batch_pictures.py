"""What a batch is asked about."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deadpan.batch.pictures import find
from deadpan.checkpoints.digest import weights_digest
from deadpan.data.records import PROMPT
from deadpan.errors import DeadpanError


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_a_line_may_have_its_own_prompt_and_id(tmp_path: Path) -> None:
    path = write(
        tmp_path / "list.jsonl",
        {"image": "a.png"},
        {"image": "a.png", "id": 7, "prompt": "Why?"},
        {"image": ["a.png", "b.png"]},
    )
    first, second, both = find(path, "What?")
    assert (first.id, first.images, first.paths, first.prompt) == (
        "a.png", ("a.png",), (tmp_path / "a.png",), "What?",
    )  # fmt: skip
    assert (second.id, second.prompt) == ("7", "Why?")
    assert (both.id, both.images) == ("a.png, b.png", ("a.png", "b.png"))
    assert find(path, "What?", tmp_path / "there")[0].paths == (tmp_path / "there" / "a.png",)
    pictures = [Image.new("RGB", (4, 4))] * 2
    assert both.request(pictures).turns[0].text == "<image>\n<image>\nWhat?"


def test_records_are_asked_their_own_question() -> None:
    items = find(Path("nano:held-out"), "not this")
    assert {item.prompt for item in items} == {f"<image>\n{PROMPT}"}
    assert items[0].request(items[0].open()).turns[0].text == f"<image>\n{PROMPT}"


@pytest.mark.parametrize(
    ("values", "what", "where"),
    [
        ([{"image": "a.png"}, {"picture": "b.png"}], "names no picture", "line 2"),
        ([{"image": "a.png"}, 3], "names no picture", "line 2"),
        ([{"image": []}], "names no picture", "line 1"),
        ([{"image": "a.png"}, {"image": "a.png"}], "Two questions", "line 1 and line 2"),
        ([{"image": "a.png", "prompt": 3}], "prompt does not fit", "line 1"),
        ([{"image": "a.png", "prompt": "<image><image>"}], "prompt does not fit", "line 1"),
        ([], "asks nothing", ""),
    ],
)
def test_a_line_that_cannot_be_asked_is_named(
    tmp_path: Path, values: list[Any], what: str, where: str
) -> None:
    path = write(tmp_path / "list.jsonl", *values)
    with pytest.raises(DeadpanError, match=what) as caught:
        find(path, "What?")
    assert caught.value.where == f"{path} {where}".strip()


def test_what_is_not_there_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match="no such folder or file"):
        find(tmp_path / "nowhere", "What?")
    with pytest.raises(DeadpanError, match="no pictures"):
        find(tmp_path, "What?")
    (tmp_path / "list.jsonl").write_text('{"image": "a.png"}\nnonsense\n')
    with pytest.raises(DeadpanError, match="Not valid JSON") as caught:
        find(tmp_path / "list.jsonl", "What?")
    assert caught.value.where == f"{tmp_path / 'list.jsonl'} line 2"


def test_a_model_is_told_by_its_weights_and_not_by_its_place(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert weights_digest(copy) == weights_digest(tiny)
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_digest(copy) != weights_digest(tiny)


def test_a_merged_model_is_told_from_its_base_whose_embeddings_it_has(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    weights = tmp_path / "model.safetensors"
    edge, matrix = bytes(2**20), bytes(2**19)
    for whole in (2**26, 0):
        monkeypatch.setattr("deadpan.checkpoints.digest._WHOLE", whole)
        weights.write_bytes(edge + matrix + edge)
        base = weights_digest(tmp_path)
        weights.write_bytes(edge + b"m" * len(matrix) + edge)
        assert weights_digest(tmp_path) != base
