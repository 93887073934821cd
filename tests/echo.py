"""An engine without a model, whose answers say what it was asked."""

import threading
from collections.abc import Generator, Sequence
from dataclasses import replace

from deadpan.engines.base import GenerationSettings, Joke, Request
from deadpan.errors import DeadpanError


class Echo:
    """Says the question back, once it is let; a question `bad` is a mistake."""

    batch_size = 8

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.requests: list[Request] = []
        self.settings: list[GenerationSettings] = []
        self.threads: set[int] = set()
        self.let, self.begun = threading.Event(), threading.Event()
        self.closed = False
        self.prepared = 0

    def prepare(self, request: Request) -> Request:
        self.prepared += 1
        return replace(request, prepared=self.prepared)

    def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        texts = [f"{request.turns[0].text}/{len(request.images)}" for request in requests]
        self.batches.append([request.turns[0].text for request in requests])
        self.requests += requests
        self.settings.append(settings)
        self.threads.add(threading.get_ident())
        self.begun.set()
        assert self.let.wait(30)
        if any(text.startswith("bad") for text in texts):
            raise DeadpanError("bad question")
        return [Joke(text, 1, 1, "stop") for text in texts]

    def stream(self, request: Request, settings: GenerationSettings) -> Generator[str, None, Joke]:
        text = request.turns[0].text
        for letter in text:
            self.batches.append([letter])
            self.begun.set()
            yield letter
            assert self.let.wait(30)
        return Joke(text, 1, len(text), "stop")

    def score(self, request: Request, choices: Sequence[str]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True
