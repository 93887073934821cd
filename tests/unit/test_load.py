import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deadpan.checkpoints.files import WeightFiles, write_weights
from deadpan.checkpoints.load import Loaded, load
from deadpan.checkpoints.official_config import LANGUAGE_MODELS
from deadpan.checkpoints.processor_files import save_processor
from deadpan.errors import DeadpanError
from make_tiny_model import make_official, random_weights

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4411571040\n"
)


def logits(loaded: Loaded) -> torch.Tensor:
    """Of a question about a picture, at every position."""
    inputs = loaded.processor([Image.new("RGB", (90, 60), (10, 200, 90))], "<image>\n一只猫。")
    with torch.inference_mode():
        return loaded.model(**inputs).logits


def state(loaded: Loaded) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in loaded.model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Loaded:
    return load(tiny)


def edit_json(path: Path, *keys: str, **values: Any) -> None:
    """Set values in the object that the keys lead to."""
    content = section = json.loads(path.read_text())
    for key in keys:
        section = section[key]
    section.update(values)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS)


def shard(folder: Path) -> dict[str, str]:
    """Cut the weights into shards of 100 kB; returns the index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    write_weights(weights.items(), folder, shard_bytes=100_000)
    return json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("vision_6b", [False, True], ids=["300M", "6B"])
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_an_official_checkpoint_fills_every_parameter_and_reads_back_from_the_hugging_face_layout(
    language_model: str, vision_6b: bool, tmp_path: Path
) -> None:
    official = load(make_official(tmp_path / "official", language_model, vision_6b, seed=3))
    assert_same(state(official), random_weights(official.model, seed=3))
    assert not any(parameter.requires_grad for parameter in official.model.parameters())
    assert not official.model.training
    assert official.model.generation_config.eos_token_id == official.processor.stop_id

    official.model.save_pretrained(tmp_path / "hf")
    save_processor(official.processor, tmp_path / "hf")
    again = load(tmp_path / "hf")
    assert_same(state(again), state(official))
    # The same arithmetic on the same numbers.
    assert torch.equal(logits(again), logits(official))


def test_every_tensor_read_is_reported(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(tiny, progress=lambda *counts: seen.append(counts))
    total = len(load_file(tiny / WEIGHTS))
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_shards_with_an_index(folder: Path, whole: Loaded) -> None:
    index = shard(folder)
    assert len(set(index.values())) > 3
    assert index.keys() == load_file(whole.folder / WEIGHTS).keys()
    assert_same(state(load(folder)), state(whole))


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_files_are_read_as_plain_tensors(folder: Path, whole: Loaded, shards: int) -> None:
    weights = list(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(dict(weights), folder / "pytorch_model.bin")
    else:
        weight_map = {name: f"part-{i % 2}.bin" for i, (name, _) in enumerate(weights)}
        for part in range(2):
            torch.save(dict(weights[part::2]), folder / f"part-{part}.bin")
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    assert_same(state(load(folder)), state(whole))
    assert WeightFiles(folder).stored_type() == "F32"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"weight": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(DeadpanError) as raised:
        load(folder)
    assert not (tmp_path / "sprung").exists()
    assert raised.value.where == str(path)
    # Not the message for a broken download: downloading it again would not help.
    assert "code" in raised.value.what
    # The control: it is a working trap.
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)],
)
def test_weights_take_the_type_asked_for_and_rotary_tables_stay_float32(
    tiny: Path, whole: Loaded, dtype: str, expected: torch.dtype
) -> None:
    loaded = load(tiny, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
    rounded = {name: tensor.to(expected) for name, tensor in state(whole).items()}
    assert_same(state(loaded), rounded)
    buffers = dict(loaded.model.named_buffers())
    assert [name for name in buffers if "inv_freq" in name]
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}


def test_rotary_tables_in_old_files_are_passed_over(folder: Path, whole: Loaded) -> None:
    name = "language_model.model.layers.{}.attention.rotary_emb.inv_freq"
    edit_weights(folder, lambda w: w.update({name.format(i): torch.ones(8) for i in range(2)}))
    assert_same(state(load(folder)), state(whole))


def test_a_head_tied_to_the_embeddings(folder: Path, whole: Loaded) -> None:
    """InternVL2-1B and its like: no output weight in the file."""
    edit_json(folder / "config.json", "llm_config", tie_word_embeddings=True)
    # With a head of its own in the file, the file wins.
    assert_same(state(load(folder)), state(whole))
    edit_weights(folder, lambda weights: weights.pop("language_model.output.weight"))
    tied = load(folder)
    embeddings = tied.model.model.language_model.embed_tokens.weight
    assert tied.model.lm_head.weight is embeddings
    assert torch.equal(embeddings, whole.model.model.language_model.embed_tokens.weight)
    untied = load(whole.folder)
    untied.model.lm_head.weight.data.copy_(embeddings)
    assert torch.equal(logits(tied), logits(untied))


WQKV = "language_model.model.layers.1.attention.wqkv.weight"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def as_bin(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def damage_index(folder: Path, text: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(text)


def _lose_a_tensor_of_a_shard(folder: Path) -> None:
    path = folder / shard(folder)["mlp1.1.weight"]
    weights = load_file(path)
    del weights["mlp1.1.weight"]
    save_file(weights, path)


def _rename_the_image_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))


# What is done to the folder, the file that the error names, and what it says.
DAMAGES: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "a tensor is missing": (
        lambda f: edit_weights(f, lambda w: w.pop(WQKV)),
        ".",
        ["lacks tensors", f"found: {WQKV}"],
    ),
    "a tensor is surplus": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))),
        ".",
        ["has unknown tensors", "found: extra"],
    ),
    "a tensor is too small": (
        lambda f: edit_weights(f, lambda w: w.update({WQKV: torch.ones(100, 64)})),
        ".",
        [f"'{WQKV}' has the wrong shape", "expected: (128, 64)", "found: (100, 64)"],
    ),
    # As many numbers, lying otherwise: nothing may be reshaped to fit.
    "a tensor is transposed": (
        lambda f: edit_weights(f, lambda w: w.update({WQKV: torch.ones(64, 128)})),
        ".",
        [f"'{WQKV}' has the wrong shape", "found: (64, 128)"],
    ),
    "a shard is missing": (
        lambda f: (f / shard(f)[WQKV]).unlink(),
        "model-00",
        ["A shard of the weights is missing"],
    ),
    "a shard lacks a tensor": (
        _lose_a_tensor_of_a_shard,
        "model-00",
        ["promises 'mlp1.1.weight'"],
    ),
    "weights cut short": (lambda f: cut(f / WEIGHTS), WEIGHTS, ["damaged", "bytes"]),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS, ["damaged", "0 bytes"]),
    "weights an LFS pointer": (
        lambda f: (f / WEIGHTS).write_text(LFS_POINTER),
        WEIGHTS,
        ["damaged", f"{len(LFS_POINTER)} bytes", "Git LFS"],
    ),
    "weights missing": (
        lambda f: (f / WEIGHTS).unlink(),
        ".",
        ["has no weights", WEIGHTS, "pytorch_model.bin"],
    ),
    "pickle an LFS pointer": (
        lambda f: as_bin(f, LFS_POINTER.encode()),
        "pytorch_model.bin",
        ["damaged", f"{len(LFS_POINTER)} bytes", "Git LFS"],
    ),
    "pickle cut short": (
        lambda f: as_bin(f, b"PK\x03\x04"),
        "pytorch_model.bin",
        ["damaged", "4 bytes"],
    ),
    "index cut short": (lambda f: damage_index(f, '{"weight'), INDEX, ["not valid JSON"]),
    "index of another kind": (lambda f: damage_index(f, "{}"), INDEX, ["weight_map"]),
    "config cut short": (lambda f: cut(f / "config.json"), "config.json", ["not valid JSON"]),
    "config missing": (lambda f: (f / "config.json").unlink(), ".", ["lacks config.json"]),
    "tokenizer config cut short": (
        lambda f: cut(f / "tokenizer_config.json"),
        "tokenizer_config.json",
        ["not valid JSON"],
    ),
    "tokenizer config missing": (
        lambda f: (f / "tokenizer_config.json").unlink(),
        ".",
        ["lacks tokenizer_config.json"],
    ),
    "tokenizer an LFS pointer": (
        lambda f: (f / "tokenizer.model").write_text(LFS_POINTER),
        "tokenizer.model",
        ["not a sentencepiece model", "Git LFS"],
    ),
    "tokenizer missing": (
        lambda f: (f / "tokenizer.model").unlink(),
        ".",
        ["lacks tokenizer.model"],
    ),
    "tokenizer without image tokens": (
        _rename_the_image_token,
        "tokenizer_config.json",
        ["image tokens", "found: no <IMG_CONTEXT>"],
    ),
    "unknown language model": (
        lambda f: edit_json(f / "config.json", "llm_config", architectures=["Qwen3ForCausalLM"]),
        "config.json",
        ["'Qwen3ForCausalLM' is unknown", "did you mean 'Qwen2ForCausalLM'"],
    ),
    "pixel shuffle of version 1": (
        lambda f: edit_json(f / "config.json", ps_version="v1"),
        "config.json",
        ["transposed order", "found: v1"],
    ),
    "unknown template": (
        lambda f: edit_json(f / "config.json", template="internlm2-chat-v9"),
        "config.json",
        ["template 'internlm2-chat-v9' is unknown", "'internlm2-chat'"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_out_of_order_is_one_error_that_names_file_and_tensor(
    folder: Path, name: str
) -> None:
    damage, where, texts = DAMAGES[name]
    damage(folder)
    with pytest.raises(DeadpanError) as raised:
        load(folder)
    named = Path(raised.value.where or "").relative_to(folder)
    # Which shard it is depends on the tensors' sizes.
    assert str(named) == where or (where == "model-00" and named.name.startswith(where))
    assert [text for text in texts if text not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"attention": "flesh"}, "The attention 'flesh' is unknown"),
        ({"dtype": "bfloat"}, "The type 'bfloat' is unknown"),
        ({"device": "gpu"}, "The device 'gpu' is unknown"),
        ({"device": "cuda:99"}, "There is no device 'cuda:99'"),
        ({"quantization": "int8"}, "The quantization 'int8' is unknown"),
        ({"base": "."}, "A base was given for a model that is not an adapter"),
    ],
)
def test_an_unknown_option_is_an_error_that_says_what_there_is(
    tiny: Path, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(DeadpanError) as raised:
        load(tiny, **options)
    assert raised.value.what.startswith(what)
    assert raised.value.fix


def test_flash_attention_without_a_gpu_points_to_sdpa(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeadpanError, match="needs a CUDA device") as raised:
        load(tiny, attention="flash")
    assert "--attention sdpa" in (raised.value.fix or "")


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_the_attention_asked_for_is_used_throughout_and_gives_the_same_logits(
    tiny: Path, whole: Loaded, attention: str
) -> None:
    loaded = load(tiny, attention=attention)
    expected = "eager" if attention == "eager" else "sdpa"
    inner = loaded.model.model
    for module in (loaded.model, inner.language_model, inner.vision_tower):
        assert module.config._attn_implementation == expected
    # Sums in another order: a few units in the last place of float32.
    torch.testing.assert_close(logits(loaded), logits(whole), atol=1e-4, rtol=0)
