"""The next token: the likeliest, or drawn by one number."""

import pytest
import torch
from transformers import TopPLogitsWarper

from deadpan.models.drawing import drawn, likeliest

LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0, -4.0])
MANY = 20_000
NUMBERS = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY


def shares(temperature: float, top_p: float) -> torch.Tensor:
    """How often each token is drawn, over numbers that fill [0, 1) evenly."""
    tokens = drawn(LOGITS.expand(MANY, -1), temperature, top_p, NUMBERS)
    return tokens.bincount(minlength=len(LOGITS)) / MANY


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.7, 0.3])
def test_tokens_are_drawn_as_often_as_transformers_finds_them_likely(
    temperature: float, top_p: float
) -> None:
    warped = TopPLogitsWarper(top_p)(torch.zeros(1, 1), LOGITS[None] / temperature)
    expected = warped.softmax(dim=-1)[0]
    found = shares(temperature, top_p)
    assert ((found == 0) == (expected < 1e-4)).all()
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1 / MANY * 2)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_the_likeliest_is_never_taken_away(number: float) -> None:
    uniform = torch.tensor([number], dtype=torch.float64)
    assert drawn(LOGITS[None], 1.0, 1e-9, uniform).tolist() == likeliest(LOGITS[None]).tolist()


def test_what_cannot_be_is_not_drawn() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert drawn(logits, 1.0, 1.0, uniform).tolist() == [0, 2, 2]
