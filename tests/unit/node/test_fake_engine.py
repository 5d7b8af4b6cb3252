"""The fake engine does what its knobs say, and refuses a knob it does not have."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fleetmind.core.settings import NodeSettings
from fleetmind.core.types import ModelName, ReplicaId
from fleetmind.node.engines.fake import Fake
from fleetmind.node.engines.fake_knobs import Knobs
from fleetmind.node.protocol import Ability, ReplicaReport, ReplicaSpec
from fleetmind.testing.nodes import running_node

MESSAGES = [{"role": "user", "content": "hello there"}]


class Client:
    """A session with the key, and what tests ask for again and again."""

    def __init__(self, session: aiohttp.ClientSession, report: ReplicaReport) -> None:
        assert report.endpoint is not None
        self.session = session
        self.report = report
        self.url = report.endpoint.base_url

    async def chat(self, **body: Any) -> tuple[int, dict[str, Any]]:
        async with self.session.post(self.url + "/v1/chat/completions", json={"messages": MESSAGES, **body}) as answer:
            return answer.status, await answer.json()

    async def stream(self, **body: Any) -> list[str]:
        body = {"messages": MESSAGES, "stream": True, **body}
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as answer:
            assert answer.status == 200
            return [line.decode().strip() async for line in answer.content if line.strip()]

    async def knobs(self, **knobs: object) -> tuple[int, dict[str, Any]]:
        async with self.session.post(self.url + "/fake/knobs", json=knobs) as answer:
            return answer.status, await answer.json()

    async def state(self) -> dict[str, int]:
        async with self.session.get(self.url + "/fake/state") as answer:
            found: dict[str, int] = await answer.json()
            return found

    async def until(self, **wanted: int) -> None:
        """Return once the counts are as wanted."""
        async with asyncio.timeout(10):
            while not wanted.items() <= (await self.state()).items():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def fake(tmp_path: Path, slots: int = 2, **options: object) -> AsyncIterator[Client]:
    settings = NodeSettings(probe_interval_s=3600, start_s_max=20)
    async with running_node(tmp_path, [Fake()], settings=settings) as node:
        spec = ReplicaSpec(
            id=ReplicaId("fake-1"),
            model=ModelName("a-model"),
            engine="fake",
            device_ids=(node.daemon.devices()[0].id,),
            context_tokens=128,
            slots=slots,
            options=options,
        )
        report = await node.daemon.ensure_ready(spec)
        assert report.endpoint is not None
        headers = {"Authorization": f"Bearer {report.endpoint.api_key}"}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
            yield Client(session, report)


async def test_the_text_is_a_function_of_seed_and_prompt(tmp_path: Path) -> None:
    async with fake(tmp_path, seed=7) as client:
        _, first = await client.chat(max_tokens=20)
        _, again = await client.chat(max_tokens=20)
        text = first["choices"][0]["message"]["content"]
        assert again["choices"][0]["message"]["content"] == text
        assert len(text.split()) == first["usage"]["completion_tokens"] == 20
        streamed = [json.loads(line[6:]) for line in (await client.stream(max_tokens=20))[:-1]]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed) == text
        _, other = await client.chat(max_tokens=20, messages=[{"role": "user", "content": "something else"}])
        assert other["choices"][0]["message"]["content"] != text
        await client.knobs(seed=8)
        assert (await client.chat(max_tokens=20))[1]["choices"][0]["message"]["content"] != text
        assert "simulated" in first["system_fingerprint"]
        assert first["timings"]["predicted_n"] == 20


async def test_the_end_is_told(tmp_path: Path) -> None:
    async with fake(tmp_path, reply_tokens=5) as client:
        assert (await client.chat())[1]["choices"][0]["finish_reason"] == "stop"
        assert (await client.chat(max_tokens=3))[1]["choices"][0]["finish_reason"] == "length"
        lines = await client.stream(stream_options={"include_usage": True})
        assert lines[-1] == "data: [DONE]"
        usage = json.loads(lines[-2][6:])
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 5
        finish = json.loads(lines[-3][6:])["choices"][0]
        assert finish["finish_reason"] == "stop"


async def test_a_prompt_over_the_context_is_refused_as_llama_cpp_does(tmp_path: Path) -> None:
    async with fake(tmp_path) as client:
        status, body = await client.chat(messages=[{"role": "user", "content": "word " * 500}])
        assert status == 400
        assert body["error"]["type"] == "exceed_context_size_error"
        assert body["error"]["n_ctx"] == 128


async def test_tools_are_called_when_asked(tmp_path: Path) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    async with fake(tmp_path) as client:
        _, body = await client.chat(tools=[tool], tool_choice="required")
        choice = body["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        called = choice["message"]["tool_calls"][0]["function"]
        assert called["name"] == "weather"
        assert set(json.loads(called["arguments"])) == {"city", "days"}
        lines = await client.stream(tools=[tool], tool_choice={"type": "function", "function": {"name": "weather"}})
        assert any('"tool_calls":[{' in line for line in lines)
        assert (await client.chat(tools=[tool]))[1]["choices"][0]["message"]["content"]
        assert (await client.chat(tools=[], tool_choice="required"))[0] == 400


async def test_embeddings_only_with_dimensions(tmp_path: Path) -> None:
    async with fake(tmp_path) as client:
        async with client.session.post(client.url + "/v1/embeddings", json={"input": "x"}) as answer:
            assert answer.status == 501
        assert Ability.EMBEDDING not in client.report.abilities
        await client.knobs(embedding_dimensions=8)
        async with client.session.post(client.url + "/v1/embeddings", json={"input": ["x", "y", "x"]}) as answer:
            vectors = [entry["embedding"] for entry in (await answer.json())["data"]]
        assert vectors[0] == vectors[2] != vectors[1]
        assert sum(number**2 for number in vectors[0]) == pytest.approx(1)


async def test_embeddings_are_an_ability_when_asked_for(tmp_path: Path) -> None:
    async with fake(tmp_path, embedding_dimensions=4) as client:
        assert Ability.EMBEDDING in client.report.abilities


async def test_slots_bound_what_runs_at_once(tmp_path: Path) -> None:
    async with fake(tmp_path, slots=2, hang_after_tokens=1) as client:
        calls = [asyncio.ensure_future(client.chat(max_tokens=5)) for _ in range(5)]
        await client.until(active=2, waiting=3)
        await client.knobs(slots=4)
        await client.until(active=4, waiting=1, peak=4)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await client.until(active=0, waiting=0, aborted=5, served=0)


async def test_a_client_that_leaves_frees_its_slot_before_the_next_token(tmp_path: Path) -> None:
    async with fake(tmp_path, slots=1, hang_after_tokens=2) as client:
        body = {"messages": MESSAGES, "stream": True}
        async with client.session.post(client.url + "/v1/chat/completions", json=body) as answer:
            await answer.content.readline()
            answer.close()
        await client.until(active=0, aborted=1)


async def test_an_error_before_and_inside_a_stream(tmp_path: Path) -> None:
    async with fake(tmp_path, error_after_tokens=0) as client:
        assert (await client.chat())[0] == 500
        body = {"messages": MESSAGES, "stream": True}
        async with client.session.post(client.url + "/v1/chat/completions", json=body) as answer:
            assert answer.status == 500
        await client.knobs(error_after_tokens=3)
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.stream()
        await client.until(failed=3, active=0)


async def test_garbage_is_no_answer(tmp_path: Path) -> None:
    async with fake(tmp_path, garbage_after_tokens=2) as client:
        with pytest.raises((aiohttp.ClientPayloadError, UnicodeDecodeError)):
            await client.stream()
        with pytest.raises((aiohttp.ClientError, ValueError)):
            await client.chat()


async def test_a_crash_takes_the_process_along(tmp_path: Path) -> None:
    async with fake(tmp_path, crash_after_tokens=1) as client:
        with pytest.raises(aiohttp.ClientError):
            await client.stream()


async def test_five_hundred_streams_at_once(tmp_path: Path) -> None:
    async with fake(tmp_path, slots=500, tokens_per_s=20) as client:
        async with asyncio.timeout(60):
            replies = await asyncio.gather(*(client.stream(max_tokens=10) for _ in range(500)))
        assert {lines[-1] for lines in replies} == {"data: [DONE]"}
        state = await client.state()
        assert (state["served"], state["active"], state["aborted"]) == (500, 0, 0)


async def test_knobs_are_changed_live_and_refused_by_name(tmp_path: Path) -> None:
    async with fake(tmp_path) as client:
        status, body = await client.knobs(tokens_per_s=9)
        assert (status, body["tokens_per_s"]) == (200, 9)
        status, body = await client.knobs(tokens_pers=1)
        assert status == 400
        assert "did you mean 'tokens_per_s'" in body["error"]["message"]


async def test_nothing_is_told_without_the_key(tmp_path: Path) -> None:
    async with fake(tmp_path) as client, aiohttp.ClientSession() as stranger:
        for method, path in (
            ("GET", "/props"),
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/embeddings"),
            ("GET", "/fake/state"),
            ("POST", "/fake/knobs"),
            ("GET", "/nowhere"),
        ):
            async with stranger.request(method, client.url + path, json={}) as answer:
                assert answer.status == 401, path
        async with stranger.get(client.url + "/health") as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("knobs", "what"),
    [
        ({"speed": 1}, "no knob 'speed'"),
        ({"ttft": 1}, "did you mean 'ttft_s'"),
        ({"load_s": -1}, "at least 0"),
        ({"load_s": float("nan")}, "a number"),
        ({"load_s": "1"}, "a number"),
        ({"load_s": True}, "a number"),
        ({"slots": 0}, "at least 1"),
        ({"slots": 1.5}, "whole number"),
        ({"slots": None}, "whole number"),
        ({"crash_after_tokens": -1}, "or null"),
        ({"never_ready": 1}, "true or false"),
    ],
)
def test_a_knob_that_makes_no_sense_is_refused(knobs: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Knobs().changed(knobs)


def test_knobs_that_make_sense_are_taken() -> None:
    knobs = Knobs().changed({"load_s": 1, "crash_after_tokens": 3, "silent": True})
    assert (knobs.load_s, knobs.crash_after_tokens, knobs.silent) == (1, 3, True)
    assert knobs.changed({"crash_after_tokens": None}).crash_after_tokens is None
