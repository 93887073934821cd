"""InternLM2's sentencepiece model as a fast tokenizer.

InternLM2 ships a `tokenizer.model` and a slow Python tokenizer that needs remote code. Both say the same thing:
sentencepiece BPE with byte fallback, no normalisation, no dummy prefix, spaces written as `▁`. A BPE in sentencepiece
merges, again and again, the adjacent pair whose concatenation has the best score, the leftmost first. Written as a
list of merges for the `tokenizers` library that is: every way to split a piece into two pieces, in the order of the
pieces' scores.

Three things need care, and golden data holds them:

- *User-defined pieces* (`……`, full-width letters, `[UNUSED_TOKEN_n]`) are cut out of the text before
  any merge and never merge with a neighbour: the long ones become added tokens, the single
  characters merely get no merges.
- The names of six control tokens replace pieces of the model: id 92543 is the piece `[UNUSED_TOKEN_146]` and the token
  `<|im_start|>`. A tokenizer has one name for an id, so the old name is rewritten to the new one before matching.
- `decode` spells what it keeps in its own way: spaces around special tokens, one replacement character for each byte
  that is not UTF-8.

Source: `tokenization_internlm2.py` of InternVL2-2B (OpenGVLab/InternVL, commit 2410d1db) and `bpe_model.cc` of
google/sentencepiece.
"""

import codecs
import json
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from deadpan.errors import DeadpanError

_NORMAL, _USER_DEFINED = 1, 4  # ModelProto.SentencePiece.Type


# sentencepiece writes one replacement character for every byte that is not UTF-8; Python's "replace" writes one for
# a whole truncated character.
def _replace_each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("replace-each", _replace_each)


def _read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """The model's pieces in id order as (text, score, type)."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise DeadpanError(
            "The tokenizer is not a sentencepiece model.",
            where=path,
            fix="download it again (a Git LFS pointer file of some hundred bytes is a common cause)",
        ) from None
    kind, normalizer = model.trainer_spec.model_type, model.normalizer_spec
    if (
        kind != model.trainer_spec.BPE
        or normalizer.add_dummy_prefix
        or normalizer.name != "identity"
    ):
        raise DeadpanError(
            "The sentencepiece model is not of InternLM2's kind.",
            where=path,
            expected="BPE, identity normalisation, no dummy prefix",
            found=f"type {kind}, normalisation {normalizer.name!r}, "
            f"dummy prefix {normalizer.add_dummy_prefix}",
            fix="use a checkpoint that ships a tokenizer.json",
        )
    return [(piece.piece, piece.score, piece.type) for piece in model.pieces]


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, best-scored piece first."""
    ids = {text: index for index, (text, _, kind) in enumerate(pieces) if kind == _NORMAL}
    ranked = []
    for text, score, kind in pieces:
        if kind != _NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


class InternLM2Tokenizer(PreTrainedTokenizerFast):
    """The fast tokenizer, spelling what it decodes as the slow one does.

    An export saves it as a plain `PreTrainedTokenizerFast`, which differs in two rarities only: the spaces around
    special tokens that are kept, and bytes that are not UTF-8.
    """

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **_: object
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        specials = set(self.all_special_ids)
        if skip_special_tokens:
            ids = [index for index in ids if index not in specials]
        # A padded vocabulary has rows without a token. As in any fast tokenizer, they say nothing.
        ids = [index for index in ids if self.convert_ids_to_tokens(index) is not None]
        # The slow base class treats the tokens beyond the sentencepiece model as words between spaces.
        runs: list[list[int] | str] = []
        for index in ids:
            if index >= self.vocab_size:
                runs.append(self.convert_ids_to_tokens(index))
            elif runs and isinstance(runs[-1], list):
                runs[-1].append(index)
            else:
                runs.append([index])
        return " ".join(run if isinstance(run, str) else self._spell(run, specials) for run in runs)

    def _spell(self, ids: list[int], specials: set[int]) -> str:
        """Decode ids of the sentencepiece model; text that a special token ends gets a space in front."""
        text, pending, after_special = "", b"", False
        for index in ids:
            token = self.convert_ids_to_tokens(index)
            if index in specials:
                space = "" if after_special else " "
                text += space + pending.decode(errors="replace-each") + token
                pending, after_special = b"", True
            else:
                byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
                pending += bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
                after_special = False
        return text + pending.decode(errors="replace-each")


def convert(folder: Path) -> InternLM2Tokenizer:
    """Build the fast tokenizer of a folder with InternLM2's `tokenizer.model` and `tokenizer_config.json`.

    Raises:
        DeadpanError: If a file is missing or is not of InternLM2's kind.
    """
    model_file, config_file = folder / "tokenizer.model", folder / "tokenizer_config.json"
    if not model_file.exists():
        raise DeadpanError(
            "The checkpoint lacks tokenizer.model.", where=folder, fix="download it again, whole"
        )
    pieces = _read_pieces(model_file)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    specials = {
        token["content"]: int(index)
        for index, token in sorted(
            config["added_tokens_decoder"].items(), key=lambda item: int(item[0])
        )
    }
    renamed = {
        pieces[i][0]: text
        for text, i in specials.items()
        if i < len(pieces) and pieces[i][0] != text
    }
    vocab = {renamed.get(text, text): index for index, (text, _, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        BPE(vocab, _merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(old, new) for old, new in renamed.items()]
        + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        # Matched after normalisation only where an old name is rewritten into them.
        [AddedToken(text, normalized=text in renamed.values(), special=True) for text in specials]
    )
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=False)
            for text, _, kind in pieces
            if kind == _USER_DEFINED and len(text) > 1 and text not in renamed
        ]
    )
    for text, index in specials.items():
        if tokenizer.token_to_id(text) != index:
            raise DeadpanError(
                f"The added token {text!r} does not fit the sentencepiece model.",
                where=config_file,
                expected=f"id {tokenizer.token_to_id(text)}",
                found=f"id {index}",
                fix="take tokenizer.model and tokenizer_config.json from the same checkpoint",
            )
    bos = config["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, specials[bos])]
    )
    return InternLM2Tokenizer(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=config["eos_token"],
        unk_token=config["unk_token"],
        pad_token=config["pad_token"],
        extra_special_tokens=config.get("additional_special_tokens", []),
        model_max_length=config.get("model_max_length"),
        clean_up_tokenization_spaces=False,
    )
