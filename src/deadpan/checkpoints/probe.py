"""One fixed conversation, to tell whether two models are the same.

Run as a module, it loads a folder in a fresh process and writes its logits; an export in the
Hugging Face layout is then loaded by transformers itself rather than by deadpan, so that the
weights proved are those that other tools will see.
"""

import sys
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from deadpan.checkpoints.load import choose_device, load
from deadpan.checkpoints.source import Layout, detect
from deadpan.data.records import Turn
from deadpan.models.answer_loss import plain_model
from deadpan.processing.processor import Processor, load_processor

_TURNS = (
    Turn("human", "<image>\n请你根据这张图片，讲一个脑洞大开的梗"),
    Turn("gpt", "它看起来很冷静，其实是还没加载完。"),
    Turn("human", "Why is it funny?"),
    Turn("gpt", "Because the loading bar never moves."),
)
_POSITIONS = 48


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are from each other.

    Attributes:
        maximum: The largest absolute difference of two logits.
        spread: The standard deviation of the reference's logits, which gives the differences their scale.
        same_argmax: The share of positions with the same likeliest token.
        kl: The mean Kullback-Leibler divergence over positions, in nats.
    """

    maximum: float
    spread: float
    same_argmax: float
    kl: float


def picture() -> Image.Image:
    """A picture with structure at every scale, the same on every machine."""
    noise = torch.rand((3, 40, 60), generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(noise[None], size=(320, 480), mode="nearest")[0]
    return Image.fromarray((smooth * 255).to(torch.uint8).permute(1, 2, 0).numpy())


def run(model: Any, processor: Processor) -> dict[str, torch.Tensor]:
    """The probe's input_ids, pixel_values and the logits of its last positions, on the CPU.

    Returns:
        input_ids (token,), pixel_values (tile, 3, tile_size, tile_size) and float32 logits (position, vocabulary).
    """
    # A few tiles say as much as a dozen, and are quicker on a CPU.
    small = copy(processor)
    policy = processor.tile_policy
    small.tile_policy = replace(policy, max_tiles=min(2, policy.max_tiles))
    inputs = small([picture()], _TURNS)
    device = plain_model(model).lm_head.weight.device
    with torch.inference_mode():
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        logits = model.eval()(**on_device, logits_to_keep=_POSITIONS).logits[0].float().cpu()
    return {
        "input_ids": inputs["input_ids"][0],
        "pixel_values": inputs["pixel_values"],
        "logits": logits,
    }


def compare(reference: torch.Tensor, other: torch.Tensor) -> Difference:
    """Compare logits of shape (position, vocabulary)."""
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    return Difference(
        maximum=(reference - other).abs().max().item(),
        spread=reference.std().item(),
        same_argmax=(reference.argmax(-1) == other.argmax(-1)).float().mean().item(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
    )


@torch.no_grad()
def jiggle(model: Any, which: str, dtype: torch.dtype) -> None:
    """Move weights as far as rounding to a type may move them.

    A weight w lies between two numbers of the type that are ulp(w) apart, so rounding moves it by an
    amount spread evenly over half of that to either side.

    Args:
        model: A plain model in float32.
        which: `all` weights, or `linear`: those of the language model's linear layers.
        dtype: The type rounded to.
    """
    if which == "all":
        weights = list(model.parameters())
    else:
        layers = plain_model(model).model.language_model.layers
        weights = [m.weight for m in layers.modules() if isinstance(m, nn.Linear)]
    for number, weight in enumerate(weights):
        generator = torch.Generator(weight.device).manual_seed(number)
        noise = torch.rand(weight.shape, generator=generator, device=weight.device) - 0.5
        exponent = torch.frexp(weight).exponent  # |w| = m * 2 ** exponent with 0.5 <= m < 1
        weight += noise * torch.finfo(dtype).eps * torch.exp2(exponent.float() - 1)


def main(folder: Path, out: Path, device: str, rounded: str, dtype: str) -> None:
    """Load a folder in float32 and write the probe's result.

    Args:
        folder: The checkpoint folder.
        out: The safetensors file to write.
        device: Where to compute.
        rounded: Which weights were rounded on the way: none, linear (the language model's) or all. If
            any were, the result also has `jiggled_logits`, those of the model rounded anew.
        dtype: What they were rounded to.
    """
    if detect(folder) is Layout.HF:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).to(choose_device(device))
        processor = load_processor(folder)
    else:
        loaded = load(folder, device=device, dtype="fp32")
        model, processor = loaded.model, loaded.processor
    result = run(model, processor)
    if rounded != "none":
        jiggle(model, rounded, getattr(torch, dtype))
        result["jiggled_logits"] = run(model, processor)["logits"]
    save_file(result, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
