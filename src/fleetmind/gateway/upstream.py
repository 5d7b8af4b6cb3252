"""How the gateway asks an engine: one HTTP request to one replica, its answer piece by piece.

Does no routing, no retry and no accounting; turns everything that can go wrong on the wire into an EngineError. One
client session with its connections kept alive serves all replicas.
"""

import asyncio
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from fleetmind.core.errors import EngineError, EngineFailed, EngineRefused
from fleetmind.core.types import ReplicaId
from fleetmind.fleet.snapshot import ReplicaView
from fleetmind.gateway.calls import CallKind

ERROR_BODY_BYTES_MAX = 64 * 1024
REPLY_BYTES_MAX = 256 * 1024 * 1024
CONNECT_S_MAX = 5.0
# llama.cpp's server drops an idle connection after 5 s; keeping ours for less avoids asking into a closed one.
KEEP_ALIVE_S = 4.0
READ_BYTES = 64 * 1024
HOPS_HEADER = "X-Fleetmind-Hops"
"""Tells a remote server that is a Fleetmind too how many there were before it, so that calls don't go in circles."""
RETRYABLE = frozenset({500, 502, 503, 504})
"""Statuses of an engine that say nothing about the call: another replica, or the same one later, may answer it."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an engine may be silent: before the first piece of a stream, between pieces, and for a whole reply."""

    first_token_s_max: float = 120.0
    stream_idle_s_max: float = 60.0
    reply_s_max: float = 600.0


class Upstream:
    """The shared connections to all engines. Made inside a running event loop, closed with ``close``."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=READ_BYTES,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        # What a request to a replica repeats is made once per replica; ids are never reused.
        self._targets: dict[tuple[ReplicaId, CallKind], tuple[URL, CIMultiDict[str]]] = {}

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    def forget(self, alive: frozenset[ReplicaId]) -> None:
        """Drop what is remembered of replicas that are gone."""
        for key in [key for key in self._targets if key[0] not in alive]:
            del self._targets[key]

    async def reply(self, replica: ReplicaView, kind: CallKind, body: bytes, hops: int) -> bytes:
        """The whole body of an answer that isn't streamed. Raises EngineFailed or EngineRefused."""
        try:
            with _Within(self._patience.reply_s_max):
                async with await self._ask(replica, kind, body, hops) as response:
                    if response.status >= 300:
                        raise await _refused(replica, response)
                    return await _whole(replica, response)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _failed(replica, error) from None

    async def stream(self, replica: ReplicaView, kind: CallKind, body: bytes, hops: int) -> "EngineStream":
        """A streamed answer whose first bytes are there; to be closed. Raises EngineFailed or EngineRefused."""
        try:
            with _Within(self._patience.first_token_s_max):
                response = await self._ask(replica, kind, body, hops)
                stream = EngineStream(replica, response, self._patience.stream_idle_s_max)
                try:
                    if response.status >= 300:
                        raise await _refused(replica, response)
                    if response.content_type != "text/event-stream":
                        raise EngineFailed(f"{replica.id} was asked for a stream and answered {response.content_type}.")
                    stream.first = await response.content.readany()
                except BaseException:
                    stream.close()
                    raise
                return stream
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _failed(replica, error) from None

    async def _ask(self, replica: ReplicaView, kind: CallKind, body: bytes, hops: int) -> aiohttp.ClientResponse:
        url, headers = self._target(replica, kind)
        if hops:
            headers = CIMultiDict(headers)
            headers[HOPS_HEADER] = str(hops + 1)
        try:
            return await self._session.post(url, data=body, headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            # Most likely a kept connection that the engine was just closing, which is no failure of the replica, so it
            # takes nothing from the call's retries; a second time it is one. aiohttp does not say whether the
            # connection was a kept one, so an engine that dies of a call is asked twice in each attempt.
            return await self._session.post(url, data=body, headers=headers, allow_redirects=False)

    def _target(self, replica: ReplicaView, kind: CallKind) -> tuple[URL, CIMultiDict[str]]:
        target = self._targets.get((replica.id, kind))
        if target is None:
            assert replica.endpoint is not None, "only ready replicas are routed to"
            headers = CIMultiDict({"Content-Type": "application/json", "Accept-Encoding": "identity"})
            if replica.remote_model is not None:
                headers[HOPS_HEADER] = "1"
            if replica.endpoint.api_key:
                headers["Authorization"] = f"Bearer {replica.endpoint.api_key}"
            target = (URL(f"{replica.endpoint.base_url}/v1/{kind.value}"), headers)
            self._targets[replica.id, kind] = target
        return target


class _Within:
    """``with`` that raises TimeoutError after some seconds: asyncio.timeout at half its cost; each call needs one."""

    __slots__ = ("_cancelling", "_handle", "_is_over", "_task")

    def __init__(self, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None, "a call is answered inside a task"
        self._task = task
        self._cancelling = task.cancelling()
        self._is_over = False
        self._handle = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._is_over = True
        self._task.cancel()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._handle.cancel()
        if self._is_over and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error


class EngineStream:
    """The bytes of a streamed answer as they arrive. ``first`` is what came with its head."""

    __slots__ = ("_idle_s_max", "_replica", "_response", "first")

    def __init__(self, replica: ReplicaView, response: aiohttp.ClientResponse, idle_s_max: float) -> None:
        self._replica = replica
        self._response = response
        self._idle_s_max = idle_s_max
        self.first = b""

    async def read(self) -> bytes:
        """What has arrived, waiting for it; empty at the end. Raises EngineFailed."""
        if self.first:
            data, self.first = self.first, b""
            return data
        content = self._response.content
        if content.at_eof():  # saves the timer of a read that would say the same
            return b""
        try:
            with _Within(self._idle_s_max):
                return await content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _failed(self._replica, error) from None

    def close(self) -> None:
        """Give the connection back if the answer was read to its end, else close it: that is how an engine learns that
        nobody listens any more."""
        self._response.release()


_ASK_AGAIN = "Ask again; `fleetmind logs --replica ID` shows what the engine said."


def _failed(replica: ReplicaView, error: BaseException) -> EngineFailed:
    if isinstance(error, TimeoutError):
        return EngineFailed(f"{replica.id} was silent for too long.", hint="The engine may be overloaded or hung.")
    if isinstance(error, aiohttp.ClientPayloadError):
        return EngineFailed(f"{replica.id} broke the connection in the middle of its answer.", hint=_ASK_AGAIN)
    return EngineFailed(f"{replica.id} broke the connection: {error or type(error).__name__}.", hint=_ASK_AGAIN)


async def _whole(replica: ReplicaView, response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer, up to a bound. Most come in one piece."""
    data = await response.content.readany()
    if response.content.at_eof():
        return data
    pieces, size = [data], len(data)
    async for piece in response.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > REPLY_BYTES_MAX:
            raise EngineFailed(f"{replica.id} answered with more than {REPLY_BYTES_MAX} bytes.")
    return b"".join(pieces)


async def _refused(replica: ReplicaView, response: aiohttp.ClientResponse) -> EngineError:
    """What an engine's own error becomes; its body is read up to a bound."""
    try:
        async with asyncio.timeout(CONNECT_S_MAX):
            body = await response.content.read(ERROR_BODY_BYTES_MAX)
    except (aiohttp.ClientError, OSError, TimeoutError):
        body = b""
    return EngineRefused(f"{replica.id} answered with status {response.status}.", status=response.status, body=body)
