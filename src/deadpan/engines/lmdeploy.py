"""LMDeploy's PyTorch engine as an engine.

Held against LMDeploy 0.18.0. Its `AsyncEngine.preprocess` takes token ids, and the request that it returns takes
pictures as its own processor for InternVL writes them (`to_pytorch_aux` of `lmdeploy/vl/model/base.py`): pixel values,
the place of the first image token and their number. So prompts and pixels are deadpan's own. Of LMDeploy's two engines
the PyTorch one computes what the Hugging Face layout says; the other, TurboMind, needs CUDA 12.
"""

from collections.abc import AsyncGenerator
from typing import Any

from deadpan.engines.base import GenerationSettings
from deadpan.engines.concurrent import ConcurrentEngine, Prompt, first_line, imported
from deadpan.engines.exported import Export
from deadpan.errors import DeadpanError


class LmdeployEngine(ConcurrentEngine):
    """Answers with LMDeploy, in this process.

    Args:
        export: What to load.

    Raises:
        DeadpanError: If LMDeploy is not installed, or cannot start with the model.
    """

    def __init__(self, export: Export) -> None:
        self._lmdeploy = imported("lmdeploy")
        config = self._lmdeploy.PytorchEngineConfig(
            dtype=str(export.dtype).removeprefix("torch."),
            session_len=export.length,
            # Of what the weights leave free.
            cache_max_entry_count=0.9 * export.memory,
            enable_metrics=False,
            logprobs_mode="raw_logprobs",
        )
        try:
            self._pipeline = self._lmdeploy.pipeline(
                str(export.folder), backend_config=config, log_level="ERROR"
            )
        except (RuntimeError, ValueError, AssertionError) as error:
            raise DeadpanError(
                "LMDeploy cannot start with the model.",
                where=export.folder,
                found=first_line(error),
                fix="its own messages above say why; --engine builtin loads every model",
            ) from None
        self._engine = self._pipeline.async_engine
        super().__init__(export.processor, export.dtype, self._pipeline.internal_thread.loop)

    def _release(self) -> None:
        self._pipeline.close()

    async def _tokens(
        self, prompt: Prompt, settings: GenerationSettings, in_pieces: bool
    ) -> AsyncGenerator[list[int]]:
        stop = self._processor.stop_id
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": 0,
                "random_seed": settings.seed,
            }
        config = self._lmdeploy.GenerationConfig(
            max_new_tokens=settings.max_new_tokens, stop_token_ids=[stop], **sampling
        )
        async for output in self._asked(prompt, prompt.ids, config, in_pieces):
            yield list(output.token_ids or [])
            if output.finish_reason == "stop":
                yield [stop]  # which LMDeploy keeps to itself
            elif output.finish_reason not in (None, "length"):
                raise DeadpanError("LMDeploy gave up the answer.", found=output.finish_reason)

    async def _log_probability(self, prompt: Prompt, choice: list[int]) -> float:
        config = self._lmdeploy.GenerationConfig(
            max_new_tokens=0, logprobs=1, logprob_start_len=len(prompt.ids) - 1
        )
        rows: list[dict[int, float]] = []
        async for output in self._asked(prompt, prompt.ids + choice, config, False):
            rows = output.logprobs or rows
        return sum(row[token] for row, token in zip(rows, choice, strict=True))

    async def _asked(
        self, prompt: Prompt, ids: list[int], config: Any, in_pieces: bool
    ) -> AsyncGenerator[Any]:
        session = self._engine.session_mgr.get()
        request = await self._engine.preprocess(
            None, session, gen_config=config, input_ids=list(ids)
        )
        if prompt.pictures:
            request.inputs["multimodal"] = [
                {
                    "pixel_values": picture.pixel_values,
                    "image_tokens": picture.length,
                    "image_token_id": self._image_id,
                    "offset": picture.offset,
                }
                for picture in prompt.pictures
            ]
        async for output in self._engine.generate(request, stream_response=in_pieces):
            yield output
