"""Which weights are these?"""

import hashlib
from pathlib import Path

from deadpan.checkpoints.load import base_of
from deadpan.checkpoints.source import Layout, detect, resolve

_WHOLE = 2**26
"""Bytes up to which a file of weights is read through to tell it from others."""
_SAMPLE, _STRIDE = 2**12, 2**18
"""Of a larger one, the bytes that are read at a place, and how far apart the places are."""


def weights_digest(model: str | Path, base: str | Path | None = None) -> str:
    """Tell a model by its weights, wherever they lie: an adapter's with its base's.

    Of a large file a sample is read, at places so near one another that a merged model differs from
    its base at many of them; its first and last tensors may be the base's.
    """
    folder = resolve(model)
    told = hashlib.sha256()
    folders = [folder]
    if detect(folder) is Layout.ADAPTER:
        folders.append(base_of(folder, base))
    for place in folders:
        for path in sorted(place.iterdir()):
            if path.suffix not in (".safetensors", ".bin") and path.name != "config.json":
                continue
            size = path.stat().st_size
            told.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, _SAMPLE if size <= _WHOLE else _STRIDE):
                    file.seek(start)
                    told.update(file.read(_SAMPLE))
    return told.hexdigest()[:16]
