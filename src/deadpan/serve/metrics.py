"""What `/metrics` tells Prometheus."""

import time
from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deadpan.engines.base import Joke
from deadpan.serve.tellers import Tellers

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one app; labels take only values that the server itself chose.

    Args:
        tellers: Whose queues are measured.
    """

    def __init__(self, tellers: Tellers) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "deadpan_requests",
            "Requests by status; 499: its client left.",
            ["status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "deadpan_request_seconds",
            "Seconds from a request's first byte to its answer's last.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._answers = Counter(
            "deadpan_answers", "Answers given.", ["model", "finish_reason"], registry=self._registry
        )
        self._prompt_tokens = Counter(
            "deadpan_prompt_tokens", "Tokens of prompts.", ["model"], registry=self._registry
        )
        self._tokens = Counter(
            "deadpan_generated_tokens", "Tokens generated.", ["model"], registry=self._registry
        )
        self._running = Gauge(
            "deadpan_requests_in_progress", "Requests being answered.", registry=self._registry
        )
        waiting = Gauge(
            "deadpan_questions_waiting", "Questions in a queue.", ["model"], registry=self._registry
        )
        for name in tellers.names():
            waiting.labels(name).set_function(partial(tellers.waiting, name))

    def begin(self) -> float:
        """Count a request in."""
        self._running.inc()
        return time.perf_counter()

    def end(self, begun: float, status: int) -> None:
        """Count it out."""
        self._running.dec()
        self._requests.labels(str(status)).inc()
        self._seconds.observe(time.perf_counter() - begun)

    def answered(self, model: str, jokes: Sequence[Joke]) -> None:
        """Count answers to one prompt."""
        self._prompt_tokens.labels(model).inc(jokes[0].prompt_tokens)
        self._tokens.labels(model).inc(sum(joke.tokens for joke in jokes))
        for joke in jokes:
            self._answers.labels(model, joke.finish_reason).inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
