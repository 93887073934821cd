"""What a recipe may say: every key with its type, bounds, default and meaning.

The defaults are the figures of the walkthrough that deadpan reproduces, so a recipe holds only what
differs from them.
Values are not converted: `epochs: "8"` is a mistake, not eight.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Beta = Annotated[float, Field(ge=0, lt=1)]
# Strict mode would ask for a `Path` or a tuple, and YAML has neither.
RecipePath = Annotated[Path, Field(strict=False)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]

Tracker = Literal["tensorboard", "wandb", "swanlab", "mlflow", "trackio"]

CONTRADICTION = "contradiction"
"""The type of an error about a key that does not agree with another; its context says what would."""
_AUTO_COUNTS_AS = 8

LEARNING_RATE_FREE = ("dadapt_adam", "prodigy")
"""Optimizers that find the learning rate: `lr` multiplies it, and belongs near 1."""
_LEAST_MULTIPLIER = 0.01


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Lora(_Section):
    """The low-rank adapter of the language model."""

    r: int = Field(default=128, ge=1, description="Rank of the adapter matrices.")
    lora_alpha: int = Field(
        default=256,
        ge=1,
        description="Scale of the adapter: its output is multiplied by lora_alpha / r.",
    )
    lora_dropout: float = Field(
        default=0.05, ge=0, lt=1, description="Dropout on the adapter's input while training."
    )
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        default="all-linear",
        description="Language-model layers that get an adapter: all linear ones, or those named.",
    )


class Data(_Section):
    """The records to train on."""

    train: RecipePath = Field(
        description="The training records: a JSON array or JSON lines. "
        "A relative path starts at the current directory."
    )
    images: RecipePath | None = Field(
        default=None,
        description="The folder that the records' image paths start from; null: the folder of the "
        "records. A relative path starts at the current directory.",
    )
    validation: Annotated[float, Field(gt=0, lt=1)] | RecipePath | None = Field(
        default=None,
        description="Records to measure with and not to train on: a share of the training records, "
        "such as 0.05, split by picture; or a file, whose image paths start where those of data.train "
        "do, or at its own folder; null: none, and nothing is evaluated.",
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="Processes that prepare samples; 0 prepares them in the training process; "
        "auto chooses from the CPU cores.",
    )
    overlong: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a sample longer than max_length: stop and name it, or "
        "leave it out and count it.",
    )


class Optimizer(_Section):
    """How a gradient becomes a step. Weight decay is decoupled (AdamW's) in all of them."""

    name: Literal["adamw", "dadapt_adam", "prodigy", "schedulefree_adamw"] = Field(
        default="adamw",
        description="The algorithm. dadapt_adam and prodigy find the learning rate by themselves; "
        "schedulefree_adamw averages its steps instead of lowering the rate, and saves the average.",
    )
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="Learning rate at its peak; for dadapt_adam and prodigy a factor of the rate "
        "that they find, at least 0.01. auto: 1e-5 for adamw, 5e-5 for schedulefree_adamw, 1 for the others.",
    )
    betas: Betas = Field(
        default=(0.9, 0.999),
        description="Decay of the running means of the gradient and of its square.",
    )
    weight_decay: float = Field(default=0.05, ge=0, description="Decoupled weight decay.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator of each step.")
    d0: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="dadapt_adam and prodigy only: the rate they start from, below the right one; "
        "null: 1e-6.",
    )
    d_coef: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="prodigy only: a factor of its estimate, the preferred way to tune it; null: 1.",
    )
    growth_rate: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="dadapt_adam and prodigy only: the most that the rate may grow in a step, as a "
        "factor; null: any.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        description="Gradients whose overall norm is larger are scaled down to it.",
    )

    @field_validator("lr")
    @classmethod
    def _is_a_multiplier_near_one(
        cls, lr: float | Literal["auto"], info: ValidationInfo
    ) -> float | Literal["auto"]:
        name = info.data.get("name")
        if name in LEARNING_RATE_FREE and lr != "auto" and lr < _LEAST_MULTIPLIER:
            raise contradiction(
                f"auto, 1.0 or a number near it (at least {_LEAST_MULTIPLIER}): {name} finds the "
                "learning rate, and lr multiplies it"
            )
        return lr

    @field_validator("betas")
    @classmethod
    def _is_averaged(cls, betas: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if info.data.get("name") == "schedulefree_adamw" and betas[0] == 0:
            raise contradiction("a first number > 0 with schedulefree_adamw, which divides by it")
        return betas

    @field_validator("d0", "d_coef", "growth_rate")
    @classmethod
    def _is_read(cls, value: float | None, info: ValidationInfo) -> float | None:
        readers = ("prodigy",) if info.field_name == "d_coef" else LEARNING_RATE_FREE
        name = info.data.get("name")
        if value is not None and name is not None and name not in readers:
            raise contradiction(
                f"null, or optimizer.name: {' or '.join(readers)}; {name} does not read it"
            )
        return value


class Dpo(_Section):
    """Preference training, read with `objective: dpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="How closely the model is held to the one it started as; higher is closer.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="The share of pairs expected to be the wrong way round.",
    )


class Schedule(_Section):
    """How the learning rate moves over the run."""

    name: Literal["auto", "cosine", "constant"] = Field(
        default="auto",
        description="The shape after the warm-up: down to zero along a cosine, or level; auto: "
        "cosine for adamw, constant for the other optimizers.",
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        default="auto",
        description="Share of the steps in which the rate climbs linearly to its peak; auto: 0.03, "
        "and 0 for dadapt_adam and prodigy, whose own rate climbs from nearly nothing.",
    )


class Evaluation(_Section):
    """What is measured on the way, with data.validation: see docs/design.md#evaluation."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Optimizer steps between two evaluations; the last step always has one. auto: an "
        "epoch, or 200 where an epoch is longer.",
    )
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="End the run after this many evaluations in a row without a new lowest held-out "
        "loss; null: never.",
    )
    memorisation_pictures: int = Field(
        default=16,
        ge=0,
        description="Training pictures asked at each evaluation, to see whether their answers come "
        "back word for word.",
    )
    probe_pictures: int = Field(
        default=4,
        ge=0,
        description="Held-out pictures whose answers are kept in jokes.jsonl at each evaluation.",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="The most tokens of such an answer.")


class Distributed(_Section):
    """How several processes share the work; of one alone nothing is shared."""

    engine: Literal["auto", "ddp", "deepspeed", "fsdp2"] = Field(
        default="auto",
        description="ddp: each has the whole model; deepspeed: each has the whole model and a part of the "
        "optimizer's state (ZeRO); fsdp2: each has a part of the model, for those that do not fit; "
        "auto: ddp.",
    )
    zero_stage: Literal[1, 2] | None = Field(
        default=None,
        description="deepspeed only: what is in parts: the optimizer's state (1), or that and the "
        "gradients (2); null: 1.",
    )

    @field_validator("zero_stage")
    @classmethod
    def _is_read(cls, stage: int | None, info: ValidationInfo) -> int | None:
        engine = info.data.get("engine")
        if stage is not None and engine is not None and engine != "deepspeed":
            raise contradiction(
                f"null, or distributed.engine: deepspeed; {engine} does not read it"
            )
        return stage


class Recipe(_Section):
    """Everything that decides a training run."""

    model: str = Field(
        min_length=1, description="The checkpoint to start from: a folder or a Hub id."
    )
    adapter: str | None = Field(
        default=None,
        min_length=1,
        description="An adapter to go on from, such as a run folder: preference training follows "
        "fine-tuning. It is trained further, so lora.r, lora.lora_alpha, lora.target_modules and "
        "train_projector are its own. null: a fresh one.",
    )
    objective: Literal["sft", "dpo"] = Field(
        default="sft",
        description="What is learned. sft: to give the records' answers; dpo: to prefer, of two answers "
        "to a picture, the one that was liked more. Records are then preference pairs, a sample is a "
        "pair, and the reference is the model that the run starts from.",
    )
    dpo: Dpo = Dpo()
    attention: Literal["auto", "eager", "sdpa", "flash", "varlen"] = Field(
        default="auto",
        description="The attention kernel; auto: varlen for packed rows, else sdpa.",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="The type computed in; auto: bf16 where the device has it, else fp32.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        examples=["auto", "cpu", "cuda", "cuda:0"],
        description="Where to train; auto: the first GPU, else the CPU.",
    )
    quantization: Literal["none", "nf4", "fp8"] = Field(
        default="none",
        description="How the frozen language model is held; nf4: 4 bits a weight (QLoRA); fp8: multiplied "
        "in 8 bits, on GPUs that do (H100 and later), which is the fastest and saves no memory.",
    )
    decoder: Literal["auto", "fused", "transformers"] = Field(
        default="auto",
        description="What computes the language model's layers in training; fused: deadpan's own, with "
        "the same loss and gradients in less time and memory, for Llama's (InternLM2's) and Qwen2's layers; "
        "transformers: the library's; auto: fused on a GPU where it can be, else transformers.",
    )
    lora: Lora = Lora()
    train_projector: bool = Field(
        default=True, description="Train the projector between vision tower and language model too."
    )
    max_tiles: int | None = Field(
        default=None,
        ge=1,
        description="The most tiles that a sample's pictures are cut into, thumbnails not counted; null: "
        "what the checkpoint says.",
    )
    max_length: int = Field(
        default=8192, ge=1, description="The most tokens of a sample, image tokens included."
    )
    data: Data
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    distributed: Distributed = Distributed()
    epochs: int = Field(default=8, ge=1, description="Passes over the training records.")
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many optimizer steps; null: after the last epoch.",
    )
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=8,
        description="Samples in one forward pass; auto: the most that fit in memory, found by trying when "
        "the run starts, gradient_accumulation_steps following so that a step has the same samples.",
    )
    gradient_accumulation_steps: int = Field(
        default=2,
        ge=1,
        description="Forward passes whose gradients are summed into one optimizer step.",
    )
    samples_per_step: int | None = Field(
        default=None,
        ge=1,
        description="Samples of one optimizer step, to be cut by micro_batch_size: auto; null: "
        f"micro_batch_size x gradient_accumulation_steps, auto counting as {_AUTO_COUNTS_AS}.",
    )
    packing: bool = Field(
        default=False,
        description="Lay a micro-batch's samples end to end in one row instead of padding them.",
    )
    shared_prefix: bool = Field(
        default=False,
        description="Lay records of the same pictures and the same question behind one copy of them: k answers "
        "cost one picture, with the loss of k samples, as far as they fall in one micro-batch. Such records "
        "then follow one another in an epoch. Computed by the fused decoder alone.",
    )
    gradient_checkpointing: bool = Field(
        default=True,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    feature_cache: Literal["auto"] | RecipePath | None = Field(
        default="auto",
        description="The folder in which the frozen vision tower's output is kept, so that it runs in the "
        "first epoch only; the fused decoder alone reads it. auto: in the user's cache folder, unless the disk "
        "has too little room; null: nowhere, and the tower runs in every step.",
    )
    log_every_steps: int = Field(
        default=1, ge=1, description="Optimizer steps between two lines of metrics."
    )
    trackers: Literal["auto"] | list[Tracker] = Field(
        default="auto",
        description="Where the metrics go besides metrics.jsonl, such as [wandb]; []: nowhere; auto: "
        "to TensorBoard, in the run folder, if it is installed.",
    )
    save_every_steps: int = Field(
        default=200, ge=1, description="Optimizer steps between two checkpoints."
    )
    keep_checkpoints: int = Field(
        default=3,
        ge=1,
        description="The newest checkpoints that are kept; the best one is kept besides.",
    )
    run: str = Field(
        default="runs/my-teller", min_length=1, description="The folder that the run writes."
    )
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="Seed of initialisation, order and dropout."
    )

    @property
    def effective_batch_size(self) -> int:
        """Samples of one optimizer step, however it is cut into micro-batches."""
        if self.samples_per_step is not None:
            return self.samples_per_step
        size = _AUTO_COUNTS_AS if self.micro_batch_size == "auto" else self.micro_batch_size
        return size * self.gradient_accumulation_steps

    @field_validator("samples_per_step")
    @classmethod
    def _agrees_with_a_given_micro_batch_size(
        cls, samples: int | None, info: ValidationInfo
    ) -> int | None:
        size = info.data.get("micro_batch_size")
        passes = info.data.get("gradient_accumulation_steps")
        if samples and isinstance(size, int) and passes and samples != size * passes:
            expected = (
                f"{size * passes}, which is micro_batch_size x gradient_accumulation_steps; null; "
                "or any number with micro_batch_size: auto"
            )
            raise contradiction(expected)
        return samples

    @field_validator("shared_prefix")
    @classmethod
    def _has_the_fused_decoder(cls, shared: bool, info: ValidationInfo) -> bool:
        distributed = info.data.get("distributed")
        if shared and info.data.get("decoder") == "transformers":
            raise contradiction(
                "false with decoder: transformers, whose masks keep no answers apart"
            )
        if shared and distributed is not None and distributed.engine in ("deepspeed", "fsdp2"):
            raise contradiction(
                f"false with distributed.engine: {distributed.engine}, which the fused decoder does not know"
            )
        if shared and info.data.get("objective") == "dpo":
            raise contradiction("false with objective: dpo, which compares answers one by one")
        return shared

    @field_validator("distributed")
    @classmethod
    def _can_be_shared(cls, distributed: Distributed, info: ValidationInfo) -> Distributed:
        engine, optimizer = distributed.engine, info.data.get("optimizer")
        if engine in ("auto", "ddp"):
            return distributed
        if info.data.get("objective") == "dpo":
            raise contradiction(
                "auto or ddp with objective: dpo; in parts, records' answers alone are trained on",
                "distributed.engine",
            )
        if optimizer is not None and optimizer.name != "adamw":
            raise contradiction(
                f"auto or ddp with {optimizer.name}: in parts, only adamw does what it does whole",
                "distributed.engine",
            )
        if engine == "fsdp2" and info.data.get("quantization") == "nf4":
            raise contradiction(
                "auto, ddp or deepspeed with quantization: nf4, whose weights cannot be put in parts",
                "distributed.engine",
            )
        for key, value in (("quantization", "fp8"), ("decoder", "fused")):
            if info.data.get(key) == value:
                raise contradiction(
                    f"auto or ddp with {key}: {value}; in parts, transformers' decoder trains",
                    "distributed.engine",
                )
        return distributed

    @field_validator("decoder")
    @classmethod
    def _multiplies_in_fp8(cls, decoder: str, info: ValidationInfo) -> str:
        if decoder == "transformers" and info.data.get("quantization") == "fp8":
            raise contradiction("auto or fused with quantization: fp8")
        if decoder == "fused" and info.data.get("attention") in ("eager", "sdpa"):
            raise contradiction("auto or transformers with attention: eager or sdpa")
        return decoder

    @field_validator("quantization")
    @classmethod
    def _suits_the_objective(cls, quantization: str, info: ValidationInfo) -> str:
        if quantization == "fp8" and info.data.get("objective") == "dpo":
            raise contradiction("none or nf4 with objective: dpo")
        return quantization

    @field_validator("dpo")
    @classmethod
    def _is_the_objective(cls, dpo: Dpo, info: ValidationInfo) -> Dpo:
        if dpo != Dpo() and info.data.get("objective") == "sft":
            raise contradiction("objective: dpo, which alone reads this section", "dpo")
        return dpo

    @field_validator("schedule")
    @classmethod
    def _suits_the_optimizer(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        optimizer = info.data.get("optimizer")
        if (
            optimizer is not None
            and optimizer.name == "schedulefree_adamw"
            and schedule.name == "cosine"
        ):
            raise contradiction(
                "auto or constant with schedulefree_adamw, whose averaging takes the place of a falling rate",
                "schedule.name",
            )
        return schedule


def contradiction(expected: str, key: str | None = None) -> PydanticCustomError:
    """An error about a value that does not agree with another.

    Args:
        expected: What would agree.
        key: The dotted key at fault, if it is not the one that is being checked.
    """
    return PydanticCustomError(
        CONTRADICTION, "{expected}", {"expected": expected} | ({"key": key} if key else {})
    )
