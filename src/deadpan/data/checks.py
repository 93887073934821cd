"""Everything that can be wrong with a file of records, pictures included, found before training."""

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from deadpan.data.pictures import PictureError, digest, open_picture, picture_size
from deadpan.data.records import Problem, Record, Severity, read

_NAMED_RECORDS = 8


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        file: The file of records.
        records: How many records it holds, unreadable ones included.
        pictures: How many distinct pictures the readable records name.
        problems: Errors first, then warnings, each in the order of the file.
    """

    file: Path
    records: int
    pictures: int
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that must be mended."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that may be what was meant."""
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    def to_json(self) -> dict[str, object]:
        """The report in JSON's own types."""
        return {
            "file": str(self.file),
            "records": self.records,
            "pictures": self.pictures,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "problems": [asdict(problem) for problem in self.problems],
        }


def check(
    path: Path,
    images: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check a file of records and decode every picture once.

    Args:
        path: A JSON array or JSON lines.
        images: The folder that picture paths start from; by default the folder of `path`.
        workers: How many pictures to decode at a time; by default one per CPU, at most 8.
        progress: Called with (pictures done, pictures in all) after each picture.

    Raises:
        DeadpanError: If the file cannot be read at all.
    """
    records, problems = read(path, images)
    users: dict[Path, list[Record]] = defaultdict(list)
    for record in records:
        for picture in dict.fromkeys(record.image_paths):
            users[picture].append(record)
    faults = _faults(list(users), workers, progress)
    for picture, (code, message) in faults.items():
        problems.append(_problem(code, "error", users[picture], f"{picture}: {message}"))
    identities = _identities([picture for picture in users if picture not in faults])
    problems.extend(_duplicate_ids(records))
    problems.extend(_shared_pictures(users, identities))
    problems.extend(_duplicate_samples(records, identities))
    problems.sort(key=lambda problem: (problem.severity != "error", problem.records[:1]))
    readable = {record.index for record in records}
    mentioned = {index for problem in problems for index in problem.records}
    return CheckReport(path, len(readable | mentioned), len(users), tuple(problems))


def _problem(code: str, severity: Severity, records: Sequence[Record], message: str) -> Problem:
    indexes = tuple(record.index for record in records)
    return Problem(code, severity, _names(records), message, indexes)


def _names(records: Sequence[Record]) -> str:
    """One record by its full name, several as `train.json records 3, 17 and 20`."""
    if len(records) == 1:
        return records[0].name
    file, in_lines = records[0].file.name, records[0].line is not None
    places = [str(record.line if in_lines else record.index) for record in records]
    if len(places) > _NAMED_RECORDS:
        rest = len(places) - _NAMED_RECORDS
        listed = f"{', '.join(places[:_NAMED_RECORDS])} and {rest:,} more"
    else:
        listed = f"{', '.join(places[:-1])} and {places[-1]}"
    return f"{file} {'lines' if in_lines else 'records'} {listed}"


def _faults(
    pictures: Sequence[Path], workers: int | None, progress: Callable[[int, int], None] | None
) -> dict[Path, tuple[str, str]]:
    """The (code, message) of each picture that cannot be decoded."""
    faults = {}
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for done, (picture, fault) in enumerate(
            zip(pictures, pool.map(_fault, pictures), strict=True), start=1
        ):
            if fault is not None:
                faults[picture] = fault
            if progress is not None:
                progress(done, len(pictures))
    return faults


def _fault(picture: Path) -> tuple[str, str] | None:
    if not picture.exists():
        return "missing-picture", "the picture is missing"
    code = "unreadable-picture"
    try:
        picture_size(picture)
        code = "damaged-picture"
        open_picture(picture)
    except PictureError as error:
        told = {"expected", "found"}
        details = [f"{label} {text}" for label, text in error.details() if label in told]
        return code, "; ".join([error.what.rstrip("."), *details])
    return None


def _identities(pictures: Iterable[Path]) -> dict[Path, Path]:
    """Map each picture to the first one that has the same bytes."""
    same_size: dict[int, list[Path]] = defaultdict(list)
    for picture in pictures:
        same_size[picture.stat().st_size].append(picture)
    identities: dict[Path, Path] = {}
    for candidates in same_size.values():
        first_with: dict[str, Path] = {}
        for picture in candidates:
            # Most pictures differ in size already, and need not be read a second time.
            content = digest(picture) if len(candidates) > 1 else ""
            identities[picture] = first_with.setdefault(content, picture)
    return identities


def _duplicate_ids(records: Iterable[Record]) -> list[Problem]:
    by_id: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.id is not None:
            by_id[record.id].append(record)
    return [
        _problem("duplicate-id", "warning", same, f"{len(same)} records have the id {identifier!r}")
        for identifier, same in by_id.items()
        if len(same) > 1
    ]


def _shared_pictures(
    users: dict[Path, list[Record]], identities: dict[Path, Path]
) -> list[Problem]:
    files: dict[Path, list[Path]] = defaultdict(list)
    for picture in users:
        files[identities.get(picture, picture)].append(picture)
    problems = []
    for same in files.values():
        sharing = {record.index: record for picture in same for record in users[picture]}
        if len(sharing) == 1:
            continue
        ordered = [sharing[index] for index in sorted(sharing)]
        if len(same) == 1:
            code, message = "shared-picture", f"{same[0]} is in {len(ordered)} records"
        else:
            names = ", ".join(map(str, same))
            code, message = "equal-pictures", f"these files have the same bytes: {names}"
        problems.append(_problem(code, "warning", ordered, message))
    return problems


def _duplicate_samples(records: Iterable[Record], identities: dict[Path, Path]) -> list[Problem]:
    """The same answer to the same pictures, or to the same questions where there is no picture."""
    samples: dict[tuple[Hashable, str], dict[int, Record]] = defaultdict(dict)
    for record in records:
        pictures = tuple(identities.get(path, path) for path in record.image_paths)
        questions = tuple(turn.text.strip() for turn in record.turns if turn.role == "human")
        for answer in record.answers:
            samples[pictures or questions, answer.strip()][record.index] = record
    problems = []
    for (_, answer), same in samples.items():
        if len(same) > 1:
            message = f"the same answer to the same picture or question: {answer!r:.60}"
            problems.append(_problem("duplicate-sample", "warning", [*same.values()], message))
    return problems
