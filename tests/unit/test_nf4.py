from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from deadpan.checkpoints.load import Loaded, load
from deadpan.data.records import load as load_records
from deadpan.errors import DeadpanError
from deadpan.models import lora, nf4
from deadpan.models.answer_loss import AnswerLoss
from deadpan.processing.collate import collate

LAYERS = "model.language_model.layers."
BLOCK = 64


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Loaded:
    return load(tiny)


@pytest.fixture(scope="module")
def quantised(tiny: Path) -> Loaded:
    return load(tiny, quantization="nf4")


def dequantised(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def test_the_language_models_linear_layers_and_no_others_are_in_4_bits(
    quantised: Loaded, whole: Loaded
) -> None:
    in_4_bits = {
        name: module
        for name, module in quantised.model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    assert in_4_bits.keys() == {
        name
        for name, module in whole.model.named_modules()
        if name.startswith(LAYERS) and isinstance(module, nn.Linear)
    }
    for layer in in_4_bits.values():
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested  # the scales are quantised too
        assert layer.weight.data.dtype == torch.uint8
        # Two weights a byte.
        assert layer.weight.data.numel() == layer.in_features * layer.out_features // 2
    # Vision tower, projector, embeddings, norms and head are the checkpoint's, bit for bit.
    others = {
        n: p for n, p in whole.model.named_parameters() if n.rpartition(".")[0] not in in_4_bits
    }
    found = dict(quantised.model.named_parameters())
    assert [name for name in others if not torch.equal(found[name], others[name])] == []
    assert any("vision_tower" in name for name in others)
    assert {"lm_head.weight", "model.multi_modal_projector.linear_1.weight"} <= others.keys()


def test_the_weights_are_the_originals_within_what_4_bits_can_say(
    quantised: Loaded, whole: Loaded
) -> None:
    originals = dict(whole.model.named_parameters())
    for name, module in quantised.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            original = originals[f"{name}.weight"]
            error = (dequantised(module) - original).reshape(-1, BLOCK)
            largest = original.reshape(-1, BLOCK).abs().amax(dim=1, keepdim=True)
            # The widest gap of NF4's sixteen levels is 0.304 of a block's largest number, so half of it is the
            # worst rounding; the rest is for the scale itself, which is held in 8 bits.
            assert (error.abs() <= 0.16 * largest).all(), name
            # Of normally distributed weights NF4 keeps all but about 9%; 0 would mean nothing was quantised.
            assert 0.05 < error.norm() / original.norm() < 0.12, name


def test_a_training_step_moves_only_adapter_and_projector(tiny: Path, records: Path) -> None:
    loaded = load(tiny, quantization="nf4")
    torch.manual_seed(0)
    model = lora.attach(loaded.model, str(tiny), 4, 8, 0.0, "all-linear", True).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = [loaded.processor.record(record) for record in load_records(records)[:2]]
    batch = collate(samples, loaded.processor.pad_id)
    loss = AnswerLoss(model)(batch.input_ids, batch.labels, batch.position_ids, batch.pixel_values)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained
    assert {n for n in trained if "lora_" not in n and "modules_to_save" not in n} == set()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        # B is zero before the first step, so no gradient reaches A.
        assert gradient.any().item() is (".lora_A." not in name), name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in trained if ".lora_A." not in name}


def test_the_gradients_are_those_of_the_dequantised_weights(tiny: Path, records: Path) -> None:
    """The 4-bit product and its backward pass, against plain float32 layers that hold the same numbers."""
    quantised, plain = load(tiny, quantization="nf4"), load(tiny)
    for name, module in quantised.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            plain.model.get_submodule(name).weight.data.copy_(dequantised(module))
    losses, gradients = [], []
    for loaded in (quantised, plain):
        torch.manual_seed(0)
        model = lora.attach(loaded.model, str(tiny), 4, 8, 0.0, "all-linear", True).train()
        sample = loaded.processor.record(load_records(records)[3])
        batch = collate([sample], loaded.processor.pad_id)
        loss = AnswerLoss(model)(
            batch.input_ids, batch.labels, batch.position_ids, batch.pixel_values
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    # float32, sums in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)


def test_merging_an_nf4_model_adds_to_what_its_4_bits_stand_for(tiny: Path) -> None:
    loaded = load(tiny, quantization="nf4")
    name = f"{LAYERS}1.mlp.down_proj"
    stood_for = dequantised(loaded.model.get_submodule(name)).clone()
    model = lora.attach(loaded.model, str(tiny), 4, 8, 0.0, "all-linear", True).eval()
    layer = model.base_model.model.get_submodule(name)
    high, low = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    high.data += 0.1
    expected = stood_for + 8 / 4 * high @ low
    torch.testing.assert_close(lora.merged(model)[f"{name}.weight"], expected, atol=1e-6, rtol=0)


def test_in_float32_an_answer_is_computed_in_float32_and_leaves_the_weights_readable(
    tiny: Path,
) -> None:
    """Left to itself, bitsandbytes multiplies in bfloat16 on CPUs that can, and shuffles the codes for that."""
    loaded, plain = load(tiny, quantization="nf4"), load(tiny)
    layers = {n: m for n, m in loaded.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    for name, module in layers.items():
        plain.model.get_submodule(name).weight.data.copy_(dequantised(module))
    inputs = loaded.processor([], "Why is it funny?")
    with torch.inference_mode():
        found, expected = (m.eval()(**inputs).logits for m in (loaded.model, plain.model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for name, module in layers.items():
        assert torch.equal(dequantised(module), plain.model.get_submodule(name).weight)


def test_a_layer_too_narrow_for_a_block_is_an_error_that_names_it() -> None:
    layers = nn.ModuleDict({"wide": nn.Linear(128, 8), "narrow": nn.Linear(96, 8)})
    with pytest.raises(DeadpanError, match="'narrow' cannot be held in NF4") as raised:
        nf4.prepare(layers, torch.float32)
    assert raised.value.found == "96"


def test_what_nf4_saves_is_known_before_it_is_done(quantised: Loaded, whole: Loaded) -> None:
    def taken(loaded: Loaded) -> int:
        language_model = loaded.model.model.language_model
        return sum(nf4.bytes_of(parameter) for parameter in language_model.parameters())

    foretold = nf4.saved_bytes(whole.model.model.language_model)
    saved = taken(whole) - taken(quantised)
    # Two code tables, of 16 and of 256 float32 numbers, and an offset for each layer; small layers only feel them.
    tables = 14 * 4 * (16 + 256 + 1)
    assert saved <= foretold <= 1.01 * (saved + tables)
    assert nf4.saved_bytes(quantised.model.model.language_model) == 0
