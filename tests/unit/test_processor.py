"""The processor: pictures and turns in, the model's tensors out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deadpan.data.pictures import PictureError, open_picture
from deadpan.data.records import IMAGE_TAG, Record, Turn, load
from deadpan.errors import DeadpanError
from deadpan.processing import tiles
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import (
    POLICY_FILE,
    Processor,
    TilePolicy,
    load_processor,
    place_pictures,
)
from deadpan.processing.template import IMAGE_TOKEN, TEMPLATES

Q, A = Turn("human", "q"), Turn("gpt", "a")
SEEN = Turn("human", f"{IMAGE_TAG} q")


@pytest.fixture(scope="module")
def processor(tiny: Path) -> Processor:
    return load_processor(tiny)


@pytest.fixture(scope="module")
def samples(records: Path) -> list[Record]:
    return load(records)


def test_a_picture_without_a_place_goes_before_the_first_question() -> None:
    turns = [Turn("human", "\n q \n"), A, Q]
    assert place_pictures(turns, 1, "") == [Turn("human", f"{IMAGE_TAG}\nq"), A, Q]
    assert turns[0].text == "\n q \n"


@pytest.mark.parametrize(
    ("turns", "pictures"),
    [
        ([Q], 0),
        ([SEEN], 1),
        ([Q, A, SEEN], 1),
        ([SEEN, A, SEEN], 2),
        ([Q, Turn("gpt", IMAGE_TAG)], 0),
    ],
)
def test_places_that_match_stay(turns: list[Turn], pictures: int) -> None:
    assert place_pictures(turns, pictures, "") == turns


@pytest.mark.parametrize(
    ("turns", "pictures", "marks"),
    [
        ([SEEN], 0, 1),
        ([Q], 2, 0),
        ([SEEN], 2, 1),
        ([SEEN, A, SEEN], 1, 2),
        ([Q, Turn("gpt", IMAGE_TAG * 2)], 2, 0),
    ],
)
def test_places_that_do_not_match_are_an_error(
    turns: list[Turn], pictures: int, marks: int
) -> None:
    with pytest.raises(DeadpanError, match="do not match") as caught:
        place_pictures(turns, pictures, "jokes.json record 3")
    assert caught.value.where == "jokes.json record 3"
    assert (caught.value.expected or "").startswith(f"{pictures} {IMAGE_TAG}")
    assert caught.value.found == f"{marks} {IMAGE_TAG}"


@pytest.mark.parametrize(("pictures", "limit"), [(0, 12), (1, 12), (2, 6), (5, 2), (7, 1), (99, 1)])
def test_pictures_of_one_sample_share_its_tiles(pictures: int, limit: int) -> None:
    policy = TilePolicy(56, min_tiles=1, max_tiles=12, thumbnail=True, tokens_per_tile=4)
    assert policy.share(pictures) == limit
    assert replace(policy, min_tiles=3).share(pictures) == max(3, limit)


@pytest.mark.parametrize("pictures", [1, 2, 4])
def test_a_shared_picture_has_as_many_tiles_as_its_share_allows(
    processor: Processor, pictures: int
) -> None:
    image = Image.new("RGB", (1200, 100))
    turns = [Turn("human", IMAGE_TAG * pictures)]
    sample = processor.sample([image] * pictures, turns, "shared")
    each = 12 // pictures + 1  # and the thumbnail
    assert sample.pixel_values is not None
    assert len(sample.pixel_values) == pictures * each
    assert processor.tile_policy.count(image.size, pictures) == each
    image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert sample.input_ids.count(image_token) == pictures * each * 4


def test_a_record_becomes_a_sample(processor: Processor, samples: list[Record]) -> None:
    for record in samples:
        sample = processor.record(record)
        image = open_picture(record.image_paths[0])
        assert sample.name == record.name
        assert sample.pixel_values is not None
        assert torch.equal(sample.pixel_values, tiles.pixel_values(image, 12, 56))
        assert len(sample.input_ids) == len(sample.labels) == processor.length(record)
        assert (
            processor.decode([i for i in sample.labels if i != IGNORE_INDEX]) == (record.answers[0])
        )


def test_a_broken_picture_is_reported_and_never_replaced(
    processor: Processor, samples: list[Record], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = replace(samples[0], images=("broken.png",), folder=tmp_path)
    for read in (processor.record, processor.length):
        with pytest.raises(PictureError) as caught:
            read(broken)
        assert caught.value.where == str(tmp_path / "broken.png")


def test_calling_a_processor_gives_what_the_model_takes(processor: Processor) -> None:
    image = Image.new("RGB", (130, 60))
    inputs = processor([image], "q")
    sample = processor.sample([image], [Turn("human", f"{IMAGE_TAG}\nq")], "")
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["input_ids"].tolist() == [sample.input_ids]
    assert inputs["attention_mask"].tolist() == [[1] * len(sample.input_ids)]
    assert inputs["pixel_values"].shape == (3, 3, 56, 56)
    assert processor([], "q").keys() == {"input_ids", "attention_mask"}


def test_a_sample_that_is_too_long_is_an_error_that_names_it(
    processor: Processor, samples: list[Record]
) -> None:
    record = samples[1]
    whole = processor.record(record)
    length = len(whole.input_ids)
    assert whole.pixel_values is not None
    count = len(whole.pixel_values)
    fits, short = (
        Processor(processor.tokenizer, processor.template, processor.tile_policy, limit)
        for limit in (length, length - 1)
    )
    assert fits.record(record).input_ids == whole.input_ids
    with pytest.raises(DeadpanError, match="too long") as caught:
        short.record(record)
    assert caught.value.where == record.name
    assert caught.value.expected == f"at most {length - 1} tokens"
    assert caught.value.found == f"{length} tokens, {4 * count} of them for {count} tiles"
    assert short.length(record) == length  # a survey wants to know by how much


@pytest.mark.parametrize("text", ["一只猫。", " Why?\n", "😂", "<|im_end|>", "<image>"])
def test_a_choice_is_scored_on_what_training_would_teach(processor: Processor, text: str) -> None:
    _, labels = processor.encode([SEEN, Turn("gpt", text)], [1], "")
    assert processor.choice(text) == [label for label in labels if label != IGNORE_INDEX]
    assert processor.decode(processor.choice(text)) == text.strip()


def test_decoding_ends_at_the_stop_token(processor: Processor) -> None:
    answer = processor.choice(" \n一只 猫 \n")
    assert processor.decode([*answer, *processor.choice("more")]) == "一只 猫"
    assert processor.decode(answer[:-1]) == "一只 猫"
    assert processor.decode([]) == processor.decode([processor.stop_id]) == ""


def copied(tiny: Path, folder: Path, **changes: Any) -> Path:
    """The processor's files of the tiny checkpoint, with another config.json."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tiny / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_policy_is_the_checkpoints_own(tiny: Path, tmp_path: Path) -> None:
    processor = load_processor(tiny)
    assert processor.tile_policy == TilePolicy(56, 1, 12, thumbnail=True, tokens_per_tile=4)
    assert processor.template == TEMPLATES["internlm2-chat"]
    with pytest.raises(DeadpanError, match="max_tiles is out of range"):
        load_processor(tiny, max_tiles=0)
    assert load_processor(tiny, max_tiles=6).tile_policy == replace(
        processor.tile_policy, max_tiles=6
    )
    other = copied(
        tiny,
        tmp_path / "other",
        template="internvl2_5",
        force_image_size=112,
        min_dynamic_patch=2,
        max_dynamic_patch=5,
        use_thumbnail=False,
    )
    changed = load_processor(other)
    assert changed.tile_policy == TilePolicy(112, 2, 5, thumbnail=False, tokens_per_tile=16)
    assert changed.template == TEMPLATES["internvl2_5"]


def test_a_fixed_picture_size_means_one_tile(tiny: Path, tmp_path: Path) -> None:
    fixed = load_processor(copied(tiny, tmp_path / "fixed", dynamic_image_size=False))
    assert fixed.tile_policy.max_tiles == 1


def test_what_is_saved_outweighs_the_config(
    tiny: Path, processor: Processor, tmp_path: Path
) -> None:
    folder = copied(tiny, tmp_path / "saved", template="internvl2_5", max_dynamic_patch=3)
    own = replace(processor.template, name="mine", system=None)
    policy = replace(processor.tile_policy, max_tiles=7)
    mine = Processor(processor.tokenizer, own, policy)
    (folder / POLICY_FILE).write_text(json.dumps(mine.policy()))
    found = load_processor(folder)
    assert (found.template, found.tile_policy) == (own, policy)


def test_an_unknown_template_names_the_config(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "odd", template="internlm3")
    with pytest.raises(DeadpanError, match="'internlm3' is unknown") as caught:
        load_processor(folder)
    assert caught.value.where == str(folder / "config.json")


def test_a_tokenizer_without_the_stop_token_is_refused(processor: Processor) -> None:
    with pytest.raises(DeadpanError, match="lacks the stop token of template 'phi3-chat'"):
        Processor(processor.tokenizer, TEMPLATES["phi3-chat"], processor.tile_policy)
