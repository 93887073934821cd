import os
import subprocess
import sys
from pathlib import Path

GENERATOR = Path(__file__).parents[2] / "tools" / "generate_docs.py"


def generate(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GENERATOR), "--folder", str(folder), *options]
    variables = {**os.environ, **variables}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_pages_do_not_depend_on_the_terminal(tmp_path: Path) -> None:
    narrow = {"COLUMNS": "40", "TERMINAL_WIDTH": "40", "NO_COLOR": "1"}
    wide = {"COLUMNS": "300", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "1", "PYTHONHASHSEED": "7"}
    for folder, variables in (("narrow", narrow), ("wide", wide)):
        result = generate(tmp_path / folder, **variables)
        assert result.returncode == 0, result.stderr
    for name in ("cli.md", "recipe.md"):
        text = (tmp_path / "narrow" / name).read_text(encoding="utf-8")
        assert text == (tmp_path / "wide" / name).read_text(encoding="utf-8")
        assert "\x1b" not in text
    assert "#### `deadpan recipe copy`" in (tmp_path / "narrow/cli.md").read_text(encoding="utf-8")
    row = "| `optimizer.weight_decay` | number >= 0 | `0.05` | Decoupled weight decay. |"
    assert row in (tmp_path / "narrow/recipe.md").read_text(encoding="utf-8")


def test_check_detects_a_change_and_writes_nothing(tmp_path: Path) -> None:
    assert generate(tmp_path).returncode == 0
    assert generate(tmp_path, "--check").returncode == 0
    page = tmp_path / "recipe.md"
    page.write_text(page.read_text(encoding="utf-8") + "by hand\n", encoding="utf-8")
    result = generate(tmp_path, "--check")
    assert result.returncode == 1
    assert result.stderr == f"out of date: {page}; run `make docs`\n"
    assert page.read_text(encoding="utf-8").endswith("by hand\n")
    (tmp_path / "cli.md").unlink()
    assert "cli.md" in generate(tmp_path, "--check").stderr
    assert not (tmp_path / "cli.md").exists()
