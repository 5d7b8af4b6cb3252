"""The daemon with real processes: the fake engine, and engines that break on purpose."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fleetmind.core.clock import SystemClock
from fleetmind.core.errors import ConfigurationError, EngineStartFailed, NotFound
from fleetmind.core.settings import NodeSettings
from fleetmind.core.types import MIB, DeviceId, ModelName, ReplicaId
from fleetmind.node.engine import Command, EngineFacts, Health, HealthState
from fleetmind.node.engines.fake import Fake
from fleetmind.node.engines.remote import Remote
from fleetmind.node.ledger import Ledger, LedgerEntry, process_identity
from fleetmind.node.protocol import TRANSITIONS, Device, Endpoint, ReplicaReport, ReplicaSpec, ReplicaState
from fleetmind.node.simulated import SimulatedDevices
from fleetmind.testing.nodes import Node, running_node

QUICK = NodeSettings(probe_interval_s=0.05, start_s_max=10, stop_grace_s=0.5, llama_server="off")


def spec(node: Node, name: str = "r-1", engine: str = "fake", **more: Any) -> ReplicaSpec:
    fields: dict[str, Any] = {
        "device_ids": tuple(device.id for device in node.daemon.devices()[:1]),
        "context_tokens": 512,
        "slots": 2,
    }
    return ReplicaSpec(id=ReplicaId(name), model=ModelName("a-model"), engine=engine, **(fields | more))


def fake(node: Node, name: str = "r-1", **options: object) -> ReplicaSpec:
    return spec(node, name, options=options)


def states(node: Node, name: str = "r-1") -> list[ReplicaState]:
    """The states a replica went through, without repetition."""
    seen = [report.state for report in node.changes.seen if report.spec.id == name]
    return [state for at, state in enumerate(seen) if at == 0 or seen[at - 1] is not state]


async def turn_knob(report: ReplicaReport, **knobs: object) -> None:
    assert report.endpoint is not None
    headers = {"Authorization": f"Bearer {report.endpoint.api_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(report.endpoint.base_url + "/fake/knobs", json=knobs) as response,
    ):
        assert response.status == 200


async def test_a_life_goes_along_the_table(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake()], settings=QUICK) as node:
        begun = node.daemon.begin(fake(node))
        assert begun.state is ReplicaState.STARTING
        ready = await node.daemon.ensure_ready(fake(node))
        assert (ready.slots, ready.context_tokens, ready.engine_version) == (2, 512, "fake-1 (simulated)")
        assert ready.is_simulated
        assert ready.ready_at_s is not None
        assert ready.ready_at_s >= ready.created_at_s
        assert node.daemon.begin(fake(node)) is ready, "begun twice"
        assert node.daemon.drain(ReplicaId("r-1")).state is ReplicaState.DRAINING
        ended = await node.daemon.stop(ReplicaId("r-1"))
        assert ended.state is ReplicaState.STOPPED
        assert await node.daemon.stop(ReplicaId("r-1")) == ended
        assert node.daemon.drain(ReplicaId("r-1")) == ended
        assert states(node) == ["starting", "ready", "draining", "stopped"]
        assert list((tmp_path / "run" / "replicas").iterdir()) == []
        node.daemon.forget(ReplicaId("r-1"))
        assert node.daemon.replicas() == ()
        assert node.daemon.log_tail(ReplicaId("r-1"), 10)


async def test_the_end_of_a_process_is_seen_at_once_and_explained(tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"probe_interval_s": 3600.0})
    async with running_node(tmp_path, [Fake()], settings=settings) as node:
        ready = await node.daemon.ensure_ready(fake(node))
        assert ready.pid is not None
        os.kill(ready.pid, signal.SIGSEGV)
        failed = await node.changes.expect_state(ReplicaState.FAILED, within_s=2)
        assert "was killed by signal 11 (SIGSEGV)" in failed.reason
        assert "its log ends: fake engine (simulated) serves a-model" in failed.reason
        assert (failed.pid, failed.endpoint) == (None, None)
        with pytest.raises(EngineStartFailed, match="SIGSEGV"):
            await node.daemon.ensure_ready(fake(node))


async def test_a_crash_at_the_start_fails_the_start(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake()], settings=QUICK) as node:
        with pytest.raises(EngineStartFailed, match="exited with code 1; its log ends: simulated crash at the start"):
            await node.daemon.ensure_ready(fake(node, crash_on_start=True))


async def test_a_start_has_an_end(tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"start_s_max": 0.5})
    async with running_node(tmp_path, [Fake()], settings=settings) as node:
        with pytest.raises(EngineStartFailed, match=r"not ready after 0 s|not ready after 1 s") as caught:
            await node.daemon.ensure_ready(fake(node, never_ready=True))
        assert "loading" in caught.value.message or "unreachable" in caught.value.message


async def test_a_start_can_be_stopped(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake()], settings=QUICK) as node:
        waiting = asyncio.ensure_future(node.daemon.ensure_ready(fake(node, never_ready=True)))
        await node.changes.expect(lambda report: report.pid is not None)
        await node.daemon.stop(ReplicaId("r-1"))
        with pytest.raises(EngineStartFailed):
            await waiting
        assert states(node) == ["starting", "draining", "stopped"]


async def test_an_engine_deaf_to_the_signal_is_killed(tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"stop_grace_s": 0.1})
    async with running_node(tmp_path, [Fake()], settings=settings) as node:
        ready = await node.daemon.ensure_ready(fake(node, ignore_sigterm=True))
        assert ready.pid is not None
        assert (await node.daemon.stop(ReplicaId("r-1"))).state is ReplicaState.STOPPED
        assert process_identity(ready.pid) is None


async def test_an_engine_that_falls_silent_is_given_up_with_a_reason(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake()], settings=QUICK, probe_s_max=0.1) as node:
        ready = await node.daemon.ensure_ready(fake(node))
        await turn_knob(ready, silent=True)
        failed = await node.changes.expect_state(ReplicaState.FAILED)
        assert "hangs" in failed.reason
        assert ready.pid is not None
        assert process_identity(ready.pid) is None


async def test_a_busy_engine_is_not_given_up(tmp_path: Path) -> None:
    """It computes and does not answer: here a thread that spins while the server is silent."""
    settings = QUICK.model_copy(update={"probe_interval_s": 0.2})
    async with running_node(tmp_path, [Spinning()], settings=settings, probe_s_max=0.1) as node:
        engine = node.daemon._engines["spinning"]
        assert isinstance(engine, Spinning)
        await node.daemon.ensure_ready(spec(node, engine="spinning"))
        engine.is_silent = True
        before = engine.probes
        async with asyncio.timeout(20):
            while engine.probes < before + 12:
                await asyncio.sleep(0.01)
        assert node.daemon.replicas()[0].state is ReplicaState.READY


async def test_check_probes_now(tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"probe_interval_s": 3600.0})
    async with running_node(tmp_path, [Fake()], settings=settings, probe_s_max=0.1) as node:
        ready = await node.daemon.ensure_ready(fake(node))
        assert (await node.daemon.check(ReplicaId("r-1"))).state is ReplicaState.READY
        await turn_knob(ready, silent=True)
        for _ in range(3):
            await node.daemon.check(ReplicaId("r-1"))
        await node.changes.expect_state(ReplicaState.FAILED, within_s=5)


async def test_check_learns_of_a_death_that_has_just_happened(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake()], settings=QUICK) as node:
        ready = await node.daemon.ensure_ready(fake(node))
        assert ready.pid is not None
        os.kill(ready.pid, signal.SIGKILL)
        assert (await node.daemon.check(ReplicaId("r-1"))).state is ReplicaState.FAILED


async def test_a_stolen_port_never_sees_the_key(tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"start_s_max": 0.6})
    thief = Thief()
    async with running_node(tmp_path, [thief], settings=settings) as node:
        with pytest.raises(EngineStartFailed):
            await node.daemon.ensure_ready(spec(node, engine="thief"))
    assert thief.has_listened
    assert thief.probes == 0
    thief.close()


async def test_memory_far_over_the_grant_ends_a_replica(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake()], settings=QUICK) as node:
        wanted = replace(fake(node, memory_bytes=560 * MIB), memory_bytes=10 * MIB)
        await node.daemon.ensure_ready(wanted)
        failed = await node.changes.expect_state(ReplicaState.FAILED)
        assert "was granted 10.0 MiB" in failed.reason
        assert "node.engine_memory_factor" in failed.reason


async def test_what_cannot_be_started_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake(), Remote({})], settings=QUICK) as node:
        for wrong, what in (
            (spec(node, engine="vllm"), "no engine 'vllm'"),
            (spec(node, device_ids=(DeviceId("GPU-9"),)), "no device GPU-9"),
            (spec(node, engine="remote"), "needs a url"),
        ):
            with pytest.raises(ConfigurationError, match=what):
                node.daemon.begin(wrong)
        for name in ("../../etc/passwd", "", ".", "a/b", "a\0b"):
            with pytest.raises(NotFound):
                node.daemon.begin(fake(node, name))
            with pytest.raises(NotFound):
                node.daemon.log_tail(ReplicaId(name), 5)
        assert node.daemon.replicas() == ()
        with pytest.raises(NotFound):
            await node.daemon.stop(ReplicaId("r-9"))


async def test_an_unknown_knob_fails_the_start_by_name(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake()], settings=QUICK) as node:
        with pytest.raises(EngineStartFailed, match="did you mean 'tokens_per_s'"):
            await node.daemon.ensure_ready(fake(node, tokens_pre_s=1))


async def test_closing_ends_everything_and_keeps_no_key_on_disk(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake()], settings=QUICK) as node:
        reports = await asyncio.gather(*(node.daemon.ensure_ready(fake(node, f"r-{at}")) for at in range(3)))
        keys = [report.endpoint.api_key for report in reports if report.endpoint]
        assert len(set(keys)) == 3
        on_disk = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert not any(key.encode() in on_disk for key in keys)
    assert [process_identity(report.pid or 0) for report in reports] == [None, None, None]
    assert {report.state for report in node.daemon.replicas()} == {ReplicaState.STOPPED}


async def test_an_orphan_of_an_earlier_server_is_ended_at_the_start(tmp_path: Path) -> None:
    orphan = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import signal; signal.pause()", start_new_session=True
    )
    identity = process_identity(orphan.pid)
    assert identity is not None
    directory = tmp_path / "run" / "replicas"
    Ledger(directory).write(LedgerEntry("r-0", orphan.pid, identity, sys.executable, "a-model"))
    (directory / "r-0").mkdir()
    (directory / "r-0" / "api-key").write_text("old")
    async with running_node(tmp_path, [Fake()], settings=QUICK) as node:
        assert [(ended.replica_id, ended.pid) for ended in node.orphans] == [("r-0", orphan.pid)]
        assert list(directory.iterdir()) == []
    await orphan.wait()


async def test_a_remote_that_refuses_the_key_fails_with_that_reason(tmp_path: Path) -> None:
    async with running_node(tmp_path, [Fake(), Remote({"FAR_KEY": "wrong"})], settings=QUICK) as node:
        far = await node.daemon.ensure_ready(fake(node, "far"))
        assert far.endpoint is not None
        near = spec(node, "near", "remote", url=far.endpoint.base_url + "/v1", key_env="FAR_KEY", device_ids=())
        with pytest.raises(EngineStartFailed, match=r"refuses the key in FAR_KEY \(401\)"):
            await node.daemon.ensure_ready(near)
        with pytest.raises(EngineStartFailed, match=r"variable NO_KEY .* is not set"):
            await node.daemon.ensure_ready(replace(near, id=ReplicaId("near-2"), key_env="NO_KEY"))


async def test_a_remote_that_is_away_says_so_while_it_is_waited_for(tmp_path: Path) -> None:
    with socket.socket() as taken:  # a port that nobody listens on
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        quick = QUICK.model_copy(update={"start_s_max": 0.3})
        async with running_node(tmp_path, [Remote({})], settings=quick) as node:
            with pytest.raises(EngineStartFailed):
                await node.daemon.ensure_ready(spec(node, "away", "remote", url=url, device_ids=()))
            waiting = [report.reason for report in node.changes.seen if report.state is ReplicaState.STARTING]
    assert any("refused" in reason.lower() or "connect" in reason.lower() for reason in waiting), waiting


async def test_a_simulated_device_holds_what_its_replicas_were_granted(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text("devices: [{name: card, memory: 11GiB, count: 2, foreign_memory: 1GiB}]")
    sources = [SimulatedDevices(path, SystemClock())]
    async with running_node(tmp_path, [Fake()], settings=QUICK, sources=sources) as node:
        ready = await node.daemon.ensure_ready(replace(fake(node), memory_bytes=512 * MIB))
        first, second = await node.daemon.read()
        assert first.memory_bytes_used == 1536 * MIB
        assert [process.name for process in first.processes] == ["foreign (simulated)", "a-model"]
        assert first.processes[1].pid == ready.pid
        assert second.memory_bytes_used == 1024 * MIB
        await node.daemon.stop(ReplicaId("r-1"))
        assert (await node.daemon.read())[0].memory_bytes_used == 1024 * MIB


async def test_a_process_that_changes_its_log_into_a_flood_still_serves(tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"log_bytes_max": 100_000})
    async with running_node(tmp_path, [Fake()], settings=settings) as node:
        await node.daemon.ensure_ready(fake(node, log_bytes=5_000_000))
        assert sum(path.stat().st_size for path in (tmp_path / "logs").iterdir()) <= 100_000


def test_every_state_has_its_row() -> None:
    assert set(TRANSITIONS) == set(ReplicaState)


class _Program:
    """An engine for tests: a Python program, and a probe under the test's control."""

    name = "program"
    code = "import signal; signal.pause()"

    def __init__(self) -> None:
        self.probes = 0
        self.is_silent = False

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(name=self.name)

    def command(self, spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint) -> Command:
        port = endpoint.base_url.rpartition(":")[2]
        return Command(argv=(sys.executable, "-c", self.code, port))

    async def endpoint(self, spec: ReplicaSpec) -> Endpoint | None:
        return None

    async def probe(self, endpoint: Endpoint, spec: ReplicaSpec) -> Health:
        self.probes += 1
        return Health(HealthState.UNREACHABLE, detail="silent") if self.is_silent else Health(HealthState.READY)


class Spinning(_Program):
    """Listens, and computes without end."""

    name = "spinning"
    code = "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1])))\nwhile True: pass"


class Thief(_Program):
    """Takes the port before the engine's process can, and waits for somebody to show the key."""

    name = "thief"

    def __init__(self) -> None:
        super().__init__()
        self._sockets: list[socket.socket] = []

    @property
    def has_listened(self) -> bool:
        return bool(self._sockets)

    def command(self, spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint) -> Command:
        port = int(endpoint.base_url.rpartition(":")[2])
        self._sockets.append(socket.create_server(("127.0.0.1", port)))
        return super().command(spec, devices, endpoint)

    def close(self) -> None:
        for taken in self._sockets:
            taken.close()
