"""Runs replicas on this machine: starts what it is told, watches it, ends it, and says what it sees.

It decides nothing about what runs where, has no database and speaks no HTTP to clients. The life of a replica is one
coroutine (``_live``): launch, wait until ready, wait for the end, clean up. Invariant: states change only along
``protocol.TRANSITIONS``, in ``_move``, which tells the listener of each; an ended replica has no process.
"""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleetmind.core.clock import Clock, secret_token
from fleetmind.core.errors import ConfigurationError, EngineStartFailed, FleetmindError, NotFound
from fleetmind.core.settings import NodeSettings
from fleetmind.core.telemetry import log
from fleetmind.core.types import DeviceId, ReplicaId, format_bytes
from fleetmind.node.devices import DeviceReader
from fleetmind.node.engine import Engine, Health, HealthState
from fleetmind.node.ledger import Ledger, LedgerEntry, Orphan
from fleetmind.node.logs import ReplicaLog, read_tail
from fleetmind.node.process import EngineProcess, ProcessBounds, Usage, free_port
from fleetmind.node.protocol import (
    TRANSITIONS,
    Device,
    DeviceProcess,
    DeviceReading,
    Endpoint,
    ReplicaReport,
    ReplicaSpec,
    ReplicaState,
)
from fleetmind.node.pulse import Pulse, judge

START_PROBE_S = 0.05
START_PROBE_S_MAX = 0.5
"""The pause between probes of a starting replica, growing from the first to the second."""
PROBE_S_MAX = 5.0
"""How long one probe may take."""
EXTERNAL_PROBE_INTERVAL_S = 15.0
"""A server that is not ours is asked less often: it may count requests."""
DYING_S_MAX = 2.0
"""How long the end of a process that has stopped listening is waited for; giving back a GPU's memory takes a while."""
LOGS_KEPT = 64
LOG_LINES_IN_REASON = 4
MEMORY_BYTES_FREE_OF_GRANT = 512 * 1024**2
"""What any engine may hold on top of its grant: interpreter, libraries, buffers of connections."""

_ALIVE = frozenset({ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING})
_SERVING = frozenset({ReplicaState.READY, ReplicaState.DRAINING})


@dataclass(slots=True, eq=False)
class _Replica:
    """What the daemon keeps of a replica beside its report. ``verdict`` is set to why its life is to end."""

    engine: Engine
    report: ReplicaReport
    verdict: asyncio.Future[str]
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    process: EngineProcess | None = None
    pulse: Pulse = field(default_factory=Pulse)
    probed_at_s: float = 0.0
    is_being_probed: bool = False
    is_stopping: bool = False

    @property
    def spec(self) -> ReplicaSpec:
        return self.report.spec

    def end(self, reason: str) -> None:
        """Ask for the end of its life; the first reason counts."""
        if not self.verdict.done():
            self.verdict.set_result(reason)


class NodeDaemon:
    """The replicas of this machine. Use from one event loop only."""

    def __init__(
        self,
        *,
        run_dir: Path,
        log_dir: Path,
        devices: DeviceReader,
        engines: Mapping[str, Engine],
        settings: NodeSettings,
        clock: Clock,
        on_change: Callable[[ReplicaReport], None],
        environ: Mapping[str, str] = os.environ,
        probe_s_max: float = PROBE_S_MAX,
    ) -> None:
        self._replicas_dir = run_dir / "replicas"
        self._log_dir = log_dir
        self._devices = devices
        self._engines = engines
        self._settings = settings
        self._clock = clock
        self._on_change = on_change
        self._environ = environ
        self._probe_s_max = probe_s_max
        self._ledger = Ledger(self._replicas_dir)
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._log = log("node")

    # -- life of the daemon -------------------------------------------------------------------------------------

    async def start(self) -> tuple[Orphan, ...]:
        """Find the devices and end what an earlier server left running; returns what was ended."""
        await self._devices.find()
        orphans = await asyncio.to_thread(self._ledger.end_orphans, self._settings.stop_grace_s)
        for orphan in orphans:
            self._log.warning("ended an orphan", replica=orphan.replica_id, model=orphan.model, pid=orphan.pid)
        await asyncio.to_thread(self._clear_leftovers)
        return orphans

    def loops(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """The coroutines that must run for as long as the daemon does, by name, for a Supervisor."""
        return {"node.watch": self._watch}

    async def close(self) -> None:
        """Stop every replica and return when all are gone."""
        await asyncio.gather(*(self.stop(replica_id) for replica_id in list(self._replicas)))

    # -- what it sees -------------------------------------------------------------------------------------------

    def devices(self) -> tuple[Device, ...]:
        """The devices of this machine, as found at the start."""
        return self._devices.devices()

    async def read(self) -> tuple[DeviceReading, ...]:
        """What the devices look like now. On a simulated device our replicas hold exactly what they were granted."""
        return tuple(self._with_granted(reading) for reading in await self._devices.read())

    def replicas(self) -> tuple[ReplicaReport, ...]:
        """Every replica that was begun and not forgotten."""
        return tuple(replica.report for replica in self._replicas.values())

    def log_tail(self, replica_id: ReplicaId, lines: int) -> list[str]:
        """The last lines its process printed, oldest first; also of a replica that is gone. A quick bounded read.

        Raises NotFound when no such replica ever ran here.
        """
        path = self._log_path(replica_id)
        if replica_id not in self._replicas and not path.is_file():
            raise NotFound(f"no replica {replica_id!r} ran here", near=sorted(self._replicas)[:3])
        return read_tail(path, lines)

    # -- what it is told ----------------------------------------------------------------------------------------

    def begin(self, spec: ReplicaSpec) -> ReplicaReport:
        """Start a replica and return at once. One that was begun already is only reported.

        Raises ConfigurationError for an engine or device that isn't there.
        """
        known = self._replicas.get(spec.id)
        if known is not None:
            return known.report
        engine, devices = self._engine_of(spec), self._devices_of(spec)
        _check_name(spec.id)
        replica = _Replica(
            engine=engine,
            report=ReplicaReport(
                spec=spec,
                state=ReplicaState.STARTING,
                endpoint=None,
                slots=spec.slots,
                context_tokens=spec.context_tokens,
                abilities=spec.abilities,
                created_at_s=self._clock.now_s(),
                is_simulated=engine.facts.is_simulated or any(device.is_simulated for device in devices),
            ),
            verdict=asyncio.get_running_loop().create_future(),
        )
        self._replicas[spec.id] = replica
        self._spawn(self._live(replica), name=f"replica {spec.id}")
        self._on_change(replica.report)
        return replica.report

    async def ensure_ready(self, spec: ReplicaSpec) -> ReplicaReport:
        """Begin ``spec`` if needed and return once it is ready. Raises EngineStartFailed when it cannot be."""
        self.begin(spec)
        replica = self._replicas[spec.id]
        await replica.settled.wait()
        if replica.report.state is not ReplicaState.READY:
            raise EngineStartFailed(
                f"{spec.model} is {replica.report.state}: {replica.report.reason or 'it was stopped'}",
                hint=f"see the replica's log: fleetmind logs {spec.id}",
            )
        return replica.report

    def drain(self, replica_id: ReplicaId) -> ReplicaReport:
        """Mark it as taking no more calls; it keeps serving those it has. Ended ones stay as they are."""
        replica = self._get(replica_id)
        if replica.report.state in (ReplicaState.STARTING, ReplicaState.READY):
            self._move(replica, ReplicaState.DRAINING)
        return replica.report

    async def stop(self, replica_id: ReplicaId) -> ReplicaReport:
        """End it (SIGTERM, grace, SIGKILL, to the whole group) and return when it is gone."""
        replica = self._get(replica_id)
        if replica.report.state in _ALIVE:
            self.drain(replica_id)
            replica.is_stopping = True
            replica.end("")
        await replica.ended.wait()
        return replica.report

    async def check(self, replica_id: ReplicaId) -> ReplicaReport:
        """Probe it now and not at the next interval, because somebody saw it fail.

        A dying process closes its connections before its end can be seen, so one that doesn't listen any more is waited
        for: the report then says FAILED, and whoever asked does not try the dead one again.
        """
        replica = self._get(replica_id)
        if replica.report.state in _SERVING:
            await self._probe(replica)
        if replica.report.state in _SERVING and replica.pulse.failures and not await self._listens(replica):
            with suppress(TimeoutError):
                async with asyncio.timeout(DYING_S_MAX):
                    await replica.ended.wait()
        return replica.report

    def forget(self, replica_id: ReplicaId) -> None:
        """Drop an ended replica from ``replicas``; its log stays for a while."""
        if replica_id in self._replicas:
            assert self._replicas[replica_id].ended.is_set(), f"{replica_id} has not ended"
            del self._replicas[replica_id]

    # -- the life of a replica ----------------------------------------------------------------------------------

    async def _live(self, replica: _Replica) -> None:
        """1 launch, 2 wait until ready, 3 wait for a reason to end, 4 clean up. The outermost handler of a replica."""
        reason = "the server stopped"
        try:
            endpoint = await self._launch(replica)  # 1
            async with asyncio.TaskGroup() as group:
                watches = [group.create_task(self._await_ready(replica, endpoint))]  # 2
                if replica.process is not None:
                    watches.append(group.create_task(self._await_exit(replica, replica.process)))
                reason = await replica.verdict  # 3
                for watch in watches:
                    watch.cancel()
        except FleetmindError as fault:
            reason = fault.message
        except OSError as fault:  # a full disk, no more processes
            reason = str(fault)
        except Exception as fault:  # noqa: BLE001 - one replica's unforeseen fault must not take the daemon along
            self._log.exception("the life of a replica broke", fault, replica=replica.spec.id)
            reason = f"unforeseen fault: {fault!r}"
        finally:
            await self._clean_up(replica)  # 4
            if replica.is_stopping:
                self._move(replica, ReplicaState.STOPPED)
            else:
                self._move(replica, ReplicaState.FAILED, reason=self._with_last_lines(replica, reason))
            replica.ended.set()

    async def _launch(self, replica: _Replica) -> Endpoint:
        spec, engine = replica.spec, replica.engine
        external = await engine.endpoint(spec)
        if external is not None:
            return self._show(replica, endpoint=external).endpoint or external
        endpoint = Endpoint(f"http://127.0.0.1:{free_port()}", secret_token().hex())
        command = await asyncio.to_thread(engine.command, spec, self._devices_of(spec), endpoint)
        directory = self._replicas_dir / spec.id
        replica.process = process = await EngineProcess.start(
            command,
            directory=directory,
            log=ReplicaLog(self._log_path(spec.id), self._settings.log_bytes_max),
            bounds=ProcessBounds(),
            environ=self._environ,
        )
        entry = LedgerEntry(spec.id, process.pid, process.identity, command.argv[0], spec.model)
        await asyncio.to_thread(self._ledger.write, entry)
        self._show(replica, endpoint=endpoint, pid=process.pid)
        process.deliver(command.stdin)
        return endpoint

    async def _await_ready(self, replica: _Replica, endpoint: Endpoint) -> None:
        deadline_s = self._clock.monotonic_s() + self._settings.start_s_max
        pause_s, health = START_PROBE_S, Health(HealthState.UNREACHABLE, detail="was not asked yet")
        while self._clock.monotonic_s() < deadline_s:
            # The key is shown only to a process of ours: until it listens, anybody could have taken the port.
            if replica.process is None or await replica.process.owns_port(_port_of(endpoint)):
                health = await self._ask(replica, endpoint)
            if health.state is HealthState.READY:
                self._become_ready(replica, health)
                return
            if health.state is HealthState.FAILED:
                replica.end(health.detail)
                return
            if replica.process is None and replica.report.reason != health.detail:  # what the server elsewhere lacks
                self._show(replica, reason=health.detail)
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 1.2, START_PROBE_S_MAX)
        replica.end(f"not ready after {self._settings.start_s_max:.0f} s: {health.state} {health.detail}".rstrip())

    def _become_ready(self, replica: _Replica, health: Health) -> None:
        replica.probed_at_s = self._clock.monotonic_s()
        if replica.report.state is not ReplicaState.STARTING:  # drained meanwhile
            return
        self._move(
            replica,
            ReplicaState.READY,
            slots=health.slots or replica.spec.slots,
            context_tokens=health.context_tokens or replica.spec.context_tokens,
            abilities=health.abilities or replica.spec.abilities,
            engine_version=health.version,
            ready_at_s=self._clock.now_s(),
            reason=health.detail,
        )

    async def _await_exit(self, replica: _Replica, process: EngineProcess) -> None:
        ended = await process.wait()
        replica.end(f"the process {ended.words()}")

    async def _clean_up(self, replica: _Replica) -> None:
        if replica.process is not None:
            ended = await replica.process.stop(self._settings.stop_grace_s)
            if ended.code is None:  # it stays in the ledger: the next start will try again
                self._log.error("a process does not end", replica=replica.spec.id, pid=replica.process.pid)
                return
        await asyncio.to_thread(self._erase, replica.spec.id)

    # -- watching -----------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Probe every serving replica, again and again; one that does not answer holds up no other."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._clock.sleep(self._settings.probe_interval_s)
                for replica in self._replicas.values():
                    if not replica.is_being_probed and self._is_due(replica):
                        group.create_task(self._probe(replica))

    async def _listens(self, replica: _Replica) -> bool:
        endpoint = replica.report.endpoint
        if replica.process is None or endpoint is None:  # not ours to look into
            return True
        return await replica.process.owns_port(_port_of(endpoint))

    def _is_due(self, replica: _Replica) -> bool:
        since_s = self._clock.monotonic_s() - replica.probed_at_s
        is_ours = replica.process is not None
        return replica.report.state in _SERVING and (is_ours or since_s >= EXTERNAL_PROBE_INTERVAL_S)

    async def _probe(self, replica: _Replica) -> None:
        endpoint = replica.report.endpoint
        assert endpoint is not None
        replica.is_being_probed = True
        try:
            health = await self._ask(replica, endpoint)
            usage = await replica.process.usage() if replica.process else Usage(0.0, 0)
        finally:
            replica.is_being_probed = False
        if replica.report.state not in _SERVING:
            return
        replica.probed_at_s = self._clock.monotonic_s()
        progress = usage.cpu_s + (replica.process.log.bytes_written if replica.process else 0)
        replica.pulse, reason = judge(replica.pulse, health, progress=progress, at_s=replica.probed_at_s)
        reason = reason or self._overdraft(replica.spec, usage)
        if reason:
            replica.end(reason)

    async def _ask(self, replica: _Replica, endpoint: Endpoint) -> Health:
        try:
            async with asyncio.timeout(self._probe_s_max):
                return await replica.engine.probe(endpoint, replica.spec)
        except TimeoutError:
            return Health(HealthState.UNREACHABLE, detail=f"no answer within {self._probe_s_max:g} s")

    def _overdraft(self, spec: ReplicaSpec, usage: Usage) -> str:
        bound = int(spec.memory_bytes * self._settings.engine_memory_factor) + MEMORY_BYTES_FREE_OF_GRANT
        if not spec.memory_bytes or not self._settings.engine_memory_factor or usage.memory_bytes <= bound:
            return ""
        return (
            f"holds {format_bytes(usage.memory_bytes)} of memory; it was granted {format_bytes(spec.memory_bytes)} "
            f"and may hold {format_bytes(bound)} (node.engine_memory_factor)"
        )

    # -- small things -------------------------------------------------------------------------------------------

    def _move(self, replica: _Replica, state: ReplicaState, **changes: Any) -> None:
        """The only place where a state changes."""
        before = replica.report.state
        assert state in TRANSITIONS[before], f"{replica.spec.id}: {before} to {state}"
        if state in (ReplicaState.STOPPED, ReplicaState.FAILED):
            changes |= {"ended_at_s": self._clock.now_s(), "pid": None, "endpoint": None}
        replica.report = replace(replica.report, state=state, **changes)
        if state is not ReplicaState.STARTING:
            replica.settled.set()
        self._log.info(
            "replica moved",
            replica=replica.spec.id,
            model=replica.spec.model,
            state=state.value,
            reason=replica.report.reason,
        )
        self._on_change(replica.report)

    def _show(self, replica: _Replica, **changes: Any) -> ReplicaReport:
        replica.report = replace(replica.report, **changes)
        self._on_change(replica.report)
        return replica.report

    def _spawn(self, life: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(life, name=name)
        self._lives.add(task)
        task.add_done_callback(self._lives.discard)

    def _get(self, replica_id: ReplicaId) -> _Replica:
        try:
            return self._replicas[replica_id]
        except KeyError:
            raise NotFound(f"no replica {replica_id!r} is here", near=sorted(self._replicas)[:3]) from None

    def _engine_of(self, spec: ReplicaSpec) -> Engine:
        engine = self._engines.get(spec.engine)
        if engine is None:
            raise ConfigurationError(
                f"{spec.model}: there is no engine {spec.engine!r}",
                hint=f"use one of {', '.join(sorted(self._engines))}",
                param="engine",
            )
        for fact, value, name in (
            (engine.facts.needs_file, spec.path, "path"),
            (engine.facts.needs_url, spec.url, "url"),
        ):
            if fact and not value:
                raise ConfigurationError(f"{spec.model}: the engine {spec.engine} needs a {name}", param=name)
        return engine

    def _devices_of(self, spec: ReplicaSpec) -> Sequence[Device]:
        by_id = {device.id: device for device in self._devices.devices()}
        missing = [device_id for device_id in spec.device_ids if device_id not in by_id]
        if missing:
            raise ConfigurationError(f"{spec.model}: there is no device {missing[0]}", param="device_ids")
        return [by_id[device_id] for device_id in spec.device_ids]

    def _with_granted(self, reading: DeviceReading) -> DeviceReading:
        if not self._is_simulated(reading.device_id):
            return reading
        ours = tuple(
            DeviceProcess(report.pid or 0, report.spec.model, report.spec.memory_bytes)
            for report in self.replicas()
            if reading.device_id in report.spec.device_ids and report.state in _ALIVE
        )
        return replace(
            reading,
            memory_bytes_used=reading.memory_bytes_used + sum(process.memory_bytes for process in ours),
            processes=reading.processes + ours,
        )

    def _is_simulated(self, device_id: DeviceId) -> bool:
        return any(device.id == device_id and device.is_simulated for device in self._devices.devices())

    def _with_last_lines(self, replica: _Replica, reason: str) -> str:
        lines = read_tail(self._log_path(replica.spec.id), LOG_LINES_IN_REASON) if replica.process else []
        return f"{reason}; its log ends: {' | '.join(line.strip() for line in lines)}" if lines else reason

    def _log_path(self, replica_id: ReplicaId) -> Path:
        _check_name(replica_id)
        return self._log_dir / f"{replica_id}.log"

    def _erase(self, replica_id: ReplicaId) -> None:
        self._ledger.remove(replica_id)
        shutil.rmtree(self._replicas_dir / replica_id, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Remove the directories of replicas that are gone, and the oldest logs."""
        for directory in (self._replicas_dir, self._log_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._replicas_dir.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        logs = sorted(self._log_dir.glob("*.log*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in logs[LOGS_KEPT:]:
            with suppress(OSError):
                path.unlink()


def _port_of(endpoint: Endpoint) -> int:
    return int(endpoint.base_url.rpartition(":")[2])


def _check_name(replica_id: str) -> None:
    if not replica_id or replica_id.startswith(".") or not set(replica_id) <= _NAME_CHARACTERS:
        raise NotFound(f"{replica_id!r} is not the id of a replica")


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
