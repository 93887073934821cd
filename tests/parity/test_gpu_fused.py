"""The decoder for training on a GPU, where kernels and FP8 take the place of what runs on a CPU.

Attention is held to the formula in float32; loss and gradients to transformers' layers in bfloat16, the
gradients by their cosine: every entry of them is a sum of many rounded products.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters import adapted
from deadpan.data.records import load as load_records
from deadpan.models import segments
from deadpan.models.answer_loss import AnswerLoss
from deadpan.models.frozen import has_fp8
from deadpan.models.fused_loss import FusedLoss
from deadpan.processing.collate import collate
from deadpan.processing.processor import load_processor
from make_tiny_model import make_official

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POSITIONS = {
    "samples apart": [*range(70), *range(130), *range(5)],
    "answers behind a prefix": [*range(40), *range(90), *range(80, 120), *range(80, 85), *range(9)],
}


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    other = other.float()
    return ((one.float() - other).norm() / other.norm()).item()


@pytest.mark.parametrize("dim", [16, 128])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_attention_is_the_formula(positions: list[int], dim: int) -> None:
    position_ids = torch.tensor(positions)
    where = segments.Segments.of(position_ids)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(len(positions), heads, dim, generator=generator).bfloat16()
        for heads in (4, 2, 2, 4)
    )
    wq, wk, wv = (t.float() for t in (q, k, v))
    expected, none = segments.attend(wq, wk, wv, where, position_ids)
    gradients = segments.attend_backward(
        grad.float(), wq, wk, wv, expected, none, where, position_ids
    )
    near = where.to(torch.device("cuda"))
    q, k, v, grad, position_ids = (t.cuda() for t in (q, k, v, grad, position_ids))
    out, lse = segments.attend(q, k, v, near, position_ids)
    assert relative(out.cpu(), expected) < 0.01
    found = segments.attend_backward(grad, q, k, v, out, lse, near, position_ids)
    for one, other in zip(found, gradients, strict=True):
        assert relative(one.cpu(), other) < 0.02


def gradient(model: PeftModel) -> torch.Tensor:
    found = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "Qwen2ForCausalLM"])
def test_loss_and_gradients_are_near_those_of_transformers(
    architecture: str, fp8: bool, records: Path, tmp_path: Path
) -> None:
    if fp8 and not has_fp8(torch.device("cuda")):
        pytest.skip("needs a GPU of compute capability 9 or more")
    folder = make_official(tmp_path / "model", architecture)
    processor = load_processor(folder, max_tiles=4)
    batch = collate([processor.record(record) for record in load_records(records)], 0, True)
    peft_model = adapted(folder, "cuda", "bf16", "varlen", r=16)
    moved = batch.to(torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        expected = AnswerLoss(peft_model)(
            moved.input_ids, moved.labels, moved.position_ids, moved.pixel_values
        )
    expected.backward()
    gradient_expected = gradient(peft_model)
    found = FusedLoss(peft_model, torch.bfloat16, fp8)(batch)
    found.backward()
    cosine = torch.cosine_similarity(gradient(peft_model), gradient_expected, dim=0)
    assert found.item() == pytest.approx(expected.item(), rel=0.02 if fp8 else 0.005)
    assert cosine > (0.95 if fp8 else 0.995)
