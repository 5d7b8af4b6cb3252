"""What an error becomes in HTTP: a status and a body of OpenAI's shape that also says where the error came from.

The one place that knows statuses. The body never holds a path of this machine, a stack trace or a key.
"""

import json
import math
import re
from collections.abc import Mapping

import msgspec

from fleetmind.core.errors import (
    BodyTimeout,
    CallerError,
    CapacityError,
    Conflict,
    EngineError,
    EngineRefused,
    FleetmindError,
    Forbidden,
    InternalError,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    StoreError,
    Unauthenticated,
)

_STATUSES: Mapping[type[FleetmindError], int] = {
    BodyTimeout: 408,
    Conflict: 409,
    Forbidden: 403,
    NotFound: 404,
    PayloadTooLarge: 413,
    QueueFull: 429,
    Unauthenticated: 401,
    CallerError: 400,
    CapacityError: 503,
    EngineError: 502,
    StoreError: 503,
    FleetmindError: 500,
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ADDRESS = re.compile(r" (sqlite|postgresql)\S*:\S*")
"""Where the database is: for the log and whoever starts the server, not for clients."""
_encode = msgspec.json.Encoder().encode


class _EngineProblem(msgspec.Struct):
    message: str | None = None
    code: object = None
    type: str | None = None
    param: str | None = None


class _EngineReply(msgspec.Struct):
    error: _EngineProblem | str | None = None
    message: str | None = None


def status_of(error: FleetmindError) -> int:
    """The HTTP status of ``error``: an engine's own where it refused the call, else by the kind of error."""
    if isinstance(error, EngineRefused):
        return error.status if 400 <= error.status < 500 and error.status not in _OURS else 502
    for kind in type(error).__mro__:
        if kind in _STATUSES:
            return _STATUSES[kind]
    raise AssertionError(f"no status for {type(error).__name__}")


_OURS = frozenset({401, 403, 407})
"""Statuses by which an engine refuses the gateway, not the client: the client's key is fine."""


def body_of(error: FleetmindError) -> bytes:
    """The error as JSON: OpenAI's message, type, param and code; origin, hint, near names and when to retry."""
    status = status_of(error)
    message = _ADDRESS.sub("", error.message) if isinstance(error, InternalError) else error.message
    problem: dict[str, object] = {
        "message": _sentences(message, error.hint),
        "type": _TYPES.get(status, "server_error"),
        "param": error.param,
        "code": error.code,
        "origin": "engine" if isinstance(error, EngineError) else "gateway",
    }
    if error.hint:
        problem["hint"] = error.hint
    if isinstance(error, NotFound) and error.near:
        problem["near"] = error.near
    if isinstance(error, CapacityError):
        problem["retry_after_s"] = round(error.retry_after_s, 1)
    if isinstance(error, EngineRefused):
        _add_engine_words(problem, error)
    try:
        return _encode({"error": problem})
    except UnicodeEncodeError:  # half of a surrogate pair, quoted from what the client sent
        return json.dumps({"error": problem}).encode()


def _sentences(message: str, hint: str) -> str:
    """What is wrong and what to do, for a client that shows only one text."""
    if not hint:
        return message
    return f"{message}{'' if message.endswith(('.', '?', '!')) else '.'} {hint}"


def headers_of(error: FleetmindError) -> list[tuple[bytes, bytes]]:
    """The headers that go with ``error``."""
    headers = [(b"content-type", b"application/json")]
    if isinstance(error, CapacityError):
        headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def _add_engine_words(problem: dict[str, object], error: EngineRefused) -> None:
    """Say what the engine said, in its own words."""
    try:
        reply = msgspec.json.decode(error.body, type=_EngineReply)
    except msgspec.DecodeError:
        return
    said = reply.error if isinstance(reply.error, _EngineProblem) else _EngineProblem(reply.error or reply.message)
    if said.message:
        problem["message"] = said.message[:2000]
    if said.param:
        problem["param"] = said.param
    if said.type in _CONTEXT_EXCEEDED:
        problem["code"] = "context_length_exceeded"
        problem["param"] = problem["param"] or "messages"
        problem["hint"] = "Shorten the prompt, or add the model with a larger context."
    elif isinstance(said.code, str):
        problem["code"] = said.code


_CONTEXT_EXCEEDED = frozenset({"exceed_context_size_error", "context_length_exceeded"})
