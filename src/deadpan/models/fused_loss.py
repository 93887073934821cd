"""The training loss by way of the decoder that is written out for training.

The same number as `AnswerLoss` gives, and the same gradients. Where a batch's pictures go, which tokens
predict something, and where its samples lie is read off the batch while it is on the CPU, so that
nothing waits for the GPU to tell.
"""

from collections.abc import Callable

import torch
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


class FusedLoss:
    """The cross-entropy of a batch's supervised tokens.

    Args:
        model: InternVL with PEFT's adapters on its language model, vision tower frozen.
        dtype: The type to compute in.
        fp8: Multiply the language model's frozen weights in FP8.
        dropout: The adapters' dropout.

    Attributes:
        checkpoint: Whether only each layer's input is kept and the rest computed again in the backward pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype,
        fp8: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self._model = plain_model(model)
        self._dtype = dtype
        self._decoder = FusedDecoder(self._model, dtype, fp8, dropout)
        self.checkpoint = False

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
        model = self._model
        device = model.lm_head.weight.device
        ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
        segments = Segments.of(positions)
        labels = batch.labels.flatten()
        supervised = (labels != IGNORE_INDEX).nonzero().flatten()
        # The end of a shared prefix predicts the first token of several answers.
        wanted, places = segments.before[supervised].unique(return_inverse=True)
        image_tokens = (ids == model.config.image_token_id).nonzero().flatten()

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        x = model.get_input_embeddings()(moved(ids)).to(self._dtype)  # (token, hidden)
        features = None if batch.features is None else moved(batch.features)
        if batch.pixel_values is not None:
            with torch.no_grad():
                features = picture_features(model, moved(batch.pixel_values))
            if keep is not None:
                keep(features)
        if features is not None:
            with torch.autocast(device.type, self._dtype, self._dtype is torch.bfloat16):
                projected = model.model.multi_modal_projector(features)
            x = x.index_copy(0, moved(image_tokens), projected.flatten(0, 1).to(self._dtype))
        hidden = self._decoder(
            x, moved(positions), segments.to(device), moved(wanted), self.checkpoint
        )
        logits = functional.linear(hidden, model.lm_head.weight)  # (wanted, vocabulary)
        if len(wanted) < len(places):
            logits = logits[moved(places)]
        targets = moved(labels[supervised])
        return functional.cross_entropy(logits.float(), targets, reduction=reduction)
