"""Stochastic rounding: which numbers may come out, how often, and what it is for."""

import pytest
import torch

from deadpan.models.rounding import stochastic

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def normal(*shape: int) -> torch.Tensor:
    # Not a seed that the tests round with: the same stream would tie the draws to the values.
    return torch.randn(shape, generator=torch.Generator().manual_seed(1234))


def test_float32_stays_as_it_is() -> None:
    values = normal(100)
    assert stochastic(values, torch.float32, seed=0) is values


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_a_number_that_the_type_holds_is_kept(dtype: torch.dtype) -> None:
    held = torch.cat([normal(10_000), torch.tensor([0.0, -0.0, 1.0, -2.0, 256.0])]).to(dtype)
    assert torch.equal(stochastic(held.float(), dtype, seed=0), held)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_what_comes_out_is_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    values = normal(100_000)
    values = values[values.abs() > 1e-3]  # where float16 is not yet subnormal
    rounded = stochastic(values, dtype, seed=0).float()
    # The numbers around v are at most eps * 2 ** floor(log2 |v|) apart.
    step = torch.finfo(dtype).eps * torch.exp2(values.abs().log2().floor())
    assert ((rounded - values).abs() < step).all()
    assert (rounded != values.to(dtype).float()).float().mean() > 0.2  # not always the nearer one


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_mean_is_right(dtype: torch.dtype, sign: int, share: float) -> None:
    step = torch.finfo(dtype).eps
    values = torch.full((40_000,), sign * (1 + share * step))
    rounded = stochastic(values, dtype, seed=0).float()
    away = ((rounded.abs() - 1) / step).mean().item()
    assert away == pytest.approx(share, abs=0.01)  # four standard errors of 40,000 draws


def test_a_seed_decides_the_draws() -> None:
    values = normal(1_000)
    first, again, other = (stochastic(values, torch.bfloat16, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_update_smaller_than_the_grid_survives() -> None:
    # A base weight in bfloat16 and a rank-one update of a tenth of a grid step, as LoRA makes them.
    base = (normal(1024, 1024) * 0.02).to(torch.bfloat16).float()
    low, high = torch.ones(1, 1024), torch.full((1024, 1), 1e-5)
    merged, x = base + high @ low, torch.ones(1024)
    moved = (high @ low) @ x

    def kept(weight: torch.Tensor) -> float:
        return (((weight.float() - base) @ x).mean() / moved.mean()).item()

    assert kept(stochastic(merged, torch.bfloat16, seed=0)) == pytest.approx(1, abs=0.05)
    # Rounding to the nearest moves only the weights near zero, whose grid is fine enough.
    assert kept(merged.to(torch.bfloat16)) < 0.5
