"""Checkpoints that exist whole or not at all.

A checkpoint is written under a temporary name, every file is flushed to the disk and recorded with its
size and SHA-256, and then the folder is renamed: at any moment a crash leaves either the old
checkpoints or the old ones and the new one. The folder is an adapter in PEFT's format with its
processor beside it, so `deadpan tell` and PEFT read it as it stands; `state.pt` and `state.json` hold
what only resuming needs.
"""

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError

from deadpan.checkpoints.processor_files import save_processor
from deadpan.data.records import Record
from deadpan.errors import DeadpanError
from deadpan.evaluate.memorisation import Reading
from deadpan.models import lora
from deadpan.processing.processor import POLICY_FILE, Processor
from deadpan.train import optimizers

MANIFEST = "manifest.json"
_STATE_TENSORS, _STATE = "state.pt", "state.json"
_NEEDED = {"adapter_config.json", lora.ADAPTER_FILE, POLICY_FILE, _STATE_TENSORS, _STATE}
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without symbolic links answer."""
_NEXT_TO_NOTHING = 2**20
_NAME = re.compile(r"step-(\d{6,})")
_OLD = ".old.tmp"


@dataclass(frozen=True)
class Evaluations:
    """What the evaluations of a run have come to.

    Attributes:
        step: The step of the last one; 0 before the first.
        best: The one with the lowest held-out loss.
        since_best: How many have come after that one.
        warned: Whether the run has been found to memorise.
    """

    step: int = 0
    best: Reading | None = None
    since_best: int = 0
    warned: bool = False


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        samples: Samples seen.
        seconds: Time spent in steps.
        records: A digest of the training records, so that a resumed run meets the same ones.
        held_out: The same of the held-out records.
        evaluations: What was measured with these.
        processes: How many trained it, each with random numbers of its own.
    """

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    records: str = ""
    held_out: str = ""
    evaluations: Evaluations = Evaluations()
    processes: int = 1


def digest(records: Sequence[Record]) -> str:
    """SHA-256 over what the records say and which pictures they name."""
    told = hashlib.sha256()
    for record in records:
        told.update(repr((record.images, record.turns)).encode(errors="surrogatepass"))
        if record.rejected is not None:
            told.update(repr(record.rejected).encode(errors="surrogatepass"))
    return told.hexdigest()


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(
        (path for path in found if _NAME.fullmatch(path.name)),
        key=_step,
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def recover(run: Path) -> None:
    """Give back its name to a checkpoint that was being replaced when the run was struck down."""
    for old in (run / "checkpoints").glob(f".step-*{_OLD}"):
        final = old.with_name(old.name.removeprefix(".").removesuffix(_OLD))
        if not final.exists():
            old.rename(final)


def named(run: Path, name: str) -> Path:
    """The checkpoint that is called `step-000200`, or `200`.

    Raises:
        DeadpanError: If the run has none of that name.
    """
    found = checkpoints(run)
    wanted = f"step-{int(name):06d}" if name.isdecimal() else name
    for checkpoint in found:
        if checkpoint.name == wanted:
            return checkpoint
    raise DeadpanError(
        f"There is no checkpoint {wanted}.",
        where=run / "checkpoints",
        found=", ".join(checkpoint.name for checkpoint in found),
    )


def set_aside(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints after a step, from which the run is to go on, out of its way.

    They would pass for the newest ones otherwise, and the next new one for the oldest.

    Returns:
        Where they are now.
    """
    newer = [path for path in checkpoints(run) if _step(path) > step]
    if not newer:
        return []
    point(run / "latest", newer[0].with_name(f"step-{step:06d}"))
    aside = []
    # The newest first: struck down amid this, the same command does the rest.
    for path in reversed(newer):
        names = (f"{path.name}.aside" + f"-{n}" * (n > 1) for n in itertools.count(1))
        target = next(t for t in map(path.with_name, names) if not t.exists())
        aside.append(path.rename(target))
    return aside


def resume_command(run: Path, name: str | None = None) -> str:
    """What to type to go on with a run: from its newest checkpoint, or from the one that is named."""
    recipe = shlex.quote(str(run / "recipe.yaml"))
    return f"deadpan train {recipe} " + (f"--resume-from {name}" if name else "--resume")


def save(
    run: Path,
    position: Position,
    model: PeftModel,
    processor: Processor,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    quantization: str,
    keep: int,
    others: Sequence[dict[str, Any]] = (),
    gathered: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint, point `latest` at it, and remove the oldest beyond `keep`.

    `best` points at the checkpoint with the lowest held-out loss, which is not removed. `others` are
    the `random_state`s of the processes beside this one. `gathered` is the adapter and the optimizer's
    state, where this process has a part of them only.

    Raises:
        DeadpanError: If the disk is full or not writable; earlier checkpoints stay intact.
    """
    final = run / "checkpoints" / f"step-{position.step:06d}"
    temporary = final.with_name(f".{final.name}.tmp")
    adapter, moments = gathered or (None, optimizer.state_dict())
    try:
        _remove_leftovers(final.parent)
        temporary.mkdir(parents=True)
        tensors: dict[str, Any] = {
            "optimizer": moments,
            "scheduler": scheduler.state_dict(),
            "random": random_state(own_gpu=bool(others)),
        }
        if others:
            tensors["random_of_others"] = list(others)
        if weights := optimizers.training_weights(optimizer, model):
            tensors["training_weights"] = weights
        with optimizers.weights_to_use(optimizer):
            lora.save(model, temporary, adapter)
        save_processor(processor, temporary, trained_on=quantization)
        torch.save(tensors, temporary / _STATE_TENSORS)
        (temporary / _STATE).write_text(json.dumps(asdict(position), indent=2) + "\n")
        _write_manifest(temporary)
        if final.exists():
            # Renamed out of the way, not removed: that would take long enough to be struck by a crash.
            final.rename(final.with_name(f".{final.name}{_OLD}"))
        temporary.rename(final)
        _sync(final.parent)
        point(run / "latest", final)
        best = point_best(run, position)
    except Exception as error:
        free = shutil.disk_usage(run).free
        shutil.rmtree(temporary, ignore_errors=True)
        # A full disk is an OSError, in PyTorch's zip writer a RuntimeError, in safetensors its own
        # error, and in tokenizers an Exception without a class. Anything else is a bug: raise it.
        if (
            not isinstance(error, OSError | RuntimeError | SafetensorError)
            and type(error) is not Exception
        ):
            raise
        before = checkpoints(run)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        # "unexpected pos 138688 vs 138580", says PyTorch.
        full = free < _NEXT_TO_NOTHING and not isinstance(error, OSError)
        raise DeadpanError(
            f"The checkpoint of step {position.step} could not be written: "
            f"{'the disk is full' if full else reason}.",
            where=final,
            found=f"{free / 2**20:.1f} MiB free",
            fix=f"free some space, then {resume_command(run)}; "
            + (f"{before[-1].name} is intact" if before else "there is no earlier checkpoint"),
        ) from None
    for old in checkpoints(run)[:-keep]:
        if old == best:
            continue
        # Renamed first: a crash amid the removal must not leave half a checkpoint under a good name.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))
    return final


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def point_best(run: Path, position: Position) -> Path | None:
    """Point `best` at the checkpoint with the lowest held-out loss, if there is one; returns it."""
    best = position.evaluations.best
    target = None if best is None else run / "checkpoints" / f"step-{best.step:06d}"
    if target is None or not target.is_dir():
        (run / "best").unlink(missing_ok=True)
        return None
    point(run / "best", target)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _write_manifest(folder: Path) -> None:
    manifest = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is either as before or complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    except OSError:
        # What there is of it takes space, and space may be what is wanting.
        temporary.unlink(missing_ok=True)
        raise


def point(link: Path, target: Path) -> None:
    """Make a relative symbolic link, replacing an old one in one step.

    Where there are no symbolic links, a text file with the relative path takes its place, which
    `deadpan.checkpoints.source.resolve` reads too.
    """
    path = target.relative_to(link.parent)
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        temporary.write_text(path.as_posix() + "\n", encoding="utf-8")
        _sync(temporary)
    temporary.replace(link)


def verify(checkpoint: Path) -> None:
    """Compare a checkpoint's files with what was recorded when it was written.

    Raises:
        DeadpanError: If a file is missing or has changed.
    """
    damage = _damage(checkpoint)
    if damage is None:
        return
    run = checkpoint.parent.parent
    others = [path for path in reversed(checkpoints(run)) if path != checkpoint]
    whole = next((path.name for path in others if _damage(path) is None), None)
    damage.fix = (
        f"{resume_command(run, whole)} goes on from the newest whole checkpoint and deletes none"
        if whole
        else "no other checkpoint is whole: start a new run with run=runs/NAME"
    )
    raise damage


def _damage(checkpoint: Path) -> DeadpanError | None:
    """What is wrong with a checkpoint's files."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        manifest = None
    sound = isinstance(manifest, dict) and all(
        isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}
        for entry in manifest.values()
    )
    if not (sound and manifest.keys() >= _NEEDED):
        return DeadpanError("The checkpoint's manifest is damaged.", where=checkpoint / MANIFEST)
    for name, recorded in manifest.items():
        path = checkpoint / name
        found = _digest(path) if path.is_file() else None
        if found != recorded:
            return DeadpanError(
                "The checkpoint is damaged.",
                where=path,
                expected=_in_words(recorded),
                found="no such file" if found is None else _in_words(found),
            )
    return None


def _in_words(entry: dict[str, Any]) -> str:
    return f"{entry['bytes']} bytes, SHA-256 {str(entry['sha256'])[:16]}..."


def restore_weights(checkpoint: Path, model: PeftModel) -> None:
    """Give a model the weights that training goes on from, of a verified checkpoint."""
    lora.load_state(model, checkpoint)
    # Mapped, not read: the optimizer's state is not wanted yet.
    tensors = _tensors(checkpoint, mmap=True)
    optimizers.put_training_weights(model, tensors.get("training_weights", {}))


def restore(
    checkpoint: Path,
    load_optimizer: Callable[[dict[str, Any]], None],
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    rank: int = 0,
) -> Position:
    """Put the rest of a run back to where a verified checkpoint left it, random numbers of this process included."""
    tensors = _tensors(checkpoint)
    load_optimizer(tensors["optimizer"])
    scheduler.load_state_dict(tensors["scheduler"])
    set_random_state(tensors["random_of_others"][rank - 1] if rank else tensors["random"])
    return position(checkpoint)


def _tensors(checkpoint: Path, mmap: bool = False) -> dict[str, Any]:
    path = checkpoint / _STATE_TENSORS
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def position(checkpoint: Path) -> Position:
    """How far the run of a verified checkpoint had come."""
    values = json.loads((checkpoint / _STATE).read_text())
    evaluations = dict(values.get("evaluations", {}))
    if evaluations.get("best") is not None:
        evaluations["best"] = Reading(**evaluations["best"])
    return Position(**{**values, "evaluations": Evaluations(**evaluations)})


def random_state(own_gpu: bool = False) -> dict[str, Any]:
    """Where all random number generators stand: those of all GPUs, or of this process's own."""
    cuda: list[torch.Tensor] = []
    if torch.cuda.is_available():
        cuda = [torch.cuda.get_rng_state()] if own_gpu else torch.cuda.get_rng_state_all()
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [str(kind), [int(k) for k in keys], int(place), int(has_gauss), float(gauss)],
        "python": [version, list(numbers), gauss_next],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put them back to where they stood."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == 1:
        # Of a process among several, which may have another of the GPUs when it is resumed.
        torch.cuda.set_rng_state(state["cuda"][0])
    elif state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
