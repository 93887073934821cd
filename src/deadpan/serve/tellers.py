"""Several engines that many people ask at once.

The builtin engine computes in one thread of its own, so the event loop never waits for it and it never meets two
threads. Questions wait in a queue of limited length; those that wait together and are to be answered in the same way
go to the engine as one batch. An engine that batches by itself is asked from as many threads as it is to answer
questions at once, each for itself. A question whose asker has gone before its turn is dropped.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from deadpan.data.records import Turn
from deadpan.engines.base import Engine, GenerationSettings, Joke, Request
from deadpan.engines.concurrent import ConcurrentEngine
from deadpan.errors import DeadpanError, did_you_mean

_END = None


class UnknownTeller(DeadpanError):
    """A name that no teller has."""


class QueueFull(DeadpanError):
    """Too many questions wait already; the same one may be asked again later."""


class AnswerTimeout(DeadpanError):
    """The answer was not there in time."""


class ShuttingDown(DeadpanError):
    """The tellers finish what has been asked, and take nothing new."""


@dataclass
class _Job:
    """What one asker wants: an answer to each request or, with `emit`, one answer in pieces."""

    requests: Sequence[Request]
    settings: GenerationSettings
    emit: Callable[[str], None] | None = None
    done: Future[list[Joke]] = field(default_factory=Future)
    gone: threading.Event = field(default_factory=threading.Event)

    def joins(self, other: "_Job") -> bool:
        """Whether both may be one batch: a drawn answer with a seed must not depend on its neighbours."""
        drawn = self.settings.temperature > 0 and self.settings.seed is not None
        plain = self.emit is None and other.emit is None
        return plain and not drawn and self.settings == other.settings


class _Worker:
    """An engine's threads and their queue."""

    def __init__(self, name: str, engine: Engine, queue_limit: int, batch_size: int) -> None:
        self._name, self._engine = name, engine
        concurrent = isinstance(engine, ConcurrentEngine)
        self._queue_limit, self._batch_size = queue_limit, 1 if concurrent else batch_size
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"teller {name}", daemon=True)
            for _ in range(batch_size if concurrent else 1)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, job: _Job) -> None:
        """Queue a job, and let the engine begin with it: equal requests of it stay one."""
        with self._changed:
            if self._closing:
                raise ShuttingDown("The server is shutting down.", fix="ask again later")
            waiting = self._count()
            if waiting + len(job.requests) > self._queue_limit:
                raise QueueFull(
                    f"Too many questions wait for {self._name!r}.",
                    expected=f"at most {self._queue_limit}",
                    found=f"{waiting} waiting, {len(job.requests)} more",
                    fix="ask again later",
                )
            different = {id(request): request for request in job.requests}
            begun = {key: self._engine.prepare(request) for key, request in different.items()}
            job.requests = [begun[id(request)] for request in job.requests]
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Answer what waits, then release the engine."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._engine.close()

    def waiting(self) -> int:
        """Questions whose turn has not come."""
        with self._changed:
            return self._count()

    def _count(self) -> int:
        return sum(len(job.requests) for job in self._waiting if not job.gone.is_set())

    def _work(self) -> None:
        # A frame of its own for each batch: while the next is waited for, no picture of the last is held.
        while self._answered():
            pass

    def _answered(self) -> bool:
        """Answer a batch; false once all is done and the tellers close."""
        waited = self._next()
        jobs = [job for job in waited if job.done.set_running_or_notify_cancel()]
        if jobs:
            self._run(jobs)
        return bool(waited)

    def _next(self) -> list[_Job]:
        """The jobs of the next batch, oldest first; none once all is done and the tellers close."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return []
            jobs = [self._waiting.popleft()]
            room = self._batch_size - len(jobs[0].requests)
            for job in list(self._waiting):
                if job.joins(jobs[0]) and len(job.requests) <= room:
                    self._waiting.remove(job)
                    jobs.append(job)
                    room -= len(job.requests)
            return jobs

    def _run(self, jobs: list[_Job]) -> None:
        try:
            answers = self._stream(jobs[0]) if jobs[0].emit else self._generate(jobs)
        except Exception as error:  # noqa: BLE001 - it is the asker's to see, and the thread must live on
            if len(jobs) == 1:
                jobs[0].done.set_exception(error)
            else:
                # One question's mistake is not to cost its neighbours their answers.
                for job in jobs:
                    self._run([job])
            return
        for job in jobs:
            job.done.set_result(answers[: len(job.requests)])
            answers = answers[len(job.requests) :]

    def _generate(self, jobs: list[_Job]) -> list[Joke]:
        requests = [request for job in jobs for request in job.requests]
        return self._engine.generate(requests, jobs[0].settings)

    def _stream(self, job: _Job) -> list[Joke]:
        assert job.emit is not None
        pieces = self._engine.stream(job.requests[0], job.settings)
        with contextlib.closing(pieces):
            while not job.gone.is_set():
                try:
                    job.emit(next(pieces))
                except StopIteration as end:
                    return [end.value]
        return []


class Tellers:
    """Engines by name, to be asked from an event loop.

    Args:
        engines: An engine for each name; they are closed by `close`.
        queue_limit: The most questions that may wait for one engine.
        batch_size: The most questions that one engine answers at once.
        timeout: Seconds from a question to the end of its answer, waiting included.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        queue_limit: int = 64,
        batch_size: int = 8,
        timeout: float = 120.0,
    ) -> None:
        self._workers = {
            name: _Worker(name, engine, queue_limit, batch_size) for name, engine in engines.items()
        }
        self._timeout = timeout

    def names(self) -> list[str]:
        """The tellers that can be asked."""
        return list(self._workers)

    def check(self, name: str) -> None:
        """Raise `UnknownTeller` if no teller has the name."""
        self._worker(name)

    def waiting(self, name: str) -> int:
        """The questions that wait for one of them."""
        return self._worker(name).waiting()

    async def tell(
        self, name: str, images: Sequence[Image.Image], prompt: str, settings: GenerationSettings
    ) -> list[str]:
        """A joke about each picture by itself, as `Teller.tell`; without pictures, one answer to the prompt.

        Raises:
            UnknownTeller: If no teller has the name.
            QueueFull: If too many questions wait.
            AnswerTimeout: If the answer is not there in time.
            ShuttingDown: If nothing new is taken.
            DeadpanError: If the question itself is wrong.
        """
        requests = [_request([image], prompt) for image in images] or [_request([], prompt)]
        return [joke.text for joke in await self.ask(name, requests, settings)]

    async def ask(
        self, name: str, requests: Sequence[Request], settings: GenerationSettings
    ) -> list[Joke]:
        """Answer requests, in their order, with token counts; raises as `tell`."""
        job = _Job(requests, settings)
        self._worker(name).put(job)
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.wrap_future(job.done)
        except TimeoutError:
            raise self._late() from None
        finally:
            job.gone.set()

    async def stream(
        self, name: str, images: Sequence[Image.Image], prompt: str, settings: GenerationSettings
    ) -> AsyncIterator[str]:
        """One answer about all the pictures, piece by piece; raises as `tell`, when first read."""
        answer = self.pieces(name, _request(images, prompt), settings)
        async with contextlib.aclosing(answer):
            async for piece in answer:
                if isinstance(piece, str):
                    yield piece

    async def pieces(
        self, name: str, request: Request, settings: GenerationSettings
    ) -> AsyncGenerator[str | Joke]:
        """One answer piece by piece, then the joke that they make; raises as `tell`, when first read."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def emit(piece: str | None) -> None:
            # The loop is closed only when nobody is left to read.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = _Job([request], settings, emit)
        job.done.add_done_callback(lambda _: emit(_END))
        self._worker(name).put(job)
        deadline = loop.time() + self._timeout
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        piece = await pieces.get()
                except TimeoutError:
                    raise self._late() from None
                if piece is _END:
                    break
                yield piece
            yield job.done.result()[0]
        finally:
            job.gone.set()
            job.done.cancel()

    async def close(self) -> None:
        """Take nothing new, answer what has been asked, and release the engines."""
        await asyncio.gather(*(asyncio.to_thread(w.close) for w in self._workers.values()))

    def _worker(self, name: str) -> _Worker:
        if name not in self._workers:
            raise UnknownTeller(
                f"There is no teller {name!r}.", fix=did_you_mean(name, self._workers)
            )
        return self._workers[name]

    def _late(self) -> AnswerTimeout:
        return AnswerTimeout(
            "The answer took too long.", expected=f"at most {self._timeout:g} seconds"
        )


def _request(images: Sequence[Image.Image], prompt: str) -> Request:
    return Request(images, [Turn("human", prompt)])
