"""How the gateway asks an engine: one HTTP request to one replica, its answer piece by piece.

Does no routing, no retry and no accounting; turns everything that can go wrong on the wire into an EngineError. One
client session with its connections kept alive serves all replicas.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import aiohttp
from aiohttp.client import _RequestContextManager
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

    async def reply(self, replica: ReplicaView, kind: CallKind, body: bytes) -> bytes:
        """The whole body of an answer that isn't streamed. Raises EngineFailed or EngineRefused."""
        try:
            async with (
                asyncio.timeout(self._patience.reply_s_max),
                self._ask(replica, kind, body) as response,
            ):
                if response.status >= 300:
                    raise await _refused(replica, response)
                return await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _failed(replica, error) from None

    async def stream(self, replica: ReplicaView, kind: CallKind, body: bytes) -> AsyncGenerator[bytes, None]:
        """The bytes of a streamed answer as they arrive. Raises EngineFailed or EngineRefused.

        Closing it early closes the connection, which is how an engine learns that nobody listens any more.
        """
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(self._patience.first_token_s_max):
                response = await self._ask(replica, kind, body)
                if response.status >= 300:
                    raise await _refused(replica, response)
                if response.content_type != "text/event-stream":
                    raise EngineFailed(f"{replica.id} was asked for a stream and answered {response.content_type}.")
                data = await response.content.readany()
            while data:
                yield data
                if response.content.at_eof():  # saves the timer of a read that would say the same
                    return
                async with asyncio.timeout(self._patience.stream_idle_s_max):
                    data = await response.content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _failed(replica, error) from None
        finally:
            if response is not None:
                response.release()  # which closes the connection unless the answer was read to its end

    def _ask(self, replica: ReplicaView, kind: CallKind, body: bytes) -> _RequestContextManager:
        url, headers = self._target(replica, kind)
        return self._session.post(url, data=body, headers=headers, allow_redirects=False)

    def _target(self, replica: ReplicaView, kind: CallKind) -> tuple[URL, CIMultiDict[str]]:
        target = self._targets.get((replica.id, kind))
        if target is None:
            assert replica.endpoint is not None, "only ready replicas are routed to"
            headers = CIMultiDict({"Content-Type": "application/json", "Accept-Encoding": "identity"})
            if replica.endpoint.api_key:
                headers["Authorization"] = f"Bearer {replica.endpoint.api_key}"
            target = (URL(f"{replica.endpoint.base_url}/v1/{kind.value}"), headers)
            self._targets[replica.id, kind] = target
        return target


def _failed(replica: ReplicaView, error: BaseException) -> EngineFailed:
    if isinstance(error, TimeoutError):
        return EngineFailed(f"{replica.id} was silent for too long.", hint="The engine may be overloaded or hung.")
    return EngineFailed(f"{replica.id} broke the connection: {error or type(error).__name__}.")


async def _refused(replica: ReplicaView, response: aiohttp.ClientResponse) -> EngineError:
    """What an engine's own error becomes; its body is read up to a bound."""
    try:
        async with asyncio.timeout(CONNECT_S_MAX):
            body = await response.content.read(ERROR_BODY_BYTES_MAX)
    except (aiohttp.ClientError, OSError, TimeoutError):
        body = b""
    return EngineRefused(f"{replica.id} answered with status {response.status}.", status=response.status, body=body)
