"""Features from the cache train like features made on the spot, and belong to one picture alone."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from deadpan.data.records import load as load_records
from deadpan.models.answer_loss import plain_model
from deadpan.train.features import FeatureCache
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher
from training import MakeRecipe, course, identical, recipes, result_of, train


@pytest.fixture
def make(tiny: Path, records: Path) -> MakeRecipe:
    return recipes(tiny, records)


def test_cached_features_train_like_live_ones(make: MakeRecipe, tmp_path: Path) -> None:
    changes = {"decoder": "fused", "packing": True, "epochs": 3, "micro_batch_size": 2}
    live = make(tmp_path / "live", feature_cache=None, **changes)
    train(live)
    cached = make(tmp_path / "cached", feature_cache=tmp_path / "features", **changes)
    train(cached)
    files = sorted((tmp_path / "features").rglob("*.safetensors"))
    assert len(files) == 4
    for (_, loss, *_), (_, expected, *_) in zip(
        course(tmp_path / "cached"), course(tmp_path / "live"), strict=True
    ):
        assert loss == pytest.approx(expected, abs=1e-5)


def test_later_epochs_read_the_cache(make: MakeRecipe, tmp_path: Path) -> None:
    recipe = make(
        tmp_path / "run",
        decoder="fused",
        feature_cache=tmp_path / "features",
        max_steps=1,
        micro_batch_size=4,
        gradient_accumulation_steps=1,
    )
    before = train(recipe)
    for file in (tmp_path / "features").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8] + b"\x00\x00\x80\x3f\x00\x00\x80\x3f")
    after = train(recipe.model_copy(update={"run": str(tmp_path / "again")}))
    assert not identical(result_of(before.checkpoint), result_of(after.checkpoint))


def test_another_picture_model_or_type_finds_nothing(
    make: MakeRecipe, tmp_path: Path, records: Path
) -> None:
    trainer = Trainer(make(tmp_path / "run"), False, Watcher(), dry_run=True)
    model, processor = plain_model(trainer.model), trainer.processor
    record = load_records(records)[0]
    cache = FeatureCache(tmp_path / "features", model, processor, torch.float32)
    assert cache.has_room(1)
    [path] = cache.paths(record)
    cache.write([path], [torch.ones(1, 4, 8)])
    assert cache.read([path]) is not None

    assert (
        FeatureCache(tmp_path / "features", model, processor, torch.bfloat16).folder != cache.folder
    )
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).flatten()[0] += 1
    other = FeatureCache(tmp_path / "features", model, processor, torch.float32)
    assert other.folder != cache.folder
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).flatten()[0] -= 1

    changed = tmp_path / "changed.png"
    Image.new("RGB", (64, 64), "white").save(changed)
    [elsewhere] = cache.paths(type(record)(**{**record.__dict__, "images": (str(changed),)}))
    assert cache.read([elsewhere]) is None

    path.write_bytes(path.read_bytes()[:-5])
    assert cache.read([path]) is None
