r"""Pretrain nano's base model: it looks at drawn scenes of emoji and says what is where.

    python tools/pretrain_nano.py OUT [--steps 9000] [--font NotoColorEmoji.ttf]

InternVL2's architecture in miniature, on transformers' own classes. Every scene is composed for its step and never
seen again; step n is the same whenever it is computed, so a run that was stopped (`--minutes`) goes on where it was.
The loss is the cross-entropy of the answer,

    loss = - 1/|A| * sum over t in A of log p(x_t | x_<t, picture),

A the tokens of the answers and their stop tokens. One batch in two parts: pictures with descriptions, all of one tile
grid; and text alone (what a thing is; repeat these words), which gives every token a meaning. Ends with a checkpoint in
the Hugging Face layout in OUT/raw, which `deadpan export OUT/raw NANO --layout hf --dtype fp16` turns into the one that
is shipped. On one H100 about fifteen minutes.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
)

from deadpan.checkpoints import keys
from deadpan.checkpoints.files import write_weights
from deadpan.checkpoints.processor_files import save_processor
from deadpan.data.records import Turn
from deadpan.models.answer_loss import AnswerLoss
from deadpan.processing import tiles
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Processor
from deadpan.processing.template import IMAGE_TOKEN
from nano import drawing, language
from nano.concepts import concepts
from nano.scenes import compose, describe

GRIDS = {
    (1, 1): 0.34, (2, 2): 0.24, (2, 1): 0.12, (1, 2): 0.12,
    (3, 1): 0.05, (1, 3): 0.05, (4, 1): 0.04, (1, 4): 0.04,
}  # fmt: skip
"""How often each tile grid is practised, as columns x rows."""

WARM_UP = 0.12
"""The share of the run that practises on single tiles, mostly with one thing in them: what is learned there first,
names, takes several times longer to begin with if everything comes at once."""

PICTURES, TEXTS = 512, 128
"""Samples of a step."""


def config(processor: Processor) -> InternVLConfig:
    """Nano's shape: 6 + 6 layers, 112-pixel tiles of 64 patches, 16 image tokens each."""
    tokenizer = processor.tokenizer
    policy = processor.tile_policy
    vision = InternVLVisionConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=policy.tile_size,
        patch_size=14,
        attention_bias=True,
        use_mean_pooling=True,
        layer_scale_init_value=1.0,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=704,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=processor.stop_id,
        pad_token_id=processor.pad_id,
        tie_word_embeddings=False,
    )
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=policy.tokens_per_tile,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )


@dataclass
class Rows:
    """Encoded conversations, padded on the right; each of shape (row, token)."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def position_ids(self) -> torch.Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(
            self.input_ids
        )

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(t.to(device, non_blocking=True) for t in (self.input_ids, self.labels)))


@dataclass
class Batch:
    """A step's samples: scenes of one grid with their descriptions, and exercises without a picture."""

    grid: tuple[int, int]
    which: torch.Tensor
    places: torch.Tensor
    kinds: torch.Tensor
    described: Rows
    exercises: Rows


def picture_size(random_: random.Random, wanted: tuple[int, int]) -> tuple[int, int]:
    """A width and a height that are cut into the wanted grid."""
    columns, rows = wanted
    while True:
        ratio = columns / rows * math.exp(random_.uniform(-0.4, 0.4))
        area = math.exp(random_.uniform(math.log(90**2), math.log(500**2)))
        size = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        policy = language.POLICY
        if tiles.grid(*size, policy.min_tiles, policy.max_tiles, policy.tile_size) == wanted:
            return size


class Steps(Dataset[Batch]):
    """The batches by their step; a batch depends on nothing but the seed and its step.

    Args:
        processor: Encodes the samples.
        seed: Decides everything.
        held_out: Compose only what training never composes, instead of never that.
        easy: How many steps, from the first, practise on single tiles.
        pictures: Scenes of a step.
    """

    def __init__(
        self, processor: Processor, seed: int, held_out: bool, easy: int, pictures: int
    ) -> None:
        self._processor, self._seed = processor, seed
        self._held_out, self._easy, self._pictures = held_out, easy, pictures
        known = processor.tokenizer
        texts = (known.decode([index]) for index in range(len(known)))
        special = set(known.all_special_tokens)
        self._words = [t for t in texts if t not in special and "\ufffd" not in t and t.strip()]

    def __getitem__(self, step: int) -> Batch:
        random_ = random.Random(f"{self._seed}/{self._held_out}/{step}")
        easy = step < self._easy
        grid = (1, 1) if easy else random_.choices(list(GRIDS), list(GRIDS.values()))[0]
        kinds = (6, 3, 1) if easy else (1, 1, 1)
        everything = range(len(concepts()))
        scenes = [
            compose(
                random_, random_.choices((1, 2, 3), kinds)[0], picture_size(random_, grid),
                everything, self._held_out,
            )
            for _ in range(self._pictures)
        ]  # fmt: skip
        count = grid[0] * grid[1]
        count += count > 1
        described = [(language.question(random_), describe(s.groups)) for s in scenes]
        exercises = [language.exercise(random_, self._words) for _ in range(TEXTS)]
        return Batch(
            grid,
            *drawing.sprites(scenes),
            torch.tensor([len(scene.groups) for scene in scenes]),
            self._rows(described, [count]),
            self._rows(exercises, []),
        )

    def _rows(self, conversations: list[tuple[str, str]], tile_counts: list[int]) -> Rows:
        encoded = [
            self._processor.encode([Turn("human", q), Turn("gpt", a)], tile_counts, "an exercise")
            for q, a in conversations
        ]
        width = -(-max(len(ids) for ids, _ in encoded) // 16) * 16  # few widths, few compilations
        input_ids = torch.full((len(encoded), width), self._processor.pad_id)
        labels = torch.full((len(encoded), width), IGNORE_INDEX)
        for row, (ids, wanted) in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(wanted)
        return Rows(input_ids, labels)


def pixel_values(
    sheet: torch.Tensor, batch: Batch, generator: torch.Generator, random_: random.Random
) -> torch.Tensor:
    """Draw a batch and cut it, as `deadpan.processing.tiles` cuts pictures.

    Returns:
        float32 of shape (tile, 3, 112, 112), the thumbnail last of each picture's.
    """
    edge = language.POLICY.tile_size
    columns, rows = batch.grid
    size = (columns * edge, rows * edge)
    drawn = drawing.draw(sheet, batch.which, batch.places, size, generator)
    if random_.random() < 0.5:  # pictures that were smaller than their tiles
        share = random_.uniform(0.6, 1.0)
        small = [round(share * side) for side in drawn.shape[2:]]
        drawn = functional.interpolate(drawn, size=small, mode="bicubic", antialias=True)
        drawn = functional.interpolate(drawn, size=size[::-1], mode="bicubic").clamp(0, 1)
    cut = drawn.view(len(drawn), 3, rows, edge, columns, edge).permute(0, 2, 4, 1, 3, 5)
    cut = cut.flatten(1, 2)  # (picture, tile, 3, row, column)
    if columns * rows > 1:
        whole = functional.interpolate(drawn, size=(edge, edge), mode="bicubic", antialias=True)
        cut = torch.cat([cut, whole.clamp(0, 1)[:, None]], dim=1)
    mean, std = (
        torch.tensor(values, device=cut.device)[:, None, None]
        for values in (tiles.IMAGENET_MEAN, tiles.IMAGENET_STD)
    )
    return ((cut - mean) / std).flatten(0, 1)


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate: a short climb, then down a cosine to zero."""
    climb = min(300, max(1, steps // 20))
    if step < climb:
        return peak * (step + 1) / climb
    return peak * 0.5 * (1 + math.cos(math.pi * (step - climb) / max(1, steps - climb)))


@torch.no_grad()
def exact(
    model: InternVLForConditionalGeneration,
    sheet: torch.Tensor,
    loader: DataLoader,
    generator: torch.Generator,
    bf16: bool,
) -> dict[str, float]:
    """The share of descriptions that greedy decoding would give word for word, by the number of concepts."""
    right, seen = torch.zeros(4), torch.zeros(4)
    random_ = random.Random(0)
    for batch in loader:
        rows = batch.described.to(sheet.device)
        pixels = pixel_values(sheet, batch, generator, random_)
        with torch.autocast(sheet.device.type, torch.bfloat16, enabled=bf16):
            hidden = model.model(
                input_ids=rows.input_ids,
                pixel_values=pixels,
                position_ids=rows.position_ids(),
                use_cache=False,
            ).last_hidden_state[:, :-1]
            targets = rows.labels[:, 1:]
            wanted = targets != IGNORE_INDEX
            best = model.lm_head(hidden[wanted]).argmax(dim=-1)
        correct = torch.ones_like(targets, dtype=torch.bool)
        correct[wanted] = best == targets[wanted]
        whole = correct.all(dim=1).cpu()
        for kinds in (1, 2, 3):
            right[kinds] += whole[batch.kinds == kinds].sum()
            seen[kinds] += (batch.kinds == kinds).sum()
    return {
        f"{kinds} concepts": round((right[kinds] / seen[kinds]).item(), 4) for kinds in (1, 2, 3)
    }


def save(model: InternVLForConditionalGeneration, processor: Processor, folder: Path) -> None:
    """Write the Hugging Face layout, as far as deadpan needs it to read it back."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    parameters = dict(model.named_parameters())
    entries = keys.hf_entries(list(parameters))
    write_weights(
        ((entry.source, entry.join([parameters[t] for t in entry.targets])) for entry in entries),
        folder,
    )
    save_processor(processor, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop then; call again to go on"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--font", type=Path, default=drawing.FONT)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="scenes of a step")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = device.type == "cuda"
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")

    if not (out / "tokenizer" / "tokenizer.json").exists():
        language.train_tokenizer(out / "tokenizer")
    processor = language.processor(out / "tokenizer")
    model = InternVLForConditionalGeneration(config(processor)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {len(processor.tokenizer)} tokens", flush=True)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=arguments.lr,
        betas=(0.9, 0.98),
        fused=bf16,
    )
    done = 0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        print(f"going on after step {done}", flush=True)
    if bf16 and not arguments.no_compile:
        # Layer by layer, so that the six share what is compiled for a shape; there are a dozen shapes.
        torch._dynamo.config.recompile_limit = 64
        for layer in (*model.model.vision_tower.encoder.layer, *model.model.language_model.layers):
            layer.compile(dynamic=False)
    loss_of = AnswerLoss(model)
    sheet = drawing.atlas(arguments.font, device)

    common = {"batch_size": None, "num_workers": arguments.workers, "pin_memory": False}
    easy = round(WARM_UP * arguments.steps)
    steps = Steps(processor, arguments.seed, False, easy, arguments.pictures)
    loader = DataLoader(
        steps,
        sampler=range(done, arguments.steps),
        prefetch_factor=4 if arguments.workers else None,
        **common,
    )
    test = Steps(processor, arguments.seed, True, 0, arguments.pictures)
    log = (out / "log.jsonl").open("a", encoding="utf-8")
    began = time.perf_counter()
    model.train()
    for step, batch in zip(range(done, arguments.steps), loader, strict=True):
        generator = torch.Generator(device).manual_seed(arguments.seed * 1_000_003 + step)
        pixels = pixel_values(sheet, batch, generator, random.Random(step))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, arguments.steps, arguments.lr)
        losses = []
        for rows, values in ((batch.described, pixels), (batch.exercises, None)):
            rows = rows.to(device)
            supervised = (rows.labels != IGNORE_INDEX).sum()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = (
                    loss_of(rows.input_ids, rows.labels, rows.position_ids(), values) / supervised
                )
            (loss if values is not None else 0.3 * loss).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        last = done == arguments.steps or time.perf_counter() - began > 60 * arguments.minutes
        if done % 100 == 0 or last:
            line = {
                "step": done,
                "loss": round(losses[0].item(), 5),
                "exercise_loss": round(losses[1].item(), 5),
                "seconds": round(time.perf_counter() - began, 1),
            }
            if done % 1000 == 0 or last:
                model.eval()
                checks = DataLoader(test, sampler=range(8), **common)
                checked = torch.Generator(device).manual_seed(1)
                line |= exact(model, sheet, checks, checked, bf16)
                model.train()
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if last:
            break
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
    torch.save(state, state_file)
    save(model.eval(), processor, out / "raw")


if __name__ == "__main__":
    main()
