"""One client's connection: how much it may send, and how long it may take.

uvicorn's protocol turns bytes into requests but bounds neither the head of a request nor the time that a client takes
to send or to read. This one does, and says what it refuses in our own words. It knows no routes and no keys. Time is
kept by one look over all connections (``sweep``), not by a timer for each request. Invariant: whatever a client sends,
withholds or leaves unread, what it costs here is bounded, and so is how long.
"""

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from fleetmind.api.problems import body_of, headers_of, status_of
from fleetmind.core.errors import BodyTimeout, CapacityError, FleetmindError, InvalidRequest, PayloadTooLarge

HEAD_BYTES_MAX = 64 * 1024
"""Bytes a client may send that are neither body nor yet a whole head, beside those that arrive together with them."""
LINGER_S = 2.0
"""How long a client whose connection is to end is still listened to, so that it gets to read why."""
SWEEP_S = 0.5
_BUSY_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may do. ``arrive_s_max`` is the time for a head to arrive, and then for its body; ``stall_s_max``
    how long a client may take nothing of an answer that waits for it."""

    arrive_s_max: float = 30.0
    stall_s_max: float = 60.0
    connections_max: int = 4096


class ConnectionConfig(uvicorn.Config):
    """uvicorn's configuration with our bounds, which each connection finds here."""

    def __init__(self, app: ASGIApp, bounds: Bounds, **options: Any) -> None:
        super().__init__(app, http=Connection, ws="none", **options)
        self.bounds = bounds


class Connection(HttpToolsProtocol):
    """HTTP/1.1 to one client."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, ConnectionConfig)
        self._bounds = config.bounds
        self._running: RequestResponseCycle | None = None
        self._unused_bytes = 0
        self._is_in_head = True
        self._is_refused = False
        self._began_s = self.loop.time()
        """Since when the rest of a request is awaited; infinite while none is."""
        self._stalled_s = math.inf
        """Since when the client takes nothing of what waits for it; infinite while nothing does."""
        self._stalled_bytes = 0

    # -- what asyncio calls -------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_refused:
            return
        self._unused_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # HTTP goes on, as RFC 9110 7.8 allows; but the parser reads no further request from this connection.
            self.cycle.keep_alive = False
        except httptools.HttpParserError:
            self._refuse(400, InvalidRequest("This is not HTTP/1.1.", hint="Check the client and any proxy between."))
        if self._unused_bytes > HEAD_BYTES_MAX:
            problem = PayloadTooLarge(f"The headers are larger than {HEAD_BYTES_MAX} bytes.", hint="Send less.")
            self._refuse(431, problem)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._note_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_s = math.inf

    def connection_lost(self, exc: Exception | None) -> None:
        # uvicorn tells the newest request only, which is not the one that is being answered if several were sent ahead.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    # -- what the parser calls ----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._unused_bytes = 0
        self._began_s = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # what stands behind a body must not change what was checked before it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._began_s = self.loop.time()
        is_full = len(self.connections) > self._bounds.connections_max
        self.app = _busy if is_full else self.config.loaded_app
        if not self.url.startswith(b"/"):
            self._believe_target()
        super().on_headers_complete()

    def _believe_target(self) -> None:
        """The host of a target like ``http://host/path`` counts, whatever the Host header says (RFC 9112, 3.2.2)."""
        target = httptools.parse_url(self.url)
        if target.host is not None:
            authority = target.host if target.port is None else b"%s:%d" % (target.host, target.port)
            self.headers[:] = [(name, authority if name == b"host" else value) for name, value in self.headers]

    def on_body(self, body: bytes) -> None:
        self._unused_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unused_bytes = 0
        self._began_s = math.inf
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # -- bounds -------------------------------------------------------------------------------------------------

    def check(self, now_s: float) -> None:
        """End the connection if its client has taken too long to send or to read."""
        if self.transport.is_closing():  # but something still waits to be read
            self._note_stall()
        if self._stalled_s != math.inf:
            self._check_stall(now_s)
        if self._is_refused:
            if now_s - self._began_s > LINGER_S:
                self.transport.close()
        elif now_s - self._began_s > self._bounds.arrive_s_max:
            self._end_slow_request()

    def _end_slow_request(self) -> None:
        if self.scope is None:  # not a byte of a request, so nobody waits for an answer
            self.transport.close()
        elif self._is_in_head:
            self._refuse_slow("No request arrived")
        elif self._running is None or self._running.response_complete:  # the rest of a body that nobody wants
            self.transport.close()
        else:
            self._refuse_slow("The body did not arrive")

    def _refuse_slow(self, what: str) -> None:
        hint = "Send it faster, or raise server.body_read_s_max."
        self._refuse(408, BodyTimeout(f"{what} within {self._bounds.arrive_s_max:.0f} s.", hint=hint))

    def _note_stall(self) -> None:
        if self._stalled_s == math.inf:
            self._stalled_s = self.loop.time()
            self._stalled_bytes = self.transport.get_write_buffer_size()

    def _check_stall(self, now_s: float) -> None:
        size_bytes = self.transport.get_write_buffer_size()
        if size_bytes < self._stalled_bytes:
            self._stalled_s, self._stalled_bytes = now_s, size_bytes
        elif now_s - self._stalled_s > self._bounds.stall_s_max:
            self.transport.abort()

    def _refuse(self, status: int, problem: FleetmindError) -> None:
        """Say what is wrong, unless an answer is on its way, and end the connection soon."""
        if self.transport.is_closing() or self._is_refused:
            return
        self._is_refused = True
        self._began_s = self.loop.time()
        cycle = self._running
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.abort()
                return
        body = body_of(problem)
        headers = [*headers_of(problem), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(b"%s%s\r\n%s" % (STATUS_LINE[status], lines, body))
        if self.transport.can_write_eof():
            self.transport.write_eof()


def sweep(connections: Iterable[object], now_s: float) -> None:
    """Check all connections; call it every SWEEP_S."""
    for connection in list(connections):
        if isinstance(connection, Connection):
            connection.check(now_s)


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """What answers while more clients are connected than may be."""
    problem = CapacityError(
        "More clients are connected than may be.",
        retry_after_s=_BUSY_RETRY_S,
        hint="Ask again, or raise server.connections_max.",
    )
    body = body_of(problem)
    headers = [*headers_of(problem), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status_of(problem), "headers": headers})
    await send({"type": "http.response.body", "body": body})
