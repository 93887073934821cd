"""`deadpan train`."""

from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe file, or the name of a bundled recipe (deadpan recipe list)."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys to set, such as optimizer.lr=1e-4."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run folder.")
    ] = False,
) -> None:
    """Fine-tune a model on captioned pictures.

    Every record is checked before the first step. The run folder (recipe key: run) gets the resolved recipe, the
    environment, metrics.jsonl and checkpoints; any checkpoint can be heard with deadpan tell and resumed from.
    Ctrl-C saves after the step at hand and stops; press it twice to stop at once.

    Example: deadpan train internvl2-2b-qlora data.train=ex_cn.json run=runs/first
    """
    from rich.console import Console

    from deadpan.config.loader import load_recipe
    from deadpan.train.loop import Trainer
    from deadpan.train.watcher import ProgressWatcher

    resolved = load_recipe(recipe, overrides or ())
    console = Console(stderr=True)
    with ProgressWatcher(console) as watcher:
        result = Trainer(resolved, resume, watcher).train()
    if result.interrupted:
        typer.echo(f"stopped after step {result.steps}; saved {result.checkpoint}")
        typer.echo(f"go on with: deadpan train {result.run / 'recipe.yaml'} --resume")
        raise typer.Exit(130)
    typer.echo(
        f"done: {result.steps} steps, last loss {result.loss:.4f}, saved {result.checkpoint}"
    )
    typer.echo(f"hear it: deadpan tell {result.run} PICTURE")
