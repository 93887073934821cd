"""`deadpan recipe`: list, show, copy and import recipes."""

from pathlib import Path
from typing import Annotated

import typer

from deadpan.errors import DeadpanError, writing

app = typer.Typer(
    help="List, show, copy and import recipes: what a training run is made of.",
    no_args_is_help=True,
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
    _write(target, text, force)
    typer.echo(f"wrote {target}; edit it, then run:")
    typer.echo(f"  deadpan train {shlex.quote(str(target))}")


@app.command("import")
def import_recipe(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.py", help="A config of XTuner 0.1 for InternVL.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Keys of the recipe, such as data.train=all.json, in place of what the config says.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The recipe to write; without it, it is printed.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Turn an XTuner config into a recipe, and say what has no equivalent.

    The config is read and never run. What cannot be read that way, or has no equivalent that the
    recipe could do without, is an error that names it; give such a key as KEY=VALUE.

    Example: deadpan recipe import internvl_v2_internlm2_2b_qlora_finetune.py --out jokes.yaml
    """
    import shlex

    from deadpan.config.xtuner import import_config

    translation = import_config(config, overrides or [])
    if out is None:
        typer.echo(translation.text(), nl=False)
        return
    _write(out, translation.text(), force)
    for setting in translation.settings:
        typer.echo(str(setting))
    for line in translation.report():
        typer.echo(line)
    typer.echo(f"wrote {out}; read it, then run:")
    typer.echo(f"  deadpan train {shlex.quote(str(out))}")


def _write(target: Path, text: str, force: bool) -> None:
    if target.exists() and not force:
        raise DeadpanError(
            "The file is already there.",
            where=target,
            fix="choose another place, or overwrite it with --force",
        )
    with writing("recipe", target, "choose a folder that you may write to"):
        target.write_text(text, encoding="utf-8")
