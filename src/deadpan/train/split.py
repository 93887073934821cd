"""Which records are trained on, and which are held out to measure with."""

from collections.abc import Callable

from deadpan.config.schema import Recipe
from deadpan.data.records import Record
from deadpan.data.records import load as load_records
from deadpan.data.split import hold_out, refuse_shared
from deadpan.processing.processor import Processor
from deadpan.train.survey import Survey, survey


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
    records = load_records(validation, recipe.data.images)
    held_out = survey(records, processor, recipe.data.overlong, progress).records
    refuse_shared(surveyed.records, held_out)
    return surveyed, held_out
