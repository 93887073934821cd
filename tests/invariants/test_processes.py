"""Several processes train what one process with as many micro-batches a step trains.

Launched as a user launches them. Of five records two processes make an epoch of several steps, of
which the last has a micro-batch for rank 0 alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from command import DEADPAN
from deadpan.config.loader import dump_recipe
from deadpan.data.records import load
from deadpan.errors import DeadpanError
from deadpan.train.plan import Plan
from forked import exit_code, fork_ranks
from training import MakeRecipe, course, evaluations, identical, logged, recipes, result_of, train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

ONE_MESSAGE = """
import os
from deadpan.cli.main import run
from deadpan.train import split

surveyed = split.survey

def survey(*arguments):
    found = surveyed(*arguments)
    open(os.environ["BREAKS"], "wb").close()
    return found

split.survey = survey
run()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five records with answers of different lengths, so that tokens are spread unevenly. Read only."""
    folder = tmp_path_factory.mktemp("data")
    samples: list[dict[str, Any]] = []
    for number in range(5):
        Image.new("RGB", (60 + 20 * number, 80), (40 * number, 90, 0)).save(
            folder / f"{number}.png"
        )
        turns = [
            {"from": "human", "value": "<image>\n讲一个梗。"},
            {"from": "gpt", "value": "冷得像周一。" * (number + 1)},
        ]
        samples.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    # Without a picture, so that a rank may have no gradient of the projector.
    samples[2] = {
        "id": "r2",
        "image": None,
        "conversations": [
            {"from": "human", "value": "讲一个梗。"},
            {"from": "gpt", "value": "没有图。"},
        ],
    }
    (folder / "records.json").write_text(json.dumps(samples), encoding="utf-8")
    Image.new("RGB", (50, 50), (7, 7, 7)).save(folder / "held-out.png")
    held_out = {**samples[0], "id": "held-out", "image": "held-out.png"}
    (folder / "held-out.json").write_text(json.dumps([held_out]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def make(tiny: Path, data: Path) -> MakeRecipe:
    return recipes(tiny, data / "records.json")


def launched(folder: Path, recipe: Any, *options: str) -> subprocess.Popen[str]:
    """`deadpan train` in two processes."""
    path = folder / f"{Path(recipe.run).name}.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return launch(["--no-python", DEADPAN], path, *options)


def launch(program: list[Any], *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, *program, "train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def assert_same_weights(runs: Path, atol: float) -> None:
    one, two = (
        load_file(runs / name / "latest/adapter_model.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=atol), name


def test_two_processes_are_one_with_twice_the_accumulation(
    make: MakeRecipe, data: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "lora": {"lora_dropout": 0.0},
        "data": {"validation": data / "held-out.json"},
        "evaluation": {"max_new_tokens": 4},
        "micro_batch_size": 1,
        "epochs": 2,
    }
    train(make(tmp_path / "one", gradient_accumulation_steps=4, **settings))
    code, out, error = ended(
        launched(tmp_path, make(tmp_path / "two", gradient_accumulation_steps=2, **settings))
    )
    assert code == 0, error
    assert out.count("done: 4 steps") == 1
    one, two = (course(tmp_path / name) for name in ("one", "two"))
    assert [step for step, *_ in one] == [step for step, *_ in two] == [1, 2, 3, 4]
    for (_, *expected), (_, *found) in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    samples = [[line["samples"] for line in logged(tmp_path / name)] for name in ("one", "two")]
    assert samples[0] == samples[1]
    for before, after in zip(*map(evaluations, (tmp_path / "one", tmp_path / "two")), strict=True):
        assert after["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)
    assert_same_weights(tmp_path, atol=1e-6)


@pytest.mark.parametrize(
    "distributed",
    [
        {"engine": "fsdp2"},
        {"engine": "deepspeed", "zero_stage": 1},
        {"engine": "deepspeed", "zero_stage": 2},
    ],
    ids=["fsdp2", "zero-1", "zero-2"],
)
def test_in_parts_it_is_the_same_run_and_goes_on_as_it_was(
    make: MakeRecipe, data: Path, tmp_path: Path, distributed: dict[str, Any]
) -> None:
    zero = distributed["engine"] == "deepspeed"
    if zero:
        pytest.importorskip("deepspeed")
    settings: dict[str, Any] = {
        "lora": {"lora_dropout": 0.0},
        "data": {"validation": data / "held-out.json"},
        "evaluation": {"max_new_tokens": 4},
        "micro_batch_size": 1,
        "epochs": 2,
        "save_every_steps": 1,
        "keep_checkpoints": 9,
        "seed": 2 if zero else 0,
    }
    output = tmp_path / "output.txt"
    one = make(tmp_path / "one", gradient_accumulation_steps=4, **settings)
    plan = Plan(5, one.epochs, 1, 4, one.seed, None)
    alone = [{i for batch in step for i in batch.indices} == {2} for step in plan.steps_after(0)]
    # Of a step without any picture ZeRO's partitions have zeros, where the others have no gradient.
    assert any(alone) is not zero
    train(one)
    two = make(tmp_path / "two", gradient_accumulation_steps=2, distributed=distributed, **settings)
    assert [exit_code(rank) for rank in fork_ranks(two, False, output)] == [0, 0], (
        output.read_text()
    )
    assert len(course(tmp_path / "one")) == 4
    for (_, *expected), (_, *found) in zip(
        *(course(tmp_path / name) for name in ("one", "two")), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for before, after in zip(*map(evaluations, (tmp_path / "one", tmp_path / "two")), strict=True):
        assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    # Whole, under PEFT's names: what reads one checkpoint reads the other.
    assert_same_weights(tmp_path, atol=1e-5)

    shutil.copytree(tmp_path / "two", tmp_path / "again", symlinks=True)
    again = two.model_copy(update={"run": str(tmp_path / "again")})
    ranks = fork_ranks(again, "step-000002", output)
    assert [exit_code(rank) for rank in ranks] == [0, 0], output.read_text()
    assert (tmp_path / "again/checkpoints/step-000003.aside").is_dir()
    assert course(tmp_path / "again") == course(tmp_path / "two")
    assert evaluations(tmp_path / "again") == evaluations(tmp_path / "two")
    assert identical(*(result_of(tmp_path / name / "latest") for name in ("again", "two")))


def test_stopped_and_resumed_is_uninterrupted_and_another_number_is_refused(
    make: MakeRecipe, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "lora": {"lora_dropout": 0.1},
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 30,
        "epochs": 14,
    }
    whole, stopped = make(tmp_path / "whole", **settings), make(tmp_path / "stopped", **settings)
    code, _, error = ended(launched(tmp_path, whole))
    assert code == 0, error

    process = launched(tmp_path, stopped)
    log = tmp_path / "stopped" / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None, ended(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, out, error = ended(process)
    assert out.count("stopped after step") == 1, error
    assert len(logged(tmp_path / "stopped")) < 30, "it must be stopped amid the run"

    with pytest.raises(DeadpanError) as caught:
        train(stopped, resume=True)
    assert (caught.value.expected, caught.value.found) == ("2 processes", "1 process")

    code, _, error = ended(launched(tmp_path, stopped, "--resume"))
    assert code == 0, error
    assert course(tmp_path / "stopped") == course(tmp_path / "whole")
    results = [result_of(tmp_path / name / "latest") for name in ("stopped", "whole")]
    assert identical(*results)
    states = [
        torch.load(tmp_path / name / "latest" / "state.pt", weights_only=True)
        for name in ("stopped", "whole")
    ]
    (one,), (other,) = (state["random_of_others"] for state in states)
    assert torch.equal(one["torch"], other["torch"])
    # The ranks leave out different things.
    assert not torch.equal(one["torch"], states[0]["random"]["torch"])


def test_what_one_rank_meets_is_told_once(make: MakeRecipe, data: Path, tmp_path: Path) -> None:
    settings = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 3}
    recipe = make(tmp_path / "run", **settings)
    records = load(data / "records.json", None)
    plan = Plan(len(records), recipe.epochs, 1, 2, recipe.seed, 3)
    of_rank_1 = [records[step[1].indices[0]] for step in plan.steps_after(0) if len(step) > 1]
    broken = next(record for record in of_rank_1 if record.image_paths)
    picture = broken.image_paths[0]
    intact = picture.read_bytes()
    (tmp_path / "run.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (tmp_path / "breaks.py").write_text(ONE_MESSAGE, encoding="utf-8")
    try:
        code, out, error = ended(
            launch([tmp_path / "breaks.py"], tmp_path / "run.yaml", BREAKS=str(picture))
        )
    finally:
        picture.write_bytes(intact)
    assert code != 0
    assert not out
    assert error.count("error: ") == 1, error
    assert f"  where: {broken.name}" in error or picture.name in error
    assert "exitcode  : 1" in error
