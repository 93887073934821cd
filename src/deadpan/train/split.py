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
    processor: Processor,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Survey, list[Record]]:
    """Look at a recipe's records and their pictures, and hold records out, as it says.

    Args:
        recipe: Its `data`, and its seed.
        processor: Counts the tokens of records.
        progress: Called with the number of a file's records looked at and their total.

    Returns:
        What is trained on, and the held-out records, which may be none.

    Raises:
        DeadpanError: If the records are not in order, nothing can be held out, or the validation file has
            pictures that are trained on.
    """
    data, validation = recipe.data, recipe.data.validation
    training = read(recipe, data.train)
    # Both files first: a mistake in one is not to be told after the minutes that many pictures take.
    apart = read(recipe, validation) if isinstance(validation, Path) else []
    surveyed = survey(training, processor, data.overlong, progress)
    if validation is None:
        return surveyed, []
    if isinstance(validation, float):
        parts = hold_out(surveyed.records, validation, recipe.seed)
        return surveyed.only(parts.training), [surveyed.records[i] for i in parts.held_out]
    held_out = survey(apart, processor, data.overlong, progress).records
    refuse_shared(surveyed.records, held_out)
    return surveyed, held_out


def trained_on(recipe: Recipe) -> list[Record]:
    """The records that a run of the recipe is trained on, without those that it holds out.

    Raises:
        DeadpanError: If they are no longer there, or not in order.
    """
    if not isinstance(recipe.data.validation, float):
        return read(recipe, recipe.data.train)
    processor = load_processor(resolve(recipe.model), recipe.max_tiles, recipe.max_length)
    return split(recipe, processor)[0].records


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
