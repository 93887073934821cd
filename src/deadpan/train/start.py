"""What a run starts from: a whole model, and maybe an adapter, whose shape belongs into the recipe."""

import re
from pathlib import Path

from deadpan.checkpoints.source import Layout, detect, resolve
from deadpan.config.loader import inline_yaml
from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.models import lora
from deadpan.processing.processor import Processor, load_processor

_TARGETS = re.compile(r".*\.\(([\w|]+)\)")


def open_model(recipe: Recipe) -> tuple[Path, Processor]:
    """The folder of the model that the run starts from, and its processor; weights are not read yet.

    Raises:
        DeadpanError: If it is not there, or is an adapter.
    """
    folder = resolve(recipe.model)
    if detect(folder) is Layout.ADAPTER:
        raise DeadpanError(
            "Training starts from a whole model, and this is an adapter.",
            where=folder,
            fix="set model to its base and adapter to this folder, export it with --layout hf and "
            "train on that, or resume its run with --resume",
        )
    return folder, load_processor(folder, recipe.max_tiles, recipe.max_length)


def adapter_folder(recipe: Recipe) -> Path | None:
    """Where the adapter is that the run starts from.

    Raises:
        DeadpanError: If it is not there, is no adapter, or has another base than the recipe.
    """
    if recipe.adapter is None:
        return None
    folder = resolve(recipe.adapter)
    if detect(folder) is not Layout.ADAPTER:
        raise DeadpanError(
            "The recipe's adapter is a whole model.",
            where=folder,
            expected="a run folder, or a folder with adapter_config.json",
            fix=f"set model={recipe.adapter} and adapter=null",
        )
    base = str(lora.read_config(folder).get("base_model_name_or_path"))
    gone = Path(base).is_absolute() and not Path(base).is_dir()
    if not gone and resolve(base).resolve() != resolve(recipe.model).resolve():
        raise DeadpanError(
            "The adapter was trained on another model.",
            where=folder / "adapter_config.json",
            expected=f"model: {base}",
            found=f"model: {recipe.model}",
            fix=f"set model={base}",
        )
    return folder


def with_adapter(recipe: Recipe) -> Recipe:
    """A recipe with the shape of the adapter that it starts from, if it does.

    Raises:
        DeadpanError: As `adapter_folder`, or if the recipe itself says otherwise.
    """
    folder = adapter_folder(recipe)
    if folder is None:
        return recipe
    config = lora.read_config(folder)
    pattern = _TARGETS.fullmatch(str(config.get("target_modules")))
    if config.get("peft_type") != "LORA" or pattern is None:
        raise DeadpanError(
            "Training cannot start from this adapter.",
            where=folder / "adapter_config.json",
            expected="a LoRA on layers of the language model, as deadpan train writes it",
        )
    shape = {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": pattern.group(1).split("|"),
    }
    for key, value in shape.items():
        said = getattr(recipe.lora, key)
        if key in recipe.lora.model_fields_set and said not in (value, "all-linear"):
            raise DeadpanError(
                f"The adapter that training starts from has another lora.{key}.",
                where=folder / "adapter_config.json",
                expected=inline_yaml(value),
                found=inline_yaml(said),
                fix=f"leave out lora.{key}",
            )
    return recipe.model_copy(
        update={
            "lora": recipe.lora.model_copy(update=shape),
            "train_projector": bool(config.get("modules_to_save")),
        }
    )
