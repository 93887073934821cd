import json
import shutil
from pathlib import Path

import pytest

from deadpan.data.records import Record, load
from deadpan.errors import DeadpanError
from deadpan.processing.processor import Processor, load_processor
from deadpan.train.survey import Survey, survey


@pytest.fixture(scope="module")
def processor(tiny: Path) -> Processor:
    return load_processor(tiny, max_tiles=4)


@pytest.fixture
def folder(tmp_path: Path, pictures: list[Path], records: Path) -> Path:
    """A copy of the records and their pictures, to damage."""
    return Path(shutil.copytree(records.parent, tmp_path / "data"))


def read(folder: Path) -> list[Record]:
    return load(folder / "records.json")


def refused(
    records: list[Record], processor: Processor, *, max_length: int = 8192, overlong: str = "error"
) -> DeadpanError:
    with pytest.raises(DeadpanError) as caught:
        look(records, processor, max_length, overlong)
    return caught.value


def look(
    records: list[Record], processor: Processor, max_length: int, overlong: str = "error"
) -> Survey:
    shorter = Processor(processor.tokenizer, processor.template, processor.tile_policy, max_length)
    return survey(records, shorter, "skip" if overlong == "skip" else "error")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_the_lengths_are_those_of_the_training_samples(folder: Path, processor: Processor) -> None:
    records = read(folder)
    found = survey(records, processor, "error")
    assert found.records == records
    assert found.lengths == [len(processor.record(record).input_ids) for record in records]
    assert found.skipped == []


def test_progress_counts_every_record(folder: Path, processor: Processor) -> None:
    calls: list[tuple[int, int]] = []
    survey(read(folder), processor, "error", lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_truncated_picture_is_found_though_its_header_is_whole(
    folder: Path, processor: Processor
) -> None:
    cut(folder / "picture-3.png")
    records = read(folder)
    assert processor.length(records[3]) > 0  # what the header says is not enough to find it
    error = refused(records, processor)
    assert error.what == "1 of 4 records cannot be trained on."
    assert error.found is not None
    assert error.found.startswith("records.json record 3 (id 'r3'): The picture is damaged")
    assert str(folder / "picture-3.png") in error.found
    assert error.fix == f"run: deadpan data check {folder / 'records.json'}"


def test_all_broken_pictures_are_named_at_once(folder: Path, processor: Processor) -> None:
    cut(folder / "picture-0.png")
    (folder / "picture-2.png").write_text("<html>404</html>")
    records = read(folder)
    (folder / "picture-3.png").unlink()
    error = refused(records, processor)
    assert error.what == "3 of 4 records cannot be trained on."
    assert error.found is not None
    named = [f"(id 'r{n}')" in error.found for n in range(4)]
    assert named == [True, False, True, True]


def test_a_broken_picture_is_an_error_even_where_overlong_records_are_skipped(
    folder: Path, processor: Processor
) -> None:
    cut(folder / "picture-0.png")
    error = refused(read(folder), processor, overlong="skip")
    assert "cannot be trained on" in error.what


def test_of_many_broken_records_five_are_named_and_the_rest_counted(
    folder: Path, processor: Processor
) -> None:
    samples = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    many = [{**samples[0], "id": f"copy-{n}"} for n in range(7)]
    (folder / "records.json").write_text(json.dumps(many), encoding="utf-8")
    records = read(folder)
    cut(folder / "picture-0.png")
    error = refused(records, processor)
    assert error.found is not None
    assert [f"'copy-{n}'" in error.found for n in range(7)] == [True] * 5 + [False] * 2
    assert error.found.endswith("; and 2 more")


def test_overlong_records_are_refused_with_their_lengths(
    folder: Path, processor: Processor
) -> None:
    records = read(folder)
    lengths = survey(records, processor, "error").lengths
    limit = sorted(lengths)[1]
    error = refused(records, processor, max_length=limit)
    too_long = [n for n, length in enumerate(lengths) if length > limit]
    assert error.what == f"{len(too_long)} of 4 records are too long; none was cut off."
    assert error.expected == f"at most {limit} tokens (max_length)"
    named = "; ".join(f"records.json record {n} (id 'r{n}'): {lengths[n]} tokens" for n in too_long)
    assert error.found == named
    assert error.fix is not None
    assert "data.overlong=skip" in error.fix


def test_overlong_records_are_left_out_and_counted_on_request(
    folder: Path, processor: Processor
) -> None:
    records = read(folder)
    lengths = survey(records, processor, "error").lengths
    limit = sorted(lengths)[1]
    found = look(records, processor, limit, "skip")
    assert found.records == [r for r, n in zip(records, lengths, strict=True) if n <= limit]
    assert found.skipped == [r for r, n in zip(records, lengths, strict=True) if n > limit]
    assert found.lengths == [n for n in lengths if n <= limit]
    assert max(found.lengths) == limit  # a record of exactly max_length fits


def test_skipping_every_record_is_an_error(folder: Path, processor: Processor) -> None:
    error = refused(read(folder), processor, max_length=3, overlong="skip")
    assert error.what == "4 of 4 records are too long; none was cut off."


def test_the_advice_can_be_pasted_into_a_shell(
    folder: Path, processor: Processor, tmp_path: Path
) -> None:
    home = tmp_path / "my records"
    home.mkdir()
    path = Path(shutil.move(folder / "records.json", home))
    cut(folder / "picture-0.png")
    error = refused(load(path, folder), processor)
    assert error.fix == f"run: deadpan data check '{path}' --images {folder}"
