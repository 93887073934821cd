"""Weight files: one or many shards, safetensors or (read only) PyTorch pickles without code."""

import json
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deadpan.errors import DeadpanError
from deadpan.processing.tokenizer import read_json

_CANDIDATES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARD_BYTES = 5 * 10**9
_SAFETENSORS_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WeightFiles:
    """The weights of a checkpoint folder, read tensor by tensor.

    Args:
        folder: The checkpoint folder.

    Raises:
        DeadpanError: If there are no weights, a shard is missing, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = next((folder / name for name in _CANDIDATES if (folder / name).exists()), None)
        if found is None:
            raise DeadpanError(
                "The checkpoint has no weights.",
                where=folder,
                expected="one of " + ", ".join(_CANDIDATES),
                fix="download it again, whole",
            )
        self._handles: dict[Path, Any] = {}
        if found.name.endswith(".index.json"):
            weight_map = read_json(found).get("weight_map")
            if not isinstance(weight_map, dict):
                raise DeadpanError(
                    "The index of the weights lacks its weight_map.",
                    where=found,
                    fix="download the checkpoint again",
                )
            self._file_of = {key: folder / name for key, name in weight_map.items()}
        else:
            self._file_of = dict.fromkeys(self._open(found).keys(), found)

    def _open(self, path: Path) -> Any:
        if path in self._handles:
            return self._handles[path]
        if not path.exists():
            raise DeadpanError(
                "A shard of the weights is missing.",
                where=path,
                fix="download the checkpoint again",
            )
        damaged = DeadpanError(
            "The weight file is damaged.",
            where=path,
            found=f"{path.stat().st_size:,} bytes",
            fix="download it again (a Git LFS pointer file of some hundred bytes is a common cause)",
        )
        try:
            if path.suffix == ".safetensors":
                handle: Any = safe_open(path, framework="pt")
            else:
                handle = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise DeadpanError(
                "The weight file is a pickle that holds code or other objects, and was not read.",
                where=path,
                expected="tensors only",
                fix="use a checkpoint in safetensors",
            ) from None
        except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
            damaged.found = f"{damaged.found}; {str(error).splitlines()[0]}"
            raise damaged from None
        self._handles[path] = handle
        return handle

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._file_of)

    def stored_type(self) -> str:
        """The type that most tensors are stored in, as safetensors writes it (F32, BF16, F16)."""
        counts: dict[str, int] = {}
        for key, path in self._file_of.items():
            handle = self._open(path)
            if isinstance(handle, dict):
                kind = {v: k for k, v in _SAFETENSORS_TYPES.items()}.get(handle[key].dtype, "other")
            else:
                kind = handle.get_slice(key).get_dtype()
            counts[kind] = counts.get(kind, 0) + 1
        return max(counts, key=lambda kind: counts[kind])

    def read(self, key: str) -> torch.Tensor:
        """One tensor, on the CPU, in the type it is stored in."""
        path = self._file_of[key]
        handle = self._open(path)
        try:
            return handle[key] if isinstance(handle, dict) else handle.get_tensor(key)
        except (KeyError, SafetensorError):
            raise DeadpanError(
                f"The index promises {key!r}, but the shard does not hold it.",
                where=path,
                fix="download the checkpoint again",
            ) from None


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as safetensors, in shards of at most shard_bytes with an index if there are several."""
    shards = list(_shards(tensors, folder, shard_bytes))
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, keys, _) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / name)
        weight_map.update(dict.fromkeys(keys, name))
    index = {
        "metadata": {"total_size": sum(size for *_, size in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int
) -> Iterator[tuple[Path, list[str], int]]:
    shard: dict[str, torch.Tensor] = {}
    size = number = 0

    def flush() -> tuple[Path, list[str], int]:
        path = folder / f"shard-{number}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes files that only their owner may read
        return path, list(shard), size

    for key, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if shard and size + tensor.nbytes > shard_bytes:
            yield flush()
            shard, size, number = {}, 0, number + 1
        shard[key] = tensor
        size += tensor.nbytes
    yield flush()


@contextmanager
def temporary_beside(out: Path, what: str) -> Iterator[Path]:
    """A folder on the same disk as `out`, removed unless it has been renamed.

    Raises:
        DeadpanError: If the disk is full or not writable.
    """
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        temporary.chmod(0o755)
        yield temporary
    except (OSError, SafetensorError) as error:
        free = f"{shutil.disk_usage(out.parent).free / 2**30:.2f} GiB free" if temporary else None
        raise DeadpanError(
            f"The {what} could not be written: {error}.", where=out, found=free
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
