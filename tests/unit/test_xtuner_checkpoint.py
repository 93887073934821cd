import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deadpan.checkpoints.xtuner import Imported, import_xtuner, read_checkpoint
from deadpan.errors import DeadpanError
from deadpan.models import lora
from deadpan.processing.tokenizer import read_json
from make_tiny_model import make_official
from xtuner import CONFIG, make_checkpoint

State = dict[str, torch.Tensor]
LAYER = "model.language_model.base_model.model.model.layers.1."


@pytest.fixture
def state(tiny: Path) -> State:
    return make_checkpoint(tiny)


def run(tmp_path: Path, content: Any, base: Path | None = None, **options: Any) -> Imported:
    checkpoint = tmp_path / "iter_2.pth"
    torch.save(content, checkpoint)
    return import_xtuner(checkpoint, tmp_path / "out", base=str(base) if base else None, **options)


def error(call: Callable[..., Any], *arguments: Any, **options: Any) -> DeadpanError:
    with pytest.raises(DeadpanError) as raised:
        call(*arguments, **options)
    return raised.value


@pytest.mark.parametrize("prefix", ["model.", "", "module.model."])
@pytest.mark.parametrize("nested", [True, False])
def test_the_names_may_begin_in_several_ways(
    tiny: Path, tmp_path: Path, prefix: str, nested: bool
) -> None:
    state = make_checkpoint(tiny, prefix=prefix)
    made = run(tmp_path, {"state_dict": state} if nested else state, tiny, lora_alpha=8)
    assert (made.r, made.lora_alpha, made.layers, made.base) == (4, 8, 11, str(tiny.resolve()))
    assert set(made.targets) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_2.pth", "out"]


def test_the_config_inside_the_checkpoint_says_the_scale_the_base_and_the_quantization(
    tiny: Path, tmp_path: Path, state: State
) -> None:
    text = CONFIG.replace("r=64", "r=4").replace("OpenGVLab/InternVL2-2B", str(tiny))
    made = run(tmp_path, {"meta": {"cfg": text}, "state_dict": state})
    assert (made.lora_alpha, made.source) == (256, "the config in iter_2.pth")
    assert made.quantization == "nf4"
    assert read_json(tmp_path / "out" / "deadpan.json")["trained_on"] == "nf4"
    assert read_json(tmp_path / "out" / "adapter_config.json")["lora_alpha"] == 256
    assert lora.base_of(tmp_path / "out") == str(tiny.resolve())


def test_without_a_config_nothing_is_said_of_quantization(
    tiny: Path, tmp_path: Path, state: State
) -> None:
    assert run(tmp_path, state, tiny, lora_alpha=8).quantization is None
    assert "trained_on" not in read_json(tmp_path / "out" / "deadpan.json")


def test_the_scale_is_never_guessed(tiny: Path, tmp_path: Path, state: State) -> None:
    found = error(run, tmp_path, state, tiny)
    assert found.what == "Nothing says what the LoRA's lora_alpha is; its scale is lora_alpha / r."
    assert found.fix is not None
    assert "--lora-alpha" in found.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"r": 8}, "8 in --r, 4 in language_model.model.layers.0.attention.wo.weight"),
        ({"lora_alpha": 8, "config": True}, "8 in --lora-alpha, 256 in"),
        ({"config": True}, "64 in"),
    ],
)
def test_two_values_are_an_error(
    tiny: Path, tmp_path: Path, state: State, options: dict[str, Any], found: str
) -> None:
    if options.pop("config", False):
        (tmp_path / "config.py").write_text(CONFIG)
        options = {**options, "config": tmp_path / "config.py"}
    else:
        options = {**options, "lora_alpha": 8}
    raised = error(run, tmp_path, state, tiny, **options)
    assert raised.what.startswith("There are two values of the LoRA's")
    assert raised.found is not None
    assert raised.found.startswith(found)


def test_no_base_is_an_error(tmp_path: Path, state: State) -> None:
    assert error(run, tmp_path, state, lora_alpha=8).fix == "pass --base MODEL"


def test_what_is_there_is_not_overwritten(tiny: Path, tmp_path: Path, state: State) -> None:
    (tmp_path / "out").mkdir()
    raised = error(run, tmp_path, state, tiny, lora_alpha=8)
    assert raised.what == "The folder to write exists already."


def _without(*names: str) -> Callable[[State], State]:
    return lambda state: {n: t for n, t in state.items() if not any(x in n for x in names)}


def _with(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "what", "found"),
    [
        (
            _without("layers.1.attention.wo.lora_B"),
            "The checkpoint lacks half of a LoRA.",
            "language_model.model.layers.1.attention.wo.weight",
        ),
        (
            _without("layers.1.attention.wo."),
            "The checkpoint lacks the LoRA of some o_proj.",
            "model.language_model.layers.1.self_attn.o_proj",
        ),
        (_without("mlp1.3.bias"), "The checkpoint lacks parts of the projector.", "mlp1.3.bias"),
        (
            _with("model.mlp1.5.bias", 3),
            "The checkpoint has parts of a projector that its base lacks.",
            "mlp1.5.bias",
        ),
        (
            _with("model.language_model.model.norm.weight", 3),
            "The checkpoint is not a LoRA of XTuner's for InternVL.",
            "model.language_model.model.norm.weight",
        ),
        (
            _with(f"{LAYER}attention.wo.lora_magnitude_vector", 3),
            "The checkpoint is not a LoRA of XTuner's for InternVL.",
            f"{LAYER}attention.wo.lora_magnitude_vector",
        ),
        (
            _with("model.vision_model.base_model.model.encoder.layers.0.attn.qkv.lora_A.weight", 3),
            "The checkpoint changes the vision tower, and deadpan's adapters cannot.",
            "model.vision_model.base_model.model.encoder.layers.0.attn.qkv.lora_A.weight",
        ),
        (
            lambda state: {
                **state,
                f"{LAYER}attention.wx.lora_A.default.weight": torch.zeros(4, 64),
                f"{LAYER}attention.wx.lora_B.default.weight": torch.zeros(64, 4),
            },
            "The checkpoint has LoRAs on layers that its base lacks.",
            "language_model.model.layers.1.attention.wx.weight",
        ),
        (
            _with(f"{LAYER}attention.wqkv.lora_B.default.weight", 192, 4),
            "The checkpoint's language_model.model.layers.1.attention.wqkv.weight lora_B has the wrong shape.",
            "(192, 4)",
        ),
        (
            _with("model.mlp1.3.bias", 3),
            "The checkpoint's mlp1.3.bias has the wrong shape.",
            "(3,)",
        ),
        (_without("lora_"), "The checkpoint is not a LoRA of XTuner's for InternVL.", "no LoRA"),
        (lambda _: {"a": 1}, "The checkpoint is not one of XTuner's.", "'a', which is no tensor"),
        (lambda _: {}, "The checkpoint holds no weights.", None),
    ],
)
def test_what_is_missing_surplus_or_misshapen_is_named(
    tiny: Path,
    tmp_path: Path,
    state: State,
    change: Callable[[State], Any],
    what: str,
    found: str | None,
) -> None:
    raised = error(run, tmp_path, change(state), tiny, lora_alpha=8)
    assert (raised.what, raised.found) == (what, found)
    assert not (tmp_path / "out").exists()


def test_other_families_have_their_own_names(tmp_path: Path) -> None:
    base = make_official(tmp_path / "qwen", "Qwen2ForCausalLM")
    wide = {"q_proj": (64, 64), "k_proj": (32, 64), "down_proj": (64, 128)}
    projector = {k: v for k, v in make_checkpoint(base, head=False).items() if "mlp1" in k}
    state = dict(projector)
    for number in range(2):
        for name, (rows, columns) in wide.items():
            part = "mlp" if name == "down_proj" else "self_attn"
            stem = f"model.language_model.base_model.model.model.layers.{number}.{part}.{name}"
            state[f"{stem}.lora_A.default.weight"] = torch.ones(2, columns)
            state[f"{stem}.lora_B.default.weight"] = torch.ones(rows, 2)
    made = run(tmp_path, state, base, lora_alpha=8)
    assert (made.layers, set(made.targets)) == (6, set(wide))


_HISTORY_BUFFER = """
import numpy

class HistoryBuffer:
    def __init__(self):
        self._log_history = numpy.zeros(3)

    def mean(self):
        return 0.0

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}
"""
"""mmengine's, as far as pickling goes."""


def test_objects_of_libraries_that_are_not_installed_are_passed_over(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("mmengine.logging.history_buffer")
    exec(_HISTORY_BUFFER, vars(module))
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    hub = {"log_scalars": {"train/loss": module.HistoryBuffer()}, "step": np.float64(3.0)}
    torch.save({"message_hub": hub, "state_dict": state}, tmp_path / "iter_2.pth")
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "iter_2.pth", weights_only=True)

    read, text = read_checkpoint(tmp_path / "iter_2.pth")
    assert text is None
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert "mmengine" not in sys.modules


class _Trap:
    def __init__(self, function: Callable[[str], object], argument: str) -> None:
        self.reduced = function, (argument,)

    def __reduce__(self) -> Any:
        return self.reduced


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, state: State) -> None:
    trap = tmp_path / "trap"
    torch.save(
        {"state_dict": state, "x": _Trap(exec, f"open({str(trap)!r}, 'w')")}, tmp_path / "a.pth"
    )
    assert read_checkpoint(tmp_path / "a.pth")[0].keys() == state.keys()
    torch.save({"state_dict": state, "x": _Trap(os.system, f"touch {trap}")}, tmp_path / "b.pth")
    raised = error(read_checkpoint, tmp_path / "b.pth")
    assert raised.what.startswith("The checkpoint cannot be read without running code from it")
    assert not trap.exists()


def test_files_that_are_no_checkpoint(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("cut.pth", "text.pth"):
        raised = error(read_checkpoint, tmp_path / name)
        assert raised.what == "The checkpoint is damaged, or not one that PyTorch has saved."
    raised = error(read_checkpoint, tmp_path / "absent.pth")
    assert raised.what == "The checkpoint cannot be read: No such file or directory."


def test_folders_that_are_split_or_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "iter_2.pth"
    folder.mkdir()
    raised = error(read_checkpoint, tmp_path)
    assert raised.fix == "give one of those in it: iter_2.pth"
    for rank in range(2):
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    raised = error(read_checkpoint, folder)
    assert raised.what == "DeepSpeed has split the weights over several files."
    assert raised.fix is not None
    assert "torch.save(load('iter_2.pth')" in raised.fix
