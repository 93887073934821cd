"""What the page lets in, and what it lets a browser do.

gradio comes with more doors than this page uses: it reads files by their path and pictures by their address if a
request says so, forwards requests, records. Here only those that the page's own browser code knocks at are open.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OPEN = re.compile(
    r"(|theme\.css|login|logout|(assets|static)/.*"
    r"|gradio_api/(queue/(join|data)|upload|upload_progress|cancel|heartbeat/[^/]*|file=.*))"
)
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
"""gradio's own code needs inline styles and scripts, and evaluates templates."""
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class PageGuard:
    """ASGI middleware for what lies under the page's paths.

    Args:
        app: What is guarded.
        paths: Where the page is mounted, each with a slash at its end.
        max_body: The most bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, paths: Sequence[str], max_body: int) -> None:
        self._app, self._paths, self._max_body = app, paths, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        under = next((prefix for prefix in self._paths if path.startswith(prefix)), None)
        if under is None or scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        refusal = self._refusal(scope, path.removeprefix(under))
        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope, rest: str) -> PlainTextResponse | None:
        if not _OPEN.fullmatch(rest):
            return PlainTextResponse("not found", 404)
        if scope["method"] == "POST":
            # The server reads no more than was announced.
            announced = dict(scope["headers"]).get(b"content-length")
            if announced is None:
                return PlainTextResponse("length required", 411)
            if int(announced) > self._max_body:
                return PlainTextResponse("too large", 413)
        return None


class UploadsOnly(gr.Blocks):
    """Takes the files that were uploaded to it and no others, neither by a path nor by an address."""

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> Any:
        check_files(inputs)
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def check_files(value: Any) -> None:
    """Refuse a value of a request that holds a file which was not uploaded.

    Raises:
        gradio.Error: If it does.
    """
    if isinstance(value, list):
        for item in value:
            check_files(item)
    elif isinstance(value, dict):
        if "path" in value:
            uploads = Path(get_upload_folder()).resolve()
            path = value["path"]
            if not isinstance(path, str) or uploads not in Path(path).resolve().parents:
                raise gr.Error("This file was not uploaded.", print_exception=False)
        for item in value.values():
            check_files(item)
