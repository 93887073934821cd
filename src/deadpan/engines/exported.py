"""What vLLM and LMDeploy are started with: an export, and what travels in it.

They load transformers' layout by themselves. Template, tile policy and stop token are read from the folder by
deadpan's own processor, so nothing is chosen by a folder's name or a flag.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from deadpan.checkpoints.load import DTYPES, base_of
from deadpan.checkpoints.source import Layout, detect, resolve
from deadpan.environment import best_device
from deadpan.errors import DeadpanError, did_you_mean
from deadpan.models import lora
from deadpan.processing.processor import Processor, load_processor
from deadpan.processing.tokenizer import read_json

ENGINES = ("builtin", "vllm", "lmdeploy")

_LONGEST_ANSWER = 2048


@dataclass(frozen=True)
class Export:
    """A model that an engine loads from its folder.

    Attributes:
        folder: Where it lies.
        processor: What makes its inputs.
        dtype: What it computes in.
        length: The most tokens of a prompt and its answer.
        memory: The share of the GPU's memory that it may take.
        adapter: Where the adapter lies that is put on the model while it answers, if there is one.
    """

    folder: Path
    processor: Processor
    dtype: torch.dtype
    length: int
    memory: float
    adapter: Path | None = None


def find_export(
    model: str | Path,
    engine: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    quantization: str = "none",
    max_tiles: int | None = None,
    base: str | Path | None = None,
    memory: float = 0.9,
) -> Export:
    """Find a model for vLLM or LMDeploy; the arguments are those of `deadpan.load`.

    Raises:
        DeadpanError: If it is none that they load, or is to be loaded in a way that is not theirs.
    """
    folder = resolve(model)
    layout = detect(folder)
    adapter = None
    if layout is Layout.ADAPTER and engine == "vllm":
        merging = f"merge the adapter, and load that: {_export(model, base)}"
        _check_adapter(folder, merging)
        adapter, folder, base = folder, base_of(folder, base), None
        if detect(folder) is not Layout.HF:
            raise DeadpanError(
                "vllm puts an adapter on a whole model in the layout hf.",
                where=adapter,
                found=f"its base {folder}",
                fix=f"write one, and name it: deadpan export {folder} base-hf --layout hf, and --base base-hf; "
                f"or {merging}",
            )
    elif layout is not Layout.HF:
        what = "an adapter" if layout is Layout.ADAPTER else "a model in the official layout"
        raise DeadpanError(
            f"{engine} loads whole models in the layout hf.",
            where=folder,
            found=what,
            fix=f"write one, and load that: {_export(model, base)}",
        )
    _check_options(engine, device, attention, quantization, base)
    types = ("auto", "bf16", "fp16") if engine == "lmdeploy" else ("auto", *DTYPES)
    if dtype not in types:
        raise DeadpanError(
            f"{engine} does not compute in {dtype!r}.", fix=did_you_mean(dtype, types)
        )
    if best_device() != "cuda":
        raise DeadpanError(
            f"{engine} needs an NVIDIA GPU, and PyTorch sees none here.",
            fix="deadpan doctor says what is there; --engine builtin runs on a CPU too",
        )
    text = read_json(folder / "config.json").get("text_config") or {}
    if engine == "lmdeploy" and not text.get("architectures"):
        raise DeadpanError(
            "The export does not name its language model's class, by which lmdeploy finds the code for it.",
            where=folder / "config.json",
            expected="text_config.architectures",
            fix=f"write it anew, and load that: {_export(model, base)}",
        )
    processor = load_processor(adapter or folder, max_tiles)
    positions = text.get("max_position_embeddings", 32768)
    return Export(
        folder,
        processor,
        # What the builtin engine computes in on a GPU.
        DTYPES["bf16" if dtype == "auto" else dtype],
        min(positions, processor.max_length + _LONGEST_ANSWER),
        memory,
        adapter,
    )


def _export(model: str | Path, base: str | Path | None) -> str:
    """The command that writes what the engines load."""
    moved = "" if base is None else f" --base {base}"
    return f"deadpan export {model}{moved} exported --layout hf"


def _check_adapter(folder: Path, merging: str) -> None:
    """Refuse an adapter that vLLM would put on a model only in part; `merging` is what to do instead."""
    if saved := lora.read_config(folder).get("modules_to_save"):
        raise DeadpanError(
            "vllm takes an adapter of the language model alone.",
            where=folder,
            found=f"{', '.join(saved)} trained whole beside it",
            fix=f"{merging}; or train with train_projector=false",
        )


def _check_options(
    engine: str, device: str, attention: str, quantization: str, base: str | Path | None
) -> None:
    """Refuse what only the builtin engine does."""
    for option, value, known in (
        ("--attention", attention, "auto"),
        ("--quantization", quantization, "none"),
        ("--base", base, None),
    ):
        if value != known:
            raise DeadpanError(
                f"{engine} does not take {option}.",
                found=str(value),
                fix=f"leave it out, or use --engine builtin with {option}",
            )
    if device not in ("auto", "cuda", "cuda:0"):
        raise DeadpanError(
            f"{engine} computes on the first GPU that it sees.",
            found=f"--device {device}",
            expected="auto or cuda",
            fix="show it one: CUDA_VISIBLE_DEVICES=1 deadpan ...",
        )
