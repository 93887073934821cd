import mmap
from pathlib import Path

import pytest
import torch

from deadpan.config.schema import Data, Recipe
from deadpan.errors import DeadpanError
from deadpan.train import memory
from deadpan.train.memory import Meter, cut, divisors, explained, remedies

MIB = 2**20
CPU = torch.device("cpu")


def recipe(**changes: object) -> Recipe:
    plain = Recipe(model="m", data=Data(train=Path("x.json")))
    return plain.model_copy(update=changes)


def test_a_peak_is_that_since_the_last_reset() -> None:
    meter = Meter(CPU)
    meter.reset()
    before = meter.now()
    # Straight from the system: an allocator might have as much left over from before.
    with mmap.mmap(-1, 64 * MIB) as held:
        held.write(b"x" * 64 * MIB)
        assert meter.now() - before > 60 * MIB
    assert meter.peak() - before > 60 * MIB
    meter.reset()
    assert meter.peak() - before < 40 * MIB


def test_a_run_plans_with_less_than_is_there_and_has_its_own_memory_too() -> None:
    meter = Meter(CPU)
    assert meter.now() < meter.limit() < meter.available()
    assert meter.beside() == 0


@pytest.mark.parametrize(
    ("limit", "free"), [("max", []), ("1000", [1000 - 700 + 200]), ("300", [0])]
)
def test_a_containers_limit_counts(
    limit: str, free: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._cgroup_free() == free
    assert Meter(CPU).available() < Meter(CPU).now() + 1100 or limit == "max"


def test_without_a_container_only_the_machine_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._cgroup_free() == []
    assert Meter(CPU).available() > 500 * MIB


def test_steps_are_cut_evenly() -> None:
    assert divisors(16) == [1, 2, 4, 8, 16]
    assert divisors(15) == [1, 3, 5, 15]
    assert cut(4, 16) == "micro_batch_size=4 gradient_accumulation_steps=4"


def test_remedies_are_what_the_recipe_has_not_used_up() -> None:
    alike, other = remedies(recipe(gradient_checkpointing=False), tiles=12)
    assert alike == [
        *("gradient_checkpointing=true", "micro_batch_size=4 gradient_accumulation_steps=4")
    ]
    assert other == ["quantization=nf4", "max_tiles=6"]
    spare = recipe(micro_batch_size=1, quantization="nf4")
    assert remedies(spare, tiles=1) == ([], [])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail at x.cpp:1] . DefaultCPUAllocator: can't allocate memory: 9"),
    ],
)
def test_running_out_is_one_message_with_what_to_set(error: RuntimeError, tmp_path: Path) -> None:
    with pytest.raises(DeadpanError) as caught, explained(recipe(), tmp_path, tiles=12):
        raise error
    assert caught.value.what == "The memory ran out."
    assert caught.value.found == str(error)
    assert caught.value.fix == (
        "set micro_batch_size=4 gradient_accumulation_steps=4 or quantization=nf4 or max_tiles=6; "
        "deadpan train RECIPE --dry-run measures what fits"
    )


def test_with_a_checkpoint_the_message_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000200").mkdir(parents=True)
    with pytest.raises(DeadpanError) as caught, explained(recipe(), tmp_path, tiles=12):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert caught.value.fix == (
        f"step-000200 is intact: deadpan train {tmp_path / 'recipe.yaml'} --resume goes on from it, "
        "with micro_batch_size=4 gradient_accumulation_steps=4; "
        "a new run may also set quantization=nf4 or max_tiles=6"
    )


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained(recipe(), tmp_path, tiles=12):
        raise RuntimeError("shapes do not match")
