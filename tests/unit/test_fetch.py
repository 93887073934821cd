from pathlib import Path

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from deadpan.checkpoints.source import NEEDED_FILES
from deadpan.cli.main import app
from deadpan.errors import DeadpanError

DATA = "zhongshsh/CLoT-Oogiri-GO"


@pytest.mark.parametrize(
    ("kind", "options"),
    [("data", {"repo_type": "dataset"}), ("model", {"allow_patterns": NEEDED_FILES})],
)
@pytest.mark.parametrize("out", [None, "here"])
def test_what_the_hub_is_asked_for(
    kind: str, options: dict[str, object], out: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(repo: str, **arguments: object) -> str:
        asked[repo] = arguments
        return "/cache/it"

    monkeypatch.setattr("deadpan.checkpoints.source.snapshot_download", download)
    result = CliRunner().invoke(app, ["fetch", kind, DATA, *([out] if out else [])])
    assert result.stdout == "/cache/it\n"
    assert asked == {DATA: {**options, **({"local_dir": Path(out)} if out else {})}}


def test_offline_as_huggingface_hub_itself_understands_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["fetch", "data", DATA])
    assert isinstance(result.exception, DeadpanError)
    assert "cannot be reached" in result.exception.what
    assert f"hf download {DATA} --repo-type dataset" in (result.exception.fix or "")
