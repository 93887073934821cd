"""The decoder written out for training gives the loss and the gradients of transformers' layers.

In float32, within the rounding of sums that run in another order (see test_loss.py).
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from deadpan.checkpoints.load import load
from deadpan.data.records import load as load_records
from deadpan.models import lora
from deadpan.models.answer_loss import AnswerLoss
from deadpan.models.fused_loss import FusedLoss
from deadpan.processing.collate import Batch, collate
from deadpan.processing.processor import Processor, Sample, load_processor
from make_tiny_model import make_official

Gradients = dict[str, torch.Tensor]
TOLERANCE = 1e-5


def adapted(folder: Path, targets: str | list[str] = "all-linear") -> PeftModel:
    model = load(folder, device="cpu", dtype="fp32", attention="sdpa").model
    torch.manual_seed(0)
    peft_model = lora.attach(model, str(folder), 8, 16, 0.0, targets, True)
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return peft_model.train()


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
    found = finished(model, FusedLoss(model, torch.float32, checkpoint=checkpoint)(batch))
    assert_equal(expected, found, batch.supervised)


def test_so_they_are_with_adapters_on_some_layers_only(folder: Path, samples: list[Sample]) -> None:
    model = adapted(folder, ["q_proj", "v_proj", "up_proj"])
    batch = collate(samples, 0, packing=True)
    expected = plain(model, batch)
    found = finished(model, FusedLoss(model, torch.float32)(batch))
    assert_equal(expected, found, batch.supervised)
