"""Who is compared: a label, a model, and what its run says of how it was made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deadpan import nano
from deadpan.checkpoints.load import base_of
from deadpan.checkpoints.source import Layout, detect, resolve
from deadpan.config.loader import load_recipe
from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.report import curves
from deadpan.report.words import Bilingual
from deadpan.train.optimizers import learning_rate
from deadpan.train.run_folder import run_of
from deadpan.train.split import learned

_T = TypeVar("_T")


@dataclass(frozen=True)
class Teller:
    """What is known of a teller before it is loaded.

    Attributes:
        label: What to call it.
        folder: The checkpoint's folder.
        facts: What to know of it, by a word for what it is.
        tuned: Whether a run is known to have made it.
        learned: The answers that it was trained on; None if its run does not tell.
        curve: The losses of its run, if there are any.
        notes: What its run should tell and does not, and why.
    """

    label: str
    folder: Path
    facts: Mapping[str, str]
    tuned: bool = False
    learned: Sequence[str] | None = None
    curve: curves.Curve | None = None
    notes: Sequence[Bilingual] = ()


def tellers(named: Sequence[str]) -> list[Teller]:
    """Find tellers, and all that is known of them.

    Args:
        named: Models, or `LABEL=MODEL`.

    Raises:
        DeadpanError: If there is no such model, or two have the same label.
    """
    pairs = [_label(name) for name in named]
    labels = [label for label, _ in pairs]
    for position, (label, model) in enumerate(pairs):
        if label in labels[:position]:
            raise DeadpanError(
                f"Two tellers are called {label!r}.",
                found=f"{pairs[labels.index(label)][1]} and {model}",
                fix=f"give one another name: NAME={model}",
            )
    return [about(label, model) for label, model in pairs]


def about(label: str, model: str | Path, run: Path | None = None) -> Teller:
    """What is known of a model: its base, its run, what it was trained on.

    A run whose records have moved, or whose recipe another version wrote, is still a teller.

    Args:
        label: What to call it.
        model: A folder in any layout, a run folder, a Hub id, or `nano`.
        run: The run that it comes from; by default the one that it tells of.

    Raises:
        DeadpanError: If there is no such model.
    """
    folder = resolve(model)
    facts = {"model": str(model)}
    if detect(folder) is Layout.ADAPTER:
        facts["base"] = _called(base_of(folder, None))
    run = run or run_of(folder)
    if run is None:
        return Teller(label, folder, facts)
    facts["run"] = run.name
    if folder.parent.name == "checkpoints":
        facts["checkpoint"] = folder.name
    notes: list[Bilingual] = []
    recipe = _tried(
        lambda: load_recipe(run / "recipe.yaml"),
        Bilingual(f"{label}: its recipe cannot be read", f"{label}：读不出它的配方"),
        notes,
    )
    answers = None
    if recipe is not None:
        facts |= _training(recipe)
        answers = _tried(
            lambda: learned(run),
            Bilingual(
                f"{label}: training answers are not marked, for what it was trained on cannot be read",
                f"{label}：读不出训练数据，所以没有标出训练集原句",
            ),
            notes,
        )
    curve = _tried(
        lambda: curves.read(run),
        Bilingual(f"{label}: its loss curve cannot be drawn", f"{label}：画不出 loss 曲线"),
        notes,
    )
    return Teller(label, folder, facts, True, answers, curve, notes)


def _label(named: str) -> tuple[str, str]:
    """The label and the model of an argument; a folder that exists may have = in its name."""
    label, equals, model = named.partition("=")
    if equals and not Path(named).expanduser().exists():
        if not (label.strip() and model):
            raise DeadpanError(
                "The teller has no name or no model.", expected="NAME=MODEL", found=named
            )
        return label.strip(), model
    path = Path(named).absolute() if named in (".", "..") else Path(named)
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}/{path.name}", named
    if path.name in ("best", "latest"):
        return f"{path.parent.name}/{path.name}", named
    return path.name, named


def _tried(make: Callable[[], _T], trouble: Bilingual, notes: list[Bilingual]) -> _T | None:
    """A value; or None, and a note that says why there is none."""
    try:
        return make()
    except DeadpanError as error:
        notes.append(with_error(trouble, error))
        return None


def with_error(trouble: Bilingual, error: DeadpanError) -> Bilingual:
    """What an error has led to, and the error in a line, which is in English as all errors are."""
    found = [text for label, text in error.details() if label in ("where", "found")]
    told = " ".join([error.what, *(f"({text})" for text in found)])
    return Bilingual(f"{trouble.en}: {told}", f"{trouble.zh}：{told}")


def _training(recipe: Recipe) -> dict[str, str]:
    quantized = "" if recipe.quantization == "none" else f", on {recipe.quantization.upper()}"
    length = {"epochs": f"{recipe.epochs:g}"}
    if recipe.max_steps is not None:
        length = {"steps": str(recipe.max_steps)}
    objective = {} if recipe.objective == "sft" else {"objective": recipe.objective}
    return {
        **objective,
        "optimizer": f"{recipe.optimizer.name}, lr {learning_rate(recipe.optimizer):g}",
        "adapter": f"LoRA r {recipe.lora.r}, alpha {recipe.lora.lora_alpha:g}{quantized}",
        "samples a step": str(recipe.effective_batch_size),
        **length,
        "seed": str(recipe.seed),
        "trained on": str(recipe.data.train),
    }


def _called(folder: Path) -> str:
    """A base model for people: nano, a model of the Hub, or its folder's name."""
    if folder == nano.BASE:
        return nano.MODEL
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name
