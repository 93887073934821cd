"""Refusals in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

import json
from typing import Any

from fastapi.responses import Response

from deadpan.errors import DeadpanError
from deadpan.serve.tellers import AnswerTimeout, QueueFull, ShuttingDown, UnknownTeller


class WrongKey(DeadpanError):
    """The request has no API key, or a wrong one."""


class TooLarge(DeadpanError):
    """The request's body is larger than is read."""


class TooSlow(DeadpanError):
    """The request's body did not arrive in time."""


_STATUS: dict[type[DeadpanError], tuple[int, str | None]] = {
    WrongKey: (401, "invalid_api_key"),
    UnknownTeller: (404, "model_not_found"),
    TooSlow: (408, None),
    TooLarge: (413, None),
    QueueFull: (429, "queue_full"),
    ShuttingDown: (503, "shutting_down"),
    AnswerTimeout: (504, "timeout"),
}
"""Status and code; any other `DeadpanError` is the question's own mistake: 400."""

_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    413: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
}


def body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error object."""
    if status >= 500:
        kind = "server_error"
    else:
        kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> Response:
    """A refusal."""
    # A message may quote what was sent, lone surrogates too; in ASCII, all of Unicode is fit to be sent.
    content = json.dumps(body(status, message, param, code), ensure_ascii=True)
    return Response(content, status, _HEADERS.get(status), "application/json")


def describe(error: DeadpanError) -> tuple[int, dict[str, Any]]:
    """Status and error object for an error of ours."""
    known = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), (400, None))
    details = [f"{label}: {text}" for label, text in error.details() if label != "where"]
    message = " ".join([error.what, *([f"({'; '.join(details)})"] if details else [])])
    return known[0], body(known[0], message, error.where, known[1])


def refuse(error: DeadpanError) -> Response:
    """The refusal that an error of ours is."""
    status, content = describe(error)
    return response(status, **{k: content["error"][k] for k in ("message", "param", "code")})
