"""What preference training promises: its reference, its gradient, its resumption."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from command import DEADPAN, ENVIRONMENT
from deadpan.checkpoints.load import load as load_checkpoint
from deadpan.config.loader import dump_recipe
from deadpan.config.schema import Recipe
from deadpan.data import preferences
from deadpan.data.records import Record
from deadpan.engines.builtin import BuiltinEngine
from deadpan.errors import DeadpanError
from deadpan.models.answer_loss import AnswerLoss, plain_model
from deadpan.processing.collate import collate
from deadpan.teller import request
from deadpan.train import references
from deadpan.train.loop import Trainer
from deadpan.train.references import FILE, References
from deadpan.train.watcher import Watcher
from training import (
    MakeRecipe,
    SignalAfter,
    course,
    evaluations,
    identical,
    logged,
    recipes,
    result_of,
    train,
)

SETTINGS: dict[str, Any] = {
    "objective": "dpo",
    "dpo": {"beta": 0.5},
    "lora": {"lora_dropout": 0.05},
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "epochs": 3,
}
LAST = 6


@pytest.fixture(scope="module")
def pairs(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair for each picture, answers of different lengths. Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    liked = ["上班第一天，我就想退休。", "冷得像周一。", "一只猫。", "Why is it funny?"]
    path = folder / "pairs.jsonl"
    lines = [
        {"image": str(picture), "prompt": "讲一个梗。", "chosen": good, "rejected": f"不好笑{good[:2]}"}
        for picture, good in zip(pictures, liked, strict=True)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def make(tiny: Path, pairs: Path) -> MakeRecipe:
    return recipes(tiny, pairs)


@pytest.fixture(scope="module")
def tuned(tiny: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned jokes. Read only."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    train(recipes(tiny, records)(run, epochs=4, optimizer={"lr": 1e-2}))
    return run


def read(recipe: Recipe) -> list[Record]:
    return preferences.load(recipe.data.train)


def scores(model: Path, recipe: Recipe) -> list[list[float]]:
    """What the engine that answers users finds of each pair's two answers."""
    loaded = load_checkpoint(model, device="cpu", max_tiles=recipe.max_tiles)
    engine = BuiltinEngine(loaded)
    return [
        engine.score(
            request(pair.image_paths[0], pair.turns[0].text), [*pair.answers, str(pair.rejected)]
        )
        for pair in read(recipe)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_the_kept_reference_is_the_base_alone_and_stays_it(
    make: MakeRecipe, tiny: Path, tmp_path: Path, packing: bool
) -> None:
    recipe = make(tmp_path / "run", **SETTINGS, packing=packing)
    trainer = Trainer(recipe, False, Watcher())
    kept = References.load(tmp_path / "run")
    expected = torch.tensor(scores(tiny, recipe))
    found = torch.tensor([kept[pair] for pair in read(recipe)])
    assert torch.allclose(found, expected, atol=1e-4)
    trainer.train()
    # Training has moved the model away; with the adapter off it is its reference again.
    batch = collate(
        [s for pair in read(recipe) for s in trainer.processor.samples(pair)],
        trainer.processor.pad_id,
    )
    trainer.model.eval()
    with torch.no_grad():
        moved = trainer.loss.log_probabilities(batch).view(-1, 2)
        with trainer.model.disable_adapter():
            off = trainer.loss.log_probabilities(batch).view(-1, 2)
    assert torch.allclose(off, found, atol=1e-4)
    assert (moved - found).abs().max() > 0.1


def test_from_a_tuned_adapter_that_is_the_reference_and_the_start(
    make: MakeRecipe, tuned: Path, tmp_path: Path
) -> None:
    recipe = make(tmp_path / "run", **SETTINGS, adapter=str(tuned), max_steps=1)
    assert train(recipe).steps == 1
    kept = References.load(tmp_path / "run")
    found = torch.tensor([kept[pair] for pair in read(recipe)])
    assert torch.allclose(found, torch.tensor(scores(tuned, recipe)), atol=1e-4)
    assert not torch.allclose(found, torch.tensor(scores(Path(recipe.model), recipe)), atol=1.0)


def test_without_dropout_the_first_step_starts_at_log_two(make: MakeRecipe, tmp_path: Path) -> None:
    recipe = make(tmp_path / "run", **{**SETTINGS, "lora": {"lora_dropout": 0.0}})
    train(recipe)
    steps = logged(tmp_path / "run")
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["loss"] < 0.6
    assert steps[-1]["reward_accuracy"] == 1.0
    assert steps[-1]["reward_margin"] > 0.1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("decoder", ["transformers", "fused"])
def test_two_answers_at_once_have_the_gradients_of_one_at_a_time(
    make: MakeRecipe, tmp_path: Path, decoder: str, packing: bool
) -> None:
    changes = {"decoder": decoder, "packing": packing, "feature_cache": None}
    recipe = make(tmp_path / "run", **SETTINGS, **changes)
    trainer = Trainer(recipe, False, Watcher())
    trainer.model.eval()
    # A fresh adapter is zero, and so is half of its gradient.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.trainable:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    pairs = read(recipe)
    samples = [trainer.processor.samples(pair) for pair in pairs]
    pad = trainer.processor.pad_id
    together = collate([s for both in samples for s in both], pad, packing)
    loss = trainer.objective.loss(together)
    loss.backward()
    at_once = [p.grad.clone() for p in trainer.trainable if p.grad is not None]
    trainer.model.zero_grad(set_to_none=True)

    kept, beta, total = References.load(tmp_path / "run"), recipe.dpo.beta, 0.0
    loss_of = AnswerLoss(trainer.model)
    for pair, both in zip(pairs, samples, strict=True):
        found = []
        for sample in both:
            batch = collate([sample], pad)
            inputs = (batch.input_ids, batch.labels, batch.position_ids, batch.pixel_values)
            found.append(-loss_of(*inputs))
        chosen, rejected = kept[pair]
        alone = -torch.sigmoid(beta * ((found[0] - chosen) - (found[1] - rejected))).log()
        alone.backward()
        total += alone.item()
    one_by_one = [p.grad for p in trainer.trainable if p.grad is not None]
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert len(at_once) == len(one_by_one) == len(trainer.trainable)
    for one, other in zip(at_once, one_by_one, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_the_reference_fills_the_cache_and_the_vision_tower_rests_from_then_on(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**SETTINGS, "decoder": "fused", "packing": True}
    live = make(tmp_path / "live", feature_cache=None, **changes)
    train(live)
    cached = make(tmp_path / "cached", feature_cache=tmp_path / "features", **changes)
    trainer = Trainer(cached, False, Watcher())
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == len(read(cached))
    monkeypatch.delattr(type(plain_model(trainer.model).model.vision_tower), "forward")
    trainer.train()
    references = [References.load(tmp_path / name) for name in ("live", "cached")]
    for pair in read(cached):
        assert references[1][pair] == pytest.approx(references[0][pair], abs=1e-4)
    found = [[loss for _, loss, *_ in course(tmp_path / name)] for name in ("live", "cached")]
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[1][0] == pytest.approx(0.693147, abs=0.05)
    assert found[1][-1] < 0.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_on_a_gpu_the_decoder_written_out_learns_the_preferences(
    make: MakeRecipe, tmp_path: Path, quantization: str
) -> None:
    recipe = make(
        tmp_path / "run",
        **{**SETTINGS, "lora": {"lora_dropout": 0.0}, "data": {"validation": 0.25}},
        device="cuda",
        precision="bf16",
        quantization=quantization,
        packing=True,
        feature_cache=tmp_path / "features",
    )
    trainer = Trainer(recipe, False, Watcher())
    assert trainer.loss.fused is not None
    # Picture features are kept of the held-out pairs, too.
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 4
    trainer.train()
    steps = [line for line in logged(tmp_path / "run") if "loss" in line]
    # The same products of the same numbers, cached and packed otherwise.
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=0.05)
    assert steps[-1]["loss"] < 0.6
    assert steps[-1]["reward_accuracy"] == 1.0


@pytest.fixture(scope="module")
def uninterrupted(make: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to. Read only."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(evaluated(make, run)).steps == LAST
    return run


def evaluated(make: MakeRecipe, run: Path) -> Recipe:
    return make(
        run,
        **{**SETTINGS, "micro_batch_size": 1, "gradient_accumulation_steps": 2},
        data={"validation": 0.25},
        evaluation={"every_steps": 2, "max_new_tokens": 4, "memorisation_pictures": 1},
    )


@pytest.mark.parametrize("step", [1, 2, 5])
def test_interrupted_and_resumed_is_uninterrupted(
    make: MakeRecipe,
    uninterrupted: Path,
    tmp_path: Path,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    train(evaluated(make, run), watcher=SignalAfter(step))
    # Resuming asks the reference nothing: it is no longer in memory.
    monkeypatch.delattr(references, "compute")
    assert train(evaluated(make, run), resume=True).steps == LAST
    assert course(run) == course(uninterrupted)
    assert evaluations(run) == evaluations(uninterrupted)
    assert identical(result_of(run / "latest"), result_of(uninterrupted / "latest"))


def test_so_it_is_with_the_decoder_written_out_and_the_cache(
    make: MakeRecipe, tmp_path: Path
) -> None:
    changes = {"decoder": "fused", "packing": True, "epochs": 2}
    one, other = (
        make(tmp_path / name, **{**SETTINGS, **changes}, feature_cache=tmp_path / f"of-{name}")
        for name in ("one", "other")
    )
    train(one)
    train(other, watcher=SignalAfter(2))
    train(other, resume=True)
    assert course(tmp_path / "one") == course(tmp_path / "other")
    assert identical(*(result_of(tmp_path / name / "latest") for name in ("one", "other")))


def test_a_lost_reference_is_asked_again_of_the_base_that_the_weights_have_left(
    make: MakeRecipe, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(evaluated(make, run), watcher=SignalAfter(3))
    (run / FILE).unlink()
    train(evaluated(make, run), resume=True)
    assert (run / FILE).read_bytes() == (uninterrupted / FILE).read_bytes()
    assert identical(result_of(run / "latest"), result_of(uninterrupted / "latest"))


def test_a_lost_reference_of_an_adapter_is_an_error(
    make: MakeRecipe, tuned: Path, tmp_path: Path
) -> None:
    recipe = make(tmp_path / "run", **SETTINGS, adapter=str(tuned))
    train(recipe, watcher=SignalAfter(1))
    (tmp_path / "run" / FILE).write_text("{")
    with pytest.raises(DeadpanError, match="reference is gone"):
        train(recipe, resume=True)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(
    make: MakeRecipe, tuned: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "lora": {"lora_dropout": 0.0}, "micro_batch_size": 1, "epochs": 2}
    one = make(
        tmp_path / "one", **{**settings, "gradient_accumulation_steps": 2}, adapter=str(tuned)
    )
    train(one)
    two = make(tmp_path / "two", **settings, adapter=str(tuned))
    (tmp_path / "two.yaml").write_text(dump_recipe(two), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command = [*launcher, "--nproc-per-node=2", str(DEADPAN), "train", str(tmp_path / "two.yaml")]
    made = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    keys = ("loss", "reward_margin", "preferred", "logps_chosen", "logps_rejected")
    for expected, found in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert [found[key] for key in keys] == pytest.approx([expected[key] for key in keys], 1e-6)
    references = [json.loads((tmp_path / name / FILE).read_text()) for name in ("one", "two")]
    assert references[0].keys() == references[1].keys()


def test_evaluations_tell_how_many_pairs_are_preferred(uninterrupted: Path) -> None:
    lines = evaluations(uninterrupted)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["eval_preferred"] in (0.0, 1.0)
        assert (line["eval_reward_margin"] > 0) == (line["eval_loss"] < 0.6931)
        assert (line["eval_logps_chosen"] > line["eval_logps_rejected"]) == line["eval_preferred"]
