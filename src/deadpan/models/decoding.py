"""Answering: a decoder written out for generation, over a cache that stays in its place.

transformers builds each new token's step from some thousand calls, and a GPU spends more time waiting
for them than computing. Here a step is few calls over memory that never moves, so that a GPU records
it once (a CUDA graph) and then plays it back by one call a token. The same code runs on a CPU, without
the recording.

    prompts   (token)               laid end to end, without padding
    x         (token, hidden)       a step has one token for each row
    qkv       (token, head + 2 key head, dim)
    cache     (row * length, 2 key head, dim) for each layer: keys, then values
    logits    (row, vocabulary)

A row is an answer. Its token at position p lies at `row * length + p` in the cache, so rows of unlike
lengths need neither padding nor a mask: a row attends to its first p + 1 places. Rows that continue the
same prompt share its computation and get copies of its keys and values. Of the last layer only what
predicts a token goes on behind the keys and values.

Weights are the model's own, adapters unmerged and NF4 included, read as training's decoder reads them
(`deadpan.models.fused.Layer`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, InternVLForConditionalGeneration

from deadpan.models import nf4
from deadpan.models.answer_loss import plain_model
from deadpan.models.attention import kernels
from deadpan.models.frozen import Rows, padded
from deadpan.models.fused import Layer
from deadpan.models.fused import unsupported as unsupported_layers
from deadpan.models.segments import Segments, attend, has_flash

PREFILL_TOKENS = 16384
"""Prompt tokens computed at once: enough to fill a GPU, and their activations take about 2 GiB in a 2B model."""

_STEP = 512
"""Cache lengths are multiples of it on a GPU, so that recorded steps are used again."""

_RECORDED = 16
"""The most steps that are kept recorded, each for a number of rows and a length."""

Features = Callable[[Sequence[int]], torch.Tensor | None]
"""Gives what the language model reads in place of the image tokens of some prompts: (image token, hidden)."""

Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def unsupported(model: torch.nn.Module) -> str | None:
    """Why `Decoder` cannot answer with a model, or None if it can."""
    plain = plain_model(model)
    if plain.config._attn_implementation == "eager":
        return "the plain formula was asked for"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "its weights are being trained"
    if type(plain.lm_head) is not nn.Linear:
        return "it knows no adapter of the head"
    return unsupported_layers(plain)


@dataclass
class _Plan:
    """A number of rows and a length of the cache, and what a step reads and writes.

    Attributes:
        length: Places of each row in the cache.
        tokens: The rows' newest tokens, int64 of shape (row).
        positions: Where they stand, int64 of shape (row).
        first: Each row's first place in the cache, int64 of shape (row).
        starts: The same and the end, int32 of shape (row + 1).
        each: 0, 1, ... to the number of rows, int32.
        used: Places that each row attends to, int32 of shape (row).
        graph: The recorded step, on a GPU.
        logits: What the recorded step writes.
    """

    length: int
    tokens: torch.Tensor
    positions: torch.Tensor
    first: torch.Tensor
    starts: torch.Tensor
    each: torch.Tensor
    used: torch.Tensor
    graph: Any = None
    logits: torch.Tensor | None = None


class Decoder:
    """The decoder layers of a model, for answering.

    Args:
        model: InternVL, plain or with PEFT's adapter.
        record: Record steps on a GPU.
        flash: Use the flash kernel on a GPU; else a mask.
    """

    def __init__(self, model: torch.nn.Module, record: bool = True, flash: bool = True) -> None:
        plain: InternVLForConditionalGeneration = plain_model(model)
        self._plain, language_model = plain, plain.model.language_model
        weight = plain.get_input_embeddings().weight
        self._device, self._dtype = weight.device, weight.dtype
        self._layers = [Layer(layer, self._dtype, False) for layer in language_model.layers]
        for layer in self._layers:
            if layer.parts:
                torch._foreach_copy_(layer.parts, [p.data for p in layer.parameters])
                torch._foreach_mul_(layer.parts, layer.scales)
        self._norm = (language_model.norm.weight.data, language_model.norm.variance_epsilon)
        self.longest: int = language_model.config.max_position_embeddings
        positions = torch.arange(self.longest, device=self._device)
        with torch.no_grad():
            cos, sin = language_model.rotary_emb(weight[:1], positions[None])
        self._cos, self._sin = cos[0], sin[0]  # (position, dim)
        self._none = torch.zeros((), dtype=torch.int32, device=self._device)
        quantised = nf4.is_quantised(language_model.layers[0].self_attn.k_proj.weight)
        self._record = record and self._device.type == "cuda" and not quantised
        self._flash = flash and has_flash(weight)
        self._vocabulary = len(plain.lm_head.weight)
        self._head = padded(plain.lm_head)
        self._cache: list[torch.Tensor] = []
        self._plans: OrderedDict[tuple[int, int], _Plan] = OrderedDict()
        self._pool: Any = torch.cuda.graph_pool_handle() if self._record else None
        self._plan: _Plan
        self._rows, self._reached = 0, 0

    def room(self, length: int) -> int:
        """How many rows of a length the GPU's free memory holds; at least 1."""
        if self._device.type != "cuda":
            return 2**31
        length = -(-length // _STEP) * _STEP
        layer = self._layers[0]
        element = torch.empty((), dtype=self._dtype).element_size()
        row = length * len(self._layers) * 2 * layer.key_heads * layer.dim * element
        free, _ = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        own = sum(cache.nbytes for cache in self._cache)
        spare = 2**31  # for the prompts' activations
        rows = max(1, int((free + kept + own - spare) * 0.9) // row)
        return 1 << (rows.bit_length() - 1) if self._record else rows

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        features: Features,
        new_tokens: int,
    ) -> torch.Tensor:
        """Read prompts.

        Args:
            prompts: Token ids of each, image tokens expanded.
            rows: Which prompt each answer continues; every prompt is continued by one at least.
            features: Gives the features of prompts by their numbers, each prompt asked for once.
            new_tokens: The most tokens of an answer.

        Returns:
            Logits of the answers' first tokens, of shape (row, vocabulary).
        """
        lengths = [len(prompt) for prompt in prompts]
        self._rows = len(rows)
        self._plan = plan = self._planned(len(rows), max(lengths) + new_tokens)
        standing = [lengths[prompt] for prompt in rows]
        plan.positions.zero_()
        plan.positions[: len(rows)].copy_(self._moved(standing))
        self._reached = max(lengths)
        logits = torch.cat(
            [self._read(group, prompts, rows, features) for group in _groups(lengths)]
        )
        return logits[self._moved(rows)]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after one more token of each row.

        Args:
            tokens: int64 of shape (row).

        Returns:
            Of shape (row, vocabulary), overwritten by the next step.
        """
        plan = self._plan
        plan.tokens[: self._rows].copy_(tokens)
        self._reached += 1
        if plan.graph is None:
            with kernels():
                return self._step(plan)[: self._rows]
        plan.graph.replay()
        assert plan.logits is not None
        return plan.logits[: self._rows]

    def _moved(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Numbers on the device, without waiting for it."""
        return self._to_device(torch.tensor(values, dtype=dtype))

    def _planned(self, rows: int, length: int) -> _Plan:
        """The plan for so many rows and places, its step recorded, and the cache large enough."""
        if self._record:
            rows = 1 << (rows - 1).bit_length()
            length = -(-length // _STEP) * _STEP
        if not self._cache or self._cache[0].shape[0] < rows * length:
            self._plans.clear()  # they point into the old cache
            self._cache.clear()
            layer = self._layers[0]
            shape = (rows * length, 2 * layer.key_heads, layer.dim)
            # Zeros, because what a mask hides must be a number still.
            self._cache += [
                torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in self._layers
            ]
        plan = self._plans.get((rows, length))
        if plan is None:
            first = [row * length for row in range(rows + 1)]
            plan = _Plan(
                length,
                self._moved([0] * rows),
                self._moved([0] * rows),
                self._moved(first[:-1]),
                self._moved(first, torch.int32),
                self._moved(range(rows + 1), torch.int32),
                self._moved([0] * rows, torch.int32),
            )
            if self._record:
                self._recorded(plan)
            self._plans[rows, length] = plan
            if len(self._plans) > _RECORDED:
                self._plans.popitem(last=False)
        self._plans.move_to_end((rows, length))
        return plan

    def _recorded(self, plan: _Plan) -> None:
        """Record a step. It is run before, so that its kernels are compiled, chosen and loaded."""
        with torch.cuda.device(self._device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._step(plan)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another model's thread may allocate meanwhile.
            with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
                plan.logits = self._step(plan)
            plan.graph = graph

    def _step(self, plan: _Plan) -> torch.Tensor:
        x = self._plain.get_input_embeddings()(plan.tokens)
        plan.used.copy_(plan.positions + 1)
        reached = plan.length if self._record else self._reached

        def attended(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            if self._flash:
                return _flash(q, cache, plan)
            return _masked(q, cache, plan, reached)

        logits = self._through(x, plan.positions, plan.first + plan.positions, None, attended)
        plan.positions.add_(1)
        return logits

    def _read(
        self,
        group: Sequence[int],
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        features: Features,
    ) -> torch.Tensor:
        """Read some of the prompts into the cache; logits of shape (prompt, vocabulary)."""
        pictures = features(group)  # first, so that the device is at work
        ids = [token for prompt in group for token in prompts[prompt]]
        begins, end = [], 0
        for prompt in group:
            begins.append(end)
            end += len(prompts[prompt])
        last = [begin + len(prompts[p]) - 1 for begin, p in zip(begins, group, strict=True)]
        positions = torch.cat([torch.arange(len(prompts[prompt])) for prompt in group])
        # Where each row wants the keys and values of which token.
        source, slots = [], []
        for row, prompt in enumerate(rows):
            if prompt in group:
                begin, length = begins[group.index(prompt)], len(prompts[prompt])
                source.append(torch.arange(begin, begin + length))
                slots.append(torch.arange(length) + row * self._plan.length)
        image = self._plain.config.image_token_id
        places = [place for place, token in enumerate(ids) if token == image]
        x = self._plain.get_input_embeddings()(self._moved(ids))
        if pictures is not None:
            x = x.index_copy(0, self._moved(places), pictures.to(x.dtype))
        segments = Segments.of(positions)
        segments = replace(segments, starts=self._to_device(segments.starts))
        moved = self._to_device(positions)
        tokens = self._to_device(torch.cat(source))

        def attended(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            k, v = kv.chunk(2, dim=1)
            return attend(q, k, v, segments, moved)[0]

        with kernels():
            return self._through(
                x,
                moved,
                self._to_device(torch.cat(slots)),
                None if len(tokens) == len(ids) else tokens,
                attended,
                self._moved(last),
            )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _through(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        source: torch.Tensor | None,
        attended: Attend,
        last: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings (token, hidden) to logits.

        Args:
            x: The embeddings.
            positions: Where the tokens stand.
            slots: Where their keys and values go.
            source: Of which token those of each slot are; None for one slot a token.
            attended: From queries, and the keys and values of the prompts or the cache, to the output.
            last: The tokens whose logits are wanted; None for all.
        """
        cos, sin = self._cos[positions], self._sin[positions]
        x, y = x.to(self._dtype), None
        for layer, cache in zip(self._layers, self._cache, strict=True):
            x, n = self._normed(x, y, *layer.norms[0])
            qkv = layer.qkv.forward(Rows(n), None, layer.casts[0])[0]
            heads, key_heads = layer.heads, layer.key_heads
            qkv = qkv.view(len(n), heads + 2 * key_heads, layer.dim)
            into = (slots, cache) if source is None else ()
            qkv = layer.ops.rotate(qkv, cos, sin, heads, key_heads, *into)
            if source is not None:
                cache.index_copy_(0, slots, qkv[source, heads:])
            q, kv = qkv.split([heads, 2 * key_heads], dim=1)
            out = attended(q, cache if last is None else kv).reshape(len(n), -1)
            if last is not None and layer is self._layers[-1]:
                out, x = out[last], x[last]
            y = layer.o.forward(Rows(out), None, layer.casts[1])[0]
            x, n = self._normed(x, y, *layer.norms[1])
            gate_up = layer.gate_up.forward(Rows(n), None, layer.casts[2])[0]
            h = layer.ops.swiglu(gate_up, 0.0, self._none, False)[0]
            assert h is not None
            y = layer.down.forward(Rows(h), None, layer.casts[3])[0]
        n = self._normed(x, y, *self._norm)[1]
        return functional.linear(n, self._head)[:, : self._vocabulary]

    def _normed(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of x and y, if there is a y, and its norm."""
        if y is None:
            n = self._layers[0].ops.norm(x, weight, eps, 0.0, self._none, False)[0]
        else:
            total, n, *_ = self._layers[0].ops.add_norm(x, y, weight, eps, 0.0, self._none, False)
            assert total is not None
            x = total
        assert n is not None
        return x, n


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts to be read together, about equally many tokens each time."""
    total = sum(lengths)
    share = total / -(-total // PREFILL_TOKENS)
    groups: list[list[int]] = []
    held = 0
    for prompt, length in enumerate(lengths):
        if not groups or held + length / 2 > share:
            groups.append([])
            held = 0
        groups[-1].append(prompt)
        held += length
    return groups


def _flash(q: torch.Tensor, cache: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """Attention of one token a row (row, head, dim) to its used places of the cache."""
    k, v = cache[: len(plan.first) * plan.length].chunk(2, dim=1)
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, plan.each, plan.starts, 1, plan.length, 0.0, False, False, seqused_k=plan.used
    )
    return out


def _masked(q: torch.Tensor, cache: torch.Tensor, plan: _Plan, reached: int) -> torch.Tensor:
    """The same with a mask over the first places of all rows.

    The heads that read the same keys stand where other attention has several tokens, so that no key is
    copied for them.
    """
    rows, length = len(plan.first), plan.length
    kv = cache[: rows * length].view(rows, length, *cache.shape[1:])[:, :reached]
    k, v = kv.transpose(1, 2).chunk(2, dim=1)  # (row, key head, place, dim)
    grouped = q.reshape(rows, k.shape[1], -1, q.shape[-1])
    at = torch.arange(reached, device=q.device)
    mask = (at < plan.used[:, None])[:, None, None]
    return functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)


class ModuleDecoder:
    """The same by transformers' own modules, for the models that `Decoder` does not know.

    Args:
        model: InternVL, plain or with PEFT's adapter.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._plain = model, plain_model(model)
        self._cache: Any = None
        self._mask = self._positions = torch.zeros(0)

    def room(self, length: int) -> int:
        """How many rows of a length are known to fit: any number."""
        return 2**31

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        features: Features,
        new_tokens: int,
    ) -> torch.Tensor:
        """Read prompts, padded on the left; see `Decoder.begin`."""
        device = self._plain.lm_head.weight.device
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        # Zero is a token like another, and may be that of a picture.
        places = (
            ((ids == self._plain.config.image_token_id) & (mask == 1)).flatten().nonzero()[:, 0]
        )
        ids, mask = ids.to(device), mask.to(device)
        x = self._plain.get_input_embeddings()(ids)
        pictures = features(range(len(prompts)))
        if pictures is not None:
            flat = x.flatten(0, 1).index_copy(0, places.to(device), pictures.to(x.dtype))
            x = flat.view_as(x)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        self._cache = DynamicCache()
        with kernels():
            logits = self._model(
                inputs_embeds=x,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        order = torch.tensor(rows, device=device)
        self._cache.batch_select_indices(order)
        self._mask, self._positions = mask[order], positions[order, -1]
        return logits[order]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after one more token of each row; see `Decoder.step`."""
        self._positions = self._positions + 1
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        with kernels():
            logits: torch.Tensor = self._model(
                input_ids=tokens[:, None],
                attention_mask=self._mask,
                position_ids=self._positions[:, None],
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        return logits[:, -1]
