"""Adapters that say something, as a fresh one does not."""

from pathlib import Path

import torch
from peft import PeftModel

from deadpan.checkpoints.load import load
from deadpan.models import lora


def adapted(
    folder: Path,
    device: str = "cpu",
    dtype: str = "fp32",
    attention: str = "sdpa",
    r: int = 8,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    train_projector: bool = True,
) -> PeftModel:
    """The model of a folder with an adapter of its own, the same each time, in training mode."""
    model = load(folder, device=device, dtype=dtype, attention=attention).model
    torch.manual_seed(0)
    peft_model = lora.attach(model, str(folder), r, 2 * r, dropout, targets, train_projector)
    give_voice(peft_model)
    return peft_model.train()


def give_voice(model: PeftModel, std: float = 0.05) -> None:
    """Fill what is zero at first, and keeps a fresh adapter from changing anything."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=std)
