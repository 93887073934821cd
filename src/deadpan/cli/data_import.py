"""`deadpan data import`: records from published data sets."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deadpan.cli.progress import bar

if TYPE_CHECKING:
    from deadpan.data.oogiri import Summary

app = typer.Typer(help="Make records from a published data set.", no_args_is_help=True)


class Language(StrEnum):
    """The files of Oogiri-GO."""

    CN = "cn"
    EN = "en"
    JP = "jp"


class Type(StrEnum):
    """The games of Oogiri-GO."""

    I2T = "I2T"
    IT2T = "IT2T"
    T2T = "T2T"


@app.command()
def oogiri(
    source: Annotated[
        Path,
        typer.Argument(help="The folder that holds en.jsonl, cn.jsonl, jp.jsonl, or one of them."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    language: Annotated[
        list[Language] | None,
        typer.Option(help="Take this language; repeat for several. Default: all that are there."),
    ] = None,
    types: Annotated[
        list[Type] | None,
        typer.Option(
            "--type",
            help="I2T: a picture. IT2T: a picture with words in it. T2T: a question alone. "
            "Repeat for several. Default: I2T.",
        ),
    ] = None,
    min_stars: Annotated[
        int | None,
        typer.Option(min=0, help="The fewest likes; answers of unknown likes are dropped too."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The most records; whole pictures are drawn.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.001, max=0.999, help="The share held out, by picture.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Decides what is drawn and what is held out.")] = 0,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of the pictures. Default: SOURCE/images."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to ask about a picture. Default: a question in its language."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Oogiri-GO, the data of CLoT (arXiv 2312.02439), as records.

    Writes train.jsonl, held-out.jsonl, images/ and summary.json. Every answer
    is a record that keeps its likes as "stars". All answers to a picture lie
    on the same side, and so do those to copies of it, however scaled or
    recompressed. Of equal answers to a picture the most liked is kept. What is
    missing, broken or not wanted is counted and named, never replaced.

    Example: deadpan data import oogiri CLoT-Oogiri-GO my-data --language cn --limit 2000
    """
    from deadpan.data.oogiri import Selection, import_oogiri

    selection = Selection(
        languages=tuple(item.value for item in language or ()),
        types=tuple(item.value for item in types or (Type.I2T,)),
        min_stars=min_stars,
        limit=limit,
        held_out=held_out,
        seed=seed,
    )
    with bar("looking at pictures") as progress:
        summary = import_oogiri(source, out, selection, images, prompt, progress)
    if json:
        from json import dumps

        typer.echo(dumps(summary.to_json(), ensure_ascii=False, indent=2))
    else:
        _print_summary(summary, out)


def _print_summary(summary: Summary, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if summary.dropped:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("dropped", justify="right")
        table.add_column("why")
        table.add_column("such as")
        for entry in summary.dropped:
            first = Text(entry.examples[0], overflow="fold")
            table.add_row(f"{entry.rows:,}", Text(entry.reason), first)
        console.print(table)
    console.print(
        f"{summary.rows:,} rows read; {summary.training + summary.held_out:,} records on "
        f"{summary.pictures:,} pictures ({summary.merged_pictures:,} copies merged), "
        f"{summary.with_stars:,} with stars"
    )
    console.print(
        f"{summary.training:,} in {out / 'train.jsonl'}, "
        f"{summary.held_out:,} in {out / 'held-out.jsonl'}",
        style="bold",
        soft_wrap=True,
    )
    console.print(f"next: deadpan data check {out / 'train.jsonl'}", style="dim", soft_wrap=True)
    if summary.with_stars:
        console.print(
            f"or pairs of more and less liked answers: deadpan data pairs {out / 'train.jsonl'} "
            f"{out / 'pairs.jsonl'}",
            style="dim",
            soft_wrap=True,
        )
