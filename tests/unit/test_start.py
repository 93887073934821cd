"""A recipe that starts from an adapter takes its shape."""

from pathlib import Path

import pytest

from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.train.start import with_adapter
from training import MakeRecipe, train


@pytest.fixture(scope="module")
def run(make: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step. Read only."""
    run = tmp_path_factory.mktemp("start") / "run"
    train(make(run, max_steps=1, train_projector=False, lora={"r": 4, "lora_alpha": 12}))
    return run


def plain(tiny: Path, records: Path, **changes: object) -> Recipe:
    values = {"model": str(tiny), "data": {"train": str(records)}, **changes}
    return Recipe.model_validate(values)


def test_the_shape_is_the_adapters(tiny: Path, records: Path, run: Path) -> None:
    recipe = plain(tiny, records, adapter=str(run), lora={"lora_dropout": 0.2})
    found = with_adapter(recipe)
    assert (found.lora.r, found.lora.lora_alpha, found.train_projector) == (4, 12, False)
    assert found.lora.lora_dropout == 0.2
    assert "w1" not in found.lora.target_modules
    assert "q_proj" in found.lora.target_modules
    # A run's own recipe says what the adapter says.
    again = Recipe.model_validate(found.model_dump())
    assert with_adapter(again) == found
    assert with_adapter(plain(tiny, records)) == plain(tiny, records)


def test_another_shape_or_base_is_refused(
    tiny: Path, records: Path, run: Path, tmp_path: Path
) -> None:
    recipe = plain(tiny, records, adapter=str(run), lora={"r": 8})
    with pytest.raises(DeadpanError, match=r"another lora\.r") as caught:
        with_adapter(recipe)
    assert (caught.value.expected, caught.value.found) == ("4", "8")
    with pytest.raises(DeadpanError, match="trained on another model"):
        with_adapter(plain(tiny, records, model="nano", adapter=str(run)))
    with pytest.raises(DeadpanError, match="is a whole model"):
        with_adapter(plain(tiny, records, adapter=str(tiny)))


def test_fine_tuning_goes_on_from_an_adapter(make: MakeRecipe, run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    more = make(tmp_path / "more", adapter=str(run), max_steps=1, lora={"r": 4, "lora_alpha": 12},
                optimizer={"lr": 1e-12})  # fmt: skip
    train(more)
    before = load_file(run / "latest" / "adapter_model.safetensors")
    after = load_file(tmp_path / "more" / "latest" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all((after[name] - before[name]).abs().max() < 1e-6 for name in before)
    assert any(tensor.abs().max() > 0 for name, tensor in before.items() if "lora_B" in name)
