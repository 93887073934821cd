"""What the engines that batch by themselves have in common: many are asked at once, none waits for another's batch.

vLLM and LMDeploy take a question at any time and put it into the batch that is running. So nothing is batched here:
each question is prepared in a thread and handed over, and all that are in the engine are answered together. The
prompt's token ids and the tiles' pixel values are made by deadpan's own processor, as in training, and handed over as
they are; the engine's own processor, which resizes pictures in another way, is not asked.
"""

import asyncio
import importlib
import queue
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from deadpan.engines.base import GenerationSettings, Joke, Request
from deadpan.environment import INSTALL
from deadpan.errors import DeadpanError
from deadpan.processing.processor import Processor
from deadpan.processing.template import IMAGE_TOKEN

_T = TypeVar("_T")


@dataclass(frozen=True)
class Picture:
    """A picture's place in a prompt, and what stands there.

    Attributes:
        offset: Its first image token.
        length: How many image tokens it has.
        pixel_values: Of shape (tile, 3, tile_size, tile_size), in the type that the engine computes in.
        digest: The same for equal pixel values only.
    """

    offset: int
    length: int
    pixel_values: torch.Tensor
    digest: str


@dataclass(frozen=True)
class Prompt:
    """A question as an engine takes it.

    Attributes:
        ids: Token ids, image tokens expanded.
        pictures: What the image tokens stand for, in order.
    """

    ids: list[int]
    pictures: list[Picture]


def check_installed(engine: str) -> None:
    """Raise a DeadpanError if an engine's package is not installed."""
    if find_spec(engine) is None:
        raise DeadpanError(
            f"The engine {engine} is not installed.",
            found=f"no package {engine}",
            fix=f"on Linux with an NVIDIA GPU: {INSTALL[engine]}; or use --engine builtin",
        )


def imported(module: str) -> Any:
    """A module of an engine's package.

    Raises:
        DeadpanError: If it cannot be imported.
    """
    engine = module.partition(".")[0]
    check_installed(engine)
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        # A compiled package raises the last two when its libraries are missing or do not match.
        raise DeadpanError(
            f"The engine {engine} is installed, but cannot be imported.",
            found=first_line(error),
            fix=f"install it in a new environment, where it decides PyTorch's version: {INSTALL[engine]}",
        ) from None


class ConcurrentEngine(ABC):
    """An engine that may be asked from any number of threads.

    Args:
        processor: Makes the prompts.
        dtype: What the engine computes in.
        loop: Where the engine runs, in a thread of its own.
    """

    batch_size = 64
    """How many questions it is worth asking at once."""

    def __init__(
        self, processor: Processor, dtype: torch.dtype, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._processor, self._dtype, self._loop = processor, dtype, loop
        self._image_id: int = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._preparing = ThreadPoolExecutor(thread_name_prefix="prompts")

    @abstractmethod
    def _tokens(
        self, prompt: Prompt, settings: GenerationSettings, in_pieces: bool
    ) -> AsyncGenerator[list[int]]:
        """The answer's token ids as they come, or all at the end; the stop token last if it was met."""

    @abstractmethod
    async def _log_probability(self, prompt: Prompt, choice: list[int]) -> float:
        """The log-probability of a choice after a prompt, in nats, summed over its tokens."""

    @abstractmethod
    def _release(self) -> None:
        """Stop the engine; its loop runs still."""

    def prepare(self, request: Request) -> Request:
        """The request as it is: requests overlap anyway."""
        return request

    def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        """Answer requests, in their order."""
        return self._wait(self._jokes(requests, settings))

    async def _jokes(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        # The same request n times is one picture to cut.
        unique = {id(request): request for request in requests}
        prompts = {key: self._prepared(request) for key, request in unique.items()}

        async def joke(place: int, request: Request) -> Joke:
            prompt = await asyncio.shield(prompts[id(request)])
            ids: list[int] = []
            async for more in self._tokens(prompt, _drawn_apart(settings, place), False):
                ids += more
            return self._joke(prompt, ids)

        return await _together(joke(place, request) for place, request in enumerate(requests))

    def stream(self, request: Request, settings: GenerationSettings) -> Generator[str, None, Joke]:
        """Answer one request piece by piece; the pieces joined are the text of the joke returned at the end."""
        prompt = self.prompt(request)
        told: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()

        async def ask() -> None:
            try:
                async for ids in self._tokens(prompt, settings, True):
                    told.put(ids)
            finally:
                told.put(None)  # or the reader would wait for ever

        asked = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        try:
            ids = yield from _pieces(self._processor, iter(told.get, None))
            asked.result()
            return self._joke(prompt, ids)
        finally:
            asked.cancel()  # the engine goes on to others if nobody reads

    def score(self, request: Request, choices: Sequence[str]) -> list[float]:
        """For each choice, log p(choice and its stop token | the conversation), in nats, summed over tokens."""
        ids = [self._processor.choice(text) for text in choices]

        async def scores() -> list[float]:
            prompt = await self._prepared(request)
            return await _together(self._log_probability(prompt, choice) for choice in ids)

        return self._wait(scores())

    def close(self) -> None:
        """Release the model's memory."""
        self._preparing.shutdown(cancel_futures=True)
        self._release()

    def prompt(self, request: Request) -> Prompt:
        """A request as the engine takes it."""
        sample = self._processor.sample(request.images, request.turns, request.name)
        spans = _spans(sample.input_ids, self._image_id)
        tiles = [length // self._processor.tile_policy.tokens_per_tile for _, length in spans]
        pictures = []
        if sample.pixel_values is not None:
            values = sample.pixel_values.to(self._dtype).split(tiles)
            pictures = [
                Picture(*span, value, sha256(value.view(torch.uint8).numpy()).hexdigest())
                for span, value in zip(spans, values, strict=True)
            ]
        return Prompt(sample.input_ids, pictures)

    def _prepared(self, request: Request) -> asyncio.Future[Prompt]:
        return self._loop.run_in_executor(self._preparing, self.prompt, request)

    def _joke(self, prompt: Prompt, ids: list[int]) -> Joke:
        stopped = self._processor.stop_id in ids
        text = self._processor.decode(ids)
        return Joke(text, len(prompt.ids), len(ids), "stop" if stopped else "length")

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        asked = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return asked.result()
        finally:
            asked.cancel()


def _drawn_apart(settings: GenerationSettings, place: int) -> GenerationSettings:
    """Several answers to one question are not to be the same, whatever the seed."""
    if settings.seed is None:
        return settings
    return replace(settings, seed=(settings.seed + place) % 2**63)


async def _together(work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results of all; the first mistake ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _pieces(processor: Processor, parts: Iterable[list[int]]) -> Generator[str, None, list[int]]:
    """The text that token ids make as they come; returns all of them."""
    ids: list[int] = []
    told = ""
    for part in parts:
        ids += part
        # A character's first bytes decode to a replacement character; the rest of it is on its way.
        text = processor.decode(ids).rstrip("\ufffd")
        if len(text) > len(told) and text.startswith(told):
            yield text[len(told) :]
            told = text
    rest = processor.decode(ids)[len(told) :]
    if rest:
        yield rest
    return ids


def _spans(ids: Sequence[int], image_id: int) -> list[tuple[int, int]]:
    """Offset and length of each run of image tokens; between two pictures stand other tokens."""
    spans = []
    start: int | None = None
    for place, token in enumerate([*ids, -1]):
        if token == image_id and start is None:
            start = place
        elif token != image_id and start is not None:
            spans.append((start, place - start))
            start = None
    return spans


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
