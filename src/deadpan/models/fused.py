r"""A decoder for training adapters, written out: each layer's forward and backward pass by hand.

transformers' layer under autograd keeps every intermediate result, reads each of them again in
kernels of their own, and forms q, k and v, or gate and up, in products apart. This decoder reads the
same parameters and gives the same loss and the same gradients, and knows what is frozen. For one
linear layer with frozen W (out, in), adapter A (r, in), B (out, r), s = lora_alpha / r, and x~ the
input after dropout:

    y   = x W^T + (x~ A^T) (s B)^T
    t   = dy (s B)                          (token, r)
    dx  = dy W + dropout'(t A)
    dA  = t^T x~          dB = s dy^T (x~ A^T)

What is kept of a layer for the backward pass: its input, the two norms' outputs, q, k, v, the
attention's output, the sum after attention, gate and up, and the adapters' narrow activations. What
SwiGLU gives is computed again from gate and up, together with its gradient. With checkpointing, only
the layer's input is kept.

Everything elementwise between two products is one function (`deadpan.models.elementwise`), on a GPU one
kernel. Products go to the vendor's libraries as they are. So nothing is compiled anew for another
number of tokens.

Dropout draws no random numbers: whether an element is kept is a hash of its place and of a seed drawn
once for each layer and step, so the backward pass finds the mask again without having stored it. Layers
that read the same input share its mask; PEFT draws one for each.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

from deadpan.models import elementwise
from deadpan.models.frozen import Frozen, Rows
from deadpan.models.segments import Segments, attend, attend_backward

_PARTS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


def unsupported(model: InternVLForConditionalGeneration) -> str | None:
    """Why a model cannot be trained by this decoder, or None if it can."""
    language_model = model.model.language_model
    config = language_model.config
    if config.model_type not in ("llama", "qwen2"):
        return f"it is written for Llama's and Qwen2's layers, and these are {config.model_type}'s"
    if config.hidden_act != "silu":
        return f"it is written for SiLU, and the model has {config.hidden_act}"
    if getattr(config, "use_sliding_window", False):
        return "it knows no sliding window"
    return None


class Adapted:
    """Frozen layers that read the same input, with the adapters of those that have one.

    Args:
        layers: Linear layers, plain or with PEFT's LoRA.
        dtype: The type to compute in.
        fp8: Multiply the frozen weights in FP8.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, fp8: bool) -> None:
        plain = [_base(layer) for layer in layers]
        self.frozen = Frozen(plain, dtype, fp8)
        self._dtype = dtype
        self._adapted = [(i, layer) for i, layer in enumerate(layers) if _base(layer) is not layer]
        self.parameters: list[nn.Parameter] = []
        """A and B of each adapter, in the order in which gradients are given."""
        for _, layer in self._adapted:
            self.parameters += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        self._scales = [layer.scaling["default"] for _, layer in self._adapted]
        self._ranks = [a.shape[0] for a in self.parameters[::2]]
        ends = torch.tensor(self.frozen.sizes).cumsum(0).tolist()
        self._places = [slice(ends[i] - self.frozen.sizes[i], ends[i]) for i, _ in self._adapted]

    def buffers(self, device: torch.device) -> "Cast | None":
        """Room for the adapters' weights in the type computed in."""
        if not self._adapted:
            return None
        columns = self.parameters[0].shape[1]
        low = torch.empty(sum(self._ranks), columns, dtype=self._dtype, device=device)
        high = [
            torch.empty(b.shape, dtype=self._dtype, device=device) for b in self.parameters[1::2]
        ]
        return Cast(low, high)

    def parts(self, cast: "Cast") -> list[torch.Tensor]:
        """The buffers' places for `parameters`."""
        lows = cast.low.split(self._ranks)
        return [t for pair in zip(lows, cast.high, strict=True) for t in pair]

    @property
    def scales(self) -> list[float]:
        """What each of `parameters` is multiplied by on the way: 1 for A, lora_alpha / r for B."""
        return [factor for scale in self._scales for factor in (1.0, scale)]

    def forward(
        self, x: Rows, dropped: torch.Tensor | None, cast: "Cast | None"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layers' outputs side by side, and the narrow activations that the backward pass wants."""
        out = self.frozen.forward(x)
        if cast is None:
            return out, None
        narrow = (x.value if dropped is None else dropped) @ cast.low.T  # (token, adapter r)
        for place, part, high in zip(
            self._places, narrow.split(self._ranks, 1), cast.high, strict=True
        ):
            out[:, place].addmm_(part, high.T)
        return out, narrow

    def backward(
        self,
        grad: Rows,
        narrow: torch.Tensor | None,
        cast: "Cast | None",
        masked: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, "Later"]:
        """The gradient of the input.

        Args:
            grad: The gradient of the outputs, side by side.
            narrow: What `forward` gave.
            cast: The adapters' weights.
            masked: Whether there was dropout: the adapters' part is then given apart, for its mask.

        Returns:
            The gradient of the input (token, in), the adapters' part of it or None, and a function that
            makes the gradients of `parameters` from the input after dropout.
        """
        out = self.frozen.backward(grad)
        if cast is None:
            return out, None, lambda inputs: []
        assert narrow is not None
        value = grad.value
        wide = torch.empty_like(narrow)
        for place, part, high in zip(
            self._places, wide.split(self._ranks, 1), cast.high, strict=True
        ):
            torch.mm(value[:, place], high, out=part)
        low = None
        if masked:
            low = wide @ cast.low
        else:
            out.addmm_(wide, cast.low)

        def later(inputs: torch.Tensor) -> list[torch.Tensor]:
            lows = _wide_product(wide.T, inputs).split(self._ranks)
            highs = [
                _wide_product(value[:, place].T, part)
                for place, part in zip(self._places, narrow.split(self._ranks, 1), strict=True)
            ]
            return [g for pair in zip(lows, highs, strict=True) for g in pair]

        return out, low, later


Later = Callable[[torch.Tensor], list[torch.Tensor]]


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in float32, in which gradients are summed."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


class Cast(NamedTuple):
    """Adapter weights in the type computed in.

    Attributes:
        low: The A's on top of one another, (adapter r, in).
        high: The B's, each times its scale, (out, r).
    """

    low: torch.Tensor
    high: list[torch.Tensor]


def _base(layer: Any) -> nn.Linear:
    return layer if isinstance(layer, nn.Linear) else layer.get_base_layer()


def has_triton(device: torch.device) -> bool:
    """Whether kernels of our own run on a device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def elementwise_for(device: torch.device) -> Any:
    """The module that has what lies between two products: kernels, where there is Triton to make them."""
    if has_triton(device):
        from deadpan.models import kernels

        return kernels
    return elementwise


class Layer:
    """One decoder layer's parameters, as training reads them.

    Args:
        layer: transformers' layer, with PEFT's adapters.
        dtype: The type to compute in.
        fp8: Multiply the frozen weights in FP8.
    """

    def __init__(self, layer: Any, dtype: torch.dtype, fp8: bool) -> None:
        self.qkv, self.o, self.gate_up, self.down = (
            Adapted([getattr(getattr(layer, room), name) for name in names], dtype, fp8)
            for room, names in _PARTS
        )
        attention = layer.self_attn
        self.dim = attention.head_dim
        self.heads = self.qkv.frozen.sizes[0] // self.dim
        self.key_heads = self.qkv.frozen.sizes[1] // self.dim
        self.norms = [
            (each.weight.data.to(dtype), each.variance_epsilon)
            for each in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self.fp8 = fp8
        self.ops = elementwise_for(attention.q_proj.weight.device)
        self.groups = (self.qkv, self.o, self.gate_up, self.down)
        self.parameters = [p for group in self.groups for p in group.parameters]
        self.scales = [scale for group in self.groups for scale in group.scales]
        self.casts = [group.buffers(attention.q_proj.weight.device) for group in self.groups]
        self.parts = [
            part
            for group, cast in zip(self.groups, self.casts, strict=True)
            for part in (group.parts(cast) if cast else [])
        ]


@dataclass(frozen=True)
class Row:
    """What all layers know of a row.

    Attributes:
        cos: Of shape (token, dim).
        sin: The same.
        positions: int64 of shape (token).
        segments: Where the samples lie.
        dropout: The share of the adapters' inputs that is left out.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    segments: Segments
    dropout: float


class _Kept(NamedTuple):
    """What a layer keeps for its backward pass."""

    normed: tuple[torch.Tensor, torch.Tensor]  # after dropout
    narrow: list[torch.Tensor | None]
    qkv: torch.Tensor
    attended: torch.Tensor
    read: torch.Tensor  # the wanted rows of it, after dropout
    lse: torch.Tensor | None
    middle: torch.Tensor
    gate_up: torch.Tensor


def layer_forward(
    layer: Layer,
    row: Row,
    x: torch.Tensor,
    seeds: Sequence[torch.Tensor],
    wanted: torch.Tensor | None,
) -> tuple[torch.Tensor, _Kept]:
    """A layer's output, of the wanted tokens if not of all, and what `layer_backward` takes beside it."""
    ops, share, fp8 = layer.ops, row.dropout, layer.fp8
    casts = layer.casts
    weight, eps = layer.norms[0]
    n1, d1, *q1 = ops.norm(x, weight, eps, share, seeds[0], fp8)
    qkv, a1 = layer.qkv.forward(Rows(n1, *q1), d1, casts[0])
    heads, key_heads = layer.heads, layer.key_heads
    qkv = qkv.view(len(x), heads + 2 * key_heads, layer.dim)
    qkv = ops.rotate(qkv, row.cos, row.sin, heads, key_heads)
    q, k, v = qkv.split([heads, key_heads, key_heads], dim=1)
    attended, lse = attend(q, k, v, row.segments, row.positions)
    attended = attended.reshape(len(x), -1)
    read, x = (attended, x) if wanted is None else (attended[wanted], x[wanted])
    _, d2, *q2 = ops.quantise(read, share, seeds[1], fp8)
    y, a2 = layer.o.forward(Rows(read, *q2), d2, casts[1])
    weight, eps = layer.norms[1]
    middle, n3, d3, *q3 = ops.add_norm(x, y, weight, eps, share, seeds[2], fp8)
    gate_up, a3 = layer.gate_up.forward(Rows(n3, *q3), d3, casts[2])
    h, d4, *q4 = ops.swiglu(gate_up, share, seeds[3], fp8)
    y, a4 = layer.down.forward(Rows(h, *q4), d4, casts[3])
    kept = _Kept(
        (n1 if d1 is None else d1, n3 if d3 is None else d3),
        [a1, a2, a3, a4],
        qkv,
        attended,
        read if d2 is None else d2,
        lse,
        middle,
        gate_up,
    )
    return y.add_(middle), kept


def layer_backward(
    layer: Layer,
    row: Row,
    x: torch.Tensor,
    seeds: Sequence[torch.Tensor],
    wanted: torch.Tensor | None,
    kept: _Kept,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gradients of a layer's input and of its `parameters`."""
    ops, share, fp8 = layer.ops, row.dropout, layer.fp8
    masked = share > 0
    _, _, *q = ops.quantise(grad, 0.0, seeds[0], fp8)
    dh, low, later_down = layer.down.backward(
        Rows(grad, *q), kept.narrow[3], layer.casts[3], masked
    )
    d_gate_up, h, *q = ops.swiglu_backward(kept.gate_up, dh, low, share, seeds[3], fp8)
    g_down = later_down(h)
    del dh, h
    dn, low, later = layer.gate_up.backward(
        Rows(d_gate_up, *q), kept.narrow[2], layer.casts[2], masked
    )
    g_gate_up = later(kept.normed[1])
    del d_gate_up
    weight, eps = layer.norms[1]
    d_middle, *q = ops.norm_backward(kept.middle, weight, eps, dn, low, grad, share, seeds[2], fp8)

    da, low, later = layer.o.backward(Rows(d_middle, *q), kept.narrow[1], layer.casts[1], masked)
    if low is not None:
        da = ops.add_dropped(da, low, share, seeds[1])
    g_o = later(kept.read)
    if wanted is not None:
        da = torch.zeros_like(kept.attended).index_copy_(0, wanted, da)
        d_middle = torch.zeros_like(x).index_copy_(0, wanted, d_middle)
    shape = (len(x), layer.heads, layer.dim)
    q_, k_, v_ = kept.qkv.split([layer.heads, layer.key_heads, layer.key_heads], dim=1)
    dq, dk, dv = attend_backward(
        da.view(shape),
        q_,
        k_,
        v_,
        kept.attended.view(shape),
        kept.lse,
        row.segments,
        row.positions,
    )
    d_qkv, *q = ops.rotate_back(dq, dk, dv, row.cos, row.sin, fp8)
    dn, low, later = layer.qkv.backward(Rows(d_qkv, *q), kept.narrow[0], layer.casts[0], masked)
    g_qkv = later(kept.normed[0])
    weight, eps = layer.norms[0]
    dx, *_ = ops.norm_backward(x, weight, eps, dn, low, d_middle, share, seeds[0], False)
    gradients = [*g_qkv, *g_o, *g_gate_up, *g_down]
    if gradients:
        torch._foreach_mul_(gradients, layer.scales)
    return dx, gradients


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: Layer,
        row: Row,
        seeds: Sequence[torch.Tensor],
        wanted: torch.Tensor | None,
        checkpoint: bool,
        *_: torch.Tensor,
    ) -> torch.Tensor:
        out, kept = layer_forward(layer, row, x, seeds, wanted)
        ctx.save_for_backward(x)
        ctx.layer, ctx.row, ctx.seeds, ctx.wanted = layer, row, seeds, wanted
        ctx.kept = None if checkpoint else kept
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            _, kept = layer_forward(ctx.layer, ctx.row, x, ctx.seeds, ctx.wanted)
        grad = grads[0].to(x.dtype).contiguous()
        dx, gradients = layer_backward(ctx.layer, ctx.row, x, ctx.seeds, ctx.wanted, kept, grad)
        return dx, None, None, None, None, None, *gradients


class FusedDecoder:
    """The decoder layers of a model, for training.

    Args:
        model: InternVL, with PEFT's adapters on its language model.
        dtype: The type to compute in.
        fp8: Multiply the frozen weights in FP8.
        dropout: The adapters' dropout.

    Attributes:
        layers: The layers, with their parameters.
    """

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        dtype: torch.dtype,
        fp8: bool,
        dropout: float,
    ) -> None:
        self._language_model = model.model.language_model
        self._dtype, self._dropout = dtype, dropout
        self.layers = [Layer(layer, dtype, fp8) for layer in self._language_model.layers]
        self._parameters: list[torch.Tensor] = [
            p for layer in self.layers for p in layer.parameters
        ]
        self._parts = [part for layer in self.layers for part in layer.parts]
        self._scales = [scale for layer in self.layers for scale in layer.scales]

    def __call__(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Segments,
        wanted: torch.Tensor,
        checkpoint: bool = False,
    ) -> torch.Tensor:
        """Hidden states after the last norm, where they are wanted.

        The last layer's keys and values are wanted of every token, and all that follows its attention
        only of the tokens that predict something.

        Args:
            embeddings: Of shape (token, hidden): one row of samples laid end to end.
            position_ids: int64 of shape (token).
            segments: Where the samples lie.
            wanted: Tokens, int64 of shape (wanted).
            checkpoint: Keep only the layers' inputs and compute the rest again in the backward pass.

        Returns:
            Of shape (wanted, hidden).
        """
        x = embeddings.to(self._dtype)
        cos, sin = self.rotation(x, position_ids)
        row = Row(cos, sin, position_ids, segments, self.dropout)
        seeds = self.seeds().to(x.device, non_blocking=True)
        self.cast()
        for layer, of_layer in zip(self.layers, seeds.unbind(), strict=True):
            rows = wanted if layer is self.layers[-1] else None
            x = _LayerFunction.apply(
                x, layer, row, of_layer.unbind(), rows, checkpoint, *layer.parameters
            )
        return self.norm(x)

    @property
    def dropout(self) -> float:
        """The share of the adapters' inputs that is left out now."""
        return self._dropout if self._language_model.training else 0.0

    def seeds(self) -> torch.Tensor:
        """What decides which inputs of a pass are left out: int32 of shape (layer, input), on the CPU."""
        shape = (len(self.layers), len(_PARTS))
        if not self.dropout:
            return torch.zeros(shape, dtype=torch.int32)
        return torch.randint(-(2**31), 2**31, shape).to(torch.int32)

    @torch.no_grad()
    def cast(self) -> None:
        """Bring the adapters' weights, as they are now, to the type computed in."""
        torch._foreach_copy_(self._parts, self._parameters)
        torch._foreach_mul_(self._parts, self._scales)

    def rotation(
        self, like: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions (token), each of shape (token, dim) and the type of `like`."""
        cos, sin = self._language_model.rotary_emb(like[None], position_ids[None])
        return cos[0], sin[0]

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """The norm behind the last layer."""
        out: torch.Tensor = self._language_model.norm(x)
        return out
