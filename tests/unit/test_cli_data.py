import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from deadpan.cli.main import app
from deadpan.errors import DeadpanError


def sample(image: str, answer: str = "冷得像周一。", **keys: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>说"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **keys}


def write(folder: Path, *samples: object) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    return tmp_path


def data(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, ["data", *map(str, arguments)], env={"COLUMNS": "200"}, terminal_width=200
    )


SOUND = [sample("a.png"), sample("b.png")]
WARNED = [sample("a.png"), sample("a.png", "二")]
BROKEN = [sample("gone.png", id="[red]x[/red]"), *WARNED]


@pytest.mark.parametrize(
    ("samples", "options", "code"),
    [
        (SOUND, [], 0),
        (SOUND, ["--strict"], 0),
        (WARNED, [], 0),
        (WARNED, ["--strict"], 1),
        (BROKEN, [], 1),
        (BROKEN, ["--workers", 1], 1),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_exit_code_of_check(
    folder: Path, samples: list[object], options: list[str], code: int, form: list[str]
) -> None:
    assert data("check", write(folder, *samples), *options, *form).exit_code == code


def test_check_lists_errors_first_and_counts(folder: Path) -> None:
    lines = data("check", write(folder, *BROKEN)).stdout.splitlines()
    assert lines[0].split() == ["severity", "where", "code", "message"]
    assert lines[1].split()[0] == "error"
    assert "train.json record 0 (id '[red]x[/red]')" in lines[1]
    assert "missing-picture" in lines[1]
    assert any(line.split()[:1] == ["warning"] for line in lines[2:])
    assert lines[-1].strip() == "3 records, 2 pictures: 1 error, 1 warning"


def test_check_says_when_all_is_well(folder: Path) -> None:
    result = data("check", write(folder, *SOUND))
    assert result.stdout == "2 records, 2 pictures: 0 errors, 0 warnings\n"


def test_check_prints_json_and_nothing_else(folder: Path) -> None:
    report = json.loads(data("check", write(folder, *BROKEN), "--json").stdout)
    assert [problem["code"] for problem in report["problems"]] == [
        "missing-picture",
        "shared-picture",
    ]
    assert (report["errors"], report["warnings"]) == (1, 1)


def test_check_shows_fifty_problems_or_all(folder: Path) -> None:
    path = write(folder, *[sample("a.png", "</s>") for _ in range(60)])
    some, everything = data("check", path).stdout, data("check", path, "--all").stdout
    assert some.count("control-token") == 50
    assert "and 12 more: --all lists them" in some
    assert everything.count("control-token") == 60
    assert "more:" not in everything


def test_check_doubts_the_folder_when_no_picture_is_found(folder: Path) -> None:
    path = write(folder, sample("a.png"), sample("b.png"))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    assert "is --images the right folder?" in data("check", path, "--images", elsewhere).stdout
    assert "is --images the right folder?" not in data("check", path).stdout


def test_stats_prints_tables(folder: Path) -> None:
    out = data("stats", write(folder, *SOUND, sample("b.png", "二"))).stdout
    rows = [line.split() for line in out.splitlines()]
    assert ["records", "3"] in rows
    assert ["smallest", "picture", "8x8"] in rows
    assert ["answer,", "characters", "1", "6", "6", "6"] in rows
    tiles, answers = (
        rows.index([*title, heading])
        for title, heading in (
            (["tiles", "a", "sample"], "samples"),
            (["answers", "a", "picture"], "pictures"),
        )
    )
    assert rows[tiles + 1] == ["1", "3", "█" * 30]
    assert rows[answers + 1 :][:2] == [["1", "1", "█" * 30], ["2", "1", "█" * 30]]


def test_stats_as_json(folder: Path) -> None:
    Image.new("RGB", (896, 448)).save(folder / "a.png")
    path = write(folder, *SOUND)
    figures = json.loads(data("stats", path, "--json").stdout)
    assert figures["tiles_per_sample"] == {"1": 1, "3": 1}
    fewer = json.loads(data("stats", path, "--json", "--max-tiles", 1).stdout)
    assert fewer["tiles_per_sample"] == {"1": 2}


def test_many_values_are_shown_in_ranges(folder: Path) -> None:
    samples = []
    for answers in range(1, 41):
        Image.new("RGB", (8, 8)).save(folder / f"{answers}.png")
        samples += [sample(f"{answers}.png", str(number)) for number in range(answers)]
    rows = [line.split() for line in data("stats", write(folder, *samples)).stdout.splitlines()]
    ranges = [row for row in rows if row and "-" in row[0]]
    assert ranges[0] == ["1-3", "3", "█" * 30]
    assert ranges[-1] == ["40-42", "1", "█" * 10]
    assert sum(int(row[1]) for row in ranges) == 40


def test_preview_writes_the_page(folder: Path) -> None:
    out = folder / "sheet.html"
    result = data("preview", write(folder, *SOUND), "--out", out, "--limit", 1, "--seed", 3)
    assert result.stdout == f"{out}: 1 of 2 records\n"
    assert "1</b> of <b>2</b> records, a random sample (seed 3)" in out.read_text("utf-8")


@pytest.mark.parametrize("verb", ["stats", "preview"])
def test_faulty_records_are_refused_with_advice(folder: Path, verb: str) -> None:
    path = write(folder, sample("a.png", ""))
    result = data(verb, path)
    assert isinstance(result.exception, DeadpanError)
    assert result.exception.fix == f"deadpan data check {path}"
    assert not (Path.cwd() / "preview.html").exists()


def test_an_error_has_no_traceback(folder: Path) -> None:
    command = [sys.executable, "-c", "from deadpan.cli.main import run; run()"]
    done = subprocess.run(
        [*command, "data", "check", str(folder / "gone.json"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().splitlines() == [
        "error: The file of records does not exist.",
        f"  where: {folder / 'gone.json'}",
    ]


def test_stats_counts_tokens_as_a_model_does(folder: Path) -> None:
    model = Path(__file__).parents[3] / "shared" / "golden" / "official_tiny"
    if not model.exists():
        pytest.skip("the golden folder is not here")
    Image.new("RGB", (896, 448)).save(folder / "a.png")
    path = write(folder, *SOUND)

    def figures(*options: object) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(
            data("stats", path, "--model", model, "--json", *options).stdout
        )
        return result

    # Three tiles against one: two more times 256 image tokens, and no other difference.
    tiled = figures("--max-length", 500)
    assert tiled["tiles_per_sample"] == {"1": 1, "3": 1}
    tokens = tiled["sample_tokens"]
    assert tokens["maximum"] - tokens["minimum"] == 2 * 256
    assert (tiled["max_length"], tiled["over_max_length"]) == (500, 1)
    assert figures("--max-tiles", 1)["sample_tokens"]["maximum"] == tokens["minimum"]
