"""Engines in the test's own process, added to a service as remote ones: their side of every call can be seen."""

import asyncio
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
from aiohttp import web
from tests.flow.service import Service

from fleetmind.core.clock import SystemClock
from fleetmind.node.engines.fake_http import Connection
from fleetmind.node.engines.fake_knobs import Knobs
from fleetmind.node.engines.fake_server import FakeServer

KEY = "sk-far-away-0123456789"
KEY_ENV = "FLEETMIND_TEST_FAR_KEY"
Script = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeEngine:
    """The fake engine, reachable."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def state(self) -> dict[str, int]:
        """What it counted: active, waiting, peak, served, aborted, failed."""
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session,
            session.get(f"{self.url}/fake/state") as answer,
        ):
            return dict(await answer.json())

    async def count(self, name: str, wanted: int) -> bool:
        """Whether it counted ``wanted`` of ``name``."""
        return (await self.state())[name] == wanted


@asynccontextmanager
async def fake_engine(**knobs: object) -> AsyncIterator[FakeEngine]:
    """A fake engine at a port of its own."""
    server = FakeServer(model="far", api_key=KEY, knobs=Knobs().changed(knobs), clock=SystemClock())
    listening = await asyncio.get_running_loop().create_server(lambda: Connection(server.handle), "127.0.0.1", 0)
    async with listening:
        yield FakeEngine(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")


class ScriptedEngine:
    """An engine that answers each call by the next line of its script, and remembers what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.script: deque[Script] = deque()
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return web.json_response({"object": "list", "data": []})
        self.bodies.append(await request.read())
        self.headers.append(dict(request.headers))
        line = self.script.popleft() if self.script else whole(REPLY)
        return await line(request)


@asynccontextmanager
async def scripted_engine() -> AsyncIterator[ScriptedEngine]:
    """A scripted engine at a port of its own."""
    engine = ScriptedEngine()
    runner = web.ServerRunner(web.Server(engine.answer), shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield engine
    finally:
        await runner.cleanup()


@contextmanager
def far_key() -> Iterator[None]:
    """The key of far engines, where a service looks for it."""
    before = os.environ.get(KEY_ENV)
    os.environ[KEY_ENV] = KEY
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEY_ENV]


@asynccontextmanager
async def served(
    service: Service, engine: FakeEngine | ScriptedEngine, name: str = "far", slots: int = 4
) -> AsyncIterator[None]:
    """``engine`` as a remote model of ``service``, ready."""
    body = {"source": "remote", "name": name, "url": engine.url, "key_env": KEY_ENV, "slots": slots}
    answer = await service.ask("POST", "/api/models", json=body)
    assert answer.status == 201, answer.body
    try:
        await service.until_state(name, "ready")
        yield
    finally:
        await service.ask("DELETE", f"/api/models/{name}")


# Lines of a script

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
REPLY = json.dumps({"choices": [{"message": {"role": "assistant", "content": "good"}}], "usage": USAGE}).encode()


def whole(body: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> Script:
    """One answer in one piece."""

    async def line(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers={"Content-Type": kind, **headers})

    return line


def stream(*pieces: bytes, breaks: bool = False, kind: str = "text/event-stream") -> Script:
    """An answer in pieces, each on its way before the next is; without a proper end if it ``breaks``."""

    async def line(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.01)  # so that it travels alone
        if breaks:
            assert request.transport is not None
            request.transport.abort()
        return response

    return line


def event(content: str, **more: Any) -> bytes:
    """One event of a chat stream."""
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": content}}], **more}).encode() + b"\n\n"


USAGE_EVENT = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"
