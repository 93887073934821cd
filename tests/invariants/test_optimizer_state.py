"""Whatever the optimizer, a resumed run is the run that was never interrupted, and saving disturbs nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deadpan.config.schema import Recipe
from deadpan.models import lora
from deadpan.train import optimizers, state
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher
from training import SETTINGS, MakeRecipe, SignalAfter, identical, logged, result_of, train

NAMES = ("adamw", "dadapt_adam", "prodigy", "schedulefree_adamw")


def recipe_for(make: MakeRecipe, run: Path, name: str, **changes: Any) -> Recipe:
    # d0 is large, so that the estimate moves within the six steps.
    free = {"lr": 1.0, "d0": 1e-5} if name in ("dadapt_adam", "prodigy") else {"lr": 2e-3}
    return make(run, optimizer={"name": name, **free}, **SETTINGS, **changes)


def figures(run: Path) -> list[dict[str, float]]:
    clocks = ("samples_per_second", "tokens_per_second", "data_wait_fraction", "memory_gib")
    return [{k: v for k, v in line.items() if k not in clocks} for line in logged(run)]


def assert_same(run: Path, other: Path) -> None:
    assert figures(run) == figures(other)
    assert identical(result_of(run / "latest"), result_of(other / "latest"))
    kept = [torch.load(r / "latest/state.pt", weights_only=True) for r in (run, other)]
    groups = [k["optimizer"]["param_groups"] for k in kept]
    assert groups[0] == groups[1]  # where estimates live


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_and_resumed_is_uninterrupted(
    make: MakeRecipe, tmp_path: Path, name: str
) -> None:
    train(recipe_for(make, tmp_path / "whole", name))
    recipe = recipe_for(make, tmp_path / "run", name)
    for step in (2, 3, 5):
        assert train(recipe, resume=step > 2, watcher=SignalAfter(step)).steps == step
    assert train(recipe, resume=True).steps == 6
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", NAMES)
def test_saving_after_every_step_disturbs_nothing(
    make: MakeRecipe, tmp_path: Path, name: str
) -> None:
    train(recipe_for(make, tmp_path / "whole", name))
    train(recipe_for(make, tmp_path / "run", name, save_every_steps=1))
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["dadapt_adam", "prodigy"])
def test_the_rate_that_is_found_is_logged(make: MakeRecipe, tmp_path: Path, name: str) -> None:
    train(recipe_for(make, tmp_path / "run", name))
    lines = logged(tmp_path / "run")
    assert [line["lr"] for line in lines] == [1.0] * 6  # no schedule, no warm-up
    assert all(line["effective_lr"] == line["d"] * line["lr"] for line in lines)
    assert lines[0]["d"] == 1e-5
    assert lines[-1]["d"] > 1e-5


def test_what_is_saved_of_schedule_free_training_is_the_average(
    make: MakeRecipe, tmp_path: Path
) -> None:
    recipe = recipe_for(make, tmp_path / "run", "schedulefree_adamw")
    trainer = Trainer(recipe, False, Watcher())
    checkpoint = trainer.train().checkpoint
    saved = load_file(checkpoint / lora.ADAPTER_FILE)
    training = lora.adapter_state(trainer.model)
    beta = recipe.optimizer.betas[0]
    (group,) = trainer.optimizer.param_groups
    assert group["train_mode"]
    assert not identical(saved, training)
    # Gradients are taken at y = (1 - beta) z + beta x, and x is the average.
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for parameter in group["params"]:
        key = names[id(parameter)].replace(".default", "").replace(".modules_to_save", "")
        z = trainer.optimizer.state[parameter]["z"]
        y = (1 - beta) * z + beta * saved[key]
        torch.testing.assert_close(parameter.detach(), y, rtol=1e-4, atol=1e-6)


def test_the_training_weights_come_back_exactly(make: MakeRecipe, tmp_path: Path) -> None:
    recipe = recipe_for(make, tmp_path / "run", "schedulefree_adamw")
    trainer = Trainer(recipe, False, Watcher())
    trainer.train()
    before = {name: t.clone() for name, t in lora.adapter_state(trainer.model).items()}
    with optimizers.weights_to_use(trainer.optimizer):
        assert not identical(lora.adapter_state(trainer.model), before)
    assert identical(lora.adapter_state(trainer.model), before)


def test_only_schedule_free_training_keeps_its_weights_twice(
    make: MakeRecipe, tmp_path: Path
) -> None:
    for name in ("adamw", "schedulefree_adamw"):
        result = train(recipe_for(make, tmp_path / name, name, max_steps=1))
        tensors = torch.load(result.checkpoint / "state.pt", weights_only=True)
        assert ("training_weights" in tensors) == (name == "schedulefree_adamw")
        state.verify(result.checkpoint)
        assert json.loads((result.checkpoint / "state.json").read_text())["step"] == 1
