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
