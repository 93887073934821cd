"""`deadpan data`: look at the records before a model does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deadpan.cli import data_import
from deadpan.cli.progress import bar

if TYPE_CHECKING:
    from rich.table import Table

    from deadpan.data.checks import CheckReport
    from deadpan.data.preferences import Starred
    from deadpan.processing.statistics import Spread, Statistics

_ROWS = 50
_BARS = 16
_BAR_WIDTH = 30

app = typer.Typer(
    help="Import, check, measure, pair and look through training records.", no_args_is_help=True
)
app.add_typer(data_import.app, name="import")

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="The records: a JSON array or JSON lines.")
]
Images = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The folder that picture paths start from. Default: the folder of FILE.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


@app.command()
def check(
    file: File,
    images: Images = None,
    json: Json = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on warnings too (exit code 1).")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures decoded at a time. Default: one per CPU, at most 8."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help=f"List every problem, not the first {_ROWS}.")
    ] = False,
) -> None:
    """Find everything wrong with the records and their pictures.

    Every picture is decoded once. Errors are what training would refuse or
    learn wrongly: broken pictures, turns out of order, <image> marks that do
    not match the pictures, control tokens in an answer, ids given twice.
    Warnings may be meant: one picture in several records, a sample twice.
    Records of a JSON array are numbered from 0, JSON lines from 1.

    Example: deadpan data check train.json --images pictures
    """
    from deadpan.data import checks

    with bar("decoding pictures") as progress:
        report = checks.check(file, images, workers, progress)
    if json:
        _print_json(report.to_json())
    else:
        _print_report(report, None if everything else _ROWS)
    if report.errors or (strict and report.warnings):
        raise typer.Exit(1)


@app.command()
def stats(
    file: File,
    images: Images = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Count tokens as this model does: a folder or a Hub id. "
            "Its tile policy is used too."
        ),
    ] = None,
    max_tiles: Annotated[
        int | None,
        typer.Option(
            min=1, help="The most tiles of a sample, thumbnails aside. Default: the model's, or 12."
        ),
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=1, help="With --model: count the samples with more tokens.")
    ] = 8192,
    json: Json = False,
) -> None:
    """Measure the records: pictures, tiles, answers, and tokens with --model.

    Tiles decide what training costs: each becomes 256 tokens in InternVL2.
    Pictures are measured by their headers, so this is quick.

    Example: deadpan data stats train.json --model OpenGVLab/InternVL2-2B
    """
    from deadpan.data.records import load
    from deadpan.processing.statistics import statistics

    records = load(file, images)
    if model is None:
        with bar("measuring") as progress:
            figures = statistics(records, max_tiles=max_tiles or 12, progress=progress)
    else:
        from deadpan.checkpoints.source import resolve
        from deadpan.processing.processor import load_processor

        processor = load_processor(resolve(model), max_tiles=max_tiles, max_length=max_length)
        policy = processor.tile_policy
        with bar("measuring") as progress:
            figures = statistics(
                records,
                processor,
                max_tiles=policy.max_tiles,
                tile_size=policy.tile_size,
                thumbnail=policy.thumbnail,
                min_tiles=policy.min_tiles,
                progress=progress,
            )
    if json:
        _print_json(figures.to_json())
    else:
        _print_statistics(figures)


@app.command()
def preview(
    file: File,
    images: Images = None,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("preview.html"),
    limit: Annotated[
        int, typer.Option(min=1, help="The most records to show; of more, a random sample.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Chooses the sample.")] = 0,
) -> None:
    """Write a contact sheet: one HTML file of thumbnails and captions.

    The pictures are as the model sees them, and broken ones are red boxes
    that say why. The page loads nothing from elsewhere, so it can be mailed.

    Example: deadpan data preview train.json --out preview.html --limit 100
    """
    from deadpan.data.preview import preview as write
    from deadpan.data.records import load

    records = load(file, images)
    path = write(records, out, limit, seed)
    typer.echo(f"{path}: {min(limit, len(records)):,} of {len(records):,} records")


@app.command()
def pairs(
    file: File,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The JSON lines to write.")],
    images: Images = None,
    min_gap: Annotated[
        int, typer.Option(min=1, help="By how many stars the two of a pair differ at least.")
    ] = 1,
    per_picture: Annotated[
        int,
        typer.Option(
            min=1, help="The most pairs of a picture and question, drawn from all it has."
        ),
    ] = 10,
    seed: Annotated[int, typer.Option(help="Decides the draw.")] = 0,
    json: Json = False,
) -> None:
    """Pair answers by their stars, for preference training.

    Of two answers to the same question on the same picture, the one with more
    stars is the chosen one. Records are those of deadpan data import oogiri,
    or any with a number of likes as "stars". Answers without stars are left
    out: not counted is not disliked. Of a picture with many answers few pairs
    are drawn, so that it does not outweigh the others. Pictures are not copied.

    Example: deadpan data pairs my-data/train.jsonl my-data/pairs.jsonl --min-gap 5
    """
    from deadpan.data import preferences
    from deadpan.data.records import load
    from deadpan.errors import DeadpanError

    if out.resolve() == file.resolve():
        raise DeadpanError(
            "The pairs would take the place of the records.", where=out, fix="name another file"
        )
    made = preferences.from_stars(load(file, images), min_gap, per_picture, seed)
    if not made.pairs:
        raise DeadpanError(
            "No two answers to a picture can be set against each other.",
            where=file,
            expected=f'answers to the same question on the same picture whose "stars" differ by {min_gap} '
            "or more",
            found=_left_out(made),
        )
    preferences.write(made.pairs, out)
    if json:
        _print_json(
            {
                "pairs": len(made.pairs),
                "pictures": made.pictures,
                "without_stars": made.uncounted,
                "longer": made.longer,
                "single": made.single,
            }
        )
    else:
        typer.echo(
            f"wrote {out}: {_count(len(made.pairs), 'pair')} on {_count(made.pictures, 'picture')}; "
            f"left out: {_left_out(made)}"
        )


def _left_out(made: Starred) -> str:
    return (
        f"{_count(made.uncounted, 'answer')} without stars, {made.longer:,} to several questions in turn, "
        f"{made.single:,} that no other can be set against"
    )


def _print_json(value: object) -> None:
    from json import dumps

    typer.echo(dumps(value, ensure_ascii=False, indent=2))


def _print_report(report: CheckReport, rows: int | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if report.problems:
        table = Table("severity", "where", "code", "message", box=None, header_style="bold")
        for problem in report.problems[:rows]:
            style = "red" if problem.severity == "error" else "yellow"
            # Text, since a str would have its [brackets] read as markup.
            table.add_row(
                Text(problem.severity, style),
                Text(problem.where, overflow="fold"),
                Text(problem.code, no_wrap=True),
                Text(problem.message, overflow="fold"),
            )
        console.print(table)
    hidden = len(report.problems) - len(report.problems[:rows])
    if hidden:
        console.print(f"and {hidden:,} more: --all lists them", style="dim")
    missing = sum(problem.code == "missing-picture" for problem in report.problems)
    if missing and missing == report.pictures:
        console.print("No picture was found at all: is --images the right folder?")
    console.print(
        f"{_count(report.records, 'record')}, {_count(report.pictures, 'picture')}:"
        f" {_count(len(report.errors), 'error')}, {_count(len(report.warnings), 'warning')}",
        style="bold",
        highlight=False,
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _print_statistics(figures: Statistics) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    totals = Table.grid(padding=(0, 2))
    totals.add_column()
    totals.add_column(justify="right")
    totals.add_row("records", f"{figures.records:,}")
    totals.add_row("without a picture", f"{figures.text_only:,}")
    totals.add_row("pictures", f"{figures.pictures:,}")
    if figures.picture_sizes is not None:
        names = "smallest picture", "median picture", "largest picture"
        for name, (width, height) in zip(names, figures.picture_sizes, strict=True):
            totals.add_row(name, f"{width}x{height}")
    console.print(totals)

    lengths = Table("lengths", box=None, header_style="bold", pad_edge=False)
    for heading in ("min", "median", "p95", "max"):
        lengths.add_column(heading, justify="right")
    lengths.add_row("answer, characters", *_row(figures.answer_characters))
    if figures.sample_tokens is not None:
        lengths.add_row("whole sample, tokens", *_row(figures.sample_tokens))
    console.print()
    console.print(lengths)
    if figures.over_max_length is not None:
        console.print(
            f"{_count(figures.over_max_length, 'sample')} over {figures.max_length:,} tokens",
            style="red" if figures.over_max_length else None,
            highlight=False,
        )
    console.print()
    console.print(_histogram("tiles a sample", "samples", figures.tiles_per_sample))
    if figures.answers_per_picture:
        console.print()
        console.print(_histogram("answers a picture", "pictures", figures.answers_per_picture))


def _row(spread: Spread) -> list[str]:
    values = spread.minimum, spread.median, spread.p95, spread.maximum
    return [f"{value:,}" for value in values]


def _histogram(title: str, counted: str, counts: Mapping[int, int]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title, justify="right")
    table.add_column(counted, justify="right")
    table.add_column("")
    bars = _bars(counts)
    longest = max(count for _, count in bars)
    for label, count in bars:
        # Whatever is not zero shows, however small beside the longest bar.
        width = max(1, round(_BAR_WIDTH * count / longest)) if count else 0
        table.add_row(label, f"{count:,}", "█" * width)
    return table


def _bars(counts: Mapping[int, int]) -> list[tuple[str, int]]:
    """The counts by value or, where the values are too many to list, by equal ranges of them."""
    if len(counts) <= _BARS:
        return [(str(value), count) for value, count in counts.items()]
    low, high = min(counts), max(counts)
    step = -(-(high - low + 1) // _BARS)
    ranges = [range(start, start + step) for start in range(low, high + 1, step)]
    return [
        (
            f"{values[0]}-{values[-1]}",
            sum(count for value, count in counts.items() if value in values),
        )
        for values in ranges
    ]
