"""InternViT written out for answering.

What transformers' tower computes, with q, k and v in one product and fewer passes over memory between
two products: seven tiles are 7,175 rows.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from deadpan.models.frozen import Frozen, Rows


def unsupported(model: InternVLForConditionalGeneration) -> str | None:
    """Why a model's tower cannot be computed by `VisionTower`, or None if it can."""
    tower = model.model.vision_tower
    config = tower.config
    if config.norm_type != "layer_norm" or config.use_qk_norm or config.hidden_act != "gelu":
        return "it is written for InternViT-300M's layers"
    if any(isinstance(m, nn.Linear) and type(m) is not nn.Linear for m in tower.modules()):
        return "it knows no adapters"
    return None


class _Layer:
    """One layer's parameters."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.attention, layer.mlp
        self.qkv, self.out, self.fc1, self.fc2 = (
            Frozen(group, dtype, False)
            for group in (
                [attention.q_proj, attention.k_proj, attention.v_proj],
                [attention.projection_layer],
                [mlp.fc1],
                [mlp.fc2],
            )
        )
        self.heads: int = attention.num_heads
        self.norms = [
            (norm.weight.data, norm.bias.data, norm.eps)
            for norm in (layer.layernorm_before, layer.layernorm_after)
        ]
        self.scales = [layer.lambda_1.data, layer.lambda_2.data]


class VisionTower:
    """The vision tower of a model.

    Args:
        model: InternVL.
    """

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        self._tower = model.model.vision_tower
        self._layers = [_Layer(layer, model.dtype) for layer in self._tower.encoder.layer]

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels of shape (tile, 3, tile_size, tile_size) to hidden states (tile, token, channel)."""
        x = self._tower.embeddings(pixel_values)
        shape = x.shape
        x = x.flatten(0, 1)
        weight, bias, eps = self._layers[0].norms[0]
        n = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
        for layer, following in zip(self._layers, [*self._layers[1:], None], strict=True):
            qkv = layer.qkv.forward(Rows(n)).view(*shape[:2], 3, layer.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (tile, head, token, dim)
            out = functional.scaled_dot_product_attention(q, k, v)
            y = layer.out.forward(Rows(out.transpose(1, 2).reshape(len(x), -1)))
            x, n = _added(x, y, layer.scales[0], layer.norms[1])
            y = layer.fc2.forward(Rows(functional.gelu(layer.fc1.forward(Rows(n)))))
            if following is None:
                x = torch.addcmul(x, layer.scales[1], y)
            else:
                x, n = _added(x, y, layer.scales[1], following.norms[0])
        hidden: torch.Tensor = self._tower.layernorm(x.view(shape))
        return hidden


def _added(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x + scale y, and its LayerNorm."""
    total = torch.addcmul(x, scale, y)
    return total, functional.layer_norm(total, total.shape[-1:], *norm)
