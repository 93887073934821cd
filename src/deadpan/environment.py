"""What this machine and this installation can do: versions, devices, kernels, disk.

`describe` is what a run folder records; the rest answers `deadpan doctor`. Heavy packages are
imported where a function needs them.
"""

import importlib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

GIB = 2**30

INSTALL = {
    "vllm": "pip install 'deadpan[vllm]'",
    # Its own list of requirements has an older peft than training needs.
    "lmdeploy": "pip install 'deadpan[lmdeploy]' && pip install --no-deps lmdeploy==0.18.0",
}
"""How each engine's package is installed."""


def describe() -> dict[str, Any]:
    """What a result depends on beside its recipe, ready for JSON."""
    return {
        "versions": versions(),
        "devices": devices(),
        "git_revision": git_revision(),
        "command": shlex.join(sys.argv),
    }


def versions() -> dict[str, str | None]:
    """The versions of Python, deadpan and what deadpan requires; None for what is missing."""
    packages = ["deadpan", *requirements()]
    return {"python": platform.python_version()} | {name: installed(name) for name in packages}


def requirements() -> dict[str, str]:
    """The packages that deadpan requires, with version ranges; empty if it is not installed."""
    try:
        lines = metadata.requires("deadpan") or []
    except metadata.PackageNotFoundError:
        return {}
    pairs = [re.fullmatch(r"([\w.-]+)\s*([^;]*)", line) for line in lines]
    return {pair[1]: pair[2] for pair in pairs if pair}


def installed(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def import_trouble(module: str) -> str | None:
    """Why a module cannot be imported, or None if it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        # A compiled package raises the last two when its libraries are missing or do not match.
        return str(error)
    return None


def devices() -> dict[str, Any]:
    """The processors that PyTorch can compute on, with their memory in GiB."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": {
            "name": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
            "cores": usable_cores(),
            "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        },
        "cuda": [
            {
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / GIB, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
            }
            for gpu in gpus
        ],
        "cuda_runtime": torch.version.cuda,
        "mps": torch.backends.mps.is_available(),
    }


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    # In a container or under taskset, fewer than the machine has; not every system can tell.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def best_device() -> str:
    """`cuda` if PyTorch sees a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def git_revision() -> str | None:
    """The commit checked out in the current directory, `-dirty` after it if files differ from it.

    None outside a repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def computes_bf16(device: str) -> bool:
    """Whether the device has bfloat16 arithmetic of its own, rather than by way of float32."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def sdpa_kernels(device: str) -> dict[str, bool]:
    """Which kernels of PyTorch's scaled-dot-product attention run here, found by running each."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
    query = torch.zeros(1, 2, 64, 64, device=device, dtype=dtype)
    runs = {}
    for name, kernel in kernels.items():
        with warnings.catch_warnings(), sdpa_kernel(kernel):
            # PyTorch warns about every reason why a kernel does not fit; the answer is enough.
            warnings.simplefilter("ignore")
            try:
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
                runs[name] = True
            except RuntimeError:
                runs[name] = False
    return runs


def nf4_error(device: str) -> float:
    """The relative error of a small matrix product whose weight bitsandbytes holds in NF4.

    Raises:
        RuntimeError: If bitsandbytes cannot do it here.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).to(device)
    inputs = torch.randn(4, 128, generator=generator).to(device)
    try:
        import bitsandbytes
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, quant_type="nf4")
        outputs = bitsandbytes.matmul_4bit(inputs, packed.t(), quant_state=state)
    except (ImportError, OSError, AttributeError, AssertionError, ValueError) as error:
        # What its loader and its missing native functions raise, beside RuntimeError.
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    plain = inputs @ weight.t()
    return float((outputs - plain).norm() / plain.norm())


def free_memory_gib(index: int) -> float:
    """The free memory of a GPU; NaN if it cannot be asked, as when a process holds it alone."""
    import torch

    try:
        return torch.cuda.mem_get_info(index)[0] / GIB
    except RuntimeError:
        return math.nan


def free_disk_gib(folder: Path) -> float:
    """The free space where a folder is, or would be."""
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(existing).free / GIB
