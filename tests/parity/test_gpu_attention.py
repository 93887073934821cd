"""`--attention flash` against PyTorch's sdpa and against float32, on a GPU.

bfloat16 keeps 8 bits, and kernels sum in different orders, so two of them never agree exactly. The measure is how far
sdpa itself is from the same model in float32: flash may be twice as far, no more. A wrong mask is tens of
times as far, which the last test shows.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

from deadpan.checkpoints.load import Loaded, load
from deadpan.data.records import Turn
from deadpan.data.records import load as load_records
from deadpan.engines.base import GenerationSettings, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.models import lora
from deadpan.models.answer_loss import AnswerLoss
from deadpan.processing.collate import Batch, collate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
KINDS = {"flash": "bf16", "sdpa": "bf16", "eager": "fp32"}


@pytest.fixture(scope="module")
def models(tiny: Path) -> dict[str, Loaded]:
    """The tiny model (head_dim 16) with flash and sdpa in bfloat16, and the plain formula in float32."""
    return {
        attention: load(tiny, device=DEVICE, dtype=dtype, attention=attention)
        for attention, dtype in KINDS.items()
    }


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    """Prompts of different lengths, so that a batch of them is padded on the left."""
    texts = [
        "Tell me a joke.",
        "<image>\n讲一个脑洞大开的梗",
        "<image>\nWhat is this picture about?",
    ]
    images = [[], *[[Image.open(pictures[i]).convert("RGB")] for i in (0, 3)]]
    return [Request(i, [Turn("human", t)]) for i, t in zip(images, texts, strict=True)]


def answer_logits(loaded: Loaded, request: Request, ids: list[int]) -> torch.Tensor:
    """float32 logits of shape (token, vocabulary): what the model alone thinks before each of these tokens."""
    inputs = loaded.processor(request.images, request.turns)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        on_device = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        logits = loaded.model(**on_device, logits_to_keep=len(ids) + 1).logits
    return logits[0, :-1].float().cpu()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def test_the_attention_is_in_place_throughout(models: dict[str, Loaded]) -> None:
    inner = models["flash"].model.model
    names = {
        module.config._attn_implementation for module in (inner.language_model, inner.vision_tower)
    }
    assert len(names) == 1
    assert names.isdisjoint({"sdpa", "eager"})
    assert inner.language_model.config.head_dim == 16


def test_a_prompt_has_the_logits_of_sdpa(
    models: dict[str, Loaded], requests: list[Request]
) -> None:
    ids = models["sdpa"].processor.choice("上班第一天，我就想退休。 Why is it funny?")
    for request in requests:
        flash, sdpa, exact = (answer_logits(models[name], request, ids) for name in KINDS)
        assert 0 < distance(flash, exact) < 2 * distance(sdpa, exact)


def test_a_padded_batch_has_the_logits_of_its_rows_alone(
    models: dict[str, Loaded], requests: list[Request]
) -> None:
    """Left padding is cut out before the kernel; a row must not notice its neighbours."""
    for name in ("flash", "sdpa"):
        loaded = models[name]
        inputs = BuiltinEngine(loaded)._inputs(requests)
        assert not inputs["attention_mask"].all()
        with torch.inference_mode():
            together = loaded.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu()
        for row, request in zip(together, requests, strict=True):
            inputs = BuiltinEngine(loaded)._inputs([request])
            with torch.inference_mode():
                alone = loaded.model(**inputs, logits_to_keep=1).logits[0, -1].float().cpu()
                exact = models["eager"].model(**inputs, logits_to_keep=1).logits[0, -1].cpu()
            # Other shapes, other kernels, other roundings: as far from each other as from float32.
            assert distance(row, alone) <= 2 * max(distance(alone, exact), 0.05)


def test_greedy_answers_of_a_padded_batch_are_the_likeliest_tokens(
    models: dict[str, Loaded], requests: list[Request]
) -> None:
    """Every token that flash takes in a batch is, to float32 and the row alone, the likeliest or as good as that."""
    loaded = models["flash"]
    inputs = BuiltinEngine(loaded)._inputs(requests)
    width = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        rows = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, width:]
    for ids, request in zip(rows.tolist(), requests, strict=True):
        exact = answer_logits(models["eager"], request, ids)
        taken = exact.gather(1, torch.tensor(ids)[:, None])[:, 0]
        rounding = distance(answer_logits(models["sdpa"], request, ids), exact)
        assert (exact.max(dim=1).values - taken).max() <= 4 * rounding
        # Not because everything is equally likely.
        assert (exact.max(dim=1).values - exact.median(dim=1).values).min() > 10 * rounding


def test_the_engine_answers(models: dict[str, Loaded], requests: list[Request]) -> None:
    engine = BuiltinEngine(models["flash"])
    settings = GenerationSettings(max_new_tokens=8)
    together = engine.generate(requests, settings)
    assert [joke.tokens for joke in together] == [8] * len(requests)
    (alone,) = engine.generate(requests[2:], settings)
    assert "".join(engine.stream(requests[2], settings)) == alone.text


def packed(loaded: Loaded, records: Path, packing: bool = True) -> Batch:
    samples = [loaded.processor.record(record) for record in load_records(records)]
    return collate(samples, loaded.processor.pad_id, packing).to(torch.device(DEVICE))


def loss_of(loaded: Loaded, batch: Batch) -> torch.Tensor:
    loss = AnswerLoss(loaded.model)
    return loss(batch.input_ids, batch.labels, batch.position_ids, batch.pixel_values)


def test_a_packed_row_has_the_loss_of_its_samples(models: dict[str, Loaded], records: Path) -> None:
    with torch.inference_mode():
        exact = loss_of(models["eager"], packed(models["eager"], records, packing=False)).item()
        flash, sdpa = (
            loss_of(models[name], packed(models[name], records)).item()
            for name in ("flash", "sdpa")
        )
    # Summed over some 40 tokens, bfloat16's roundings all but cancel (0.1% on a CPU).
    assert [flash, sdpa] == [pytest.approx(exact, rel=0.005)] * 2


def gradient(tiny: Path, records: Path, attention: str, packing: bool, apart: bool) -> torch.Tensor:
    """Of a fresh adapter and the projector, as one float32 vector."""
    dtype = KINDS[attention]
    loaded = load(tiny, device=DEVICE, dtype=dtype, attention=attention)
    torch.manual_seed(0)
    model = lora.attach(loaded.model, str(tiny), 4, 8, 0.0, "all-linear", True).train()
    loaded.model = model
    batch = packed(loaded, records, packing)
    if not apart:
        batch.position_ids = torch.arange(batch.input_ids.shape[1], device=DEVICE)[None]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bf16"):
        loss = loss_of(loaded, batch)
    loss.backward()
    parts = [p.grad.flatten() for p in lora.adapter_parameters(model) if p.grad is not None]
    return torch.cat(parts).cpu()


@pytest.mark.parametrize("packing", [True, False])
def test_the_gradients_of_a_batch_are_those_of_sdpa(
    tiny: Path, records: Path, packing: bool
) -> None:
    flash, sdpa, exact = (gradient(tiny, records, name, packing, apart=True) for name in KINDS)
    rounding = (sdpa - exact).norm() / exact.norm()
    assert 0 < (flash - exact).norm() / exact.norm() < 2 * rounding
    assert rounding < 0.05
    if packing:
        # The control: samples of a packed row that see one another learn something else.
        mixed = gradient(tiny, records, "eager", packing, apart=False)
        assert (mixed - exact).norm() / exact.norm() > 10 * rounding
