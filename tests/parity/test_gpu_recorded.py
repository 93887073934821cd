"""Passes that a GPU plays back give the loss and the gradients of the plain way.

Gradients are compared by their cosine: in products of another size their sums are taken in another order.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapters import adapted
from deadpan.data.records import load as load_records
from deadpan.models.frozen import has_fp8
from deadpan.models.fused_loss import FusedLoss, picture_features
from deadpan.models.recorded import RecordedLoss, suits
from deadpan.models.segments import Segments
from deadpan.models.shapes import Shape
from deadpan.processing.collate import Batch, collate
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import load_processor
from make_tiny_model import make_official

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Outcome = tuple[float, torch.Tensor]


@pytest.fixture(params=["InternLM2ForCausalLM", "Qwen2ForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_official(tmp_path / "model", request.param)


@pytest.fixture
def model(folder: Path) -> PeftModel:
    return adapted(folder, "cuda", "bf16", "varlen", r=16)


@pytest.fixture
def batches(folder: Path, records: Path) -> list[Batch]:
    """Two of one shape, a long one, one of a single sample, and one without pictures."""
    processor = load_processor(folder, max_tiles=4)
    samples = [processor.record(record) for record in load_records(records)]
    answers = [[t for t in sample.labels if t != IGNORE_INDEX] for sample in samples]
    texts = [
        replace(sample, input_ids=answer, labels=answer, pixel_values=None)
        for sample, answer in zip(samples, answers, strict=True)
    ]
    parts = (samples[:3], samples[1:], samples * 6, samples[:1], texts)
    return [collate(part, processor.pad_id, True) for part in parts]


def outcome(model: PeftModel, loss_of: Callable[[Batch], torch.Tensor], *steps: Batch) -> Outcome:
    """The sum of the losses of several micro-batches, and the gradient of their mean."""
    torch.manual_seed(5)
    total = 0.0
    for batch in steps:
        loss = loss_of(batch)
        (loss / sum(step.supervised for step in steps)).backward()
        total += loss.item()
    found = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return total, torch.cat(found)


def assert_near(one: Outcome, other: Outcome, fp8: bool) -> None:
    assert one[0] == pytest.approx(other[0], rel=0.01 if fp8 else 0.002)
    assert len(one[1]) == len(other[1])
    assert torch.cosine_similarity(one[1], other[1], dim=0) > (0.99 if fp8 else 0.999)
    assert one[1].norm().item() == pytest.approx(other[1].norm().item(), rel=0.05 if fp8 else 0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("again", [True, False], ids=["run each time", "recorded"])
def test_batches_are_played_back_in_turn(
    model: PeftModel,
    batches: Sequence[Batch],
    fp8: bool,
    dropout: float,
    again: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recorded; and run each time in the recording's place, which tells where a difference comes from."""
    if fp8 and not has_fp8(torch.device("cuda")):
        pytest.skip("needs a GPU of compute capability 9 or more")
    fused = FusedLoss(model, torch.bfloat16, fp8, dropout)
    assert suits(fused)
    loss_of = RecordedLoss(fused)
    if again:

        def record(shape: Shape, of_shape: Any, segments: Segments) -> bool:
            run = partial(loss_of._compute, shape, of_shape, segments)
            of_shape.graph = SimpleNamespace(replay=run)
            return True

        monkeypatch.setattr(loss_of, "_record", record)
    plain = [outcome(model, fused, batch) for batch in batches]
    # Batches and dropout are told apart by more than rounding.
    assert torch.cosine_similarity(plain[0][1], plain[1][1], dim=0) < 0.98
    for _ in range(2):  # seen, then recorded
        for batch in batches:
            loss_of(batch)
    before = loss_of.played
    for _ in range(2):
        for batch, expected in zip(batches, plain, strict=True):
            assert_near(outcome(model, loss_of, batch), expected, fp8)
    assert loss_of.played == before + 2 * len(batches)
    assert len(loss_of._passes) == 4
    assert all(one.graph is not None for one in loss_of._passes.values())
    # Several micro-batches of a step, and weights that have moved.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    assert_near(outcome(model, loss_of, *batches), outcome(model, fused, *batches), fp8)


def test_features_at_hand_and_recordings_begun_anew(
    model: PeftModel, batches: Sequence[Batch]
) -> None:
    fused = FusedLoss(model, torch.bfloat16)
    loss_of = RecordedLoss(fused)
    batch = batches[0]
    assert batch.pixel_values is not None
    with torch.no_grad():
        features = picture_features(fused.model, batch.pixel_values.cuda()).cpu().pin_memory()
    known = replace(batch, pixel_values=None, features=features)
    expected = outcome(model, fused, batch)
    for _ in range(3):
        assert_near(outcome(model, loss_of, known), expected, False)
    assert loss_of.played == 2
    loss_of.forget()
    for _ in range(3):
        assert_near(outcome(model, loss_of, known), expected, False)
    assert loss_of.played == 4


def test_recordings_give_way(
    model: PeftModel, batches: Sequence[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a batch for which there is no room beside them."""
    fused = FusedLoss(model, torch.bfloat16)
    loss_of = RecordedLoss(fused)
    for _ in range(3):
        loss_of(batches[0])
    assert loss_of.played == 2
    monkeypatch.setattr(loss_of, "_is_roomy", lambda tokens: False)
    assert_near(outcome(model, loss_of, batches[2]), outcome(model, fused, batches[2]), False)
    assert not loss_of._passes
    assert_near(outcome(model, loss_of, batches[0]), outcome(model, fused, batches[0]), False)
    assert loss_of.played == 2
