"""`deadpan fetch`: bring models and data sets from the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Fetch models and data from the Hugging Face Hub, or from the mirror in HF_ENDPOINT.",
    no_args_is_help=True,
)

Repo = Annotated[str, typer.Argument(metavar="ID", help="OWNER/NAME on the Hub.")]
Out = Annotated[
    Path | None, typer.Argument(help="The folder to put it in. Default: the Hub's own cache.")
]


@app.command()
def model(repo: Repo, out: Out = None) -> None:
    """Fetch a model: weights, configuration and tokenizer, nothing that would be run.

    An interrupted download goes on where it stopped. Without OUT the model
    is found again under its id: deadpan tell OpenGVLab/InternVL2-2B PICTURE.

    Example: deadpan fetch model OpenGVLab/InternVL2-2B
    """
    _fetch(repo, "model", out)


@app.command()
def data(repo: Repo, out: Out = None) -> None:
    """Fetch a data set, whole.

    Example: deadpan fetch data zhongshsh/CLoT-Oogiri-GO oogiri, then
    deadpan data import oogiri oogiri my-data --language cn --limit 2000
    """
    _fetch(repo, "dataset", out)


def _fetch(repo: str, kind: Literal["model", "dataset"], out: Path | None) -> None:
    from deadpan.checkpoints.source import download

    # The one line on stdout, so that a script can use it.
    typer.echo(download(repo, kind, out))
