"""Records of one picture behind one copy of it train like samples of their own.

In float32, within the rounding of sums that run in another order (see test_loss.py).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import give_voice
from deadpan.config.schema import Recipe
from deadpan.data.records import Record, Turn
from deadpan.data.records import load as load_records
from deadpan.errors import DeadpanError
from deadpan.models.answer_loss import AnswerLoss, plain_model
from deadpan.models.fused_loss import FusedLoss
from deadpan.processing.collate import collate
from deadpan.processing.prefix import shared_prefixes
from deadpan.train.features import FeatureCache
from deadpan.train.forecast import load_of
from deadpan.train.loader import MicroBatches
from deadpan.train.loop import Trainer
from deadpan.train.plan import MicroBatch
from deadpan.train.rehearsal import Rehearsal
from deadpan.train.watcher import Watcher
from make_tiny_model import make_official
from training import MakeRecipe, SignalAfter, course, identical, logged, recipes, result_of, train

GROUPS = ((0, 2, 5), (1,), (3, 6), (4,), (7,))
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def answers(pictures: list[Path]) -> Path:
    """Eight records: three answers to one picture, two to two others, another question, no picture."""
    asked = "<image>\n讲一个梗。"
    rows: list[tuple[Path | None, list[str]]] = [
        (pictures[1], [asked, "上班第一天，我就想退休。"]),
        (pictures[1], ["<image>\nWhy is it funny?", "一只猫。"]),
        (pictures[1], [asked, "冷得像周一。"]),
        (None, ["讲一个梗。", "一只狗。"]),
        (pictures[2], [asked, "冷。"]),
        (pictures[1], [asked, "一只猫。", "Why?", "冷得像周一。"]),
        (None, ["讲一个梗。", "冷得像周一，我就想退休。"]),
        (pictures[0], [asked, "一只狗。"]),
    ]
    path = pictures[0].parent / "answers.json"
    samples = [
        {
            "image": picture and picture.name,
            "conversations": [
                {"from": "gpt" if place % 2 else "human", "value": text}
                for place, text in enumerate(texts)
            ],
        }
        for picture, texts in rows
    ]
    path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def records(answers: Path) -> list[Record]:
    return load_records(answers)


@pytest.fixture(scope="module")
def make(tiny: Path, answers: Path) -> MakeRecipe:
    return recipes(tiny, answers)


def shared(make: MakeRecipe, run: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "shared_prefix": True,
        "packing": True,
        "lora": {"lora_dropout": 0.0},
        "micro_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "epochs": 2,
        "feature_cache": None,
    }
    return make(run, **{**settings, **changes})


def test_records_of_the_same_pictures_and_question_share(records: list[Record]) -> None:
    assert shared_prefixes(records) == GROUPS
    # A picture that comes after the first answer is in no prefix.
    turns = ("讲一个梗。", "冷。", "<image>\n这个呢？", "一只猫。")
    later = [Turn("gpt" if place % 2 else "human", text) for place, text in enumerate(turns)]
    assert shared_prefixes([replace(records[0], turns=tuple(later))] * 2) == ((0,), (1,))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_loss_and_gradients_are_those_of_separate_samples(
    make: MakeRecipe, records: list[Record], tmp_path: Path, packing: bool, cached: bool
) -> None:
    trainer = Trainer(shared(make, tmp_path / "run"), False, Watcher(), dry_run=True)
    model, processor = trainer.model, trainer.processor
    torch.manual_seed(0)
    give_voice(model)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {**found, "loss": loss.detach()}

    apart = collate([processor.record(record) for record in records], processor.pad_id)
    expected = gradients(
        AnswerLoss(model)(apart.input_ids, apart.labels, apart.position_ids, apart.pixel_values)
    )
    cache = None
    fused = FusedLoss(model, torch.float32)
    if cached:
        cache = FeatureCache(tmp_path / "kept", plain_model(model), processor, torch.float32)
        assert cache.has_room(1)
    prepare = MicroBatches(records, processor, packing, cache)
    batch = prepare.batch(MicroBatch(1, 0, GROUPS))
    if cache is not None:
        keep = [cache.folder / path.name for path, _ in batch.feature_files]
        counts = [count for _, count in batch.feature_files]
        fused(batch, lambda features: cache.write(keep, features.split(counts)))
        batch = prepare.batch(MicroBatch(1, 0, GROUPS))
        assert batch.features is not None
    found = gradients(fused(batch))
    assert batch.supervised == apart.supervised
    assert batch.tokens < 0.7 * apart.tokens
    assert sorted(batch.names) == sorted(apart.names)
    assert max(g.abs().max().item() for g in expected.values()) / apart.supervised > 0.1
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * apart.supervised)


def test_a_step_has_the_samples_that_the_recipe_says_however_it_is_cut(
    make: MakeRecipe, tmp_path: Path
) -> None:
    """And an epoch every record once; where a cut goes through a group, nothing changes but the cost."""
    cuts = {"one": (6, 1), "three": (2, 3), "six": (1, 6)}
    for name, (size, accumulation) in cuts.items():
        recipe = shared(
            make,
            tmp_path / name,
            micro_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        train(recipe)
    samples = [[line["samples"] for line in logged(tmp_path / name)] for name in cuts]
    assert samples == [[6, 8, 14, 16]] * 3
    one, *others = (course(tmp_path / name) for name in cuts)
    for other in others:
        for (_, *expected), (_, *found) in zip(one, other, strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_stopped_and_resumed_is_uninterrupted(make: MakeRecipe, tmp_path: Path) -> None:
    def recipe(name: str) -> Recipe:
        cache = tmp_path / f"features of {name}"
        dropout = {"lora_dropout": 0.05}
        return shared(make, tmp_path / name, lora=dropout, feature_cache=cache)

    whole = train(recipe("whole"))
    for step in range(1, whole.steps + 1):
        stopped = train(recipe("stopped"), resume=step > 1, watcher=SignalAfter(step))
    assert course(tmp_path / "stopped") == course(tmp_path / "whole")
    assert identical(result_of(stopped.checkpoint), result_of(whole.checkpoint))


def test_the_forecast_counts_a_shared_prefix_once(make: MakeRecipe, tmp_path: Path) -> None:
    trainer = Trainer(shared(make, tmp_path / "run"), False, Watcher(), dry_run=True)
    survey = trainer.survey
    prepare = MicroBatches(survey.records, trainer.processor, True)
    tokens = 0
    for micro_batch in trainer.plan.micro_batches():
        batch = prepare.batch(micro_batch)
        load = load_of(micro_batch, survey.sizes, True)
        tiles = 0 if batch.pixel_values is None else len(batch.pixel_values)
        assert (load.samples, load.tokens) == (len(batch.names), batch.tokens)
        assert (load.supervised, load.tiles) == (batch.supervised, tiles)
        tokens += batch.tokens
    assert tokens < 2 * sum(survey.lengths)
    assert Rehearsal(trainer).forecast().whole.tokens == tokens


def test_a_model_that_the_fused_decoder_does_not_know_is_refused(
    answers: Path, tmp_path: Path
) -> None:
    folder = make_official(tmp_path / "model", "Phi3ForCausalLM")
    recipe = shared(recipes(folder, answers), tmp_path / "run")
    with pytest.raises(DeadpanError, match="The fused decoder cannot train this model") as caught:
        train(recipe)
    assert caught.value.fix == "use decoder=transformers and shared_prefix=false"
