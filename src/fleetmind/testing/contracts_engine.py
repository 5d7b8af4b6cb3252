"""What every engine and every source of devices must do, whatever it is: run these checks on a new one.

``check_engine`` starts a replica with the real daemon and talks to it over HTTP; ``check_devices`` reads a source a few
times. Both raise AssertionError with what was promised and not kept.
"""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from fleetmind.core.types import ReplicaId
from fleetmind.node.devices import DeviceSource
from fleetmind.node.engine import Engine, HealthState
from fleetmind.node.protocol import Ability, Endpoint, ReplicaReport, ReplicaSpec, ReplicaState
from fleetmind.testing.nodes import Node, running_node

MESSAGES = [{"role": "user", "content": "Count from one to twenty in words."}]
PROMPT_S_MAX = 10.0
"""How long a small call may take on a slow machine."""


async def check_engine(
    engine: Engine, spec: ReplicaSpec, home: Path, *, environ: Mapping[str, str] = os.environ
) -> None:
    """Run every check on ``engine`` with ``spec``, which must be one it can serve; devices may be left empty.

    ``spec.context_tokens`` should be at least 2048, so that a call can be interrupted before it ends by itself.
    """
    async with running_node(home, [engine], environ=environ) as node:
        if not spec.device_ids:
            spec = replace(spec, device_ids=(node.daemon.devices()[0].id,))
        report = await node.daemon.ensure_ready(spec)
        await _becomes_ready(node, engine, report)
        assert report.endpoint is not None
        model = spec.remote_model or spec.model
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            client = _Client(session, report.endpoint, model)
            await _refuses_a_wrong_key(client)
            await _answers(client)
            await _streams(client)
            await _survives_nonsense(client)
            await _frees_slots_of_clients_that_leave(client, report.slots)
        if not engine.facts.is_external:
            assert node.daemon.log_tail(spec.id, 50), "the log of a running replica has no line"
        await _ends(node, engine, spec, report)


async def check_failed_start(engine: Engine, spec: ReplicaSpec, home: Path, *, within_s: float) -> str:
    """An engine that cannot serve ``spec`` (a damaged file) must say so quickly; returns the reason it gave."""
    async with running_node(home, [engine]) as node:
        spec = replace(spec, device_ids=(node.daemon.devices()[0].id,))
        node.daemon.begin(spec)
        report = await node.changes.expect_state(ReplicaState.FAILED, within_s)
        assert report.reason, "a failed replica has no reason"
        assert report.pid is None
        return report.reason


def check_devices(source: DeviceSource, *, is_simulated: bool = False) -> None:
    """A source of devices: the same ids each time, sane values, one reading for each device, and labels."""
    devices = source.find()
    assert [device.id for device in source.find()] == [device.id for device in devices], "ids change"
    assert len({device.id for device in devices}) == len(devices), "two devices of one id"
    for device in devices:
        assert device.memory_bytes_total > 0, f"{device.id} has no memory"
        assert device.name, f"{device.id} has no name"
        assert device.is_simulated is is_simulated, f"{device.id} is not labelled"
    for _ in range(2):
        readings = source.read()
        assert [reading.device_id for reading in readings] == [device.id for device in devices], "readings are missing"
        for device, reading in zip(devices, readings, strict=True):
            assert 0 <= reading.memory_bytes_used <= device.memory_bytes_total, f"{device.id} uses more than it has"
            assert reading.utilisation is None or 0 <= reading.utilisation <= 1, f"{device.id} is a share of itself"
            assert reading.at_s > 0
            assert all(process.memory_bytes >= 0 for process in reading.processes)


@dataclass(frozen=True, slots=True)
class _Client:
    """Calls to one replica."""

    session: aiohttp.ClientSession
    endpoint: Endpoint
    model: str

    def post(self, path: str, body: Mapping[str, Any], key: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self.endpoint.api_key if key is None else key}"}
        return self.session.post(self.endpoint.base_url + path, json={"model": self.model, **body}, headers=headers)

    def chat(self, key: str | None = None, **body: Any) -> Any:
        return self.post("/v1/chat/completions", {"messages": MESSAGES, **body}, key)


async def _becomes_ready(node: Node, engine: Engine, report: ReplicaReport) -> None:
    assert report.state is ReplicaState.READY
    assert report.endpoint is not None
    assert report.slots >= 1, "no slots"
    assert report.context_tokens >= 1, "no context"
    assert report.abilities & {Ability.CHAT, Ability.COMPLETION}, "can do nothing"
    assert report.is_simulated is engine.facts.is_simulated, "not labelled"
    assert report.endpoint.api_key not in repr(report) or not report.endpoint.api_key, "the key shows"
    if not engine.facts.is_external:
        assert report.endpoint.base_url.startswith("http://127.0.0.1:"), "listens wider than loopback"
        assert len(report.endpoint.api_key) >= 32, "a key that can be guessed"
        assert report.pid is not None
        process = psutil.Process(report.pid)
        exposed = " ".join([*process.cmdline(), *process.environ().values()])
        assert report.endpoint.api_key not in exposed, "the key can be read from the process list"
        assert os.getpgid(report.pid) == report.pid, "not in a group of its own"
        assert {connection.laddr.ip for connection in process.net_connections() if connection.status == "LISTEN"} <= {
            "127.0.0.1"
        }, "listens wider than loopback"


async def _refuses_a_wrong_key(client: _Client) -> None:
    if not client.endpoint.api_key:
        return
    for key in ("wrong", "", client.endpoint.api_key[:-1], client.endpoint.api_key + "x"):
        assert await _status(client.chat(key, max_tokens=1)) in (401, None), "answered to a wrong key"
        headers = {"Authorization": f"Bearer {key}"}
        status = await _status(client.session.get(client.endpoint.base_url + "/v1/models", headers=headers))
        assert status == 401, f"answered {status} to a wrong key"


async def _answers(client: _Client) -> None:
    async with client.chat(max_tokens=8) as response:
        assert response.status == 200, await response.text()
        body = await response.json()
    assert body["choices"][0]["message"]["content"], "no text"
    assert body["choices"][0]["finish_reason"] in ("length", "stop")
    assert 0 < body["usage"]["completion_tokens"] <= 8, "max_tokens was not kept"
    assert body["usage"]["prompt_tokens"] > 0
    assert body["model"] == client.model, "another model's name"
    async with client.post("/v1/completions", {"prompt": "Once upon", "max_tokens": 4}) as response:
        assert response.status == 200, await response.text()
        assert (await response.json())["choices"][0]["text"]


async def _streams(client: _Client) -> None:
    async with client.chat(max_tokens=8, stream=True, stream_options={"include_usage": True}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        text = await response.text()
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]", f"ends with {events[-1]!r}"
    chunks = [json.loads(event) for event in events[:-1]]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(deltas), "no text"
    assert len([delta for delta in deltas if delta]) > 1, "all at once is no stream"
    assert chunks[-1]["usage"]["completion_tokens"] > 0, "no usage although asked for"
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


async def _survives_nonsense(client: _Client) -> None:
    headers = {"Authorization": f"Bearer {client.endpoint.api_key}", "Content-Type": "application/json"}
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"messages": 3}'):
        url = client.endpoint.base_url + "/v1/chat/completions"
        status = await _status(client.session.post(url, data=body, headers=headers))
        assert status is None or status >= 400, f"answered {status} to {body!r}"
    async with client.chat(max_tokens=1) as response:
        assert response.status == 200


async def _status(request: Any) -> int | None:
    """The status of the answer; None when the server closed while the body was sent, as one that refuses may."""
    try:
        async with request as response:
            return int(response.status)
    except aiohttp.ClientConnectionError:
        return None


async def _frees_slots_of_clients_that_leave(client: _Client, slots: int) -> None:
    async def begin_and_leave() -> None:
        # A reply of this length takes longer than the check may, unless leaving ends it.
        async with client.chat(max_tokens=4096, stream=True, ignore_eos=True) as response:
            await response.content.readline()
            response.close()

    for _ in range(2):
        await asyncio.gather(*(begin_and_leave() for _ in range(slots)))
    async with asyncio.timeout(PROMPT_S_MAX), client.chat(max_tokens=1) as response:
        assert response.status == 200, "a slot is still held by a client that left"


async def _ends(node: Node, engine: Engine, spec: ReplicaSpec, report: ReplicaReport) -> None:
    drained = node.daemon.drain(spec.id)
    assert drained.state is ReplicaState.DRAINING
    ended = await node.daemon.stop(spec.id)
    assert ended.state is ReplicaState.STOPPED, ended.reason
    assert (ended.pid, ended.endpoint) == (None, None)
    if engine.facts.is_external:
        return
    assert report.pid is not None
    assert report.endpoint is not None
    group = [pid for pid in psutil.pids() if _group_of(pid) == report.pid]
    assert not group, f"left behind: {group}"
    health = await engine.probe(report.endpoint, spec)
    assert health.state is HealthState.UNREACHABLE, f"a dead endpoint is {health.state}"
    assert health.detail, "unreachable without a reason"
    node.daemon.forget(ReplicaId(spec.id))
    assert spec.id not in {known.spec.id for known in node.daemon.replicas()}


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
