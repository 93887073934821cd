"""The training loss of few tokens, played back: both passes recorded once, as a CUDA graph, for many batches.

A GPU is through with a micro-batch of few tokens before the host has launched its kernels one by one. A
recording is launched by one call, but has fixed shapes and addresses. So a batch is filled up to a
`Shape` that others are filled up to as well, which changes neither loss nor gradients.

The recording leaves gradients of the summed loss in buffers of its own. The loss that is returned has
these in store: `backward` scales them and adds them to the parameters' `.grad` as ever.
"""

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from deadpan.models import nf4
from deadpan.models.answer_loss import Reduction
from deadpan.models.fused import Row, layer_backward, layer_forward
from deadpan.models.fused_loss import FusedLoss, Keep, Tokens
from deadpan.models.segments import Segments, has_flash
from deadpan.models.shapes import Shape
from deadpan.processing.collate import Batch

MOST_TOKENS = 6144
"""Beyond it a GPU is what is waited for: an H100 computes 16 us a token of a 2B model in FP8, and its host
launches a pass in 107 ms."""

_MOST_RECORDED = 32
"""The most shapes that are recorded, the first that come twice. None gives way to another: a set of
shapes larger than that would be recorded over and over, each time for longer than a few plain passes."""

_MARGIN = 1.25
"""A plain pass is taken to need so much more than a recorded one, token for token."""


def suits(fused: FusedLoss) -> bool:
    """Whether passes can be recorded: on a GPU with flash kernels, and not with NF4, which is expanded each time."""
    weight = fused.model.model.language_model.layers[0].self_attn.k_proj.weight
    return has_flash(torch.empty(0, dtype=fused.dtype, device=fused.device)) and not (
        nf4.is_quantised(weight)
    )


@dataclass
class _Pass:
    """A shape's pass.

    Attributes:
        numbers: What it reads, int64: `Shape.filled` end to end, and the seeds of dropout.
        parts: Views of these, in that order.
        graph: Its recording.
    """

    numbers: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    graph: Any = None


class RecordedLoss:
    """The loss of a `FusedLoss`, played back where that is faster.

    A shape's first batch goes the plain way. So does what a recording cannot do: answers behind a shared
    prefix, losses token by token, evaluation, more than `MOST_TOKENS` tokens, or samples beyond the model's
    positions. The numbers are the same. On a CPU the same pass runs unrecorded.

    Recordings share one pool of memory, which they keep. The largest comes first, and the others find
    room in what it took; so a larger one begins the pool anew. They give way to the plain way where both
    do not fit, and then no more are made.

    Args:
        fused: The plain way.

    Attributes:
        played: How many batches did not go the plain way.
        seconds: How long recording has taken so far.
    """

    def __init__(self, fused: FusedLoss) -> None:
        self._fused, self._device = fused, fused.device
        projector = fused.model.model.multi_modal_projector
        self._projector = {n: p for n, p in projector.named_parameters() if p.requires_grad}
        positions = torch.arange(min(MOST_TOKENS, self._longest), device=self._device)
        like = torch.empty(0, dtype=fused.dtype, device=self._device)
        self._cos, self._sin = fused.decoder.rotation(like, positions)
        self._passes: dict[Shape, _Pass] = {}
        self._seen: set[Shape] = set()
        self._stopped, self._checkpoint = False, fused.checkpoint
        self._held = 0
        self._pool: Any = None
        self._side: Any = None
        self._loss = torch.zeros((), device=self._device)
        self._features: torch.Tensor | None = None
        self._gradients: list[list[torch.Tensor]] = []
        self.played = 0
        self.seconds = 0.0

    def __call__(
        self, batch: Batch, keep: Keep | None = None, reduction: Reduction = "sum"
    ) -> torch.Tensor:
        """The loss of a micro-batch; see `FusedLoss`. Its gradients can be had until the next call."""
        if self._fused.checkpoint != self._checkpoint:
            self.forget()
        tokens, features = self._fused.read(batch), self._fused.features(batch, keep)
        shape = self._shape(tokens, features, reduction)
        if shape is not None and self._plays(shape, tokens, features):
            self.played += 1
            weights = [p for layer in self._fused.decoder.layers for p in layer.parameters]
            groups = self._gradients
            if shape.pictured:
                weights += self._projector.values()
            else:
                groups = groups[:-1]
            gradients = [gradient for group in groups for gradient in group]
            loss: torch.Tensor = _Known.apply(self, self._loss, gradients, *weights)
            return loss
        if self._held and not self._is_roomy(len(tokens.ids)):
            self._stop()
        return self._fused.of(tokens, features, reduction)

    def forget(self) -> None:
        """Give back what recordings keep, and begin anew."""
        self._drop()
        self._seen.clear()
        self._gradients, self._features = [], None
        self._stopped, self._checkpoint = False, self._fused.checkpoint

    def _drop(self) -> None:
        if self._device.type == "cuda" and self._passes:
            torch.cuda.synchronize(self._device)
        self._passes.clear()
        # A pool that has lost its last recording takes no other.
        self._held, self._pool = 0, None

    def _stop(self) -> None:
        self.forget()
        self._stopped = True

    @property
    def _longest(self) -> int:
        """The positions that the model has: beyond them some models rotate all anew."""
        longest: int = self._fused.model.model.language_model.config.max_position_embeddings
        return longest

    def _shape(
        self, tokens: Tokens, features: torch.Tensor | None, reduction: Reduction
    ) -> Shape | None:
        """What to fill a batch up to, or None if it goes the plain way."""
        fused = self._fused
        plain = (
            self._stopped
            or reduction != "sum"
            or not torch.is_grad_enabled()
            or not fused.model.training
            or tokens.segments.readers is not None
            or tokens.segments.longest > self._longest
            # The plain way says what is wrong with it.
            or (features is not None and features.shape[:-1].numel() != len(tokens.image_tokens))
        )
        if plain:
            return None
        shape = Shape.of(tokens, features is not None)
        return shape if shape.tokens <= MOST_TOKENS else None

    def _plays(self, shape: Shape, tokens: Tokens, features: torch.Tensor | None) -> bool:
        """Do a batch's pass; False if it is still to be done the plain way."""
        if shape not in self._seen:
            self._seen.add(shape)
            return False
        if shape not in self._passes:
            if all(shape.tokens > known.tokens for known in self._passes):
                self._drop()
            if len(self._passes) == _MOST_RECORDED:
                return False
        parts = shape.filled(tokens)
        samples = tuple(pairwise(parts[-1].tolist()))
        segments = replace(tokens.segments, longest=shape.longest, samples=samples)
        try:
            of_shape = self._read(shape, parts, features)
            if self._device.type != "cuda":
                self._compute(shape, of_shape, segments)
                return True
            fits = of_shape.graph is not None or self._record(shape, of_shape, segments)
        except torch.OutOfMemoryError:
            fits = False
        if not fits:
            self._stop()
            return False
        of_shape.graph.replay()
        return True

    def _read(
        self, shape: Shape, parts: list[torch.Tensor], features: torch.Tensor | None
    ) -> _Pass:
        """Put a batch where its shape's pass reads it; the pass, made if there was none."""
        if not self._gradients:
            self._gradients = [
                [torch.empty_like(p) for p in group]
                for group in (
                    *(layer.parameters for layer in self._fused.decoder.layers),
                    self._projector.values(),
                )
            ]
        parts = [*parts, self._fused.decoder.seeds().flatten()]
        if (of_shape := self._passes.get(shape)) is None:
            sizes = [len(part) for part in parts]
            numbers = torch.empty(sum(sizes), dtype=torch.int64, device=self._device)
            of_shape = self._passes[shape] = _Pass(numbers, numbers.split(sizes))
        together = torch.cat(parts)
        if self._device.type == "cuda":
            together = together.pin_memory()
        of_shape.numbers.copy_(together, non_blocking=True)
        if features is not None:
            rows = features.flatten(0, -2)
            if self._features is None:
                channels = rows.shape[1]
                self._features = rows.new_zeros(MOST_TOKENS, channels, device=self._device)
            self._features[: len(rows)].copy_(rows, non_blocking=True)
            self._features[len(rows) : shape.tokens].zero_()
        return of_shape

    def _record(self, shape: Shape, of_shape: _Pass, segments: Segments) -> bool:
        """Record a pass; False if the memory is too tight for it.

        It is run before, so that its kernels are compiled, chosen and loaded.
        """
        began = time.perf_counter()
        ran_out = False
        # Autograd in this thread, which alone is being recorded.
        one_thread = torch.autograd.grad_mode.set_multithreading_enabled(False)
        with torch.cuda.device(self._device), one_thread:
            # Memory of a pool goes from one recording to the next on the same stream only.
            self._side = self._side or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                self._compute(shape, of_shape, segments)
            current.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # Threads that fetch data or talk to other processes go on meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, self._pool, self._side, capture_error_mode=mode):
                before = torch.cuda.memory_reserved()
                try:
                    self._compute(shape, of_shape, segments)
                except torch.OutOfMemoryError:
                    ran_out = True  # a recording that is broken off must be ended all the same
                self._held += torch.cuda.memory_reserved() - before
            of_shape.graph = graph
        self.seconds += time.perf_counter() - began
        return not ran_out and self._is_roomy(shape.tokens)

    def _is_roomy(self, count: int) -> bool:
        """Whether a plain pass of so many tokens has room beside what recordings keep."""
        a_token = self._held / max(shape.tokens for shape in self._passes)
        free, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        idle = reserved - torch.cuda.memory_allocated(self._device) - self._held
        return free + idle > _MARGIN * a_token * count

    @torch.no_grad()
    def _compute(self, shape: Shape, of_shape: _Pass, segments: Segments) -> None:
        """Both passes over what is in place, loss and gradients into their places.

        On a GPU it neither waits for the device nor reads anything but what stays in its place.
        """
        fused, decoder = self._fused, self._fused.decoder
        ids, positions, image_tokens, wanted, targets, starts, drawn = of_shape.parts
        segments = replace(segments, starts=starts.to(torch.int32))
        row = Row(self._cos[positions], self._sin[positions], positions, segments, decoder.dropout)
        decoder.cast()
        x = fused.embedded(ids)
        # Leaves of their own: the parameters' may belong to another stream, which no recording can wait for.
        leaves = {name: p.detach().requires_grad_() for name, p in self._projector.items()}
        if shape.pictured:
            assert self._features is not None
            with torch.enable_grad():
                projected = fused.projected(self._features[: shape.tokens], leaves)
            x.index_copy_(0, image_tokens, projected.detach())
        seeds = drawn.to(torch.int32).view(len(decoder.layers), -1)
        done = []
        for layer, of_layer in zip(decoder.layers, seeds, strict=True):
            rows = wanted if layer is decoder.layers[-1] else None
            drops = of_layer.unbind()
            out, kept = layer_forward(layer, row, x, drops, rows)
            done.append((layer, x, drops, rows, None if self._checkpoint else kept))
            x = out
        del out, kept
        hidden = x.requires_grad_()
        with torch.enable_grad():
            logits = fused.logits(decoder.norm(hidden)).float()
            loss = functional.cross_entropy(logits, targets, reduction="sum")
        (grad,) = torch.autograd.grad(loss, hidden)
        self._loss.copy_(loss)
        del logits, loss, hidden
        *of_layers, of_projector = self._gradients
        while done:
            layer, x, drops, rows, known = done.pop()
            known = known or layer_forward(layer, row, x, drops, rows)[1]
            grad, gradients = layer_backward(layer, row, x, drops, rows, known, grad)
            if gradients:
                torch._foreach_copy_(of_layers[len(done)], gradients)
        if shape.pictured and leaves:
            found = torch.autograd.grad(projected, list(leaves.values()), grad[image_tokens])
            torch._foreach_copy_(of_projector, list(found))


class _Known(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any,
        owner: RecordedLoss,
        loss: torch.Tensor,
        gradients: list[torch.Tensor],
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.owner, ctx.number, ctx.gradients = owner, owner.played, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.owner.played != ctx.number:
            raise RuntimeError("A later batch has taken the place of this loss's gradients.")
        return None, None, None, *torch._foreach_mul(ctx.gradients, grads[0])
