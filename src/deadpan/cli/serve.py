"""`deadpan serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deadpan.cli.options import Attention, Device, Dtype, Engine, MaxTiles, Quantization

if TYPE_CHECKING:
    from deadpan.engines import base


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoint folders, run folders, Hub ids or nano; NAME=MODEL gives one a name of its own.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="DEADPAN_API_KEY",
            help="What requests must carry as bearer token; in the environment it is hidden from `ps`.",
        ),
    ] = None,
    allow_remote_images: Annotated[
        bool,
        typer.Option(
            "--allow-remote-images",
            help="Fetch pictures by http(s) from public addresses; else requests hold them.",
        ),
    ] = False,
    queue: Annotated[
        int,
        typer.Option(min=8, help="Questions that may wait for one model; more are refused (429)."),
    ] = 64,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Questions answered at once; by default 32 on a GPU, 8 on a CPU, and 64 with vllm and "
            "lmdeploy.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds from a question to the end of its answer.")
    ] = 120.0,
    max_picture_mb: Annotated[
        int, typer.Option(min=1, help="The most MiB of a picture file.")
    ] = 10,
    max_megapixels: Annotated[
        int, typer.Option(min=1, max=178, help="The most megapixels of a picture.")
    ] = 20,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Whether to serve the web page, at /.")
    ] = True,
    votes: Annotated[
        Path,
        typer.Option(
            metavar="FILE.db",
            help="The page's votes, once there are two models; their pictures lie in a folder beside it.",
        ),
    ] = Path("votes.db"),
    runs: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Run folders that the page shows, if there is such a folder."
        ),
    ] = Path("runs"),
    engine: Engine = "builtin",
    max_tiles: MaxTiles = None,
    attention: Attention = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantization = "none",
) -> None:
    """Serve models: a web page at /, and OpenAI's API under /v1 (chat completions with pictures, streams, models).

    On the page tellers tell side by side; two of them, unnamed, are voted on; and training runs are shown.
    Given an API key, the page asks for it as a password.

    SIGTERM or Ctrl-C stops it: it takes nothing new, and answers what it has been asked.

    Example: deadpan serve base=OpenGVLab/InternVL2-2B tuned=runs/first --port 8000

    vLLM and LMDeploy take no settings: template, tile policy and stop token are in the export.

    Example: deadpan serve exports/first --engine vllm
    """
    from deadpan.errors import DeadpanError
    from deadpan.serve.server import listen
    from deadpan.serve.server import serve as run
    from deadpan.serve.votes import Votes

    named = _named(models)
    if api_key == "":
        raise DeadpanError(
            "The API key is empty.", where="--api-key", fix="leave it out, or give one"
        )
    # Before the models and all that they need: a mistake is to be told at once.
    listener = listen(host, port)
    database = Votes(votes) if page and len(named) > 1 else None

    from deadpan.cli.progress import bar
    from deadpan.serve.app import create_app
    from deadpan.serve.pictures import Pictures
    from deadpan.serve.remote import Remote
    from deadpan.serve.tellers import Tellers
    from deadpan.teller import load

    engines: dict[str, base.Engine] = {}
    for name, model in named.items():
        with bar(f"loading {name}") as progress:
            engines[name] = load(
                model,
                engine=engine,
                memory=0.9 / len(named),
                device=device,
                dtype=dtype,
                attention=attention,
                quantization=quantization,
                max_tiles=max_tiles,
                batch_size=batch,
                progress=progress,
            ).engine
    size = batch or max(each.batch_size for each in engines.values())
    tellers = Tellers(engines, queue, size, timeout)
    max_bytes, max_pixels = max_picture_mb * 2**20, max_megapixels * 10**6
    app = create_app(
        tellers,
        api_key=api_key,
        remote=Remote() if allow_remote_images else None,
        max_picture_bytes=max_bytes,
        max_pixels=max_pixels,
    )
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        typer.echo(f"warning: whoever reaches {host} may ask; DEADPAN_API_KEY sets a key", err=True)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    if page:
        from deadpan.serve.page import mount_page

        mount_page(
            app,
            tellers,
            Pictures(max_bytes=max_bytes, max_pixels=max_pixels),
            votes=database,
            runs=runs if runs.is_dir() else None,
            api_key=api_key,
        )
    # Last, so that whoever reads this is answered at once.
    typer.echo(f"deadpan serves {', '.join(named)} at {address}/v1 (Ctrl-C stops it)")
    if page:
        typer.echo(f"the page is at {address}/")
    run(app, listener, timeout)
    if database is not None:
        database.close()


def _named(models: list[str]) -> dict[str, str]:
    """Each model by its name: the one given, the folder's, or the Hub id."""
    from deadpan.errors import DeadpanError

    named: dict[str, str] = {}
    for text in models:
        label, equals, model = text.partition("=")
        if not equals or "/" in label:
            folder = Path(text)
            label, model = folder.resolve().name if folder.is_dir() else text, text
        if not label or not model:
            raise DeadpanError("A model or its name is empty.", found=text, expected="NAME=MODEL")
        if label in named:
            raise DeadpanError(
                f"Two models have the name {label!r}.",
                found=f"{named[label]} and {model}",
                fix=f"name one: {label}-2={model}",
            )
        named[label] = model
    return named
