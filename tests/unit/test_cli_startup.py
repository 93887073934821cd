import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "PIL",
    "pydantic",
    "huggingface_hub",
    "bitsandbytes",
    "matplotlib",
    "fastapi",
    "gradio",
}


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("import deadpan.cli.main", set()),
        ("import deadpan, deadpan.errors, deadpan.environment", set()),
        # The control: the check sees what is imported.
        ("import deadpan.config.schema", {"pydantic"}),
    ],
)
def test_nothing_heavy_is_imported_before_a_verb_runs(code: str, imported: set[str]) -> None:
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = set(result.stdout.split())
    assert "deadpan" in modules
    assert modules & HEAVY == imported


def test_a_model_without_an_adapter_is_loaded_without_peft_and_bitsandbytes() -> None:
    code = "import deadpan, sys; teller = deadpan.load('nano', device='cpu'); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = set(result.stdout.split())
    assert "deadpan.models.decoding" in modules
    assert not modules & {"peft", "bitsandbytes"}


def test_a_mistake_in_a_recipe_is_told_before_pytorch_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['deadpan', 'train', 'nano', 'lora.rank=8']\n"
        "from deadpan.cli.main import run\n"
        "try:\n    run()\nfinally:\n    print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "'lora.rank' is unknown" in result.stderr
    assert set(result.stdout.split()) & HEAVY == {"pydantic"}
