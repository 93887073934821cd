"""What XTuner has left behind, taken over by the command line."""

from pathlib import Path

import pytest
import torch
import yaml

from command import deadpan, forked
from xtuner import CONFIG, make_checkpoint


@pytest.fixture(scope="module")
def desk(tiny: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of someone who has trained with XTuner: a config and a checkpoint."""
    folder = tmp_path_factory.mktemp("desk")
    text = CONFIG
    for old, new in {
        "OpenGVLab/InternVL2-2B": str(tiny),
        "'./data/'": repr(f"{records.parent}/"),
        "ex_cn.json": records.name,
        "data_root + 'images'": "data_root",
        "r=64, lora_alpha=256": "r=4, lora_alpha=8",
        "quantization_llm=True": "quantization_llm=False",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "old.py").write_text(text)
    torch.save({"state_dict": make_checkpoint(tiny)}, folder / "iter_2.pth")
    return folder


def test_a_config_becomes_a_recipe_that_trains(desk: Path) -> None:
    made, printed = deadpan(
        desk,
        ["recipe", "import", "old.py", "--out", "new.yaml"],
        ["recipe", "import", "old.py"],
    )
    assert made.code == 0, made.error
    text = (desk / "new.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["lora"] == {"r": 4, "lora_alpha": 8}
    told = made.out.splitlines()
    assert told[-2:] == ["wrote new.yaml; read it, then run:", "  deadpan train new.yaml"]
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    assert set(comments[1:]) <= set(told)
    assert any(line.startswith("- train_dataloader.sampler.type") for line in comments)
    assert printed.out == text

    settings = ["max_steps=1", "max_tiles=2", "data.workers=0", "device=cpu", "run=run"]
    again, trained = forked(
        desk,
        ["recipe", "import", "old.py", "--out", "new.yaml"],
        ["train", "new.yaml", *settings],
    )
    assert again.code == 1
    assert "The file is already there." in again.error
    assert "Traceback" not in again.error
    assert trained.code == 0, trained.error
    assert (desk / "run" / "latest" / "adapter_model.safetensors").exists()


def test_a_checkpoint_becomes_an_adapter_that_tells_and_exports(
    desk: Path, pictures: list[Path]
) -> None:
    (nameless,) = forked(desk, ["import-xtuner", "iter_2.pth", "teller", "--base", "nano"])
    assert nameless.code == 1
    assert "Nothing says what the LoRA's lora_alpha is" in nameless.error
    assert not (desk / "teller").exists()

    (made,) = deadpan(desk, ["import-xtuner", "iter_2.pth", "teller", "--config", "old.py"])
    assert made.code == 0, made.error
    assert "LoRA of 11 layers, r 4, lora_alpha 8 (from old.py)" in made.out
    assert "hear it: deadpan tell teller PICTURE" in made.out

    exported, *answers = forked(
        desk,
        ["export", "teller", "whole"],
        *(["tell", model, pictures[0], "--device", "cpu"] for model in ("teller", "whole")),
    )
    assert exported.code == 0, exported.error
    assert [answer.code for answer in answers] == [0, 0], answers[0].error
    assert answers[0].out == answers[1].out != ""
