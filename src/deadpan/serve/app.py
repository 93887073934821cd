"""The HTTP app: tellers behind OpenAI's API."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from deadpan.engines import base
from deadpan.engines.base import Joke
from deadpan.errors import DeadpanError
from deadpan.serve.budget import Budget
from deadpan.serve.guard import CLIENT_LEFT, Guard
from deadpan.serve.metrics import Metrics
from deadpan.serve.pictures import MAX_BYTES, MAX_PIXELS, Pictures
from deadpan.serve.protocol import ChatRequest, Completion, mistake
from deadpan.serve.refusals import describe, refuse, response
from deadpan.serve.remote import Remote
from deadpan.serve.tellers import Tellers

_T = TypeVar("_T")

_BODIES_HELD = 8
"""How many bodies of the largest size may be held at once."""


def create_app(
    tellers: Tellers,
    *,
    api_key: str | None = None,
    remote: Remote | None = None,
    max_picture_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    body_timeout: float = 60.0,
) -> FastAPI:
    """Make the app; when it is shut down, it closes the tellers.

    Args:
        tellers: Who answers.
        api_key: What requests to `/v1/` and `/metrics` must carry as bearer token; None for none.
        remote: Fetches pictures from the web; None if that is not allowed.
        max_picture_bytes: The most bytes of a picture file.
        max_pixels: The most pixels of a picture.
        body_timeout: Seconds that a request's body may take to arrive.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await tellers.close()

    # No pages for documentation: they would load scripts from the web.
    app = FastAPI(
        title="deadpan",
        version=version("deadpan"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"description": "A refusal, in OpenAI's form."}},
    )
    metrics = Metrics(tellers)
    max_body = 2 * max_picture_bytes  # base64 takes four thirds
    app.add_middleware(
        Guard,
        metrics=metrics,
        api_key=api_key,
        max_body=max_body,
        bodies=Budget(_BODIES_HELD * max_body, "bytes of requests"),
        timeout=body_timeout,
    )
    _add_refusals(app)
    _add_status(app, tellers, metrics)
    chat = _Chat(tellers, Pictures(remote, max_picture_bytes, max_pixels), metrics)
    app.post("/v1/chat/completions", response_model=None)(chat.answer)
    return app


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(DeadpanError)
    async def ours(_: Request, error: DeadpanError) -> Response:
        return refuse(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return response(400, *mistake(error))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return response(error.status_code, f"{error.detail}.")

    # The server logs the traceback; the client is told only that there is one.
    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        return response(500, "The server made a mistake; its log says more.")


def _add_status(app: FastAPI, tellers: Tellers, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "deadpan"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in tellers.names()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        tellers.check(name)
        return model(name)


class _Chat:
    """The route that answers."""

    def __init__(self, tellers: Tellers, pictures: Pictures, metrics: Metrics) -> None:
        self._tellers, self._pictures, self._metrics = tellers, pictures, metrics

    async def answer(self, question: ChatRequest, http: Request) -> Response:
        """Answer a conversation about pictures."""
        self._tellers.check(question.model)
        settings = question.settings()
        turns, places = question.turns()

        async def jokes() -> list[Joke]:
            request = base.Request(await self._pictures.read(places), turns)
            found = await self._tellers.ask(question.model, [request] * question.n, settings)
            self._metrics.answered(question.model, found)
            return found

        async def pieces() -> AsyncGenerator[str | Joke]:
            request = base.Request(await self._pictures.read(places), turns)
            answer = self._tellers.pieces(question.model, request, settings)
            async with contextlib.aclosing(answer):
                async for piece in answer:
                    if isinstance(piece, Joke):
                        self._metrics.answered(question.model, [piece])
                    yield piece

        completion = Completion(question.model)
        options = question.stream_options
        counted = options is not None and options.include_usage
        try:
            if not question.stream:
                return JSONResponse(completion.whole(await _unless_left(http, jokes)))
            if question.n > 1:
                # Several answers are one batch, and each comes when all are there.
                events = _of_jokes(completion, await _unless_left(http, jokes), counted)
            else:
                answer = pieces()
                # What is refused is refused with a status, so the stream begins when its first piece is there.
                first = await _unless_left(http, lambda: anext(answer))
                events = _of_pieces(completion, first, answer, counted)
        except _Left:
            return Response(status_code=CLIENT_LEFT)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )


class _Left(Exception):
    """The client has gone away."""


async def _unless_left(http: Request, work: Callable[[], Awaitable[_T]]) -> _T:
    """Do the work, or stop it when the client goes away.

    Raises:
        _Left: If it went.
    """

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work())
    watching = asyncio.create_task(left())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        raise _Left
    finally:
        working.cancel()
        watching.cancel()


async def _of_jokes(completion: Completion, jokes: list[Joke], counted: bool) -> AsyncIterator[str]:
    for index, joke in enumerate(jokes):
        yield _event(completion.chunk(index, {"role": "assistant", "content": joke.text}))
        yield _event(completion.chunk(index, {}, joke.finish_reason))
    if counted:
        yield _event(completion.usage_chunk(jokes))
    yield _END


async def _of_pieces(
    completion: Completion,
    first: str | Joke,
    rest: AsyncGenerator[str | Joke],
    counted: bool,
) -> AsyncIterator[str]:
    async with contextlib.aclosing(rest):
        yield _event(completion.chunk(0, {"role": "assistant", "content": ""}))
        try:
            piece = first
            while isinstance(piece, str):
                yield _event(completion.chunk(0, {"content": piece}))
                piece = await anext(rest)
        except DeadpanError as error:
            yield _event(describe(error)[1])
            return
        yield _event(completion.chunk(0, {}, piece.finish_reason))
        if counted:
            yield _event(completion.usage_chunk([piece]))
        yield _END


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


_END = "data: [DONE]\n\n"
