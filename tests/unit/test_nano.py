"""The bundled model and its starter set."""

from pathlib import Path

import pytest
import torch

import deadpan
from deadpan import nano as bundled
from deadpan.checkpoints.source import resolve
from deadpan.data.checks import check
from deadpan.data.records import load
from deadpan.errors import DeadpanError
from nano.scenes import read_description


def test_names_stand_for_the_bundled_files() -> None:
    assert resolve("nano") == bundled.BASE
    assert bundled.records_file(Path("mine.json")) == Path("mine.json")
    with pytest.raises(DeadpanError, match="no such part") as error:
        bundled.records_file(Path("nano:heldout"))
    assert "nano:held-out" in str(error.value)


def test_the_starter_set_is_in_order_and_its_parts_do_not_meet() -> None:
    parts = {name: load(Path(name)) for name in bundled.RECORDS}
    for name in parts:
        assert check(Path(name)).errors == ()
    train, held_out = parts["nano:train"], parts["nano:held-out"]
    assert len({record.images for record in train}) >= 400
    assert len({record.images for record in held_out}) >= 100
    seen = {name for record in train for name in record.concepts}
    assert all(set(record.concepts) <= seen for record in held_out)

    def pairs(records: list) -> set[frozenset[str]]:
        return {frozenset((a, b)) for r in records for a in r.concepts for b in r.concepts if a < b}

    assert pairs(train).isdisjoint(pairs(held_out))


def test_the_base_model_describes_what_is_pictured() -> None:
    torch.set_num_threads(1)
    records = load(Path("nano:held-out"))[:12]
    teller = deadpan.load("nano", device="cpu")
    for record in records:
        assert set(record.concepts) == _named(str(teller.tell(record.image_paths[0])))


def _named(answer: str) -> set[str]:
    from nano.concepts import concepts

    said = read_description(answer)
    assert said is not None, answer
    return {concepts()[group.concept].name for group in said}
