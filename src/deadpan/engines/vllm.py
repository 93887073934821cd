"""vLLM as an engine: continuous batching, paged attention, pictures and prefixes kept.

Held against vLLM 0.24.0. Its frontend (`AsyncLLM`) takes prompts that have been processed already, `MultiModalInput`
of `vllm/inputs/engine.py`: token ids, what the model takes for each picture, and where it stands. So what its own
processor for InternVL would make (`vllm/model_executor/models/interns1.py`) is made here from deadpan's processor.
"""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncGenerator
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import torch
from transformers import BatchFeature

from deadpan.engines.base import GenerationSettings
from deadpan.engines.concurrent import ConcurrentEngine, Prompt, first_line, imported
from deadpan.engines.exported import Export
from deadpan.errors import DeadpanError
from deadpan.models import lora

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    # It would send what it runs on to its makers.
    "VLLM_NO_USAGE_STATS": "1",
    # A fork of a process with threads, as this one is, may hang.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""How vLLM is to behave, unless the user says otherwise."""
_MERGE = "merge it, and load that: deadpan export ADAPTER exported --layout hf"


class VllmEngine(ConcurrentEngine):
    """Answers with vLLM, which runs in a process of its own.

    A script that makes one needs `if __name__ == "__main__":`, as any that starts processes by spawning.

    Args:
        export: What to load.

    Raises:
        DeadpanError: If vLLM is not installed, or cannot start with the model.
    """

    def __init__(self, export: Export) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if find_spec("flashinfer") is None:
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        self._inputs = imported("vllm.inputs")
        self._pictures = imported("vllm.multimodal.inputs")
        self._sampling = imported("vllm.sampling_params")
        loop = asyncio.new_event_loop()
        super().__init__(export.processor, export.dtype, loop)
        self._names = itertools.count()
        self._adapter: Any = None
        self._thread = Thread(target=loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._wait(self._start(export))
        except DeadpanError:
            self._stop()
            raise
        except (RuntimeError, ValueError) as error:
            self._stop()
            raise DeadpanError(
                "vLLM cannot start with the model.",
                where=export.folder,
                found=first_line(error),
                fix="its own messages above say why; --engine builtin needs less memory",
            ) from None

    async def _start(self, export: Export) -> Any:
        # Ctrl-C reaches all processes of a terminal; vLLM's inherits from this thread that it does not hear it,
        # and goes on until it is released, when everything asked has been answered.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        arguments = imported("vllm.engine.arg_utils").AsyncEngineArgs(
            **({} if export.adapter is None else _room(export.adapter)),
            model=str(export.folder),
            dtype=str(export.dtype).removeprefix("torch."),
            max_model_len=export.length,
            gpu_memory_utilization=export.memory,
            # Memory is set aside for what the largest inputs of each kind need.
            limit_mm_per_prompt={"video": 0},
            # It keeps what its own processor makes, which is not asked.
            mm_processor_cache_gb=0,
            disable_log_stats=True,
            # After a SIGTERM of its own, as some send to all of a service's processes: seconds to finish in.
            shutdown_timeout=120,
        )
        llm = imported("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(
            arguments,
            # By it vLLM chooses how many tokens a step reads; otherwise a step would have room for one picture.
            usage_context=imported("vllm.usage.usage_lib").UsageContext.LLM_CLASS,
        )
        if export.adapter is not None:
            await self._put_on(llm, export.adapter)
        return llm

    async def _put_on(self, llm: Any, adapter: Path) -> None:
        """Load an adapter now, so that what is wrong with it comes to light at the start."""
        self._adapter = imported("vllm.lora.request").LoRARequest("adapter", 1, str(adapter))
        try:
            await llm.add_lora(self._adapter)
        except Exception as error:  # noqa: BLE001 - its process reports errors as nothing more special
            llm.shutdown()
            raise DeadpanError(
                "vLLM does not take the adapter.",
                where=adapter,
                found=first_line(error),
                fix=_MERGE,
            ) from None

    def _release(self) -> None:
        self._llm.shutdown()
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _tokens(
        self, prompt: Prompt, settings: GenerationSettings, in_pieces: bool
    ) -> AsyncGenerator[list[int]]:
        kinds = self._sampling.RequestOutputKind
        sampling = self._sampling.SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            # The template's stop token, and no other that the tokenizer may have.
            stop_token_ids=[self._processor.stop_id],
            ignore_eos=True,
            detokenize=False,
            output_kind=kinds.DELTA if in_pieces else kinds.FINAL_ONLY,
        )
        async for output in self._llm.generate(
            self._input(prompt, prompt.ids), sampling, self._name(), lora_request=self._adapter
        ):
            answer = output.outputs[0]
            yield list(answer.token_ids)
            if answer.finish_reason not in (None, "stop", "length"):
                raise DeadpanError("vLLM gave up the answer.", found=answer.finish_reason)

    async def _log_probability(self, prompt: Prompt, choice: list[int]) -> float:
        sampling = self._sampling.SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=0,  # of the prompt's own tokens, and no others
            detokenize=False,
            output_kind=self._sampling.RequestOutputKind.FINAL_ONLY,
        )
        inputs = self._input(prompt, prompt.ids + choice)
        async for output in self._llm.generate(
            inputs, sampling, self._name(), lora_request=self._adapter
        ):
            rows = output.prompt_logprobs[len(prompt.ids) :]
        return sum(row[token].logprob for row, token in zip(rows, choice, strict=True))

    def _name(self) -> str:
        return f"deadpan-{next(self._names)}"

    def _input(self, prompt: Prompt, ids: list[int]) -> Any:
        """A prompt as vLLM's own processor would hand it on."""
        if not prompt.pictures:
            return self._inputs.tokens_input(ids)
        field = self._pictures.MultiModalFieldConfig
        tiles = torch.tensor([len(picture.pixel_values) for picture in prompt.pictures])
        items = self._pictures.MultiModalKwargsItems.from_hf_inputs(
            BatchFeature(
                {
                    "pixel_values": torch.cat([p.pixel_values for p in prompt.pictures]),
                    "image_num_patches": tiles,
                    "image_token_id": torch.tensor(self._image_id),
                }
            ),
            {
                "pixel_values": field.flat_from_sizes("image", tiles),
                "image_num_patches": field.batched("image"),
                "image_token_id": field.shared("image", len(tiles)),
            },
        )
        places = [
            self._pictures.PlaceholderRange(offset=p.offset, length=p.length)
            for p in prompt.pictures
        ]
        return self._inputs.mm_input(
            ids,
            items,
            # Equal pictures share features, and their prompts a prefix.
            {"image": [picture.digest for picture in prompt.pictures]},
            {"image": places},
        )


def _room(adapter: Path) -> dict[str, Any]:
    """What vLLM is to set aside for an adapter, as arguments of its own.

    Raises:
        DeadpanError: If its rank is more than vLLM takes.
    """
    r: int = lora.read_config(adapter)["r"]
    ranks = get_args(imported("vllm.config.lora").MaxLoRARanks)
    if r > max(ranks):
        raise DeadpanError(
            "The adapter's rank is more than vllm takes.",
            where=adapter,
            expected=f"at most {max(ranks)}",
            found=str(r),
            fix=_MERGE,
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(x for x in ranks if x >= r)}
