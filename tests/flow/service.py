"""A whole service inside the test's own process and event loop, spoken to over real HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from fleetmind.app import Started, serve
from fleetmind.core.config import load

T = TypeVar("T")

QUICK = {
    "server.port": "0",
    "models.preload": "",
    "fleet.reconcile_interval_s": "0.05",
    "fleet.restart_backoff_s": "0.02",
    "node.probe_interval_s": "0.2",
    "node.stop_grace_s": "1",
    "gateway.usage_flush_s": "0.05",
    "logs.level": "warning",
}


async def until(look: Callable[[], Awaitable[T | None]], what: str, *, seconds_max: float = 30.0) -> T:
    """Look again and again at something in another process, where there is no event to wait for, until it is true.

    Raises AssertionError naming ``what`` after ``seconds_max``.
    """
    try:
        async with asyncio.timeout(seconds_max):
            while True:
                if found := await look():
                    return found
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {seconds_max:.0f} s: {what}") from None


@dataclass(frozen=True)
class Answer:
    """A response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]


@dataclass(frozen=True)
class Heard:
    """A streamed answer, heard to its end. ``events`` are what followed ``data:``."""

    status: int
    headers: Mapping[str, str]
    events: tuple[bytes, ...]

    @property
    def is_whole(self) -> bool:
        return self.events[-1:] == (b"[DONE]",)

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(event) for event in self.events if event != b"[DONE]"]

    @property
    def text(self) -> str:
        deltas = [choice["delta"] for chunk in self.chunks for choice in chunk.get("choices", ())]
        return "".join(delta.get("content") or "" for delta in deltas)


class Service:
    """A running service and a client with all rights. ``user`` has only the first key's."""

    def __init__(self, home: Path, started: Started, session: aiohttp.ClientSession) -> None:
        self.home = home
        self.started = started
        self.url = started.url
        self.host = urlsplit(started.url).netloc
        self.session = session
        self.token = started.token_file.read_text()
        self.first_key = started.first_key

    async def ask(self, method: str, path: str, *, key: str | None = "", **options: Any) -> Answer:
        """One request; ``key`` is the operator's unless given, None for none."""
        headers = dict(options.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {key or self.token}"
        async with self.session.request(method, self.url + path, headers=headers, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def chat(self, model: str, text: str = "Hello", **fields: Any) -> Answer:
        """One chat call."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return await self.ask("POST", "/v1/chat/completions", json=body)

    @asynccontextmanager
    async def streaming(self, model: str, text: str = "Hello", **fields: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """A streamed chat call under way; leaving early is hanging up."""
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": text}], **fields}
        headers = {"Authorization": f"Bearer {self.token}"}
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as response:
            yield response

    async def listen(self, model: str, text: str = "Hello", **fields: Any) -> Heard:
        """One streamed chat call, heard to its end."""
        async with self.streaming(model, text, **fields) as response:
            body = await response.read()
            lines = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: ")]
            return Heard(response.status, response.headers, tuple(lines))

    async def add_fake(self, name: str = "fake", *, is_awaited: bool = True, **options: Any) -> None:
        """A fake model with these knobs, ready unless told otherwise."""
        fields = {k: options.pop(k) for k in ("replicas", "slots", "context_tokens") if k in options}
        answer = await self.ask(
            "POST", "/api/models", json={"source": "fake", "name": name, "options": options, **fields}
        )
        assert answer.status == 201, answer.body
        if is_awaited:
            await self.until_state(name, "ready")

    async def until_state(self, name: str, state: str) -> dict[str, Any]:
        """Wait until the model is in ``state``; the model."""

        async def look() -> dict[str, Any] | None:
            models = (await self.ask("GET", "/api/models")).json()["models"]
            return next((model for model in models if model["name"] == name and model["state"] == state), None)

        return await until(look, f"{name} is {state}")

    async def replicas(self, model: str = "fake") -> list[dict[str, Any]]:
        """The replicas of a model, as the server shows them."""
        answer = (await self.ask("GET", "/api/replicas")).json()
        return [replica for replica in answer["replicas"] if replica["model"] == model]

    async def calls(self) -> dict[str, int]:
        """How many calls are being answered (outstanding) and how many wait (queued)."""
        return dict((await self.ask("GET", "/api/status")).json()["calls"])

    async def until_calls(self, *, outstanding: int, queued: int = 0) -> None:
        """Wait until so many calls are being answered and wait for a slot."""

        async def look() -> bool:
            return await self.calls() == {"outstanding": outstanding, "queued": queued}

        await until(look, f"{outstanding} calls are answered and {queued} wait")

    async def usage(self, calls: int) -> dict[str, int]:
        """What was recorded of the operator's calls, once it is ``calls`` of them, as must never be exceeded."""

        async def look() -> dict[str, int] | None:
            rows = (await self.ask("GET", "/api/usage")).json()["rows"]
            names = ("calls", "prompt_tokens", "completion_tokens")
            total = {name: sum(row[name] for row in rows) for name in names}
            assert total["calls"] <= calls, f"a call was counted twice: {rows}"
            return total if total["calls"] == calls else None

        return await until(look, f"{calls} calls are recorded")


@asynccontextmanager
async def running(home: Path, **flags: str) -> AsyncIterator[Service]:
    """A service on ``home``; stopped in order at the end."""
    ready: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
    configuration = load(home, environ={}, flags=QUICK | {k.replace("__", "."): v for k, v in flags.items()})
    serving = asyncio.ensure_future(serve(home, configuration, on_ready=ready.set_result))
    await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        await serving  # raises what it failed with
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            service = Service(home, ready.result(), session)
            try:
                yield service
            finally:  # also after a test that failed: its own error is the one to be seen
                if not serving.done():
                    with suppress(aiohttp.ClientError):  # a test may have asked it already
                        await service.ask("POST", "/api/stop")
    finally:
        async with asyncio.timeout(30):
            await serving
