import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from deadpan.checkpoints.load import Loaded, load
from deadpan.checkpoints.official_config import LANGUAGE_MODELS
from deadpan.checkpoints.processor_files import save_processor
from deadpan.errors import DeadpanError
from deadpan.models import lora
from make_tiny_model import make_official

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEARS = {
    "InternLM2ForCausalLM": LLAMA,
    "LlamaForCausalLM": LLAMA,
    "Phi3ForCausalLM": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "Qwen2ForCausalLM": LLAMA,
}
OPTIONS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "train_projector": True,
}


def attach(loaded: Loaded, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return lora.attach(loaded.model, str(loaded.folder), **{**OPTIONS, **options}).eval()


def logits(model: nn.Module, loaded: Loaded) -> torch.Tensor:
    inputs = loaded.processor([Image.new("RGB", (90, 60), (10, 200, 90))], "<image>\n一只猫。")
    with torch.inference_mode():
        return model(**inputs).logits.float()


def train_a_little(model: PeftModel) -> None:
    """Noise in place of training: B is zero at first, so without it an adapter does nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.adapter_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def save(model: PeftModel, loaded: Loaded, folder: Path) -> Path:
    folder.mkdir()
    lora.save(model, folder)
    save_processor(loaded.processor, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder, projector trained too. Read only."""
    loaded = load(tiny)
    model = attach(loaded)
    train_a_little(model)
    return save(model, loaded, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def folder(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter folder, to be damaged."""
    return shutil.copytree(adapter, tmp_path / "adapter")


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_all_linear_means_every_linear_layer_of_the_language_model_and_no_other(
    language_model: str, tmp_path: Path
) -> None:
    loaded = load(make_official(tmp_path / "model", language_model))
    assert set(lora.linear_names(loaded.model)) == LINEARS[language_model]
    linears = {
        name
        for name, module in loaded.model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    before = {name for name, _ in loaded.model.named_parameters()}
    peft_model = attach(loaded)
    prefix = "base_model.model.model.language_model."
    adapted = {
        name.removesuffix(".lora_A.default.weight").removeprefix(prefix)
        for name, _ in peft_model.named_parameters()
        if ".lora_A." in name
    }
    assert adapted == linears
    assert len(adapted) == 2 * len(LINEARS[language_model])  # two layers
    # Nothing but the adapter and the projector learns: neither vision tower, embeddings nor head.
    learning = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    added = [name for name in learning if "lora_" in name]
    projector = [name for name in learning if "multi_modal_projector.modules_to_save" in name]
    assert sorted(learning) == sorted(added + projector)
    assert len(added) == 2 * len(adapted)
    assert len(projector) == len([name for name in before if "multi_modal_projector" in name])
    assert len(lora.adapter_parameters(peft_model)) == len(learning)


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [(["q_proj", "v_proj"], {"q_proj", "v_proj"}), ("k_proj", {"k_proj"})],
)
def test_named_targets_are_the_only_ones(
    tiny: Path, target_modules: str | list[str], expected: set[str]
) -> None:
    model = attach(load(tiny), target_modules=target_modules, train_projector=False)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-4] for name in learning} == expected
    assert all(".language_model.layers." in name for name in learning)
    # Two layers, A and B.
    assert len(learning) == 4 * len(expected)


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("q_pro", "'q_proj'"),
        # Names of linear layers elsewhere in the model.
        ("fc1", "choose one of all-linear, down_proj"),
        ("linear_1", "all-linear"),
        ("lm_head", "choose one of all-linear, down_proj"),
        ("wqkv", "choose one of all-linear, down_proj"),
    ],
)
def test_an_unknown_target_is_an_error_that_names_the_known(
    tiny: Path, target: str, advice: str
) -> None:
    with pytest.raises(DeadpanError, match=f"no linear layer '{target}'") as raised:
        attach(load(tiny), target_modules=["q_proj", target])
    assert raised.value.where == "lora.target_modules"
    assert advice in (raised.value.fix or "")


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(tiny: Path) -> None:
    loaded = load(tiny)
    base = logits(loaded.model, loaded)
    model = attach(loaded)
    assert torch.equal(logits(model, loaded), base)
    train_a_little(model)
    assert (logits(model, loaded) - base).abs().max() > 0.1


@pytest.mark.parametrize("train_projector", [True, False])
def test_an_adapter_comes_back_from_disk_as_it_was(
    tiny: Path, tmp_path: Path, train_projector: bool
) -> None:
    loaded = load(tiny)
    model = attach(loaded, train_projector=train_projector)
    train_a_little(model)
    folder = save(model, loaded, tmp_path / "adapter")
    stored = load_file(folder / lora.ADAPTER_FILE)
    assert any("multi_modal_projector" in name for name in stored) is train_projector
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    config = lora.read_config(folder)
    assert config["base_model_name_or_path"] == str(tiny)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert (folder / lora.ADAPTER_FILE).stat().st_mode & 0o777 == 0o644

    again = load(folder)
    assert (again.folder, again.base) == (folder, tiny)
    state, expected = lora.adapter_state(again.model), lora.adapter_state(model)
    assert state.keys() == expected.keys() == stored.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(logits(again.model, again), logits(model, loaded))
    assert not again.model.training
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


def test_peft_itself_reads_the_folder(adapter: Path, tiny: Path) -> None:
    ours = load(adapter)
    base = load(tiny)
    theirs = PeftModel.from_pretrained(base.model, str(adapter)).eval()
    assert torch.equal(logits(theirs, base), logits(ours.model, ours))
    # The projector came along, rather than the base's being used.
    projector = theirs.base_model.model.model.multi_modal_projector.linear_1.weight
    assert not torch.equal(projector, load(tiny).model.model.multi_modal_projector.linear_1.weight)


def test_what_is_trained_is_float32_even_on_a_bfloat16_model(tiny: Path, adapter: Path) -> None:
    fresh = attach(load(tiny, dtype="bf16"))
    resumed = load(adapter, dtype="bf16", trainable=True).model
    assert resumed.training
    for model in (fresh, resumed):
        kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == len(lora.adapter_parameters(model))
    # Bit for bit, not by way of bfloat16.
    stored = load_file(adapter / lora.ADAPTER_FILE)
    state = lora.adapter_state(resumed)
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_for_inference_the_adapter_takes_the_models_type(adapter: Path) -> None:
    model = load(adapter, dtype="bf16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_merging_adds_the_scaled_product_and_takes_the_trained_projector(adapter: Path) -> None:
    loaded = load(adapter)
    base = dict(load(loaded.base).model.named_parameters())
    unmerged, merged = lora.base_parameters(loaded.model), lora.merged(loaded.model)
    assert unmerged.keys() == base.keys()
    assert all(torch.equal(unmerged[name], base[name]) for name in base)
    stored = load_file(adapter / lora.ADAPTER_FILE)
    for name, tensor in merged.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if "multi_modal_projector" in name:
            assert torch.equal(tensor, stored[f"base_model.model.{name}"])
        else:
            a, b = (stored[f"{key}.lora_{part}.weight"] for part in "AB")
            torch.testing.assert_close(tensor, base[name] + 8 / 4 * b @ a, atol=1e-6, rtol=0)
    # The language model's linear layers and the projector, and nothing else.
    untouched = ("vision_tower", "embed_tokens", "norm.weight", "layernorm.weight", "lm_head")
    assert merged.keys() == {
        n for n in base if "multi_modal_projector" in n or not any(u in n for u in untouched)
    }


def set_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / lora.ADAPTER_FILE)
    edit(weights)
    save_file(weights, folder / lora.ADAPTER_FILE)


A = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"

# What is done to the folder, the file that the error names, and what it says.
DAMAGES: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "another rank": (lambda f: set_config(f, r=8), lora.ADAPTER_FILE, ["does not fit", "--base"]),
    "a tensor less": (
        lambda f: edit_weights(f, lambda w: w.pop(A)),
        lora.ADAPTER_FILE,
        ["does not fit", f"expected: {A} of shape (4, 64)", "found: nothing; 1 tensors differ"],
    ),
    "a tensor more": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(2))),
        lora.ADAPTER_FILE,
        ["does not fit", "extra", "(2,)"],
    ),
    "weights cut short": (
        lambda f: (f / lora.ADAPTER_FILE).write_bytes(b"\x10\x00\x00"),
        lora.ADAPTER_FILE,
        ["damaged"],
    ),
    "no weights": (
        lambda f: (f / lora.ADAPTER_FILE).unlink(),
        lora.ADAPTER_FILE,
        ["no weights"],
    ),
    "another method": (lambda f: set_config(f, peft_type="IA3"), ".", ["not a LoRA", "IA3"]),
    "no base named": (
        lambda f: set_config(f, base_model_name_or_path=None),
        ".",
        ["does not say what its base model is", "--base"],
    ),
    "base gone": (
        lambda f: set_config(f, base_model_name_or_path="/no/such/model"),
        "adapter_config.json",
        ["base model is gone", "/no/such/model", "--base"],
    ),
    "config cut short": (
        lambda f: (f / "adapter_config.json").write_text('{"r": 4,'),
        "adapter_config.json",
        ["not valid JSON"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_adapter_out_of_order_is_one_error_that_names_the_file(folder: Path, name: str) -> None:
    damage, where, texts = DAMAGES[name]
    damage(folder)
    with pytest.raises(DeadpanError) as raised:
        load(folder)
    assert raised.value.where == str(folder / where)
    assert [text for text in texts if text not in str(raised.value)] == []


def test_an_adapter_on_another_familys_model_does_not_fit(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match="does not fit its base model"):
        load(adapter, base=make_official(tmp_path / "phi3", "Phi3ForCausalLM"))


def test_an_adapters_base_may_have_moved_but_is_no_adapter(
    folder: Path, adapter: Path, tiny: Path
) -> None:
    set_config(folder, base_model_name_or_path="/no/such/model")
    moved, there = load(folder, base=tiny), load(adapter)
    assert torch.equal(logits(moved.model, moved), logits(there.model, there))
    with pytest.raises(DeadpanError, match="must be a whole model") as raised:
        load(folder, base=adapter)
    assert raised.value.where == str(adapter)
