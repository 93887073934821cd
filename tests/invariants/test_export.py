import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import deadpan
from deadpan.checkpoints import probe
from deadpan.checkpoints.export import export
from deadpan.checkpoints.load import Loaded, load
from deadpan.checkpoints.processor_files import save_processor
from deadpan.errors import DeadpanError
from deadpan.models import lora
from deadpan.processing.processor import POLICY_FILE
from exporting import reloaded_here
from make_tiny_model import make_official

WEIGHTS = "model.safetensors"
MAX_TILES = 3


def make_adapter(base: Path, folder: Path, dtype: str = "fp32", trained_on: str = "none") -> Path:
    """An adapter that changes the model, its tile limit other than the base's."""
    loaded = load(base, dtype=dtype, max_tiles=MAX_TILES)
    model = lora.attach(loaded.model, str(base), 4, 8, 0.05, "all-linear", True)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.adapter_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    lora.save(model, folder)
    save_processor(loaded.processor, folder, trained_on=trained_on)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "adapter")


def retype(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Store an official checkpoint's weights in another type; returns them."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.fixture
def here() -> Iterator[None]:
    """Exports are reloaded in this process. One test goes without this."""
    with reloaded_here():
        yield


def inputs_of(loaded: Loaded) -> dict[str, torch.Tensor]:
    """Not the probe's: a wide picture, so that the tile limit matters, and another question."""
    noise = torch.randint(256, (50, 400, 3), generator=torch.Generator().manual_seed(2))
    picture = Image.fromarray(noise.to(torch.uint8).numpy())
    return loaded.processor([picture], "<image>\n上班第一天。 Why is it funny?")


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs).logits.float()


_RELOAD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
with torch.inference_mode():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


def test_an_export_read_by_transformers_in_a_fresh_process_is_the_adapter_on_its_base(
    adapter: Path, tmp_path: Path
) -> None:
    report = export(adapter, tmp_path / "out", "hf")
    # Float32: the merge rounds once, and sums run in another order.
    assert 0 < report["max_logit_difference"] < 1e-4
    assert report["same_argmax"] == 1

    loaded = load(adapter)
    save_file(inputs_of(loaded), tmp_path / "inputs")
    paths = [tmp_path / name for name in ("out", "inputs", "logits")]
    subprocess.run([sys.executable, "-c", _RELOAD, *map(str, paths)], check=True)
    reloaded = load_file(tmp_path / "logits")["logits"]
    inputs = inputs_of(loaded)
    torch.testing.assert_close(reloaded, logits(loaded.model, inputs), atol=1e-4, rtol=0)
    base = load(loaded.base).model
    assert (reloaded - logits(base, inputs)).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["hf", "official", "adapter"])
@pytest.mark.usefixtures("here")
def test_every_layout_holds_the_same_model_and_makes_the_same_inputs(
    adapter: Path, tiny: Path, tmp_path: Path, layout: str
) -> None:
    out = tmp_path / "out"
    report = export(adapter, out, layout)
    source, again = load(adapter), load(out)
    inputs = inputs_of(again)
    for name, tensor in inputs_of(source).items():
        assert torch.equal(inputs[name], tensor)
    torch.testing.assert_close(
        logits(again.model, inputs), logits(source.model, inputs), atol=1e-4, rtol=0
    )
    # The tile limit of training travels; the base's is another.
    assert again.processor.policy() == source.processor.policy()
    assert len(inputs["pixel_values"]) == MAX_TILES + 1
    assert load(tiny).processor.tile_policy.max_tiles == 12

    stop = source.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == stop
    assert json.loads((out / "export.json").read_text()) == report
    facts = {
        "source": str(adapter),
        "base": str(tiny),
        "merged_into": "original",
        "layout": layout,
        "dtype": "fp32",
        "same_argmax": 1.0,
        "as_trained": None,
    }
    assert {name: report[name] for name in facts} == facts
    assert report["max_logit_difference"] < 1e-4
    assert report["max_logit_difference"] <= report["limit"] < 1e-2 * report["logit_spread"]
    assert abs(report["kl_divergence"]) < 1e-6
    assert report["deadpan"] == deadpan.__version__
    # Others may read it, whoever made it: safetensors' and mkdtemp's own modes are 600 and 700.
    assert out.stat().st_mode & 0o055 == 0o055
    assert {path.name for path in out.iterdir() if path.stat().st_mode & 0o044 != 0o044} == set()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("here")
def test_the_hf_layout_is_read_by_transformers_auto_class(adapter: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "out", "hf")
    loaded = load(adapter)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    assert model.dtype == torch.float32  # as stored
    assert model.generation_config.eos_token_id == loaded.processor.stop_id
    inputs = inputs_of(loaded)
    ours = logits(load(tmp_path / "out").model, inputs)
    assert torch.equal(logits(model, inputs), ours)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = loaded.model.generate(**inputs, **arguments)
    assert torch.equal(model.generate(**inputs, **arguments), expected)


@pytest.mark.usefixtures("here")
def test_the_adapter_layout_is_peft_s_own(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "out", "adapter")
    for name in (lora.ADAPTER_FILE, "adapter_config.json", POLICY_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    base, ours = load(tiny), load(adapter)
    theirs = PeftModel.from_pretrained(base.model, str(tmp_path / "out"))
    inputs = inputs_of(ours)
    assert torch.equal(logits(theirs, inputs), logits(ours.model, inputs))


@pytest.mark.usefixtures("here")
def test_in_bfloat16_the_merge_rounds_without_bias_and_stays_within_the_gate(
    tiny: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny, tmp_path / "bf16")
    retype(source, torch.bfloat16)
    adapter = make_adapter(source, tmp_path / "adapter", dtype="bf16")
    report = export(adapter, tmp_path / "out", "hf")
    assert report["dtype"] == "bf16"
    assert 0 < report["max_logit_difference"] <= report["limit"]
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    parts = load_file(adapter / lora.ADAPTER_FILE)
    name = "language_model.layers.0.self_attn.v_proj"
    a, b = (parts[f"base_model.model.model.{name}.lora_{part}.weight"] for part in "AB")
    base = load(source, dtype="fp32").model.get_parameter(f"model.{name}.weight")
    found = stored["language_model.model.layers.0.self_attn.v_proj.weight"]
    # Each number is a neighbour of the float32 sum, at random and right on average: 0.044 of a step is four
    # standard deviations of the mean of 2048 roundings. To the nearest, small updates would be erased.
    expected = base + 8 / 4 * b @ a
    step = torch.exp2(torch.frexp(expected).exponent.float() - 8)
    error = (found.float() - expected) / step
    assert error.abs().max() <= 1
    assert error.mean().abs() < 0.044
    assert error.abs().max() > 0.9
    # What was not trained is the base's, bit for bit.
    base_weights = load_file(source / WEIGHTS)
    head = "language_model.output.weight"
    assert torch.equal(stored["language_model.lm_head.weight"], base_weights[head])
    # The limit can be tightened: rounding is then too much.
    with pytest.raises(DeadpanError, match="differs"):
        export(adapter, tmp_path / "tight", "hf", limit=report["max_logit_difference"] / 2)


@pytest.mark.parametrize(
    ("language_model", "vision_6b", "dtype"),
    [
        ("InternLM2ForCausalLM", False, torch.float32),
        ("InternLM2ForCausalLM", False, torch.bfloat16),
        ("LlamaForCausalLM", True, torch.float32),
        ("Phi3ForCausalLM", False, torch.float32),
        ("Qwen2ForCausalLM", True, torch.float16),
    ],
)
@pytest.mark.usefixtures("here")
def test_official_to_hf_to_official_is_bit_identical(
    language_model: str, vision_6b: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = make_official(tmp_path / "source", language_model, vision_6b, seed=5)
    weights = retype(source, dtype)
    (source / "modeling_internvl_chat.py").write_text("raise RuntimeError('never run')\n")

    assert export(source, tmp_path / "hf", "hf")["max_logit_difference"] == 0
    export(tmp_path / "hf", tmp_path / "back", "official", official_files=source)
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name
    # The source's other files come along: those that deadpan does not write, byte for byte.
    files = {path.name: path for path in source.iterdir()}
    config = json.loads(files["config.json"].read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    ours = {"generation_config.json", POLICY_FILE, "export.json"}
    assert {path.name for path in (tmp_path / "back").iterdir()} == files.keys() | ours
    for name in files.keys() - ours - {WEIGHTS, "config.json", "tokenizer_config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == files[name].read_bytes()


@pytest.mark.parametrize("layout", ["hf", "official"])
@pytest.mark.usefixtures("here")
def test_a_tied_model_stays_tied(tiny: Path, tmp_path: Path, layout: str) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / WEIGHTS)
    del weights["language_model.output.weight"]
    save_file(weights, source / WEIGHTS)
    adapter = make_adapter(source, tmp_path / "adapter")
    report = export(adapter, tmp_path / "out", layout)
    assert report["max_logit_difference"] < 1e-4
    assert len(load_file(tmp_path / "out" / WEIGHTS)) == (
        len(list(load(source).model.named_parameters())) if layout == "hf" else len(weights)
    )
    again = load(tmp_path / "out").model
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight


@pytest.mark.usefixtures("here")
def test_an_adapter_trained_on_4_bits_is_merged_into_either_weights_and_the_report_says_which(
    tiny: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", trained_on="nf4")
    original = export(adapter, tmp_path / "original", "hf")
    trained = export(adapter, tmp_path / "trained", "hf", merge_into="trained")
    assert original["merged_into"] == "original"
    assert trained["merged_into"] == "trained"
    assert max(r["max_logit_difference"] for r in (original, trained)) < 1e-3

    def probed(folder: Path, quantization: str = "none") -> torch.Tensor:
        loaded = load(folder, quantization=quantization)
        return probe.run(loaded.model, loaded.processor)["logits"]

    # Merged into the original weights it is not quite the model that was trained: the report says by how much.
    in_training = probed(adapter, "nf4")
    difference = (in_training - probed(tmp_path / "original")).abs().max().item()
    as_trained = original["as_trained"]
    assert as_trained["quantization"] == "nf4"
    assert as_trained["max_logit_difference"] == pytest.approx(difference, rel=1e-3)
    assert difference > 0.05
    assert 0 < as_trained["same_argmax"] <= 1
    assert as_trained["kl_divergence"] > 1e-4
    # Merged into what the 4 bits stood for, it is; float32, sums in another order.
    assert trained["as_trained"] is None
    torch.testing.assert_close(probed(tmp_path / "trained"), in_training, atol=1e-3, rtol=0)


def _noise(state: dict[str, torch.Tensor]) -> None:
    """A few percent of the weights of one block: far more than rounding to bfloat16 is."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if "layers.1.mlp" in name:
            state[name] = tensor + 1e-2 * torch.randn(tensor.shape, generator=generator)


def _not_a_number(state: dict[str, torch.Tensor]) -> None:
    name = "model.multi_modal_projector.linear_1.bias"
    state[name] = state[name] * float("nan")


def _one_key_forgotten(state: dict[str, torch.Tensor]) -> None:
    name = "model.language_model.layers.0.self_attn.k_proj.weight"
    state[name] = torch.zeros_like(state[name])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["hf", "official"])
@pytest.mark.parametrize("spoil", [_noise, _not_a_number, _one_key_forgotten])
@pytest.mark.usefixtures("here")
def test_an_export_that_is_not_its_source_fails_and_leaves_nothing_behind(
    adapter: Path,
    tmp_path: Path,
    layout: str,
    dtype: str,
    spoil: Callable[[dict[str, torch.Tensor]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merge = lora.merged

    def spoilt(model: PeftModel) -> dict[str, torch.Tensor]:
        state = merge(model)
        spoil(state)
        return state

    monkeypatch.setattr("deadpan.models.lora.merged", spoilt)
    with pytest.raises(DeadpanError, match="differs from the model it was made from") as raised:
        export(adapter, tmp_path / "runs" / "out", layout, dtype=dtype)
    assert "logits within" in (raised.value.expected or "")
    assert "a difference of" in (raised.value.found or "")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("name", ["input_ids", "pixel_values"])
@pytest.mark.usefixtures("here")
def test_an_export_that_makes_other_inputs_fails(
    adapter: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reload(path: Path) -> dict[str, torch.Tensor]:
        result = load_file(path)
        return {**result, name: result[name] + 1}

    monkeypatch.setattr("deadpan.checkpoints.export.load_file", reload)
    with pytest.raises(DeadpanError, match=f"makes other {name} of the same conversation"):
        export(adapter, tmp_path / "out", "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_reloaded_fails_and_says_why(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nValueError: no such class\n")

    monkeypatch.setattr("deadpan.checkpoints.export.subprocess.run", run)
    with pytest.raises(DeadpanError, match="could not be reloaded") as raised:
        export(adapter, tmp_path / "out", "hf")
    assert raised.value.found == "ValueError: no such class"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["hf", "official", "adapter"])
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(
    adapter: Path, tmp_path: Path, layout: str
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system then refuses to write on, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(DeadpanError, match="The export could not be written") as raised:
            export(adapter, tmp_path / "out", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.where == str(tmp_path / "out")
    assert "GiB free" in (raised.value.found or "")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DeadpanError) as raised:
        export(adapter, tmp_path / "file" / "out", "hf")
    assert raised.value.where == str(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "gguf"}, "The layout 'gguf' is unknown"),
        ({"dtype": "bf8"}, "The type 'bf8' is unknown"),
        ({"merge_into": "nf4"}, "The choice of --merge-into 'nf4' is unknown"),
        ({"device": "gpu"}, "The device 'gpu' is unknown"),
    ],
)
def test_an_unknown_option_is_an_error(
    adapter: Path, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(DeadpanError, match=text) as raised:
        export(adapter, tmp_path / "out", **{"layout": "hf", **options})
    assert raised.value.fix or raised.value.expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_exists_is_never_overwritten(adapter: Path, tmp_path: Path, is_folder: bool) -> None:
    out = tmp_path / "out"
    out.mkdir() if is_folder else out.write_text("mine")
    with pytest.raises(DeadpanError, match="exists already") as raised:
        export(adapter, out, "hf")
    assert raised.value.where == str(out)
    assert list(tmp_path.rglob("*")) == [out]


def test_a_whole_model_has_no_adapter_to_export(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match="no adapter to export") as raised:
        export(tiny, tmp_path / "out", "adapter")
    assert raised.value.fix == "use --layout hf"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_the_official_layout_needs_the_official_files_of_the_same_model(
    tiny: Path, tmp_path: Path
) -> None:
    export(tiny, tmp_path / "hf", "hf")
    with pytest.raises(DeadpanError, match="takes its config, tokenizer") as raised:
        export(tmp_path / "hf", tmp_path / "out", "official")
    assert "--official-files" in (raised.value.fix or "")
    other = make_official(tmp_path / "other", "Qwen2ForCausalLM")
    with pytest.raises(DeadpanError, match="describe another language model") as raised:
        export(tmp_path / "hf", tmp_path / "out", "official", official_files=other)
    assert raised.value.where == str(other / "config.json")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "other"}
