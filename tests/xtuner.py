"""What XTuner 0.1 leaves behind, in miniature: a config and a checkpoint in its key layout."""

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
