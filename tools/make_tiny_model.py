"""Make a tiny InternVL checkpoint with random weights, for tests and for trying the machinery.

    python tools/make_tiny_model.py OUT [--language-model Qwen2ForCausalLM] [--vision-6b]

It has InternVL2's architecture in miniature (two vision layers, two language layers, 56-pixel tiles of four image
tokens) and a tokenizer of its own, trained on the spot on a few sentences: a sentencepiece model for InternLM2, as the
official one, and byte-level BPE for the other families. It says nothing sensible.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from deadpan.checkpoints import keys
from deadpan.checkpoints.files import write_weights
from deadpan.checkpoints.official_config import to_transformers
from deadpan.checkpoints.processor_files import write_json
from deadpan.processing.template import IMAGE_END, IMAGE_START, IMAGE_TOKEN

CORPUS = [
    "请你根据这张图片，讲一个脑洞大开的梗。",
    "上班第一天，我就想退休。冷得像周一。一只猫。一只狗。",
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
    "The dog looks like it just read its own performance review. Why is it funny?",
    "system user assistant What is this picture about? Tell me a joke about it, please.",
] * 20

_INTERNLM2_CONTROL = [
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
]
_IMAGE = [IMAGE_START, IMAGE_END, IMAGE_TOKEN]
_GROUNDING = ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
_TEMPLATES = {
    "InternLM2ForCausalLM": "internlm2-chat",
    "LlamaForCausalLM": "internlm2-chat",
    "Phi3ForCausalLM": "phi3-chat",
    "Qwen2ForCausalLM": "Hermes-2",
}


def _added(text: str) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": text, "special": True, **plain}


def _sentencepiece_tokenizer(folder: Path) -> int:
    """Write InternLM2's kind of tokenizer files; returns the number of token ids."""
    old_names = [f"[UNUSED_TOKEN_{number}]" for number in range(141, 147)]
    with tempfile.TemporaryDirectory() as scratch:
        prefix = str(Path(scratch) / "tokenizer")
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(CORPUS),
            model_prefix=prefix,
            model_type="bpe",
            vocab_size=800,
            hard_vocab_limit=False,
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            split_digits=True,
            user_defined_symbols=["……", "[UNUSED_TOKEN_0]", *old_names],
            minloglevel=2,
        )
        (folder / "tokenizer.model").write_bytes(Path(f"{prefix}.model").read_bytes())
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    size = model.GetPieceSize()
    added = {"<unk>": 0, "<s>": 1, "</s>": 2}
    added |= {
        text: model.PieceToId(old) for text, old in zip(_INTERNLM2_CONTROL, old_names, strict=True)
    }
    added |= {text: size + place for place, text in enumerate([*_IMAGE, *_GROUNDING])}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "InternLM2Tokenizer",
            "added_tokens_decoder": {str(index): _added(text) for text, index in added.items()},
            "additional_special_tokens": [*_INTERNLM2_CONTROL, *_IMAGE, *_GROUNDING],
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": 8192,
        },
    )
    return size + len(_IMAGE) + len(_GROUNDING)


def _byte_level_tokenizer(folder: Path, phi3: bool) -> int:
    """Write a byte-level BPE tokenizer; returns the number of token ids."""
    chat = (
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        if phi3
        else ["<|im_start|>", "<|im_end|>"]
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = ["<|endoftext|>", *chat, *_IMAGE, *_GROUNDING]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=chat[-1], pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def official_config(
    language_model: str, vocab_size: int, vision_6b: bool = False
) -> dict[str, Any]:
    """An official `config.json` in miniature.

    Args:
        language_model: The official class name of the language model.
        vocab_size: The number of token ids.
        vision_6b: InternViT-6B's kind of vision tower (RMSNorm, norms on q and k, no qkv bias).
    """
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": _TEMPLATES[language_model],
        "use_thumbnail": True,
        "torch_dtype": "float32",
        "llm_config": {
            "architectures": [language_model],
            "bias": False,
            "hidden_act": "silu",
            "hidden_size": 64,
            "initializer_range": 0.02,
            "intermediate_size": 128,
            "max_position_embeddings": 4096,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "vocab_size": vocab_size,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 32,
            "image_size": 56,
            "intermediate_size": 64,
            "layer_norm_eps": 1e-6,
            "norm_type": "rms_norm" if vision_6b else "layer_norm",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": 14,
            "qk_normalization": vision_6b,
            "qkv_bias": not vision_6b,
        },
    }


def random_weights(
    model: InternVLForConditionalGeneration, seed: int, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Weights large enough that a mistake in any of them moves the logits."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.ndim == 1 and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        elif "lambda_" in name:
            weights[name] = 0.5 + 0.1 * noise
        else:
            weights[name] = noise * (0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
    return weights


def make_official(
    folder: Path,
    language_model: str = "InternLM2ForCausalLM",
    vision_6b: bool = False,
    seed: int = 0,
) -> Path:
    """Write a checkpoint in the official layout; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if language_model == "InternLM2ForCausalLM":
        vocab_size = _sentencepiece_tokenizer(folder)
    else:
        vocab_size = _byte_level_tokenizer(folder, phi3=language_model == "Phi3ForCausalLM")
    config = official_config(language_model, vocab_size, vision_6b)
    write_json(folder / "config.json", config)
    hf_config = to_transformers(config, vocab_size - 1, True, folder / "config.json")
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(hf_config)
    weights = random_weights(model, seed)
    entries = keys.official_entries(hf_config, weights, language_model)
    write_weights(
        ((e.source, e.join([weights[name] for name in e.targets])) for e in entries), folder
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--language-model", choices=sorted(_TEMPLATES), default="InternLM2ForCausalLM"
    )
    parser.add_argument(
        "--vision-6b", action="store_true", help="InternViT-6B's kind of vision tower"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_official(arguments.out, arguments.language_model, arguments.vision_6b, arguments.seed)
    print(json.dumps({"wrote": str(arguments.out), "language_model": arguments.language_model}))


if __name__ == "__main__":
    main()
