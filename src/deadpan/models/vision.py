"""InternViT written out for answering.

What transformers' tower computes, with q, k and v in one product and fewer passes over memory between
two products: seven tiles are 7,175 rows. The patches' convolution, whose stride is its kernel, is a
product as well.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from deadpan.models.frozen import Frozen, Rows
from deadpan.models.fused import elementwise_for


def unsupported(model: InternVLForConditionalGeneration) -> str | None:
    """Why a model's tower cannot be computed by `VisionTower`, or None if it can."""
    tower = model.model.vision_tower
    config = tower.config
    if config.norm_type != "layer_norm" or config.use_qk_norm or config.hidden_act != "gelu":
        return "it is written for InternViT-300M's layers"
    if tower.embeddings.position_embeddings is None:
        return "it wants positions"
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


class _Patches:
    """The patches' embedding as one product.

    Args:
        embeddings: transformers' module.
    """

    def __init__(self, embeddings: Any) -> None:
        projection = embeddings.patch_embeddings.projection
        weight = projection.weight.data.flatten(1)  # (hidden, channel * row * column)
        # 3 x 14 x 14 numbers are 1,176 bytes, which the fast kernels cannot step by.
        self._columns = weight.shape[1]
        self._weight = functional.pad(weight, (0, -self._columns % 16))
        self._bias = projection.bias.data
        self._edge: int = projection.kernel_size[0]
        self._embeddings = embeddings

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (tile, 3, tile_size, tile_size) to the class token and patches (tile, token, hidden)."""
        edge, size = self._edge, pixel_values.shape[2:]
        cut = pixel_values.to(self._weight.dtype).unflatten(3, (-1, edge)).unflatten(2, (-1, edge))
        cut = cut.permute(0, 2, 4, 1, 3, 5)  # (tile, row of patches, patch, channel, row, column)
        flat = cut.new_zeros(*cut.shape[:3], self._weight.shape[1])
        flat[..., : self._columns].unflatten(3, cut.shape[3:]).copy_(cut)
        product = torch.addmm(self._bias, flat.flatten(0, 2), self._weight.T)
        patches = product.view(len(cut), -1, len(self._bias))
        x = functional.pad(patches, (0, 0, 1, 0))
        positions = self._embeddings.interpolate_pos_encoding(x, *size).detach()
        x[:, 1:] += positions[:, 1:]
        x[:, :1] = self._embeddings.cls_token.detach() + positions[:, :1]
        return x


class VisionTower:
    """The vision tower of a model.

    Args:
        model: InternVL.
    """

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        self._tower = model.model.vision_tower
        self._patches = _Patches(self._tower.embeddings)
        self._ops = elementwise_for(model.lm_head.weight.device)
        self._layers = [_Layer(layer, model.dtype) for layer in self._tower.encoder.layer]

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels of shape (tile, 3, tile_size, tile_size) to hidden states (tile, token, channel)."""
        x = self._patches(pixel_values)
        shape = x.shape
        x = x.flatten(0, 1)
        weight, bias, eps = self._layers[0].norms[0]
        n = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
        for layer, following in zip(self._layers, [*self._layers[1:], None], strict=True):
            qkv = layer.qkv.forward(Rows(n)).view(*shape[:2], 3, layer.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (tile, head, token, dim)
            out = functional.scaled_dot_product_attention(q, k, v)
            y = layer.out.forward(Rows(out.transpose(1, 2).reshape(len(x), -1)))
            x, n = self._ops.add_layer_norm(x, y, layer.scales[0], *layer.norms[1])
            y = layer.fc2.forward(Rows(functional.gelu(layer.fc1.forward(Rows(n)))))
            if following is None:
                x = torch.addcmul(x, layer.scales[1], y)
            else:
                x, n = self._ops.add_layer_norm(x, y, layer.scales[1], *following.norms[0])
        hidden: torch.Tensor = self._tower.layernorm(x.view(shape))
        return hidden


class Recorded:
    """A function of several tiles, recorded on a GPU for each small number of them.

    A GPU is through with few tiles sooner than the host has started all the kernels.

    Args:
        function: From a tensor to a tensor, on the current stream and without waiting for the device.
        most: The most tiles that are recorded for.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], most: int) -> None:
        self._function, self._most = function, most
        self._known: dict[int, tuple[Any, torch.Tensor, torch.Tensor]] = {}
        self._pool: Any = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the function gives, overwritten by the next call."""
        if not x.is_cuda or len(x) > self._most:
            return self._function(x)
        if len(x) not in self._known:
            self._known[len(x)] = self._record(x)
        graph, read, written = self._known[len(x)]
        read.copy_(x)
        graph.replay()
        return written

    def _record(self, x: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
        read = x.clone()
        with torch.cuda.device(x.device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):  # once before, so that its kernels are chosen and loaded
                self._function(read)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another model's thread may allocate meanwhile.
            with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
                written = self._function(read)
        return graph, read, written
