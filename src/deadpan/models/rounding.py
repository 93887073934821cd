"""Stochastic rounding, for merging small updates into coarse weights.

A base weight in bfloat16 lies exactly on the grid of bfloat16 numbers. Fine-tuning moves it by less than
half a grid step more often than not, and rounding the sum to the nearest number then gives the base
weight back: the update is not blurred but erased. Rounding up or down at random, with the probability
that makes the mean right, keeps it: over the thousands of weights that each output sums, the errors
cancel and the updates add up.

Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision" (arXiv 1502.02551).
"""

import torch


def stochastic(values: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Round float32 numbers to bfloat16 or float16 without bias; to float32 they stay as they are.

    Args:
        values: float32 of any shape.
        dtype: The type to round to.
        seed: Decides the draws.

    Returns:
        For each number one of its two neighbours in the type, the nearer the likelier; a number that
        the type holds exactly is kept.
    """
    if dtype is torch.float32:
        return values
    generator = torch.Generator(values.device).manual_seed(seed)
    nearest = values.to(dtype)
    # The bits of a float, read as an integer, count the numbers of its sign from zero outwards.
    outwards = values.abs() > nearest.float().abs()
    bits = nearest.view(torch.int16)
    other = torch.where(outwards, bits + 1, bits - 1).view(dtype)
    error = (values - nearest.float()).abs()
    probability = error / (other.float() - nearest.float()).abs()
    draws = torch.rand(values.shape, generator=generator, device=values.device)
    # At zero there is no number further in; a sum that small is zero for every purpose.
    return torch.where((draws < probability) & (nearest != 0), other, nearest)
