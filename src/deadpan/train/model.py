"""The model that a recipe trains: the base, quantised or not, with an adapter."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from deadpan import nano
from deadpan.checkpoints.load import Progress, load_base
from deadpan.checkpoints.source import detect
from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.models import lora
from deadpan.models.answer_loss import AnswerLoss, Reduction, plain_model
from deadpan.models.build import checkpoint_layers
from deadpan.models.frozen import has_fp8
from deadpan.models.fused import unsupported
from deadpan.models.fused_loss import FusedLoss
from deadpan.models.preference_loss import log_probabilities
from deadpan.models.recorded import RecordedLoss, suits
from deadpan.processing.collate import Batch
from deadpan.processing.processor import Processor
from deadpan.train.features import FeatureCache, default_folder
from deadpan.train.start import adapter_folder


def build(
    recipe: Recipe,
    folder: Path,
    processor: Processor,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> PeftModel:
    """Load the base and put an adapter on it, a fresh one or the one that the recipe starts from.

    Args:
        recipe: What to train.
        folder: Where the base is.
        processor: Its processor.
        device: Where to train.
        dtype: The type computed in.
        progress: Called with the number of tensors read and their total.

    Raises:
        DeadpanError: If the base or the adapter's settings are not in order.
    """
    plain = load_base(
        folder,
        detect(folder),
        processor,
        device,
        dtype,
        _attention(recipe),
        # FP8 is how training multiplies; evaluations multiply with the weights as they are.
        "none" if recipe.quantization == "fp8" else recipe.quantization,
        progress,
    )
    # A folder is recorded by its full path, so that the adapter finds it from anywhere; a Hub id stays one.
    local = recipe.model != nano.MODEL and Path(recipe.model).expanduser().is_dir()
    base = str(folder.resolve()) if local else recipe.model
    model = lora.attach(
        plain, base, train_projector=recipe.train_projector, **recipe.lora.model_dump()
    )
    if (start := adapter_folder(recipe)) is not None:
        lora.load_state(model, start)
    return model.train()


class TrainingLoss:
    """The loss of micro-batches of a run, through the decoder that the recipe asks for.

    Args:
        recipe: The run's recipe.
        model: What it trains.
        processor: Its processor.
        device: Where it is.
        dtype: The type computed in.
        prepare: What accelerate does to a module before it is used.

    Raises:
        DeadpanError: If the recipe asks for what the model or the device cannot do.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PeftModel,
        processor: Processor,
        device: torch.device,
        dtype: torch.dtype,
        prepare: Callable[[nn.Module], nn.Module],
    ) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self.fused: FusedLoss | None = None
        self._recorded: RecordedLoss | None = None
        self.cache: FeatureCache | None = None
        if _is_fused(recipe, model, device):
            fp8 = recipe.quantization == "fp8"
            self.fused = FusedLoss(model, dtype, fp8, recipe.lora.lora_dropout)
            if suits(self.fused):
                self._recorded = RecordedLoss(self.fused)
            if recipe.feature_cache is not None:
                folder = (
                    default_folder() if recipe.feature_cache == "auto" else recipe.feature_cache
                )
                self.cache = FeatureCache(folder, plain_model(model), processor, dtype)
        else:
            self._plain = prepare(AnswerLoss(model))
        if recipe.gradient_checkpointing:
            self.checkpoint()

    def checkpoint(self) -> None:
        """From now on compute activations again in the backward pass."""
        # The frozen vision tower keeps no activations; only the language model has something to recompute.
        if self.fused is not None:
            self.fused.checkpoint = True
        else:
            checkpoint_layers(plain_model(self._model).model.language_model)

    def free(self) -> None:
        """Give back the memory that is kept from step to step, for others to use meanwhile."""
        if self._recorded is not None:
            self._recorded.forget()

    @property
    def recording_seconds(self) -> float:
        """The time that steps took so far beyond what they would take again."""
        return 0.0 if self._recorded is None else self._recorded.seconds

    def __call__(self, batch: Batch, reduction: Reduction = "sum") -> torch.Tensor:
        """The losses of a micro-batch's supervised tokens, or their sum, a scalar; float32.

        Args:
            batch: On the CPU.
            reduction: Whether to sum.
        """
        if self.fused is not None:
            keep = self._keep(batch) if batch.feature_files else None
            # It knows its types by itself; an evaluation has autocast on.
            with torch.autocast(self._device.type, enabled=False):
                return (self._recorded or self.fused)(batch, keep, reduction)
        on_device = batch.to(self._device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is torch.bfloat16):
            return self._plain(
                on_device.input_ids,
                on_device.labels,
                on_device.position_ids,
                on_device.pixel_values,
                reduction,
            )

    def log_probabilities(self, batch: Batch) -> torch.Tensor:
        """The log-probability of each sample's supervised tokens, in nats: float32 of shape (sample,).

        Args:
            batch: On the CPU.
        """
        return log_probabilities(self(batch, "none"), batch)

    def _keep(self, batch: Batch) -> Callable[[torch.Tensor], None]:
        paths = [path for path, _ in batch.feature_files]
        counts = [count for _, count in batch.feature_files]

        def keep(features: torch.Tensor) -> None:
            assert self.cache is not None
            self.cache.write(paths, features.cpu().split(counts))

        return keep


def _is_fused(recipe: Recipe, model: PeftModel, device: torch.device) -> bool:
    """Whether the recipe's layers are computed by the decoder written out for training."""
    fp8 = recipe.quantization == "fp8"
    if fp8 and not has_fp8(device):
        raise DeadpanError(
            "This device does not multiply in FP8.",
            where="quantization: fp8",
            expected="an NVIDIA GPU of compute capability 9.0 or more, such as an H100",
            found=str(device),
            fix="use quantization=nf4 or quantization=none",
        )
    if recipe.distributed.engine in ("deepspeed", "fsdp2"):
        # Its weights are stacked, and neither can put those in parts.
        return False
    wanted = recipe.decoder == "fused" or fp8 or recipe.shared_prefix
    if recipe.decoder == "transformers" or (device.type == "cpu" and not wanted):
        return False
    if not wanted and recipe.attention in ("eager", "sdpa"):
        return False
    reason = unsupported(plain_model(model))
    if reason is not None and wanted:
        without = " and another quantization" if fp8 else ""
        without += " and shared_prefix=false" if recipe.shared_prefix else ""
        raise DeadpanError(
            f"The fused decoder cannot train this model: {reason}.",
            where="decoder",
            fix=f"use decoder=transformers{without}",
        )
    return reason is None


def _attention(recipe: Recipe) -> str:
    """`auto` keeps the samples of packed rows apart without a mask, which takes time and memory."""
    auto = recipe.attention == "auto" and recipe.packing
    return "varlen" if auto else recipe.attention
