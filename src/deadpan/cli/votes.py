"""`deadpan votes`: what people preferred, as data and as a ranking."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="What people preferred in the arena of `deadpan serve`: pairs to train on, and a ranking.",
    no_args_is_help=True,
)

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="The database that `deadpan serve --votes` writes.")
]


@app.command()
def export(
    file: File,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The JSON lines to write.")],
) -> None:
    """Write the votes as preference pairs, one JSON object a line.

    Each has image (the picture's path, from the folder of OUT if it lies under it), prompt, chosen and
    rejected. Ties prefer neither answer and are left out, as are votes between two equal answers.
    A server may go on writing votes meanwhile.

    Example: deadpan votes export votes.db pairs.jsonl
    """
    from deadpan.serve.votes import Votes
    from deadpan.serve.votes import export as write

    with Votes(file, create=False) as votes:
        exported = write(votes, out)
    typer.echo(
        f"wrote {out}: {exported.pairs:,} pairs; left out: {exported.ties:,} ties, "
        f"{exported.equal:,} between equal answers"
    )


@app.command()
def ranking(
    file: File,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a teller.")] = False,
) -> None:
    """Rank tellers by the votes on their matches.

    The rating is the Bradley-Terry model's: 400 points more are odds of ten to one, and the mean is 1000. Both
    kinds of tie count as half a win for each. Beside it stands its 95% interval (1,000 bootstrap
    samples; too narrow where votes are few). A teller's rank is one more than the tellers whose whole
    interval lies above its own.

    Example: deadpan votes ranking votes.db
    """
    from deadpan.serve.ranking import rank
    from deadpan.serve.votes import Votes

    with Votes(file, create=False) as votes:
        standings = rank(votes.all())
    if json:
        from dataclasses import asdict
        from json import dumps

        for standing in standings:
            typer.echo(dumps(asdict(standing), ensure_ascii=False))
        return
    if not standings:
        typer.echo("no votes yet")
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False)
    for heading in ("rank", "teller", "rating", "95%", "votes", "won", "both dry", "both bad"):
        table.add_column(heading, justify="left" if heading == "teller" else "right")
    for row in standings:
        table.add_row(
            str(row.rank),
            Text(row.teller, overflow="fold"),
            f"{row.rating:.0f}",
            f"{row.low:.0f}-{row.high:.0f}",
            *(f"{count:,}" for count in (row.votes, row.won, row.both_dry, row.both_bad)),
        )
    Console().print(table)
    groups: dict[int, list[str]] = {}
    for row in standings:
        groups.setdefault(row.group, []).append(row.teller)
    if len(groups) > 1:
        typer.echo(
            "no chain of votes connects these, so their ratings cannot be compared: "
            + "; ".join(" and ".join(names) for names in groups.values())
        )
