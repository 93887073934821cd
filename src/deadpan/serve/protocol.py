"""What OpenAI's chat completions say, as far as a teller can do it; the rest is refused, never ignored.

Source: OpenAI's API reference, "Create chat completion" and "The chat completion chunk object".
"""

import time
import uuid
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from deadpan.data.records import IMAGE_TAG, Turn
from deadpan.engines.base import GenerationSettings, Joke
from deadpan.errors import DeadpanError

MAX_NEW_TOKENS = 1024
"""The most tokens of an answer that may be asked for."""

MAX_ANSWERS = 8
"""The most answers to one question."""

MAX_PICTURES = 16
"""The most pictures of one request."""

MAX_CHARACTERS = 65_536
"""The most characters of a request's texts: more than fit into a prompt, few enough to be tokenized at once."""


def _no_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "text", "Input should be text; it has half a surrogate pair"
        ) from None
    return text


Text = Annotated[str, AfterValidator(_no_surrogates)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """A null is a parameter that was not set."""
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class ImageUrl(_Strict):
    url: Text = Field(
        description="A data URI (data:image/png;base64,...), or a web address if allowed."
    )
    detail: Literal["auto"] = "auto"


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[Text, Tag("~text")] | Annotated[list[Part], Field(min_length=1), Tag("~parts")],
    Discriminator(lambda value: "~text" if isinstance(value, str) else "~parts"),
]
"""A tilde marks a tag, which is no part of the place that an error names."""


class Message(_Strict):
    role: Literal["user", "assistant"] = Field(
        description="The system sentence belongs to the checkpoint and cannot be replaced."
    )
    content: Content


class StreamOptions(_Strict):
    include_usage: bool = False


Zero = Annotated[float, Field(ge=0, le=0, description="Not supported; 0 is taken.")]


class ChatRequest(_Strict):
    """A question, and how to answer it."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="0, the default here, always takes the likeliest token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0
    logprobs: Literal[False] = False
    user: Text | None = Field(None, description="Your own name for who asks; it is not read.")

    def settings(self) -> GenerationSettings:
        """How the answers are drawn.

        Raises:
            DeadpanError: If parameters contradict one another.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise DeadpanError(
                "max_tokens and max_completion_tokens are the same.",
                where="max_tokens",
                fix="give one of them",
            )
        if self.stream_options is not None and not self.stream:
            raise DeadpanError(
                "stream_options is for streams.", where="stream_options", fix="set stream to true"
            )
        if self.n > 1 and self.temperature == 0:
            raise DeadpanError(
                f"{self.n} answers were asked for, but without drawing they would all be the same.",
                where="n",
                fix="set a temperature, for example 0.8",
            )
        limit = self.max_tokens or self.max_completion_tokens
        return GenerationSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            **({} if limit is None else {"max_new_tokens": limit}),
        )

    def turns(self) -> tuple[list[Turn], list[tuple[str, str]]]:
        """The conversation, `<image>` where a picture goes, as an export's chat template writes it.

        Returns:
            The turns; and each picture's place in the request, with its address.

        Raises:
            DeadpanError: If the roles do not alternate, a text has `<image>` in it, or there is too much of anything.
        """
        turns: list[Turn] = []
        pictures: list[tuple[str, str]] = []
        for i, message in enumerate(self.messages):
            expected = "assistant" if i % 2 else "user"
            if message.role != expected:
                raise DeadpanError(
                    "User and assistant do not take turns.",
                    where=f"messages[{i}].role",
                    expected=f"{expected!r}: the user begins",
                    found=repr(message.role),
                )
            text, found = _written(message, f"messages[{i}].content")
            pictures += found
            turns.append(Turn("gpt" if i % 2 else "human", text))
        if turns[-1].role == "gpt":
            raise DeadpanError(
                "The last message is not a question.",
                where=f"messages[{len(turns) - 1}].role",
                expected="'user'",
            )
        _at_most(MAX_PICTURES, len(pictures), "pictures")
        _at_most(MAX_CHARACTERS, sum(len(turn.text) for turn in turns), "characters")
        return turns, pictures


def _written(message: Message, where: str) -> tuple[str, list[tuple[str, str]]]:
    user = message.role == "user"
    parts = message.content
    if isinstance(parts, str):
        parts = [TextPart(type="text", text=parts)]
    texts, pictures = [], []
    for i, part in enumerate(parts):
        place = where if isinstance(message.content, str) else f"{where}[{i}]"
        if isinstance(part, TextPart):
            if user and IMAGE_TAG in part.text:
                raise DeadpanError(
                    f"A question cannot contain {IMAGE_TAG}, which marks a picture's place.",
                    where=place,
                    fix="send the picture as an image_url part where it belongs",
                )
            texts.append(part.text)
        elif user:
            pictures.append((place, part.image_url.url))
            texts.append(f"{IMAGE_TAG}\n")
        else:
            raise DeadpanError("An answer cannot contain pictures.", where=place)
    return "".join(texts), pictures


def _at_most(limit: int, found: int, what: str) -> None:
    if found > limit:
        raise DeadpanError(
            f"The request has too many {what}.",
            where="messages",
            expected=f"at most {limit:,}",
            found=f"{found:,}",
        )


def mistake(error: RequestValidationError) -> tuple[str, str | None]:
    """Message and parameter of the first thing wrong with a request."""
    first = error.errors()[0]
    steps = first["loc"][1:]
    place = ""
    for i, step in enumerate(steps):
        if isinstance(step, int):
            place += f"[{step}]"
        elif not (step.startswith("~") or (i >= 2 and steps[i - 2] == "~parts")):
            place += f".{step}" if place else step
    if first["type"] == "extra_forbidden":
        return f"The parameter is not supported: {place}.", place
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first['ctx']['error']}.", None
    if place.endswith(".role"):
        return (
            "A role is 'user' or 'assistant'; the system sentence belongs to the checkpoint and cannot be replaced.",
            place,
        )
    message = first["msg"].removesuffix(".")
    return (f"{place}: {message}." if place else f"{message}."), place or None


class Completion:
    """Writes the answers to one request.

    Args:
        model: The teller's name.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }

    def whole(self, jokes: list[Joke]) -> dict[str, Any]:
        """The answers at once."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": joke.text},
                "logprobs": None,
                "finish_reason": joke.finish_reason,
            }
            for index, joke in enumerate(jokes)
        ]
        return self._object("chat.completion", choices, usage=usage(jokes))

    def chunk(
        self, index: int, delta: dict[str, str], finish_reason: str | None = None
    ) -> dict[str, Any]:
        """A piece of one answer."""
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, jokes: list[Joke]) -> dict[str, Any]:
        """The counts that end a stream."""
        return self._object("chat.completion.chunk", [], usage=usage(jokes))


def usage(jokes: list[Joke]) -> dict[str, int]:
    """Token counts; the prompt, common to all answers, is counted once."""
    prompt, generated = jokes[0].prompt_tokens, sum(joke.tokens for joke in jokes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
