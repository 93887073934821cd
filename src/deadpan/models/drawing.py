"""The next token from its logits: the likeliest, or one that is drawn."""

import torch


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Token ids (row) of logits (row, vocabulary)."""
    return logits.argmax(dim=-1)


def drawn(
    logits: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor
) -> torch.Tensor:
    """Draw a token for each row, by one random number each.

    The number picks the token on whose share of [0, 1) it falls. So what a row draws depends on its
    own number alone, not on its neighbours nor on the device's random state.

    Args:
        logits: Of shape (row, vocabulary).
        temperature: What they are divided by, more than 0.
        top_p: Draw only among the likeliest tokens that together have this probability (nucleus sampling,
            Holtzman et al. 2020, arXiv 1904.09751).
        uniform: Random numbers in [0, 1), float64 of shape (row).

    Returns:
        int64 of shape (row).
    """
    shares = (logits.float() / temperature).softmax(dim=-1)
    order = None
    if top_p < 1:
        shares, order = shares.sort(dim=-1, descending=True)
        before = shares.cumsum(dim=-1) - shares
        # Rounding must not take the likeliest away.
        before[:, 0] = 0
        shares = shares.where(before < top_p, 0)
    ends = shares.double().cumsum(dim=-1)
    wanted = uniform[:, None] * ends[:, -1:]
    place = torch.searchsorted(ends, wanted, right=True).clamp_(max=ends.shape[1] - 1)
    return place[:, 0] if order is None else order.gather(1, place)[:, 0]
