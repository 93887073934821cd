import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deadpan.cli.main import app
from deadpan.errors import DeadpanError
from deadpan.report import figure


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two runs below the current folder."""
    monkeypatch.chdir(tmp_path)
    names = ["runs/first", "runs/冷笑话"]
    for name in names:
        Path(name).mkdir(parents=True)
        lines = [{"step": step, "loss": 1 / step, "eval_loss": 1.0} for step in (1, 2, 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Path(name, "metrics.jsonl").write_text(text)
    return names


def plot(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plot", *map(str, arguments)], env={"COLUMNS": "200"})


def test_both_files_are_written_and_named(runs: list[str]) -> None:
    result = plot(*runs)
    assert (result.exit_code, result.stdout) == (0, "wrote loss.png\nwrote loss.svg\n")
    assert Path("loss.png").stat().st_size
    assert Path("loss.svg").stat().st_size


def test_options_reach_the_figure(runs: list[str]) -> None:
    def drawn(*options: object) -> bytes:
        result = plot(*runs, "--out", "one.svg", *options)
        assert result.stdout == "wrote one.svg\n"
        return Path("one.svg").read_bytes()

    figures = {drawn(), drawn("--smoothing", 0.5), drawn("--smoothing", 0), drawn("--log")}
    assert len(figures) == 4
    result = plot(*runs, "--x", "sample")
    assert isinstance(result.exception, DeadpanError)
    assert result.exception.what == "The run first does not say how many samples a step has."


def test_characters_that_no_font_has_are_told(
    runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "_CJK_FONTS", ())
    result = plot(*runs)
    assert result.exit_code == 0
    assert result.stderr.startswith("no installed font has 冷笑话: boxes stand for it")
    assert plot(runs[0]).stderr == ""


def test_a_run_is_needed() -> None:
    assert plot().exit_code == 2


def test_the_help_has_an_example() -> None:
    assert "deadpan plot runs/adamw runs/dadapt --x sample" in plot("--help").stdout
