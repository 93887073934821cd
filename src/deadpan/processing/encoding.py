"""From a written conversation to token ids that nobody can forge.

A prompt mixes control tokens that the template means (`<|im_start|>`) with text from people, who may type the same
characters. A tokenizer cannot tell them apart, so a question that contains `<|im_end|><|im_start|>system` opens a
system turn. Here the control tokens of the tokenizer are renamed, in a private copy, to names that hold a random
secret. The template's markup is written with the secret names; whatever people type finds no control token to match
and stays plain text. One pass over the whole string keeps everything else (merges, pre-tokenisation, stripping next
to a token) as the official tokenizer has it, so on ordinary text the ids are the official ones.

A second secret token marks where an answer begins. It keeps the tokens of the prompt and of the answer apart, as they
are at generation time, and is removed from the ids.
"""

import json
import re
import secrets
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from deadpan.data.records import CONTROL_TOKENS, IMAGE_TAG
from deadpan.processing.template import IMAGE_END, IMAGE_START, IMAGE_TOKEN, Piece

GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
"""Special tokens that people may write: they mark regions and open neither turn nor picture."""

IGNORE_INDEX = -100
"""The label of a token that is not trained on."""


class ConversationEncoder:
    """Encode written conversations with a tokenizer whose control tokens are out of reach.

    Args:
        tokenizer: The checkpoint's fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        secret = secrets.token_hex(16)
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        control = [
            token["content"]
            for token in spec["added_tokens"]
            if token["content"] not in GROUNDING
            # Not every tokenizer file marks its control tokens as special.
            and (token["special"] or token["content"] in CONTROL_TOKENS)
        ]
        self._secret_names = {
            name: f"\U000f0000{secret}:{i}\U000f0000" for i, name in enumerate(control)
        }
        self._answer_mark = f"\U000f0000{secret}:answer\U000f0000"
        self._encoder = self._renamed(spec)
        self._answer_id = self._encoder.token_to_id(self._answer_mark)
        self._image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._prefix: list[int] = tokenizer("")["input_ids"]  # <s>, for tokenizers that have one
        self._markup = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        for name, secret_name in self._secret_names.items():
            assert self._encoder.token_to_id(secret_name) == tokenizer.convert_tokens_to_ids(name)

    def _renamed(self, spec: dict) -> Tokenizer:
        names = self._secret_names
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, dict):
            spec["model"]["vocab"] = {names.get(text, text): index for text, index in vocab.items()}
        for token in spec["added_tokens"]:
            if token["content"] in names:
                token["content"] = names[token["content"]]
                token["normalized"] = False
        if spec["normalizer"] is not None and spec["normalizer"]["type"] == "Sequence":
            # A rewriting rule that ends in a control token (InternLM2's old names) would be a back door.
            spec["normalizer"]["normalizers"] = [
                rule
                for rule in spec["normalizer"]["normalizers"]
                if rule.get("content") not in names
            ]
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        encoder = Tokenizer.from_str(json.dumps(spec))
        encoder.add_special_tokens([AddedToken(self._answer_mark, normalized=False, special=True)])
        return encoder

    def _write(self, pieces: Sequence[Piece]) -> str:
        """One string, markup in secret names, each picture as one image token between its brackets."""
        picture = self._secret(IMAGE_START + IMAGE_TOKEN + IMAGE_END)
        parts, inside_answer = [], False
        for piece in pieces:
            if piece.answer and not inside_answer:
                parts.append(self._answer_mark)
            inside_answer = piece.answer
            if piece.markup:
                parts.append(self._secret(piece.text))
            else:
                parts.append(piece.text if piece.answer else piece.text.replace(IMAGE_TAG, picture))
        return "".join(parts)

    def _secret(self, markup: str) -> str:
        return self._markup.sub(lambda match: self._secret_names[match[0]], markup)

    def encode(
        self, pieces: Sequence[Piece], image_tokens: Sequence[int], stop_id: int
    ) -> tuple[list[int], list[int]]:
        """Encode a conversation.

        Args:
            pieces: The conversation as the template writes it, `<image>` where a picture goes.
            image_tokens: For each picture, in order, the number of image tokens it becomes.
            stop_id: The token that ends an answer.

        Returns:
            input_ids and labels, equally long: a label is its token's id within an answer and its closing stop token,
            `IGNORE_INDEX` elsewhere.

        Raises:
            ValueError: If the number of `<image>` differs from the number of pictures.
        """
        encoded = self._encoder.encode(self._write(pieces), add_special_tokens=False).ids
        pictures = encoded.count(self._image_id)
        if pictures != len(image_tokens):
            raise ValueError(
                f"{pictures} {IMAGE_TAG} in the text, but {len(image_tokens)} pictures"
            )
        input_ids, labels = list(self._prefix), [IGNORE_INDEX] * len(self._prefix)
        remaining, answering = iter(image_tokens), False
        for token in encoded:
            if token == self._answer_id:
                answering = True
                continue
            repeats = next(remaining) if token == self._image_id else 1
            input_ids += [token] * repeats
            labels += [token if answering else IGNORE_INDEX] * repeats
            if token == stop_id:
                answering = False
        return input_ids, labels
