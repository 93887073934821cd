"""From what a user types after `MODEL` to a folder on disk."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from deadpan import nano
from deadpan.errors import DeadpanError
from deadpan.processing.tokenizer import read_json

_TRANSPORT_ERROR: type[Exception] = vars(hub_errors)["HTTPError"]
"""The base error of the HTTP library that huggingface_hub was built on; which one differs by version."""

NEEDED_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt", "*.py"]
"""What is fetched from the Hub. Python files are carried along into official exports and never run."""


_LINKS = ("best", "latest")
"""What a run folder has beside its checkpoints; the first one that leads somewhere is the model."""


class Layout(StrEnum):
    """How a checkpoint folder is laid out."""

    OFFICIAL = "official"
    HF = "hf"
    ADAPTER = "adapter"


def resolve(model: str | Path) -> Path:
    """Find the checkpoint folder that a name stands for, downloading it if need be.

    Args:
        model: A local folder (a run folder stands for its best or else its latest checkpoint), a Hub id, or `nano`
            for the model that comes with deadpan.

    Raises:
        DeadpanError: If no name is given, or there is no such folder and the Hub has none either, or cannot be
            reached.
    """
    if str(model) == nano.MODEL:
        return nano.BASE
    if not str(model):
        # Which a path would take for the current folder.
        raise DeadpanError("The model has no name.", fix="name a folder, a run, or a Hub id")
    folder = Path(model).expanduser()
    if folder.name in _LINKS and (folder.parent / "checkpoints").is_dir():
        folder = _pointed(folder) or folder
    if folder.is_dir():
        if _is_run(folder):
            for name in _LINKS:
                if (pointed := _pointed(folder / name)) is not None:
                    return pointed
            raise DeadpanError(
                "The run has no checkpoint yet.", where=folder, fix="train it further first"
            )
        if not (folder / "config.json").exists() and (
            runs := list(filter(_is_run, _within(folder)))
        ):
            raise DeadpanError(
                "The folder holds runs, and is no model itself.",
                where=folder,
                fix=f"name one, such as {max(runs, key=lambda run: run.stat().st_mtime)}",
            )
        return folder
    # `runs/...` is where runs are by default: a typo there should not be looked up on the Hub.
    looks_local = (
        folder.is_absolute()
        or str(model).startswith((".", "~", "runs/"))
        or str(model).count("/") != 1
    )
    if looks_local:
        raise DeadpanError(
            f"There is no model {str(model)!r}.",
            expected="a checkpoint folder, a run folder, a Hub id such as OpenGVLab/InternVL2-2B, or nano",
            found=f"no folder {folder.absolute()}",
        )
    return download(str(model))


def _is_run(folder: Path) -> bool:
    # Before its first checkpoint it has a log.
    begun = (folder / "metrics.jsonl").is_file() and not (folder / "config.json").exists()
    return (folder / "checkpoints").is_dir() or begun


def _within(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def _pointed(link: Path) -> Path | None:
    """Where a run's link leads: a symbolic link, or a text file where there are none."""
    if link.is_file():
        link = link.parent / link.read_text(encoding="utf-8").strip()
    return link.resolve() if link.is_dir() else None


def download(
    repo: str, kind: Literal["model", "dataset"] = "model", folder: Path | None = None
) -> Path:
    """Fetch a repository from the Hub; what is there already is not fetched again.

    Args:
        repo: OWNER/NAME.
        kind: Of a model only what deadpan reads is fetched, of a data set everything.
        folder: Where to put it; by default the Hub's cache.

    Returns:
        The folder that holds it.

    Raises:
        DeadpanError: If the Hub has no such repository, withholds it, or cannot be reached.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    options: dict[str, Any] = {"allow_patterns": NEEDED_FILES} if kind == "model" else {}
    if kind != "model":
        options["repo_type"] = kind
    if folder is not None:
        options["local_dir"] = folder
    try:
        return Path(snapshot_download(repo, **options))
    except HFValidationError:
        raise DeadpanError(
            f"{repo!r} is neither a folder nor a valid Hub id.",
            fix="check the path, or write the id as OWNER/NAME",
        ) from None
    except GatedRepoError:
        raise DeadpanError(
            f"{repo} is gated.",
            where=endpoint,
            fix="accept its terms on the Hub, then run: hf auth login",
        ) from None
    except RepositoryNotFoundError:
        raise DeadpanError(
            f"The Hub has no {kind} {repo!r}, or it is private.",
            where=endpoint,
            fix="check the spelling; for a private one run: hf auth login",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, _TRANSPORT_ERROR, OSError) as error:
        # LocalEntryNotFoundError is also how huggingface_hub says HF_HUB_OFFLINE=1.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        flag = "" if kind == "model" else f" --repo-type {kind}"
        command = f"hf download {repo}{flag} --local-dir {Path(repo).name}"
        raise DeadpanError(
            f"There is no folder {repo!r}, and the Hub cannot be reached."
            if kind == "model" and folder is None
            else f"{repo} cannot be fetched: the Hub cannot be reached.",
            where=endpoint,
            found=reason,
            fix="set HF_ENDPOINT to a mirror, unset HF_HUB_OFFLINE, or download it elsewhere and pass the "
            f"folder: {command}",
        ) from None


def detect(folder: Path) -> Layout:
    """Tell a checkpoint folder's layout.

    Raises:
        DeadpanError: If it is none of those that deadpan reads.
    """
    if (folder / "adapter_config.json").exists():
        return Layout.ADAPTER
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or [None])[0]
    model_type = config.get("model_type")
    if architecture == "InternVLChatModel" or model_type == "internvl_chat":
        return Layout.OFFICIAL
    if architecture == "InternVLForConditionalGeneration" or model_type == "internvl":
        return Layout.HF
    raise DeadpanError(
        "The checkpoint's architecture is unknown.",
        where=folder / "config.json",
        expected="InternVLChatModel, InternVLForConditionalGeneration, or an adapter folder",
        found=str(architecture or model_type),
        fix="use an InternVL checkpoint (InternVL2, InternVL2.5, InternVL3)",
    )
