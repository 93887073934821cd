"""What XTuner has left behind, taken over by the command line."""

import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from command import DEADPAN, ENVIRONMENT
from xtuner import CONFIG, make_checkpoint


def deadpan(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(DEADPAN), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=False
    )


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
    made = deadpan(desk, "recipe", "import", "old.py", "--out", "new.yaml")
    assert made.returncode == 0, made.stderr
    text = (desk / "new.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["lora"] == {"r": 4, "lora_alpha": 8}
    told = made.stdout.splitlines()
    assert told[-2:] == ["wrote new.yaml; read it, then run:", "  deadpan train new.yaml"]
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    assert set(comments[1:]) <= set(told)
    assert any(line.startswith("- train_dataloader.sampler.type") for line in comments)

    printed = deadpan(desk, "recipe", "import", "old.py")
    assert printed.stdout == text
    again = deadpan(desk, "recipe", "import", "old.py", "--out", "new.yaml")
    assert again.returncode == 1
    assert "The file is already there." in again.stderr
    assert "Traceback" not in again.stderr

    settings = ["max_steps=1", "max_tiles=2", "data.workers=0", "device=cpu", "run=run"]
    trained = deadpan(desk, "train", "new.yaml", *settings)
    assert trained.returncode == 0, trained.stderr
    assert (desk / "run" / "latest" / "adapter_model.safetensors").exists()


def test_a_checkpoint_becomes_an_adapter_that_tells_and_exports(
    desk: Path, pictures: list[Path]
) -> None:
    nameless = deadpan(desk, "import-xtuner", "iter_2.pth", "teller", "--base", "nano")
    assert nameless.returncode == 1
    assert "Nothing says what the LoRA's lora_alpha is" in nameless.stderr
    assert not (desk / "teller").exists()

    made = deadpan(desk, "import-xtuner", "iter_2.pth", "teller", "--config", "old.py")
    assert made.returncode == 0, made.stderr
    assert "LoRA of 11 layers, r 4, lora_alpha 8 (from old.py)" in made.stdout
    assert "hear it: deadpan tell teller PICTURE" in made.stdout

    exported = deadpan(desk, "export", "teller", "whole")
    assert exported.returncode == 0, exported.stderr
    answers = [
        deadpan(desk, "tell", model, pictures[0], "--device", "cpu")
        for model in ("teller", "whole")
    ]
    assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout == answers[1].stdout != ""
