"""`deadpan plot`."""

from pathlib import Path
from typing import Annotated

import typer

from deadpan.report.style import Style


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run folders, metrics.jsonl files, or mmengine's scalars.json (xtuner writes it).",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Ends in .png or .svg; without such an ending, both are written."
        ),
    ] = Path("loss"),
    x: Annotated[
        str,
        typer.Option(
            help="step; sample, to compare runs of different batch sizes; or time, without pauses."
        ),
    ] = Style.x,
    smoothing: Annotated[
        float,
        typer.Option(
            help="The moving average's memory: each value weighs this many times the next. "
            "0 draws the losses as logged; it is less than 1."
        ),
    ] = Style.smoothing,
    log: Annotated[bool, typer.Option("--log", help="Make the loss axis logarithmic.")] = Style.log,
) -> None:
    """Draw the loss curves of one or more runs on one figure.

    Faint lines are the losses as logged, strong ones their moving average, and
    dashed ones with markers the held-out loss, its lowest marker filled.
    Training loss falls whether a model learns or memorises; where the dashed
    line turns up, it memorises. A run that still goes on can be drawn, too.

    Example: deadpan plot runs/adamw runs/dadapt --x sample --out compared.png
    """
    from matplotlib import get_cachedir

    from deadpan.report.curves import read_all
    from deadpan.report.figure import missing_characters, save

    curves = read_all(runs)
    for path in save(curves, out, Style(x, smoothing, log)):
        typer.echo(f"wrote {path}")
    if missing := missing_characters("".join(curve.name for curve in curves)):
        typer.echo(
            f"no installed font has {missing}: boxes stand for it; for Chinese install Noto Sans CJK "
            "(apt install fonts-noto-cjk), then remove the list of fonts that matplotlib keeps in "
            f"{get_cachedir()}",
            err=True,
        )
