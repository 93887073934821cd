"""Options that several verbs have: how a teller is loaded, and how it draws."""

from pathlib import Path
from typing import Annotated

import typer

MaxTiles = Annotated[
    int | None,
    typer.Option(help="The most tiles a picture is cut into; by default the checkpoint's own."),
]
Attention = Annotated[str, typer.Option(help="auto, eager, sdpa, flash or varlen.")]
Dtype = Annotated[str, typer.Option(help="auto (bf16 on a GPU, else fp32), bf16, fp16 or fp32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Quantization = Annotated[str, typer.Option(help="none, nf4 or fp8.")]
Engine = Annotated[
    str,
    typer.Option(
        help="builtin, or vllm or lmdeploy, which load exports (deadpan export) on a GPU and are "
        "installed with deadpan[vllm] or deadpan[lmdeploy]."
    ),
]
Temperature = Annotated[
    float, typer.Option(help="0: always the likeliest answer; about 0.8: varied ones.")
]
TopP = Annotated[
    float, typer.Option(help="Draw among the likeliest tokens that together have this probability.")
]
DataImages = Annotated[
    Path | None, typer.Option(help="The folder that DATA's picture paths start from.")
]
