"""Who sits at which replica's slots, and who waits in which model's line.

A seat is taken or handed over in one step of the event loop, so a slot is never given twice and a newcomer never
overtakes a waiter. Decides nothing: ``routing.route`` says which replica, ``limits`` says when the line is full.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass

from fleetmind.core.errors import CallerError, InvalidRequest, ModelUnavailable
from fleetmind.core.types import ModelName, ReplicaId
from fleetmind.fleet.snapshot import FleetSnapshot, ReplicaView
from fleetmind.gateway.limits import QueuePolicy, check_queue, waited_too_long
from fleetmind.gateway.routing import route
from fleetmind.node.protocol import Ability

_CALL_S_WEIGHT = 0.1
"""Weight of the newest call in the moving mean of a model's call seconds."""


@dataclass(eq=False, slots=True)
class _Waiter:
    ability: Ability
    tried: Set[ReplicaId]
    seat: "asyncio.Future[ReplicaView]"


class Seats:
    """The slots of all ready replicas. One event loop only."""

    def __init__(self, snapshot: Callable[[], FleetSnapshot], policy: QueuePolicy) -> None:
        self._snapshot = snapshot
        self._policy = policy
        self._lines: dict[ModelName, deque[_Waiter]] = {}
        self._call_s: dict[ModelName, float] = {}
        self.outstanding: dict[ReplicaId, int] = {}

    async def take(self, model: ModelName, ability: Ability, tried: Set[ReplicaId]) -> ReplicaView:
        """Sit down at the best replica, waiting for a free slot or for a replica to become ready.

        Raises QueueFull, QueueTimeout, ModelUnavailable (the model has failed or fits nowhere) or InvalidRequest (no
        replica of it can do this kind of call). Every seat taken must be given back with ``leave``.
        """
        line = self._lines.get(model)
        if not line:
            chosen = route(model, ability, self._snapshot(), self.outstanding, tried)
            if chosen.replica is not None:
                self.outstanding[chosen.replica.id] = self.outstanding.get(chosen.replica.id, 0) + 1
                return chosen.replica
        hopeless = self._hopeless(model, ability)
        if hopeless is not None:
            raise hopeless
        return await self._wait(model, _Waiter(ability, tried, asyncio.get_running_loop().create_future()))

    def leave(self, replica: ReplicaView, call_s: float | None) -> None:
        """Give a seat back to the first in line. ``call_s`` is how long the call took, None if that says nothing."""
        count = self.outstanding[replica.id] - 1
        if count:
            self.outstanding[replica.id] = count
        else:
            del self.outstanding[replica.id]
        if call_s is not None:
            mean_s = self._call_s.get(replica.model, call_s)
            self._call_s[replica.model] = mean_s + _CALL_S_WEIGHT * (call_s - mean_s)
        if replica.model in self._lines:
            self._hand_over(replica.model)

    def fleet_changed(self) -> None:
        """Seat or refuse those whose model's replicas have changed."""
        for model in list(self._lines):
            self._hand_over(model)

    def waiting(self, model: ModelName) -> int:
        """Calls in the line of ``model``."""
        return len(self._lines.get(model, ()))

    def waiting_total(self) -> int:
        """Calls in all lines."""
        return sum(map(len, self._lines.values()))

    async def _wait(self, model: ModelName, waiter: _Waiter) -> ReplicaView:
        check_queue(model, *self._pressure(model), self._policy)
        line = self._lines.setdefault(model, deque())
        line.append(waiter)
        try:
            async with asyncio.timeout(self._policy.wait_s_max):
                return await waiter.seat
        except TimeoutError:
            self._give_up(model, waiter)
            raise waited_too_long(model, *self._pressure(model), self._policy) from None
        except BaseException:
            self._give_up(model, waiter)
            raise

    def _give_up(self, model: ModelName, waiter: _Waiter) -> None:
        """Leave the line, or the seat if one was handed over in the very moment of giving up."""
        if waiter.seat.done() and not waiter.seat.cancelled() and waiter.seat.exception() is None:
            self.leave(waiter.seat.result(), None)
        line = self._lines.get(model)
        if line is not None and waiter in line:
            line.remove(waiter)
            if not line:
                del self._lines[model]

    def _hand_over(self, model: ModelName) -> None:
        """Seat waiters from the head of the line while there are free slots; refuse all where waiting is in vain."""
        line = self._lines[model]
        while line:
            waiter = line[0]
            chosen = route(model, waiter.ability, self._snapshot(), self.outstanding, waiter.tried)
            if chosen.replica is not None:
                line.popleft()
                if not waiter.seat.done():
                    self.outstanding[chosen.replica.id] = self.outstanding.get(chosen.replica.id, 0) + 1
                    waiter.seat.set_result(chosen.replica)
                continue
            hopeless = self._hopeless(model, waiter.ability)
            if hopeless is None:
                return
            line.popleft()
            if not waiter.seat.done():
                waiter.seat.set_exception(hopeless)
        del self._lines[model]

    def _hopeless(self, model: ModelName, ability: Ability) -> ModelUnavailable | CallerError | None:
        """Why waiting would be in vain, if it would."""
        snapshot = self._snapshot()
        ready = snapshot.ready.get(model, ())
        if ready:
            if any(ability in replica.abilities for replica in ready):
                return None
            return InvalidRequest(
                f"No replica of {model} can do {ability}.",
                hint=f"Ask a model with the ability {ability}; GET /api/models lists the abilities of each.",
                param="model",
            )
        status = snapshot.statuses.get(model)
        if model not in snapshot.models:
            return ModelUnavailable(f"{model} was removed.", retry_after_s=60.0)
        if status is not None and status.is_failed:
            return ModelUnavailable(
                f"{model} is not available: {status.reason}",
                retry_after_s=status.retry_after_s,
                hint="`fleetmind status` and `fleetmind doctor` show what is wrong.",
            )
        return None

    def _pressure(self, model: ModelName) -> tuple[int, int, float]:
        slots = sum(replica.slots for replica in self._snapshot().ready.get(model, ()))
        return self.waiting(model), slots, self._call_s.get(model, 1.0)
