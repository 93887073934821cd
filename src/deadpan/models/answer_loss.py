"""The training loss, computed only where there is something to learn.

Of a sample with seven tiles about twenty tokens in two thousand are supervised. The hidden states that predict them are
picked out first, and only those rows meet the output head: logits of shape (supervised, vocabulary) instead of
(row, token, vocabulary), with the same loss and the same gradients.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from deadpan.models.attention import VARLEN
from deadpan.processing.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    from peft import PeftModel

Reduction = Literal["sum", "none"]
"""Whether losses are summed, or given token by token."""


class AnswerLoss(nn.Module):
    """A model whose forward pass returns the cross-entropy of the supervised tokens.

    Args:
        model: InternVL, plain or wrapped by PEFT.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> torch.Tensor:
        """The loss of a micro-batch.

        Args:
            input_ids: int64 of shape (row, token), padded on the right.
            labels: int64 of shape (row, token), `IGNORE_INDEX` where not supervised.
            position_ids: int64 of shape (row, token); where they start again, another sample starts.
            pixel_values: float of shape (tile, 3, tile_size, tile_size), or None.
            reduction: Whether to sum.

        Returns:
            float32: -log p(token | what precedes it) of the supervised tokens, of shape (supervised,), or
            their sum, a scalar.
        """
        plain = plain_model(self.model)
        packed: dict[str, Any] = {}
        if plain.config._attn_implementation == VARLEN and len(input_ids) == 1:
            starts = (position_ids[0] == 0).nonzero().flatten().to(torch.int32)
            ends = starts.new_tensor([input_ids.shape[1]])
            packed["cu_seq_lens_q"] = torch.cat([starts, ends])
            packed["max_length_q"] = int(position_ids.max()) + 1
        hidden = plain.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            position_ids=position_ids,
            use_cache=False,
            **packed,
        ).last_hidden_state  # (row, token, hidden)
        targets = labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = plain.lm_head(hidden[:, :-1][supervised])  # (supervised, vocabulary)
        return functional.cross_entropy(logits.float(), targets[supervised], reduction=reduction)


def plain_model(
    model: "InternVLForConditionalGeneration | PeftModel",
) -> InternVLForConditionalGeneration:
    """InternVL itself, inside PEFT's wrapper if there is one."""
    return model if isinstance(model, InternVLForConditionalGeneration) else model.get_base_model()
