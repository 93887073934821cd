"""A progress bar on stderr, for verbs that take a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(what: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar, if it is to be shown, and yield a function of (done, total) that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not (shown and console.is_terminal)
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
