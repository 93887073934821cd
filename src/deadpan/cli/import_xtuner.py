"""`deadpan import-xtuner`."""

from pathlib import Path
from typing import Annotated

import typer

from deadpan.cli import hints


def import_xtuner(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="ITER.pth", help="A LoRA checkpoint of XTuner 0.1, file or folder."),
    ],
    out: Annotated[
        Path, typer.Argument(help="The adapter folder to write; it must not exist yet.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model it was trained from: a folder or a Hub id; else what the config says.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.py",
            help="The config it was trained with; read, never run. Needed where the checkpoint has none in it.",
        ),
    ] = None,
    r: Annotated[
        int | None, typer.Option("--r", min=1, help="The rank, to be compared with the weights'.")
    ] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, help="The LoRA's lora_alpha, if there is no config.")
    ] = None,
) -> None:
    """Turn a LoRA that XTuner trained into an adapter for tell, evaluate and export.

    Nothing in the checkpoint is run. LoRA and projector get the names and shapes of deadpan's own adapters; a LoRA
    on a fused wqkv becomes one each on q, k and v, which together are the same.

    Example: deadpan import-xtuner iter_2000.pth old-teller --base OpenGVLab/InternVL2-2B
    """
    from deadpan.checkpoints.xtuner import import_xtuner as run_import

    made = run_import(checkpoint, out, base=base, config=config, r=r, lora_alpha=lora_alpha)
    typer.echo(f"wrote {out}: an adapter for {made.base}")
    typer.echo(
        f"LoRA of {made.layers} layers, r {made.r}, lora_alpha {made.lora_alpha} (from {made.source}), "
        f"on {', '.join(made.targets)}; and the projector"
    )
    if made.quantization == "nf4":
        typer.echo(
            "it was trained on the base in NF4; deadpan export says how far that is from the base itself"
        )
    typer.echo(
        "XTuner trained it with a system sentence of its own; here it is asked with the base model's"
    )
    typer.echo(hints.hear(out))
