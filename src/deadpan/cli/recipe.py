"""`deadpan recipe`: list, show and copy recipes."""

from pathlib import Path
from typing import Annotated

import typer

from deadpan.errors import DeadpanError

app = typer.Typer(
    help="List, show and copy recipes: what a training run is made of.", no_args_is_help=True
)


@app.command("list")
def list_recipes() -> None:
    """List the bundled recipes."""
    from deadpan.config.loader import bundled

    descriptions = bundled()
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        typer.echo(f"{name:<{width}}  {description}")


@app.command()
def show(
    source: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="A bundled recipe or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes, such as optimizer.lr=1e-4."),
    ] = None,
) -> None:
    """Print a recipe with every key, defaults and overrides filled in, as YAML."""
    from deadpan.config.loader import dump_recipe, load_recipe

    typer.echo(dump_recipe(load_recipe(source, overrides or [])), nl=False)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A bundled recipe.")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to put it; made if it is missing.")
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Copy a bundled recipe to a folder, to edit it there."""
    import shlex

    from deadpan.config.loader import bundled_text

    text = bundled_text(name)
    target = folder / f"{name}.yaml"
    if target.exists() and not force:
        raise DeadpanError(
            "The file is already there.",
            where=target,
            fix="choose another folder, or overwrite it with --force",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DeadpanError(
            f"The recipe cannot be written: {error.strerror}.",
            where=target,
            fix="choose a folder that you may write to",
        ) from None
    typer.echo(f"wrote {target}; edit it, then run:")
    typer.echo(f"  deadpan train {shlex.quote(str(target))}")
