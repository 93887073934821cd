"""Write what a checkpoint needs to make its inputs: tokenizer, template, tile policy, stop token."""

import json
from pathlib import Path
from typing import Any

from deadpan.data.records import IMAGE_TAG
from deadpan.processing.processor import POLICY_FILE, Processor
from deadpan.processing.template import IMAGE_END, IMAGE_START, IMAGE_TOKEN
from deadpan.processing.tiles import IMAGENET_MEAN, IMAGENET_STD

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as preprocessor_config.json writes it


def write_json(path: Path, content: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save_processor(processor: Processor, folder: Path, **more: str) -> None:
    """Write the fast tokenizer and `deadpan.json`; enough for deadpan to read the folder back.

    Args:
        processor: What to write.
        folder: Where to.
        more: Further facts for `deadpan.json`.
    """
    save_tokenizer(processor, folder, IMAGE_TAG)
    write_json(folder / POLICY_FILE, {**processor.policy(), **more})


def save_tokenizer(processor: Processor, folder: Path, picture: str) -> None:
    """Write the fast tokenizer with its Jinja template.

    Args:
        processor: Whose tokenizer and template.
        folder: Where to.
        picture: What the reading tool expects in the text in place of a picture.
    """
    tokenizer = processor.tokenizer
    jinja, tokenizer.chat_template = tokenizer.chat_template, processor.template.jinja(picture)
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = jinja
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # A subclass of ours is unknown to other tools; tokenizer.json holds everything anyway.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("auto_map", None)
    config["extra_special_tokens"] = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_TOKEN,
        # transformers' processor insists on one. A new token would lie beyond the vocabulary, and the
        # image token would make it count every picture as a video too.
        "video_token": "<video>" if "<video>" in tokenizer.get_added_vocab() else "</quad>",
    }
    write_json(path, config)


def save_generation_config(processor: Processor, folder: Path) -> None:
    """Write `generation_config.json`, which makes every tool stop at the template's stop token."""
    tokenizer = processor.tokenizer
    config = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": processor.stop_id,
        "pad_token_id": processor.pad_id,
        "do_sample": False,
    }
    write_json(
        folder / "generation_config.json", {k: v for k, v in config.items() if v is not None}
    )


def hf_image_processor(processor: Processor) -> dict[str, Any]:
    """The tile policy in the terms of transformers' image processor for InternVL."""
    policy = processor.tile_policy
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "max_patches": policy.max_tiles,
        "min_patches": policy.min_tiles,
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": policy.tile_size, "width": policy.tile_size},
    }
