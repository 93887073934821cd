"""InternLM2's tokenizer, converted to a fast one, says what the official slow one says."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deadpan.processing.tokenizer import load_tokenizer

OLD_NAME = "[UNUSED_TOKEN_146]"
"""The sentencepiece model's own name of the piece that InternLM2 uses as `<|im_start|>`."""

SPELLINGS = [
    ("decoded", "input_ids", False),
    ("decoded_skip_special", "input_ids", True),
    ("decoded_no_special", "input_ids_no_special", False),
    ("decoded_no_special_skip_special", "input_ids_no_special", True),
]


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, Any]:
    path = golden / "tokenizer_internlm2" / "tokenization.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert len(content["cases"]) == len({case["note"] for case in content["cases"]}) == 64
    assert len(content["decode_cases"]) == 40
    return content


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(golden / "tokenizer_internlm2")


@pytest.fixture(scope="module")
def reloaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    """The same after a round through `tokenizer.json`, as other tools will read it."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize(("key", "special"), [("input_ids", True), ("input_ids_no_special", False)])
def test_every_text_has_the_official_ids(
    tokenizer: PreTrainedTokenizerFast, reference: dict[str, Any], key: str, special: bool
) -> None:
    found = {
        case["note"]: tokenizer(case["text"], add_special_tokens=special).input_ids
        for case in reference["cases"]
    }
    assert found == {case["note"]: case[key] for case in reference["cases"]}


@pytest.mark.parametrize(("key", "special"), [("input_ids", True), ("input_ids_no_special", False)])
def test_tokenizer_json_alone_gives_the_official_ids(
    reloaded: PreTrainedTokenizerFast, reference: dict[str, Any], key: str, special: bool
) -> None:
    found = {
        case["note"]: reloaded(case["text"], add_special_tokens=special).input_ids
        for case in reference["cases"]
    }
    assert found == {case["note"]: case[key] for case in reference["cases"]}


@pytest.mark.parametrize(("spelling", "ids", "skip"), SPELLINGS)
def test_every_text_is_decoded_as_the_official_tokenizer_spells_it(
    tokenizer: PreTrainedTokenizerFast,
    reference: dict[str, Any],
    spelling: str,
    ids: str,
    skip: bool,
) -> None:
    found = {
        case["note"]: tokenizer.decode(case[ids], skip_special_tokens=skip)
        for case in reference["cases"]
    }
    assert found == {case["note"]: case[spelling] for case in reference["cases"]}


@pytest.mark.parametrize(("spelling", "skip"), [("decoded", False), ("decoded_skip_special", True)])
def test_any_list_of_ids_is_decoded_as_the_official_tokenizer_spells_it(
    tokenizer: PreTrainedTokenizerFast, reference: dict[str, Any], spelling: str, skip: bool
) -> None:
    cases = reference["decode_cases"]
    found = [tokenizer.decode(case["ids"], skip_special_tokens=skip) for case in cases]
    assert found == [case[spelling] for case in cases]


def test_tokenizer_json_decodes_answers_alike_but_for_broken_utf8(
    reloaded: PreTrainedTokenizerFast, reference: dict[str, Any]
) -> None:
    # With special tokens skipped, as every answer is read. sentencepiece writes one replacement character a byte, the
    # tokenizers library one a broken character.
    pairs = [
        (case["decoded_skip_special"], reloaded.decode(case[ids], skip_special_tokens=True))
        for cases, ids in ((reference["cases"], "input_ids"), (reference["decode_cases"], "ids"))
        for case in cases
    ]
    whole = [pair for pair in pairs if "\ufffd" not in pair[0]]
    assert len(whole) > 90
    assert [found for _, found in whole] == [official for official, _ in whole]


def test_a_batch_is_padded_on_the_left(
    tokenizer: PreTrainedTokenizerFast, reference: dict[str, Any]
) -> None:
    batch = reference["batch"]
    found = tokenizer(batch["texts"], padding=True, padding_side=batch["padding_side"])
    assert found["input_ids"] == batch["input_ids"]
    assert found["attention_mask"] == batch["attention_mask"]


@pytest.mark.parametrize("form", ["tokenizer", "reloaded"])
def test_the_facts_are_the_official_ones(
    request: pytest.FixtureRequest, reference: dict[str, Any], form: str
) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(form)
    facts = reference["facts"]
    same = [
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "padding_side",
        "model_max_length",
        "all_special_tokens",
        "all_special_ids",
    ]
    assert {key: getattr(tokenizer, key) for key in same} == {key: facts[key] for key in same}
    assert len(tokenizer) == facts["len_tokenizer"]
    assert facts["added_tokens_encoder"].items() <= tokenizer.get_added_vocab().items()
    names = facts["convert_ids_to_tokens"]
    assert {i: tokenizer.convert_ids_to_tokens(int(i)) for i in names} == names
    ids = dict(facts["convert_tokens_to_ids"])
    # A fast tokenizer has one name for an id, and this one's is `<|im_start|>`: the old name is no token of its own.
    # As text it still becomes that id (the case "unused token piece in text").
    assert ids.pop(OLD_NAME) == ids["<|im_start|>"]
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in ids} == ids
    assert tokenizer.convert_tokens_to_ids(OLD_NAME) == facts["unk_token_id"]
    assert tokenizer(OLD_NAME, add_special_tokens=False).input_ids == [ids["<|im_start|>"]]
