"""How fast jokes are told at InternVL2-2B's size: transformers' plain generation, its static cache, ours.

    python benchmarks/generate.py OUT.json [--tiny] [--rows plain ours static parts profile ...]

Random weights in bfloat16, drawn on the GPU; pictures of noise, 1200 x 800, which make 7 tiles; 32 new
tokens each, greedy. Every picture of a row is new to it, so nothing is found in the engine's store but
where the row says so. Pictures come decoded: cutting, normalising and copying them is part of the time.

Latency is that of one picture, the median of several. Throughput is that of 8 or 32 pictures at once, and of
96 in batches of 32, where one batch is cut while the batch before is computed. `served` is 32 who ask the
server's queue again and again; `tower`, the vision tower by the number of tiles that it sees at once.

`same_tokens` is the share of tokens before an answer first differs from transformers' plain one for the
picture alone; bfloat16 rounds otherwise in other kernels, so it is to be read beside the same figure of
plain generation in a batch. A row that fails is printed with its traceback and does not end the others.
With --tiny it all runs on a CPU, with nano in float32.
"""

import argparse
import asyncio
import gc
import hashlib
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from deadpan.checkpoints.load import Loaded, load
from deadpan.checkpoints.official_config import to_transformers
from deadpan.checkpoints.processor_files import write_json
from deadpan.data.records import PROMPT, Turn
from deadpan.engines.base import GenerationSettings, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.engines.features import TILES, PictureFeatures
from deadpan.environment import GIB, devices, versions
from deadpan.models.attention import kernels
from deadpan.models.build import build_empty, put_parameter
from deadpan.models.decoding import Decoder
from deadpan.models.drawing import likeliest
from deadpan.models.vision import Recorded
from deadpan.processing.processor import load_processor
from deadpan.processing.template import IMAGE_TOKEN
from deadpan.serve.tellers import Tellers
from full_size import CONFIG
from make_tiny_model import make_official

NEW_TOKENS = 32
SETTINGS = GenerationSettings(max_new_tokens=NEW_TOKENS)
AT_ONCE = (1, 8, 32)
COMPARED = 8

Ids = list[list[int]]


def full_size() -> Loaded:
    """InternVL2-2B with random weights; the tokenizer is the tiny model's."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        tiny = make_official(Path(scratch) / "tiny")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(tiny / name, folder)
        write_json(folder / "config.json", CONFIG)
        processor = load_processor(folder)
        image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        config = to_transformers(CONFIG, image_token, True, folder / "config.json")
    model = build_empty(config, "auto")
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, device="cuda")
        if parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif "lambda_" in name:
            value = 0.1 + 0.01 * noise
        else:
            value = noise * (0.02 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
        put_parameter(model, name, value.to(torch.bfloat16))
    model.to("cuda").eval()
    model.generation_config = GenerationConfig(
        eos_token_id=processor.stop_id, pad_token_id=processor.pad_id
    )
    return Loaded(model, processor, Path(), Path())


class Pictures:
    """Pictures that nobody has seen."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def next(self, count: int) -> list[Request]:
        noise = self._random.integers(0, 256, (count, 20, 30, 3), dtype=np.uint8)
        images = [Image.fromarray(each).resize((1200, 800)) for each in noise]
        return [Request([image], [Turn("human", f"<image>\n{PROMPT}")]) for image in images]


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes, the GPU's part included."""
    synchronise()
    began = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - began


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def transformers_ids(loaded: Loaded, requests: Sequence[Request], **more: Any) -> Ids:
    """New tokens by transformers' generation, the pictures cut one after the other."""
    samples = [loaded.processor.sample(r.images, r.turns, r.name) for r in requests]
    width = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), width), loaded.processor.pad_id)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, width - len(sample.input_ids) :] = torch.tensor(sample.input_ids)
        mask[row, width - len(sample.input_ids) :] = 1
    pixels = torch.cat([s.pixel_values for s in samples if s.pixel_values is not None])
    device = loaded.model.device
    with torch.inference_mode(), kernels():
        out = loaded.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=pixels.to(device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **more,
        )
    return out[:, width:].tolist()


def engine_ids(engine: BuiltinEngine, requests: Sequence[Request]) -> Ids:
    """New tokens by the engine, as its `generate` makes them."""
    prompts = engine._prompts(requests)
    for prompt in prompts:
        engine._cut(prompt)
    steps = list(engine._tokens(prompts, SETTINGS, torch.empty(len(prompts), 0)))
    return [list(answer) for answer in zip(*steps, strict=True)]


def same(one: Ids, other: Ids) -> float:
    """The share of tokens before answers differ."""
    kept = 0
    for a, b in zip(one, other, strict=True):
        differs = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        kept += differs[0] if differs else min(len(a), len(b))
    return kept / sum(map(len, one))


class Bench:
    """The rows, one after the other.

    Args:
        loaded: What is measured.
        repeats: How often a latency is taken.
    """

    def __init__(self, loaded: Loaded, repeats: int) -> None:
        self.loaded, self.repeats = loaded, repeats
        self.pictures = Pictures()
        self.compared = self.pictures.next(COMPARED)
        self.reference: Ids | None = None

    def speed(
        self, tell: Callable[[Sequence[Request]], Any], at_once: Sequence[int]
    ) -> dict[str, Any]:
        """Latency and throughput of a way to tell; the first call of each size is not counted."""
        row: dict[str, Any] = {}
        for count in at_once:
            times = []
            for _ in range(1 + (self.repeats if count == 1 else 2)):
                requests = self.pictures.next(count)
                times.append(seconds(partial(tell, requests)))
            row[f"first_{count}_s"] = times[0]
            taken = statistics.median(times[1:])
            row[f"latency_{count}_s"] = taken
            row[f"pictures_a_second_{count}"] = count / taken
        return row

    def plain(self) -> dict[str, Any]:
        """Plain generation by transformers."""
        row = self.speed(lambda r: transformers_ids(self.loaded, r), AT_ONCE)
        alone = [transformers_ids(self.loaded, [r])[0] for r in self.compared]
        self.reference = alone
        row["same_tokens"] = same(alone, transformers_ids(self.loaded, self.compared))
        return row

    def static(self) -> dict[str, Any]:
        """Its static cache, which it compiles for."""
        return self.speed(
            lambda r: transformers_ids(self.loaded, r, cache_implementation="static"), (1,)
        )

    def ours(self) -> dict[str, Any]:
        """The builtin engine."""
        engine = BuiltinEngine(self.loaded, 32, kept_bytes=0)
        row = self.speed(lambda r: engine.generate(r, SETTINGS), AT_ONCE)
        many = self.pictures.next(96)
        row["pictures_a_second_96_by_32"] = 96 / seconds(lambda: engine.generate(many, SETTINGS))
        # Not more than is bearable in what a person looks at.
        began, heard = time.perf_counter(), 0.0
        for _ in engine.stream(self.pictures.next(1)[0], SETTINGS):
            heard = heard or time.perf_counter() - began
        row["first_piece_s"] = heard
        if self.reference is not None:
            alone = [engine_ids(engine, [request])[0] for request in self.compared]
            row["same_tokens_alone"] = same(self.reference, alone)
            row["same_tokens"] = same(self.reference, engine_ids(engine, self.compared))
        return row

    def served(self) -> dict[str, Any]:
        """32 who ask the server's queue again and again, each about one picture."""
        engine = BuiltinEngine(self.loaded, 32, kept_bytes=0)
        tellers = Tellers({"ours": engine}, queue_limit=64, batch_size=32)

        async def rate(rounds: int) -> float:
            pictures = self.pictures.next(32 * rounds)

            async def client(number: int) -> None:
                for request in pictures[number::32]:
                    await tellers.ask("ours", [request], SETTINGS)

            began = time.perf_counter()
            await asyncio.gather(*(client(number) for number in range(32)))
            return len(pictures) / (time.perf_counter() - began)

        async def story() -> float:
            await rate(2)  # steps are recorded
            found = await rate(5)
            await tellers.close()
            return found

        return {"pictures_a_second": asyncio.run(story())}

    def tower(self) -> dict[str, Any]:
        """The vision tower and the projector, by the number of tiles that they see at once."""
        features = PictureFeatures(self.loaded.model, self.loaded.processor.tile_policy, 0)
        edge, model = self.loaded.processor.tile_policy.tile_size, self.loaded.model
        shape = (32 * 7, 3, edge, edge)
        values = torch.randn(shape, device=model.device).to(model.dtype)
        parts = []
        with torch.inference_mode():
            for tiles in (4, 7, 8, 12, 16, 24, 32, 56):
                seen = Recorded(features._see, tiles)

                def see(seen: Recorded = seen, tiles: int = tiles) -> None:
                    for part in values.split(tiles):
                        seen(part)

                first = seconds(see)
                taken = min(seconds(see) for _ in range(3))
                parts.append({"tiles": tiles, "first_s": first, "224_tiles_ms": 1e3 * taken})
        return {"parts": parts}

    def again(self) -> dict[str, Any]:
        """A further joke about a picture, and eight about one."""
        engine = BuiltinEngine(self.loaded, 32)
        (request,) = self.pictures.next(1)
        drawn = GenerationSettings(NEW_TOKENS, temperature=0.8, seed=0)
        times = [seconds(lambda: engine.generate([request], drawn)) for _ in range(5)]
        row = {"first_s": times[0], "further_s": statistics.median(times[1:])}
        (other,) = self.pictures.next(1)
        row["eight_of_one_warm_up_s"] = seconds(lambda: engine.generate([other] * 8, drawn))
        (other,) = self.pictures.next(1)
        row["eight_of_one_s"] = seconds(lambda: engine.generate([other] * 8, drawn))
        return row

    def _pixels(self, image: Image.Image) -> dict[str, float]:
        """What one core takes for a picture: to copy its bytes, to digest them, and to cut it as Pillow does."""
        content = image.tobytes()
        parts = {
            "bytes_ms": image.tobytes,
            "digest_ms": lambda: hashlib.sha256(content).digest(),
            "pillow_ms": lambda: self.loaded.processor.tile_policy.pixel_bytes(image, 1),
        }
        return {name: 1e3 * min(seconds(work) for _ in range(3)) for name, work in parts.items()}

    def _parts(self, decoder: Decoder, engine: BuiltinEngine, count: int) -> dict[str, Any]:
        """Milliseconds of each part, one after the other."""
        requests = self.pictures.next(count)
        row: dict[str, Any] = {"at_once": count, **self._pixels(requests[0].images[0])}
        prompts = engine._prompts(requests)
        ids = [prompt.ids for prompt in prompts]
        with torch.inference_mode():

            def cut() -> None:
                for prompt in prompts:
                    prompt.cuts = engine._features.cut(prompt.request.images)
                for prompt in prompts:
                    _ = [each.result() for each in prompt.cuts or []]

            row["pixels_ms"] = 1e3 * statistics.median(seconds(cut) for _ in range(3))
            cuts = [[each.result() for each in prompt.cuts or []] for prompt in prompts]
            features = engine._features

            def values() -> torch.Tensor:
                return torch.cat([features.pixel_values(cut) for of in cuts for cut in of])

            made = values()
            row["values_ms"] = 1e3 * min(seconds(values) for _ in range(3))

            def tower() -> None:
                for part in made.split(TILES):
                    features._seen(part)

            row["tower_first_s"] = seconds(tower)
            row["tower_ms"] = 1e3 * min(seconds(tower) for _ in range(3))
            # As many at once as the engine takes.
            several = [[cut for of in cuts[i : i + 8] for cut in of] for i in range(0, count, 8)]

            def see() -> list[torch.Tensor]:
                return [features.of(part) for part in several]

            seen = torch.cat(see()).split([len(self._images(prompt)) for prompt in ids])
            row["vision_ms"] = 1e3 * min(seconds(see) for _ in range(2))

            def known(wanted: Sequence[int]) -> torch.Tensor:
                return torch.cat([seen[i] for i in wanted])

            def read() -> torch.Tensor:
                return decoder.begin(ids, range(count), known, NEW_TOKENS)

            row["plan_s"] = seconds(
                lambda: decoder._planned(count, max(map(len, ids)) + NEW_TOKENS)
            )
            row["first_prefill_s"] = seconds(read)
            row["prefill_ms"] = 1e3 * min(seconds(read) for _ in range(2))
            logits = read()

            def decode() -> None:
                nonlocal logits
                for _ in range(NEW_TOKENS - 1):
                    logits = decoder.step(likeliest(logits))

            row["decode_ms"] = 1e3 * seconds(decode)
            row["step_ms"] = row["decode_ms"] / (NEW_TOKENS - 1)
        return row

    def _images(self, ids: Sequence[int]) -> list[int]:
        image = self.loaded.model.config.image_token_id
        return [token for token in ids if token == image]

    def parts(self, flash: bool = True, record: bool = True) -> dict[str, Any]:
        """What each part takes, by itself."""
        engine = BuiltinEngine(self.loaded, 32, kept_bytes=0)
        decoder = Decoder(self.loaded.model, record, flash)
        return {"parts": [self._parts(decoder, engine, count) for count in AT_ONCE]}

    def masked(self) -> dict[str, Any]:
        """The same with a mask in place of the flash kernel."""
        return self.parts(flash=False)

    def unrecorded(self) -> dict[str, Any]:
        """The same without recording steps."""
        return self.parts(record=False)

    def profile(self) -> dict[str, Any]:
        """Where the GPU's time goes, for 1 and for 32 pictures."""
        engine = BuiltinEngine(self.loaded, 32, kept_bytes=0)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        tables = {}
        for count in (1, 32):
            engine.generate(self.pictures.next(count), SETTINGS)
            requests = self.pictures.next(count)
            with torch.profiler.profile(activities=activities) as profile:
                engine.generate(requests, SETTINGS)
            table = profile.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70
            )
            # The columns of the CPU are as wide again.
            print(f"{count} at once\n{table}", flush=True)
            tables[str(count)] = table
        return {"tables": tables}


ROWS = (
    "plain",
    "ours",
    "served",
    "again",
    "parts",
    "tower",
    "masked",
    "unrecorded",
    "profile",
    "static",
)


def run(bench: Bench, name: str, on_gpu: bool) -> dict[str, Any]:
    """One row, whatever happens in it."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    row: dict[str, Any] = {"row": name}
    try:
        row |= getattr(bench, name)()
    except Exception:  # noqa: BLE001 - the other rows are to be measured all the same
        row["error"] = traceback.format_exc()
        print(row["error"], flush=True)
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    row["wall_s"] = time.perf_counter() - began
    return row


def show(row: dict[str, Any]) -> None:
    def text(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    flat = {k: v for k, v in row.items() if k not in ("row", "error", "tables", "parts")}
    print(f"{row['row']}: " + ", ".join(f"{k} {text(v)}" for k, v in flat.items()))
    for part in row.get("parts", []):
        print("   " + ", ".join(f"{k} {text(v)}" for k, v in part.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="nano on the CPU")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    on_gpu = not arguments.tiny
    began = time.perf_counter()
    loaded = full_size() if on_gpu else load("nano", device="cpu")
    print(f"the model was made in {time.perf_counter() - began:.1f} s", flush=True)
    bench = Bench(loaded, 7)
    hardware = devices()
    rows: list[dict[str, Any]] = []
    with torch.cuda.device(0) if on_gpu else nullcontext():
        for name in arguments.rows:
            rows.append(run(bench, name, on_gpu))
            show(rows[-1])
            # After each row, so that what is measured is not lost with the next.
            write_json(
                arguments.out,
                {
                    "device": hardware["cuda"][0] if on_gpu else hardware["cpu"],
                    "versions": versions(),
                    "new_tokens": NEW_TOKENS,
                    "rows": rows,
                },
            )


if __name__ == "__main__":
    main()
