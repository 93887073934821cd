"""A run with held-out records, by the command line: the console tells what is best, and a run folder stands for it."""

import json
from pathlib import Path

from command import deadpan


def test_the_best_is_told_and_taken(tiny: Path, records: Path, tmp_path: Path) -> None:
    settings = [
        *(f"model={tiny}", f"data.train={records}", "data.validation=0.25", "run=runs/held"),
        *("device=cpu", "max_tiles=4", "lora.r=8", "lora.lora_alpha=16", "optimizer.lr=5e-3"),
        *("optimizer.name=schedulefree_adamw", "epochs=20", "micro_batch_size=3"),
        *("gradient_accumulation_steps=1", "evaluation.every_steps=3", "trackers=[]"),
        *("evaluation.early_stopping_patience=2", "evaluation.max_new_tokens=16", "packing=false"),
    ]
    (trained,) = deadpan(tmp_path, ["train", "internvl2-2b-lora", *settings])
    assert trained.code == 0, trained.error
    run = tmp_path / "runs" / "held"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "eval_loss" in line), key=lambda x: x["eval_loss"])
    steps = best["step"] + 6
    assert steps < 20, "it must stop early, or nothing is tested"
    assert f"stopped early: {steps} steps" in trained.out
    assert f"best: step {best['step']}, held-out loss {best['eval_loss']:.4f}" in trained.out
    assert f"step {best['step']}: held-out loss {best['eval_loss']:.4f} (best so far)" in (
        trained.error
    )
    assert "the run memorises" in trained.error
    picture = records.parent / "picture-0.png"
    told, of_best = deadpan(
        tmp_path,
        ["tell", "runs/held", picture, "--max-new-tokens", 16],
        ["tell", "runs/held/best", picture, "--max-new-tokens", 16],
    )
    assert told.code == of_best.code == 0, told.error
    assert told.out == of_best.out
