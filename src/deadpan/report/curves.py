"""Loss curves, read from the logs that training leaves behind.

Two kinds of log are known: `metrics.jsonl` of a deadpan run, and mmengine's `scalars.json`, which
xtuner writes. Both are JSON lines, one an optimizer step or one every few steps.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import yaml

from deadpan.errors import DeadpanError

_METRICS = Path("metrics.jsonl")
_SCALARS = Path("vis_data", "scalars.json")
_SHOWN = 60
"""Characters of a bad line that its error shows."""


@dataclass(frozen=True)
class Curve:
    """The losses of one run.

    Attributes:
        name: What a legend calls it.
        source: The run folder, or the log where there is no folder of a run.
        steps: The optimizer steps that were logged, ascending.
        losses: The training loss at each of them.
        eval_steps: The steps at which the held-out loss was taken, ascending.
        eval_losses: The held-out loss at each of them.
        samples: Samples seen up to each of `steps`, or None if the run does not tell. In logs that do
            not count them, a smaller last step of an epoch counts as a whole one.
        seconds: Time spent in steps up to each of `steps`, or None if the run does not tell.
    """

    name: str
    source: Path
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    eval_steps: tuple[int, ...]
    eval_losses: tuple[float, ...]
    samples: tuple[int, ...] | None
    seconds: tuple[float, ...] | None


def read_all(paths: Sequence[Path]) -> list[Curve]:
    """Read several runs, and name them so that no two names are equal.

    Args:
        paths: What `read` takes; one given twice is read once.

    Raises:
        DeadpanError: See `read`.
    """
    curves = [read(path) for path in dict.fromkeys(paths)]
    names = [curve.name for curve in curves]
    longest = max((len(curve.source.parts) for curve in curves), default=0)
    for parts in range(2, longest + 1):
        if len(set(names)) == len(names):
            break
        names = [_last(curve.source, parts) for curve in curves]
    return [replace(curve, name=name) for curve, name in zip(curves, names, strict=True)]


def read(path: Path) -> Curve:
    """Read the losses of one run.

    Args:
        path: A run folder, a folder with mmengine's `vis_data/scalars.json`, or such a log itself.

    Raises:
        DeadpanError: If there is no log, a line of it is damaged, or it holds no losses yet.
    """
    log = _log(path)
    source, name = _identity(log)
    batch = _samples_a_step(log.with_name("recipe.yaml"))
    steps: list[int] = []
    losses: list[float] = []
    samples: list[int | None] = []
    paces: list[float | None] = []
    eval_steps: list[int] = []
    eval_losses: list[float] = []
    for number, line in _lines(log):
        where = f"{log} line {number}"
        # Lines of other figures are none of our business, in either kind of log.
        if "loss" in line:
            steps.append(_step(line, where, steps))
            losses.append(_figure(line, "loss", where))
            samples.append(_samples(line, steps[-1], batch, where))
            paces.append(_seconds_a_step(line, batch, where))
        if "eval_loss" in line:
            eval_steps.append(_step(line, where, eval_steps))
            eval_losses.append(_figure(line, "eval_loss", where))
    if not steps:
        raise DeadpanError(
            "The run has no losses yet.", where=log, fix="wait until its first step is logged"
        )
    return Curve(
        name,
        source,
        tuple(steps),
        tuple(losses),
        tuple(eval_steps),
        tuple(eval_losses),
        None if None in samples else tuple(count for count in samples if count is not None),
        _elapsed(steps, paces),
    )


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """The exponential moving average, corrected for its start from nothing.

    The k-th average is the weighted mean of the first k values, each weighing `weight` times as
    much as the one after it. A value that is not finite has no average and changes none.

    Raises:
        DeadpanError: If the weight is not in [0, 1).
    """
    if not 0 <= weight < 1:
        raise DeadpanError(
            "The smoothing is out of bounds.",
            expected="0 (none) or more, and less than 1",
            found=f"{weight:g}",
        )
    average = total = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            total = weight * total + (1 - weight)
        averages.append(average / total if math.isfinite(value) else math.nan)
    return averages


def _log(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (_METRICS, _SCALARS):
        if (path / name).is_file():
            return path / name
    if not path.exists():
        raise DeadpanError("There is no such run.", where=path)
    inside = sorted(
        folder
        for folder in path.iterdir()
        if any((folder / name).is_file() for name in (_METRICS, _SCALARS))
    )
    raise DeadpanError(
        "The folder holds no log of losses.",
        where=path,
        expected=f"{_METRICS} of a deadpan run, or mmengine's {_SCALARS}",
        fix="name the runs inside: " + shlex.join(map(str, inside)) if inside else None,
    )


def _identity(log: Path) -> tuple[Path, str]:
    """What a log belongs to, and its name."""
    # Not resolved: a link is called what its owner called it.
    log = log.absolute()
    if log.name == _METRICS.name:
        return log.parent, log.parent.name
    if log.parts[-2:] == _SCALARS.parts:
        # mmengine names the inner folder after the time, the outer one after the config.
        return log.parents[1], _last(log.parents[1], 2)
    return log, log.stem


def _last(path: Path, parts: int) -> str:
    return "/".join(path.parts[-parts:])


def _samples_a_step(recipe: Path) -> int | None:
    """The samples of a whole optimizer step, or None if the run has no recipe that says it.

    Only two keys are looked at, not the whole recipe checked: one of another version of deadpan may
    have keys that this one does not know, and the losses can be drawn all the same.
    """
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DeadpanError(
            "The run's recipe cannot be read.", where=recipe, found=str(error)
        ) from None
    match content:
        case {"micro_batch_size": int(size), "gradient_accumulation_steps": int(passes)}:
            return size * passes
    return None


def _lines(log: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a log with their line numbers, from 1."""
    try:
        text = log.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeadpanError("The log cannot be read.", where=log, found=str(error)) from None
    *whole, last = text.split("\n")
    for number, line in enumerate([*whole, last], start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            # A last line without its end is being written, or was when the run was killed.
            if number > len(whole):
                return
            content = None
        if not isinstance(content, dict):
            raise DeadpanError(
                "A line of the log is damaged.",
                where=f"{log} line {number}",
                expected='a JSON object such as {"step": 10, "loss": 2.5}',
                found=line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…",
                fix="if this is the log of a run, delete the line",
            )
        yield number, content


def _step(line: Mapping[str, Any], where: str, before: Sequence[int]) -> int:
    step = line.get("step", line.get("iter"))
    least = before[-1] if before else 0
    if not isinstance(step, int) or step < least:
        raise DeadpanError(
            "A line of the log has no step, or one that goes back.",
            where=where,
            expected=f"step: an integer >= {least}",
            found=json.dumps(step),
            fix="if two runs were logged to one file, cut it in two",
        )
    return step


def _figure(line: Mapping[str, Any], key: str, where: str) -> float:
    value = line[key]
    if not isinstance(value, int | float):
        raise DeadpanError(
            "A line of the log has a figure that is not a number.",
            where=where,
            expected=f"{key}: a number",
            found=json.dumps(value, ensure_ascii=False),
        )
    return float(value)


def _samples(line: Mapping[str, Any], step: int, batch: int | None, where: str) -> int | None:
    """Samples seen up to a step: as logged, else by the recipe."""
    if "samples" in line:
        return int(_figure(line, "samples", where))
    return None if batch is None else step * batch


def _seconds_a_step(line: Mapping[str, Any], batch: int | None, where: str) -> float | None:
    if "time" in line:
        return _figure(line, "time", where)
    if batch is None or "samples_per_second" not in line:
        return None
    # Rounded when it was logged: a very slow step has 0, which tells nothing.
    speed = _figure(line, "samples_per_second", where)
    return batch / speed if speed > 0 else None


def _elapsed(steps: Sequence[int], paces: Sequence[float | None]) -> tuple[float, ...] | None:
    """The time up to each step, if each line says its pace; steps that are not logged had the next one's."""
    known = [pace for pace in paces if pace is not None]
    if len(known) < len(paces):
        return None
    lengths = [after - before for before, after in pairwise([0, *steps])]
    return tuple(accumulate(length * pace for length, pace in zip(lengths, known, strict=True)))
