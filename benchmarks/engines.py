"""One export in three engines: the same answers, and how fast.

    python benchmarks/engines.py TOKENIZER OUT.json [--seed-pictures DIR] [--scratch DIR] [--engine vllm]...

TOKENIZER is a folder with InternLM2's tokenizer files. A model of InternVL2-2B's size is written with random weights,
fine-tuned for a few steps and exported; the export is then loaded by each engine, with no settings, as `deadpan tell
--engine` does. Each part runs in a process of its own and is written to OUT.json as it ends; parts that are there are
not run again. A part by itself: --part prepare, reference, vllm, lmdeploy, builtin or gaps.

- `reference`: transformers' plain generation, one picture at a time: token ids of prompts and answers.
- an engine: what its own processor would make of the same pictures; its answers, held against the reference;
  pictures a second and latency with 1, 8 and 32 asking at once, through what `deadpan serve` asks with.
- `gaps`: where an engine's answer leaves the reference, how far apart the two tokens' logits are there.
"""

import argparse
import asyncio
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from deadpan.checkpoints.export import export
from deadpan.checkpoints.processor_files import write_json
from deadpan.config.loader import load_recipe
from deadpan.data.records import IMAGE_TAG, PROMPT
from deadpan.engines.base import GenerationSettings, Request
from deadpan.engines.concurrent import ConcurrentEngine
from deadpan.environment import installed
from deadpan.errors import DeadpanError
from deadpan.serve.tellers import Tellers
from deadpan.teller import Teller, load, request
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher
from full_size import write_model, write_records

ENGINES = ("builtin", "vllm", "lmdeploy")
TOKENS = 32
ASKING = (1, 8, 32)
GREEDY = GenerationSettings(max_new_tokens=TOKENS)


def drawn_picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A picture with shapes and noise, so that its resizing has something to round."""
    generator = np.random.default_rng(number)
    noise = generator.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = int(generator.integers(0, size[0])), int(generator.integers(0, size[1]))
        colour = tuple(int(c) for c in generator.integers(0, 256, 3))
        draw.ellipse((x - 60, y - 40, x + 60, y + 40), fill=colour)
    return image


def prepare(scratch: Path, tokenizer: Path, seed_pictures: Path | None, steps: int) -> Any:
    """Pictures, the model, a few steps of training, and its exports."""
    folder = scratch / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(seed_pictures.iterdir()) if seed_pictures else []:
        if path.suffix in (".jpg", ".png"):
            shutil.copyfile(path, folder / f"seed-{path.name}")
    sizes = [(448, 448), (1344, 896), (300, 900), (1600, 400), (640, 480), (97, 61), (2000, 1500)]
    for number in range(20):
        size = sizes[number % len(sizes)]
        drawn_picture(number, size).save(folder / f"drawn-{number:02}.png")
    model, run = scratch / "official", scratch / "run"
    write_model(model, tokenizer)
    write_records(scratch / "records.json", sorted(folder.iterdir())[:4])
    overrides = [
        f"model={model}",
        f"data.train={scratch / 'records.json'}",
        f"run={run}",
        f"max_steps={steps}",
        "optimizer.lr=1e-3",
    ]
    Trainer(load_recipe("internvl2-2b-lora", overrides), resume=False, watcher=Watcher()).train()
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report: dict[str, Any] = {
        "losses": [round(line["loss"], 3) for line in losses if "loss" in line]
    }
    for layout in ("hf", "official"):
        try:
            report[layout] = export(run, scratch / f"exported-{layout}", layout)
        except DeadpanError as error:
            report[layout] = str(error)
    return report


def questions(scratch: Path) -> list[Request]:
    return [request(path, PROMPT) for path in sorted((scratch / "pictures").iterdir())]


def reference(scratch: Path) -> Any:
    """Greedy answers of transformers' own generation, a picture at a time."""
    teller = load(scratch / "exported-hf", engine="builtin")
    answers = {}
    for question in questions(scratch):
        inputs = {
            name: tensor.to(teller.model.device)
            for name, tensor in teller.processor(question.images, question.turns).items()
        }
        with torch.inference_mode():
            output = teller.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        prompt = inputs["input_ids"][0].tolist()
        answers[question.name] = {"prompt": prompt, "answer": output[0, len(prompt) :].tolist()}
    write_json(scratch / "reference.json", answers)
    texts = [teller.processor.decode(each["answer"]) for each in answers.values()]
    distinct = [len(set(each["answer"])) / len(each["answer"]) for each in answers.values()]
    return {
        "pictures": len(answers),
        "different_answers": len(set(texts)),
        "distinct_tokens_in_an_answer": round(statistics.mean(distinct), 3),
        "answers": [text[:40] for text in texts[:6]],
    }


def one_engine(scratch: Path, name: str) -> Any:
    """Its own processor, its answers, its speed."""
    began = time.perf_counter()
    teller = load(scratch / "exported-hf", engine=name, batch_size=max(ASKING))
    row: dict[str, Any] = {
        "version": installed("deadpan" if name == "builtin" else name),
        "start_seconds": round(time.perf_counter() - began, 1),
    }
    asked = questions(scratch)
    if name != "builtin":
        compare = own_of_vllm if name == "vllm" else own_of_lmdeploy
        row["own_processor"] = compare(teller, scratch / "exported-hf", asked)
    row["answers"] = compare_answers(teller, name, scratch, asked)
    row["speed"] = [asyncio.run(speed(teller, asking)) for asking in ASKING]
    teller.close()
    return row


def compare_answers(teller: Teller, name: str, scratch: Path, asked: list[Request]) -> Any:
    """Prompts and greedy tokens against the reference, all pictures asked at once."""
    expected = json.loads((scratch / "reference.json").read_text())
    wanted = [expected[question.name] for question in asked]
    engine = teller.engine
    if not isinstance(engine, ConcurrentEngine):
        jokes = engine.generate(asked, GREEDY)
        texts = [teller.processor.decode(want["answer"]) for want in wanted]
        same = [joke.text == text for joke, text in zip(jokes, texts, strict=True)]
        return {"identical": sum(same), "of": len(asked)}

    async def ids(question: Request) -> list[int]:
        tokens = engine._tokens(engine.prompt(question), GREEDY, False)
        return [token async for part in tokens for token in part]

    async def all_ids() -> list[list[int]]:
        return await asyncio.gather(*map(ids, asked))

    answers = engine._wait(all_ids())
    firsts = [
        first_difference(answer, want["answer"])
        for answer, want in zip(answers, wanted, strict=True)
    ]
    rows = {
        question.name: {"answer": answer, "first_difference": first}
        for question, answer, first in zip(asked, answers, firsts, strict=True)
    }
    write_json(scratch / f"answers-{name}.json", rows)
    prompts = [engine.prompt(question).ids for question in asked]
    return {
        "equal_prompts": sum(p == w["prompt"] for p, w in zip(prompts, wanted, strict=True)),
        "identical": firsts.count(None),
        "of": len(asked),
        "first_differences": sorted(first for first in firsts if first is not None),
    }


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Where two answers part; None if they are the same."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def own_of_vllm(teller: Teller, folder: Path, asked: list[Request]) -> Any:
    """What vLLM's own processor makes of the export, the chat template and the pictures."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = ModelConfig(model=str(folder), dtype="bfloat16", limit_mm_per_prompt={"video": 0})
    own = MULTIMODAL_REGISTRY.create_processor(config)
    ids = teller.processor.tokenizer.apply_chat_template(
        _messages(), add_generation_prompt=True, tokenize=False
    )
    ids = teller.processor.tokenizer(ids, add_special_tokens=False)["input_ids"]
    rows = []
    for question in asked:
        made = own(ids, mm_items=own.info.parse_mm_data({"image": list(question.images)}))
        pixels = made["mm_kwargs"]["image"][0]["pixel_values"].data
        rows.append(_differences(teller, question, made["prompt_token_ids"], pixels))
    return _summary(rows)


def own_of_lmdeploy(teller: Teller, folder: Path, asked: list[Request]) -> Any:
    """What LMDeploy's own processor makes of them."""
    engine: Any = teller.engine
    rows = []
    for question in asked:
        content = [
            {"type": "image_data", "image_data": {"data": question.images[0]}},
            {"type": "text", "text": PROMPT},
        ]
        work = engine._engine.prompt_processor.get_prompt_input(
            prompt=[{"role": "user", "content": content}], do_preprocess=True, adapter_name=None
        )
        made = engine._wait(work)
        pixels = made["multimodal"][0]["pixel_values"]
        rows.append(_differences(teller, question, made["input_ids"], pixels))
    return _summary(rows)


def _messages() -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]


def _differences(
    teller: Teller, question: Request, ids: list[int], pixels: torch.Tensor
) -> dict[str, Any]:
    mine = teller.processor(question.images, question.turns)
    row: dict[str, Any] = {"ids": list(ids) == mine["input_ids"][0].tolist()}
    if pixels.shape == mine["pixel_values"].shape:
        row["pixels"] = (pixels.float().cpu() - mine["pixel_values"]).abs().max().item()
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    pixels = [row["pixels"] for row in rows if "pixels" in row]
    return {
        "equal_ids": sum(row["ids"] for row in rows),
        "of": len(rows),
        "equal_shapes": len(pixels),
        "largest_pixel_difference": max(pixels, default=None),
    }


async def speed(teller: Teller, asking: int) -> Any:
    """So many ask one question after the other, each about a 7-tile picture that is new."""
    tellers = Tellers({"it": teller.engine}, queue_limit=1024, batch_size=asking, timeout=600)
    picture = drawn_picture(0, (1344, 896))
    assert teller.processor.tile_policy.count(picture.size, 1) == 7
    numbers = iter(range(10**6))
    latencies: list[float] = []

    def fresh() -> Image.Image:
        image = picture.copy()
        image.putpixel((next(numbers), asking), (255, 0, 0))
        return image

    async def ask(times: int) -> None:
        for _ in range(times):
            image = fresh()
            began = time.perf_counter()
            await tellers.tell("it", [image], f"{IMAGE_TAG}\n{PROMPT}", GREEDY)
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(ask(2) for _ in range(asking)))  # kernels are chosen and compiled
    latencies.clear()
    times = 16 if asking == 1 else 6
    began = time.perf_counter()
    await asyncio.gather(*(ask(times) for _ in range(asking)))
    seconds = time.perf_counter() - began
    # Not tellers.close(), which would close the engine.
    return {
        "asking": asking,
        "pictures": len(latencies),
        "pictures_per_second": round(len(latencies) / seconds, 2),
        "latency_median": round(statistics.median(latencies), 4),
        "latency_largest": round(max(latencies), 4),
    }


def gaps(scratch: Path) -> Any:
    """For each answer that differs: the reference's logit less the other's, where they part."""
    teller = load(scratch / "exported-hf", engine="builtin")
    device = teller.model.device
    expected = json.loads((scratch / "reference.json").read_text())
    report = {}
    for name in ("vllm", "lmdeploy"):
        path = scratch / f"answers-{name}.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text())
        found = []
        for question in questions(scratch):
            row, want = rows[question.name], expected[question.name]["answer"]
            place = row["first_difference"]
            if place is None or place >= min(len(row["answer"]), len(want)):
                continue
            inputs = teller.processor(question.images, question.turns)
            ids = torch.cat([inputs["input_ids"], torch.tensor([want[:place]]).long()], dim=1)
            with torch.inference_mode():
                logits = teller.model(
                    input_ids=ids.to(device),
                    attention_mask=torch.ones_like(ids, device=device),
                    pixel_values=inputs["pixel_values"].to(device),
                    logits_to_keep=1,
                ).logits[0, -1]
            gap = (logits[want[place]] - logits[row["answer"][place]]).item()
            found.append({"place": place, "gap": gap, "spread": logits.float().std().item()})
        report[name] = found
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed-pictures", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("engines"))
    parser.add_argument("--steps", type=int, default=4, help="of training")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--part", help="one part by itself, also if it is there")
    a = parser.parse_args()
    a.scratch.mkdir(parents=True, exist_ok=True)
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    if a.part is None:
        parts = ["prepare", "reference", *(a.engine or ENGINES), "gaps"]
        for part in parts:
            if part not in results:
                # In a process of its own: what fails costs nothing else, and memory is free again.
                subprocess.run([sys.executable, *sys.argv, "--part", part], check=False)
                results = json.loads(a.out.read_text()) if a.out.exists() else {}
        return
    if a.part == "prepare":
        made = prepare(a.scratch, a.tokenizer, a.seed_pictures, a.steps)
        made["machine"] = {
            "device": torch.cuda.get_device_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": installed("transformers"),
        }
    elif a.part in ENGINES:
        made = one_engine(a.scratch, a.part)
    else:
        made = {"reference": reference, "gaps": gaps}[a.part](a.scratch)
    print(a.part, json.dumps(made, ensure_ascii=False), flush=True)
    write_json(a.out, {**results, a.part: made})


if __name__ == "__main__":
    main()
