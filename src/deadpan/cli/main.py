"""The command line: one file a verb, and nothing heavy imported before a verb runs.

Exit codes: 0 all is well; 1 something is wrong with the input or the result; 2 the command itself is mistyped.
"""

import sys
from typing import Annotated

import typer

from deadpan import __version__
from deadpan.cli import (
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    fetch,
    import_xtuner,
    plot,
    recipe,
    serve,
    tell,
    train,
    votes,
)
from deadpan.errors import DeadpanError

app = typer.Typer(
    name="deadpan",
    help="Turn a vision-language model into a teller of cold jokes (冷笑话): a picture in, one dry line out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.add_typer(fetch.app, name="fetch")
app.add_typer(data.app, name="data")
app.add_typer(recipe.app, name="recipe")
app.command()(train.train)
app.command()(plot.plot)
app.command()(export.export)
app.command()(tell.tell)
app.command()(serve.serve)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.add_typer(votes.app, name="votes")
app.command()(import_xtuner.import_xtuner)
app.command()(doctor.doctor)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"deadpan {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Turn a vision-language model into a teller of cold jokes (冷笑话)."""


def print_error(error: DeadpanError) -> None:
    """Show an error on stderr: the sentence first, then its labelled details."""
    typer.secho(f"error: {error.what}", fg=typer.colors.RED, bold=True, err=True)
    for label, text in error.details():
        typer.secho(f"  {label}: ", nl=False, dim=True, err=True)
        typer.echo(text, err=True)


def run() -> None:
    """The entry point of the `deadpan` command."""
    try:
        app()
    except DeadpanError as error:
        if not error.told_elsewhere:
            print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
