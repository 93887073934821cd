"""The training loss by way of the decoder that is written out for training.

The same number as `AnswerLoss` gives, and the same gradients. Where a batch's pictures go, which tokens
predict something, and where its samples lie is read off the batch while it is on the CPU, so that
nothing waits for the GPU to tell.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from deadpan.models.answer_loss import Reduction, plain_model
from deadpan.models.fused import FusedDecoder
from deadpan.models.segments import Segments
from deadpan.processing.collate import Batch
from deadpan.processing.encoding import IGNORE_INDEX


def picture_features(
    model: InternVLForConditionalGeneration, pixel_values: torch.Tensor
) -> torch.Tensor:
    """What the vision tower sees, as the projector takes it.

    Args:
        model: InternVL.
        pixel_values: float of shape (tile, 3, tile_size, tile_size).

    Returns:
        Of shape (tile, image token, channel): each image token's four patches side by side.
    """
    return shuffled(model, model.model.vision_tower(pixel_values.to(model.dtype)).last_hidden_state)


def shuffled(model: InternVLForConditionalGeneration, hidden: torch.Tensor) -> torch.Tensor:
    """The tower's output (tile, token, channel) as `picture_features` gives it."""
    patches = hidden[:, 1:]  # without the class token
    tiles, count, channels = patches.shape
    side = int(count**0.5)
    grid = patches.reshape(tiles, side, side, channels)
    blocks = model.model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio)
    return blocks.flatten(1, 2)


Keep = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Tokens:
    """A batch as one row of tokens, on the CPU.

    Attributes:
        ids: int64 of shape (token).
        positions: int64 of shape (token).
        segments: Where the samples lie.
        wanted: The tokens that predict something, int64 of shape (wanted), each once.
        places: For each supervised token its place in `wanted`, int64 of shape (supervised). The end of a
            shared prefix predicts the first token of several answers.
        targets: The supervised tokens, int64 of shape (supervised).
        image_tokens: Where pictures go, int64 of shape (image token).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    segments: Segments
    wanted: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    image_tokens: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, image_token_id: int) -> "Tokens":
        """Read a batch, padded or packed, on the CPU."""
        ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
        segments = Segments.of(positions)
        labels = batch.labels.flatten()
        supervised = (labels != IGNORE_INDEX).nonzero().flatten()
        wanted, places = segments.before[supervised].unique(return_inverse=True)
        image_tokens = (ids == image_token_id).nonzero().flatten()
        return cls(ids, positions, segments, wanted, places, labels[supervised], image_tokens)


class FusedLoss:
    """The cross-entropy of a batch's supervised tokens.

    Args:
        model: InternVL with PEFT's adapters on its language model, vision tower frozen.
        dtype: The type to compute in.
        fp8: Multiply the language model's frozen weights in FP8.
        dropout: The adapters' dropout.

    Attributes:
        model: InternVL itself.
        dtype: The type computed in.
        decoder: Its layers, as training reads them.
        checkpoint: Whether only each layer's input is kept and the rest computed again in the backward pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype,
        fp8: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self.model, self.dtype = plain_model(model), dtype
        self.decoder = FusedDecoder(self.model, dtype, fp8, dropout)
        self.checkpoint = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.lm_head.weight.device

    def __call__(
        self, batch: Batch, keep: Keep | None = None, reduction: Reduction = "sum"
    ) -> torch.Tensor:
        """The loss of a micro-batch.

        Args:
            batch: On the CPU; padded or packed.
            keep: Is given what the vision tower saw, if that was not known.
            reduction: Whether to sum.

        Returns:
            float32: -log p(token | what precedes it) of the supervised tokens, of shape (supervised,), or
            their sum, a scalar.
        """
        return self.of(self.read(batch), self.features(batch, keep), reduction)

    def read(self, batch: Batch) -> Tokens:
        """A batch's tokens."""
        return Tokens.of(batch, self.model.config.image_token_id)

    def features(self, batch: Batch, keep: Keep | None) -> torch.Tensor | None:
        """What the vision tower sees of a batch's pictures, where it is known or else on the model's device."""
        if batch.pixel_values is None:
            return batch.features
        with torch.no_grad():
            features = picture_features(self.model, self._moved(batch.pixel_values))
        if keep is not None:
            keep(features)
        return features

    def of(
        self, tokens: Tokens, features: torch.Tensor | None, reduction: Reduction
    ) -> torch.Tensor:
        """The loss, of what `read` and `features` gave."""
        moved = self._moved
        x = self.embedded(moved(tokens.ids))
        if features is not None:
            projected = self.projected(moved(features))
            x = x.index_copy(0, moved(tokens.image_tokens), projected.flatten(0, 1))
        wanted, segments = moved(tokens.wanted), tokens.segments.to(self.device)
        hidden = self.decoder(x, moved(tokens.positions), segments, wanted, self.checkpoint)
        logits = self.logits(hidden)
        if len(tokens.wanted) < len(tokens.places):
            logits = logits[moved(tokens.places)]
        return functional.cross_entropy(logits.float(), moved(tokens.targets), reduction=reduction)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (token) to embeddings (token, hidden)."""
        x: torch.Tensor = self.model.get_input_embeddings()(ids)
        return x.to(self.dtype)

    def projected(
        self, features: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What the language model reads of features (..., channel): (..., hidden).

        Args:
            features: On the model's device.
            weights: Tensors to take the place of the projector's parameters of these names.
        """
        projector = self.model.model.multi_modal_projector
        # Without autocast's cache, which would keep weights cast in one recorded pass for another.
        enabled = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, self.dtype, enabled, cache_enabled=False):
            out: torch.Tensor = functional_call(projector, dict(weights or {}), features)
        return out.to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (token, hidden) to logits (token, vocabulary)."""
        return functional.linear(hidden, self.model.lm_head.weight)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)
