"""Which replica serves a call.

Pure: the snapshot and the numbers of calls outstanding go in, a Route comes out, and ``explain`` says why with the
alternatives. Never waits, never counts: the caller does.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from fleetmind.core.types import ModelName, ReplicaId
from fleetmind.fleet.snapshot import FleetSnapshot, ReplicaView
from fleetmind.node.protocol import Ability


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call goes. ``replica`` is None when none can take it now; then ``is_busy`` tells full ones from none."""

    replica: ReplicaView | None
    is_busy: bool = False
    lacks_ability: bool = False


def route(
    model: ModelName,
    ability: Ability,
    snapshot: FleetSnapshot,
    outstanding: Mapping[ReplicaId, int],
    tried: Set[ReplicaId] = frozenset(),
) -> Route:
    """The replica with the smallest share of its slots taken.

    In order:
      1. ready   only replicas that are ready to serve ``model``
      2. able    only those with the ability
      3. fresh   not one that this call was already tried on, if there is another
      4. free    only those with a free slot, or where one more call may wait inside the engine
      5. least   outstanding calls per slot; ties go to the earlier id, so that the same inputs give the same route
    """
    ready = snapshot.ready.get(model, ())
    if len(ready) == 1:  # the usual case, without building lists
        replica = ready[0]
        if ability not in replica.abilities:
            return Route(None, lacks_ability=True)
        if outstanding.get(replica.id, 0) < replica.calls_max:
            return Route(replica)
        return Route(None, is_busy=True)
    able = [replica for replica in ready if ability in replica.abilities]
    if not able:
        return Route(None, lacks_ability=bool(ready))
    fresh = [replica for replica in able if replica.id not in tried] or able
    free = [replica for replica in fresh if outstanding.get(replica.id, 0) < replica.calls_max]
    if not free:
        return Route(None, is_busy=True)
    return Route(min(free, key=lambda replica: (outstanding.get(replica.id, 0) / replica.slots, replica.id)))


def explain(
    model: ModelName, ability: Ability, snapshot: FleetSnapshot, outstanding: Mapping[ReplicaId, int]
) -> tuple[str, ...]:
    """One sentence per replica of ``model`` on why it was or was not taken by ``route``."""
    chosen = route(model, ability, snapshot, outstanding).replica
    lines = []
    for replica in snapshot.replicas:
        if replica.model != model:
            continue
        count = outstanding.get(replica.id, 0)
        if replica is chosen:
            why = f"chosen: {count} of {replica.slots} slots taken, the smallest share"
        elif replica not in snapshot.ready.get(model, ()):
            why = f"not ready: {replica.state} {replica.reason}".rstrip()
        elif ability not in replica.abilities:
            why = f"cannot do {ability}"
        elif count >= replica.calls_max:
            why = f"full: {count} of {replica.slots} slots taken"
        else:
            why = f"not chosen: {count} of {replica.slots} slots taken"
        lines.append(f"{replica.id}: {why}")
    return tuple(lines)
