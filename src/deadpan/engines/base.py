"""What every engine does: generate, stream, score.

An engine is built from a checkpoint and generation settings only; template, tile policy and stop token come with the
checkpoint, so that no engine can be served with another prompt than the one trained on.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image

from deadpan.data.records import Turn
from deadpan.errors import DeadpanError


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are drawn.

    Attributes:
        max_new_tokens: The most tokens of an answer.
        temperature: 0 always takes the likeliest token; higher values draw more freely.
        top_p: Draw only among the likeliest tokens that together have this probability.
        seed: Makes drawing repeatable; None draws anew each time.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
        ]
        for name, fine, expected in checks:
            if not fine:
                raise DeadpanError(
                    f"The setting {name} is out of range.",
                    expected=expected,
                    found=str(getattr(self, name)),
                )


@dataclass(frozen=True)
class Request:
    """One answer to be given.

    Attributes:
        images: The pictures, decoded.
        turns: The conversation, ending with a question.
        name: What to call it in messages.
        prepared: What an engine's `prepare` has begun for it.
    """

    images: Sequence[Image.Image]
    turns: Sequence[Turn]
    name: str = "the request"
    prepared: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Joke:
    """An answer.

    Attributes:
        text: The answer, stripped.
        prompt_tokens: Tokens of the prompt, image tokens included.
        tokens: Tokens generated, the stop token included.
        finish_reason: `stop` if the model ended the answer, `length` if the token limit did.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """A loaded model that answers.

    All but `prepare` is called from one thread at a time.

    Attributes:
        batch_size: How many questions it is worth asking at once.
    """

    batch_size: int

    def prepare(self, request: Request) -> Request:
        """The request, begun with as far as that does not keep the caller waiting; from any thread."""

    def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        """Answer requests, in their order."""

    def stream(self, request: Request, settings: GenerationSettings) -> Generator[str, None, Joke]:
        """Answer one request piece by piece; the pieces joined are the text of the joke returned at the end."""

    def score(self, request: Request, choices: Sequence[str]) -> list[float]:
        """For each choice, log p(choice and its stop token | the conversation), in nats, summed over tokens."""

    def close(self) -> None:
        """Release the model's memory."""
