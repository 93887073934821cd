"""The decoder written out for training gives the loss and the gradients of transformers' layers.

In float32, within the rounding of sums that run in another order (see test_loss.py).
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters import adapted
from deadpan.data.records import load as load_records
from deadpan.models import segments
from deadpan.models.answer_loss import AnswerLoss, plain_model
from deadpan.models.elementwise import dropped as leave_out
from deadpan.models.fused_loss import FusedLoss, picture_features
from deadpan.processing.collate import Batch, collate
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Processor, Sample, load_processor
from make_tiny_model import make_official

Gradients = dict[str, torch.Tensor]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["InternLM2ForCausalLM", "Qwen2ForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_official(tmp_path_factory.mktemp("fused") / "model", request.param)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return load_processor(folder, max_tiles=4)


@pytest.fixture(scope="module")
def samples(processor: Processor, records: Path) -> list[Sample]:
    return [processor.record(record) for record in load_records(records)]


def plain(model: PeftModel, batch: Batch) -> tuple[torch.Tensor, Gradients]:
    loss = AnswerLoss(model)(batch.input_ids, batch.labels, batch.position_ids, batch.pixel_values)
    return finished(model, loss)


def finished(model: PeftModel, loss: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def assert_equal(
    one: tuple[torch.Tensor, Gradients], other: tuple[torch.Tensor, Gradients], tokens: int
) -> None:
    assert one[1].keys() == other[1].keys()
    assert max(gradient.abs().max().item() for gradient in one[1].values()) / tokens > 0.1
    torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * tokens)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_loss_and_gradients_are_those_of_transformers(
    folder: Path, samples: list[Sample], packing: bool, checkpoint: bool
) -> None:
    model = adapted(folder)
    batch = collate(samples, 0, packing)
    expected = plain(model, batch)
    fused = FusedLoss(model, torch.float32)
    fused.checkpoint = checkpoint
    found = finished(model, fused(batch))
    assert_equal(expected, found, batch.supervised)


def test_so_they_are_with_adapters_on_some_layers_only(folder: Path, samples: list[Sample]) -> None:
    model = adapted(folder, targets=["q_proj", "v_proj", "up_proj"])
    batch = collate(samples, 0, packing=True)
    expected = plain(model, batch)
    found = finished(model, FusedLoss(model, torch.float32)(batch))
    assert_equal(expected, found, batch.supervised)


def test_answers_behind_one_prefix_train_like_samples_of_their_own(
    folder: Path, samples: list[Sample]
) -> None:
    """Loss and gradients of three answers to a picture, the picture once or three times."""
    model = adapted(folder)
    first = samples[1]
    start = next(i for i, label in enumerate(first.labels) if label != IGNORE_INDEX)
    prefix, answer = first.input_ids[:start], first.input_ids[start:]
    answers = [answer, answer[::-1], [*answer[2:], *answer[:1]]]
    apart = [
        replace(first, input_ids=prefix + one, labels=[IGNORE_INDEX] * start + one)
        for one in answers
    ]
    others = [samples[0], samples[2]]
    expected = finished(
        model, FusedLoss(model, torch.float32)(collate([others[0], *apart, others[1]], 0, True))
    )
    together = replace(
        first,
        input_ids=[*prefix, *chain(*answers)],
        labels=[IGNORE_INDEX] * start + list(chain(*answers)),
        position_ids=[
            *range(start),
            *(start + i for one in answers for i in range(len(one))),
        ],
    )
    batch = collate([others[0], together, others[1]], 0, True)
    found = finished(model, FusedLoss(model, torch.float32)(batch))
    assert_equal(expected, found, batch.supervised)


def test_dropout_leaves_out_its_share_and_keeps_the_mean() -> None:
    x = torch.ones(1000, 256)
    dropped = leave_out(x, 0.25, torch.tensor(-7, dtype=torch.int32))
    zero = dropped == 0
    assert zero.float().mean().item() == pytest.approx(0.25, abs=0.005)
    assert dropped[~zero].unique().tolist() == pytest.approx([1 / 0.75])
    again = leave_out(x, 0.25, torch.tensor(-7, dtype=torch.int32))
    other = leave_out(x, 0.25, torch.tensor(8, dtype=torch.int32))
    assert torch.equal(dropped, again)
    # Independent masks agree in .25^2 + .75^2 of the places.
    assert ((other == 0) == zero).float().mean().item() == pytest.approx(0.625, abs=0.01)


def test_with_dropout_the_gradients_are_those_of_the_masked_loss(
    folder: Path, samples: list[Sample]
) -> None:
    """The loss moves along its gradient as the gradient says, the masks held still."""
    model = adapted(folder)
    batch = collate(samples, 0, packing=True)
    loss_of = FusedLoss(model, torch.float32, dropout=0.3)

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return loss_of(batch)

    _, gradients = finished(model, loss())
    direction = {name: torch.sign(gradient) for name, gradient in gradients.items()}
    slope = sum((direction[name] * gradients[name]).sum().item() for name in gradients)
    step = 2e-6
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in direction:
                    parameter += sign * step * direction[name]
            values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_a_features_batch_is_a_pixels_batch(folder: Path, samples: list[Sample]) -> None:
    model = adapted(folder)
    batch = collate(samples, 0, packing=True)
    assert batch.pixel_values is not None
    features = picture_features(plain_model(model), batch.pixel_values)
    known = replace(batch, pixel_values=None, features=features.detach())
    loss_of = FusedLoss(model, torch.float32)
    assert_equal(finished(model, loss_of(batch)), finished(model, loss_of(known)), batch.supervised)


@pytest.mark.parametrize(("dim", "taken"), [(16, False), (64, False), (128, True)])
def test_flash_attention_4_is_taken_for_the_heads_that_it_was_checked_with(
    dim: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = object()
    monkeypatch.setattr(segments, "_flash_4", lambda device: newer)
    assert (segments._newer(torch.empty(3, 2, dim)) is newer) is taken
