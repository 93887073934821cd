"""Ids and labels of training samples are those of the official `preprocess_internlm`."""

import json
from pathlib import Path
from typing import Any

import pytest

from deadpan.data.records import Record, read
from deadpan.errors import DeadpanError
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Processor, TilePolicy
from deadpan.processing.template import IMAGE_END, IMAGE_START, IMAGE_TOKEN, TEMPLATES
from deadpan.processing.tokenizer import load_tokenizer

SAME = [
    "single_turn_zh",
    "single_turn_en",
    "no_image_tag",
    "image_tag_at_end",
    "image_tag_in_middle",
    "multi_turn",
    "text_only",
    "text_only_multi_turn_en",
    "list_of_one_image",
    "list_of_two_images",
    "list_of_two_images_two_turns",
    "white_space_around",
    "very_long_answer",
    "special_characters",
]
"""Samples whose ids and labels are the official ones."""

REFUSED = {
    # The official code drops the turn; a conversation that starts with an answer is more likely damaged.
    "first_turn_from_gpt": "first-turn",
    # It would train on the letters "<image>".
    "text_only_with_image_tag": "image-count",
    # Officially without any label: a sample that costs time and teaches nothing.
    "empty_answer": "empty-answer",
    # Officially the last question is labelled, and the model learns to ask.
    "ends_with_human": "last-turn",
    # The official code raises an AssertionError.
    "two_humans_in_a_row": "turn-order",
    # Officially every label of the sample is lost.
    "eos_text_in_answer": "control-token",
}
"""Samples that are errors in the data here, and the code of each: where the official code is not worth following."""

SECOND_TURN = "image_tag_in_second_turn"
"""Officially the picture goes to the first turn and the tag stays as text; here it goes where the tag stands."""


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "labels"


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, Record]:
    return {record.id or "": record for record in read(folder / "samples.json")[0]}


@pytest.fixture(scope="module")
def tile_counts(folder: Path) -> dict[str, list[int]]:
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    return {sample["id"]: sample.get("num_tiles", []) for sample in samples}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def processor(golden: Path) -> Processor:
    tokenizer = load_tokenizer(golden / "tokenizer_internlm2")
    policy = TilePolicy(448, min_tiles=1, max_tiles=12, thumbnail=True, tokens_per_tile=256)
    return Processor(tokenizer, TEMPLATES["internlm2-chat"], policy)


def test_every_sample_is_accounted_for(
    records: dict[str, Record], expected: dict[str, Any]
) -> None:
    assert {*SAME, *REFUSED, SECOND_TURN} == set(expected["internvl"]) == set(records)
    assert len(records) == len(SAME) + len(REFUSED) + 1 == 21


@pytest.mark.parametrize("name", SAME)
def test_ids_and_labels_are_the_official_ones(
    processor: Processor,
    records: dict[str, Record],
    tile_counts: dict[str, list[int]],
    expected: dict[str, Any],
    name: str,
) -> None:
    input_ids, labels = processor.encode(records[name].turns, tile_counts[name], name)
    assert input_ids == expected["internvl"][name]["input_ids"]
    assert labels == expected["internvl"][name]["labels"]
    assert len(labels) - labels.count(IGNORE_INDEX) == expected["internvl"][name]["n_labelled"] > 0


def test_data_errors_are_reported_rather_than_trained_on(folder: Path) -> None:
    records, problems = read(folder / "samples.json")
    found = {(records[problem.records[0]].id, problem.code) for problem in problems}
    assert found == set(REFUSED.items())
    assert {problem.severity for problem in problems} == {"error"}


def test_a_picture_goes_where_its_tag_stands(
    processor: Processor,
    records: dict[str, Record],
    tile_counts: dict[str, list[int]],
    expected: dict[str, Any],
) -> None:
    input_ids, labels = processor.encode(records[SECOND_TURN].turns, tile_counts[SECOND_TURN], "")
    official = expected["internvl"][SECOND_TURN]
    to_id = processor.tokenizer.convert_tokens_to_ids
    picture = [to_id(IMAGE_START), *[to_id(IMAGE_TOKEN)] * 256, to_id(IMAGE_END)]
    # The same answers are learned, and one picture is seen, in the second question rather than the first.
    learned = [label for label in labels if label != IGNORE_INDEX]
    assert learned == [label for label in official["labels"] if label != IGNORE_INDEX]
    start = input_ids.index(picture[0])
    assert input_ids[start : start + len(picture)] == picture
    without = input_ids[:start] + input_ids[start + len(picture) :]
    assert not set(picture) & set(without)
    text = processor.tokenizer.decode(without, skip_special_tokens=True)
    assert text.endswith(
        "user\n你好assistant\n你好，有什么可以帮你？user\n\n这是什么？assistant\n一只猫。"
    )
    before = processor.tokenizer.decode(input_ids[:start], skip_special_tokens=True)
    assert before.endswith("你好，有什么可以帮你？user\n")
    assert official["input_ids"].index(picture[0]) < start


@pytest.fixture(scope="module")
def short(processor: Processor) -> Processor:
    return Processor(processor.tokenizer, processor.template, processor.tile_policy, 300)


@pytest.mark.parametrize("name", ["single_turn_zh", "multi_turn", "very_long_answer"])
def test_a_sample_that_does_not_fit_is_an_error_and_never_cut(
    short: Processor,
    records: dict[str, Record],
    tile_counts: dict[str, list[int]],
    expected: dict[str, Any],
    name: str,
) -> None:
    # The official code keeps the first 300 tokens: of these samples not one label is left.
    cut = expected["truncated_to_300"]["internvl"][name]
    assert (len(cut["input_ids"]), cut["n_labelled"]) == (300, 0)
    whole = len(expected["internvl"][name]["input_ids"])
    with pytest.raises(DeadpanError, match="too long") as caught:
        short.encode(records[name].turns, tile_counts[name], records[name].name)
    assert caught.value.where == records[name].name
    assert name in records[name].name
    assert caught.value.expected == "at most 300 tokens"
    assert caught.value.found == f"{whole} tokens, 256 of them for 1 tile"
