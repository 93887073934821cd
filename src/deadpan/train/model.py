"""The model that a recipe trains: the base, quantised or not, with a fresh adapter."""

from pathlib import Path

import torch
from peft import PeftModel

from deadpan import nano
from deadpan.checkpoints.load import Progress, load_base
from deadpan.checkpoints.source import detect
from deadpan.config.schema import Recipe
from deadpan.models import lora
from deadpan.models.build import checkpoint_layers
from deadpan.processing.processor import Processor


def build(
    recipe: Recipe,
    folder: Path,
    processor: Processor,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> PeftModel:
    """Load the base and put a fresh adapter on it.

    Args:
        recipe: What to train.
        folder: Where the base is.
        processor: Its processor.
        device: Where to train.
        dtype: The type computed in.
        progress: Called with the number of tensors read and their total.

    Raises:
        DeadpanError: If the base or the adapter's settings are not in order.
    """
    plain = load_base(
        folder,
        detect(folder),
        processor,
        device,
        dtype,
        _attention(recipe),
        recipe.quantization,
        progress,
    )
    # A folder is recorded by its full path, so that the adapter finds it from anywhere; a Hub id stays one.
    local = recipe.model != nano.MODEL and Path(recipe.model).expanduser().is_dir()
    base = str(folder.resolve()) if local else recipe.model
    model = lora.attach(
        plain, base, train_projector=recipe.train_projector, **recipe.lora.model_dump()
    )
    if recipe.gradient_checkpointing:
        # The frozen vision tower keeps no activations; only the language model has something to recompute.
        checkpoint_layers(plain.model.language_model)
    return model.train()


def _attention(recipe: Recipe) -> str:
    """`auto` keeps the samples of packed rows apart without a mask, which takes time and memory."""
    auto = recipe.attention == "auto" and recipe.packing
    return "varlen" if auto else recipe.attention
