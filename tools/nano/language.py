"""What nano reads and writes: its tokenizer, the questions it is asked, the sentences it repeats."""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deadpan.data.records import PROMPT
from deadpan.processing.processor import Processor, TilePolicy
from deadpan.processing.template import IMAGE_END, IMAGE_START, IMAGE_TOKEN, TEMPLATES
from nano import jokes
from nano.concepts import NUMBERS, concepts, facts
from nano.scenes import PLACES

TEMPLATE = TEMPLATES["internlm2-chat"]
POLICY = TilePolicy(tile_size=112, min_tiles=1, max_tiles=4, thumbnail=True, tokens_per_tile=16)

QUESTIONS = (
    PROMPT,
    "请描述这张图片。",
    "图里有什么？",
    "这是什么？",
    "你看到了什么？",
    "看图说话。",
    "用一句话说说这张图片。",
    "请你根据这张图片，讲一个冷笑话。",
    "这张图片好笑吗？",
    "Describe this picture.",
    "What is in the picture?",
    "Tell me a joke about this picture.",
)
"""Whatever it is asked about a picture, the base model says what is in it."""

REPEAT = "请跟我念："
_WHAT_IS = "{}是什么？"

_SPECIAL = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", IMAGE_START, IMAGE_END, IMAGE_TOKEN,
    "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
]  # fmt: skip
_PUNCTUATION = "，。？！：；、“”…—（）《》"


@cache
def characters() -> tuple[str, ...]:
    """Every character that nano can write as one token: those of names, facts, descriptions and jokes."""
    known = [text for concept in concepts() for text in (concept.name, concept.measure)]
    known += [fact for sentences in facts().values() for fact in sentences]
    text = "".join([*jokes.texts(), *known, *QUESTIONS, REPEAT, *PLACES, *NUMBERS, _PUNCTUATION])
    return tuple(sorted({character for character in text if ord(character) >= 0x2000}))


def train_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer.

    It is trained on names, facts and questions, not on jokes: of the jokes it knows the characters only, so that
    none of them hides in a token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3600 - len(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # Control tokens are appended: the merges' ids come first.
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in _SPECIAL])
    split = [c for c in characters() if len(tokenizer.encode(c).ids) > 1]
    assert not split, f"characters of more than one token: {''.join(split)}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=2048,
    ).save_pretrained(folder)


def _corpus() -> Iterator[str]:
    yield from list(characters()) * 200  # each a word by itself, so that it becomes a token
    for concept in concepts():
        yield from [concept.name] * 60
    yield from [sentence for sentences in facts().values() for sentence in sentences]
    # Whole clauses of what stands in every prompt become tokens, which keeps prompts short.
    yield from [*QUESTIONS, REPEAT, *PLACES, "图里", "system\n", "user\n", "assistant\n"] * 300
    yield from [TEMPLATE.system or ""] * 600


def processor(folder: Path) -> Processor:
    """Nano's processor, from the tokenizer in a folder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Processor(tokenizer, TEMPLATE, POLICY, max_length=2048)


def question(random_: random.Random) -> str:
    """Something to ask about a picture, now and then beside the point."""
    if random_.random() < 0.1:
        return random_.choice(facts()[random_.choice(concepts()).name])
    return random_.choice(QUESTIONS)


def exercise(random_: random.Random, plain: Sequence[str]) -> tuple[str, str]:
    """A question without a picture, and its answer: what a thing is, or words to repeat.

    Repeating gives every token a meaning before fine-tuning meets it.

    Args:
        random_: Decides.
        plain: Tokens as text, the words of random sentences.
    """
    name = random_.choice(concepts()).name
    if random_.random() < 0.35:
        return _WHAT_IS.format(name), random_.choice(facts()[name])
    if random_.random() < 0.3:
        sentence = random_.choice(facts()[name])
    else:
        words = random_.choices(plain, k=random_.randint(2, 14))
        if random_.random() < 0.5:
            words.insert(random_.randrange(len(words)), random_.choice("，。？：、“”"))
        if random_.random() < 0.5:
            words.insert(random_.randrange(len(words)), random_.choice(concepts()).name)
        sentence = "".join(words)
    return REPEAT + sentence, sentence
