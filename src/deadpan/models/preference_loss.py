"""Direct preference optimisation (DPO): Rafailov et al. 2023, arXiv 2305.18290, equation 7.

A pair's loss is -log sigmoid(h), where h = beta ((log p(chosen) - log q(chosen)) - (log p(rejected) -
log q(rejected))), p being the model and q the reference that it started as. With label smoothing e,
the share of pairs expected to be the wrong way round, it is
-(1 - e) log sigmoid(h) - e log sigmoid(-h) (Mitchell 2023, "A note on DPO with noisy preferences").
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from deadpan.processing.collate import Batch
from deadpan.processing.encoding import IGNORE_INDEX


@dataclass(frozen=True)
class PairLosses:
    """What a forward pass over pairs gave; all float32 of shape (pair,).

    Attributes:
        losses: The losses, with their graph; the rest is without.
        chosen: log p of the chosen answers, in nats.
        rejected: Of the rejected ones.
        margins: How far the chosen answer's reward, beta log(p / q), is above the rejected one's.
    """

    losses: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    margins: torch.Tensor


def log_probabilities(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Put the losses of tokens together, sample by sample.

    Args:
        losses: -log p of each supervised token, of shape (supervised,).
        batch: Whose they are; on the CPU, so that nothing waits for the GPU to tell.

    Returns:
        Of shape (sample,): the sum over a sample's supervised tokens of
        log p(token | what precedes it), in nats.
    """
    starts = batch.position_ids == 0  # of rows that are padded, or of samples in one that is packed
    samples = (starts.flatten().cumsum(0) - 1).view_as(starts)  # (row, token): whose it is
    owners = samples[batch.labels != IGNORE_INDEX]
    counts = owners.bincount(minlength=int(starts.sum()))
    # Tokens stand in the order of samples; adding by index would add in any order on a GPU.
    return -torch.stack([part.sum() for part in losses.split(counts.tolist())])


def dpo_losses(
    log_probabilities: torch.Tensor,
    reference: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """The losses of pairs.

    Args:
        log_probabilities: The model's, float32 of shape (pair, 2): of the chosen answer and of the
            rejected one, in nats, summed over tokens.
        reference: The reference's, of the same shape.
        beta: How closely the model is held to the reference; higher is closer.
        label_smoothing: The share of pairs expected to be the wrong way round, below 0.5.
    """
    rewards = beta * (log_probabilities - reference)  # (pair, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    losses = (label_smoothing - 1) * functional.logsigmoid(margins)
    if label_smoothing:
        losses = losses - label_smoothing * functional.logsigmoid(-margins)
    chosen, rejected = log_probabilities.detach().unbind(dim=1)
    return PairLosses(losses, chosen, rejected, margins.detach())
