import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from deadpan.config.schema import Data
from deadpan.data.records import Record, load
from deadpan.data.split import hold_out, refuse_shared
from deadpan.errors import DeadpanError

Named = tuple[str, list[str], str]


def write(path: Path, samples: Sequence[Named]) -> list[Record]:
    """Records of (id, pictures, answer); a picture's bytes are its name up to a dash."""
    lines = []
    for name, pictures, answer in samples:
        for picture in pictures:
            (path.parent / picture).write_bytes(picture.split("-")[0].encode())
        tags = "<image>\n" * len(pictures)
        turns = [{"from": "human", "value": f"{tags}Why?"}, {"from": "gpt", "value": answer}]
        lines.append({"id": name, "image": pictures or None, "conversations": turns})
    path.write_text(json.dumps(lines))
    return load(path)


def many(path: Path, count: int = 60) -> list[Record]:
    """Records with pictures in pairs (two jokes a picture), in triples, and under two names."""
    samples: list[Named] = []
    for i in range(count):
        samples.append((f"a{i}", [f"p{i}"], "first"))
        if i % 2:
            samples.append((f"b{i}", [f"p{i}-copy"], "second"))
        if i % 7 == 0:
            samples.append((f"c{i}", [f"p{i}", f"p{(i + 3) % count}"], "both"))
    return write(path, samples)


def pictures_of(records: Sequence[Record], indices: Sequence[int]) -> set[bytes]:
    return {path.read_bytes() for i in indices for path in records[i].image_paths}


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_picture_is_on_both_sides_and_none_is_lost(
    tmp_path: Path, share: float, seed: int
) -> None:
    records = many(tmp_path / "r.json")
    split = hold_out(records, share, seed)
    assert sorted((*split.training, *split.held_out)) == list(range(len(records)))
    assert not pictures_of(records, split.training) & pictures_of(records, split.held_out)
    assert len(split.held_out) == pytest.approx(share * len(records), abs=1)


def test_the_split_depends_on_the_seed_and_not_on_order_or_names(tmp_path: Path) -> None:
    records = many(tmp_path / "r.json")
    before = pictures_of(records, hold_out(records, 0.2, 0).held_out)
    shuffled = random.Random(7).sample(records, len(records))
    assert pictures_of(shuffled, hold_out(shuffled, 0.2, 0).held_out) == before
    assert pictures_of(records, hold_out(records, 0.2, 1).held_out) != before


def test_records_with_several_pictures_link_them(tmp_path: Path) -> None:
    # a-b, b-c and c-d hang together through copies of b and c; only e is free.
    chain: list[Named] = [
        ("1", ["a", "b"], "x"),
        ("2", ["b-copy", "c"], "x"),
        ("3", ["c-copy", "d"], "x"),
        ("4", ["d"], "x"),
        ("5", ["e"], "x"),
    ]
    records = write(tmp_path / "r.json", chain)
    for seed in range(5):
        for share in (0.1, 0.5):
            assert hold_out(records, share, seed).held_out == (4,)


def test_a_share_too_small_for_any_group_takes_the_smallest(tmp_path: Path) -> None:
    samples: list[Named] = [(f"{p}{i}", [p], "x") for p in "ab" for i in range(10)]
    records = write(tmp_path / "r.json", samples[:-1])
    assert hold_out(records, 0.01, 0).held_out == tuple(range(10, 19))


def test_records_without_pictures_go_by_their_question(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    lines = [
        {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": f"{number}"},
            ]
        }
        for question in ("one?", "two?", "three?")
        for number in range(3)
    ]
    path.write_text(json.dumps(lines))
    held_out = hold_out(load(path), 0.34, 0).held_out
    assert len(held_out) == 3
    assert len({i // 3 for i in held_out}) == 1


def test_one_picture_cannot_be_split(tmp_path: Path) -> None:
    records = write(tmp_path / "r.json", [("1", ["a"], "x"), ("2", ["a-copy"], "y")])
    with pytest.raises(DeadpanError, match="No record can be held out") as caught:
        hold_out(records, 0.5, 0)
    assert "data.validation=FILE" in (caught.value.fix or "")


def test_a_file_that_shares_pictures_is_refused_by_name(tmp_path: Path) -> None:
    training = write(tmp_path / "train.json", [("1", ["a"], "x"), ("2", ["b"], "y")])
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "b", tmp_path / "other" / "quite-another-name")
    clean = write(tmp_path / "clean.json", [("7", ["c"], "y")])
    refuse_shared(training, clean)
    lines = [
        {
            "id": "9",
            "image": "quite-another-name",
            "conversations": [
                {"from": "human", "value": "<image>\n?"},
                {"from": "gpt", "value": "z"},
            ],
        }
    ]
    (tmp_path / "other" / "v.json").write_text(json.dumps(lines))
    with pytest.raises(DeadpanError) as caught:
        refuse_shared(training, load(tmp_path / "other" / "v.json"))
    error = caught.value
    assert error.what == "1 of 1 held-out records are about pictures that are trained on."
    assert "v.json record 0 (id '9') and train.json record 1 (id '2')" in (error.found or "")
    assert "data.validation=0.05" in (error.fix or "")


def test_the_starter_set_shares_no_picture() -> None:
    refuse_shared(load(Path("nano:train")), load(Path("nano:held-out")))


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -0.1, 1.5, True])
def test_a_share_is_between_nothing_and_all(value: object) -> None:
    with pytest.raises(ValueError, match="validation"):
        Data.model_validate({"train": "x.json", "validation": value})
