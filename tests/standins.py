"""Stand-ins for vLLM 0.24.0 and LMDeploy 0.18.0: what deadpan calls of them, by their signatures, and what they return.

They answer with the model that they are given, loaded by transformers, so that prompts, pixels and
answers can be held against the builtin engine's without a GPU.
"""

import asyncio
import copy
import itertools
import json
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from deadpan.checkpoints.load import Loaded, load
from deadpan.models import lora


class Model:
    """The model in an engine, and what the engine has been asked."""

    def __init__(self, folder: str, dtype: str) -> None:
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        self.loaded: Loaded = load(folder, device="cpu", dtype=names[dtype])
        self.inside, self.most_inside = 0, 0
        self.wanted = 1
        """No answer is given before so many questions are inside at once."""
        self.fails: str | None = None
        self.pause = 0.0
        """Seconds between two tokens of a stream."""
        self.left = threading.Event()
        self.arguments: Any = None
        self.sampling: list[Any] = []
        self.digests: list[str] = []
        self.closed = False
        self._enough = asyncio.Event()

    def put_on(self, adapter: str, rank: int) -> None:
        config = json.loads((Path(adapter) / "adapter_config.json").read_text())
        if config["r"] > rank:
            raise Exception(f"LoRA rank {config['r']} is greater than max_lora_rank {rank}.")
        model = lora.load(self.loaded.model, Path(adapter), trainable=False)
        self.loaded = replace(self.loaded, model=model)

    async def answer(
        self, ids: list[int], pixel_values: torch.Tensor | None, tokens: int, stop: int
    ) -> list[int]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            if self.inside >= self.wanted:
                self._enough.set()
            await self._enough.wait()
            inputs = {"input_ids": torch.tensor([ids])}
            if pixel_values is not None:
                assert pixel_values.dtype == self.loaded.model.dtype
                inputs["pixel_values"] = pixel_values
            with torch.inference_mode():
                output = self.loaded.model.generate(
                    **inputs,
                    attention_mask=torch.ones_like(inputs["input_ids"]),
                    max_new_tokens=tokens,
                    do_sample=False,
                    eos_token_id=stop,
                )
            answer: list[int] = output[0, len(ids) :].tolist()
            return answer
        finally:
            self.inside -= 1

    async def between(self) -> None:
        """Wait for a stream's next token."""
        try:
            await asyncio.sleep(self.pause)
        except asyncio.CancelledError:
            self.left.set()
            raise

    def log_probabilities(self, ids: list[int], pixel_values: torch.Tensor | None) -> list[float]:
        """Of each token after the first."""
        inputs = {"input_ids": torch.tensor([ids])}
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values
        with torch.inference_mode():
            logits = self.loaded.model(**inputs).logits[0, :-1].float()
        targets = torch.tensor(ids[1:])
        row: list[float] = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        return row


# vLLM: vllm/sampling_params.py, vllm/inputs/engine.py, vllm/multimodal/inputs.py, vllm/engine/arg_utils.py,
# vllm/usage/usage_lib.py, vllm/config/lora.py, vllm/lora/request.py, vllm/v1/engine/async_llm.py, vllm/outputs.py.


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass(frozen=True)
class PlaceholderRange:
    offset: int
    length: int
    is_embed: torch.Tensor | None = None


class MultiModalFieldConfig:
    """Each of these says how a batch falls apart into its items."""

    @staticmethod
    def batched(modality: str, *, keep_on_cpu: bool = False) -> Any:
        return lambda data: list(data)

    @staticmethod
    def flat_from_sizes(
        modality: str, size_per_item: torch.Tensor, dim: int = 0, *, keep_on_cpu: bool = False
    ) -> Any:
        assert size_per_item.ndim == 1
        return lambda data: list(data.split(size_per_item.tolist(), dim))

    @staticmethod
    def shared(modality: str, batch_size: int, *, keep_on_cpu: bool = False) -> Any:
        return lambda data: [data] * batch_size


class MultiModalKwargsItems(dict[str, list[dict[str, torch.Tensor]]]):
    @staticmethod
    def from_hf_inputs(
        hf_inputs: Mapping[str, torch.Tensor], config_by_key: Mapping[str, Any]
    ) -> "MultiModalKwargsItems":
        fields = {key: split(hf_inputs[key]) for key, split in config_by_key.items()}
        (count,) = {len(items) for items in fields.values()}
        items = [{key: fields[key][place] for key in fields} for place in range(count)]
        return MultiModalKwargsItems({"image": items})


def mm_input(
    prompt_token_ids: list[int],
    mm_kwargs: MultiModalKwargsItems,
    mm_hashes: Mapping[str, list[str]],
    mm_placeholders: Mapping[str, Sequence[PlaceholderRange]],
    *,
    prompt: str | None = None,
    cache_salt: str | None = None,
) -> dict[str, Any]:
    return {
        "type": "multimodal",
        "prompt_token_ids": prompt_token_ids,
        "mm_kwargs": mm_kwargs,
        "mm_hashes": mm_hashes,
        "mm_placeholders": mm_placeholders,
    }


def tokens_input(
    prompt_token_ids: list[int], *, prompt: str | None = None, cache_salt: str | None = None
) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": prompt_token_ids}


class UsageContext(Enum):
    LLM_CLASS = "LLM_CLASS"
    ENGINE_CONTEXT = "ENGINE_CONTEXT"


@dataclass
class AsyncEngineArgs:
    model: str = "Qwen/Qwen3-0.6B"
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.92
    limit_mm_per_prompt: dict[str, int] = field(default_factory=dict)
    mm_processor_cache_gb: float = 4
    disable_log_stats: bool = False
    shutdown_timeout: int = 0
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16


MaxLoRARanks = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class AsyncLLM:
    def __init__(self, engine_args: AsyncEngineArgs) -> None:
        self._length = engine_args.max_model_len or 0
        self.model = Model(engine_args.model, engine_args.dtype)
        self.model.arguments = engine_args
        self._adapter: LoRARequest | None = None
        # What a process that is started here would inherit.
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set())

    @classmethod
    def from_engine_args(
        cls,
        engine_args: AsyncEngineArgs,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
    ) -> "AsyncLLM":
        assert usage_context is UsageContext.LLM_CLASS
        if engine_args.gpu_memory_utilization < 0.1:
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        return cls(engine_args)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        if not self.model.arguments.enable_lora:
            raise Exception("LoRA is not enabled!")
        rank = self.model.arguments.max_lora_rank
        self.model.put_on(lora_request.lora_path, rank)
        self._adapter = lora_request
        return True

    async def generate(
        self,
        prompt: Mapping[str, Any],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Any]:
        assert lora_request == self._adapter
        ids, pixel_values = list(prompt["prompt_token_ids"]), None
        assert len(ids) < self._length
        if prompt["type"] == "multimodal":
            image = self.model.loaded.processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
            items = prompt["mm_kwargs"]["image"]
            per_tile = self.model.loaded.processor.tile_policy.tokens_per_tile
            for place, item in zip(prompt["mm_placeholders"]["image"], items, strict=True):
                there = ids[place.offset : place.offset + place.length]
                assert set(there) == {image}
                assert len(there) == item["image_num_patches"] * per_tile
                assert item["image_token_id"] == image
            pixel_values = torch.cat([item["pixel_values"] for item in items])
            self.model.digests += prompt["mm_hashes"]["image"]
        self.model.sampling.append(sampling_params)
        if sampling_params.prompt_logprobs is not None:
            row = self.model.log_probabilities(ids, pixel_values)
            rows = [{i: SimpleNamespace(logprob=p)} for i, p in zip(ids[1:], row, strict=True)]
            output = SimpleNamespace(token_ids=[0], finish_reason="length")
            yield SimpleNamespace(outputs=[output], prompt_logprobs=[None, *rows], finished=True)
            return
        assert sampling_params.ignore_eos
        assert not sampling_params.detokenize
        (stop,) = sampling_params.stop_token_ids or []
        tokens = sampling_params.max_tokens or 0
        answer = await self.model.answer(ids, pixel_values, tokens, stop)
        end = self.model.fails or ("stop" if answer[-1] == stop else "length")
        parts = [answer]
        if sampling_params.output_kind is RequestOutputKind.DELTA:
            parts = [[token] for token in answer]
        for number, part in enumerate(parts, start=1):
            reason = end if number == len(parts) else None
            output = SimpleNamespace(token_ids=tuple(part), finish_reason=reason)
            yield SimpleNamespace(
                outputs=[output], prompt_logprobs=None, finished=reason is not None
            )
            await self.model.between()

    def shutdown(self, timeout: float | None = None) -> None:
        self.model.closed = True


# LMDeploy: lmdeploy/messages.py, lmdeploy/api.py, lmdeploy/pipeline.py, lmdeploy/serve/core/async_engine.py.


@dataclass
class PytorchEngineConfig:
    dtype: str = "auto"
    session_len: int | None = None
    cache_max_entry_count: float = 0.8
    enable_metrics: bool = True
    logprobs_mode: str | None = None


@dataclass
class GenerationConfig:
    max_new_tokens: int = 512
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    temperature: float = 0.8
    random_seed: int | None = None
    stop_token_ids: list[int] | None = None
    logprobs: int | None = None
    logprob_start_len: int = -1


@dataclass
class GenOut:
    response: str
    input_token_len: int
    generate_token_len: int
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: list[dict[int, float]] | None = None


@dataclass
class PreprocessedRequest:
    session: Any
    inputs: dict[str, Any]
    gen_config: GenerationConfig
    consumed: bool = False


class AsyncEngine:
    def __init__(self, model_path: str, config: PytorchEngineConfig) -> None:
        self.model = Model(model_path, config.dtype)
        self.model.arguments = config
        self._length = config.session_len or 0
        numbers = itertools.count()
        self.session_mgr = SimpleNamespace(get=lambda: next(numbers))

    async def preprocess(
        self,
        messages: Any,
        session_id: Any,
        gen_config: GenerationConfig | None = None,
        *,
        input_ids: list[int] | None = None,
    ) -> PreprocessedRequest:
        assert (messages is None) is not (input_ids is None)
        assert input_ids is not None
        assert len(input_ids) < self._length
        gen_config = copy.deepcopy(gen_config) or GenerationConfig()
        scoring = gen_config.logprob_start_len >= 0
        assert scoring == (gen_config.max_new_tokens == 0)
        assert not scoring or gen_config.logprobs is not None
        return PreprocessedRequest(session_id, {"input_ids": input_ids}, gen_config)

    async def generate(
        self, request: PreprocessedRequest, stream_response: bool = True
    ) -> AsyncGenerator[GenOut]:
        assert not request.consumed
        request.consumed = True
        config, ids = request.gen_config, request.inputs["input_ids"]
        image = self.model.loaded.processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        pictures = request.inputs.pop("multimodal", [])
        for picture in pictures:
            there = ids[picture["offset"] : picture["offset"] + picture["image_tokens"]]
            assert set(there) == {image} == {picture["image_token_id"]}
        pixel_values = torch.cat([p["pixel_values"] for p in pictures]) if pictures else None
        self.model.sampling.append(config)
        if config.logprob_start_len >= 0:
            row = self.model.log_probabilities(ids, pixel_values)[config.logprob_start_len :]
            after = ids[config.logprob_start_len + 1 :]
            rows = [{i: p, -1: 0.0} for i, p in zip(after, row, strict=True)]
            yield GenOut("", len(ids), 0, None, [])
            yield GenOut("", len(ids), 0, "length", [], rows)
            return
        (stop,) = config.stop_token_ids or []
        answer = await self.model.answer(ids, pixel_values, config.max_new_tokens, stop)
        stopped = answer[-1] == stop
        shown = answer[:-1] if stopped else answer
        for part in [[token] for token in shown] if stream_response else [shown]:
            yield GenOut("", len(ids), len(part), None, part)
            await self.model.between()
        end = self.model.fails or ("stop" if stopped else "length")
        yield GenOut("", len(ids), len(shown), end, [])


class Pipeline:
    def __init__(self, model_path: str, config: PytorchEngineConfig) -> None:
        if config.cache_max_entry_count < 0.1:
            raise RuntimeError("No enough gpu memory for kv cache.")
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        self.internal_thread = SimpleNamespace(loop=loop, thread=thread)
        self.async_engine = AsyncEngine(model_path, config)

    def close(self) -> None:
        self.internal_thread.loop.call_soon_threadsafe(self.internal_thread.loop.stop)
        self.internal_thread.thread.join()
        self.async_engine.model.closed = True


def pipeline(
    model_path: str,
    backend_config: PytorchEngineConfig | None = None,
    chat_template_config: Any = None,
    log_level: str = "WARNING",
) -> Pipeline:
    return Pipeline(model_path, backend_config or PytorchEngineConfig())


_MODULES: dict[str, list[Any]] = {
    "vllm": [],
    "vllm.inputs": [mm_input, tokens_input],
    "vllm.multimodal": [],
    "vllm.multimodal.inputs": [PlaceholderRange, MultiModalFieldConfig, MultiModalKwargsItems],
    "vllm.sampling_params": [SamplingParams, RequestOutputKind],
    "vllm.engine": [],
    "vllm.engine.arg_utils": [AsyncEngineArgs],
    "vllm.usage": [],
    "vllm.usage.usage_lib": [UsageContext],
    "vllm.config": [],
    "vllm.lora": [],
    "vllm.lora.request": [LoRARequest],
    "vllm.v1": [],
    "vllm.v1.engine": [],
    "vllm.v1.engine.async_llm": [AsyncLLM],
    "lmdeploy": [PytorchEngineConfig, GenerationConfig, pipeline],
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where the packages would be, on a machine that seems to have a GPU."""
    for name, members in _MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
    ranks = ModuleType("vllm.config.lora")
    ranks.MaxLoRARanks = MaxLoRARanks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ranks.__name__, ranks)
    monkeypatch.setattr("deadpan.engines.exported.best_device", lambda: "cuda")


def model_in(engine: Any) -> Model:
    """The model in a VllmEngine or an LmdeployEngine."""
    model: Model = (engine._llm if hasattr(engine, "_llm") else engine._engine).model
    return model
