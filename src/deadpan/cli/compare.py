"""`deadpan compare`."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deadpan.cli.options import DataImages, Device, Dtype, MaxTiles, Quantization, Temperature, TopP


class Language(StrEnum):
    """Of the page's own words."""

    AUTO = "auto"
    EN = "en"
    ZH = "zh"


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL",
            help="Tellers, in the order of the columns: a checkpoint folder, a run folder, a checkpoint of a run, "
            "an export, a Hub id, or nano. NAME= is what the page calls it. A file among them is a picture, so "
            "that --pictures *.jpg works.",
        ),
    ],
    pictures: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR|FILE...",
            help="A folder of pictures, or a picture; more may follow, and the option may be given again. By "
            "default those of DATA.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Records that no teller was trained on, or nano:held-out: each is evaluated on them, as by "
            "deadpan evaluate."
        ),
    ] = None,
    images: DataImages = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What is asked about each of --pictures; by default the question of CLoT_cn_2000: "
            "请你根据这张图片，讲一个脑洞大开的梗"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Answers to each picture; more than one needs --temperature.")
    ] = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(help="Another seed draws other answers.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 64,
    max_tiles: MaxTiles = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantization = "none",
    title: Annotated[str | None, typer.Option(help="The page's heading.")] = None,
    language: Annotated[
        Language,
        typer.Option(help="What the page opens in; it has a switch. auto: that of this system."),
    ] = Language.AUTO,
) -> None:
    """Put tellers side by side on one web page: every picture with what each says of it.

    The page is one file that asks nothing of the network: pictures, answers, every teller's settings,
    the loss curves of their runs, and with --data the figures of deadpan evaluate with 95% intervals.
    An answer that repeats an answer of the teller's own training records, or nearly, is marked.

    Tellers are loaded one after the other, and what they say is kept beside the page, in a file that
    ends in .answers.jsonl: the same command goes on after Ctrl-C or a crash, and asks nothing twice,
    also when a teller or a picture is added. A broken picture is named, on the page too, and makes
    the exit code 1.

    Example: deadpan compare base=OpenGVLab/InternVL2-2B runs/qlora runs/dadapt --pictures photos

    Example: deadpan compare nano runs/nano --data nano:held-out --samples 4 --temperature 0.8
    """
    from deadpan.cli.evaluate import print_figures
    from deadpan.cli.progress import bar
    from deadpan.compare.comparing import Plan, find_pictures
    from deadpan.compare.comparing import compare as put_side_by_side
    from deadpan.compare.tellers import tellers
    from deadpan.data.records import PROMPT
    from deadpan.data.records import load as load_records
    from deadpan.engines.base import GenerationSettings
    from deadpan.errors import DeadpanError

    if out.suffix.lower() not in (".html", ".htm"):
        raise DeadpanError(
            "The comparison is a web page.",
            where=out,
            expected="a name that ends in .html",
            fix=f"--out {out.with_suffix('.html')}",
        )
    files = [name for name in models if Path(name).is_file()]
    places = [*(pictures or []), *map(Path, files)]
    if len(files) == len(models) or not (places or data):
        raise DeadpanError(
            "There is nothing to compare.",
            expected="one model or more, and pictures or data",
            fix="deadpan compare MODEL MODEL --pictures FOLDER",
        )
    if prompt is not None and not places:
        raise DeadpanError(
            "The records of DATA have questions of their own.",
            where=f"--prompt {prompt}",
            fix="leave it out, or name --pictures to ask it about",
        )
    found = find_pictures(places, prompt or PROMPT)
    if places and not found.questions:
        raise DeadpanError(
            "None of the pictures can be opened.",
            where=found.broken[0].where,
            found=found.broken[0].what,
        )
    plan = Plan(
        tellers([name for name in models if name not in files]),
        found,
        GenerationSettings(max_new_tokens, temperature, top_p, seed),
        samples,
        data,
        () if data is None else load_records(data, images),
        device,
        dtype,
        quantization,
        max_tiles,
        title,
        "zh" if _is_chinese(language) else "en",
    )
    try:
        columns = put_side_by_side(plan, out, lambda label: lambda stage: bar(f"{label}: {stage}"))
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    if data is not None:
        print_figures({c.teller.label: c.evaluation for c in columns if c.evaluation is not None})
    for note in (note for column in columns for note in column.teller.notes):
        typer.secho(f"note: {note.en}", fg=typer.colors.YELLOW, err=True)
    for error in found.broken:
        typer.secho(f"not asked about: {error}", fg=typer.colors.RED, err=True)
    typer.echo(f"wrote {out}")
    if found.broken:
        raise typer.Exit(1)


def _is_chinese(language: Language) -> bool:
    if language is not Language.AUTO:
        return language is Language.ZH
    # In the order in which a POSIX system asks them.
    chosen = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return chosen.startswith("zh")
