import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

from deadpan.errors import DeadpanError
from deadpan.train import trackers
from training import MakeRecipe, SignalAfter, logged, train

OTHERS = ["wandb", "swanlab", "mlflow", "trackio"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which trackers are installed, as the tests want it."""
    names: set[str] = set()
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> object:
        return name in names or None if name in ["tensorboard", *OTHERS] else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return names


def test_auto_is_tensorboard_if_it_is_there(
    make: MakeRecipe, tmp_path: Path, installed: set[str]
) -> None:
    recipe = make(tmp_path / "run", trackers="auto")
    assert trackers.choose(recipe) == []
    installed |= {"tensorboard", "wandb"}
    assert trackers.choose(recipe) == ["tensorboard"]


def test_a_tracker_that_is_named_and_missing_is_an_error_before_anything_else(
    make: MakeRecipe, tmp_path: Path, installed: set[str]
) -> None:
    installed.add("mlflow")
    with pytest.raises(DeadpanError) as caught:
        train(make(tmp_path / "run", trackers=["mlflow", "wandb"], data={"train": "nowhere"}))
    assert caught.value.what == "The tracker wandb is not installed."
    assert caught.value.fix == "pip install wandb, or set trackers=[]"
    with pytest.raises(DeadpanError, match="The trackers wandb and trackio are not installed"):
        train(make(tmp_path / "run", trackers=["wandb", "trackio"]))
    assert not (tmp_path / "run").exists()


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_what_the_log_has_and_goes_on_when_resumed(
    make: MakeRecipe, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    recipe = make(
        run,
        trackers=["tensorboard"],
        max_steps=6,
        micro_batch_size=2,
        save_every_steps=2,
        data={"validation": 0.25},
        evaluation={"every_steps": 3, "max_new_tokens": 4},
    )

    class Crash(SignalAfter):
        def stepped(self, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 5:
                raise MemoryError

    with pytest.raises(MemoryError):
        train(recipe, watcher=Crash(5))
    train(recipe, resume=True)
    shown = scalars(run)
    for name in ("loss", "lr", "eval_loss", "memorisation", "best", "samples"):
        wanted = {line["step"]: float(line[name]) for line in logged(run) if name in line}
        assert shown[name] == pytest.approx(wanted), name
    assert list(shown["loss"]) == [1, 2, 3, 4, 5, 6]
    assert "step" not in shown


class Fake(GeneralTracker):
    """Stands for a tracker that is not installed here; accelerate's own would import it."""

    name = "fake"
    requires_logging_directory = False
    made: list["Fake"]

    def __init__(self, project: str, **arguments: Any) -> None:
        super().__init__()
        self.project, self.arguments = project, arguments
        self.configuration: dict[str, Any] | None = None
        self.lines: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False
        type(self).made.append(self)

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="id-of-mlflow"))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("wandb", "WandBTracker", {"name": "run", "resume": "allow"}),
        ("swanlab", "SwanLabTracker", {"experiment_name": "run", "resume": "allow"}),
        ("mlflow", "MLflowTracker", {"run_name": "run"}),
        ("trackio", "TrackioTracker", {"resume": "allow"}),
    ],
)
def test_a_resumed_run_goes_on_in_the_same_tracked_run(
    make: MakeRecipe,
    tmp_path: Path,
    installed: set[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    words: dict[str, str],
) -> None:
    installed.add(name)
    double: Any = type("Double", (Fake,), {"name": name, "made": []})
    monkeypatch.setattr(trackers, kind, double)
    recipe = make(tmp_path / "run", trackers=[name], max_steps=3)
    train(recipe, watcher=SignalAfter(2))
    train(recipe, resume=True)
    first, second = double.made
    assert first.project == second.project == "deadpan"
    assert words.items() <= first.arguments.items()
    assert [step for step, _ in first.lines + second.lines] == [1, 2, 3]
    assert second.lines[0][1]["loss"] == logged(tmp_path / "run")[-1]["loss"]
    assert first.finished
    assert second.finished
    assert first.configuration is not None
    assert first.configuration["optimizer.lr"] == 1e-3
    assert first.configuration["max_tiles"] == 4
    assert second.configuration is None
    ids = json.loads((tmp_path / "run" / "trackers.json").read_text())
    if name == "mlflow":
        assert first.arguments["run_id"] is None
        assert second.arguments["run_id"] == ids[name] == "id-of-mlflow"
    else:
        key = "name" if name == "trackio" else "id"
        assert first.arguments[key] == second.arguments[key] == ids[name]
    # Another run is another tracked run.
    train(make(tmp_path / "other" / "run", trackers=[name], max_steps=1))
    if name != "mlflow":
        assert double.made[2].arguments[key] != ids[name]
