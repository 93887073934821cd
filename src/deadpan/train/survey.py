"""Look at every record once before the first step: a run must not fail in its third hour over a truncated picture."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from deadpan.data.pictures import open_picture
from deadpan.data.records import Record, check_command
from deadpan.errors import DeadpanError
from deadpan.processing.processor import Processor, Size

_SHOWN = 5


@dataclass(frozen=True)
class Survey:
    """What is fit to be trained on.

    Attributes:
        records: The records to train on.
        sizes: Their sizes.
        skipped: The records left out for being too long.
    """

    records: list[Record]
    sizes: list[Size]
    skipped: list[Record]

    @property
    def lengths(self) -> list[int]:
        """The numbers of tokens of the records to train on."""
        return [size.tokens for size in self.sizes]

    def only(self, indices: Sequence[int]) -> "Survey":
        """The same of some of the records."""
        return Survey(
            [self.records[i] for i in indices], [self.sizes[i] for i in indices], self.skipped
        )


def survey(
    records: Sequence[Record],
    processor: Processor,
    overlong: Literal["error", "skip"],
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Decode every picture and count every record's tokens, in parallel.

    Args:
        records: The training records.
        processor: Counts tokens as training will.
        overlong: What to do with a record longer than the processor's max_length.
        progress: Called with the number of records looked at and their total.

    Raises:
        DeadpanError: If pictures are broken, or records are too long and not to be skipped.
    """

    def look(record: Record) -> list[Size] | DeadpanError:
        try:
            for path in record.image_paths:
                open_picture(path)
            return [processor.size(side) for side in record.sides]
        except DeadpanError as error:
            return error

    broken: list[tuple[Record, DeadpanError]] = []
    kept: list[tuple[Record, Size]] = []
    skipped: list[tuple[Record, int]] = []
    with ThreadPoolExecutor() as pool:
        for done, (record, found) in enumerate(
            zip(records, pool.map(look, records), strict=True), start=1
        ):
            if isinstance(found, DeadpanError):
                broken.append((record, found))
            elif (longest := max(size.tokens for size in found)) > processor.max_length:
                skipped.append((record, longest))
            else:
                kept.append((record, sum(found[1:], start=found[0])))
            if progress is not None:
                progress(done, len(records))
    if broken:
        raise DeadpanError(
            f"{len(broken)} of {len(records)} records cannot be trained on.",
            found=_first(
                [f"{record.name}: {error.what} ({error.where})" for record, error in broken]
            ),
            fix="mend their pictures, or take them out"
            if records[0].rejected is not None
            else f"run: {_check_command(records[0])}",
        )
    if skipped and (overlong == "error" or not kept):
        raise DeadpanError(
            f"{len(skipped)} of {len(records)} records are too long; none was cut off.",
            expected=f"at most {processor.max_length} tokens (max_length)",
            found=_first([f"{record.name}: {length} tokens" for record, length in skipped]),
            fix="lower max_tiles or raise max_length"
            + ("" if overlong == "skip" else ", or leave them out with data.overlong=skip"),
        )
    return Survey(
        [record for record, _ in kept],
        [size for _, size in kept],
        [record for record, _ in skipped],
    )


def _check_command(record: Record) -> str:
    return check_command(
        record.file, None if record.folder == record.file.parent else record.folder
    )


def _first(messages: list[str]) -> str:
    more = f"; and {len(messages) - _SHOWN} more" if len(messages) > _SHOWN else ""
    return "; ".join(messages[:_SHOWN]) + more
