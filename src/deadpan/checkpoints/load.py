"""Load a checkpoint, in whatever layout, onto transformers' own classes. No remote code, ever."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

from deadpan.checkpoints import keys
from deadpan.checkpoints.files import WeightFiles
from deadpan.checkpoints.official_config import language_model_name, to_transformers
from deadpan.checkpoints.source import Layout, detect, resolve
from deadpan.environment import best_device, computes_bf16
from deadpan.errors import DeadpanError, did_you_mean
from deadpan.models import lora
from deadpan.models.build import build_empty, put_parameter
from deadpan.models.frozen import rounded
from deadpan.processing.processor import Processor, load_processor
from deadpan.processing.template import IMAGE_TOKEN
from deadpan.processing.tokenizer import read_json

Progress = Callable[[int, int], None]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZATIONS = ("none", "nf4", "fp8")
_LAYERS = "model.language_model.layers."

_IGNORED = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints saved and that are computed from the configuration."""


@dataclass
class Loaded:
    """A model in memory.

    Attributes:
        model: `InternVLForConditionalGeneration`, or a `PeftModel` of it if an adapter was loaded.
        processor: Makes its inputs.
        folder: Where the weights came from.
        base: Where the base model's weights came from; the same as folder without an adapter.
    """

    model: Any
    processor: Processor
    folder: Path
    base: Path


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, or else the CPU.

    Raises:
        DeadpanError: If the device does not exist here.
    """
    if device == "auto":
        return torch.device(best_device())
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise DeadpanError(
            f"The device {device!r} is unknown.", fix="use auto, cpu, cuda or cuda:1"
        ) from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise DeadpanError(
            f"There is no device {device!r}.",
            found=f"{torch.cuda.device_count()} CUDA devices",
            fix="run deadpan doctor to see what is there",
        )
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a CUDA device that computes in it, float32 elsewhere.

    Raises:
        DeadpanError: If the type is unknown.
    """
    if dtype == "auto":
        native = device.type == "cuda" and computes_bf16("cuda")
        return torch.bfloat16 if native else torch.float32
    if dtype not in DTYPES:
        raise DeadpanError(
            f"The type {dtype!r} is unknown.", fix=did_you_mean(dtype, ["auto", *DTYPES])
        )
    return DTYPES[dtype]


def base_of(folder: Path, base: str | Path | None) -> Path:
    """The folder of the model that an adapter sits on: the given one, or the one that it points to."""
    return resolve(base if base is not None else lora.base_of(folder))


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    quantization: str = "none",
    max_tiles: int | None = None,
    max_length: int = 8192,
    base: str | Path | None = None,
    trainable: bool = False,
    progress: Progress | None = None,
) -> Loaded:
    """Load a model and its processor.

    Args:
        model: A folder in any layout, a run folder, or a Hub id.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, bf16, fp16 or fp32: the type of the weights in memory.
        attention: auto, eager, sdpa, flash or varlen.
        quantization: none, nf4 or fp8, for the language model's linear layers; fp8 rounds their weights
            as training in FP8 does, and multiplies as without.
        max_tiles: Overrides the checkpoint's own tile limit.
        max_length: The most tokens a sample may have.
        base: For an adapter: where its base model is now, if not where it was.
        trainable: For an adapter: whether its weights may be trained on.
        progress: Called with the number of tensors read and their total.

    Raises:
        DeadpanError: If anything is missing, surplus, misshapen or unknown.
    """
    if quantization not in QUANTIZATIONS:
        raise DeadpanError(
            f"The quantization {quantization!r} is unknown.",
            fix=did_you_mean(quantization, QUANTIZATIONS),
        )
    folder = resolve(model)
    chosen = choose_device(device)
    weight_type = choose_dtype(dtype, chosen)
    layout = detect(folder)
    base_folder = folder
    if layout is Layout.ADAPTER:
        base_folder = base_of(folder, base)
        layout = detect(base_folder)
        if layout is Layout.ADAPTER:
            raise DeadpanError(
                "An adapter's base must be a whole model.",
                where=base_folder,
                found="another adapter",
            )
    elif base is not None:
        raise DeadpanError(
            "A base was given for a model that is not an adapter.",
            where=folder,
            fix="leave out --base",
        )
    processor = load_processor(folder, max_tiles, max_length)
    module: Any = load_base(
        base_folder, layout, processor, chosen, weight_type, attention, quantization, progress
    )
    if base_folder != folder:
        module = lora.load(module, folder, trainable)
    return Loaded(module, processor, folder, base_folder)


def load_base(
    folder: Path,
    layout: Layout,
    processor: Processor,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "auto",
    quantization: str = "none",
    progress: Progress | None = None,
) -> InternVLForConditionalGeneration:
    """Load a whole model, without adapter, all parameters frozen."""
    files = WeightFiles(folder)
    config = read_config(folder, layout, processor, files)
    model = build_empty(config, attention)
    if attention == "flash" and dtype is torch.float32:
        raise DeadpanError(
            "Flash attention computes in 16 bits only.",
            found="float32",
            fix="use dtype bf16, or attention sdpa",
        )
    entries = entries_of(model, folder, layout)
    _check_names(files, entries)
    if quantization == "nf4":
        from deadpan.models import nf4

        nf4.prepare(model.model.language_model, dtype)
        model.is_loaded_in_4bit = True  # what PEFT looks for
    for done, entry in enumerate(entries, start=1):
        tensor = files.read(entry.source)
        shapes = [model.get_parameter(target).shape for target in entry.targets]
        expected = entry.shape(shapes)
        if tensor.shape != expected:
            raise DeadpanError(
                f"The tensor {entry.source!r} has the wrong shape.",
                where=folder,
                expected=str(tuple(expected)),
                found=str(tuple(tensor.shape)),
                fix="config.json and the weights do not belong together; download both again",
            )
        for target, part in zip(entry.targets, entry.split(tensor, shapes), strict=True):
            # contiguous: a part of a fused tensor would keep the whole of it alive
            value = part.contiguous().to(device, dtype)
            if quantization == "fp8" and target.startswith(_LAYERS) and value.ndim == 2:
                value = rounded(value)
            put_parameter(model, target, value)
        if progress is not None:
            progress(done, len(entries))
    if config.tie_word_embeddings:
        model.tie_weights()
    model.to(device).eval()  # the buffers; layers put in later are born in training mode
    model.name_or_path = str(folder)
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.stop_id,
        pad_token_id=processor.pad_id,
    )
    return model


def read_config(
    folder: Path, layout: Layout, processor: Processor, files: WeightFiles
) -> InternVLConfig:
    """The transformers configuration of a checkpoint folder."""
    path = folder / "config.json"
    if layout is Layout.OFFICIAL:
        image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        heads = {"language_model.output.weight", "language_model.lm_head.weight"}
        return to_transformers(read_json(path), image_token_id, bool(heads & files.names), path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise DeadpanError(f"The configuration cannot be read: {error}", where=path) from None


def entries_of(
    model: InternVLForConditionalGeneration, folder: Path, layout: Layout
) -> list[keys.Entry]:
    """How the folder's tensors hold the model's parameters."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    parameters = [name for name, _ in model.named_parameters() if name not in tied]
    if layout is Layout.OFFICIAL:
        path = folder / "config.json"
        name = language_model_name(read_json(path), path)
        return keys.official_entries(model.config, parameters, name)
    return keys.hf_entries(parameters)


def _check_names(files: WeightFiles, entries: list[keys.Entry]) -> None:
    expected = {entry.source for entry in entries}
    found = {key for key in files.names if not key.endswith(_IGNORED)}
    for what, names in (("lacks", expected - found), ("has unknown", found - expected)):
        if names:
            first = sorted(names)[:5]
            more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
            raise DeadpanError(
                f"The checkpoint {what} tensors.",
                where=files.folder,
                found=", ".join(first) + more,
                fix="config.json and the weights do not belong together; download both again",
            )
