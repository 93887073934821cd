"""`deadpan tell`."""

import json as json_module
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deadpan.cli.options import (
    Attention,
    Device,
    Dtype,
    Engine,
    MaxTiles,
    Quantization,
    Temperature,
    TopP,
)

if TYPE_CHECKING:
    from deadpan.engines.base import GenerationSettings


def tell(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder, a run folder, or a Hub id such as OpenGVLab/InternVL2-2B."
        ),
    ],
    pictures: Annotated[
        list[Path] | None, typer.Argument(metavar="PICTURE...", help="One or more pictures.")
    ] = None,
    many: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            metavar="DIR|FILE",
            help="In place of PICTURE: all pictures of a folder, or of a file with a JSON object a "
            'line, {"image": ..., "id": optional, "prompt": optional}, or of a file of records.',
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="With --pictures: where the answers go, a line a picture. The same command goes on "
            "with a file that is there.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="With --pictures FILE: the folder that its picture paths start from; by default its own."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Answers computed at once, fewer of which take less memory; by default 32 on a GPU, 8 on a "
            "CPU, and 64 with vllm and lmdeploy.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The question; by default the one of CLoT_cn_2000: 请你根据这张图片，讲一个脑洞大开的梗"
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "-n", help="Jokes a picture; more than one needs --temperature.")
    ] = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of a joke.")] = 128,
    engine: Engine = "builtin",
    max_tiles: MaxTiles = None,
    attention: Attention = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantization = "none",
    base: Annotated[
        str | None, typer.Option(help="For an adapter whose base model has moved: where it is now.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a joke.")] = False,
) -> None:
    """Show pictures to a model and print what it says.

    Example: deadpan tell OpenGVLab/InternVL2-2B dog.jpg cat.png -n 3 --temperature 0.8 --seed 1

    With --pictures and --out it answers a whole folder or file and writes each answer at once. Killed,
    it goes on where it was, with the same command: nothing is lost and nothing told twice. Broken
    pictures are left out and listed in FILE.broken.jsonl; once they are mended, the same command tells
    them too. On several GPUs or hosts that see the same files, start it with torchrun.

    Example: torchrun --nproc-per-node 2 --no-python deadpan tell runs/first --pictures photos --out jokes.jsonl
    """
    from deadpan.cli.progress import bar
    from deadpan.data.records import PROMPT
    from deadpan.engines.base import GenerationSettings
    from deadpan.engines.concurrent import ConcurrentEngine
    from deadpan.teller import load

    if bool(pictures) == (many is not None):
        raise typer.BadParameter("give either PICTURE... or --pictures")
    if (many is None) != (out is None):
        raise typer.BadParameter("--pictures and --out go together")
    if many is None and images is not None:
        raise typer.BadParameter("--images goes with --pictures")
    if many is not None and json:
        raise typer.BadParameter("--json goes with PICTURE...; --out writes JSON anyway")
    settings = GenerationSettings(max_new_tokens, temperature, top_p, seed)
    options: dict[str, Any] = {
        "engine": engine,
        "dtype": dtype,
        "attention": attention,
        "quantization": quantization,
        "max_tiles": max_tiles,
        "base": base,
        "batch_size": batch_size or (None if engine == "builtin" else ConcurrentEngine.batch_size),
    }
    if many is not None and out is not None:
        _tell_many(model, many, images, out, prompt or PROMPT, n, settings, device, options)
        return
    with bar("loading weights") as progress:
        teller = load(model, device=device, **options, progress=progress)
    shown = pictures or []
    groups = teller.jokes(shown, prompt or PROMPT, n=n, settings=settings)
    teller.close()
    for picture, group in zip(shown, groups, strict=True):
        for joke in group:
            if json:
                line = {
                    "picture": str(picture),
                    "text": joke.text,
                    "prompt_tokens": joke.prompt_tokens,
                    "tokens": joke.tokens,
                    "finish_reason": joke.finish_reason,
                }
                typer.echo(json_module.dumps(line, ensure_ascii=False))
            elif len(shown) > 1:
                typer.echo(f"{picture}: {joke.text}")
            else:
                typer.echo(joke.text)


def _tell_many(
    model: str,
    many: Path,
    images: Path | None,
    out: Path,
    prompt: str,
    n: int,
    settings: "GenerationSettings",
    device: str,
    options: dict[str, Any],
) -> None:
    from deadpan.batch.pictures import find
    from deadpan.batch.run import tell_all
    from deadpan.checkpoints.digest import weights_digest
    from deadpan.cli.progress import bar
    from deadpan.engines.base import Engine
    from deadpan.engines.builtin import batch_size_for
    from deadpan.teller import check_number, load
    from deadpan.train.launcher import one_of_a_host_tells
    from deadpan.train.processes import Processes

    with one_of_a_host_tells():
        check_number(n, settings)
    processes = Processes(device)
    items = processes.lead(lambda: find(many, prompt, images))
    weights = processes.lead(lambda: weights_digest(model, options["base"]))
    same = ["dtype", "quantization", "max_tiles"]
    if options["engine"] != "builtin":
        same.append("engine")
    decisive = {"weights": weights, "prompt": prompt, **{key: options[key] for key in same}}
    leads = processes.rank == 0

    def engine() -> Engine:
        with bar("loading weights", shown=leads) as loading:
            place = str(processes.device) if processes.world > 1 else device
            teller = load(model, device=place, **options, progress=loading)
        stack.callback(teller.close)
        return teller.engine

    size = options["batch_size"] or batch_size_for(processes.device)
    with ExitStack() as stack, bar("telling", shown=leads) as telling:
        summary = tell_all(*(items, engine, out, settings, decisive, processes, n, size), telling)
    if not leads:
        return
    typer.echo(f"{out}: {summary.told:,} answered, {summary.new:,} of them now")
    if summary.broken:
        typer.echo(f"left out as broken: {len(summary.broken):,}, listed in {summary.listed}")
