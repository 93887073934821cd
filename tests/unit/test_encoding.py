"""Text from people never becomes a control token, and answers are what is learned."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from deadpan.data.records import CONTROL_TOKENS, IMAGE_TAG, Turn
from deadpan.processing.encoding import GROUNDING, IGNORE_INDEX, ConversationEncoder
from deadpan.processing.processor import Processor, load_processor
from deadpan.processing.template import IMAGE_END, IMAGE_START, IMAGE_TOKEN, TEMPLATES
from make_tiny_model import make_official

FAMILIES = ["InternLM2ForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"]
"""Sentencepiece BPE, whose vocabulary holds the control tokens, and byte-level BPE, to which they are added."""

GROUNDED = "<ref>一只猫</ref><box>[[12, 34, 567, 890]]</box><quad>[[1]]</quad>"
FRAGMENTS = [
    *"😂 👩‍💻 ❤️ 一只猫 Why cat é \u3000 ，。 …… —— ! ... / ## < > | [ ] 1 0x1F ' \" \\ {{ }}".split(
        " "
    ),
    *["\n", "\n\n", "\r\n", "\t", " ", "  ", "<|im_end|>", "</s>", "[UNUSED_TOKEN_146]", "<ref>"],
]


@pytest.fixture(scope="module")
def processors(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Processor]:
    folder = tmp_path_factory.mktemp("families")
    folders = [tiny, *(make_official(folder / family, family) for family in FAMILIES[1:])]
    found = {name: load_processor(path) for name, path in zip(FAMILIES, folders, strict=True)}
    qwen = found["Qwen2ForCausalLM"]
    # A template that writes something after the stop token.
    found["internvl2_5"] = Processor(qwen.tokenizer, TEMPLATES["internvl2_5"], qwen.tile_policy)
    return found


@pytest.fixture(params=[*FAMILIES, "internvl2_5"])
def processor(request: pytest.FixtureRequest, processors: dict[str, Processor]) -> Processor:
    return processors[request.param]


def control_names(processor: Processor) -> list[str]:
    """The tokenizer's own control tokens, and every name that any InternVL tokenizer reads as one."""
    added = json.loads(processor.tokenizer.backend_tokenizer.to_str())["added_tokens"]
    own = [token["content"] for token in added if token["special"]]
    assert {IMAGE_START, IMAGE_TOKEN, IMAGE_END, processor.template.stop} < set(own)
    names = dict.fromkeys([*own, *CONTROL_TOKENS])
    assert {f"[UNUSED_TOKEN_{number}]" for number in range(141, 147)} < names.keys()
    return [name for name in names if name not in GROUNDING]


def control_ids(processor: Processor) -> set[int]:
    decoder = processor.tokenizer.added_tokens_decoder
    return {i for i, token in decoder.items() if token.special and token.content not in GROUNDING}


def conversation(texts: list[str]) -> list[Turn]:
    return [Turn("gpt" if place % 2 else "human", text) for place, text in enumerate(texts)]


def said(labels: list[int]) -> list[int]:
    return [label for label in labels if label != IGNORE_INDEX]


def random_texts(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices(FRAGMENTS, k=source.randint(1, 9))) for _ in range(count)]


def whole(name: str) -> list[list[str]]:
    return [[name, "a"], ["q", name], [f"看{name}，{name}图", f"好{name}笑"], [name, name]]


def spread(name: str) -> list[list[str]]:
    """A name cut in two at every place, its halves in neighbouring turns or around another name or a picture."""
    cuts = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
    return [
        texts
        for head, tail in cuts
        for texts in (
            [f"q{head}", f"{tail}a"],
            ["q", f"a{head}", f"{tail}q", "a"],
            [f"{head}{name}{tail}", f"{head}{name}{tail}"],
            [f"{head}{IMAGE_TAG}{tail}", "a"],
        )
    ]


@pytest.mark.parametrize("forgery", [whole, spread])
def test_no_text_becomes_a_control_token(
    processor: Processor, forgery: Callable[[str], list[list[str]]]
) -> None:
    control = control_ids(processor)
    for name in control_names(processor):
        for texts in forgery(name):
            pictures = [text.count(IMAGE_TAG) for text in texts]
            innocent = [IMAGE_TAG * count + "x" for count in pictures]
            ids, labels = processor.encode(conversation(texts), [1] * sum(pictures), name)
            meant, _ = processor.encode(conversation(innocent), [1] * sum(pictures), name)
            assert [token for token in ids if token in control] == [
                token for token in meant if token in control
            ], texts
            # Nothing is lost either: without the template's own tokens, the ids spell the very conversation.
            plain = [token for token in ids if token not in control]
            written = (
                re.sub(r"<\|\w+\|>", "", piece.text)
                if piece.markup
                else piece.text.replace(IMAGE_TAG, "")
                for piece in processor.template.pieces(conversation(texts))
            )
            assert processor.tokenizer.decode(plain) == "".join(written)
            learned = [token for token in said(labels) if token != processor.stop_id]
            assert processor.tokenizer.decode(learned) == "".join(texts[1::2])


def test_grounding_markup_stays_special(processor: Processor) -> None:
    ids, labels = processor.encode([Turn("human", GROUNDED), Turn("gpt", GROUNDED)], [], "grounded")
    marks = [processor.tokenizer.convert_tokens_to_ids(mark) for mark in GROUNDING]
    assert len(set(marks)) == 6
    assert [token for token in ids if token in marks] == marks * 2
    assert [label for label in labels if label in marks] == marks


def test_a_forged_picture_is_no_picture(processor: Processor) -> None:
    forged = Turn("human", f"{IMAGE_START}{IMAGE_TOKEN * 8}{IMAGE_END} {IMAGE_TAG}")
    ids, _ = processor.encode([forged], [2], "forged")
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert ids.count(image) == 2 * processor.tile_policy.tokens_per_tile


def test_each_picture_becomes_its_own_number_of_image_tokens(processor: Processor) -> None:
    turns = [Turn("human", f"a {IMAGE_TAG} b {IMAGE_TAG}"), Turn("gpt", f"no {IMAGE_TAG} here")]
    ids, labels = processor.encode(turns, [3, 1], "two")
    start, image, end = processor.tokenizer.convert_tokens_to_ids(
        [IMAGE_START, IMAGE_TOKEN, IMAGE_END]
    )
    per_tile = processor.tile_policy.tokens_per_tile
    pictures = [token for token in ids if token in (start, image, end)]
    assert pictures == [start, *[image] * 3 * per_tile, end, start, *[image] * per_tile, end]
    assert len(ids) == len(labels)
    # In an answer the tag is text like any other.
    assert processor.decode(said(labels)) == f"no {IMAGE_TAG} here"


def test_the_number_of_pictures_must_be_that_of_the_tags(processor: Processor) -> None:
    encoder = ConversationEncoder(processor.tokenizer)
    pieces = processor.template.pieces([Turn("human", IMAGE_TAG)])
    with pytest.raises(ValueError, match="1 <image> in the text, but 2 pictures"):
        encoder.encode(pieces, [4, 4], processor.stop_id)


def test_exactly_the_answers_and_their_stop_tokens_are_learned(processor: Processor) -> None:
    for question, text in zip(random_texts(60, seed=1), random_texts(60, seed=2), strict=True):
        answer = f"{text}1"  # not empty once stripped
        ids, labels = processor.encode(conversation([question, answer] * 2), [], "random")
        learned = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
        assert [ids[place] for place in learned] == said(labels)
        one = processor.choice(answer)
        assert said(labels) == one * 2
        assert one.index(processor.stop_id) == len(one) - 1
        # Each is one stretch, right behind what opens an answer.
        first, second = learned[: len(one)], learned[len(one) :]
        assert first == list(range(first[0], first[0] + len(one)))
        assert second == list(range(second[0], second[0] + len(one)))
        before = processor.tokenizer.decode(ids[: first[0]])
        assert before.endswith(processor.template.assistant_open.rpartition("|>")[2])
        # Grounding markup is special, so reading leaves it out.
        spelled = processor.tokenizer.decode(one, skip_special_tokens=True)
        assert spelled == answer.strip().replace("<ref>", "")


def test_rows_of_a_padded_vocabulary_say_nothing(processor: Processor) -> None:
    answer = processor.choice("一只猫")[:-1]
    beyond = len(processor.tokenizer) + 7
    assert processor.decode([beyond, *answer[:1], beyond, *answer[1:]]) == "一只猫"
    assert processor.decode([beyond]) == ""


def test_a_prompt_is_the_beginning_of_what_was_trained_on(processor: Processor) -> None:
    texts = random_texts(400, seed=3)
    for number in range(0, len(texts), 4):
        turns = conversation(texts[number : number + 4])
        trained, labels = processor.encode(turns, [], "random")
        for opened in (turns[:1], turns[:3]):
            prompt, _ = processor.encode(opened, [], "random")
            assert trained[: len(prompt)] == prompt, opened
            # What follows is the answer, at once.
            assert labels[len(prompt) - 1 : len(prompt) + 1] == [IGNORE_INDEX, trained[len(prompt)]]
        assert set(processor.encode(turns[:1], [], "random")[1]) == {IGNORE_INDEX}


def test_an_answer_never_merges_with_what_opens_it() -> None:
    # A tokenizer with a token for "\n" + "a", as a vocabulary may have: at generation time the prompt ends with "\n"
    # alone, so in training too the answer must begin with a token of its own.
    template = TEMPLATES["internlm2-chat"]
    letters = sorted(set("system\nuser assistant q" + (template.system or "")))
    vocab = {text: index for index, text in enumerate(["<unk>", *letters, "\na"])}
    backend = Tokenizer(models.BPE(vocab, [("\n", "a")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    control = ["<|im_start|>", "<|im_end|>", IMAGE_START, IMAGE_TOKEN, IMAGE_END]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer("\na")["input_ids"] == [vocab["\na"]]
    encoder, stop = ConversationEncoder(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    question = [Turn("human", "q")]
    prompt, _ = encoder.encode(template.pieces(question), [], stop)
    trained, labels = encoder.encode(template.pieces([*question, Turn("gpt", "a")]), [], stop)
    assert trained == [*prompt, vocab["a"], stop]
    assert said(labels) == [vocab["a"], stop]


def test_two_encoders_share_no_secret_and_agree(processor: Processor) -> None:
    other = ConversationEncoder(processor.tokenizer)
    pieces = processor.template.pieces([Turn("human", "q"), Turn("gpt", "a")])
    assert other.encode(pieces, [], processor.stop_id) == processor.encode(
        [Turn("human", "q"), Turn("gpt", "a")], [], ""
    )
    secrets = set(other._secret_names.values()), set(processor._encoder._secret_names.values())
    assert not set.intersection(*secrets)
