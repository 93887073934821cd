"""Which records are trained on, and which are held out to measure with."""

from collections.abc import Callable
from pathlib import Path

from deadpan.checkpoints.source import resolve
from deadpan.config.loader import load_recipe
from deadpan.config.schema import Recipe
from deadpan.data import preferences
from deadpan.data.records import Record
from deadpan.data.records import load as load_records
from deadpan.data.split import hold_out, refuse_shared
from deadpan.processing.processor import Processor, load_processor
from deadpan.train.run_folder import run_of
from deadpan.train.survey import Survey, survey


def read(recipe: Recipe, path: Path) -> list[Record]:
    """The records of a file, or for `objective: dpo` its preference pairs.

    Raises:
        DeadpanError: If they are not in order.
    """
    if recipe.objective == "dpo":
        return preferences.load(path, recipe.data.images)
    return load_records(path, recipe.data.images)


def split(
    recipe: Recipe,
    surveyed: Survey,
    processor: Processor,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Survey, list[Record]]:
    """Hold records out, as the recipe says.

    Args:
        recipe: Its `data.validation`, and its seed.
        surveyed: The records of `data.train`.
        processor: Counts the tokens of a validation file's records.
        progress: Called with the number of these looked at and their total.

    Returns:
        What is trained on, and the held-out records, which may be none.

    Raises:
        DeadpanError: If nothing can be held out, or the validation file is not in order or has
            pictures that are trained on.
    """
    validation = recipe.data.validation
    if validation is None:
        return surveyed, []
    if isinstance(validation, float):
        parts = hold_out(surveyed.records, validation, recipe.seed)
        return surveyed.only(parts.training), [surveyed.records[i] for i in parts.held_out]
    records = read(recipe, validation)
    held_out = survey(records, processor, recipe.data.overlong, progress).records
    refuse_shared(surveyed.records, held_out)
    return surveyed, held_out


def trained_on(recipe: Recipe) -> list[Record]:
    """The records that a run of the recipe is trained on, without those that it holds out.

    Raises:
        DeadpanError: If they are no longer there, or not in order.
    """
    records = read(recipe, recipe.data.train)
    if not isinstance(recipe.data.validation, float):
        return records
    processor = load_processor(resolve(recipe.model), recipe.max_tiles, recipe.max_length)
    return split(recipe, survey(records, processor, recipe.data.overlong), processor)[0].records


def learned(run: Path) -> list[str]:
    """The answers that a run has been trained on; of preference pairs, the chosen ones.

    Those of the run whose adapter it went on from are among them.

    Raises:
        DeadpanError: If a recipe, an earlier run or the records are no longer there, or not in order.
    """
    recipe = load_recipe(run / "recipe.yaml")
    answers = [answer for record in trained_on(recipe) for answer in record.answers]
    if recipe.adapter is not None and (before := run_of(resolve(recipe.adapter))) is not None:
        answers += learned(before)
    return answers
