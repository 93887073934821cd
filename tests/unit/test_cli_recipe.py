from pathlib import Path

import pytest
from typer.testing import CliRunner

from deadpan.cli.recipe import app
from deadpan.config.loader import bundled, bundled_text, load_recipe
from deadpan.errors import DeadpanError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, DeadpanError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_names_every_bundled_recipe_with_its_description() -> None:
    lines = run("list").splitlines()
    assert [tuple(line.split(maxsplit=1)) for line in lines] == list(bundled().items())


def test_show_prints_a_recipe_that_loads_to_the_same(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e-4", "run=runs/冷"]
    shown = tmp_path / "shown.yaml"
    shown.write_text(run("show", "internvl2-8b-qlora", *overrides), encoding="utf-8")
    assert load_recipe(shown) == load_recipe("internvl2-8b-qlora", overrides)
    assert run("show", str(shown)) == shown.read_text(encoding="utf-8")


def test_copy_is_verbatim_and_names_the_next_command(tmp_path: Path) -> None:
    folder = tmp_path / "my recipes"
    output = run("copy", "internvl2-2b-qlora", str(folder))
    target = folder / "internvl2-2b-qlora.yaml"
    assert target.read_text(encoding="utf-8") == bundled_text("internvl2-2b-qlora")
    assert output.splitlines()[-1] == f"  deadpan train '{target}'"


def test_copy_goes_to_the_current_directory_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("copy", "internvl2-2b-lora")
    assert (tmp_path / "internvl2-2b-lora.yaml").is_file()


def test_copy_overwrites_only_by_force(tmp_path: Path) -> None:
    target = tmp_path / "internvl2-2b-lora.yaml"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(DeadpanError, match="already there") as caught:
        run("copy", "internvl2-2b-lora", str(tmp_path))
    assert (caught.value.where, "--force" in (caught.value.fix or "")) == (str(target), True)
    assert target.read_text(encoding="utf-8") == "mine"
    run("copy", "internvl2-2b-lora", str(tmp_path), "--force")
    assert target.read_text(encoding="utf-8") == bundled_text("internvl2-2b-lora")


def test_copy_of_an_unknown_name_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match="no such bundled recipe") as caught:
        run("copy", "internvl2-2b-laro", str(tmp_path))
    assert "'internvl2-2b-lora'" in (caught.value.fix or "")
    assert not list(tmp_path.iterdir())


def test_copy_into_a_file_says_why_not(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DeadpanError, match="cannot be written") as caught:
        run("copy", "internvl2-2b-lora", str(file))
    assert caught.value.where == str(file / "internvl2-2b-lora.yaml")
