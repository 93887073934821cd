#!/usr/bin/env bash
# The whole story on a tiny model with random weights, on the CPU: check, hear, train, export, hear again.
set -euo pipefail
cd "$(dirname "$0")/.."

demo=runs/demo
rm -rf "$demo"
step() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

step "a tiny InternVL2 with random weights, and four drawn pictures"
run python tools/make_tiny_model.py "$demo/base"
run python tools/make_demo_data.py "$demo/data"

step "the records are in order"
run deadpan data check "$demo/data/records.json"
run deadpan data preview "$demo/data/records.json" --out "$demo/preview.html"

step "the base model babbles"
run deadpan tell "$demo/base" "$demo/data/sun.png" --max-new-tokens 16

step "ten steps of training"
run deadpan train internvl2-2b-lora "model=$demo/base" "data.train=$demo/data/records.json" \
    "run=$demo/run" epochs=10 max_tiles=4 lora.r=8 lora.lora_alpha=16 optimizer.lr=2e-3

step "exports for other tools, each compared with what was trained"
run deadpan export "$demo/run" "$demo/hf" --layout hf
run deadpan export "$demo/run" "$demo/official" --layout official

step "the fine-tuned model, from its export (it has random weights: it still babbles, in other words)"
run deadpan tell "$demo/hf" "$demo/data/sun.png" --max-new-tokens 16

printf '\nLook at %s in a browser, and at %s.\n' "$demo/preview.html" "$demo/run/metrics.jsonl"
