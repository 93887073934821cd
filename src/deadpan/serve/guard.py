"""What stands before the API's routes: the key, the limits of a request's body, the count of requests.

A body is read here, whole, before any route sees it. Of a request that is refused nothing is kept.
"""

import asyncio
import contextlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deadpan.errors import DeadpanError
from deadpan.serve.budget import Budget
from deadpan.serve.metrics import Metrics
from deadpan.serve.refusals import TooLarge, TooSlow, WrongKey, refuse

CLIENT_LEFT = 499
"""The status that metrics count, after nginx, where nobody was there to be answered."""

_LINGER = 5.0
"""Seconds for which a refused body is read on before the refusal is sent."""


class _Left(Exception):
    """The client went away while it was sending."""


class Guard:
    """ASGI middleware for the paths under `/v1/`, and for `/metrics` as far as the key goes.

    Args:
        app: What is guarded.
        metrics: Where requests are counted.
        api_key: What requests must carry as bearer token; None for none.
        max_body: The most bytes of a body.
        bodies: The bytes of bodies that may be held at once.
        timeout: Seconds that a body may take to arrive.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        api_key: str | None,
        max_body: int,
        bodies: Budget,
        timeout: float,
    ) -> None:
        self._app, self._metrics = app, metrics
        self._api_key = None if api_key is None else api_key.encode()
        self._max_body, self._bodies, self._timeout = max_body, bodies, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"].startswith("/v1/"):
            await self._counted(scope, receive, send)
        elif scope["path"] == "/metrics" and not self._has_key(scope):
            await refuse(_wrong_key())(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        begun = self._metrics.begin()
        try:
            await self._guarded(scope, receive, watched)
        finally:
            self._metrics.end(begun, status)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        arriving = _Arriving(scope, receive)
        try:
            refusal = await self._refusal(scope, arriving, body)
            if refusal is None:
                await self._app(scope, _replayed(bytes(body), receive), send)
            else:
                if not isinstance(refusal, TooSlow):
                    await arriving.pass_by()
                await refuse(refusal)(scope, receive, send)
        except _Left:
            pass
        finally:
            self._bodies.give(len(body))

    async def _refusal(
        self, scope: Scope, receive: Receive, body: bytearray
    ) -> DeadpanError | None:
        """Read the body, or say why not."""
        if not self._has_key(scope):
            return _wrong_key()
        try:
            async with asyncio.timeout(self._timeout):
                await self._read(scope, receive, body)
        except TimeoutError:
            return TooSlow(
                "The request's body did not arrive in time.",
                expected=f"within {self._timeout:g} seconds",
            )
        except DeadpanError as error:
            return error
        return None

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if int(declared) > self._max_body:
            raise self._too_large()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Left
            chunk, more = message.get("body", b""), message.get("more_body", False)
            if len(body) + len(chunk) > self._max_body:
                raise self._too_large()
            self._bodies.take(len(chunk))
            body += chunk

    def _too_large(self) -> TooLarge:
        return TooLarge(
            "The request's body is too large.",
            expected=f"at most {self._max_body:,} bytes",
            fix="scale the pictures down",
        )

    def _has_key(self, scope: Scope) -> bool:
        if self._api_key is None:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._api_key)


class _Arriving:
    """A request's messages as they come, and whether its body has all come."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._ended = False
        # Who asks before sending has sent nothing until something is read.
        self._waits = b"expect" in dict(scope["headers"])

    async def __call__(self) -> Message:
        message = await self._receive()
        self._ended = not message.get("more_body", False)
        self._waits = False
        return message

    async def pass_by(self) -> None:
        """Read on for a while, keeping nothing.

        A connection that is closed while its client sends is reset, and the answer may be lost with it.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while not self._ended and not self._waits:
                    await self()


def _wrong_key() -> WrongKey:
    return WrongKey(
        "The API key is missing or wrong.",
        fix="send the header `Authorization: Bearer KEY`",
    )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever comes after it (that the client leaves)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
