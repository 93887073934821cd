"""Load a checkpoint's tokenizer as a fast tokenizer, without remote code."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deadpan.errors import DeadpanError
from deadpan.processing.sentencepiece_bpe import convert
from deadpan.processing.template import IMAGE_END, IMAGE_START, IMAGE_TOKEN


def read_json(path: Path) -> Any:
    """Read one of a checkpoint's JSON files.

    Raises:
        DeadpanError: If it is missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeadpanError(
            f"The checkpoint lacks {path.name}.", where=path.parent, fix="download it again, whole"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DeadpanError(f"The file is not valid JSON: {error}.", where=path) from None
    if not isinstance(content, dict):
        raise DeadpanError(
            "The file holds something else than a checkpoint's settings.",
            where=path,
            expected="a JSON object",
            found=f"a {type(content).__name__}",
            fix="download it again",
        )
    return content


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint folder.

    A `tokenizer.json` is read as it is; InternLM2's `tokenizer.model` is converted; other families go through
    transformers' own classes.

    Raises:
        DeadpanError: If there is no readable tokenizer, or it lacks InternVL's image tokens.
    """
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file)
    internlm2 = str(config.get("tokenizer_class", "")).startswith("InternLM2Tokenizer")
    if (folder / "tokenizer.json").exists():
        # Whole as it is; AutoTokenizer would look at config.json and warn that it knows no such model.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    elif internlm2:
        tokenizer = convert(folder)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DeadpanError(f"The tokenizer cannot be loaded: {reason}", where=folder) from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DeadpanError(
                "The checkpoint has no fast tokenizer.",
                where=folder,
                found=type(tokenizer).__name__,
                fix="save one as tokenizer.json with transformers, and put it in the folder",
            )
    known = tokenizer.get_added_vocab()
    missing = [token for token in (IMAGE_START, IMAGE_TOKEN, IMAGE_END) if token not in known]
    if missing:
        raise DeadpanError(
            "The tokenizer lacks InternVL's image tokens.",
            where=config_file,
            expected=" ".join((IMAGE_START, IMAGE_TOKEN, IMAGE_END)),
            found="no " + " ".join(missing),
            fix="use the tokenizer files that came with the InternVL checkpoint",
        )
    return tokenizer
