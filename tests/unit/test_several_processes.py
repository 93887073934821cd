"""What several processes may not be asked, and who tells a mistake."""

import pytest
import torch

from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.train import loader
from deadpan.train.processes import Processes, check_recipe, leads, one_of_a_host_tells


@pytest.mark.parametrize(
    ("changes", "dry_run", "where"),
    [
        ({"micro_batch_size": "auto"}, False, "micro_batch_size: auto"),
        ({"micro_batch_size": 2}, True, "--dry-run"),
        (
            {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "samples_per_step": 8},
            False,
            "samples_per_step",
        ),
    ],
)
def test_what_wants_one_process_is_refused(
    changes: dict[str, object], dry_run: bool, where: str
) -> None:
    recipe = Recipe.model_validate(
        {"model": "m", "data": {"train": "r.json"}, "run": "r"} | changes
    )
    with pytest.raises(DeadpanError) as caught:
        check_recipe(recipe, 2, dry_run)
    assert caught.value.where == where
    assert "2 processes" in f"{caught.value.found} {caught.value.expected}"


@pytest.mark.parametrize(("rank", "elsewhere"), [(None, False), ("0", False), ("1", True)])
def test_of_mistakes_met_before_the_group_is_formed_one_is_told(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, elsewhere: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if rank is not None:
            monkeypatch.setenv(name, rank)
    with pytest.raises(DeadpanError) as caught, one_of_a_host_tells():
        raise DeadpanError("no")
    assert caught.value.told_elsewhere is elsewhere
    assert leads() is not elsewhere


def test_one_process_exchanges_nothing() -> None:
    processes = Processes("cpu")
    assert (processes.rank, processes.world) == (0, 1)
    assert processes.sum(1, 2) == [1, 2]
    assert processes.gather("a") == ["a"]
    parameter = torch.nn.Parameter(torch.ones(2))
    loss = torch.tensor(3.0)
    assert processes.sum_gradients([parameter], loss) == (loss, False)
    assert parameter.grad is None
    error = DeadpanError("mine")
    with pytest.raises(DeadpanError) as caught:
        processes.share(error)
    assert caught.value is error
    assert not error.told_elsewhere


def test_processes_of_a_host_share_its_cores_among_their_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "usable_cores", lambda: 12)
    gpu = torch.device("cuda")
    assert [loader.worker_count("auto", gpu, number) for number in (1, 2, 4, 12)] == [8, 5, 2, 1]
