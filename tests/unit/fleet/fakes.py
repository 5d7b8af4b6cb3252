"""Stand-ins for what the fleet talks to: a store in memory, a journal that remembers, a node that records."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from fleetmind.core.clock import Clock
from fleetmind.core.errors import ConfigurationError, NotFound, StoreError
from fleetmind.core.events import Event
from fleetmind.core.types import ReplicaId
from fleetmind.node.protocol import (
    TRANSITIONS,
    Device,
    DeviceReading,
    Endpoint,
    ReplicaReport,
    ReplicaSpec,
    ReplicaState,
)
from fleetmind.testing.snapshots import make_device, make_reading


class MemoryDocuments:
    """The models of the store, in a dictionary."""

    def __init__(self) -> None:
        self.documents: dict[str, dict[str, object]] = {}
        self.events: list[Event] = []

    async def save(self, name: str, document: Mapping[str, object], *events: Event) -> None:
        self.documents[name] = dict(document)
        self.events += events

    async def all(self) -> dict[str, dict[str, object]]:
        return dict(self.documents)

    async def delete(self, name: str, *events: Event) -> bool:
        self.events += events
        return self.documents.pop(name, None) is not None


class MemoryJournal:
    """A journal that can be made to refuse, or to take its time."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.refuses = False
        self.may_write = asyncio.Event()
        self.may_write.set()

    async def append(self, *events: Event) -> None:
        await self.may_write.wait()
        if self.refuses:
            raise StoreError("no space left on device")
        self.events += events

    def kinds(self) -> list[str]:
        return [event.kind.value for event in self.events]


class RecordingNode:
    """Does what a node does to replicas, when the test says so, and records what it was told."""

    def __init__(self, clock: Clock, devices: tuple[Device, ...] = (make_device(),)) -> None:
        self.clock = clock
        self.found = devices
        self.used = {device.id: 0 for device in devices}
        self.reports: dict[ReplicaId, ReplicaReport] = {}
        self.told: list[tuple[str, ReplicaId]] = []
        self.refuses = ""
        self.reads = 0

    def devices(self) -> tuple[Device, ...]:
        return self.found

    async def read(self) -> tuple[DeviceReading, ...]:
        self.reads += 1
        return tuple(make_reading(device.id, used=self.used.get(device.id, 0)) for device in self.found)

    def replicas(self) -> tuple[ReplicaReport, ...]:
        return tuple(self.reports.values())

    def begin(self, spec: ReplicaSpec) -> ReplicaReport:
        if self.refuses:
            raise ConfigurationError(self.refuses)
        self.told.append(("begin", spec.id))
        self.reports[spec.id] = ReplicaReport(
            spec, ReplicaState.STARTING, None, spec.slots, spec.context_tokens, spec.abilities, self.clock.now_s()
        )
        return self.reports[spec.id]

    def drain(self, replica_id: ReplicaId) -> ReplicaReport:
        self.told.append(("drain", replica_id))
        return self.move(replica_id, ReplicaState.DRAINING)

    async def stop(self, replica_id: ReplicaId) -> ReplicaReport:
        if replica_id not in self.reports:
            raise NotFound(replica_id)
        self.told.append(("stop", replica_id))
        return self.move(replica_id, ReplicaState.STOPPED)

    async def check(self, replica_id: ReplicaId) -> ReplicaReport:
        if replica_id not in self.reports:
            raise NotFound(replica_id)
        self.told.append(("check", replica_id))
        return self.reports[replica_id]

    def forget(self, replica_id: ReplicaId) -> None:
        assert not TRANSITIONS[self.reports[replica_id].state]
        self.told.append(("forget", replica_id))
        del self.reports[replica_id]

    # What the test lets happen.

    def move(self, replica_id: ReplicaId, state: ReplicaState, reason: str = "") -> ReplicaReport:
        report = self.reports[replica_id]
        assert state in TRANSITIONS[report.state], (report.state, state)
        now_s = self.clock.now_s()
        if state is ReplicaState.READY:
            report = replace(report, endpoint=Endpoint("http://127.0.0.1:9"), ready_at_s=now_s)
        if state in (ReplicaState.FAILED, ReplicaState.STOPPED):
            report = replace(report, endpoint=None, ended_at_s=now_s)
        self.reports[replica_id] = replace(report, state=state, reason=reason)
        return self.reports[replica_id]

    def of(self, model: str, *states: ReplicaState) -> list[ReplicaId]:
        """Ids of a model's replicas in these states, any if none is given."""
        return [
            replica_id
            for replica_id, report in self.reports.items()
            if report.spec.model == model and (not states or report.state in states)
        ]

    def ready(self, model: str) -> ReplicaId:
        """Let the one starting replica of a model become ready."""
        (replica_id,) = self.of(model, ReplicaState.STARTING)
        self.move(replica_id, ReplicaState.READY)
        return replica_id

    def fail(self, model: str, reason: str = "it broke") -> ReplicaId:
        """Let the one replica of a model that is alive fail."""
        (replica_id,) = self.of(model, ReplicaState.STARTING, ReplicaState.READY)
        self.move(replica_id, ReplicaState.FAILED, reason)
        return replica_id

    def begun(self) -> int:
        return sum(what == "begin" for what, _ in self.told)
