"""The least a Python proxy can do: ASGI in, aiohttp out, one process, one shared session, no logic at all.

It is the floor that Fleetmind's gateway is compared with: no key, no limit, no count, no look into the body.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import aiohttp

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

UPSTREAM = os.environ["BARE_PROXY_UPSTREAM"]


class Session:
    """The one client session, opened in the running loop at the first call."""

    def __init__(self) -> None:
        self._client: aiohttp.ClientSession | None = None

    def client(self) -> aiohttp.ClientSession:
        if self._client is None:
            self._client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()


session = Session()


async def app(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    body = b""
    is_more = True
    while is_more:
        message = await receive()
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
    headers = {"content-type": "application/json"}
    async with session.client().request(
        scope["method"], UPSTREAM + scope["path"], data=body, headers=headers
    ) as response:
        content_type = response.headers.get("content-type", "application/json").encode()
        start = {"type": "http.response.start", "status": response.status}
        if response.content_length is not None:
            whole = await response.read()
            length = str(len(whole)).encode()
            await send({**start, "headers": [(b"content-type", content_type), (b"content-length", length)]})
            await send({"type": "http.response.body", "body": whole})
            return
        await send({**start, "headers": [(b"content-type", content_type)]})
        async for chunk in response.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body"})


async def _lifespan(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await session.close()
    await send({"type": "lifespan.shutdown.complete"})
