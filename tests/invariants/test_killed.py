"""A run that is killed again and again comes, bit for bit, to what the run comes to that nothing happened to.

Everything is on that could move it: dropout, a short step at an epoch's end, evaluations, the best
checkpoint, the removal of old ones. Kills strike while the folder is opened, in steps, in saves and in
evaluations, by the run's own progress and a random part of the time that such a thing takes.
"""

import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from deadpan.config.schema import Recipe
from deadpan.train import state
from forked import EVALUATING, OPENING, SAVING, STEPPING, ForkedRun, exit_code, fork_ranks
from training import MakeRecipe, logged

KILLS = 30
STEPS = 60
CLOCK_AND_MEMORY = {
    "samples_per_second", "tokens_per_second", "data_wait_fraction", "memory_gib",
    "evaluation_seconds",
}  # fmt: skip


def recipe_of(make: MakeRecipe, run: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "lora": {"lora_dropout": 0.05},
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "epochs": STEPS,
        "max_steps": STEPS,
        "data": {"validation": 0.25},
        # High enough for the held-out loss to rise in between: then the best checkpoint is an old one.
        "optimizer": {"lr": 4e-3},
        "evaluation": {"every_steps": 4, "max_new_tokens": 4, "memorisation_pictures": 1},
        "save_every_steps": 1,
        "keep_checkpoints": 2,
    }
    return make(run, **{**settings, **changes})


def through(run: ForkedRun, took: dict[bytes, list[float]]) -> None:
    """Let a run go on to its end, and note how long what it does takes."""
    what = run.next()
    while what:
        began = time.perf_counter()
        run.allow()
        after = run.next()
        took[what].append(time.perf_counter() - began)
        what = after


def kill(run: ForkedRun, what: bytes, skip: int, delay: float) -> None:
    """Kill a run in the middle of something, when it has done that a number of times."""
    about = run.next()
    while about and (about != what or skip):
        skip -= about == what
        run.allow()
        about = run.next()
    assert about, "the run has ended by itself"
    run.allow()
    time.sleep(delay)


def leftovers(run: Path) -> set[tuple[str, int]]:
    """What is half-written or half-removed, with its inode: one that a later kill finds too is not new."""
    found = (run / "checkpoints").glob(".step-*.tmp")
    return {(path.name, path.stat().st_ino) for path in found}


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the last bit, down to every tensor."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    adapter = "adapter_model.safetensors"
    assert (one / adapter).read_bytes() == (other / adapter).read_bytes()
    states = [torch.load(path / "state.pt", weights_only=True) for path in (one, other)]
    assert len(states[0]["optimizer"]["state"]) > 1
    assert same(*states)
    positions = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    for position in positions:
        del position["seconds"]
    assert positions[0] == positions[1]


def without_clock(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in CLOCK_AND_MEMORY}
        for line in logged(run)
    ]


@pytest.mark.slow
def test_killed_thirty_times_a_run_comes_to_the_same_end(make: MakeRecipe, tmp_path: Path) -> None:
    whole, run, output = tmp_path / "whole", tmp_path / "killed", tmp_path / "output.txt"
    took: dict[bytes, list[float]] = defaultdict(list)
    undisturbed = ForkedRun(recipe_of(make, whole), False, output)
    through(undisturbed, took)
    assert undisturbed.end() == 0, output.read_text()
    usual = {what: sorted(times)[len(times) // 2] for what, times in took.items()}
    assert usual.keys() == {OPENING, STEPPING, SAVING, EVALUATING}

    recipe = recipe_of(make, run)
    chance = random.Random(KILLS)
    kinds = [OPENING] * 4 + [STEPPING] * 8 + [SAVING] * 12 + [EVALUATING] * 6
    chance.shuffle(kinds)
    killed, struck = 0, Counter[str]()
    for kind in kinds:
        child, before = ForkedRun(recipe, bool(state.checkpoints(run)), output), leftovers(run)
        skip = 0 if kind == OPENING else chance.randrange(4 if kind == EVALUATING else 2)
        kill(child, kind, skip, chance.random() * usual[kind])
        killed += child.end(kill=True) == -signal.SIGKILL
        struck["saves"] += bool(leftovers(run) - before)
        left = state.checkpoints(run)
        for checkpoint in left:
            state.verify(checkpoint)
        if left:
            assert (run / "latest").resolve() in [path.resolve() for path in left]
            struck["steps"] = int(left[-1].name.removeprefix("step-"))
    assert killed == KILLS
    # Were every save missed, a save that is not atomic would pass.
    assert struck["saves"] >= 3

    last = ForkedRun(recipe, True, output)
    through(last, took)
    assert last.end() == 0, output.read_text()
    assert without_clock(run) == without_clock(whole)
    evaluated = [line for line in logged(whole) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == list(range(4, STEPS + 1, 4))
    assert (run / "jokes.jsonl").read_bytes() == (whole / "jokes.jsonl").read_bytes()
    for link in ("latest", "best"):
        assert (run / link).readlink() == (whole / link).readlink()
        assert_same_checkpoint(run / link, whole / link)
    assert (whole / "best").resolve() != (whole / "latest").resolve()
    names = [sorted(path.name for path in (r / "checkpoints").iterdir()) for r in (run, whole)]
    assert names[0] == names[1]
    print(f"{killed} kills, {struck['saves']} amid a save, {struck['steps']} of {STEPS} steps done")
    print({what.decode(): round(1000 * seconds, 1) for what, seconds in usual.items()})


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_killed_in_one_process_or_both_two_processes_come_to_the_same_end(
    make: MakeRecipe, tmp_path: Path, engine: str
) -> None:
    whole, run, output = tmp_path / "whole", tmp_path / "killed", tmp_path / "output.txt"
    settings: dict[str, Any] = {
        "distributed": {"engine": engine},
        "max_steps": 20,
        "evaluation": {"every_steps": 10, "max_new_tokens": 2, "memorisation_pictures": 1},
    }
    undisturbed = fork_ranks(recipe_of(make, whole, **settings), False, output)
    assert [exit_code(child) for child in undisturbed] == [0, 0], output.read_text()

    recipe = recipe_of(make, run, **settings)
    chance = random.Random(engine)
    log, done, stuck = run / "metrics.jsonl", 0, 0
    for victims in ([0, 1], [0], [1]):
        children = fork_ranks(recipe, bool(state.checkpoints(run)), output)
        until = done + chance.randint(1, 5)
        while len(log.read_text().splitlines() if log.exists() else []) < until:
            assert os.waitpid(children[0], os.WNOHANG) == (0, 0), output.read_text()
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        for rank in victims:
            os.kill(children[rank], signal.SIGKILL)
        # Once in many runs gloo waits for a process that is gone; launchers end those that are left.
        codes = [exit_code(child, patience=60) for child in children]
        assert all(codes[rank] == -signal.SIGKILL for rank in victims)
        assert 0 not in codes
        stuck += codes.count(-signal.SIGKILL) - len(victims)
        left = state.checkpoints(run)
        for checkpoint in left:
            state.verify(checkpoint)
        done = len(log.read_text().splitlines())
    told = output.read_text()
    assert told.count("Another process of the run has ended") == 2 - stuck, told
    assert stuck < 2
    assert not [line for line in logged(run) if line["step"] == 20]

    assert [exit_code(child) for child in fork_ranks(recipe, True, output)] == [0, 0], told
    assert without_clock(run) == without_clock(whole)
    assert (run / "jokes.jsonl").read_bytes() == (whole / "jokes.jsonl").read_bytes()
    for link in ("latest", "best"):
        assert (run / link).readlink() == (whole / link).readlink()
        assert_same_checkpoint(run / link, whole / link)
