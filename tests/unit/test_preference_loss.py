"""DPO's loss against values worked out by hand, and against the formula written another way."""

import math

import pytest
import torch

from deadpan.models.preference_loss import dpo_losses

NOW = torch.tensor([[-10.0, -12.0], [-20.0, -8.0]])
REFERENCE = torch.tensor([[-11.0, -11.0], [-20.0, -8.0]])


def test_the_loss_is_that_of_the_paper() -> None:
    # h = 0.5 * ((-10 + 11) - (-12 + 11)) = 1: the loss is log(1 + e^-1).
    # Of the second pair nothing has moved: h = 0, the loss is log 2.
    found = dpo_losses(NOW, REFERENCE, beta=0.5)
    assert found.losses.tolist() == pytest.approx([0.3132616875, math.log(2)])
    assert found.margins.tolist() == [1.0, 0.0]
    assert (found.chosen.tolist(), found.rejected.tolist()) == ([-10.0, -20.0], [-12.0, -8.0])


def test_the_gradient_is_that_of_the_paper() -> None:
    # Equation 8: -beta sigmoid(-h) (grad log p(chosen) - grad log p(rejected)).
    now = NOW.clone().requires_grad_()
    dpo_losses(now, REFERENCE, beta=0.5).losses.sum().backward()
    weight = [0.5 / (1 + math.e), 0.5 / 2]
    assert now.grad is not None
    expected = torch.tensor([[-weight[0], weight[0]], [-weight[1], weight[1]]])
    assert torch.allclose(now.grad, expected)


def test_label_smoothing_is_the_expectation_over_flipped_pairs() -> None:
    straight = dpo_losses(NOW, REFERENCE, beta=0.5).losses
    flipped = dpo_losses(NOW.flip(1), REFERENCE.flip(1), beta=0.5).losses
    smoothed = dpo_losses(NOW, REFERENCE, beta=0.5, label_smoothing=0.2).losses
    assert torch.allclose(smoothed, 0.8 * straight + 0.2 * flipped)
    assert not torch.allclose(smoothed, straight)


def test_a_wild_margin_stays_finite() -> None:
    now = torch.tensor([[-1e4, 0.0]], requires_grad=True)
    found = dpo_losses(now, torch.zeros(1, 2), beta=1.0)
    found.losses.sum().backward()
    assert found.losses.item() == pytest.approx(1e4)
    assert now.grad is not None
    assert now.grad.tolist() == [[-1.0, 1.0]]
