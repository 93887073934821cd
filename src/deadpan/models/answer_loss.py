"""The training loss, computed only where there is something to learn.

Of a sample with seven tiles about twenty tokens in two thousand are supervised. The hidden states that predict them are
picked out first, and only those rows meet the output head: logits of shape (supervised, vocabulary) instead of
(row, token, vocabulary), with the same loss and the same gradients.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from deadpan.models.attention import VARLEN
from deadpan.processing.encoding import IGNORE_INDEX


class AnswerLoss(nn.Module):
    """A model whose forward pass returns the summed cross-entropy of the supervised tokens.

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
    ) -> torch.Tensor:
        """Sum the loss of a micro-batch.

        Args:
            input_ids: int64 of shape (row, token), padded on the right.
            labels: int64 of shape (row, token), `IGNORE_INDEX` where not supervised.
            position_ids: int64 of shape (row, token); where they start again, another sample starts.
            pixel_values: float of shape (tile, 3, tile_size, tile_size), or None.

        Returns:
            float32 scalar: the sum over supervised tokens of -log p(token | what precedes it).
        """
        logits, targets, _ = supervised_logits(
            plain_model(self.model), input_ids, labels, position_ids, pixel_values
        )
        return functional.cross_entropy(logits, targets, reduction="sum")


def answer_log_probabilities(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `AnswerLoss` sums, sample by sample, and not negated.

    Args:
        model: InternVL, plain or wrapped by PEFT.
        input_ids: As for `AnswerLoss`; so are the others. Rows are padded, or one row is packed.
        labels: See there.
        position_ids: See there.
        pixel_values: See there.

    Returns:
        float32 of shape (sample,): the sum over a sample's supervised tokens of
        log p(token | what precedes it), in nats.
    """
    logits, targets, supervised = supervised_logits(
        plain_model(model), input_ids, labels, position_ids, pixel_values
    )
    starts = position_ids == 0
    samples = (starts.flatten().cumsum(0) - 1).view_as(position_ids)  # (row, token): whose it is
    counts = samples[:, 1:][supervised].bincount(minlength=int(starts.sum()))
    losses = functional.cross_entropy(logits, targets, reduction="none")
    # Tokens stand in the order of samples; adding by index would add in any order on a GPU.
    return -torch.stack([part.sum() for part in losses.split(counts.tolist())])


def supervised_logits(
    plain: InternVLForConditionalGeneration,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits where something is predicted.

    Returns:
        Logits, float32 of shape (supervised, vocabulary); their targets, int64 of shape (supervised,);
        and where among (row, token - 1) they are, bool.
    """
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
    return logits.float(), targets[supervised], supervised


def plain_model(model: nn.Module) -> InternVLForConditionalGeneration:
    """InternVL itself, inside PEFT's wrapper if there is one."""
    return model.base_model.model if isinstance(model, PeftModel) else model
