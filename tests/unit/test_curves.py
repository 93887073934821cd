import json
import math
from pathlib import Path
from typing import Any

import pytest

from deadpan.errors import DeadpanError
from deadpan.report.curves import read, read_all, smooth

RECIPE = "micro_batch_size: 4\ngradient_accumulation_steps: 2\n"


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def step(number: int, loss: float = 2.0, **keys: Any) -> dict[str, Any]:
    return {"step": number, "epoch": number / 10, "loss": loss, "samples_per_second": 4.0, **keys}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [
        {"step": 0, "eval_loss": 4.0, "memorisation": 0.0},
        step(1, 3.5),
        step(2, 3.0, samples_per_second=2.0),
        {"step": 2, "eval_loss": 3.25, "memorisation": 0.1},
        {"step": 2, "probe": "no loss here"},
        step(4, 2.5),
    ]
    write(tmp_path / "first" / "metrics.jsonl", *lines)
    (tmp_path / "first" / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "first"


@pytest.mark.parametrize("name", ["", "metrics.jsonl"])
def test_a_run_is_read_from_its_folder_or_its_log(run: Path, name: str) -> None:
    curve = read(run / name)
    assert (curve.name, curve.source) == ("first", run)
    assert (curve.steps, curve.losses) == ((1, 2, 4), (3.5, 3.0, 2.5))
    assert (curve.eval_steps, curve.eval_losses) == ((0, 2), (4.0, 3.25))
    assert curve.samples == (8, 16, 32)
    # Step 3 was not logged, and counts with step 4's two seconds.
    assert curve.seconds == (2.0, 6.0, 10.0)


@pytest.mark.parametrize("name", ["", "vis_data/scalars.json"])
def test_an_mmengine_log_is_read(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "qlora_ft" / "20240827_063210"
    write(
        folder / "vis_data" / "scalars.json",
        {"lr": 1e-5, "loss": 5.5, "time": 3.0, "iter": 10, "memory": 39252, "step": 10},
        {"lr": 1e-5, "loss": 5.0, "time": 2.0, "iter": 20, "memory": 39252},
    )
    curve = read(folder / name)
    assert (curve.name, curve.source) == ("qlora_ft/20240827_063210", folder)
    assert (curve.steps, curve.losses, curve.eval_steps) == ((10, 20), (5.5, 5.0), ())
    assert (curve.samples, curve.seconds) == (None, (30.0, 50.0))


def test_a_log_of_any_name_is_called_after_its_file(tmp_path: Path) -> None:
    log = write(tmp_path / "adamw_scalars.json", {"iter": 1, "loss": 1})
    curve = read(log)
    assert (curve.name, curve.source, curve.seconds) == ("adamw_scalars", log, None)


@pytest.mark.parametrize(
    ("recipe", "samples"),
    [
        (RECIPE + "of_a_later_version: 1\n", (8,)),
        ("micro_batch_size: auto\ngradient_accumulation_steps: 2\n", None),
        ("epochs: 8\n", None),
        ("[]\n", None),
        (None, None),
    ],
)
def test_the_samples_of_a_step_are_the_recipes(
    tmp_path: Path, recipe: str | None, samples: tuple[int] | None
) -> None:
    write(tmp_path / "metrics.jsonl", step(1))
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    curve = read(tmp_path)
    assert curve.samples == samples
    assert (curve.seconds is None) == (samples is None)


def test_samples_are_counted_where_they_are_logged(run: Path) -> None:
    # Five records, four a step: every other step is short.
    write(run / "metrics.jsonl", step(1, samples=4), step(2, samples=5), step(4, samples=10))
    assert read(run).samples == (4, 5, 10)
    (run / "recipe.yaml").unlink()
    assert read(run).samples == (4, 5, 10)
    write(run / "metrics.jsonl", step(1, samples=4), step(2))
    assert read(run).samples is None


def test_a_speed_that_was_rounded_to_nothing_tells_no_time(run: Path) -> None:
    write(run / "metrics.jsonl", step(1), step(2, samples_per_second=0.0))
    assert read(run).seconds is None


def test_a_broken_recipe_is_an_error(run: Path) -> None:
    (run / "recipe.yaml").write_text("{")
    with pytest.raises(DeadpanError, match="recipe cannot be read") as caught:
        read(run)
    assert caught.value.where == str(run / "recipe.yaml")


def test_a_last_line_that_is_being_written_is_passed_over(run: Path) -> None:
    log = run / "metrics.jsonl"
    whole = log.read_text()
    before = read(run)
    line = json.dumps(step(5))
    for length in range(len(line)):
        log.write_text(whole + line[:length])
        assert read(run) == before
    log.write_text(whole + line)
    assert read(run).steps == (1, 2, 4, 5)


@pytest.mark.parametrize("bad", ['{"step": 5, "lo', "[1]", "3", "\0" * 80])
def test_any_other_damaged_line_is_named(run: Path, bad: str) -> None:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:3], bad, *lines[3:]]) + "\n")
    with pytest.raises(DeadpanError, match="line of the log is damaged") as caught:
        read(run)
    assert caught.value.where == f"{log} line 4"
    assert len(caught.value.found or "") <= 60


def test_empty_lines_are_passed_over(run: Path) -> None:
    log = run / "metrics.jsonl"
    before = read(run)
    log.write_text(log.read_text().replace("\n", "\n\n"))
    assert read(run) == before


def test_a_damaged_last_line_that_has_its_end_is_an_error(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as log:
        log.write("{\n")
    with pytest.raises(DeadpanError) as caught:
        read(run)
    assert caught.value.where == f"{run / 'metrics.jsonl'} line 7"


@pytest.mark.parametrize(
    ("line", "expected", "found"),
    [
        ({"loss": 1.0}, "step: an integer >= 4", "null"),
        ({"loss": 1.0, "step": 3}, "step: an integer >= 4", "3"),
        ({"eval_loss": 1.0, "step": 1}, "step: an integer >= 2", "1"),
        ({"loss": 1.0, "step": 5.5}, "step: an integer >= 4", "5.5"),
        ({"loss": "冷", "step": 5}, "loss: a number", '"冷"'),
        ({"eval_loss": None, "step": 5}, "eval_loss: a number", "null"),
        ({"loss": 1.0, "step": 5, "time": "1 s"}, "time: a number", '"1 s"'),
        (step(5, samples_per_second=[]), "samples_per_second: a number", "[]"),
    ],
)
def test_a_wrong_figure_is_named(run: Path, line: object, expected: str, found: str) -> None:
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    with pytest.raises(DeadpanError) as caught:
        read(run)
    error = caught.value
    assert error.where == f"{run / 'metrics.jsonl'} line 7"
    assert (error.expected, error.found) == (expected, found)


@pytest.mark.parametrize("content", [b"", b'{"step": 1, "eval_loss": 2.0}\n', b'{"step": 1, "l'])
def test_a_run_without_losses_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(DeadpanError, match="no losses yet"):
        read(tmp_path)


def test_a_log_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1}\n\xff\n')
    with pytest.raises(DeadpanError, match="log cannot be read"):
        read(tmp_path)


def test_a_folder_without_a_log_names_the_runs_inside(run: Path) -> None:
    write(run.parent / "the second" / "vis_data" / "scalars.json", {"step": 1, "loss": 1})
    with pytest.raises(DeadpanError, match="holds no log") as caught:
        read(run.parent)
    assert caught.value.fix == f"name the runs inside: {run} '{run.parent / 'the second'}'"
    (run / "checkpoints").mkdir()
    with pytest.raises(DeadpanError, match="holds no log") as caught:
        read(run / "checkpoints")
    assert caught.value.fix is None


def test_a_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match="no such run") as caught:
        read(tmp_path / "gone")
    assert caught.value.where == str(tmp_path / "gone")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("adamw/seed-0", "adamw/seed-1", "dadapt/seed-0")]
    for path in paths:
        write(path / "metrics.jsonl", step(1))
    assert [curve.name for curve in read_all(paths[:2])] == ["seed-0", "seed-1"]
    assert [curve.name for curve in read_all(paths)] == [
        "adamw/seed-0",
        "adamw/seed-1",
        "dadapt/seed-0",
    ]
    assert len(read_all([paths[0], paths[0] / ".", paths[1]])) == 2


def test_a_run_in_the_current_folder_has_its_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    assert read(Path()).name == "first"


def test_the_moving_average_is_a_weighted_mean_of_what_came_before() -> None:
    values = [5.0, 1.0, 2.0, 4.0]
    weights = [0.125, 0.25, 0.5, 1.0]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    averages = smooth(values, 0.5)
    assert averages[0] == 5.0
    assert averages[-1] == pytest.approx(mean)
    assert smooth([3.0] * 5, 0.99) == pytest.approx([3.0] * 5)
    assert smooth(values, 0) == values


def test_a_value_that_is_not_finite_leaves_the_average_alone() -> None:
    with_gaps = smooth([5.0, math.nan, 1.0, math.inf, 2.0], 0.5)
    assert math.isnan(with_gaps[1])
    assert math.isnan(with_gaps[3])
    assert [with_gaps[0], with_gaps[2], with_gaps[4]] == smooth([5.0, 1.0, 2.0], 0.5)


@pytest.mark.parametrize("weight", [-0.1, 1.0, 2.0, math.nan])
def test_a_weight_out_of_bounds_is_an_error(weight: float) -> None:
    with pytest.raises(DeadpanError, match="out of bounds") as caught:
        smooth([1.0], weight)
    assert caught.value.found == f"{weight:g}"
