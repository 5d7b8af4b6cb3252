"""The fleet as it is known now: keeps the latest FleetSnapshot and makes the next one when something changes.

It observes and adds up; it decides nothing and talks to nobody. Everything here runs in the event loop and returns at
once. The invariant: ``snapshot`` is one attribute read, and its ``version`` rises exactly when a model, a replica or a
model's status changed, after which every subscriber has been told.
"""

from collections.abc import Callable, Iterable, Mapping

from fleetmind.core.clock import Clock
from fleetmind.core.types import DeviceId, ModelName, ReplicaId
from fleetmind.fleet.catalog import Catalog
from fleetmind.fleet.snapshot import DeviceView, FleetSnapshot, ModelStatus, ReplicaView, serves_same, snapshot
from fleetmind.node.protocol import Device, DeviceKind, DeviceReading, ReplicaReport, ReplicaState

_HOLDING = frozenset({ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING})
_LOADED = frozenset({ReplicaState.READY, ReplicaState.DRAINING})


class Inventory:
    """Models, devices and replicas, as last seen. Follows ``catalog`` by itself. ``calls_ahead`` is per engine."""

    def __init__(self, catalog: Catalog, clock: Clock, *, calls_ahead: Mapping[str, int] | None = None) -> None:
        self._catalog = catalog
        self._clock = clock
        self._calls_ahead = dict(calls_ahead or {})
        self._devices: tuple[Device, ...] = ()
        self._readings: dict[DeviceId, DeviceReading] = {}
        self._foreign: dict[DeviceId, int] = {}
        self._measured: dict[tuple[DeviceId, ReplicaId], int] = {}
        self._reports: dict[ReplicaId, ReplicaReport] = {}
        self._pids: dict[ReplicaId, int] = {}
        self._outdated: set[ReplicaId] = set()
        self._statuses: dict[ModelName, ModelStatus] = {}
        self._subscribers: list[Callable[[FleetSnapshot], None]] = []
        self._snapshot = snapshot(version=0, at_s=clock.now_s(), devices=(), models=catalog.models(), replicas=())
        catalog.subscribe(self.models_changed)

    def snapshot(self) -> FleetSnapshot:
        """The fleet as known now."""
        return self._snapshot

    def subscribe(self, callback: Callable[[FleetSnapshot], None]) -> None:
        """Call back, in the loop, with each snapshot whose version is new. It must return at once and not raise."""
        self._subscribers.append(callback)

    def models_changed(self) -> None:
        """The catalogue changed. Called by the catalogue itself; calling it once more does no harm.

        Replicas of a model that is gone, or another one by now, serve no more calls from this moment on: not even for a
        model that gets the same name before they have been stopped.
        """
        before, models = self._snapshot.models, self._catalog.models()
        if models == before:
            return
        for report in self._reports.values():
            old, new = before.get(report.spec.model), models.get(report.spec.model)
            if old is None or new is None or not serves_same(old, new):
                self._outdated.add(report.spec.id)
        self._statuses = {name: status for name, status in self._statuses.items() if name in self._catalog}
        self._renew(is_change=True)

    def set_devices(self, devices: Iterable[Device]) -> None:
        """The devices there are; said once at start, and again when that changes."""
        self._devices = tuple(sorted(devices, key=lambda device: device.id))
        self._renew(is_change=False)

    def observe_replica(self, report: ReplicaReport) -> None:
        """A replica as its node sees it now."""
        replica_id = report.spec.id
        if self._reports.get(replica_id) == report:
            return
        self._reports[replica_id] = report
        if report.pid is not None:
            # Kept after its end: a reading from before that still lists the process, and it was ours.
            self._pids[replica_id] = report.pid
        self._renew(is_change=True)

    def forget_replica(self, replica_id: ReplicaId) -> None:
        """A replica that has ended need not be shown any more."""
        self._pids.pop(replica_id, None)
        self._outdated.discard(replica_id)
        if self._reports.pop(replica_id, None) is not None:
            self._renew(is_change=True)

    def observe_readings(self, readings: Iterable[DeviceReading]) -> None:
        """What the devices look like now. No change of version: a reading decides nothing for a call."""
        for reading in readings:
            self._readings[reading.device_id] = reading
            self._attribute(reading)
        self._renew(is_change=False)

    def set_statuses(self, statuses: Mapping[ModelName, ModelStatus]) -> None:
        """Why the models without a ready replica have none.

        The version rises when one begins or ceases to be failed, which is what calls wait for; a countdown or a number
        in a text moves all the time and is only shown.
        """
        changed = _failed(statuses) != _failed(self._statuses)
        self._statuses = dict(statuses)
        self._renew(is_change=changed)

    def _attribute(self, reading: DeviceReading) -> None:
        """Part what is used of a device into ours and foreign, with the replicas of the moment of reading.

        A process is ours when a replica has its pid. Where the device doesn't name processes with their memory (the
        processor, some virtual machines), a loaded replica is taken to use what it was granted, less the weights on the
        processor: they are mapped from the file, and the system counts such pages as available. On a simulated device
        the node reports our replicas' grants as used, also of those that have no process yet.
        """
        device = next((device for device in self._devices if device.id == reading.device_id), None)
        if device is None:
            return
        shown = {process.pid: process.memory_bytes for process in reading.processes}
        names_processes = device.kind is not DeviceKind.CPU
        ours = 0
        for report in self._reports.values():
            replica_id, share = report.spec.id, _share(report)
            self._measured.pop((device.id, replica_id), None)
            if device.id not in report.spec.device_ids:
                continue
            pid = self._pids.get(replica_id)
            if device.is_simulated:
                ours += share if report.state in _HOLDING else 0
            elif names_processes and pid is not None and shown.get(pid):
                ours += shown[pid]
                self._measured[device.id, replica_id] = shown[pid]
            elif report.state in _LOADED:
                model = self._catalog.find(report.spec.model)
                mapped = model.shape.weights_bytes if model and model.shape and not names_processes else 0
                ours += max(0, share - mapped)
        self._foreign[device.id] = max(0, reading.memory_bytes_used - ours)

    def _renew(self, *, is_change: bool) -> None:
        self._snapshot = snapshot(
            version=self._snapshot.version + is_change,
            at_s=self._clock.now_s(),
            devices=tuple(self._view(device) for device in self._devices),
            models=self._catalog.models(),
            replicas=tuple(
                _replica_view(report, self._calls_ahead.get(report.spec.engine, 0))
                for _, report in sorted(self._reports.items())
            ),
            statuses=self._statuses,
            outdated=self._outdated,
        )
        if is_change:
            for callback in self._subscribers:
                callback(self._snapshot)

    def _view(self, device: Device) -> DeviceView:
        granted = sum(
            max(_share(report), self._measured.get((device.id, report.spec.id), 0))
            for report in self._reports.values()
            if device.id in report.spec.device_ids and report.state in _HOLDING
        )
        return DeviceView(device, self._readings.get(device.id), granted, self._foreign.get(device.id, 0))


def _share(report: ReplicaReport) -> int:
    """What a replica was granted of each of its devices, rounded up."""
    return -(-report.spec.memory_bytes // max(1, len(report.spec.device_ids)))


def _replica_view(report: ReplicaReport, calls_ahead: int) -> ReplicaView:
    return ReplicaView(
        id=report.spec.id,
        model=report.spec.model,
        state=report.state,
        device_ids=report.spec.device_ids,
        memory_bytes=report.spec.memory_bytes,
        slots=report.slots,
        context_tokens=report.context_tokens,
        abilities=report.abilities,
        endpoint=report.endpoint,
        remote_model=report.spec.remote_model,
        created_at_s=report.created_at_s,
        ready_at_s=report.ready_at_s,
        reason=report.reason,
        is_simulated=report.is_simulated,
        calls_ahead=calls_ahead,
    )


def _failed(statuses: Mapping[ModelName, ModelStatus]) -> frozenset[ModelName]:
    return frozenset(name for name, status in statuses.items() if status.is_failed)
