"""`deadpan demo`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deadpan.cli import hints

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to set, such as epochs=4."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to work in.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Another seed tells another story.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what the folder holds and start anew.")
    ] = False,
) -> None:
    """The whole story on this computer, in about two minutes, without a GPU or a download.

    The bundled model nano describes pictures; it is fine-tuned on the bundled starter set, evaluated,
    exported, reloaded, and tells jokes about pictures that it was not trained on. The report shows
    both tellers side by side. Ctrl-C stops the demo; the same command goes on.

    Example: deadpan demo
    """
    from rich.console import Console

    from deadpan.cli.evaluate import print_figures
    from deadpan.demo import Demo, Stopped, forget

    if fresh:
        forget(out)
    telling = _Telling(Console(stderr=True), Console(highlight=False))
    story = Demo(out, seed, overrides or (), telling)
    try:
        report = story.tell()
    except (KeyboardInterrupt, Stopped):
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo()
    print_figures(story.figures)
    typer.echo(f"\n{story.seconds():.0f} s in all. Look at {report} in a browser.")
    typer.echo(hints.hear(out / "model"))


class _Telling:
    """Shows the story on a terminal: a line for every step done, and a bar for the one at hand."""

    def __init__(self, bars: "Console", lines: "Console") -> None:
        self._bars, self._lines = bars, lines
        self._note: Callable[[str], None] = lambda text: None

    @contextmanager
    def step(self, title: str) -> "Iterator[Callable[[int, int], None]]":
        with self._bar() as progress:
            task = progress.add_task(title, total=None, note="")
            self._note = lambda text: progress.update(task, note=text)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._note(text)

    def done(self, title: str, line: str, seconds: float, before: bool) -> None:
        from rich.text import Text

        took = "done before" if before else f"{seconds:.1f} s"
        # Text, since a str would have its [brackets] read as markup.
        self._lines.print(
            Text.assemble((f"{title:<24}", "bold"), line, (f"  {took}", "dim")),
            soft_wrap=True,
        )

    def _bar(self) -> "Progress":
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._bars,
            transient=True,
            disable=not self._bars.is_terminal,
        )
