"""Batches of the builtin engine, and their answers while they grow."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from deadpan.engines.base import GenerationSettings, Request
from deadpan.engines.features import Cut

_AHEAD = 4
"""Steps that a GPU is given at once while the host is busy with the next batch; as many may be in vain."""


@dataclass(eq=False)
class Prompt:
    """A conversation to be continued, by one answer or several.

    Attributes:
        request: The first request that has it.
        ids: Its tokens.
        cuts: Its pictures, while they are cut and seen.
    """

    request: Request
    ids: list[int]
    cuts: list[Future[Cut]] | None = None


@dataclass(eq=False)
class Batch:
    """What is answered at once.

    Attributes:
        prompts: What each answer continues.
        settings: How tokens are drawn.
        uniform: Random numbers for drawing, of shape (answer, step).
        coming: What the next batch of the same call continues.
        longest: The most tokens of a prompt and its answer, in the whole call.
        twice: Whether another such batch has room beside it.
    """

    prompts: Sequence[Prompt]
    settings: GenerationSettings
    uniform: torch.Tensor
    coming: Sequence[Prompt] = ()
    longest: int = 0
    twice: bool = False


class Answers:
    """A batch's answers while they grow.

    Args:
        batch: What is asked.
        first: Their first tokens.
        following: From their newest tokens and the number of a step, the next tokens.
        stop_id: The token that ends an answer.
        stream: Where steps run; None for the current stream.

    Attributes:
        batch: What is asked.
        ids: The answers' tokens so far.
    """

    def __init__(
        self,
        batch: Batch,
        first: torch.Tensor,
        following: Callable[[torch.Tensor, int], torch.Tensor],
        stop_id: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.batch = batch
        self.ids: list[list[int]] = [[] for _ in batch.prompts]
        # Held to the end, as another stream reads them.
        self._first = self._newest = first
        self._following, self._stop_id = following, stop_id
        self._stream = stream
        # Not waited for at once: steps of the batch before may still have to go first.
        self._read = None if stream is None else _recorded(first.device)
        self._behind = 1 if first.is_cuda else 0
        self._begun = 1
        self._coming = deque([_Coming(first)])
        self._going = set(range(len(batch.prompts)))

    @torch.inference_mode()
    def _give(self, ahead: int) -> None:
        """Give the device steps until so many have not arrived."""
        most = self.batch.settings.max_new_tokens
        while self._going and self._begun < most and len(self._coming) < ahead:
            if self._stream is not None and self._read is not None and self._begun == 1:
                self._stream.wait_event(self._read)
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._newest = self._following(self._newest, self._begun)
                self._coming.append(_Coming(self._newest))
            self._begun += 1

    def _arrived(self) -> list[int]:
        tokens = self._coming.popleft().ids()
        for answer, token in zip(self.ids, tokens, strict=True):
            answer.append(token)
        self._going -= {row for row in self._going if tokens[row] == self._stop_id}
        return tokens

    def go_on(self) -> None:
        """Grow, without waiting for the device."""
        while self._going and self._coming and self._coming[0].is_here():
            self._arrived()
        self._give(_AHEAD)

    def rest(self) -> Iterator[list[int]]:
        """Grow to the end; gives the tokens of each step."""
        while self._going:
            self._give(1 + self._behind)
            if not self._coming:
                return
            yield self._arrived()


def _recorded(device: torch.device) -> torch.cuda.Event:
    """An event that comes when what is on the current stream is done."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class _Coming:
    """Tokens on their way to the host."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tokens = tokens
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = _recorded(tokens.device)

    def is_here(self) -> bool:
        return self._event is None or self._event.query()

    def ids(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._tokens.tolist()
        return found
