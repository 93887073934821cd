import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deadpan.checkpoints.load import Loaded, load
from deadpan.checkpoints.xtuner import import_xtuner
from xtuner import CONFIG, make_checkpoint, merged


def logits(loaded: Loaded) -> torch.Tensor:
    noise = torch.randint(256, (50, 120, 3), generator=torch.Generator().manual_seed(2))
    picture = Image.fromarray(noise.to(torch.uint8).numpy())
    inputs: dict[str, Any] = loaded.processor([picture], "<image>\n上班第一天。 Why is it funny?")
    with torch.inference_mode():
        return loaded.model.eval()(**inputs).logits.float()


@pytest.mark.parametrize(
    ("head", "rslora"), [(True, False), (False, False), (True, True)], ids=["head", "", "rslora"]
)
def test_an_imported_lora_is_the_official_weights_plus_its_product(
    tiny: Path, tmp_path: Path, head: bool, rslora: bool
) -> None:
    r, alpha = 4, 24
    state = make_checkpoint(tiny, r, head)
    torch.save({"state_dict": state}, tmp_path / "iter_2.pth")
    config = tmp_path / "config.py"
    options = f"r={r}, lora_alpha={alpha}, use_rslora={rslora}"
    config.write_text(CONFIG.replace("r=64, lora_alpha=256", options))
    import_xtuner(tmp_path / "iter_2.pth", tmp_path / "adapter", base=str(tiny), config=config)

    scale = alpha / (r**0.5 if rslora else r)
    reference = logits(load(merged(tiny, state, scale, tmp_path / "official")))
    torch.testing.assert_close(logits(load(tmp_path / "adapter")), reference, atol=2e-4, rtol=0)
    assert (logits(load(tiny)) - reference).abs().max() > 1


def test_the_deepspeed_folder_and_the_plain_file_give_the_same_adapter(
    tiny: Path, tmp_path: Path
) -> None:
    state = make_checkpoint(tiny)
    torch.save({"state_dict": state}, tmp_path / "iter_2.pth")
    folder = tmp_path / "deepspeed" / "iter_2.pth"
    folder.mkdir(parents=True)
    torch.save({"module": state, "global_steps": 1}, folder / "mp_rank_00_model_states.pt")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not read")
    written = []
    for number, checkpoint in enumerate([tmp_path / "iter_2.pth", folder]):
        import_xtuner(checkpoint, tmp_path / f"out{number}", base=str(tiny), lora_alpha=8)
        written.append((tmp_path / f"out{number}" / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]
    shutil.rmtree(folder)
