"""Write a model for other tools, and prove that it is the model that was trained.

An export is written to a temporary folder, reloaded in a fresh process, compared on a probe with the
model it was made from, and only then given its name. If anything differs by more than rounding
explains, nothing is left behind.

Both sides of the comparison compute in float32, whatever type the weights are stored in, so that what
is left is the rounding of the merged weights alone. How much that changes depends on the model, so the
model itself is asked: its weights are moved once more, at random, as far as rounding may move them, and
the export may differ from its source by no more than three times what that changes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deadpan.checkpoints import keys, probe
from deadpan.checkpoints.files import WeightFiles, temporary_beside, write_weights
from deadpan.checkpoints.load import DTYPES, Loaded, Progress, base_of, choose_device, load
from deadpan.checkpoints.official_config import language_model_name, to_transformers
from deadpan.checkpoints.processor_files import (
    hf_image_processor,
    save_generation_config,
    save_tokenizer,
    write_json,
)
from deadpan.checkpoints.source import Layout, detect, resolve
from deadpan.data.records import IMAGE_TAG
from deadpan.environment import installed
from deadpan.errors import DeadpanError, did_you_mean
from deadpan.models import lora
from deadpan.models.answer_loss import plain_model
from deadpan.models.rounding import stochastic
from deadpan.processing.processor import POLICY_FILE, Processor
from deadpan.processing.template import IMAGE_TOKEN
from deadpan.processing.tokenizer import read_json

_STORED_TYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_ROUNDING = 3
"""How many times what rounding at random changes; stochastic rounding's spread is up to 1.7 times that
of the even one that it is measured with."""

_ARITHMETIC = 1e-3
"""What float32 arithmetic in another order may change, in standard deviations of the logits."""

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth")


def export(
    source: str | Path,
    out: Path,
    layout: str,
    *,
    dtype: str = "stored",
    device: str = "auto",
    base: str | Path | None = None,
    merge_into: str = "original",
    official_files: Path | None = None,
    limit: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a run, a checkpoint or a model.

    Args:
        source: A run folder, a checkpoint folder in any layout, or a Hub id.
        out: The folder to write; it must not exist.
        layout: hf, official or adapter.
        dtype: stored (as the base model's files), bf16, fp16 or fp32.
        device: Where to merge and compare: auto, cpu, cuda or cuda:N.
        base: For an adapter: where its base model is now, if not where it was.
        merge_into: For an adapter trained on a quantised base: original merges it into the base's own
            weights; trained into what the quantised ones stood for, which is the model as it was in
            training.
        official_files: For the official layout from a base in the Hugging Face layout: a folder with the official
            config.json, tokenizer and Python files.
        limit: The largest difference of two logits to accept; by default what rounding explains.
        progress: Called with the number of tensors read and their total.

    Returns:
        What `export.json` holds.

    Raises:
        DeadpanError: If something is missing, or the reloaded export differs from its source by more than the limit.
    """
    folder = resolve(source)
    base_folder = folder
    if detect(folder) is Layout.ADAPTER:
        base_folder = base_of(folder, base)
    quantization = _trained_on(folder)
    stored = _STORED_TYPES.get(WeightFiles(base_folder).stored_type())
    dtype = _known(stored, base_folder) if dtype == "stored" else dtype
    _check_request(folder, out, layout, dtype, merge_into, quantization)
    device = _roomy_device(device, base_folder, dtype)
    loaded = load(
        folder,
        device=device,
        dtype="fp32",
        base=base,
        quantization=quantization if merge_into == "trained" else "none",
        progress=progress,
    )
    with temporary_beside(out, "export") as temporary:
        _write(loaded, temporary, Layout(layout), DTYPES[dtype], official_files)
        reference = probe.run(loaded.model, loaded.processor)
        del loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        merged = base_folder != folder and layout != Layout.ADAPTER
        rounded = "all" if dtype != stored else "linear" if merged else "none"
        reloaded = _in_fresh_process(temporary, device, rounded, DTYPES[dtype])
        report = _judge(reference, reloaded, limit)
        report |= {
            "source": str(folder),
            "base": str(base_folder),
            "merged_into": merge_into,
            "layout": layout,
            "dtype": dtype,
            "as_trained": None,
        }
        if quantization != "none" and merge_into == "original":
            trained = load(
                folder, device=device, dtype="fp32", base=base, quantization=quantization
            )
            logits = probe.run(trained.model, trained.processor)["logits"]
            figures = _figures(logits, reloaded["logits"])
            report["as_trained"] = {"quantization": quantization, **figures}
        write_json(temporary / "export.json", report)
        temporary.rename(out)
    return report


def _check_request(
    folder: Path, out: Path, layout: str, dtype: str, merge_into: str, quantization: str
) -> None:
    """Refuse, before anything is loaded, what cannot be done."""
    for what, value, known in (
        ("layout", layout, list(Layout)),
        ("type", dtype, list(DTYPES)),
        ("choice of --merge-into", merge_into, ["original", "trained"]),
    ):
        if value not in known:
            raise DeadpanError(f"The {what} {value!r} is unknown.", fix=did_you_mean(value, known))
    if out.exists():
        raise DeadpanError(
            "The folder to export to exists already.", where=out, fix="choose another name"
        )
    if merge_into == "trained" and (quantization == "none" or layout == Layout.ADAPTER):
        raise DeadpanError(
            "There are no quantised weights to merge into.",
            where=folder,
            expected="an adapter trained on a quantised base, and the layout hf or official",
            fix="leave out --merge-into",
        )


def _known(stored: str | None, folder: Path) -> str:
    if stored is None:
        raise DeadpanError(
            "The checkpoint's weights are of an unknown type.",
            where=folder,
            expected=", ".join(_STORED_TYPES),
            fix="choose the type to export in with --dtype",
        )
    return stored


def _write(
    loaded: Loaded,
    folder: Path,
    layout: Layout,
    dtype: torch.dtype,
    official_files: Path | None,
) -> None:
    if layout is Layout.ADAPTER:
        if loaded.folder == loaded.base:
            raise DeadpanError(
                "A whole model has no adapter to export.",
                where=loaded.folder,
                fix="use --layout hf",
            )
        for name in ("adapter_config.json", lora.ADAPTER_FILE, POLICY_FILE):
            shutil.copyfile(loaded.folder / name, folder / name)
        save_tokenizer(loaded.processor, folder, IMAGE_TAG)
        save_generation_config(loaded.processor, folder)
        return
    plain = plain_model(loaded.model)
    if loaded.folder != loaded.base:
        state = {name: t.to(dtype) for name, t in lora.base_parameters(loaded.model).items()}
        for name, tensor in lora.merged(loaded.model).items():
            # A seed of the name's: small ones may be those that the weights were drawn with.
            state[name] = stochastic(tensor, dtype, seed=zlib.crc32(name.encode()))
    else:
        state = {name: parameter.data.to(dtype) for name, parameter in plain.named_parameters()}
    if plain.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if layout is Layout.HF:
        _write_hf(plain, state, loaded.processor, folder)
    else:
        _write_official(plain, state, loaded, folder, official_files)


def _write_hf(
    model: InternVLForConditionalGeneration,
    state: dict[str, torch.Tensor],
    processor: Processor,
    folder: Path,
) -> None:
    dtype = next(iter(state.values())).dtype
    model.config.architectures = ["InternVLForConditionalGeneration"]
    # LMDeploy finds the language model's code by this name.
    text = model.config.text_config
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    config = model.config.to_dict()
    for key in ("_name_or_path", "_attn_implementation_autoset", "quantization_config"):
        config.pop(key, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    write_weights(((keys.hf_name(name), tensor) for name, tensor in state.items()), folder)
    save_tokenizer(processor, folder, IMAGE_TOKEN)
    write_json(folder / POLICY_FILE, processor.policy())
    save_generation_config(processor, folder)
    images = hf_image_processor(processor)
    # Two files with the same content: older readers look for preprocessor_config.json, newer ones for the other.
    write_json(
        folder / "preprocessor_config.json", {**images, "processor_class": "InternVLProcessor"}
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "InternVLProcessor",
            "image_seq_length": processor.tile_policy.tokens_per_tile,
            "image_processor": images,
        },
    )


def _write_official(
    model: InternVLForConditionalGeneration,
    state: dict[str, torch.Tensor],
    loaded: Loaded,
    folder: Path,
    official_files: Path | None,
) -> None:
    files = official_files or loaded.base
    if detect(files) is not Layout.OFFICIAL:
        raise DeadpanError(
            "The official layout takes its config, tokenizer and Python files from an official checkpoint.",
            where=files,
            found="a folder in the Hugging Face layout",
            fix="pass --official-files with a folder that holds them (weights are not needed), or use --layout hf",
        )
    for path in files.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(path, folder / path.name)
    processor, policy = loaded.processor, loaded.processor.tile_policy
    config = read_json(folder / "config.json")
    language_model = language_model_name(config, files / "config.json")
    # Fails here, with the file's name, if these files describe another architecture.
    has_head = "lm_head.weight" in state
    expected = to_transformers(config, model.config.image_token_id, has_head, files / "config.json")
    theirs, ours = (
        {**text.to_diff_dict(), "architectures": None}
        for text in (expected.text_config, model.config.text_config)
    )
    if theirs != ours:
        raise DeadpanError(
            "The official files describe another language model.",
            where=files / "config.json",
            fix="take them from the checkpoint that this model descends from",
        )
    config.update(
        template=processor.template.name,
        min_dynamic_patch=policy.min_tiles,
        max_dynamic_patch=policy.max_tiles,
        use_thumbnail=policy.thumbnail,
        torch_dtype=str(next(iter(state.values())).dtype).removeprefix("torch."),
    )
    write_json(folder / "config.json", config)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    tokenizer_config["chat_template"] = processor.template.jinja(IMAGE_TAG)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    save_generation_config(processor, folder)
    write_json(folder / POLICY_FILE, processor.policy())
    entries = keys.official_entries(model.config, state, language_model)
    write_weights(
        ((entry.source, entry.join([state[name] for name in entry.targets])) for entry in entries),
        folder,
    )


def _roomy_device(device: str, base: Path, dtype: str) -> str:
    """The device to compare on: a GPU only if the model fits on it in float32."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        stored = sum(path.stat().st_size for path in base.iterdir() if path.is_file())
        needed = stored * 4 / DTYPES[dtype].itemsize * 1.5
        if needed > torch.cuda.mem_get_info(chosen)[0]:
            return "cpu"
    return str(chosen)


def _in_fresh_process(
    folder: Path, device: str, rounded: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "probe.safetensors"
        command = [sys.executable, "-m", "deadpan.checkpoints.probe"]
        command += [str(folder), str(result), device, rounded, str(dtype).removeprefix("torch.")]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        if done.returncode != 0:
            raise DeadpanError(
                "The export could not be reloaded, so it was removed.",
                where=folder,
                found=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message",
            )
        return load_file(result)


def _judge(
    reference: dict[str, torch.Tensor],
    reloaded: dict[str, torch.Tensor],
    limit: float | None,
) -> dict[str, Any]:
    for name in ("input_ids", "pixel_values"):
        if not torch.equal(reference[name], reloaded[name]):
            raise DeadpanError(
                f"The export makes other {name} of the same conversation, so it was removed.",
                fix="this is a bug in deadpan; please report it with the checkpoint's name",
            )
    figures = _figures(reference["logits"], reloaded["logits"])
    rounding = 0.0
    if "jiggled_logits" in reloaded:
        jiggled = _figures(reloaded["logits"], reloaded["jiggled_logits"])
        rounding = jiggled["max_logit_difference"]
    if limit is None:
        limit = _ROUNDING * rounding + _ARITHMETIC * figures["logit_spread"]
    if not figures["max_logit_difference"] <= limit:
        raise DeadpanError(
            "The reloaded export differs from the model it was made from, so it was removed.",
            expected=f"logits within {limit:.3g}",
            found=f"a difference of {figures['max_logit_difference']:.3g}, "
            f"the same likeliest token at {figures['same_argmax']:.1%} of positions",
            fix="accept the difference with --limit if you know its cause; otherwise this is a bug in "
            "deadpan: please report it with the checkpoint's name",
        )
    return {"deadpan": installed("deadpan"), "limit": limit, "rounding_alone": rounding, **figures}


def _figures(reference: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    difference = probe.compare(reference, other)
    return {
        "max_logit_difference": difference.maximum,
        "logit_spread": difference.spread,
        "same_argmax": difference.same_argmax,
        "kl_divergence": difference.kl,
    }


def _trained_on(folder: Path) -> str:
    """How the base was quantised in the training that made an adapter folder."""
    path = folder / POLICY_FILE
    if detect(folder) is not Layout.ADAPTER or not path.exists():
        return "none"
    return read_json(path).get("trained_on", "none")
