"""`deadpan export`."""

from pathlib import Path
from typing import Annotated

import typer

from deadpan.cli import hints


def export(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run folder, one of its checkpoints, or any model."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    layout: Annotated[
        str,
        typer.Option(
            help="hf (transformers, vLLM, LMDeploy), official (InternVLChatModel), or adapter (PEFT)."
        ),
    ] = "hf",
    dtype: Annotated[
        str, typer.Option(help="stored (as the base's files), bf16, fp16 or fp32.")
    ] = "stored",
    base: Annotated[
        str | None, typer.Option(help="For an adapter whose base model has moved: where it is now.")
    ] = None,
    merge_into: Annotated[
        str,
        typer.Option(
            help="After QLoRA: original (the base's own weights), or trained (what its 4-bit weights "
            "stood for: the model exactly as it was in training)."
        ),
    ] = "original",
    official_files: Annotated[
        Path | None,
        typer.Option(
            help="For --layout official from an hf base: a folder with the official config.json and files."
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="The largest difference of logits to accept; by default what rounding explains."
        ),
    ] = None,
) -> None:
    """Write a model that other tools load, and prove that it is the one that was trained.

    The adapter is merged into the base model's own weights. The result is reloaded in a fresh
    process and its logits on a probe are compared with the adapter on its base; the figures go to
    export.json. Beyond the limit the export fails and leaves nothing behind. Template, tile policy
    and stop token travel in the folder, so serving it needs no flags.

    Example: deadpan export runs/first first-merged --layout hf
    """
    from deadpan.checkpoints.export import export as run_export
    from deadpan.cli.progress import bar

    with bar("exporting") as progress:
        report = run_export(
            source,
            out,
            layout,
            dtype=dtype,
            base=base,
            merge_into=merge_into,
            official_files=official_files,
            limit=limit,
            progress=progress,
        )
    typer.echo(f"wrote {out} ({layout})")
    typer.echo(
        "reloaded in a fresh process: logits within "
        f"{report['max_logit_difference']:.3g} of the source (limit {report['limit']:.3g}; "
        f"rounding to {report['dtype']} alone moves them by {report['rounding_alone']:.3g}), "
        f"same likeliest token at {report['same_argmax']:.1%} of positions"
    )
    if report["as_trained"] is not None:
        trained = report["as_trained"]
        typer.echo(
            f"in training the base was {trained['quantization']}: from that model the export differs "
            f"by {trained['max_logit_difference']:.3g}, same likeliest token at "
            f"{trained['same_argmax']:.1%}; --merge-into trained would keep it"
        )
    typer.echo(hints.hear(out))
