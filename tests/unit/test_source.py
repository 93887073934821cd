import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from deadpan.checkpoints.source import NEEDED_FILES, Layout, detect, resolve
from deadpan.errors import DeadpanError

REPO = "OpenGVLab/InternVL2-2B"
HUB = "https://hub.example"

_RESPONSE: Any = SimpleNamespace(headers={}, request=None)
# The HTTP library's own error: httpx's or httpx2's, as huggingface_hub's version has it.
_HttpError = HfHubHTTPError.__mro__[1]


def _name(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, Exception) else None


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a test forgets to replace finds an empty folder, an empty cache and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", HUB)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def replace(error: Exception) -> None:
        def download(repo: str, **_: object) -> str:
            raise error

        monkeypatch.setattr("deadpan.checkpoints.source.snapshot_download", download)

    return replace


def make_run(folder: Path, *links: str) -> Path:
    """A run folder whose links each point to a checkpoint of their own."""
    (folder / "checkpoints").mkdir(parents=True)
    for number, link in enumerate(links):
        (folder / "checkpoints" / f"step-{number:06d}").mkdir()
        (folder / link).symlink_to(f"checkpoints/step-{number:06d}")
    return folder


def test_no_name_is_no_model() -> None:
    with pytest.raises(DeadpanError, match="has no name"):
        resolve("")


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    assert resolve(folder) == folder
    # A folder wins over the Hub id of the same spelling.
    assert resolve("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path / "owner"))
    assert resolve("~/name") == folder


@pytest.mark.parametrize(
    ("links", "step"),
    [(["latest"], 0), (["best"], 0), (["latest", "best"], 1), (["best", "latest"], 0)],
)
def test_a_run_stands_for_its_best_or_else_its_latest_checkpoint(
    tmp_path: Path, links: list[str], step: int
) -> None:
    run = make_run(tmp_path / "run", *links)
    assert resolve(run) == run / "checkpoints" / f"step-{step:06d}"


def test_a_run_whose_best_checkpoint_was_removed_stands_for_its_latest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "best", "latest")
    (run / "checkpoints" / "step-000000").rmdir()
    assert resolve(run) == run / "checkpoints" / "step-000001"


def test_a_run_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(DeadpanError, match="no checkpoint yet") as raised:
        resolve(run)
    assert raised.value.where == str(run)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text("")
    with pytest.raises(DeadpanError, match="no checkpoint yet"):
        resolve(begun)


def test_a_folder_of_runs_is_told_to_name_one(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "latest")
    with pytest.raises(DeadpanError, match="holds runs") as raised:
        resolve(tmp_path)
    assert raised.value.fix == f"name one, such as {tmp_path / 'run'}"
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "model", ["/no/such", "./owner/name", "../name", "~/no", "nano-2", "a/b/c"]
)
def test_what_can_only_be_a_folder_is_never_asked_of_the_hub(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, **_: object) -> str:
        pytest.fail(f"asked the Hub for {repo}")

    monkeypatch.setattr("deadpan.checkpoints.source.snapshot_download", download)
    with pytest.raises(DeadpanError) as raised:
        resolve(model)
    assert repr(model) in raised.value.what
    assert raised.value.found == f"no folder {Path(model).expanduser().absolute()}"


def test_a_hub_id_is_downloaded_with_all_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(repo: str, **arguments: object) -> str:
        asked[repo] = arguments
        return str(tmp_path)

    monkeypatch.setattr("deadpan.checkpoints.source.snapshot_download", download)
    assert resolve(REPO) == tmp_path
    assert asked == {REPO: {"allow_patterns": NEEDED_FILES}}
    needed = ["config.json", "model-00001-of-2.safetensors", "tokenizer.model", "modeling_x.py"]
    needed += ["chat_template.jinja", "pytorch_model-1.bin", "merges.txt"]
    assert all(any(Path(name).match(pattern) for pattern in NEEDED_FILES) for name in needed)


def test_an_impossible_hub_id_is_called_that() -> None:
    with pytest.raises(DeadpanError, match="neither a folder nor a valid Hub id") as raised:
        resolve("owner/a name")
    assert "OWNER/NAME" in (raised.value.fix or "")


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (GatedRepoError("403\nmore", response=_RESPONSE), f"{REPO} is gated.", "hf auth login"),
        (
            RepositoryNotFoundError("404", response=_RESPONSE),
            f"The Hub has no model '{REPO}', or it is private.",
            "hf auth login",
        ),
    ],
    ids=_name,
)
def test_a_model_that_the_hub_withholds(
    error: Exception, what: str, fix: str, hub_raises: Callable[[Exception], None]
) -> None:
    hub_raises(error)
    with pytest.raises(DeadpanError) as raised:
        resolve(REPO)
    assert raised.value.what == what
    assert raised.value.where == HUB
    assert fix in (raised.value.fix or "")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (LocalEntryNotFoundError("Nothing cached.\nmore"), "Nothing cached."),
        (HfHubHTTPError("503 Service Unavailable", response=_RESPONSE), "503 Service Unavailable"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
        # What huggingface_hub lets through from below (a bad proxy, a dropped connection).
        (_HttpError("no such proxy"), "no such proxy"),
        # An error that says nothing is called by its name.
        (TimeoutError(), "TimeoutError"),
    ],
    ids=_name,
)
def test_a_hub_out_of_reach_names_the_endpoint_and_the_ways_round_it(
    error: Exception, found: str, hub_raises: Callable[[Exception], None]
) -> None:
    hub_raises(error)
    with pytest.raises(DeadpanError) as raised:
        resolve(REPO)
    assert "cannot be reached" in raised.value.what
    assert raised.value.where == HUB
    assert raised.value.found == found
    for way in ("HF_ENDPOINT", "HF_HUB_OFFLINE", f"hf download {REPO} --local-dir InternVL2-2B"):
        assert way in (raised.value.fix or "")


def test_offline_as_huggingface_hub_itself_understands_it() -> None:
    with pytest.raises(DeadpanError, match="cannot be reached") as raised:
        resolve(REPO)
    assert "HF_HUB_OFFLINE" in (raised.value.found or "")


@pytest.mark.parametrize(
    ("name", "content", "layout"),
    [
        ("config.json", {"architectures": ["InternVLChatModel"]}, Layout.OFFICIAL),
        ("config.json", {"model_type": "internvl_chat"}, Layout.OFFICIAL),
        ("config.json", {"architectures": ["InternVLForConditionalGeneration"]}, Layout.HF),
        ("config.json", {"model_type": "internvl", "architectures": []}, Layout.HF),
        ("adapter_config.json", {}, Layout.ADAPTER),
    ],
)
def test_the_layout_is_told_by_the_configuration(
    tmp_path: Path, name: str, content: dict[str, object], layout: Layout
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    assert detect(tmp_path) is layout


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"]}, "LlavaForConditionalGeneration"),
        ({"model_type": "qwen2_vl", "architectures": None}, "qwen2_vl"),
        ({}, "None"),
    ],
)
def test_another_architecture_is_an_error_that_names_it(
    tmp_path: Path, config: dict[str, object], found: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeadpanError, match="architecture is unknown") as raised:
        detect(tmp_path)
    assert raised.value.where == str(tmp_path / "config.json")
    assert raised.value.found == found


@pytest.mark.parametrize("text", ["{", "[]", '"InternVLChatModel"'])
def test_a_damaged_configuration_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DeadpanError) as raised:
        detect(tmp_path)
    assert raised.value.where == str(tmp_path / "config.json")


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match=r"lacks config\.json") as raised:
        detect(tmp_path)
    assert raised.value.where == str(tmp_path)
