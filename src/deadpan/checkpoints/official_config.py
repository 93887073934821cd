"""The official `config.json` as transformers' configuration.

Three settings that transformers' defaults would get silently wrong: no LayerNorm after the last ViT layer
(`use_mean_pooling=True`), a head that is not tied to the embeddings, and biases as the checkpoint has them.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import (
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from deadpan.errors import DeadpanError, did_you_mean

LANGUAGE_MODELS: dict[str, type[PreTrainedConfig]] = {
    "InternLM2ForCausalLM": LlamaConfig,  # the same arithmetic under other names
    "LlamaForCausalLM": LlamaConfig,
    "Phi3ForCausalLM": Phi3Config,
    "Qwen2ForCausalLM": Qwen2Config,
}


def language_model_name(config: dict[str, Any], where: Path) -> str:
    """The official class name of the language model.

    Raises:
        DeadpanError: If deadpan does not know it.
    """
    name = (config["llm_config"].get("architectures") or ["none"])[0]
    if name not in LANGUAGE_MODELS:
        raise DeadpanError(
            f"The language model {name!r} is unknown.",
            where=where,
            expected=", ".join(LANGUAGE_MODELS),
            fix=did_you_mean(name, LANGUAGE_MODELS),
        )
    return name


def _text_config(config: dict[str, Any], tied: bool, where: Path) -> PreTrainedConfig:
    official = config["llm_config"]
    name = language_model_name(config, where)
    kind = LANGUAGE_MODELS[name]
    known = {field.name for field in fields(kind)} - {
        field.name for field in fields(PreTrainedConfig)
    }
    known |= {"rope_theta", "rope_scaling"}  # older spellings, which transformers translates
    settings = {key: value for key, value in official.items() if key in known}
    settings["tie_word_embeddings"] = tied
    if name == "InternLM2ForCausalLM":
        settings["attention_bias"] = official.get("bias", False)
        settings["mlp_bias"] = False
    return kind(**settings)


def _vision_config(config: dict[str, Any]) -> InternVLVisionConfig:
    official = config["vision_config"]
    same = (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act norm_type "
        "layer_norm_eps image_size patch_size num_channels attention_dropout initializer_range"
    ).split()
    return InternVLVisionConfig(
        **{key: official[key] for key in same if key in official},
        attention_bias=official.get("qkv_bias", False),
        use_qk_norm=official.get("qk_normalization", False),
        hidden_dropout_prob=official.get("dropout", 0.0),
        use_mean_pooling=True,
    )


def to_transformers(
    config: dict[str, Any], image_token_id: int, has_head: bool, where: Path
) -> InternVLConfig:
    """Translate an official configuration.

    Args:
        config: The parsed `config.json`.
        image_token_id: The tokenizer's id of `<IMG_CONTEXT>`, which the official file does not hold.
        has_head: Whether the weights hold an output head of their own.
        where: The file, for messages.

    Raises:
        DeadpanError: If the architecture is one that deadpan does not know.
    """
    if config.get("ps_version", "v1") != "v2":
        raise DeadpanError(
            "The checkpoint shuffles its pixels in an old, transposed order.",
            where=where,
            expected="ps_version v2 (every InternVL2 and later)",
            found=str(config.get("ps_version", "v1")),
            fix="use InternVL2 or later",
        )
    tied = bool(config["llm_config"].get("tie_word_embeddings", False)) and not has_head
    vision = _vision_config(config)
    edge, patch = vision.image_size[0], vision.patch_size[0]
    ratio = config.get("downsample_ratio", 0.5)
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=_text_config(config, tied, where).to_dict(),
        image_token_id=image_token_id,
        image_seq_length=int((edge // patch) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=tied,
    )
