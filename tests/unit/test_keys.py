from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import InternVLForConditionalGeneration

from deadpan.checkpoints.keys import Entry, Packing, hf_name, official_entries
from deadpan.checkpoints.official_config import LANGUAGE_MODELS, to_transformers
from make_tiny_model import make_official, official_config

# As OpenGVLab's own files name their tensors.
_OUTSIDE_LAYERS = [
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.position_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.patch_embedding.bias",
    *[f"mlp1.{number}.{leaf}" for number in (0, 1, 3) for leaf in ("weight", "bias")],
]
_VISION_LAYER = [
    *["attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "ls1", "ls2"],
    *["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"],
    *["norm1.weight", "norm2.weight"],
]
_ONLY_300M = ["attn.qkv.bias", "norm1.bias", "norm2.bias"]
_ONLY_6B = ["attn.q_norm.weight", "attn.k_norm.weight"]

_LLAMA_OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
_LLAMA_NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
_LLAMA_LAYER = [
    *[f"self_attn.{part}_proj.weight" for part in "qkvo"],
    *[f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")],
    *_LLAMA_NORMS,
]
_LANGUAGE = {
    # The names outside the layers, and those within one.
    "InternLM2ForCausalLM": (
        ["model.tok_embeddings.weight", "model.norm.weight", "output.weight"],
        [
            *["attention.wqkv.weight", "attention.wo.weight"],
            *[f"feed_forward.w{number}.weight" for number in (1, 2, 3)],
            *["attention_norm.weight", "ffn_norm.weight"],
        ],
    ),
    "LlamaForCausalLM": (_LLAMA_OUTSIDE, _LLAMA_LAYER),
    "Phi3ForCausalLM": (
        _LLAMA_OUTSIDE,
        [
            *["self_attn.qkv_proj.weight", "self_attn.o_proj.weight"],
            *["mlp.gate_up_proj.weight", "mlp.down_proj.weight"],
            *_LLAMA_NORMS,
        ],
    ),
    "Qwen2ForCausalLM": (
        _LLAMA_OUTSIDE,
        [*_LLAMA_LAYER, *[f"self_attn.{part}_proj.bias" for part in "qkv"]],
    ),
}


def official_names(language_model: str, vision_6b: bool) -> set[str]:
    outside, layer = _LANGUAGE[language_model]
    vision = _VISION_LAYER + (_ONLY_6B if vision_6b else _ONLY_300M)
    return {
        *_OUTSIDE_LAYERS,
        *[f"vision_model.encoder.layers.{i}.{name}" for i in range(2) for name in vision],
        *[f"language_model.{name}" for name in outside],
        *[f"language_model.model.layers.{i}.{name}" for i in range(2) for name in layer],
    }


def empty_model(config: dict[str, Any]) -> InternVLForConditionalGeneration:
    with torch.device("meta"):
        return InternVLForConditionalGeneration(to_transformers(config, 40, True, Path()))


@pytest.mark.parametrize("vision_6b", [False, True])
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_every_parameter_has_its_official_name(
    language_model: str, vision_6b: bool, tmp_path: Path
) -> None:
    names = official_names(language_model, vision_6b)
    folder = make_official(tmp_path / "model", language_model, vision_6b)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names

    model = empty_model(official_config(language_model, 40, vision_6b))
    parameters = [name for name, _ in model.named_parameters()]
    entries = official_entries(model.config, parameters, language_model)
    assert {entry.source for entry in entries} == names
    assert sorted(target for entry in entries for target in entry.targets) == sorted(parameters)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        # Names that say little, and that two of one shape could swap unnoticed.
        ("language_model.model.layers.1.feed_forward.w1.weight", "layers.1.mlp.gate_proj.weight"),
        ("language_model.model.layers.1.feed_forward.w2.weight", "layers.1.mlp.down_proj.weight"),
        ("language_model.model.layers.1.feed_forward.w3.weight", "layers.1.mlp.up_proj.weight"),
        ("language_model.model.layers.0.attention_norm.weight", "layers.0.input_layernorm.weight"),
        ("language_model.model.layers.0.ffn_norm.weight", "0.post_attention_layernorm.weight"),
        ("vision_model.encoder.layers.1.ls1", "encoder.layer.1.lambda_1"),
        ("vision_model.encoder.layers.1.ls2", "encoder.layer.1.lambda_2"),
        ("vision_model.encoder.layers.1.norm1.weight", "layer.1.layernorm_before.weight"),
        ("vision_model.encoder.layers.1.norm2.weight", "layer.1.layernorm_after.weight"),
        ("vision_model.encoder.layers.0.attn.q_norm.weight", "layer.0.attention.q_norm.weight"),
        ("mlp1.0.bias", "multi_modal_projector.layer_norm.bias"),
        ("mlp1.1.bias", "multi_modal_projector.linear_1.bias"),
        ("mlp1.3.bias", "multi_modal_projector.linear_2.bias"),
    ],
)
def test_a_name_means_the_parameter_that_it_means_in_the_official_code(
    source: str, target: str
) -> None:
    model = empty_model(official_config("InternLM2ForCausalLM", 40, vision_6b=True))
    parameters = [name for name, _ in model.named_parameters()]
    entries = official_entries(model.config, parameters, "InternLM2ForCausalLM")
    ((found,),) = [entry.targets for entry in entries if entry.source == source]
    assert found.endswith(target)


def test_the_official_code_names_its_weights_so(golden: Path) -> None:
    """The reference checkpoint was saved by OpenGVLab's own classes."""
    with safe_open(golden / "official_tiny" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == official_names("InternLM2ForCausalLM", vision_6b=False)


def test_internlm2_biases_are_fused_like_the_weights() -> None:
    config = official_config("InternLM2ForCausalLM", 40)
    config["llm_config"]["bias"] = True
    model = empty_model(config)
    parameters = [name for name, _ in model.named_parameters()]
    by_source = {
        entry.source: entry
        for entry in official_entries(model.config, parameters, "InternLM2ForCausalLM")
    }
    layer = "model.language_model.layers.0.self_attn."
    assert by_source["language_model.model.layers.0.attention.wqkv.bias"] == Entry(
        "language_model.model.layers.0.attention.wqkv.bias",
        tuple(f"{layer}{part}_proj.bias" for part in "qkv"),
        "grouped",
        kv_heads=2,
    )
    assert by_source["vision_model.encoder.layers.1.attn.qkv.bias"].packing == "thirds"
    assert by_source["language_model.model.layers.0.attention.wo.bias"].targets == (
        f"{layer}o_proj.bias",
    )


@pytest.mark.parametrize("rest", [(), (5,)], ids=["bias", "weight"])
@pytest.mark.parametrize(
    ("packing", "kv_heads", "rows"),
    [
        ("plain", 1, [7]),
        ("thirds", 1, [6, 6, 6]),
        # rows of q, k, v; head_dim 4
        ("grouped", 1, [4, 4, 4]),
        ("grouped", 1, [12, 4, 4]),
        ("grouped", 2, [16, 8, 8]),
        ("grouped", 4, [16, 16, 16]),
        ("grouped", 3, [24, 12, 12]),
    ],
)
def test_join_and_split_undo_each_other(
    packing: Packing, kv_heads: int, rows: list[int], rest: tuple[int, ...]
) -> None:
    entry = Entry("disk", tuple("qkv"[: len(rows)]), packing, kv_heads)
    numbers = torch.arange(sum(rows) * (rest[0] if rest else 1)).reshape(-1, *rest)
    parts = list(numbers.split(rows))
    shapes = [part.shape for part in parts]

    joined = entry.join(parts)
    assert joined.shape == numbers.shape
    assert sorted(joined.flatten().tolist()) == numbers.flatten().tolist()
    for part, again in zip(parts, entry.split(joined, shapes), strict=True):
        assert torch.equal(part, again)
    assert torch.equal(entry.join(entry.split(numbers, shapes)), numbers)


def test_wqkv_holds_for_each_kv_head_its_queries_then_its_key_then_its_value() -> None:
    """Four query heads, two kv heads, two numbers a head."""
    q, k, v = [0, 1, 2, 3, 4, 5, 6, 7], [10, 11, 12, 13], [20, 21, 22, 23]
    on_disk = [*[0, 1, 2, 3, 10, 11, 20, 21], *[4, 5, 6, 7, 12, 13, 22, 23]]
    entry = Entry("wqkv", ("q", "k", "v"), "grouped", kv_heads=2)
    parts = [torch.tensor(rows)[:, None] * torch.tensor([1, 100]) for rows in (q, k, v)]
    joined = entry.join(parts)
    assert joined.tolist() == [[row, 100 * row] for row in on_disk]
    split = entry.split(joined, [part.shape for part in parts])
    assert [part[:, 0].tolist() for part in split] == [q, k, v]


def test_vision_qkv_holds_all_queries_then_all_keys_then_all_values() -> None:
    entry = Entry("qkv", ("q", "k", "v"), "thirds")
    parts = [torch.tensor(rows) for rows in ([0, 1], [10, 11], [20, 21])]
    assert entry.join(parts).tolist() == [0, 1, 10, 11, 20, 21]


@pytest.mark.parametrize(
    ("parameter", "name"),
    [
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        (
            "model.language_model.layers.1.self_attn.q_proj.bias",
            "language_model.model.layers.1.self_attn.q_proj.bias",
        ),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        (
            "model.vision_tower.encoder.layer.0.lambda_1",
            "vision_tower.encoder.layer.0.lambda_1",
        ),
    ],
)
def test_the_hugging_face_names_are_those_of_its_published_files(parameter: str, name: str) -> None:
    assert hf_name(parameter) == name
