"""LoRA adapters through PEFT: attach, save, load, merge.

A linear layer W gets a low-rank companion, y = Wx + (lora_alpha / r) B A x (Hu et al. 2021, arXiv 2106.09685). The
projector between vision tower and language model is small and trained whole; PEFT keeps it beside the adapter
(`modules_to_save`), so one adapter folder holds all that training changed, in PEFT's own format.

PEFT is imported where an adapter is at hand: with it comes bitsandbytes, and with that PyTorch's compiler, which takes
more than a second that a model without an adapter need not wait for.
"""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import InternVLForConditionalGeneration

from deadpan.errors import DeadpanError, did_you_mean
from deadpan.models import nf4
from deadpan.processing.tokenizer import read_json

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_FILE = "adapter_model.safetensors"
_LAYERS = "model.language_model.layers."
PROJECTOR = "multi_modal_projector"
HEAD = "lm_head"


def linear_names(model: nn.Module) -> list[str]:
    """The names of the linear layers within a decoder layer, such as `q_proj`."""
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        if name.startswith(_LAYERS) and isinstance(module, nn.Linear):
            names[name.rpartition(".")[2]] = None
    return list(names)


def attach(
    model: InternVLForConditionalGeneration,
    base: str,
    r: int,
    lora_alpha: int,
    lora_dropout: float,
    target_modules: str | list[str],
    train_projector: bool,
) -> "PeftModel":
    """Put a fresh adapter on a model; only the adapter and, if asked, the projector will be trainable.

    Trainable weights are float32 whatever the model's type: at a learning rate of 1e-5 an AdamW step is far below the
    spacing of bfloat16 numbers, and would be lost.

    Args:
        model: The base model.
        base: What the adapter records as its base: a folder or a Hub id.
        r: The rank.
        lora_alpha: The numerator of the scale.
        lora_dropout: Dropout on the adapter's input, in training.
        target_modules: `all-linear`, or names of linear layers in a decoder layer.
        train_projector: Whether the projector is trained too.

    Raises:
        DeadpanError: If a target does not exist.
    """
    from peft import LoraConfig

    known = linear_names(model)
    targets = known if target_modules == "all-linear" else target_modules
    if isinstance(targets, str):
        targets = [targets]
    for name in targets:
        if name not in known:
            raise DeadpanError(
                f"The model has no linear layer {name!r}.",
                where="lora.target_modules",
                fix=did_you_mean(name, [*known, "all-linear"]),
            )
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_pattern(targets),
        modules_to_save=[PROJECTOR] if train_projector else None,
        base_model_name_or_path=base,
    )
    model.name_or_path = base  # PEFT writes this down as the adapter's base
    peft_model = _wrap(model, config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def target_pattern(targets: Iterable[str], head: bool = False) -> str:
    """PEFT's regular expression for linear layers of the decoder, and for the output head if asked."""
    # The vision tower has layers of the same names, hence the whole path.
    pattern = rf"model\.language_model\.layers\.\d+\..*\.({'|'.join(targets)})"
    return rf"{pattern}|{HEAD}" if head else pattern


def _wrap(model: InternVLForConditionalGeneration, config: "LoraConfig") -> "PeftModel":
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks transformers about gradient checkpointing under a name that transformers has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def adapter_state(
    model: "PeftModel", whole: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> dict[str, torch.Tensor]:
    """All that training changes, under PEFT's names, on the CPU.

    Args:
        model: The model with its adapter.
        whole: Puts together a tensor of which this process has a part.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in state.items()}


def save(model: "PeftModel", folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, of a state if the model has not all of it."""
    state = adapter_state(model) if state is None else state
    write(model.peft_config["default"], state, folder)


def write(config: "LoraConfig", state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter's two files from its configuration and its tensors, under PEFT's names."""
    inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference
    path = folder / ADAPTER_FILE
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files that only their owner may read


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration."""
    return read_json(folder / "adapter_config.json")


def base_of(folder: Path) -> str:
    """The base model that an adapter folder points to.

    Raises:
        DeadpanError: If it does not say, or the folder it names is gone.
    """
    base = read_config(folder).get("base_model_name_or_path")
    if not base:
        raise DeadpanError(
            "The adapter does not say what its base model is.",
            where=folder,
            fix="pass --base MODEL",
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise DeadpanError(
            "The adapter's base model is gone.",
            where=folder / "adapter_config.json",
            expected=f"a folder {base}",
            fix="pass --base with its new place",
        )
    return base


def adapter_parameters(model: "PeftModel") -> list[nn.Parameter]:
    """The weights of the adapter and of the trained projector."""
    marks = (".lora_A.", ".lora_B.", f"{PROJECTOR}.modules_to_save.")
    return [p for name, p in model.named_parameters() if any(mark in name for mark in marks)]


def projector_parameters(model: "PeftModel") -> list[nn.Parameter]:
    """The weights of the trained projector, if it is trained."""
    mark = f"{PROJECTOR}.modules_to_save."
    return [p for name, p in model.named_parameters() if mark in name]


def load(model: InternVLForConditionalGeneration, folder: Path, trainable: bool) -> "PeftModel":
    """Put the adapter of a folder on its base model.

    For inference it takes the model's own type, in which training multiplied with it too; for
    training it stays float32.

    Raises:
        DeadpanError: If the adapter is not a LoRA, is damaged, or does not fit the model.
    """
    from peft import LoraConfig

    kind = read_config(folder).get("peft_type")
    if kind != "LORA":
        raise DeadpanError(
            "The adapter is not a LoRA.", where=folder, expected="LORA", found=str(kind)
        )
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    model.name_or_path = config.base_model_name_or_path
    peft_model = _wrap(model, config)
    load_state(peft_model, folder)
    dtype = torch.float32 if trainable else model.lm_head.weight.dtype
    for parameter in adapter_parameters(peft_model):
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(trainable)
    return peft_model.train(trainable)


def load_state(model: "PeftModel", folder: Path) -> None:
    """Fill an adapter with the weights of a folder.

    Raises:
        DeadpanError: If they are missing, damaged, or of another shape.
    """
    from peft import set_peft_model_state_dict

    path = folder / ADAPTER_FILE
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise DeadpanError("The adapter has no weights.", where=path) from None
    except SafetensorError as error:
        raise DeadpanError(f"The adapter is damaged: {error}.", where=path) from None
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    odd = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if odd:
        raise DeadpanError(
            "The adapter does not fit its base model.",
            where=path,
            expected=f"{odd[0]} of shape {expected.get(odd[0], 'nothing')}",
            found=f"{found.get(odd[0], 'nothing')}; {len(odd)} tensors differ",
            fix="pass --base with the model it was trained on",
        )
    set_peft_model_state_dict(model, state)


def base_parameters(model: "PeftModel") -> dict[str, torch.Tensor]:
    """The parameters of the base model without the adapter, under the plain model's names.

    Of an NF4 model these are the numbers that its 4-bit weights stand for.
    """
    state = {}
    for name, parameter in model.base_model.model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name or ".modules_to_save." in name:
            continue
        plain_name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        state[plain_name] = nf4.dequantised(parameter)
    return state


def merged(model: "PeftModel") -> dict[str, torch.Tensor]:
    """The parameters that training changed, with the adapter added in, in float32."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    changed = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            weight = nf4.dequantised(module.get_base_layer().weight)
            low, high = module.lora_A["default"].weight, module.lora_B["default"].weight
            delta = module.scaling["default"] * (high.float() @ low.float())
            changed[f"{name}.weight"] = weight.float() + delta
        elif isinstance(module, ModulesToSaveWrapper):
            for leaf, parameter in module.modules_to_save["default"].named_parameters():
                changed[f"{name}.{leaf}"] = parameter.data.float()
    return changed
