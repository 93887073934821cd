"""A forecast as tables for the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deadpan.environment import GIB
from deadpan.train.forecast import Forecast, Trial
from deadpan.train.watcher import counted


def tables(forecast: Forecast) -> Group:
    """The whole story: what runs, its memory, its time, and what to change if it does not fit."""
    found = forecast
    heavy = found.heaviest
    padding = "" if heavy.computed == heavy.tokens else " with padding"
    parts: list[RenderableType] = [
        Text(f"Forecast for {found.run}, on {found.device}; nothing was written", style="bold"),
        Text(
            f"{counted(found.records, 'record')}, {counted(found.steps, 'step')} of "
            f"{found.micro_batch_size} x {found.gradient_accumulation_steps} samples, "
            f"{found.whole.tokens:,} tokens in all\n"
            f"the largest batch: {counted(heavy.samples, 'sample')}, {heavy.computed:,} tokens"
            f"{padding}, {counted(heavy.tiles, 'tile')}"
        ),
        _memory(found),
        _verdict(found),
    ]
    if found.pace is not None:
        parts.append(_time(found))
    if found.sizes:
        parts.append(_trials("micro_batch_size: auto", found.sizes))
    if found.changes:
        parts.append(_trials("what to change", found.changes))
    return Group(*parts)


def _grid(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, min_width=24)
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("", style="dim")
    return table


def _gib(amount: int) -> str:
    return f"{amount / GIB:.2f}"


def _memory(found: Forecast) -> Table:
    table = _grid("\nmemory", "\nGiB")
    on_gpu = found.beside > 0
    if found.memory is None:
        table.add_row("peak", "?", "memory ran out with one sample at a time")
        return table
    memory = found.memory
    rows = [
        ("weights, frozen", memory.frozen, ""),
        ("weights, trainable", memory.trainable, "float32"),
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.optimizer, ""),
        (
            "activations",
            memory.activations,
            "" if found.measured else "estimated from fewer samples",
        ),
        ("buffers, workspaces" if on_gpu else "Python and libraries", memory.other, ""),
    ]
    for name, amount, note in rows:
        table.add_row(name, _gib(amount), note)
    assert found.peak is not None
    loading = (
        "while the weights are read" if found.peak > memory.peak else "memory_gib in metrics.jsonl"
    )
    table.add_row("peak", _gib(found.peak), loading, style="bold")
    if on_gpu:
        table.add_row("CUDA context", _gib(found.beside), "beside it, with other programs' memory")
    return table


def _verdict(found: Forecast) -> Text:
    limits = f"{_gib(found.available)} available, {_gib(found.limit)} to plan with"
    needed = "more" if found.peak is None else f"{_gib(found.peak)} GiB"
    if found.fits:
        return Text(f"fits: {needed} of {limits}", style="green")
    return Text(f"does not fit: {needed} of {limits}", style="red")


def _time(found: Forecast) -> Table:
    pace = found.pace
    assert pace is not None
    table = _grid("\ntime", "")
    table.add_row(
        "speed",
        f"{pace.samples_per_second:.2f} samples/s",
        f"{pace.tokens_per_second:,.0f} tokens/s, from {pace.steps} of its steps",
    )
    if pace.evaluations:
        table.add_row("training", duration(pace.training_seconds), "")
        table.add_row(
            "evaluating",
            duration(pace.evaluations * pace.evaluation_seconds),
            f"{pace.evaluations} times {duration(pace.evaluation_seconds)}",
        )
    table.add_row(
        "the whole run", duration(pace.run_seconds), "and what saving takes", style="bold"
    )
    return table


def _trials(title: str, trials: list[Trial]) -> Table:
    table = _grid(f"\n{title}", "\nGiB")
    for trial in trials:
        if trial.peak is None:
            table.add_row(trial.change, "?", "no figure")
            continue
        fits = "fits" if trial.fits else "does not fit"
        table.add_row(
            trial.change, _gib(trial.peak), fits + ("" if trial.measured else ", estimated")
        )
    return table


def duration(seconds: float) -> str:
    """A time in the two units that matter: `1 h 48 min`, `2 min 5 s`, `7.3 s`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"
