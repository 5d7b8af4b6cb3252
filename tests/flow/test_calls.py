"""Calls that go well: answers whole and streamed, what passes through, what is counted, and who goes away."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.flow.engines import (
    DONE,
    KEY,
    USAGE_EVENT,
    ScriptedEngine,
    event,
    fake_engine,
    far_key,
    scripted_engine,
    served,
    stream,
    whole,
)
from tests.flow.service import Service, running, until
from tests.flow.wire import error_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A service with a fake model, and one that makes vectors."""
    with far_key():
        async with running(tmp_path_factory.mktemp("calls")) as service:
            await service.add_fake("fake")
            await service.add_fake("vectors", embedding_dimensions=8)
            yield service


@pytest_asyncio.fixture(loop_scope="module")
async def far(service: Service) -> AsyncIterator[ScriptedEngine]:
    """A remote model named far, whose side of a call is written and seen here."""
    async with scripted_engine() as engine, served(service, engine):
        yield engine


# Whole and streamed


async def test_a_whole_answer_says_who_gave_it(service: Service) -> None:
    answer = await service.chat("fake", max_tokens=7)
    assert answer.status == 200
    reply = answer.json()
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["usage"]["completion_tokens"] == 7
    (replica,) = await service.replicas()
    assert answer.headers["x-fleetmind-model"] == "fake"
    assert answer.headers["x-fleetmind-replica"] == replica["id"]
    assert answer.headers["x-fleetmind-simulated"] == "true"
    assert float(answer.headers["x-fleetmind-queue-ms"]) >= 0
    assert answer.headers["x-fleetmind-call"].startswith("call-")
    assert answer.headers["content-type"] == "application/json"


async def test_each_call_has_an_id_of_its_own(service: Service) -> None:
    answers = await asyncio.gather(*(service.chat("fake", max_tokens=1) for _ in range(50)))
    assert len({answer.headers["x-fleetmind-call"] for answer in answers}) == 50


async def test_a_streamed_answer_is_the_same_text_in_pieces(service: Service) -> None:
    heard = await service.listen("fake", "Tell me")
    assert heard.status == 200
    assert heard.is_whole
    assert heard.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert heard.headers["cache-control"] == "no-cache"
    assert "content-length" not in heard.headers
    assert heard.headers["x-fleetmind-model"] == "fake"
    assert len(heard.events) > 10
    assert heard.text == (await service.chat("fake", "Tell me")).json()["choices"][0]["message"]["content"]


async def test_the_usage_of_a_stream_is_shown_only_where_it_is_asked_for(service: Service) -> None:
    heard = await service.listen("fake")
    assert not any(chunk.get("usage") for chunk in heard.chunks)
    assert all(chunk["choices"] for chunk in heard.chunks), "nor is the event of which it was all"
    for options in ({"include_usage": False}, {}, None):
        assert (await service.listen("fake", stream_options=options)).chunks[-1]["choices"]
    heard = await service.listen("fake", stream_options={"include_usage": True})
    assert heard.chunks[-1]["choices"] == []
    assert heard.chunks[-1]["usage"]["completion_tokens"] == 32


async def test_the_first_piece_comes_while_the_engine_still_speaks(service: Service) -> None:
    await service.add_fake("endless", tokens_per_s=1, reply_tokens=4000)  # would take an hour
    async with service.streaming("endless") as response:
        assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
        assert (await service.calls())["outstanding"] == 1
    await service.until_calls(outstanding=0)
    assert (await service.ask("DELETE", "/api/models/endless")).status == 204


async def test_a_completion_is_answered_whole_and_streamed(service: Service) -> None:
    body: dict[str, Any] = {"model": "fake", "prompt": "Once upon a time", "max_tokens": 5}
    answer = await service.ask("POST", "/v1/completions", json=body)
    assert answer.json()["object"] == "text_completion"
    assert answer.json()["usage"]["completion_tokens"] == 5
    streamed = await service.ask("POST", "/v1/completions", json=body | {"stream": True})
    assert streamed.body.endswith(DONE)
    chunks = [json.loads(part[6:]) for part in streamed.body.split(b"\n\n")[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer.json()["choices"][0]["text"]


async def test_the_list_of_models_is_that_of_the_catalogue(service: Service) -> None:
    listed = (await service.ask("GET", "/v1/models")).json()
    assert listed["object"] == "list"
    assert {(model["id"], model["object"], model["ready"]) for model in listed["data"]} >= {
        ("fake", "model", True),
        ("vectors", "model", True),
    }


# Vectors


async def test_a_model_that_makes_vectors_makes_them(service: Service) -> None:
    answer = await service.ask("POST", "/v1/embeddings", json={"model": "vectors", "input": ["a", "b"]})
    assert answer.status == 200
    assert [len(entry["embedding"]) for entry in answer.json()["data"]] == [8, 8]
    assert answer.headers["x-fleetmind-model"] == "vectors"


async def test_a_model_that_makes_none_says_so(service: Service) -> None:
    answer = await service.ask("POST", "/v1/embeddings", json={"model": "fake", "input": "a"})
    assert answer.status == 400
    error = error_of(answer)
    assert "embedding" in error["message"]
    assert (error["param"], error["origin"]) == ("model", "gateway")


# What passes through

FIELDS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "logprobs": True,
    "top_logprobs": 3,
    "seed": 2**40,
    "temperature": 0.1,
    "logit_bias": {"15": -100},
    "stop": ["\n", "é\u2028"],
    "metadata": {"a": None},
    "a_field_of_next_year": [{"x": 1e-300}, 12345678901234567890123],
}


@pytest.mark.parametrize("is_stream", [False, True])
async def test_every_field_reaches_the_engine_as_it_was_sent(
    service: Service, far: ScriptedEngine, is_stream: bool
) -> None:
    if is_stream:
        far.script.append(stream(event("hi"), USAGE_EVENT, DONE))
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:image/png,"}}]
    messages = [{"role": "system", "content": "Ä\\u0000"}, {"role": "user", "content": parts, "name": "x"}]
    sent = {"model": "far", "messages": messages, "stream": is_stream, **FIELDS}
    answer = await service.ask("POST", "/v1/chat/completions", json=sent)
    assert answer.status == 200
    received = json.loads(far.bodies[0])
    if is_stream:
        assert received.pop("stream_options") == {"include_usage": True}
    assert received == sent
    assert far.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert service.token not in str(far.headers) + str(far.bodies), "the client's key is none of the engine's business"


async def test_an_answer_reaches_the_client_byte_for_byte(service: Service, far: ScriptedEngine) -> None:
    body = b'{ "choices":[ {"logprobs":{"content":[]},"x":1.10} ],\n "usage":null, "tool_calls":"\xc3\xa9" }'
    far.script.append(whole(body, **{"Set-Cookie": "a=b", "X-Secret": "inside"}))
    answer = await service.chat("far")
    assert answer.body == body
    assert "set-cookie" not in answer.headers
    assert "x-secret" not in answer.headers


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_a_stream_reaches_the_client_however_it_was_cut(service: Service, far: ScriptedEngine, size: int) -> None:
    sent = event("é", x=1.10) + b": still here\n\n" + event("\u2028") + USAGE_EVENT + DONE
    far.script.append(stream(*(sent[at : at + size] for at in range(0, len(sent), size))))
    async with service.streaming("far") as response:
        heard = await response.read()
    assert heard == sent.replace(USAGE_EVENT, b"")
    usage = (await service.ask("GET", "/api/usage")).json()
    assert usage["rows"]


async def test_a_stream_with_the_other_line_ends_is_understood(service: Service, far: ScriptedEngine) -> None:
    sent = event("one") + event("two") + USAGE_EVENT + DONE
    far.script.append(stream(sent.replace(b"\n", b"\r\n")))
    heard = await service.listen("far")
    assert heard.is_whole
    assert heard.text == "onetwo"
    assert heard.chunks[-1]["choices"], "the usage that was not asked for is not shown"


async def test_a_tool_call_passes_through_whole_and_streamed(service: Service) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}
    wish: dict[str, Any] = {"tools": [tool], "tool_choice": "required"}
    choice = (await service.chat("fake", **wish)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    heard = await service.listen("fake", **wish)
    calls = [d["tool_calls"] for c in heard.chunks if (d := c["choices"][0]["delta"]).get("tool_calls")]
    assert calls[0][0]["function"]["name"] == "add"


# What is counted


async def test_each_call_is_counted_once_with_its_tokens(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("fake")
        for _ in range(3):
            assert (await service.chat("fake", max_tokens=5)).status == 200
            assert (await service.listen("fake", max_tokens=5)).is_whole
            body = {"model": "fake", "input": "x"}
            assert (await service.ask("POST", "/v1/embeddings", json=body)).status == 400
        assert (await service.chat("nothing")).status == 404  # of no model, so counted for none
        async with service.streaming("fake", max_tokens=5) as response:
            await response.content.readuntil(b"\n\n")  # and hang up
        usage = await service.usage(10)
        assert 30 <= usage["completion_tokens"] <= 35
        assert usage["prompt_tokens"] > 0
    async with running(tmp_path) as service:
        assert (await service.usage(10)) == usage, "and it is there after a restart, each once"


async def test_an_engine_that_counts_nonsense_spoils_no_account(tmp_path: Path) -> None:
    with far_key():
        async with scripted_engine() as engine, running(tmp_path) as service, served(service, engine):
            for count in (-5, 2**63, 10**400, None):
                usage = {"prompt_tokens": count, "completion_tokens": count}
                engine.script.append(whole(json.dumps({"choices": [], "usage": usage}).encode()))
                assert (await service.chat("far")).status == 200
                engine.script.append(stream(event("x"), event("", usage=usage), DONE))
                assert (await service.listen("far")).is_whole
            assert (await service.usage(8))["completion_tokens"] >= 0
            metrics = (await service.ask("GET", "/metrics")).body.decode()
            assert 'fleetmind_calls_total{model="far",status="ok"} 8.0' in metrics
            loops = (await service.ask("GET", "/api/status")).json()["loops"]
            assert all(loop["restarts"] == 0 for loop in loops), loops


# Who goes away


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_goes_away_frees_slot_and_engine_at_once(service: Service, is_stream: bool) -> None:
    knobs = {"ttft_s": 0 if is_stream else 3600, "tokens_per_s": 1, "reply_tokens": 4000, "slots": 1}
    async with fake_engine(**knobs) as engine, served(service, engine, slots=1):
        body = {"model": "far", "messages": [{"role": "user", "content": "x"}], "stream": is_stream}
        asking = asyncio.ensure_future(service.ask("POST", "/v1/chat/completions", json=body))
        await until(lambda: engine.count("active", 1), "the engine works")
        (replica,) = await service.replicas("far")
        assert replica["outstanding"] == 1
        asking.cancel()
        await until(lambda: engine.count("aborted", 1), "the engine has stopped")
        await service.until_calls(outstanding=0)
        assert await engine.state() == {"active": 0, "waiting": 0, "peak": 1, "served": 0, "aborted": 1, "failed": 0}
        assert (await service.ask("DELETE", "/api/models/far")).status == 204


async def test_a_client_that_goes_away_while_it_waits_never_reaches_the_engine(service: Service) -> None:
    async with fake_engine(ttft_s=3600, slots=1) as engine, served(service, engine, slots=1):
        first = asyncio.ensure_future(service.chat("far"))
        await until(lambda: engine.count("active", 1), "the engine works for the first")
        second = asyncio.ensure_future(service.chat("far"))
        await service.until_calls(outstanding=1, queued=1)
        second.cancel()
        await service.until_calls(outstanding=1, queued=0)
        first.cancel()
        await service.until_calls(outstanding=0)
        assert (await engine.state())["peak"] == 1
