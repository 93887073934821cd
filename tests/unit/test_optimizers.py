import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deadpan.config.loader import load_recipe
from deadpan.config.schema import Optimizer, Schedule
from deadpan.errors import DeadpanError
from deadpan.train.optimizers import build, estimates, learning_rate
from deadpan.train.schedule import resolve

NAMES = ("adamw", "dadapt_adam", "prodigy", "schedulefree_adamw")


def settings(name: str, **changes: Any) -> Optimizer:
    return Optimizer.model_validate({"name": name, **changes})


def refused(tmp_path: Path, text: str, *overrides: str) -> DeadpanError:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: some/model\ndata: {train: train.json}\n" + text)
    with pytest.raises(DeadpanError) as caught:
        load_recipe(file, overrides)
    return caught.value


@pytest.mark.parametrize(
    ("name", "lr", "schedule", "warmup"),
    [
        ("adamw", 1e-5, "cosine", 0.03),
        ("dadapt_adam", 1.0, "constant", 0.0),
        ("prodigy", 1.0, "constant", 0.0),
        ("schedulefree_adamw", 5e-5, "constant", 0.03),
    ],
)
def test_auto_is_what_suits_the_optimizer(
    name: str, lr: float, schedule: str, warmup: float
) -> None:
    assert learning_rate(settings(name)) == lr
    assert learning_rate(settings(name, lr=0.5)) == 0.5
    assert resolve(Schedule(), name) == (schedule, warmup)
    given = Schedule(name="constant", warmup_ratio=0.5)
    assert resolve(given, name) == ("constant", 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_and_prints_nothing(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]])
    lr = "auto" if name in ("dadapt_adam", "prodigy") else 0.05
    optimizer = build(list(layer.parameters()), settings(name, lr=lr, weight_decay=0.01), False)
    losses = []
    for _ in range(300):
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_decoupled(name: str) -> None:
    # Coupled, it would be part of the gradient, whose size Adam divides away.
    group = build(
        [nn.Parameter(torch.ones(3))], settings(name, weight_decay=0.25), False
    ).param_groups[0]
    assert group["weight_decay"] == 0.25
    assert group.get("decouple", True) is True
    assert group.get("decoupled_weight_decay", True) is True


def test_only_what_finds_its_rate_has_an_estimate() -> None:
    for name in NAMES:
        optimizer = build([nn.Parameter(torch.ones(3))], settings(name), False)
        found = estimates(optimizer)
        if name in ("dadapt_adam", "prodigy"):
            assert found == {"d": 1e-6, "effective_lr": 1e-6}
        else:
            assert found == {}


def test_options_reach_the_library() -> None:
    prodigy = settings("prodigy", d0=1e-4, d_coef=2.0, growth_rate=1.5, betas=(0.8, 0.9), eps=1e-6)
    group = build([nn.Parameter(torch.ones(3))], prodigy, True).param_groups[0]
    wanted = {"d0": 1e-4, "d": 1e-4, "d_coef": 2.0, "growth_rate": 1.5, "eps": 1e-6, "lr": 1.0}
    assert wanted.items() <= group.items()
    assert group["betas"] == (0.8, 0.9)
    assert group["safeguard_warmup"] is True
    plain = build([nn.Parameter(torch.ones(3))], settings("prodigy"), False).param_groups[0]
    assert plain["safeguard_warmup"] is False
    assert plain["growth_rate"] == math.inf


@pytest.mark.parametrize("name", ["dadapt_adam", "prodigy"])
def test_a_learning_rate_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path, f"optimizer: {{name: {name}, lr: 1.0e-5}}")
    assert error.what == "The recipe's key 'optimizer.lr' has a wrong value."
    assert error.expected == (
        f"auto, 1.0 or a number near it (at least 0.01): {name} finds the learning rate, "
        "and lr multiplies it"
    )
    assert error.found == "1.0e-05"
    # The nano recipe has a rate of AdamW's.
    with pytest.raises(DeadpanError, match=r"optimizer\.lr"):
        load_recipe("nano", [f"optimizer.name={name}"])
    assert load_recipe("nano", [f"optimizer.name={name}", "optimizer.lr=auto"])


@pytest.mark.parametrize(
    ("name", "option", "readers"),
    [
        ("adamw", "d0: 1.0e-5", "dadapt_adam or prodigy"),
        ("adamw", "growth_rate: 1.02", "dadapt_adam or prodigy"),
        ("schedulefree_adamw", "d0: 1.0e-5", "dadapt_adam or prodigy"),
        ("dadapt_adam", "d_coef: 2.0", "prodigy"),
    ],
)
def test_an_option_that_is_not_read_is_refused(
    tmp_path: Path, name: str, option: str, readers: str
) -> None:
    error = refused(tmp_path, f"optimizer: {{name: {name}, {option}}}")
    assert error.what.startswith(f"The recipe's key 'optimizer.{option.split(':')[0]}'")
    assert error.expected == f"null, or optimizer.name: {readers}; {name} does not read it"


def test_a_falling_rate_is_refused_where_averaging_takes_its_place(tmp_path: Path) -> None:
    text = "optimizer: {name: schedulefree_adamw}\nschedule: {name: cosine, warmup_ratio: 0.1}\n"
    error = refused(tmp_path, text)
    assert error.what == "The recipe's key 'schedule.name' has a wrong value."
    assert error.found == "cosine"
    assert (error.expected or "").startswith("auto or constant with schedulefree_adamw")
    overridden = refused(tmp_path, "", "optimizer.name=schedulefree_adamw", "schedule.name=cosine")
    assert overridden.where == "override schedule.name=cosine"


def test_schedule_free_needs_a_running_mean(tmp_path: Path) -> None:
    error = refused(tmp_path, "optimizer: {name: schedulefree_adamw, betas: [0.0, 0.99]}")
    assert error.what == "The recipe's key 'optimizer.betas' has a wrong value."
    assert (error.expected or "").startswith("a first number > 0")
