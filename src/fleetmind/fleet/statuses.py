"""Why a model has no ready replica, in words, and when to ask again.

Pure. What the reconciler knows goes in, one ModelStatus a model comes out, for callers who wait or are refused and for
the owner who wants to know. The invariant: every model without a ready replica has a status, and no other has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fleetmind.core.types import ModelName
from fleetmind.fleet.placement import PlacementPlan, Refusal
from fleetmind.fleet.restarts import Restarts
from fleetmind.fleet.snapshot import FleetSnapshot, Model, ModelStatus, ReplicaView
from fleetmind.node.protocol import ReplicaState

LOAD_S_GUESS = 10.0
"""How long a model is thought to load that has not been loaded yet."""
RETRY_S_MIN = 1.0
UNPLACED_RETRY_S = 30.0
FILE_RETRY_S = 10.0
REFUSALS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Known:
    """What the reconciler knows beside snapshot and plan.

    ``file_faults`` says why a model's file can't be used, ``load_s`` how long a model took to load the last time;
    ``waited_s`` how long the one that is loading has been at it.
    """

    restarts: Mapping[ModelName, Restarts] = field(default_factory=dict)
    file_faults: Mapping[ModelName, str] = field(default_factory=dict)
    load_s: Mapping[ModelName, float] = field(default_factory=dict)
    waited_s: Mapping[ModelName, float] = field(default_factory=dict)


def statuses_of(
    fleet: FleetSnapshot, plan: PlacementPlan, known: Known, monotonic_s: float
) -> dict[ModelName, ModelStatus]:
    """The status of each model of ``fleet`` that has no ready replica. The first that holds of:

    1. nobody wants a replica of it
    2. a replica is loading
    3. its file can't be used
    4. it failed: its starts, too often in a row
    5. it pauses before the next start
    6. it fits on no device; only while something is draining will that change by itself
    7. others start first
    """
    is_making_room = any(replica.state is ReplicaState.DRAINING for replica in fleet.replicas)
    refusals: dict[ModelName, list[Refusal]] = {}
    for refusal in plan.refusals:
        refusals.setdefault(refusal.model, []).append(refusal)
    starting = {replica.model: replica for replica in fleet.replicas if replica.state is ReplicaState.STARTING}
    return {
        name: _status(
            model, starting.get(name), refusals.get(name, ()), known, monotonic_s, is_making_room=is_making_room
        )
        for name, model in fleet.models.items()
        if name not in fleet.ready
    }


def _status(
    model: Model,
    starting: ReplicaView | None,
    refusals: Sequence[Refusal],
    known: Known,
    monotonic_s: float,
    *,
    is_making_room: bool,
) -> ModelStatus:
    name = model.name
    restarts = known.restarts.get(name, Restarts())
    pause_s = restarts.not_before_s - monotonic_s
    if model.replicas_wanted == 0:  # 1
        return ModelStatus("no replicas of it are wanted", UNPLACED_RETRY_S, is_failed=True)
    if starting is not None:  # 2
        expected_s = known.load_s.get(name, LOAD_S_GUESS) - known.waited_s.get(name, 0.0)
        reason = f"it is loading: {starting.reason}" if starting.reason else "it is loading"
        return ModelStatus(reason, max(RETRY_S_MIN, expected_s))
    if name in known.file_faults:  # 3
        return ModelStatus(known.file_faults[name], FILE_RETRY_S, is_failed=True)
    if restarts.is_failed and pause_s > 0:  # 4
        reason = f"it failed to start {_times(restarts.failed_starts)} in a row: {restarts.reason}"
        return ModelStatus(reason, max(RETRY_S_MIN, pause_s), is_failed=True)
    if pause_s > 0:  # 5
        return ModelStatus(f"it is started again in a moment: {restarts.reason}", max(RETRY_S_MIN, pause_s))
    if refusals:  # 6
        retry_s = RETRY_S_MIN if is_making_room else UNPLACED_RETRY_S
        return ModelStatus(f"it fits on no device: {_shown(refusals)}", retry_s, is_failed=not is_making_room)
    return ModelStatus("it waits for others to start", max(RETRY_S_MIN, known.load_s.get(name, LOAD_S_GUESS)))  # 7


def _shown(refusals: Sequence[Refusal]) -> str:
    texts = [
        refusal.message if refusal.device_id is None else f"{refusal.device_id} {refusal.message}"
        for refusal in refusals[:REFUSALS_SHOWN]
    ]
    more = len(refusals) - REFUSALS_SHOWN
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
