import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import deadpan
from deadpan import environment
from deadpan.cli.doctor import Check, doctor, examine

app = typer.Typer()
app.command()(doctor)


def check(section: str, name: str) -> Check:
    (found,) = [check for check in examine()[section] if check.name == name]
    return found


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_sound_machine_passes_and_reports_in_json() -> None:
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is True
    status = {
        name: {check["name"]: check["status"] for check in checks}
        for name, checks in report["sections"].items()
    }
    assert status["Packages"]["torch"] == status["Packages"]["python"] == "ok"
    assert status["Devices"]["CPU"] == status["Attention"]["sdpa"] == "ok"
    assert status["Precision"]["NF4"] == status["Engines"]["builtin"] == "ok"
    assert report["environment"]["versions"]["deadpan"] == deadpan.__version__


def test_whatever_is_missing_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda _: None)
    missing = [
        check for checks in examine().values() for check in checks if check.status == "missing"
    ]
    assert {"torch", "flash-attn", "lmdeploy", "vllm"} <= {check.name for check in missing}
    assert all(check.fix for check in missing)
    # With its requirements it would put an older PEFT in place of ours.
    assert all("--no-deps lmdeploy" in str(c.fix) for c in missing if c.name == "lmdeploy")


@pytest.mark.parametrize(
    ("version", "value"),
    [(None, "not installed"), ("0.1", "0.1, but deadpan needs >=")],
)
def test_a_missing_or_old_requirement_fails(
    version: str | None, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = environment.installed
    monkeypatch.setattr(
        environment, "installed", lambda name: version if name == "peft" else real(name)
    )
    result = CliRunner().invoke(app)
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert f"missing peft {value}" in text
    assert "fix: pip install 'peft>=" in text
    assert json.loads(CliRunner().invoke(app, ["--json"]).stdout)["ok"] is False


def test_a_pytorch_that_does_not_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = {"torch": "libcudart.so.12 is missing"}
    monkeypatch.setattr(environment, "import_trouble", trouble.get)
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 1
    (pytorch,) = json.loads(result.stdout)["sections"]["Devices"]
    assert (pytorch["status"], pytorch["value"]) == ("missing", trouble["torch"])
    assert "pip install" in pytorch["fix"]


@pytest.mark.parametrize(
    ("nf4_error", "value"),
    [
        (raiser(RuntimeError("no native library")), "does not run here: no native library"),
        (lambda _: 0.5, "wrong results: a product is off by 50%"),
    ],
)
def test_nf4_that_does_not_work_is_missing_but_not_required(
    nf4_error: Callable[[str], float], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "nf4_error", nf4_error)
    nf4 = check("Precision", "NF4")
    assert (nf4.status, nf4.value) == ("missing", value)
    assert "quantization=none" in (nf4.fix or "")
    assert CliRunner().invoke(app).exit_code == 0


def test_emulated_bf16_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "computes_bf16", lambda _: False)
    bf16 = check("Precision", "bf16")
    assert (bf16.status, "precision=fp32" in (bf16.fix or "")) == ("warning", True)


def test_a_driver_without_a_gpu_in_pytorch_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = environment.devices() | {"cuda": [], "cuda_runtime": None}
    monkeypatch.setattr(environment, "devices", lambda: devices)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert check("Devices", "CUDA").status == "missing"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    cuda = check("Devices", "CUDA")
    assert (cuda.status, "built for the CPU only" in cuda.value) == ("warning", True)


def test_a_full_disk_and_an_offline_hub_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "free_disk_gib", lambda _: 1.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = {check.name: check for check in examine()["Disk and Hub"]}
    for name in ("current directory", "Hub cache", "HF_HUB_OFFLINE"):
        assert found[name].status == "warning"
        assert found[name].fix


def test_environment_is_described_in_json_types() -> None:
    described = environment.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["devices"]["cpu"]["cores"] >= 1
    assert described["versions"]["torch"] == environment.installed("torch")
    assert environment.requirements()["torch"].startswith(">=")
    assert environment.installed("no-such-package") is None
    assert environment.import_trouble("no_such_module") == "No module named 'no_such_module'"


def test_kernels_are_found_by_running_them() -> None:
    assert environment.sdpa_kernels("cpu")["math"] is True
    assert environment.sdpa_kernels("cpu")["cudnn"] is False
    # Four bits a weight must cost something, and not more than rounding explains.
    assert 0.05 < environment.nf4_error("cpu") < 0.15


def test_free_space_is_that_of_the_nearest_existing_folder(tmp_path: Path) -> None:
    free = environment.free_disk_gib(tmp_path / "not" / "yet")
    assert free == pytest.approx(environment.free_disk_gib(tmp_path), rel=0.1)


def test_git_revision_tells_clean_from_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_revision() is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--no-gpg-sign", "-m", "one")
    git("tag", "-a", "v1", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert environment.git_revision() == commit
    (tmp_path / "file").write_text("2")
    assert environment.git_revision() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment.git_revision() is None
