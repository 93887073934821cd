"""How much memory training takes and how much there is: of the GPU, or of this process on a CPU."""

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.train import state

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")
_CPU_SHARE, _GPU_SHARE = 0.9, 0.95
"""How much of the free memory a run may plan with. The rest is for the allocator: lengths differ
from step to step, and blocks of one size do not always serve another."""
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Meter:
    """Measures the memory of one device, in bytes.

    On a GPU that is what PyTorch has allocated, which `memory_gib` in metrics.jsonl is too; on a CPU it
    is the resident memory of this process. Linux can forget a process's peak; elsewhere the peak is
    that since the process began, which may be too much and is never too little.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"

    def reset(self) -> None:
        """Give back what is not used, and measure the peak from here on."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")

    def now(self) -> int:
        """What is taken now."""
        if self._cuda:
            return torch.cuda.memory_allocated(self._device)
        return psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The most that was taken since the last reset."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        if _STATUS.exists():
            # Not getrusage's: that begins with what the process that started this one had.
            line = next(line for line in _STATUS.read_text().splitlines() if "VmHWM" in line)
            return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def available(self) -> int:
        """What this process may take in all: what it has and what is free."""
        if self._cuda:
            free, _ = torch.cuda.mem_get_info(self._device)
            return free + torch.cuda.memory_reserved(self._device)
        return self.now() + min([psutil.virtual_memory().available, *_cgroup_free()])

    def limit(self) -> int:
        """What a run may plan with: most of what is available."""
        return int(self.available() * (_GPU_SHARE if self._cuda else _CPU_SHARE))

    def beside(self) -> int:
        """On a GPU: what the CUDA context and other programs take, beside what PyTorch has."""
        if not self._cuda:
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)


def _cgroup_free() -> list[int]:
    """What a container's limit leaves; nothing where there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = (_CGROUP / "memory.stat").read_text().split()
    except OSError:
        return []
    if limit == "max":
        return []
    # Files read before are in the count and give way.
    cached = int(statistics[statistics.index("inactive_file") + 1])
    return [max(0, int(limit) - used + cached)]


def ran_out(error: RuntimeError) -> bool:
    """Whether PyTorch says that there was no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in _OUT_OF_MEMORY)


@contextmanager
def explained(recipe: Recipe, run: Path, tiles: int) -> Iterator[None]:
    """Turn running out of memory into one message that says what to change.

    Args:
        recipe: The run's recipe.
        run: Its folder.
        tiles: The tile limit in force.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        found = str(error).splitlines()[0]
        raise DeadpanError(
            "The memory ran out.", where=run, found=found, fix=_fix(recipe, run, tiles)
        ) from None


def _fix(recipe: Recipe, run: Path, tiles: int) -> str:
    alike, other = remedies(recipe, tiles)
    saved = state.checkpoints(run)
    if not saved:
        cures = " or ".join([*alike, *other])
        return (
            f"set {cures or 'a smaller model'}; deadpan train RECIPE --dry-run measures what fits"
        )
    return (
        f"{saved[-1].name} is intact: deadpan train {run / 'recipe.yaml'} --resume goes on from it"
        + (f", with {' or '.join(alike)}" if alike else "")
        + (f"; a new run may also set {' or '.join(other)}" if other else "")
    )


def remedies(recipe: Recipe, tiles: int) -> tuple[list[str], list[str]]:
    """The recipe keys that save memory, as they would be written on the command line.

    Args:
        recipe: The recipe as it is.
        tiles: The tile limit in force.

    Returns:
        Those that train the same, so that a run may be resumed with them; and those that do not.
    """
    alike = []
    if not recipe.gradient_checkpointing:
        alike.append("gradient_checkpointing=true")
    size = recipe.micro_batch_size
    if size == "auto":
        size = recipe.effective_batch_size
    smaller = [n for n in divisors(recipe.effective_batch_size) if n < size]
    if smaller:
        alike.append(cut(smaller[-1], recipe.effective_batch_size))
    other = ["quantization=nf4"] if recipe.quantization == "none" else []
    return alike, [*other, *([f"max_tiles={tiles // 2}"] if tiles > 1 else [])]


def divisors(samples: int) -> list[int]:
    """The micro-batch sizes that cut a step of so many samples evenly, smallest first."""
    return [size for size in range(1, samples + 1) if samples % size == 0]


def cut(size: int, samples: int) -> str:
    """How a step of so many samples is cut into micro-batches of a size, as recipe keys."""
    return f"micro_batch_size={size} gradient_accumulation_steps={samples // size}"
