"""The outermost layer: what every request must pass before anything else looks at it.

In order: the Host and Origin headers, the key, then the route's own access. Nothing below it is reached by a page of
another site, with a forged Host, or without a right that the route declares. Errors of every kind leave here as JSON.
"""

import contextlib
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleetmind.api.auth import KeyRing, Principal, bearer_of, check_scope
from fleetmind.api.auth import Scope as Right
from fleetmind.api.problems import body_of, headers_of, status_of
from fleetmind.api.routes import PRINCIPAL, DirectRoute
from fleetmind.core.errors import (
    BodyTimeout,
    CallerError,
    FleetmindError,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
)
from fleetmind.core.telemetry import Metrics, log

_log = log(__name__)


class Gate:
    """The outermost ASGI application. ``direct`` routes are found without walking the route table."""

    def __init__(
        self,
        inner: ASGIApp,
        direct: Collection[DirectRoute],
        *,
        keys: KeyRing,
        metrics: Metrics,
        hosts: Collection[str],
        origins: Collection[str],
    ) -> None:
        """``hosts`` are the names, without port, by which clients may call this server; ``origins`` the pages, as
        ``scheme://host:port``, that may besides those served by itself."""
        self._inner = inner
        self._direct: Mapping[tuple[str, str], DirectRoute] = {(route.method, route.path): route for route in direct}
        self._keys = keys
        self._metrics = metrics
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            origin = self._check_page(scope)
            if origin is not None and origin.decode("latin-1").lower() in self._origins:
                if scope["method"] == "OPTIONS":
                    await _answer_preflight(send, origin)
                    return
                send = _shared_with(send, origin)
            scope[PRINCIPAL] = self._principal(scope)
            route = self._direct.get((scope["method"], scope["path"]))
            if route is not None:
                route.access.check(scope[PRINCIPAL])
                await route.app(scope, receive, send)
            else:
                await self._inner(scope, receive, send)
        except FleetmindError as error:
            # Whatever is raised up to here is raised before an answer has begun.
            self._metrics.http_refused_total.labels(error.code).inc()
            await refuse(send, error)
        except Exception:  # noqa: BLE001 - the outermost handler
            _log.exception("a request failed", method=scope["method"], path=scope["path"])
            with contextlib.suppress(RuntimeError):  # uvicorn's word that the answer has begun, and ends here
                await refuse(send, InternalError("Something went wrong here.", hint="`fleetmind logs` shows what."))

    def _check_page(self, scope: Scope) -> bytes | None:
        """Refuse a forged Host and a page of another site, on every method. Returns the page's origin, if said."""
        host: bytes | None = None
        origin: bytes | None = None
        for name, value in scope["headers"]:
            if name == b"host":
                if host is not None:
                    raise Forbidden("More than one Host header.")
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site" and value == b"cross-site" and origin is None:
                origin = b"null"
        if host is None or _name_of(host) not in self._hosts:
            raise Forbidden(
                f"This server is not called {(host or b'').decode('latin-1')[:100]!r}.",
                hint="Add the name to server.hosts_allowed if it should be.",
            )
        if origin is not None and not self._may_ask(origin, host):
            raise Forbidden(
                "A page of another site may not ask here.",
                hint="Add its origin to server.origins_allowed if it should.",
            )
        return origin

    def _may_ask(self, origin: bytes, host: bytes) -> bool:
        """Whether the page at ``origin`` is our own, or one that the owner named."""
        text = origin.decode("latin-1").lower()
        if text in self._origins:
            return True
        try:
            return urlsplit(text).netloc == host.decode("latin-1").lower()
        except ValueError:  # what no browser sends
            return False

    def _principal(self, scope: Scope) -> Principal | CallerError | None:
        """Who asks. A wrong key is kept as the error it is: a public route doesn't care, any other raises it."""
        try:
            key = bearer_of(scope["headers"], scope["query_string"])
            return None if key is None else self._keys.verify(key)
        except InvalidRequest:
            raise
        except CallerError as error:
            return error


def _shared_with(send: Send, origin: bytes) -> Send:
    """``send``, telling the browser that the page at ``origin`` may read the answer."""

    async def send_shared(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"access-control-allow-origin", origin), (b"vary", b"origin")]
        await send(message)

    return send_shared


async def _answer_preflight(send: Send, origin: bytes) -> None:
    """Tell the browser of an allowed page what it may send. No key is needed for that, and none is in cookies."""
    headers = [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
        (b"vary", b"origin"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _name_of(host: bytes) -> str:
    """The name in a Host header, without port; ``[::1]:9200`` is ``[::1]``."""
    name, colon, port = host.decode("latin-1").lower().rpartition(":")
    return name if colon and port.isdigit() else host.decode("latin-1").lower()


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """What answers where no route matches: nobody learns without a key which paths exist."""
    check_scope(scope.get(PRINCIPAL), Right.READ)
    raise NotFound(
        f"There is nothing at {scope['method']} {scope['path'][:200]}.", hint="GET /api/openapi.json lists what is."
    )


async def refuse(send: Send, error: FleetmindError) -> None:
    """Answer with ``error`` as JSON."""
    body = body_of(error)
    headers = [*headers_of(error), (b"content-length", str(len(body)).encode())]
    if isinstance(error, BodyTimeout):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
