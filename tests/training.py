"""Runs on the tiny model, as the tests of training make them."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from deadpan.config.schema import Recipe
from deadpan.train.loop import Result, Trainer
from deadpan.train.watcher import Watcher

MakeRecipe = Callable[..., Recipe]
SETTINGS: dict[str, Any] = {
    "lora": {"lora_dropout": 0.05},
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 3,
    "epochs": 3,
}
"""Of the four records, six steps, of which every second is a short one."""


def recipes(tiny: Path, records: Path) -> MakeRecipe:
    """Makes recipes for the tiny model: `make(run, max_steps=2, lora={"lora_dropout": 0.0})`."""
    values: dict[str, Any] = {
        "model": str(tiny),
        "device": "cpu",
        "precision": "fp32",
        "lora": {"r": 8, "lora_alpha": 16},
        "max_tiles": 4,
        "data": {"train": records, "workers": 0},
        "optimizer": {"lr": 1e-3},
        "trackers": [],
        "seed": 0,
    }

    def make(run: Path, **changes: Any) -> Recipe:
        merged = {
            key: {**values.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in changes.items()
        }
        return Recipe.model_validate({**values, **merged, "run": str(run)})

    return make


def train(recipe: Recipe, resume: bool | str = False, watcher: Watcher | None = None) -> Result:
    return Trainer(recipe, resume, watcher or Watcher()).train()


class SignalAfter(Watcher):
    """Sends this process a signal, or several, after a step."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGINT, times: int = 1) -> None:
        self._step, self._number, self._times = step, number, times

    def stepped(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self._step:
            for _ in range(self._times):
                os.kill(os.getpid(), self._number)


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def course(run: Path) -> list[tuple[int, float, float, float]]:
    """What a run logged of its steps, without what depends on the clock and on memory."""
    steps = [m for m in logged(run) if "loss" in m]
    return [(m["step"], m["loss"], m["lr"], m["grad_norm"]) for m in steps]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """What a run logged of its evaluations, without how long they took."""
    lines = [line for line in logged(run) if "eval_loss" in line]
    return [{k: v for k, v in line.items() if k != "evaluation_seconds"} for line in lines]


def result_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What a run has come to: the adapter, the optimizer's moments, PyTorch's random numbers.

    And, where they are not the adapter's, the weights that training goes on from.
    """
    saved = torch.load(checkpoint / "state.pt", weights_only=True)
    rows = saved["optimizer"]["state"].items()
    # Some libraries count steps as plain integers.
    moments = {f"{i}.{name}": torch.as_tensor(v) for i, row in rows for name, v in row.items()}
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    weights = {f"training.{name}": w for name, w in saved.get("training_weights", {}).items()}
    return {**adapter, **moments, **weights, "random": saved["random"]["torch"]}


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
