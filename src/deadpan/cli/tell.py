"""`deadpan tell`."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer


def tell(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder, a run folder, or a Hub id such as OpenGVLab/InternVL2-2B."
        ),
    ],
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE...", help="One or more pictures.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The question; by default the one of CLoT_cn_2000: 请你根据这张图片，讲一个脑洞大开的梗"
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "-n", help="Jokes a picture; more than one needs --temperature.")
    ] = 1,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest answer; about 0.8: varied ones.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw among the likeliest tokens that together have this probability."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of a joke.")] = 128,
    max_tiles: Annotated[
        int | None,
        typer.Option(help="The most tiles a picture is cut into; by default the checkpoint's own."),
    ] = None,
    attention: Annotated[str, typer.Option(help="auto, eager, sdpa, flash or varlen.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (bf16 on a GPU, else fp32), bf16, fp16 or fp32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    quantization: Annotated[str, typer.Option(help="none or nf4.")] = "none",
    base: Annotated[
        str | None, typer.Option(help="For an adapter whose base model has moved: where it is now.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a joke.")] = False,
) -> None:
    """Show pictures to a model and print what it says.

    Example: deadpan tell OpenGVLab/InternVL2-2B dog.jpg cat.png -n 3 --temperature 0.8 --seed 1
    """
    from deadpan.cli.progress import bar
    from deadpan.data.records import PROMPT
    from deadpan.engines.base import GenerationSettings
    from deadpan.teller import load

    settings = GenerationSettings(max_new_tokens, temperature, top_p, seed)
    with bar("loading weights") as progress:
        teller = load(
            model,
            device=device,
            dtype=dtype,
            attention=attention,
            quantization=quantization,
            max_tiles=max_tiles,
            base=base,
            progress=progress,
        )
    groups = teller.jokes(pictures, prompt or PROMPT, n=n, settings=settings)
    for picture, group in zip(pictures, groups, strict=True):
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
            elif len(pictures) > 1:
                typer.echo(f"{picture}: {joke.text}")
            else:
                typer.echo(joke.text)
