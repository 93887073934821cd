"""What several processes may not be asked, and who tells a mistake."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from deadpan.config.schema import Recipe
from deadpan.data.records import Turn, load
from deadpan.errors import DeadpanError
from deadpan.processing.processor import load_processor
from deadpan.train import loader, parallel
from deadpan.train.launcher import leads, one_of_a_host_tells
from deadpan.train.plan import MicroBatch
from deadpan.train.processes import Processes, check_recipe


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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"distributed": {"engine": "fsdp2"}, "quantization": "nf4"}, "ddp or deepspeed"),
        ({"distributed": {"engine": "fsdp2"}, "quantization": "fp8"}, "auto or ddp"),
        ({"distributed": {"engine": "fsdp2"}, "objective": "dpo"}, "auto or ddp with objective"),
        (
            {"distributed": {"engine": "deepspeed"}, "objective": "dpo"},
            "auto or ddp with objective",
        ),
        ({"distributed": {"engine": "deepspeed"}, "decoder": "fused"}, "auto or ddp"),
        (
            {"distributed": {"engine": "deepspeed"}, "optimizer": {"name": "prodigy"}},
            "ddp with prodigy",
        ),
        ({"distributed": {"engine": "fsdp2", "zero_stage": 2}}, "deepspeed; fsdp2 does not read"),
    ],
)
def test_what_cannot_be_put_in_parts_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Recipe.model_validate({"model": "m", "data": {"train": "r.json"}, "run": "r"} | changes)


def test_deepspeed_is_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_validate(
        {"model": "m", "data": {"train": "r.json"}, "distributed": {"engine": "deepspeed"}}
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeadpanError, match="not installed") as caught:
        parallel.choose(recipe, Processes("cpu"))
    assert "pip install 'deadpan[deepspeed]'" in str(caught.value.fix)


def test_one_process_where_accelerate_was_asked_for_several_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    Processes("cpu")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(DeadpanError, match="started one process") as caught:
        Processes("cpu")
    assert "--multi_gpu" in str(caught.value.fix)


def test_a_blank_picture_is_added_where_there_is_none_and_nothing_is_learned_of_it(
    tiny: Path, records: Path
) -> None:
    processor = load_processor(tiny)
    known = load(records, None)
    wordy = replace(known[0], images=(), turns=(Turn("human", "?"), Turn("gpt", "一。")))
    both = loader.MicroBatches([wordy, known[1]], processor, packing=True, pictured=True)
    alone = both.batch(MicroBatch(1, 0, ((0,),)))
    plain = loader.MicroBatches([wordy], processor, packing=True).batch(MicroBatch(1, 0, ((0,),)))
    assert plain.pixel_values is None
    assert alone.pixel_values is not None
    assert (alone.supervised, alone.tokens, alone.names) == (
        plain.supervised,
        plain.tokens,
        plain.names,
    )
    assert not alone.pictured
    assert both.batch(MicroBatch(1, 0, ((0,), (1,)))).pictured
    nothing = loader.blank(processor)
    assert (nothing.supervised, nothing.tokens, nothing.names) == (0, 0, [])
