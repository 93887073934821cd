"""How fast an adapter of InternVL2-2B's size is trained: the peers' way, ours, and the floor.

    python benchmarks/train.py OUT.json [--tiles 7 1 13 mixed shared] [--rows ...] [--profile]

Random weights, drawn on the GPU. LoRA r 128 and lora_alpha 256 on all linear layers of the language
model, projector trained, vision tower frozen, AdamW, gradients clipped. A step has 8 samples of 60 text
tokens, of which 20 are supervised, and of as many tiles as --tiles says: 1, 7 or 13 each; `mixed`,
the tiles of 2,000 random picture sizes; `shared`, 8 pictures of 7 tiles with five answers each.

The peers' way is transformers with PEFT as it comes: padding, gradient checkpointing, the vision tower
at each step, logits over the vocabulary at every position. Ours adds one thing after the other. Each
row starts from the same weights and sees the same samples; `loss` is that of its last step, and
`gradient` the cosine between its first gradient and that of the peers' way in bf16.

The floor is the time of the products alone: FLOPs over the rate of an 8192-cube product measured in
the same run, in bf16 or, for frozen weights, in FP8. The vision tower counts where it runs.
With --tiny it all runs on a CPU, with miniature layers.
"""

import argparse
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import InternVLForConditionalGeneration

from deadpan.checkpoints.official_config import to_transformers
from deadpan.checkpoints.processor_files import write_json
from deadpan.environment import devices, versions
from deadpan.models import lora, nf4
from deadpan.models.answer_loss import AnswerLoss, plain_model
from deadpan.models.attention import kernels
from deadpan.models.build import build_empty, checkpoint_layers, put_parameter
from deadpan.models.frozen import quantise_rows
from deadpan.models.fused_loss import FusedLoss, picture_features
from deadpan.models.recorded import RecordedLoss
from deadpan.processing import tiles
from deadpan.processing.collate import Batch, collate
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Sample
from full_size import CONFIG, IMAGE_TOKEN_ID

SAMPLES, TEXT, SUPERVISED = 8, 60, 20
WARM, TIMED = 3, 6
TINY = {
    "llm_config": {
        **CONFIG["llm_config"],
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 512,
    },
    "vision_config": {
        **CONFIG["vision_config"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 56,
    },
    "force_image_size": 56,
}


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        name: As the table has it.
        fused: Through the decoder written out for training.
        full_logits: At every position, as the peers do.
        checkpoint: Compute activations again in the backward pass.
        cached: The vision tower's output is at hand.
        quantization: none, nf4 or fp8.
        dropout: The adapter's.
        packing: Samples end to end instead of padded.
        micro_batch: Samples of a forward pass.
        recorded: Few tokens are played back from CUDA graphs.
    """

    name: str
    fused: bool = True
    full_logits: bool = False
    checkpoint: bool = False
    cached: bool = True
    quantization: str = "none"
    dropout: float = 0.0
    packing: bool = True
    micro_batch: int = SAMPLES
    recorded: bool = False


PEERS: dict[str, Any] = {
    "fused": False,
    "full_logits": True,
    "checkpoint": True,
    "cached": False,
    "packing": False,
}
PLAIN: dict[str, Any] = {"fused": False, "cached": False, "packing": False}
ROWS = {
    "peers": Row("peers' way, bf16", **PEERS),
    "peers-nf4": Row("peers' way, NF4", **PEERS, quantization="nf4"),
    "answers": Row("logits at answers only", **{**PLAIN, "checkpoint": True}),
    "kept": Row("+ no checkpointing", **PLAIN),
    "packed": Row("+ packed, flash attention", **{**PLAIN, "packing": True}),
    "fused": Row("+ decoder written out", cached=False),
    "cached": Row("+ features cached"),
    "fp8": Row("+ FP8", quantization="fp8"),
    "fp8-dropout": Row("FP8, LoRA dropout 0.05", quantization="fp8", dropout=0.05),
    "cached-recorded": Row("bf16, recorded", recorded=True),
    "fp8-recorded": Row("FP8, recorded", quantization="fp8", recorded=True),
    "fp8-dropout-recorded": Row(
        "FP8, dropout 0.05, recorded", quantization="fp8", dropout=0.05, recorded=True
    ),
    "nf4": Row("NF4 instead of FP8", quantization="nf4"),
    "24gb": Row("FP8, checkpointing", quantization="fp8", checkpoint=True),
    "12gb": Row(
        "NF4, checkpointing, 4 at a time", quantization="nf4", checkpoint=True, micro_batch=4
    ),
}


def build(row: Row, device: torch.device, tiny: bool) -> PeftModel:
    """The model with the same random weights for every row."""
    config = to_transformers({**CONFIG, **(TINY if tiny else {})}, image_token(tiny), True, Path())
    attention = "varlen" if row.packing and not row.fused else "sdpa"
    model = build_empty(config, attention)
    dtype = torch.bfloat16
    if row.quantization == "nf4":
        nf4.prepare(model.model.language_model, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif "lambda_" in name:
            value = 0.1 + 0.01 * noise
        else:
            value = noise * (0.02 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
        put_parameter(model, name, value.to(dtype))
    model.to(device)  # buffers
    torch.manual_seed(0)
    dropout = 0.0 if row.fused else row.dropout
    peft_model = lora.attach(model, "base", 128, 256, dropout, "all-linear", True)
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:  # which a fresh adapter has zero, and then half the gradients are
            torch.nn.init.normal_(parameter, std=0.001)
    if row.checkpoint and not row.fused:
        checkpoint_layers(model.model.language_model)
    return peft_model.train()


def image_token(tiny: bool) -> int:
    return 500 if tiny else IMAGE_TOKEN_ID


def sample(count: int, tiny: bool, draw: random.Random, answers: int = 1) -> Sample:
    """A sample of random tokens and random pixels, the answers last."""
    per_tile, side = (4, 56) if tiny else (256, 448)
    vocabulary = 400 if tiny else 90_000
    text = [draw.randrange(vocabulary) for _ in range(TEXT - SUPERVISED)]
    answer = [draw.randrange(vocabulary) for _ in range(SUPERVISED * answers)]
    ids = text[:20] + [image_token(tiny)] * (count * per_tile) + text[20:] + answer
    labels = [IGNORE_INDEX] * (len(ids) - len(answer)) + answer
    pixels = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))
    return Sample(ids, labels, pixels, str(count))


def shares_prefix(batch: Batch, answers: int) -> Batch:
    """Let each sample's answers all continue its prefix."""
    positions = batch.position_ids[0]
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    for end in starts[1:]:
        first = positions[end - SUPERVISED * answers].clone()
        for k in range(1, answers):
            begin = end - SUPERVISED * (answers - k)
            positions[begin : begin + SUPERVISED] = torch.arange(SUPERVISED) + first
    return batch


def counts(kind: str) -> list[list[int]]:
    """The tiles of each sample of each step."""
    draw = random.Random(0)
    steps = WARM + TIMED
    if kind not in ("mixed",):
        return [[7 if kind == "shared" else int(kind)] * SAMPLES] * steps
    sizes = [(draw.randrange(240, 2000), draw.randrange(240, 2000)) for _ in range(2000)]
    drawn = []
    for width, height in sizes:
        columns, rows = tiles.grid(width, height)
        drawn.append(columns * rows + (columns * rows > 1))
    return [[draw.choice(drawn) for _ in range(SAMPLES)] for _ in range(steps)]


def make_steps(kind: str, row: Row, tiny: bool) -> list[list[Batch]]:
    draw = random.Random(1)
    steps, known = [], {}
    for step in counts(kind):
        key = tuple(step)
        if kind == "mixed" or key not in known:
            if kind == "shared" and not row.fused:
                # Each answer is a sample of its own; the step is cut, or it would not fit.
                samples = [sample(n, tiny, draw) for n in step for _ in range(5)]
            else:
                samples = [sample(n, tiny, draw, 5 if kind == "shared" else 1) for n in step]
            size = row.micro_batch
            cut = [samples[i : i + size] for i in range(0, len(samples), size)]
            batches = [collate(part, 0, row.packing) for part in cut]
            if kind == "shared" and row.fused:
                batches = [shares_prefix(batch, 5) for batch in batches]
            known[key] = batches
        steps.append(known[key])
    return steps


def loss_function(row: Row, model: PeftModel) -> Callable[[Batch], torch.Tensor]:
    """From a batch on the CPU, and its features, to the summed loss."""
    device = next(model.parameters()).device
    dtype = torch.bfloat16
    if row.fused:
        fused = FusedLoss(model, dtype, row.quantization == "fp8", row.dropout)
        fused.checkpoint = row.checkpoint
        return RecordedLoss(fused) if row.recorded else fused
    answers = AnswerLoss(model)
    plain: InternVLForConditionalGeneration = plain_model(model)

    def compute(batch: Batch) -> torch.Tensor:
        moved = batch.to(device)
        with torch.autocast(device.type, dtype):
            if not row.full_logits:
                return answers(
                    moved.input_ids, moved.labels, moved.position_ids, moved.pixel_values
                )
            out = plain(
                input_ids=moved.input_ids,
                pixel_values=moved.pixel_values,
                labels=moved.labels,
                use_cache=False,
            )
        return out.loss * batch.supervised

    return compute


def with_features(batch: Batch, features: torch.Tensor) -> Batch:
    """The batch whose pictures' features are known."""
    return replace(batch, pixel_values=None, features=features)


def pinned(batch: Batch) -> Batch:
    return batch.pin_memory() if torch.cuda.is_available() else batch


def measure(
    row: Row, kind: str, tiny: bool, reference: list[torch.Tensor] | None, profile: bool
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Train a few steps; the row's figures and its first gradient."""
    device = torch.device("cpu" if tiny else "cuda")
    steps = [[pinned(batch) for batch in step] for step in make_steps(kind, row, tiny)]
    began = time.perf_counter()
    model = build(row, device, tiny)
    loss_of = loss_function(row, model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=not tiny)
    features: dict[int, torch.Tensor] = {}
    if row.fused and row.cached:
        for batch in {id(b): b for step in steps for b in step}.values():
            assert batch.pixel_values is not None
            with torch.no_grad():
                seen = picture_features(plain_model(model), batch.pixel_values.to(device)).cpu()
            features[id(batch)] = seen if tiny else seen.pin_memory()

    def fed(batch: Batch) -> Batch:
        known = features.get(id(batch))
        return batch if known is None else with_features(batch, known)

    if row.recorded:  # what is known is recorded in the first step, whose gradient is compared
        for batch in steps[0]:
            loss_of(fed(batch))
    if not tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    built = time.perf_counter() - began
    seconds: list[float] = []
    gradient: list[torch.Tensor] = []
    first = time.perf_counter()
    first_step = 0.0
    for number, step in enumerate(steps):
        supervised = sum(batch.supervised for batch in step)
        last = number == len(steps) - 1
        with profiled(profile and last, row, kind):
            start = time.perf_counter()
            total = torch.zeros((), device=device)
            for batch in step:
                with kernels():
                    loss = loss_of(fed(batch))
                    (loss / supervised).backward()
                total += loss.detach()
            if not number:
                gradient = [p.grad.detach().to("cpu", torch.bfloat16) for p in trainable]
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = (total / supervised).item()
            seconds.append(time.perf_counter() - start)
        if not number:
            first_step = time.perf_counter() - first
    # The profiler's step is no measure of time.
    timed = seconds[WARM : -1 if profile else None]
    tokens = statistics.mean(sum(b.tokens for b in step) for step in steps[WARM:])
    answers = SAMPLES * (5 if kind == "shared" else 1)
    figures = {
        "row": row.name,
        "tiles": kind,
        "samples_per_second": answers * len(timed) / sum(timed),
        "tokens_per_second": tokens * len(timed) / sum(timed),
        "peak_gib": 0 if tiny else torch.cuda.max_memory_allocated() / 2**30,
        "seconds_a_step": statistics.mean(timed),
        "first_step_seconds": first_step,
        "build_seconds": built,
        "loss": value,
        "gradient_cosine": cosine(gradient, reference) if reference else None,
    }
    return figures, gradient


def cosine(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    pairs = [(a.float(), b.float()) for a, b in zip(one, other, strict=True)]
    dot = sum((a * b).sum().item() for a, b in pairs)
    norms = [
        math.sqrt(sum(t.pow(2).sum().item() for t in side)) for side in zip(*pairs, strict=True)
    ]
    return dot / (norms[0] * norms[1])


@contextmanager
def profiled(wanted: bool, row: Row, kind: str) -> Iterator[None]:
    """Print where the GPU's time of a step goes."""
    if not wanted:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield
        torch.cuda.synchronize()
    busy: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            entry = busy.setdefault(event.name, [0.0, 0])
            entry[0] += event.time_range.elapsed_us()
            entry[1] += 1
    total = sum(time for time, _ in busy.values())
    print(f"-- {row.name}, {kind}: the GPU is busy {total / 1e3:.1f} ms")
    for name, (time_, count) in sorted(busy.items(), key=lambda item: -item[1][0])[:28]:
        print(f"   {time_ / 1e3:8.2f} ms {count:6d}x  {name[:110]}")


def rate(fp8: bool) -> float:
    """FLOP/s of an 8192-cube product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    (a8, sa), (b8, sb) = quantise_rows(a), quantise_rows(b)

    def product() -> None:
        if fp8:
            torch._scaled_mm(a8, b8.T, sa, sb.T, out_dtype=torch.bfloat16, use_fast_accum=True)
        else:
            a @ b

    for _ in range(5):
        product()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        product()
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - start)


def floor_seconds(kind: str, row: Row, bf16: float, fp8: float) -> float:
    """The products of a step at the measured rates."""
    llm, vision = CONFIG["llm_config"], CONFIG["vision_config"]
    d, f, layers = llm["hidden_size"], llm["intermediate_size"], llm["num_hidden_layers"]
    kv = d * llm["num_key_value_heads"] // llm["num_attention_heads"]
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    frozen = layers * sum(a * b for a, b in shapes)
    adapter = layers * sum(128 * (a + b) for a, b in shapes)
    steps = make_lengths(kind)
    tokens = statistics.mean(sum(step) for step in steps)
    squares = statistics.mean(sum(n * n for n in step) for step in steps)
    tiles_a_step = (tokens - SAMPLES * TEXT) / 256
    answers = SAMPLES * (5 if kind == "shared" else 1) * SUPERVISED
    wide = vision["hidden_size"] * 4
    projector = wide * d + d * d
    products = (
        6 * adapter * tokens
        + layers * 7 * d * squares  # causal attention: 2 d n^2 forward, 5 d n^2 backward
        + 4 * d * llm["vocab_size"] * answers
        + 4 * projector * 256 * tiles_a_step
    )
    if not row.cached:
        v, g = vision["hidden_size"], vision["intermediate_size"]
        patches = 1025
        tower = vision["num_hidden_layers"] * (
            2 * (4 * v * v + 2 * v * g) * patches + 4 * v * patches**2
        )
        products += tower * tiles_a_step
    return products / bf16 + 4 * frozen * tokens / (fp8 if row.quantization == "fp8" else bf16)


def make_lengths(kind: str) -> list[list[int]]:
    extra = SUPERVISED * 4 if kind == "shared" else 0
    return [[n * 256 + TEXT + extra for n in step] for step in counts(kind)[WARM:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiles", nargs="+", default=["7", "1", "13", "mixed", "shared"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--profile", nargs="*", choices=ROWS, default=[])
    parser.add_argument("--tiny", action="store_true", help="miniature layers on the CPU")
    arguments = parser.parse_args()
    tiny = arguments.tiny
    rates = (1e12, 1e12) if tiny else (rate(False), rate(True))
    if not tiny:
        print(f"8192-cube products: bf16 {rates[0] / 1e12:.0f} TFLOP/s, FP8 {rates[1] / 1e12:.0f}")
    table: list[dict[str, Any]] = []
    print(
        "tiles   row                                samples/s  tokens/s  peak GiB  of floor  peers"
    )
    for kind in arguments.tiles:
        reference, base = None, None
        for name in arguments.rows:
            row = ROWS[name]
            try:
                figures, gradient = measure(
                    row,
                    kind,
                    tiny,
                    None if kind == "shared" else reference,  # other samples
                    name in arguments.profile,
                )
            except torch.OutOfMemoryError:
                print(f"{kind:7} {row.name:34} out of memory", flush=True)
                table.append({"row": row.name, "tiles": kind, "error": "out of memory"})
                continue
            finally:
                if not tiny:
                    torch.cuda.empty_cache()
            if name == "peers":
                reference, base = gradient, figures["samples_per_second"]
            step = figures["seconds_a_step"]
            figures["of_floor"] = floor_seconds(kind, row, *rates) / step
            figures["times_the_peers"] = figures["samples_per_second"] / base if base else None
            table.append(figures)
            ratio = f"{figures['times_the_peers']:.2f}x" if base else ""
            close = figures["gradient_cosine"]
            print(
                f"{kind:7} {row.name:34} {figures['samples_per_second']:9.2f} "
                f"{figures['tokens_per_second']:9.0f} {figures['peak_gib']:9.1f} "
                f"{figures['of_floor']:9.0%} {ratio:>6}  loss {figures['loss']:.3f}"
                f"{f', gradient {close:.4f}' if close else ''}"
                f", first step {figures['first_step_seconds']:.0f} s",
                flush=True,
            )
    hardware = devices()
    write_json(
        arguments.out,
        {
            "device": hardware["cpu"] if tiny else hardware["cuda"][0],
            "python": platform.python_version(),
            "versions": versions(),
            "flops_per_second": {"bf16": rates[0], "fp8": rates[1]},
            "rows": table,
        },
    )
    print(json.dumps(str(arguments.out)))


if __name__ == "__main__":
    main()
