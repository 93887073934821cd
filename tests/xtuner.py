"""What XTuner 0.1 leaves behind, in miniature: a config and a checkpoint in its key layout."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG = """\
from mmengine.hooks import CheckpointHook, IterTimerHook, LoggerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoTokenizer
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.engine.hooks import DatasetInfoHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import InternVL_V1_5
from xtuner.utils import PROMPT_TEMPLATE

path = 'OpenGVLab/InternVL2-2B'
data_root = './data/'
data_path = data_root + 'ex_cn.json'
image_folder = data_root + 'images'
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = 4096
batch_size = 4
accumulative_counts = 4
dataloader_num_workers = 4
max_epochs = 6
optim_type = AdamW
lr = 2e-5
betas = (0.9, 0.999)
weight_decay = 0.05
max_norm = 1
warmup_ratio = 0.03
save_steps = 1000
save_total_limit = 1

model = dict(
    type=InternVL_V1_5,
    model_path=path,
    freeze_llm=True,
    freeze_visual_encoder=True,
    quantization_llm=True,
    quantization_vit=False,
    llm_lora=dict(
        type=LoraConfig, r=64, lora_alpha=256, lora_dropout=0.05, target_modules=None,
        task_type='CAUSAL_LM'))
llava_dataset = dict(
    type=InternVL_V1_5_Dataset, model_path=path, data_paths=data_path,
    image_folders=image_folder, template=prompt_template, max_length=max_length)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    dataset=llava_dataset,
    sampler=dict(
        type=LengthGroupedSampler, length_property='modality_length',
        per_device_batch_size=batch_size * accumulative_counts),
    collate_fn=dict(type=default_collate_fn))
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale='dynamic',
    dtype='float16')
param_scheduler = [
    dict(
        type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0,
        end=warmup_ratio * max_epochs, convert_to_iter_based=True),
    dict(
        type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=warmup_ratio * max_epochs,
        end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
tokenizer = dict(
    type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=path,
    trust_remote_code=True)
custom_hooks = [dict(type=DatasetInfoHook, tokenizer=tokenizer)]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    checkpoint=dict(
        type=CheckpointHook, save_optimizer=False, by_epoch=False, interval=save_steps,
        max_keep_ckpts=save_total_limit))
env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend='nccl'))
visualizer = None
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=False)
"""


def make_checkpoint(
    base: Path, r: int = 4, head: bool = True, seed: int = 3, prefix: str = "model."
) -> dict[str, torch.Tensor]:
    """A random LoRA on all of a tiny InternLM2's linear layers, and another projector, in XTuner's names.

    Args:
        base: The official checkpoint it belongs to.
        r: The rank.
        head: Whether the output head has a LoRA, as with target_modules=None.
        seed: Of the random numbers.
        prefix: What the names begin with.
    """
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    layers = (
        r"language_model\.model\.layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.w[123])\.weight"
    )
    state = {}
    for name, weight in weights.items():
        if re.fullmatch(layers, name) or (head and name == "language_model.output.weight"):
            layer = name.removeprefix("language_model.").removesuffix(".weight")
            stem = f"{prefix}language_model.base_model.model.{layer}"
            rows, columns = weight.shape
            for side, shape in (("A", (r, columns)), ("B", (rows, r))):
                noise = torch.randn(shape, generator=generator)
                state[f"{stem}.lora_{side}.default.weight"] = 0.1 * noise
        elif name.startswith("mlp1."):
            noise = torch.randn(weight.shape, generator=generator)
            state[f"{prefix}{name}"] = weight + 0.05 * noise
    return state


def merged(base: Path, state: dict[str, torch.Tensor], scale: float, out: Path) -> Path:
    """The official checkpoint that a LoRA in XTuner's names stands for: W + scale B A, layer by layer."""
    shutil.copytree(base, out)
    weights = load_file(base / "model.safetensors")
    for name, tensor in state.items():
        if ".lora_A." in name:
            layer = name.partition("base_model.model.")[2].partition(".lora_A.")[0]
            high = state[name.replace(".lora_A.", ".lora_B.")]
            weights[f"language_model.{layer}.weight"] += scale * (high @ tensor)
        elif "mlp1." in name:
            weights[name[name.index("mlp1.") :]] = tensor
    save_file(weights, out / "model.safetensors")
    return out
