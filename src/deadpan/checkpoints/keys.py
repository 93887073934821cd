"""Names and shapes of weights on disk, against those of transformers' modules.

Both layouts are described in one way: an `Entry` says which tensor on disk holds which parameters
of the module, and how they lie in it. Reading splits, writing joins, and either undoes the other.

InternLM2 stores q, k and v interleaved by key-value head: for every key-value head its query heads, then its key, then
its value, (kv_heads, groups + 2, head_dim) rows in all. InternViT stores q, k and v one after the other.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import InternVLConfig

Packing = Literal["plain", "thirds", "grouped"]

_QKV = ("q_proj", "k_proj", "v_proj")

_VISION = {
    r"embeddings\.cls_token": "embeddings.class_embedding",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
    r"embeddings\.patch_embeddings\.projection": "embeddings.patch_embedding",
    r"encoder\.layer\.": "encoder.layers.",
    r"\.attention\.(q|k)_norm": r".attn.\1_norm",
    r"\.attention\.[qkv]_proj": ".attn.qkv",
    r"\.attention\.projection_layer": ".attn.proj",
    r"\.layernorm_before": ".norm1",
    r"\.layernorm_after": ".norm2",
    r"\.lambda_(1|2)": r".ls\1",
}
_PROJECTOR = {r"layer_norm": "0", r"linear_1": "1", r"linear_2": "3"}
_INTERNLM2 = {
    r"embed_tokens": "tok_embeddings",
    r"\.self_attn\.[qkv]_proj": ".attention.wqkv",
    r"\.self_attn\.o_proj": ".attention.wo",
    r"\.mlp\.gate_proj": ".feed_forward.w1",
    r"\.mlp\.up_proj": ".feed_forward.w3",
    r"\.mlp\.down_proj": ".feed_forward.w2",
    r"\.input_layernorm": ".attention_norm",
    r"\.post_attention_layernorm": ".ffn_norm",
}


@dataclass(frozen=True)
class Entry:
    """One tensor on disk.

    Attributes:
        source: Its name on disk.
        targets: The module's parameters in it, in order.
        packing: How they lie in it.
        kv_heads: The number of key-value heads, where it matters.
    """

    source: str
    targets: tuple[str, ...]
    packing: Packing = "plain"
    kv_heads: int = 1

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The tensor on disk, from the module's parameters."""
        if self.packing == "plain":
            return tensors[0]
        if self.packing == "thirds":
            return torch.cat(tensors)
        rest = tensors[0].shape[1:]
        head_dim = tensors[1].shape[0] // self.kv_heads
        by_head = [
            t.reshape(self.kv_heads, -1, head_dim, *rest) for t in tensors
        ]  # (kv, group, d, ...)
        return torch.cat(by_head, dim=1).reshape(-1, *rest)

    def shape(self, shapes: list[torch.Size]) -> torch.Size:
        """The shape of the tensor on disk, from those of the module's parameters."""
        return self.join([torch.empty(shape, device="meta") for shape in shapes]).shape

    def split(self, tensor: torch.Tensor, shapes: list[torch.Size]) -> list[torch.Tensor]:
        """The module's parameters, of the given shapes, from the tensor on disk."""
        if self.packing == "plain":
            return [tensor]
        if self.packing == "thirds":
            return list(tensor.split([shape[0] for shape in shapes]))
        rest = tensor.shape[1:]
        groups = shapes[0][0] // shapes[1][0]
        by_head = tensor.reshape(self.kv_heads, groups + 2, -1, *rest)
        parts = by_head.split([groups, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in parts]


def _rename(name: str, rules: dict[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def _official_name(target: str, internlm2: bool) -> str:
    if target.startswith("model.vision_tower."):
        return "vision_model." + _rename(target.removeprefix("model.vision_tower."), _VISION)
    if target.startswith("model.multi_modal_projector."):
        return "mlp1." + _rename(target.removeprefix("model.multi_modal_projector."), _PROJECTOR)
    if target == "lm_head.weight":
        return "language_model.output.weight" if internlm2 else "language_model.lm_head.weight"
    name = target.removeprefix("model.language_model.")
    return "language_model.model." + (_rename(name, _INTERNLM2) if internlm2 else name)


def official_entries(
    config: InternVLConfig, parameters: Iterable[str], language_model: str
) -> list[Entry]:
    """Entries of the official layout.

    Args:
        config: The module's configuration.
        parameters: The names of its parameters.
        language_model: The official class name of the language model.
    """
    internlm2 = language_model == "InternLM2ForCausalLM"
    kv_heads = config.text_config.num_key_value_heads
    grouped: dict[str, list[str]] = {}
    for target in parameters:
        grouped.setdefault(_official_name(target, internlm2), []).append(target)
    entries = []
    for source, targets in grouped.items():
        if len(targets) == 1:
            entries.append(Entry(source, tuple(targets)))
            continue
        targets.sort(key=lambda name: next(i for i, part in enumerate(_QKV) if part in name))
        packing: Packing = "thirds" if source.startswith("vision_model.") else "grouped"
        entries.append(Entry(source, tuple(targets), packing, kv_heads))
    return entries


def hf_name(target: str) -> str:
    """The name of a parameter in the Hugging Face layout, as `save_pretrained` writes it."""
    name = target.removeprefix("model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return re.sub(r"^language_model\.", "language_model.model.", name)


def hf_entries(parameters: Iterable[str]) -> list[Entry]:
    """Entries of the Hugging Face layout."""
    return [Entry(hf_name(target), (target,)) for target in parameters]
