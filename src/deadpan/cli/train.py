"""`deadpan train`."""

from typing import TYPE_CHECKING, Annotated

import typer

from deadpan.cli import hints

if TYPE_CHECKING:
    from deadpan.config.schema import Recipe


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
    resume_from: Annotated[
        str | None,
        typer.Option(
            "--resume-from",
            metavar="CHECKPOINT",
            help="Go on from an older checkpoint, such as step-000200. Newer ones are renamed "
            "step-NNNNNN.aside; none is deleted.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Forecast memory and time from real steps on the largest batches, and write nothing; "
            "exit code 1 if the run does not fit.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print the forecast as JSON.")
    ] = False,
) -> None:
    """Fine-tune a model on captioned pictures.

    Every record is checked before the first step. The run folder (recipe key: run) gets the resolved recipe, the
    environment, metrics.jsonl and checkpoints; any checkpoint can be heard with deadpan tell and resumed from.
    Ctrl-C saves after the step at hand and stops; press it twice to stop at once.

    With data.validation (a share such as 0.05, or a file of records) the held-out loss is measured as the run goes on,
    the best checkpoint is kept, and a warning says when the run begins to learn its answers by heart.

    Example: deadpan train internvl2-2b-qlora data.train=ex_cn.json run=runs/first

    With --dry-run first: does it fit, how long will it take, and what to change if it does not.

    On several GPUs: torchrun --nproc-per-node 2 --no-python deadpan train RECIPE. A step then has that many times the
    samples.
    """
    if as_json and not dry_run:
        raise typer.BadParameter("--json goes with --dry-run")
    from rich.console import Console

    from deadpan.config.loader import load_recipe
    from deadpan.train.launcher import leads, one_of_a_host_tells

    # Before the rest is imported, which takes seconds: a mistake in the recipe is told at once.
    with one_of_a_host_tells():
        resolved = load_recipe(recipe, overrides or ())
    if dry_run:
        _print_forecast(resolved, resume_from or resume, as_json)
        return

    from deadpan.train.loop import Trainer
    from deadpan.train.state import resume_command
    from deadpan.train.watcher import ProgressWatcher

    with ProgressWatcher(Console(stderr=True, quiet=not leads())) as watcher:
        result = Trainer(resolved, resume_from or resume, watcher).train()
    if not leads():
        raise typer.Exit(130 if result.interrupted else 0)
    if result.interrupted:
        typer.echo(f"stopped after step {result.steps}; saved {result.checkpoint}")
        typer.echo(f"go on with: {resume_command(result.run)}")
        raise typer.Exit(130)
    ended = "stopped early" if result.stopped_early else "done"
    typer.echo(
        f"{ended}: {result.steps} steps, last loss {result.loss:.4f}, saved {result.checkpoint}"
    )
    if result.best is not None:
        step, loss = result.best
        typer.echo(f"best: step {step}, held-out loss {loss:.4f}; this is the one that is heard")
    typer.echo(hints.hear(result.run))


def _print_forecast(recipe: "Recipe", resume: bool | str, as_json: bool) -> None:
    import json

    from rich.console import Console

    from deadpan.train.forecast_table import tables
    from deadpan.train.loop import Trainer
    from deadpan.train.rehearsal import Rehearsal
    from deadpan.train.watcher import ProgressWatcher

    with ProgressWatcher(Console(stderr=True)) as watcher:
        forecast = Rehearsal(Trainer(recipe, resume, watcher, dry_run=True)).forecast()
    if as_json:
        typer.echo(json.dumps(forecast.to_json(), ensure_ascii=False))
    else:
        Console().print(tables(forecast))
    if not forecast.fits:
        raise typer.Exit(1)
