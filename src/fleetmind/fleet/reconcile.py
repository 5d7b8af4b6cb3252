"""Brings the fleet to what is wanted: snapshot → plan → apply one step → verify.

The only place in ``fleet`` with effects on replicas. What runs where is decided by ``placement.plan``, when to try
again by ``restarts``, what is said of it by ``statuses``: all pure; here they are fed and obeyed. It never stops a
healthy wanted replica and never waits inside a step for one to start or stop. The invariant: one step at a time, and a
wake-up during a step leads to another.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Protocol

from fleetmind.core.clock import Clock, secret_token
from fleetmind.core.errors import FleetmindError, NotFound, StoreError
from fleetmind.core.events import Event, EventKind
from fleetmind.core.settings import FleetSettings
from fleetmind.core.telemetry import Metrics, log
from fleetmind.core.types import DeviceId, ModelName, ReplicaId
from fleetmind.fleet import restarts
from fleetmind.fleet.catalog import Catalog
from fleetmind.fleet.inventory import Inventory
from fleetmind.fleet.placement import Demand, PlacementPlan, PlacementPolicy, Start, Stop, plan
from fleetmind.fleet.restarts import RestartPolicy, Restarts
from fleetmind.fleet.snapshot import Model, ModelSource, serves_same
from fleetmind.fleet.statuses import Known, statuses_of
from fleetmind.node.protocol import Device, DeviceKind, DeviceReading, ReplicaReport, ReplicaSpec, ReplicaState

EVENTS_WAITING_MAX = 10_000
"""Journal entries kept while the store refuses; past it the oldest are lost, and the log has them."""
REFUSALS_JOURNALED_MAX = 50
_ALIVE = frozenset({ReplicaState.STARTING, ReplicaState.READY})
_ENDED = frozenset({ReplicaState.STOPPED, ReplicaState.FAILED})


class Node(Protocol):
    """What is asked of a node: ``node.daemon.NodeDaemon``, or a recording one in tests."""

    def devices(self) -> tuple[Device, ...]: ...
    async def read(self) -> tuple[DeviceReading, ...]: ...
    def replicas(self) -> tuple[ReplicaReport, ...]: ...
    def begin(self, spec: ReplicaSpec) -> ReplicaReport: ...
    def drain(self, replica_id: ReplicaId) -> ReplicaReport: ...
    async def stop(self, replica_id: ReplicaId) -> ReplicaReport: ...
    async def check(self, replica_id: ReplicaId) -> ReplicaReport: ...
    def forget(self, replica_id: ReplicaId) -> None: ...


class EventLog(Protocol):
    """Where events go: ``store.journal.Journal``."""

    async def append(self, *events: Event) -> None: ...


class Reconciler:
    """Keeps the replicas of one node as the catalogue wants them. Use from one event loop.

    ``outstanding`` says how many calls a replica is answering; ``engine_kinds`` what an engine computes on.
    """

    def __init__(
        self,
        catalog: Catalog,
        inventory: Inventory,
        node: Node,
        journal: EventLog,
        settings: FleetSettings,
        clock: Clock,
        metrics: Metrics,
        outstanding: Callable[[ReplicaId], int],
        *,
        engine_kinds: Mapping[str, frozenset[DeviceKind]] | None = None,
    ) -> None:
        self._catalog = catalog
        self._inventory = inventory
        self._node = node
        self._journal = journal
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._outstanding = outstanding
        self._log = log("fleet.reconcile")
        self._policy = PlacementPolicy(
            starts_max=settings.starts_max, reserve_bytes=settings.reserve_bytes, engine_kinds=engine_kinds or {}
        )
        self._restart_policy = RestartPolicy(
            restarts_max=settings.restarts_max,
            backoff_s=settings.restart_backoff_s,
            backoff_s_max=settings.restart_backoff_s_max,
            failed_retry_s=settings.failed_retry_s,
        )
        self._woken = asyncio.Event()
        self._stepping = asyncio.Lock()
        self._plan: PlacementPlan | None = None
        self._journaled: object = None
        self._read_at_s: float | None = None
        self._restarts: dict[ModelName, Restarts] = {}
        self._known_models: dict[ModelName, Model] = {}
        self._file_faults: dict[ModelName, str] = {}
        self._load_s: dict[ModelName, float] = {}
        self._begun: dict[ReplicaId, Model] = {}
        """The model as it was when a replica of it was started: one that differs by now is outdated."""
        self._began_at_s: dict[ReplicaId, float] = {}
        self._was_ready: set[ReplicaId] = set()
        self._ended: set[ReplicaId] = set()
        self._unwanted: dict[ReplicaId, str] = {}
        self._drains: dict[ReplicaId, float] = {}
        """Draining replicas, and when (monotonic) they are stopped whatever they are doing."""
        self._handed_over: set[ReplicaId] = set()
        self._to_stop: set[ReplicaId] = set()
        self._stops_due = asyncio.Event()
        self._suspects: dict[ReplicaId, str] = {}
        self._suspected = asyncio.Event()
        self._events: deque[Event] = deque(maxlen=EVENTS_WAITING_MAX)
        self._shown: set[tuple[str, str]] = set()
        inventory.subscribe(lambda _: self.wake())

    # -- what others ask of it ----------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look again soon: something changed."""
        self._woken.set()

    def explain(self) -> PlacementPlan | None:
        """The last plan; None before the first step."""
        return self._plan

    def report_failure(self, replica_id: ReplicaId, reason: str) -> None:
        """Somebody saw this replica fail: have its node look at once. Returns at once."""
        self._suspects[replica_id] = reason
        self._suspected.set()

    async def restart(self, replica_id: ReplicaId) -> None:
        """Replace a replica, after its calls; of a failed one the model is tried again now. Raises NotFound."""
        report = next((one for one in self._node.replicas() if one.spec.id == replica_id), None)
        if report is None:
            raise NotFound(f"there is no replica {replica_id[:200]!r}", hint="list them: fleetmind status")
        if report.state in _ALIVE:
            self._unwanted[replica_id] = "the owner asked for a restart"
        self.retry(report.spec.model)

    def retry(self, model: ModelName) -> None:
        """Forget a model's failures and try it now."""
        self._restarts.pop(model, None)
        self.wake()

    def loops(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """The coroutines that must run for as long as the fleet does, by name, for a Supervisor."""
        return {"fleet.reconcile": self._run, "fleet.stops": self._run_stops, "fleet.checks": self._run_checks}

    # -- the step -----------------------------------------------------------------------------------------------

    async def step(self) -> None:
        """1 observe, 2 ask what is wanted, 3 plan, 4 apply, 5 tell. Never waits for a replica."""
        async with self._stepping:
            await self._observe()  # 1
            demand = await self._demand()  # 2
            decided = plan(self._inventory.snapshot(), demand, self._policy)  # 3
            self._apply(decided)  # 4
            self._tell(decided)  # 5
            await self._record()

    async def _observe(self) -> None:
        devices = self._node.devices()
        if tuple(view.device for view in self._inventory.snapshot().devices) != tuple(sorted(devices, key=_device_id)):
            self._inventory.set_devices(devices)
            self._restarts.clear()  # what failed on other devices may well start on these
            self._read_at_s = None
        readings: tuple[DeviceReading, ...] = ()
        if (
            self._read_at_s is None
            or self._clock.monotonic_s() - self._read_at_s >= self._settings.reconcile_interval_s
        ):
            readings = await self._node.read()
            self._read_at_s = self._clock.monotonic_s()
        for report in self._node.replicas():
            self._inventory.observe_replica(report)
            self._digest(report)
        self._inventory.observe_readings(readings)
        self._forget_ended()

    async def _demand(self) -> Demand:
        """What holds models back, and which replicas no longer serve what the catalogue says."""
        models = self._catalog.models()
        for name in self._known_models.keys() - models.keys():
            self._drop_model(name)
        for name, model in models.items():
            if name in self._known_models and not serves_same(self._known_models[name], model):
                self._drop_model(name)
            self._known_models[name] = model
        alive = Counter(r.model for r in self._inventory.snapshot().replicas if r.state in _ALIVE)
        now_s = self._clock.monotonic_s()
        held = {}
        for name, model in models.items():
            self._file_faults.pop(name, None)
            if alive[name] >= model.replicas_wanted:
                continue
            if now_s < self._restarts.get(name, Restarts()).not_before_s:
                held[name] = f"it pauses after a failure: {self._restarts[name].reason}"
            elif (fault := await self._catalog.check(name)) is not None:
                held[name] = self._file_faults[name] = fault
        unwanted = dict(self._unwanted)
        for replica_id, model in self._begun.items():
            present = models.get(model.name)
            if present is not None and not serves_same(model, present):
                unwanted[replica_id] = "the model was changed"
        return Demand(unwanted=unwanted, held=held)

    def _apply(self, decided: PlacementPlan) -> None:
        models = self._inventory.snapshot().models
        for stop in decided.stop:
            self._drain(stop)
        for start in decided.start:
            self._begin(start, models[start.model])
        self._stop_drained()

    def _tell(self, decided: PlacementPlan) -> None:
        """Statuses, metrics and, when the plan is another than before, the journal."""
        self._plan = decided
        now_s = self._clock.monotonic_s()
        fleet = self._inventory.snapshot()
        waited_s = {r.model: now_s - self._began_at_s.get(r.id, now_s) for r in fleet.replicas if r.state in _ALIVE}
        known = Known(self._restarts, self._file_faults, self._load_s, waited_s)
        self._inventory.set_statuses(statuses_of(fleet, decided, known, now_s))
        self._show_metrics()
        signature = _signature(decided)
        if signature == self._journaled:
            return
        self._journaled = signature
        if decided.start or decided.stop or decided.refusals:
            self._event(EventKind.PLACEMENT_PLANNED, "fleet", _summary(decided))

    # -- applying -----------------------------------------------------------------------------------------------

    def _begin(self, start: Start, model: Model) -> None:
        replica_id = ReplicaId(f"{model.name}-{secret_token(4).hex()}")
        spec = self._spec(replica_id, start, model)
        data = {"model": model.name, "devices": list(start.device_ids), "memory_bytes": start.memory_bytes}
        self._event(EventKind.REPLICA_STARTING, replica_id, {**data, "reason": start.reason})
        self._metrics.replica_starts_total.labels(model.name).inc()
        self._begun[replica_id] = model
        self._began_at_s[replica_id] = self._clock.monotonic_s()
        try:
            self._inventory.observe_replica(self._node.begin(spec))
        except FleetmindError as error:  # the node refused it outright: no such engine, device or option
            self._note_failed_start(model.name, error.message)
            self._event(EventKind.REPLICA_FAILED, replica_id, {"model": model.name, "reason": error.message})
            self._drop_replica(replica_id)

    def _spec(self, replica_id: ReplicaId, start: Start, model: Model) -> ReplicaSpec:
        options = dict(model.options)
        simulated = {view.device.id for view in self._inventory.snapshot().devices if view.device.is_simulated}
        if model.source is ModelSource.FAKE and simulated.intersection(start.device_ids):
            options.pop("memory_bytes", None)  # claimed of the simulated device; the process need not really hold it
        return ReplicaSpec(
            id=replica_id,
            model=model.name,
            engine=model.engine,
            device_ids=start.device_ids,
            context_tokens=model.context_tokens,
            slots=model.slots,
            memory_bytes=start.memory_bytes,
            path=model.path,
            url=model.url,
            remote_model=model.remote_model,
            key_env=model.key_env,
            abilities=model.abilities,
            options=options,
        )

    def _drain(self, stop: Stop) -> None:
        """From here on it gets no new calls."""
        with suppress(NotFound):
            self._log.info("draining", replica=stop.replica_id, reason=stop.reason)
            self._inventory.observe_replica(self._node.drain(stop.replica_id))
            self._drains[stop.replica_id] = self._clock.monotonic_s() + self._settings.drain_s_max

    def _stop_drained(self) -> None:
        """Hand over to the loop of stops what has finished its calls, or had its time."""
        for replica_id, deadline_s in self._drains.items():
            if replica_id in self._handed_over:
                continue
            if self._outstanding(replica_id) == 0 or self._clock.monotonic_s() >= deadline_s:
                self._handed_over.add(replica_id)
                self._to_stop.add(replica_id)
                self._stops_due.set()

    # -- observing ----------------------------------------------------------------------------------------------

    def _digest(self, report: ReplicaReport) -> None:
        """Learn, once, that a replica became ready or ended."""
        replica_id, name, now_s = report.spec.id, report.spec.model, self._clock.monotonic_s()
        if report.ready_at_s is not None and replica_id not in self._was_ready:
            self._was_ready.add(replica_id)
            self._load_s[name] = max(0.0, report.ready_at_s - report.created_at_s)
            if name in self._restarts:
                self._restarts[name] = restarts.became_ready(self._restarts[name])
            data = {"model": name, "load_s": round(self._load_s[name], 3), "engine": report.engine_version}
            self._event(EventKind.REPLICA_READY, replica_id, data, report.ready_at_s)
        if report.state not in _ENDED or replica_id in self._ended:
            return
        self._ended.add(replica_id)
        is_failed = report.state is ReplicaState.FAILED
        kind = EventKind.REPLICA_FAILED if is_failed else EventKind.REPLICA_STOPPED
        self._event(kind, replica_id, {"model": name, "reason": report.reason}, report.ended_at_s)
        if not is_failed:
            return
        if replica_id in self._drains or name not in self._catalog:  # nobody wanted it any more
            return
        if report.ready_at_s is not None:
            self._metrics.replica_failures_total.labels(name).inc()
            lived_s = max(0.0, (report.ended_at_s or self._clock.now_s()) - report.ready_at_s)
            before = self._restarts.get(name, Restarts())
            self._restarts[name] = restarts.crashed(before, report.reason, lived_s, now_s, self._restart_policy)
        else:
            self._note_failed_start(name, report.reason)

    def _note_failed_start(self, name: ModelName, reason: str) -> None:
        self._metrics.replica_failures_total.labels(name).inc()
        before, now_s = self._restarts.get(name, Restarts()), self._clock.monotonic_s()
        self._restarts[name] = after = restarts.start_failed(before, reason, now_s, self._restart_policy)
        self._log.warning("a start failed", model=name, failures=after.failed_starts, reason=reason)

    def _forget_ended(self) -> None:
        """Drop what has stopped. The last failure of a model stays to be seen until the model is well again or gone."""
        reports = self._node.replicas()
        well = {report.spec.model for report in reports if report.state is ReplicaState.READY}
        failed = [report for report in reports if report.state is ReplicaState.FAILED]
        last = {report.spec.model: report.spec.id for report in sorted(failed, key=lambda r: r.created_at_s)}
        for report in reports:
            replica_id, name = report.spec.id, report.spec.model
            stays = name in self._catalog and name not in well and last.get(name) == replica_id
            if report.state is ReplicaState.STOPPED or (report.state is ReplicaState.FAILED and not stays):
                self._node.forget(replica_id)
                self._inventory.forget_replica(replica_id)
                self._drop_replica(replica_id)

    def _drop_replica(self, replica_id: ReplicaId) -> None:
        for memory in (self._begun, self._began_at_s, self._unwanted, self._drains):
            memory.pop(replica_id, None)
        for ids in (self._was_ready, self._ended, self._handed_over, self._to_stop):
            ids.discard(replica_id)

    def _drop_model(self, name: ModelName) -> None:
        for memory in (self._restarts, self._known_models, self._file_faults, self._load_s):
            memory.pop(name, None)

    # -- telling ------------------------------------------------------------------------------------------------

    def _event(self, kind: EventKind, subject: str, data: Mapping[str, object], at_s: float | None = None) -> None:
        self._events.append(Event(kind, subject, self._clock.now_s() if at_s is None else at_s, data))

    async def _record(self) -> None:
        """Write the journal. A store that refuses must not stop the fleet: the entries wait for the next step."""
        if not self._events:
            return
        batch = tuple(self._events)
        try:
            await self._journal.append(*batch)
        except StoreError as error:
            self._log.warning("the journal can't be written", entries=len(batch), reason=error.message)
            return
        self._events.clear()  # nothing was added meanwhile: only a step does, and this is still one

    def _show_metrics(self) -> None:
        fleet, metrics = self._inventory.snapshot(), self._metrics
        counts = Counter((replica.model, replica.state.value) for replica in fleet.replicas)
        for labels in self._shown - counts.keys():
            metrics.replicas.remove(*labels)
        for labels, count in counts.items():
            metrics.replicas.labels(*labels).set(count)
        self._shown = set(counts)
        for view in fleet.devices:
            device_id, reading = view.device.id, view.reading
            metrics.device_memory_bytes_total.labels(device_id).set(view.device.memory_bytes_total)
            if reading is None:
                continue
            metrics.device_memory_bytes_used.labels(device_id).set(reading.memory_bytes_used)
            for gauge, value in (
                (metrics.device_utilisation, reading.utilisation),
                (metrics.device_temperature_c, reading.temperature_c),
                (metrics.device_power_w, reading.power_w),
            ):
                if value is not None:
                    gauge.labels(device_id).set(value)

    # -- loops --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._woken.clear()  # before the step: a wake-up during it counts for the next
            await self.step()
            await self._pause()

    async def _pause(self) -> None:
        """Until the next look is due, a model may be started again, or somebody wakes us."""
        now_s = self._clock.monotonic_s()
        due_s = [record.not_before_s - now_s for record in self._restarts.values() if record.not_before_s > now_s]
        pause_s = min([self._settings.reconcile_interval_s, *due_s])
        waits = {asyncio.ensure_future(self._woken.wait()), asyncio.ensure_future(self._clock.sleep(pause_s))}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _run_stops(self) -> None:
        if self._to_stop:  # left by a run that broke
            self._stops_due.set()
        while True:
            await self._stops_due.wait()
            self._stops_due.clear()
            await asyncio.gather(*(self._stop(replica_id) for replica_id in sorted(self._to_stop)))
            self.wake()

    async def _stop(self, replica_id: ReplicaId) -> None:
        with suppress(NotFound):
            await self._node.stop(replica_id)
        self._to_stop.discard(replica_id)

    async def _run_checks(self) -> None:
        while True:
            await self._suspected.wait()
            self._suspected.clear()
            suspects, self._suspects = self._suspects, {}
            for replica_id, reason in suspects.items():
                self._log.info("checking a replica", replica=replica_id, reason=reason)
                with suppress(NotFound):
                    self._inventory.observe_replica(await self._node.check(replica_id))
            self.wake()


def _device_id(device: Device) -> DeviceId:
    return device.id


def _signature(decided: PlacementPlan) -> object:
    """What makes a plan another one. Not its numbers: free memory moves all the time."""
    return (
        tuple((start.model, start.device_ids) for start in decided.start),
        tuple(stop.replica_id for stop in decided.stop),
        tuple((refusal.model, refusal.device_id, refusal.code) for refusal in decided.refusals),
    )


def _summary(decided: PlacementPlan) -> dict[str, object]:
    return {
        "starts": [{"model": s.model, "devices": list(s.device_ids), "reason": s.reason} for s in decided.start],
        "stops": [{"replica": s.replica_id, "reason": s.reason} for s in decided.stop],
        "refusals": [
            {"model": r.model, "device": r.device_id, "code": r.code.value, "message": r.message}
            for r in decided.refusals[:REFUSALS_JOURNALED_MAX]
        ],
        "refusals_total": len(decided.refusals),
    }
