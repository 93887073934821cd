"""`deadpan doctor`: what works on this machine, and how to mend what does not."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

LOW_DISK_GIB = 20
NF4_TOLERANCE = 0.15
"""Rounding normal weights to NF4 changes a product by about 0.09; more means a broken kernel."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "warning", "missing"]
    value: str
    fix: str | None = None
    required: bool = False
    """Whether deadpan cannot work until it is mended."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check this machine: packages, devices, attention kernels, quantization, disk, engines.

    The exit code is 1 if something that deadpan requires is missing, else 0.
    """
    from deadpan import environment

    sections = examine()
    healthy = not any(
        check.required and check.status == "missing"
        for checks in sections.values()
        for check in checks
    )
    if as_json:
        report = {
            "ok": healthy,
            "sections": {
                title: [asdict(check) for check in checks] for title, checks in sections.items()
            },
            "environment": environment.describe() if healthy else None,
        }
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print(sections)
    if not healthy:
        raise typer.Exit(1)


def examine() -> dict[str, list[Check]]:
    """Every check, by section."""
    from deadpan import environment

    sections = {"Packages": _packages()}
    if trouble := environment.import_trouble("torch"):
        fix = "pip install --force-reinstall torch"
        sections["Devices"] = [Check("PyTorch", "missing", trouble, fix, required=True)]
    else:
        device = environment.best_device()
        sections["Devices"] = _devices()
        sections["Attention"] = _attention(device)
        sections["Precision"] = _precision(device)
    if not environment.import_trouble("huggingface_hub"):
        sections["Disk and Hub"] = _disk_and_hub()
    sections["Engines"] = _engines()
    return sections


def _packages() -> list[Check]:
    from packaging.specifiers import SpecifierSet

    from deadpan import environment

    needed = environment.requirements()
    checks = [
        Check(name, "ok", version)
        for name, version in environment.versions().items()
        if version and name not in needed
    ]
    if not needed:
        fix = "pip install -e . in deadpan's folder"
        checks.append(Check("requirements", "warning", "deadpan is not installed", fix))
    for name, versions in needed.items():
        version = environment.installed(name)
        fix = f"pip install '{name}{versions}'"
        if version is None:
            checks.append(Check(name, "missing", "not installed", fix, required=True))
        elif not SpecifierSet(versions).contains(version, prereleases=True):
            value = f"{version}, but deadpan needs {versions}"
            checks.append(Check(name, "missing", value, fix, required=True))
        else:
            checks.append(Check(name, "ok", version))
    return checks


def _devices() -> list[Check]:
    import shutil

    from deadpan import environment

    devices = environment.devices()
    cpu = devices["cpu"]
    value = f"{cpu['name']}, {cpu['cores']} cores, {cpu['memory_gib']} GiB"
    checks = [Check("CPU", "ok", value)]
    for index, gpu in enumerate(devices["cuda"]):
        free = environment.free_memory_gib(index)
        value = f"{gpu['name']}, {gpu['memory_gib']} GiB, {free:.1f} GiB free"
        checks.append(Check(f"cuda:{index}", "ok", f"{value}, capability {gpu['capability']}"))
    if not devices["cuda"] and shutil.which("nvidia-smi"):
        build = f"CUDA {devices['cuda_runtime']}" if devices["cuda_runtime"] else "the CPU only"
        value = f"there is an NVIDIA driver, but PyTorch, built for {build}, sees no GPU"
        fix = "run nvidia-smi; then install the PyTorch build for that driver's CUDA version"
        checks.append(Check("CUDA", "warning", value, fix))
    elif not devices["cuda"]:
        fix = "small models run on the CPU; for InternVL2, take a machine with an NVIDIA GPU"
        checks.append(Check("CUDA", "missing", "no GPU", fix))
    if devices["mps"]:
        checks.append(Check("MPS", "warning", "present, but deadpan does not use it"))
    return checks


def _attention(device: str) -> list[Check]:
    from importlib.util import find_spec

    from deadpan import environment

    checks = [Check("eager", "ok", "plain PyTorch")]
    runs = environment.sdpa_kernels(device)
    working = ", ".join(name for name, works in runs.items() if works)
    checks.append(Check("sdpa", "ok", f"kernels that run on {device}: {working}"))
    if device == "cuda" and not runs["flash"]:
        fix = "it needs a GPU of capability 8.0 or more; attention=sdpa works without it"
        checks.append(Check("sdpa: flash", "missing", "does not run on this GPU", fix))
    if find_spec("torch.nn.attention.varlen"):
        checks.append(Check("varlen", "ok", "torch.nn.attention.varlen is there"))
    else:
        fix = "pip install --upgrade torch"
        checks.append(Check("varlen", "missing", "this PyTorch has no variable-length kernel", fix))
    if version := environment.installed("flash-attn"):
        checks.append(Check("flash-attn", "ok", version))
    else:
        fix = "not needed: PyTorch brings a flash kernel; else pip install flash-attn"
        checks.append(Check("flash-attn", "missing", "not installed", fix))
    return checks


def _precision(device: str) -> list[Check]:
    from deadpan import environment

    if environment.computes_bf16(device):
        checks = [Check("bf16", "ok", f"computed by the {device} itself")]
    else:
        fix = "train with precision=fp32, or on a device with bf16 arithmetic"
        checks = [Check("bf16", "warning", f"emulated on the {device}: slow", fix)]
    fix = "pip install --upgrade bitsandbytes; without it, train with quantization=none"
    try:
        error = environment.nf4_error(device)
    except RuntimeError as trouble:
        return [*checks, Check("NF4", "missing", f"does not run here: {trouble}", fix)]
    if error > NF4_TOLERANCE:
        value = f"wrong results: a product is off by {error:.0%}"
        return [*checks, Check("NF4", "missing", value, fix)]
    value = f"works on the {device}: a product is off by {error:.0%}, as 4 bits must be"
    return [*checks, Check("NF4", "ok", value)]


def _disk_and_hub() -> list[Check]:
    from huggingface_hub import constants

    from deadpan import environment

    cache = Path(constants.HF_HUB_CACHE)
    places = {
        "current directory": (Path.cwd(), "free some, or set `run` to a folder on another disk"),
        "Hub cache": (cache, "free some, or set HF_HOME to a folder on another disk"),
    }
    checks = []
    for name, (folder, fix) in places.items():
        free = environment.free_disk_gib(folder)
        value = f"{free:.0f} GiB free in {folder}"
        if free < LOW_DISK_GIB:
            checks.append(Check(name, "warning", f"only {value}", fix))
        else:
            checks.append(Check(name, "ok", value))
    checks.append(Check("HF_ENDPOINT", "ok", constants.ENDPOINT))
    if constants.HF_HUB_OFFLINE:
        fix = "unset HF_HUB_OFFLINE to download checkpoints"
        checks.append(Check("HF_HUB_OFFLINE", "warning", "on: nothing is downloaded", fix))
    else:
        checks.append(Check("HF_HUB_OFFLINE", "ok", "off: checkpoints are downloaded when needed"))
    return checks


def _engines() -> list[Check]:
    from deadpan import environment

    checks = [Check("builtin", "ok", "always there")]
    for name in ("lmdeploy", "vllm"):
        if version := environment.installed(name):
            checks.append(Check(name, "ok", version))
        else:
            fix = f"optional: {environment.INSTALL[name]}"
            checks.append(Check(name, "missing", "not installed", fix))
    return checks


def _print(sections: dict[str, list[Check]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    for title, checks in sections.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        table.show_header = False
        for check in checks:
            colour = colours[check.status] if check.required or check.status != "missing" else "dim"
            table.add_row(Text(check.status, style=colour), Text(check.name), Text(check.value))
            if check.fix:
                table.add_row("", "", Text(f"fix: {check.fix}", style="dim"))
        console.print(table)
        console.print()
