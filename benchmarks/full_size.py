"""The whole story at InternVL2-2B's size with random weights: what each step costs on this machine.

    python benchmarks/full_size.py TOKENIZER PICTURES OUT [--scratch DIR] [--steps 20]

TOKENIZER is a folder with InternLM2's tokenizer files, PICTURES a folder of pictures. The model is
written once in the official layout, then loaded, heard, fine-tuned with LoRA and with QLoRA, exported
to both layouts, and reloaded. OUT gets a table in JSON. Random weights cost what trained ones cost;
what the model says means nothing.
"""

import argparse
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, InternVLForConditionalGeneration

from deadpan.checkpoints import keys
from deadpan.checkpoints.export import export
from deadpan.checkpoints.files import write_weights
from deadpan.checkpoints.official_config import to_transformers
from deadpan.checkpoints.processor_files import write_json
from deadpan.config.loader import load_recipe
from deadpan.data.pictures import open_picture
from deadpan.data.records import PROMPT, Turn
from deadpan.errors import DeadpanError
from deadpan.teller import load
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher
from make_tiny_model import random_weights

VOCAB, IMAGE_TOKEN_ID = 92553, 92546
CONFIG: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "use_thumbnail": True,
    "torch_dtype": "bfloat16",
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"],
        "bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 32768,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    },
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}

rows: list[dict[str, Any]] = []


@contextmanager
def stage(name: str) -> Iterator[dict[str, Any]]:
    """Time a step and note its peak memory; the step may add to its row."""
    row: dict[str, Any] = {"step": name}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    yield row
    torch.cuda.synchronize()
    row["seconds"] = round(time.perf_counter() - began, 2)
    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    rows.append(row)
    print(json.dumps(row, ensure_ascii=False), flush=True)


def write_model(folder: Path, tokenizer: Path) -> None:
    """Write the model in the official layout, weights drawn on the GPU."""
    shutil.copytree(tokenizer, folder)
    write_json(folder / "config.json", CONFIG)
    config = to_transformers(CONFIG, IMAGE_TOKEN_ID, True, folder / "config.json")
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    weights = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in random_weights(model, seed=0, device="cuda").items()
    }
    entries = keys.official_entries(config, weights, "InternLM2ForCausalLM")
    write_weights(((e.source, e.join([weights[n] for n in e.targets])) for e in entries), folder)


def write_records(path: Path, pictures: list[Path]) -> None:
    """Sixteen records, so that an epoch is one step of the walkthrough's 8 x 2 samples."""
    answers = [
        "热狗：今天的我，供不应求。",
        "它不难过，只是眼睛漏水。",
        "买大送小，概不退换。",
        "一个人，三份工资。",
    ]
    write_json(
        path,
        [
            {
                "id": str(number),
                "image": str(pictures[number % len(pictures)].resolve()),
                "conversations": [
                    {"from": "human", "value": f"<image>\n{PROMPT}"},
                    {"from": "gpt", "value": answers[number % len(answers)]},
                ],
            }
            for number in range(16)
        ],
    )


def hear(model: Path, pictures: list[Path], attention: str, quantization: str = "none") -> None:
    name = f"tell, {model.name}, {attention}" + (
        "" if quantization == "none" else f", {quantization}"
    )
    with stage(f"load, {model.name}, {attention}, {quantization}"):
        teller = load(model, attention=attention, quantization=quantization)
    teller.tell(pictures[0], max_new_tokens=8)  # warm-up: kernels are chosen and loaded
    with stage(f"{name}: {len(pictures)} pictures, 32 tokens each") as row:
        row["jokes"] = [joke[:24] for joke in teller.tell(pictures, max_new_tokens=32)]
    with stage(f"{name}: one picture, 32 tokens"):
        teller.tell(pictures[-1], max_new_tokens=32)
    teller.close()


def fine_tune(recipe: str, model: Path, records: Path, run: Path, steps: int, *more: str) -> None:
    overrides = [f"model={model}", f"data.train={records}", f"run={run}", f"epochs={steps}", *more]
    with stage(f"train {recipe} {' '.join(more)}, {steps} steps of 16 samples") as row:
        trainer = Trainer(load_recipe(recipe, overrides), resume=False, watcher=Watcher())
        trainer.train()
        lines = (run / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        settled = metrics[len(metrics) // 4 :]
        row["samples_per_second"] = round(
            sum(m["samples_per_second"] for m in settled) / len(settled), 2
        )
        row["data_wait_fraction"] = round(
            sum(m["data_wait_fraction"] for m in settled) / len(settled), 4
        )
        row["tokens_a_sample"] = sum(trainer.survey.lengths) // len(trainer.survey.lengths)
        row["losses"] = [round(m["loss"], 3) for m in metrics]


def write_export(run: Path, out: Path, layout: str, merge_into: str = "original") -> None:
    with stage(f"export {run.name} to {layout}, merged into {merge_into}") as row:
        try:
            report = export(run, out, layout, merge_into=merge_into)
            row |= {
                k: report[k]
                for k in (
                    "max_logit_difference",
                    "limit",
                    "rounding_alone",
                    "same_argmax",
                    "kl_divergence",
                )
            }
            row["as_trained"] = report["as_trained"]
        except DeadpanError as error:
            row["error"] = str(error)


def compare_processors(export_folder: Path, pictures: list[Path]) -> None:
    """Whether transformers' own processor makes our inputs of the export's files."""
    with stage("transformers' AutoProcessor on the hf export") as row:
        try:
            theirs = AutoProcessor.from_pretrained(export_folder)
        except (ValueError, OSError, ImportError) as error:
            row["error"] = str(error)
            return
        ours = load(export_folder, device="cpu", dtype="bf16").processor
        row["image_processor"] = type(theirs.image_processor).__name__
        same, differences = [], []
        for path in pictures:
            content = [{"type": "image", "path": str(path)}, {"type": "text", "text": PROMPT}]
            made = theirs.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            mine = ours([open_picture(path)], [Turn("human", f"<image>\n{PROMPT}")])
            same.append(made["input_ids"].tolist() == mine["input_ids"].tolist())
            shapes_equal = made["pixel_values"].shape == mine["pixel_values"].shape
            gap = (made["pixel_values"] - mine["pixel_values"]).abs() if shapes_equal else None
            differences.append(
                [gap.max().item(), gap.mean().item()] if gap is not None else "shape"
            )
        row |= {"ids_equal": same, "pixel_difference_max_mean": differences}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("full-size"))
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    scratch = arguments.scratch
    scratch.mkdir(parents=True)
    pictures = sorted(p for p in arguments.pictures.iterdir() if p.suffix in {".jpg", ".png"})
    model, records = scratch / "official", scratch / "records.json"
    with stage("write the model"):
        write_model(model, arguments.tokenizer)
    write_records(records, pictures)
    for attention in ("eager", "sdpa", "flash"):
        hear(model, pictures, attention)
    hear(model, pictures, "auto", "nf4")
    for recipe in ("lora", "qlora"):
        run = scratch / recipe
        fine_tune(f"internvl2-2b-{recipe}", model, records, run, arguments.steps)
        for layout in ("hf", "official"):
            write_export(run, scratch / f"{recipe}-{layout}", layout)
    write_export(scratch / "qlora", scratch / "qlora-trained", "hf", "trained")
    hear(scratch / "lora-hf", pictures, "auto")
    hear(scratch / "lora-official", pictures, "auto")
    hear(scratch / "lora", pictures, "auto")
    compare_processors(scratch / "lora-hf", pictures)
    off = "gradient_checkpointing=false"
    for name, more in {
        "no-checkpointing": [off],
        "packed": [off, "packing=true"],
        "packed-flash": [off, "packing=true", "attention=flash"],
    }.items():
        fine_tune("internvl2-2b-lora", model, records, scratch / name, arguments.steps // 2, *more)
    summary = {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    write_json(arguments.out, summary)


if __name__ == "__main__":
    main()
