"""Just enough HTTP/1.1 for the fake engine: a thousand streams at once, each cheap, a client's leaving seen at once.

One request at a time per connection, bodies with a length only, nothing of TLS. Not for the outside world. Invariant: a
handler whose client has gone is cancelled before it can write again.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

HEAD_BYTES_MAX = 65536
BODY_BYTES_MAX = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Request:
    """A request, read whole. Header names are lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Connection(asyncio.Protocol):
    """One client. ``handle`` answers with ``respond``, or ``begin_stream``, ``send``…, ``end_stream``."""

    def __init__(self, handle: Callable[["Connection", Request], Awaitable[None]]) -> None:
        self._handle = handle
        self._buffer = bytearray()
        self._running: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    # -- what asyncio calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()

    def eof_received(self) -> bool:
        self._leave()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- what a handler calls -----------------------------------------------------------------------------------

    def respond(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        """A whole answer."""
        self._transport.write(
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def begin_stream(self) -> None:
        """The head of a stream of server-sent events."""
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )

    async def send(self, piece: bytes) -> None:
        """A piece of the stream; waits while the client does not read."""
        self._transport.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if not self._writable.is_set():
            await self._writable.wait()

    def end_stream(self) -> None:
        """The proper end of a stream."""
        self._transport.write(b"0\r\n\r\n")

    def is_closing(self) -> bool:
        """Whether the client has gone or been dropped."""
        return self._transport.is_closing()

    def drop(self) -> None:
        """Close without a proper end."""
        self._transport.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self._running is not None:
            self._running.cancel()
        self._writable.set()
        self._transport.close()

    def _advance(self) -> None:
        if self._running is not None or self._transport.is_closing():
            return
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                self._transport.close()
            return
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        words, length = first.split(" "), headers.get("content-length", "0")
        if len(words) != 3 or not length.isdigit() or int(length) > BODY_BYTES_MAX or "transfer-encoding" in headers:
            self.respond(400, json.dumps({"error": {"message": "Bad request", "code": 400}}).encode())
            self._transport.close()
            return
        whole = end + 4 + int(length)
        if len(self._buffer) < whole:
            return
        request = Request(words[0], words[1].partition("?")[0], headers, bytes(self._buffer[end + 4 : whole]))
        del self._buffer[:whole]
        self._running = asyncio.get_running_loop().create_task(self._answer(request))

    async def _answer(self, request: Request) -> None:
        try:
            await self._handle(self, request)
        except asyncio.CancelledError:
            self._transport.close()
            return
        self._running = None
        self._advance()
