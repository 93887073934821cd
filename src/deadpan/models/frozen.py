"""Frozen weights, multiplied with in both directions and never differentiated.

Training an adapter needs of a frozen weight W (out, in) two products a token: x W^T going forward, and
dy W going backward. The gradient of W itself is never formed. Layers that read the same input (q, k
and v; gate and up) are stacked into one W, so that the input is read, and quantised, once.

FP8 (E4M3, on GPUs that have it) holds W twice, as each product wants its long axis last: once with a
scale for each output and once with a scale for each input. Activations and gradients get a scale for
each token as they are made. Products accumulate in float32 and come out in bfloat16. That is twice
the matrix rate of bfloat16 for the weights that do not learn; adapters and projector stay in bfloat16.

Source of the scaling: "FP8 Formats for Deep Learning", Micikevicius et al. 2022, arXiv 2209.05433.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from deadpan.errors import DeadpanError
from deadpan.models import nf4

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_ROWS = 64


class Rows(NamedTuple):
    """What a product reads.

    Attributes:
        value: Of shape (token, channel).
        fp8: The same in FP8, divided by `scale`; None where not wanted.
        scale: float32 of shape (token, 1), or None.
    """

    value: torch.Tensor
    fp8: torch.Tensor | None = None
    scale: torch.Tensor | None = None


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 with a scale for each row: (token, channel) to the same shape and (token, 1)."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).to(FP8), scale


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a weight (out, in) stands for once it is held in FP8."""
    quantised, scale = quantise_rows(weight)
    return (quantised.float() * scale).to(weight.dtype)


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies in FP8 with a scale for each row (compute capability 9 and up)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Frozen:
    """The frozen weights of layers that read the same input.

    Plain weights are stacked in place: the layers' own parameters become views of the stack, and no
    memory is used twice.

    Args:
        layers: Linear layers without adapters.
        dtype: The type to compute in.
        fp8: Multiply in FP8.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype, fp8: bool) -> None:
        self._layers, self._dtype = layers, dtype
        self.sizes = [layer.out_features for layer in layers]
        self._fp8: tuple[torch.Tensor, torch.Tensor] | None = None
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if biases and len(biases) < len(layers):
            raise DeadpanError("Of layers stacked into one, some have a bias and some have none.")
        self._bias = torch.cat([bias.data for bias in biases]).to(dtype) if biases else None
        self._weight = None if nf4.is_quantised(layers[0].weight) else self._stack()
        if fp8:
            weight = self._dense()
            self._fp8 = quantise_rows(weight)
            # Laid out so that the transpose has its long axis last.
            self._fp8_back = quantise_rows(weight.T.contiguous())

    def _stack(self) -> torch.Tensor:
        weights = [layer.weight.data for layer in self._layers]
        first, columns = weights[0], weights[0].shape[1]
        if len(weights) == 1:
            return first
        # Another decoder over the same model may have stacked them already.
        rows = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        places = [first.storage_offset() + row * columns for row in rows[:-1]]
        storages = {weight.untyped_storage().data_ptr() for weight in weights}
        if len(storages) == 1 and [weight.storage_offset() for weight in weights] == places:
            return first.as_strided((rows[-1], columns), (columns, 1))
        stacked = torch.cat(weights)
        for layer, part in zip(self._layers, stacked.split(self.sizes), strict=True):
            layer.weight.data = part
        return stacked

    def _dense(self) -> torch.Tensor:
        """(out, in) in the type computed in."""
        if self._weight is not None:
            return self._weight.to(self._dtype)
        parts = [nf4.dequantised(layer.weight) for layer in self._layers]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self._dtype)

    def forward(self, x: Rows) -> torch.Tensor:
        """Forward: x W^T, (token, in) to (token, out)."""
        if self._fp8 is None:
            weight = self._dense()
            if self._bias is None:
                return x.value @ weight.T
            return torch.addmm(self._bias, x.value, weight.T)
        weight, scale = self._fp8
        out = _scaled(x, weight, scale)
        return out if self._bias is None else out.add_(self._bias)

    def backward(self, grad: Rows) -> torch.Tensor:
        """Backward: dy W, (token, out) to (token, in)."""
        if self._fp8 is None:
            return grad.value @ self._dense()
        weight, scale = self._fp8_back
        return _scaled(grad, weight, scale)


def padded(layer: nn.Linear) -> torch.Tensor:
    """A layer's weight with rows of zeros (or whatever lies there) up to a multiple of 64.

    A product whose output is of odd width, as InternLM2's vocabulary of 92,553 is, goes through a slow
    kernel. The layer's own parameter becomes the first rows of what is given, so a head's 380 MB are not
    held twice; what the further rows give is to be cut off.
    """
    weight = layer.weight.data
    rows, columns = -(-len(weight) // _ROWS) * _ROWS, weight.shape[1]
    behind = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
    # So it is where the weight was padded before.
    if weight.is_contiguous() and behind >= rows * columns:
        return weight.as_strided((rows, columns), (columns, 1))
    wide = weight.new_zeros(rows, columns)
    wide[: len(weight)] = weight
    layer.weight.data = wide[: len(weight)]
    return wide


def _scaled(x: Rows, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply x W^T in FP8: x (token, in), weight (out, in), scale (out, 1); gives bfloat16 (token, out)."""
    assert x.fp8 is not None
    assert x.scale is not None
    return torch._scaled_mm(
        x.fp8,
        weight.T,
        scale_a=x.scale,
        scale_b=scale.T,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
