"""One export in three engines: the same answers, and how fast.

    python benchmarks/engines.py TOKENIZER OUT.json [--seed-pictures DIR] [--scratch DIR] [--engine vllm]...

TOKENIZER is a folder with InternLM2's tokenizer files. A model of InternVL2-2B's size is written with random weights,
taught a long joke for each of twelve pictures, so that it has something to be sure of, and exported; the export is then
loaded by each engine, with no settings, as `deadpan tell --engine` does. Each part runs in a process of its own and
writes to OUT.json as it goes; parts that are there are not run again. A part by itself: --part NAME.

- `prepare`: the model, its training, its exports in both layouts.
- `reference`: transformers' plain generation, one picture at a time: token ids of prompts and answers.
- an engine: its answers to all pictures asked at once; pictures a second and latency with 1, 8 and 32 asking, through
  what `deadpan serve` asks with; what its own processor would make of the same pictures.
- `adapter`: an adapter of the language model, put on its base by vLLM while it answers.
- `compare`: answers held against one another; where two part, how far apart the two tokens' logits are there.
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
from collections.abc import Callable
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
from deadpan.engines.builtin import BuiltinEngine, _uniform
from deadpan.engines.concurrent import ConcurrentEngine
from deadpan.environment import installed
from deadpan.errors import DeadpanError
from deadpan.serve.tellers import Tellers
from deadpan.teller import Teller, load, request
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher
from full_size import write_model

ENGINES = ("builtin", "vllm", "lmdeploy")
ASKING = (1, 8, 32)
TIMED = GenerationSettings(max_new_tokens=32)
WHOLE = GenerationSettings(max_new_tokens=64)
"""Longer than the jokes that are taught, so that their end is heard too."""
TAUGHT = 12
Keep = Callable[[Any], None]
"""Writes what a part has found so far."""
WHO = [
    "热狗",
    "冰箱",
    "企鹅",
    "闹钟",
    "雪人",
    "拖鞋",
    "仙人掌",
    "自行车",
    "月亮",
    "鱼缸",
    "信封",
    "地铁",
]


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


def joke(number: int) -> str:
    """A joke of more than 32 tokens and fewer than 64."""
    who, other = WHO[number], WHO[(number * 5 + 7) % len(WHO)]
    return (
        f"{who}对{other}说：我今天不想上班。{other}想了很久，说：你本来就不用上班，"
        f"你只是一个{who}。{who}点点头，于是请了第{number + 3}天假。"
    )


def teach(
    scratch: Path, model: Path, name: str, pictures: list[Path], steps: int, *more: str
) -> list[float]:
    """Fine-tune on a joke for each picture; the losses."""
    records, run = scratch / f"{name}.json", scratch / name
    rows = [
        {
            "id": str(number),
            "image": str(path.resolve()),
            "conversations": [
                {"from": "human", "value": f"{IMAGE_TAG}\n{PROMPT}"},
                {"from": "gpt", "value": joke(number)},
            ],
        }
        for number, path in enumerate(pictures)
    ]
    write_json(records, rows)
    overrides = [
        f"model={model}",
        f"data.train={records}",
        f"run={run}",
        f"epochs={steps}",
        "micro_batch_size=6",
        "gradient_accumulation_steps=2",
        "optimizer.lr=3e-4",
        "data.validation=null",
        "trackers=[]",
        f"feature_cache={scratch / 'features'}",
        *more,
    ]
    Trainer(load_recipe("internvl2-2b-lora", overrides), resume=False, watcher=Watcher()).train()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [round(line["loss"], 3) for line in lines if "loss" in line]


def prepare(scratch: Path, tokenizer: Path, seed_pictures: Path | None, steps: int) -> Any:
    """Pictures, the model, its training, its exports, and an adapter of the language model alone."""
    folder = scratch / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(seed_pictures.iterdir()) if seed_pictures else []:
        if path.suffix in (".jpg", ".png"):
            shutil.copyfile(path, folder / f"seed-{path.name}")
    sizes = [(448, 448), (1344, 896), (300, 900), (1600, 400), (640, 480), (97, 61), (2000, 1500)]
    for number in range(20):
        size = sizes[number % len(sizes)]
        drawn_picture(number, size).save(folder / f"drawn-{number:02}.png")
    model = scratch / "official"
    write_model(model, tokenizer)
    pictures = sorted(folder.iterdir())[-TAUGHT:]
    report: dict[str, Any] = {"losses": teach(scratch, model, "run", pictures, steps)}
    for layout in ("hf", "official"):
        try:
            report[layout] = export(scratch / "run", scratch / f"exported-{layout}", layout)
        except DeadpanError as error:
            report[layout] = str(error)
    export(model, scratch / "base", "hf")
    report["adapter_losses"] = teach(
        scratch, scratch / "base", "adapter", pictures, steps, "train_projector=false"
    )
    return report


def questions(scratch: Path) -> list[Request]:
    return [request(path, PROMPT) for path in sorted((scratch / "pictures").iterdir())]


def reference(scratch: Path) -> Any:
    """Greedy answers of transformers' own generation, a picture at a time."""
    teller = load(scratch / "exported-hf", engine="builtin")
    answers, prompts = {}, {}
    for question in questions(scratch):
        inputs = {
            name: tensor.to(teller.model.device)
            for name, tensor in teller.processor(question.images, question.turns).items()
        }
        with torch.inference_mode():
            output = teller.model.generate(
                **inputs, max_new_tokens=WHOLE.max_new_tokens, do_sample=False
            )
        prompt = inputs["input_ids"][0].tolist()
        prompts[question.name] = prompt
        answers[question.name] = output[0, len(prompt) :].tolist()
    write_json(scratch / "prompts.json", prompts)
    write_json(scratch / "answers-reference.json", answers)
    texts = [teller.processor.decode(each) for each in answers.values()]
    return {
        "pictures": len(answers),
        "different_answers": len(set(texts)),
        "ended": sum(each[-1] == teller.processor.stop_id for each in answers.values()),
        "answers": texts[:2] + texts[-2:],
    }


def one_engine(scratch: Path, name: str, keep: Keep) -> None:
    """Its answers, its speed, its own processor."""
    began = time.perf_counter()
    teller = load(scratch / "exported-hf", engine=name, batch_size=max(ASKING))
    row: dict[str, Any] = {
        "version": installed("deadpan" if name == "builtin" else name),
        "start_seconds": round(time.perf_counter() - began, 1),
    }
    asked = questions(scratch)
    row["equal_prompts"] = answer(teller, scratch, name, asked)
    keep(row)
    row["speed"] = []
    for asking in ASKING:
        row["speed"].append(asyncio.run(speed(teller, asking)))
        keep(row)
    if name != "builtin":
        compare = own_of_vllm if name == "vllm" else own_of_lmdeploy
        row["own_processor"] = compare(teller, scratch / "exported-hf", asked)
        keep(row)
    teller.close()


def adapter(scratch: Path, keep: Keep) -> None:
    """The adapter on its base in vLLM; the same by the builtin engine, and the base without it."""
    asked = questions(scratch)
    for name, model, engine in (
        ("unmerged", "adapter", "builtin"),
        ("without", "base", "builtin"),
        ("unmerged-vllm", "adapter", "vllm"),
    ):
        teller = load(scratch / model, engine=engine, batch_size=max(ASKING))
        answer(teller, scratch, name, asked)
        if engine == "vllm":
            keep({"speed": [asyncio.run(speed(teller, asking)) for asking in ASKING]})
        teller.close()


def answer(teller: Teller, scratch: Path, name: str, asked: list[Request]) -> int:
    """Greedy tokens of all pictures, asked at once, to a file; how many prompts are the reference's."""
    engine = teller.engine
    if isinstance(engine, BuiltinEngine):
        prompts = engine._prompts(asked)
        for prompt in prompts:
            engine._cut(prompt)
        steps = list(engine._tokens(prompts, WHOLE, _uniform(len(asked), WHOLE)))
        answers = [upto(list(ids), teller.processor.stop_id) for ids in zip(*steps, strict=True)]
        made = [prompt.ids for prompt in prompts]
    else:
        assert isinstance(engine, ConcurrentEngine)

        async def ids(question: Request) -> list[int]:
            tokens = engine._tokens(engine.prompt(question), WHOLE, False)
            return [token async for part in tokens for token in part]

        async def all_ids() -> list[list[int]]:
            return await asyncio.gather(*map(ids, asked))

        answers = engine._wait(all_ids())
        made = [engine.prompt(question).ids for question in asked]
    names = [question.name for question in asked]
    write_json(scratch / f"answers-{name}.json", dict(zip(names, answers, strict=True)))
    wanted = json.loads((scratch / "prompts.json").read_text())
    return sum(ids == wanted[name] for name, ids in zip(names, made, strict=True))


def upto(ids: list[int], stop: int) -> list[int]:
    """An answer with its stop token and nothing after."""
    return ids[: ids.index(stop) + 1] if stop in ids else ids


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
    tokens: list[int] = []

    def fresh() -> Image.Image:
        image = picture.copy()
        image.putpixel((next(numbers), asking), (255, 0, 0))
        return image

    async def ask(times: int) -> None:
        for _ in range(times):
            image = fresh()
            began = time.perf_counter()
            (told,) = await tellers.ask("it", [request(image, PROMPT)], TIMED)
            tokens.append(told.tokens)
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(ask(2) for _ in range(asking)))  # kernels are chosen and compiled
    latencies.clear()
    tokens.clear()
    times = 16 if asking == 1 else 6
    began = time.perf_counter()
    await asyncio.gather(*(ask(times) for _ in range(asking)))
    seconds = time.perf_counter() - began
    # Not tellers.close(), which would close the engine.
    return {
        "asking": asking,
        "pictures": len(latencies),
        "pictures_per_second": round(len(latencies) / seconds, 2),
        "tokens_an_answer": round(statistics.mean(tokens), 1),
        "latency_median": round(statistics.median(latencies), 4),
        "latency_largest": round(max(latencies), 4),
    }


def compare(scratch: Path) -> Any:
    """How many answers are the same, by pairs; the reference's logits where two part."""
    files = {path.stem.removeprefix("answers-"): path for path in scratch.glob("answers-*.json")}
    answers = {name: json.loads(path.read_text()) for name, path in files.items()}
    pairs = [
        ("builtin", "reference"),
        *((name, against) for name in ENGINES[1:] for against in ("reference", "builtin")),
        ("unmerged-vllm", "unmerged"),
        ("unmerged-vllm", "without"),
    ]
    of_export = load(scratch / "exported-hf", engine="builtin")
    report = {}
    for name, against in pairs:
        if name not in answers or against not in answers:
            continue
        teller = None if name.startswith("unmerged") else of_export
        report[f"{name} against {against}"] = compared(
            answers[name], answers[against], scratch, teller
        )
    return report


def compared(
    mine: dict[str, list[int]], theirs: dict[str, list[int]], scratch: Path, teller: Teller | None
) -> dict[str, Any]:
    """Two tellers' answers; with a teller the gap between the two logits where answers part."""
    row: dict[str, Any] = {"identical": 0, "of": len(mine), "parted": []}
    for question in questions(scratch):
        one, other = mine[question.name], theirs[question.name]
        place = first_difference(one, other)
        if place is None:
            row["identical"] += 1
            continue
        parted: dict[str, Any] = {"picture": Path(question.name).name, "place": place}
        if teller is not None and place < min(len(one), len(other)):
            logits = after(teller, question, other[:place])
            parted["gap"] = round((logits[other[place]] - logits[one[place]]).item(), 4)
            best = logits.topk(2).values
            parted["best_two"] = round((best[0] - best[1]).item(), 4)
            parted["spread"] = round(logits.std().item(), 3)
        row["parted"].append(parted)
    return row


def after(teller: Teller, question: Request, answer: list[int]) -> torch.Tensor:
    """transformers' logits of the token that follows, float32 of shape (vocabulary,)."""
    inputs = teller.processor(question.images, question.turns)
    device = teller.model.device
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer]).long()], dim=1)
    with torch.inference_mode():
        logits = teller.model(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            pixel_values=inputs["pixel_values"].to(device),
            logits_to_keep=1,
        ).logits[0, -1]
    return logits.float()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed-pictures", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("engines"))
    parser.add_argument("--steps", type=int, default=100, help="of training, each on all pictures")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--part", help="one part by itself, also if it is there")
    a = parser.parse_args()
    a.scratch.mkdir(parents=True, exist_ok=True)
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    if a.part is None:
        parts = ["prepare", "reference", *(a.engine or ENGINES), "adapter", "compare"]
        for part in parts:
            if part not in results:
                # In a process of its own: what fails costs nothing else, and memory is free again.
                subprocess.run([sys.executable, *sys.argv, "--part", part], check=False)
                results = json.loads(a.out.read_text()) if a.out.exists() else {}
        return

    def keep(made: Any) -> None:
        print(a.part, json.dumps(made, ensure_ascii=False), flush=True)
        write_json(a.out, {**results, a.part: made})

    if a.part == "prepare":
        made = prepare(a.scratch, a.tokenizer, a.seed_pictures, a.steps)
        made["machine"] = {
            "device": torch.cuda.get_device_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": installed("transformers"),
        }
        keep(made)
    elif a.part in ENGINES:
        one_engine(a.scratch, a.part, keep)
    elif a.part == "adapter":
        adapter(a.scratch, keep)
    else:
        keep({"reference": reference, "compare": compare}[a.part](a.scratch))


if __name__ == "__main__":
    main()
