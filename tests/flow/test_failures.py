"""Engines that fail: before the first token a call is tried again, after it the client is told, and it comes back."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from tests.flow.engines import (
    DONE,
    REPLY,
    USAGE_EVENT,
    ScriptedEngine,
    event,
    far_key,
    scripted_engine,
    served,
    stream,
    whole,
)
from tests.flow.service import Heard, Service, running, until
from tests.flow.wire import error_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

ERROR = json.dumps({"error": {"message": "out of memory", "type": "server_error", "code": 500}}).encode()
GOOD_STREAM = (event("good"), USAGE_EVENT, DONE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A service that loses patience soon; at the end it must be well."""
    with far_key():
        home = tmp_path_factory.mktemp("failures")
        patience = {
            "gateway__stream_idle_s_max": "0.5",
            "gateway__first_token_s_max": "0.5",
            "gateway__reply_s_max": "1",
        }
        async with running(home, **patience) as service:
            await service.add_fake("fake")
            yield service
            assert (await service.chat("fake")).status == 200
            await service.until_calls(outstanding=0)
            assert "a request failed" not in (home / "logs" / "server.log").read_text(), "something answered with a 500"


@pytest_asyncio.fixture(loop_scope="module")
async def far(service: Service) -> AsyncIterator[ScriptedEngine]:
    """A remote model named far, whose every answer is written here."""
    async with scripted_engine() as engine, served(service, engine):
        yield engine
        await service.until_calls(outstanding=0)


def broken(heard: Heard) -> dict[str, Any]:
    """The error that ends a stream which began well."""
    assert heard.status == 200
    assert not heard.is_whole, "nobody must take a part for the whole"
    assert b"[DONE]" not in heard.events
    error: dict[str, Any] = heard.chunks[-1]["error"]
    assert (error["code"], error["origin"]) == ("stream_broken", "engine")
    assert error["message"]
    assert all("error" not in chunk for chunk in heard.chunks[:-1])
    return error


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


FAULTS_BEFORE = {
    "500": whole(ERROR, 500),
    "502": whole(b"<html>Bad Gateway</html>", 502, "text/html"),
    "503": whole(b"", 503),
    "gone": hang_up,
    "silent": hang,
    "no json": whole(b"\xff\xfe no answer {"),
    "deep json": whole(b"[" * 100_000),
    "nothing": whole(b""),
    "other type": whole(b'"text"'),
    "cut off": stream(b'{"choices":', breaks=True, kind="application/json"),
}
FAULTS_BEFORE_STREAM = FAULTS_BEFORE | {
    "no stream": whole(REPLY),
    "empty stream": stream(),
    "broken stream": stream(breaks=True),
    "half an event": stream(b'data: {"choi', breaks=True),
    "garbage": stream(b'data: {"choices":[{"delta":{"con\xff\xfe\x00\n\n\x01\x02'),
    "error event": stream(b"data: " + ERROR + b"\n\n"),
    "endless event": stream(b"data: " + b"x" * 5 * 1024**2),
}


# Before the first token


@pytest.mark.parametrize("fault", FAULTS_BEFORE)
async def test_a_whole_answer_that_fails_is_tried_once_more(service: Service, far: ScriptedEngine, fault: str) -> None:
    far.script.append(FAULTS_BEFORE[fault])
    answer = await service.chat("far")
    assert answer.status == 200
    assert answer.body == REPLY
    assert len(far.bodies) == 2
    assert far.bodies[0] == far.bodies[1]


@pytest.mark.parametrize("fault", FAULTS_BEFORE_STREAM)
async def test_a_stream_that_fails_before_its_first_token_is_tried_once_more(
    service: Service, far: ScriptedEngine, fault: str
) -> None:
    far.script.extend([FAULTS_BEFORE_STREAM[fault], stream(*GOOD_STREAM)])
    heard = await service.listen("far")
    assert heard.is_whole
    assert heard.text == "good"
    assert len(far.bodies) == 2


@pytest.mark.parametrize("fault", FAULTS_BEFORE_STREAM)
async def test_what_fails_again_is_told(service: Service, far: ScriptedEngine, fault: str) -> None:
    for is_stream in (False, True):
        if not is_stream and fault not in FAULTS_BEFORE:
            continue
        # A connection that is hung up on without a word may have been closed before it saw the call, so each attempt
        # asks once more; nothing else does.
        attempts = 4 if fault == "gone" else 2
        far.bodies.clear()
        far.script.extend([FAULTS_BEFORE_STREAM[fault]] * attempts)
        answer = await service.chat("far", stream=is_stream)
        assert answer.status == 502
        assert error_of(answer)["origin"] == "engine"
        assert len(far.bodies) == attempts, "and not tried for ever"


async def test_an_engines_own_words_reach_the_client(service: Service, far: ScriptedEngine) -> None:
    far.script.extend([whole(ERROR, 500)] * 2)
    error = error_of(await service.chat("far"))
    assert (error["message"], error["origin"]) == ("out of memory", "engine")


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 429])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_the_engine_refuses_is_not_tried_again(
    service: Service, far: ScriptedEngine, status: int, is_stream: bool
) -> None:
    said = {"message": "top_k is no good", "type": "invalid_request_error", "param": "top_k", "code": "bad_top_k"}
    far.script.append(whole(json.dumps({"error": said}).encode(), status))
    answer = await service.chat("far", stream=is_stream)
    assert answer.status == status
    error = error_of(answer)
    assert (error["message"], error["param"], error["code"]) == ("top_k is no good", "top_k", "bad_top_k")
    assert error["origin"] == "engine"
    assert len(far.bodies) == 1


@pytest.mark.parametrize("body", [b"", b"plain words", b'{"detail":"no"}', b'{"error":"words"}', b"\xff", b"[" * 10**5])
async def test_a_refusal_in_any_shape_is_an_error_of_ours(service: Service, far: ScriptedEngine, body: bytes) -> None:
    far.script.append(whole(body, 400, "text/plain"))
    answer = await service.chat("far")
    assert answer.status == 400
    assert error_of(answer)["origin"] == "engine"


@pytest.mark.parametrize("status", [401, 403, 301, 302, 307])
async def test_an_engine_that_refuses_or_redirects_the_gateway_is_not_the_clients_fault(
    service: Service, far: ScriptedEngine, status: int
) -> None:
    async with scripted_engine() as elsewhere:
        far.script.append(whole(b"", status, Location=f"{elsewhere.url}/v1/chat/completions"))
        answer = await service.chat("far")
        assert answer.status == 502
        assert error_of(answer)["origin"] == "engine"
        assert elsewhere.headers == [], "a key never goes elsewhere"


# After the first token


@pytest.mark.parametrize(
    "rest",
    [
        stream(event("part"), breaks=True),
        stream(event("part")),
        stream(event("part"), b"data: " + ERROR + b"\n\n", DONE),
        stream(event("part"), b"error: " + ERROR + b"\n\n"),
        stream(event("part"), b"\x01\x02 no answer\n\n", DONE),
        stream(event("part"), b'data: {"choices":[{"del'),
        stream(event("part"), b"data: " + b"[" * 100_000 + b"\n\n", DONE),
        stream(event("part"), b"data: " + b"x" * 5 * 1024**2),
    ],
    ids=["cut", "no end", "error", "error line", "garbage", "half", "deep", "endless"],
)
async def test_a_stream_that_breaks_ends_with_an_error(service: Service, far: ScriptedEngine, rest: Any) -> None:
    far.script.append(rest)
    heard = await service.listen("far")
    broken(heard)
    assert heard.chunks[0]["choices"][0]["delta"]["content"] == "part"
    assert len(far.bodies) == 1, "what the client has seen is not begun again"


async def test_a_stream_that_falls_silent_ends_with_an_error(service: Service, far: ScriptedEngine) -> None:
    async def line(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event("part"))
        return await hang(request)

    far.script.append(line)
    assert "silent" in broken(await service.listen("far"))["message"]


@pytest.mark.parametrize("knob", ["error_after_tokens", "garbage_after_tokens", "hang_after_tokens"])
async def test_a_replica_that_fails_a_stream_ends_it_with_an_error(service: Service, knob: str) -> None:
    await service.add_fake("failing", **{knob: 3})
    heard = await service.listen("failing")
    broken(heard)
    assert len(heard.text.split()) == 3
    answer = await service.chat("failing")
    assert answer.status == 502
    assert (await service.ask("DELETE", "/api/models/failing")).status == 204


# Replicas that die


async def back(service: Service, model: str, pid: int) -> None:
    """Wait until the model is served by another process, with nobody's help."""

    async def look() -> bool:
        return any(r["state"] == "ready" and r["pid"] != pid for r in await service.replicas(model))

    await until(look, f"{model} is served again")


async def test_a_replica_killed_in_a_stream_ends_it_with_an_error_and_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("fake", tokens_per_s=20, reply_tokens=2000)
        (replica,) = await service.replicas()
        async with service.streaming("fake") as response:
            await response.content.readuntil(b"\n\n")
            os.kill(replica["pid"], signal.SIGKILL)
            rest = await response.read()
        assert rest.endswith(b"}}\n\n")
        assert b"stream_broken" in rest
        assert b"[DONE]" not in rest
        answer = await service.chat("fake", max_tokens=1)
        assert answer.status == 200, "and who asks at once waits for the new one"
        assert answer.headers["x-fleetmind-replica"] != replica["id"]
        await back(service, "fake", replica["pid"])
        assert (await service.usage(2))["calls"] == 2
        kinds = [entry["kind"] for entry in (await service.ask("GET", "/api/journal")).json()["entries"]]
        assert "replica.failed" in kinds


async def test_a_replica_killed_before_the_answer_costs_the_client_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("fake", ttft_s=0.5)
        (replica,) = await service.replicas()
        calls = [asyncio.ensure_future(service.chat("fake")) for _ in range(2)]
        calls += [asyncio.ensure_future(service.listen("fake")) for _ in range(2)]
        await service.until_calls(outstanding=4)
        os.kill(replica["pid"], signal.SIGKILL)
        assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * 4
        assert (await service.usage(4))["calls"] == 4


async def test_of_two_replicas_one_may_die_and_no_call_fails(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("fake", replicas=2, slots=4, ttft_s=0.05)
        first, _ = await service.replicas()
        calls = [asyncio.ensure_future(service.chat("fake", max_tokens=2)) for _ in range(60)]

        async def is_busy() -> bool:
            return (await service.calls())["outstanding"] == 8

        await until(is_busy, "both replicas are busy")
        os.kill(first["pid"], signal.SIGKILL)
        assert {answer.status for answer in await asyncio.gather(*calls)} == {200}
        await back(service, "fake", first["pid"])


async def test_a_replica_that_crashes_at_every_call_is_told_and_started_again(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("cursed", crash_after_tokens=0)
        (before,) = await service.replicas("cursed")
        answer = await service.chat("cursed")
        assert answer.status in (502, 503)
        error_of(answer)
        await back(service, "cursed", before["pid"])
        heard = await service.listen("cursed")
        assert not heard.is_whole
        await service.add_fake("well")
        assert (await service.chat("well")).status == 200


async def test_a_replica_stopped_by_force_is_noticed_and_replaced(tmp_path: Path) -> None:
    async with running(tmp_path, gateway__stream_idle_s_max="0.5", node__stop_grace_s="0.2") as service:
        await service.add_fake("fake", tokens_per_s=20, reply_tokens=2000)
        (replica,) = await service.replicas()
        async with service.streaming("fake") as response:
            await response.content.readuntil(b"\n\n")
            os.kill(replica["pid"], signal.SIGSTOP)
            rest = await response.read()
        assert b"stream_broken" in rest
        await service.until_calls(outstanding=0)
        os.kill(replica["pid"], signal.SIGCONT)
        assert (await service.chat("fake", max_tokens=1)).status == 200
