"""What the frozen vision tower sees of each picture, kept from the first epoch for all later ones.

The tower costs about a third of a step and gives the same for a picture every time. Each picture's
features are a file of their own, named by the SHA-256 of all that decides them: the picture's bytes, how
pictures are cut into tiles, the tower's weights, and the type computed in. So another picture, model or
policy finds nothing, and runs with the same share what they find. The workers that prepare samples
look first and do not decode a picture whose features are there; the operating system keeps the files in
memory as far as it has any to spare.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from deadpan.data.records import Record
from deadpan.errors import DeadpanError
from deadpan.processing.processor import Processor

_SHARE_OF_DISK = 0.5
"""The cache is not begun if it could take more of the free disk space."""


def default_folder() -> Path:
    """Where features are kept: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deadpan" / "features"


class FeatureCache:
    """Features of pictures in a folder.

    Args:
        folder: May be shared by runs of any model.
        model: Its vision tower decides the features.
        processor: So does its tile policy.
        dtype: And so does the type computed in.
    """

    def __init__(
        self,
        folder: Path,
        model: InternVLForConditionalGeneration,
        processor: Processor,
        dtype: torch.dtype,
    ) -> None:
        digest = hashlib.sha256(json.dumps(asdict(processor.tile_policy)).encode())
        digest.update(str(dtype).encode())
        for name, parameter in model.model.vision_tower.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        self.folder = folder / digest.hexdigest()[:16]

    def bytes_of(self, tiles: int, model: InternVLForConditionalGeneration) -> int:
        """What the features of so many tiles take."""
        vision = model.config.vision_config
        patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
        return tiles * patches * vision.hidden_size * model.dtype.itemsize

    def has_room(self, size: int) -> bool:
        """Whether the disk has room for so many bytes, and as much again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return size <= _SHARE_OF_DISK * shutil.disk_usage(self.folder).free

    def paths(self, record: Record) -> list[Path]:
        """The files of a record's pictures, there or not.

        Raises:
            DeadpanError: If a picture cannot be read.
        """
        paths = record.image_paths
        # Several pictures of a record are cut into fewer tiles each.
        count = str(len(paths)).encode()
        names = (hashlib.sha256(count + _content(path)).hexdigest() for path in paths)
        return [self.folder / f"{name}.safetensors" for name in names]

    def read(self, paths: Sequence[Path]) -> list[torch.Tensor] | None:
        """The features in files, each (tile, image token, channel); None if one is missing or damaged."""
        try:
            return [load_file(path)["features"] for path in paths]
        except (FileNotFoundError, SafetensorError):
            return None

    def write(self, paths: Sequence[Path], features: Sequence[torch.Tensor]) -> None:
        """Keep features that are not kept yet; a reader sees a file whole or not at all."""
        for path, tensor in zip(paths, features, strict=True):
            if not path.exists():
                temporary = path.with_name(f".{uuid.uuid4().hex}")
                save_file({"features": tensor.contiguous()}, temporary)
                temporary.replace(path)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeadpanError(f"The picture cannot be read: {error.strerror}.", where=path) from None
