"""Which replica of which model shall run on which device.

Pure: a snapshot, a demand and a policy go in, a plan comes out; nothing is started here, and the one who applies the
plan may find that the world has moved on. Every decision explains itself: a start says what it was chosen over, a stop
says why, and a model that goes nowhere has one refusal for each device. The invariant: a plan never grants more of a
device than is free.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fleetmind.core.types import DeviceId, ModelName, ReplicaId
from fleetmind.fleet.fit import device_fault, shortfall
from fleetmind.fleet.footprint import MICRO_BATCH_TOKENS, estimate
from fleetmind.fleet.snapshot import DeviceView, FleetSnapshot, Model, ModelSource, ReplicaView
from fleetmind.node.protocol import Ability, DeviceKind, ReplicaState

EMBEDDING_BATCH_TOKENS_MAX = 8192
TEMPERATURE_C_COOL, TEMPERATURE_C_HOT = 30.0, 90.0
REASONS_SHOWN = 4
UNKNOWN_PART = 0.5
"""A device that doesn't say how busy or warm it is counts as middling."""


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """What placement may be tuned by. The four weights make the score of a device; only their ratio counts.

    ``engine_kinds`` says what an engine can compute on; one that isn't named can use every kind.
    """

    memory_fit: float = 0.4
    utilisation: float = 0.3
    temperature: float = 0.2
    affinity: float = 0.1
    starts_max: int = 2
    reserve_bytes: int = 256 * 1024**2
    engine_kinds: Mapping[str, frozenset[DeviceKind]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is wanted beside what the catalogue says.

    ``unwanted`` replicas are to be replaced and why (the owner asked, the model was changed). ``held`` models get no
    start now and why (they back off after failing, their file is gone). ``replicas_wanted`` overrides the catalogue.
    """

    replicas_wanted: Mapping[ModelName, int] = field(default_factory=dict)
    unwanted: Mapping[ReplicaId, str] = field(default_factory=dict)
    held: Mapping[ModelName, str] = field(default_factory=dict)


class RefusalCode(StrEnum):
    """Why a model is not on a device."""

    NO_DEVICES = "no-devices"
    DEVICE_FAULT = "device-fault"
    WRONG_KIND = "wrong-kind"
    SIMULATED = "simulated"
    TOO_LARGE = "too-large"
    NO_MEMORY = "no-memory"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model is not on a device; without a device, why on none. ``too-large`` would not even fit an empty one."""

    model: ModelName
    device_id: DeviceId | None
    code: RefusalCode
    message: str
    memory_bytes_needed: int = 0
    memory_bytes_free: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """A replica to start; ``device_ids`` is empty for a remote model. ``score`` is from 0 to 1."""

    model: ModelName
    device_ids: tuple[DeviceId, ...]
    memory_bytes: int
    reason: str
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class Stop:
    """A replica to drain and stop."""

    replica_id: ReplicaId
    model: ModelName
    reason: str


@dataclass(frozen=True, slots=True)
class Deferral:
    """A replica that is wanted and fits, or might, and is not started in this pass."""

    model: ModelName
    reason: str


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """A decision. Every wanted replica is in ``keep``, ``start`` or ``deferred``, or its model is in ``refusals``."""

    keep: tuple[ReplicaId, ...] = ()
    start: tuple[Start, ...] = ()
    stop: tuple[Stop, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    deferred: tuple[Deferral, ...] = ()


def plan(snapshot: FleetSnapshot, demand: Demand, policy: PlacementPolicy) -> PlacementPlan:
    """Decide which replicas to start, stop and keep. Pure: the same inputs give the same plan.

    In order:
      1. keep   what is wanted and healthy; a device's trouble is no reason to stop what still serves
      2. fit    the devices each missing model could use; one that does not fit leaves a Refusal with its reason
      3. score  the fits: memory fit, utilisation, temperature, affinity, weighted by the policy; a GPU comes before the
                processor whatever the score, ties go to the smaller id
      4. evict  only what nobody wants: replicas of removed models, surplus ones, unwanted ones; never to make room
      5. cap    starts per pass at policy.starts_max

    Models take turns: the first replica of every model comes before the second of any, older models first.
    """
    wanted = {name: demand.replicas_wanted.get(name, model.replicas_wanted) for name, model in snapshot.models.items()}
    keep, stop = _keep(snapshot, wanted, demand.unwanted)  # 1, 4
    kept = _per_model(keep)
    ledger = _Ledger(snapshot, policy)
    starts: list[Start] = []
    deferred: list[Deferral] = []
    refusals: dict[ModelName, tuple[Refusal, ...]] = {}
    for model in _turns(snapshot.models.values(), wanted, kept):
        if model.name in refusals:  # what did not fit once does not fit twice
            continue
        if model.name in demand.held:
            deferred.append(Deferral(model.name, demand.held[model.name]))
            continue
        start, refused = ledger.best(model)  # 2, 3
        if start is None:
            refusals[model.name] = refused
        elif len(starts) >= policy.starts_max:  # 5
            deferred.append(Deferral(model.name, f"{policy.starts_max} other replicas start first"))
        else:
            ledger.grant(start)
            starts.append(start)
    return PlacementPlan(
        keep=tuple(replica.id for replica in keep),
        start=tuple(starts),
        stop=stop,
        refusals=tuple(refusal for name in sorted(refusals) for refusal in refusals[name]),
        deferred=tuple(deferred),
    )


def memory_bytes_needed(model: Model, kind: DeviceKind) -> int:
    """What a replica of ``model`` takes on a device of ``kind``: from its header, or what a fake one claims to take."""
    claimed = model.options.get("memory_bytes")
    if model.source is ModelSource.FAKE and isinstance(claimed, int):
        return max(0, claimed)
    if model.shape is None:
        return 0
    batch = MICRO_BATCH_TOKENS
    if Ability.EMBEDDING in model.abilities:  # without causal order a whole prompt is computed at once
        batch = max(batch, min(model.context_tokens, EMBEDDING_BATCH_TOKENS_MAX))
    return estimate(model.shape, model.context_tokens, model.slots, kind=kind, micro_batch_tokens=batch).total_bytes


def _keep(
    snapshot: FleetSnapshot, wanted: Mapping[ModelName, int], unwanted: Mapping[ReplicaId, str]
) -> tuple[tuple[ReplicaView, ...], tuple[Stop, ...]]:
    """What stays and what goes. Of a surplus the ready and older stay; draining replicas are gone already."""
    alive = [r for r in snapshot.replicas if r.state in (ReplicaState.STARTING, ReplicaState.READY)]
    alive.sort(key=lambda r: (r.state is not ReplicaState.READY, r.created_at_s, r.id))
    room = dict(wanted)
    keep, stop = [], []
    for replica in alive:
        if replica.model not in room:
            stop.append(Stop(replica.id, replica.model, "the model was removed"))
        elif replica.id in unwanted:
            stop.append(Stop(replica.id, replica.model, unwanted[replica.id]))
        elif room[replica.model] <= 0:
            stop.append(Stop(replica.id, replica.model, f"{wanted[replica.model]} replicas are wanted"))
        else:
            room[replica.model] -= 1
            keep.append(replica)
    keep.sort(key=lambda replica: replica.id)
    stop.sort(key=lambda entry: entry.replica_id)
    return tuple(keep), tuple(stop)


def _per_model(replicas: Iterable[ReplicaView]) -> dict[ModelName, int]:
    counts: dict[ModelName, int] = {}
    for replica in replicas:
        counts[replica.model] = counts.get(replica.model, 0) + 1
    return counts


def _turns(models: Iterable[Model], wanted: Mapping[ModelName, int], kept: Mapping[ModelName, int]) -> Iterator[Model]:
    """The models that miss replicas, once for each, in the order they take turns."""
    missing = [
        (turn, model.added_at_s, model.name, model)
        for model in models
        for turn in range(kept.get(model.name, 0), wanted[model.name])
    ]
    missing.sort(key=lambda entry: entry[:3])
    return (entry[3] for entry in missing)


class _Ledger:
    """What is free while a plan is made: each start takes its part before the next is considered."""

    def __init__(self, snapshot: FleetSnapshot, policy: PlacementPolicy) -> None:
        self._policy = policy
        self._views = sorted(snapshot.devices, key=lambda view: view.device.id)
        self._free = {view.device.id: view.memory_bytes_free(policy.reserve_bytes) for view in self._views}
        self._has_real = any(not view.device.is_simulated for view in self._views)
        self._has_simulated = any(view.device.is_simulated for view in self._views)
        self._needs: dict[tuple[ModelName, DeviceKind], int] = {}
        self._neighbours: dict[tuple[ModelName, DeviceId], int] = {}
        for replica in snapshot.replicas:
            if replica.state in (ReplicaState.STARTING, ReplicaState.READY):
                self._settle(replica.model, replica.device_ids)

    def best(self, model: Model) -> tuple[Start | None, tuple[Refusal, ...]]:
        """The start on the best device, or the refusals of them all."""
        if model.source is ModelSource.REMOTE:
            return Start(model.name, (), 0, "it runs elsewhere and needs no device here"), ()
        if not self._views:
            return None, (Refusal(model.name, None, RefusalCode.NO_DEVICES, "no devices were found on this machine"),)
        refusals = []
        ranked = []
        for view in self._views:
            refusal = self._refusal(model, view)
            if refusal is not None:
                refusals.append(refusal)
            else:
                # A processor is ten times slower or more: it is taken only when no GPU has room.
                rank = (view.device.kind is not DeviceKind.CUDA, -self._score(model, view), view.device.id)
                ranked.append((rank, view))
        if not ranked:
            return None, tuple(refusals)
        ranked.sort(key=lambda entry: entry[0])
        (_, negative_score, _), chosen = ranked[0]
        device_ids = (chosen.device.id,)
        reason = _reason(len(ranked), refusals)
        return Start(model.name, device_ids, self._needed(model, chosen), reason, -negative_score), ()

    def grant(self, start: Start) -> None:
        """Take what ``start`` was given."""
        for device_id in start.device_ids:
            self._free[device_id] -= start.memory_bytes
        self._settle(start.model, start.device_ids)

    def _settle(self, model: ModelName, device_ids: Sequence[DeviceId]) -> None:
        for device_id in device_ids:
            self._neighbours[model, device_id] = self._neighbours.get((model, device_id), 0) + 1

    def _needed(self, model: Model, view: DeviceView) -> int:
        key = (model.name, view.device.kind)
        if key not in self._needs:
            self._needs[key] = memory_bytes_needed(model, view.device.kind)
        return self._needs[key]

    def _refusal(self, model: Model, view: DeviceView) -> Refusal | None:
        """Why ``model`` can't go on this device; None when it can."""
        needed, free = self._needed(model, view), self._free[view.device.id]
        found = self._misfit(model, view)
        if found is None and needed <= free:
            return None
        if found is None:
            taken = view.memory_bytes_free(self._policy.reserve_bytes) - free
            usable = view.device.memory_bytes_total - self._policy.reserve_bytes
            code = RefusalCode.TOO_LARGE if needed > usable else RefusalCode.NO_MEMORY
            found = code, shortfall(view, needed, self._policy.reserve_bytes, taken)
        return Refusal(model.name, view.device.id, found[0], found[1], needed, free)

    def _misfit(self, model: Model, view: DeviceView) -> tuple[RefusalCode, str] | None:
        """What speaks against a device beside its memory."""
        device = view.device
        if (fault := device_fault(view)) is not None:
            return RefusalCode.DEVICE_FAULT, fault
        kinds = self._policy.engine_kinds.get(model.engine)
        if kinds is not None and device.kind not in kinds and not device.is_simulated:
            able = " and ".join(sorted(kinds)) or "nothing here"
            return RefusalCode.WRONG_KIND, f"the engine {model.engine} computes on {able}, not on {device.kind}"
        if model.source is not ModelSource.FAKE:
            if device.is_simulated and self._has_real:
                return RefusalCode.SIMULATED, "it is simulated; a real model goes on a real device"
        elif not device.is_simulated and self._has_simulated:
            return RefusalCode.SIMULATED, "it is real; a fake model goes on a simulated device while there is one"
        elif not device.is_simulated and device.kind is not DeviceKind.CPU:
            return RefusalCode.WRONG_KIND, "a fake model takes no real GPU"
        return None

    def _score(self, model: Model, view: DeviceView) -> float:
        """How well a model suits a device, 0 to 1: the weighted mean of four parts, each 0 to 1.

        Memory fit is tight (needed / free), so that large gaps stay whole: over 930 GPUs of a published cluster trace
        a tight fit allocated 93 % of their capacity and one that prefers room 86 %. Utilisation and temperature prefer
        the idle and the cool; affinity prefers a device without this model, so that one fault does not end it.
        """
        reading = view.reading
        assert reading is not None, "a device that was not read has been refused"
        policy, device_id = self._policy, view.device.id
        needed, free = self._needed(model, view), self._free[device_id]
        tightness = needed / free if free else 1.0
        idleness = UNKNOWN_PART if reading.utilisation is None else 1.0 - min(1.0, max(0.0, reading.utilisation))
        coolness = UNKNOWN_PART
        if reading.temperature_c is not None:
            warmth = (reading.temperature_c - TEMPERATURE_C_COOL) / (TEMPERATURE_C_HOT - TEMPERATURE_C_COOL)
            coolness = 1.0 - min(1.0, max(0.0, warmth))
        spread = 1.0 / (1 + self._neighbours.get((model.name, device_id), 0))
        parts = (
            (policy.memory_fit, tightness),
            (policy.utilisation, idleness),
            (policy.temperature, coolness),
            (policy.affinity, spread),
        )
        weight = sum(weight for weight, _ in parts)
        return sum(weight * part for weight, part in parts) / weight if weight else 0.0


def _reason(fitting: int, refusals: Sequence[Refusal]) -> str:
    """What a start was chosen over."""
    text = f"best of {fitting} devices that fit" if fitting > 1 else "the only device that fits"
    if not refusals:
        return text
    others = "; ".join(f"{refusal.device_id} {refusal.message}" for refusal in refusals[:REASONS_SHOWN])
    more = f"; and {len(refusals) - REASONS_SHOWN} more" if len(refusals) > REASONS_SHOWN else ""
    return f"{text} (not {others}{more})"
