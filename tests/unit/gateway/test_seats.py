import asyncio

import pytest
from tests.unit.gateway.test_routing import MODEL, fleet, replica

from fleetmind.core.errors import InvalidRequest, ModelUnavailable, QueueFull, QueueTimeout
from fleetmind.core.types import ModelName
from fleetmind.fleet.snapshot import FleetSnapshot, Model, ModelSource, ModelStatus, ReplicaView, snapshot
from fleetmind.gateway.limits import QueuePolicy
from fleetmind.gateway.seats import Seats
from fleetmind.node.protocol import Ability


class World:
    """A fleet that a test changes, and the seats in it."""

    def __init__(self, *replicas: ReplicaView, calls_max: int = 10, wait_s_max: float = 60.0) -> None:
        self.status: ModelStatus | None = None
        self.set(*replicas)
        self.seats = Seats(lambda: self.view, QueuePolicy(calls_max, wait_s_max))

    def set(self, *replicas: ReplicaView) -> None:
        model = Model(MODEL, ModelSource.FAKE, "fake", 0, 1)
        self.view: FleetSnapshot = snapshot(
            version=1,
            at_s=0,
            devices=(),
            models={MODEL: model},
            replicas=replicas,
            statuses={MODEL: self.status} if self.status else {},
        )

    def ask(self) -> "asyncio.Task[ReplicaView]":
        return asyncio.ensure_future(self.seats.take(MODEL, Ability.CHAT, set()))

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


async def test_a_free_slot_is_given_without_waiting() -> None:
    world = World(replica("a", 2))
    seat = await world.ask()
    assert (seat.id, world.seats.outstanding) == ("a", {"a": 1})
    world.seats.leave(seat, 1.0)
    assert world.seats.outstanding == {}


async def test_waiters_are_seated_in_their_order_and_nobody_overtakes() -> None:
    world = World(replica("a", 1))
    seat = await world.ask()
    waiters = [world.ask() for _ in range(3)]
    await world.settle()
    order = []
    for _ in range(3):
        world.seats.leave(seat, None)
        late = world.ask()  # asks in the very moment the slot is free
        await world.settle()
        (done,) = [w for w in waiters if w.done() and w not in order]
        order.append(done)
        assert not late.done()
        late.cancel()
        await world.settle()
        seat = done.result()
    assert order == waiters
    assert world.seats.waiting(MODEL) == 0


async def test_a_full_line_refuses_with_a_time() -> None:
    world = World(replica("a", 1), calls_max=1)
    await world.ask()
    waiting = world.ask()
    await world.settle()
    with pytest.raises(QueueFull) as full:
        await world.ask()
    assert full.value.retry_after_s >= 1
    waiting.cancel()


async def test_waiting_has_an_end() -> None:
    world = World(replica("a", 1), wait_s_max=0.01)
    await world.ask()
    with pytest.raises(QueueTimeout):
        await world.ask()
    assert world.seats.waiting(MODEL) == 0


async def test_a_waiter_that_leaves_takes_nothing_with_it() -> None:
    world = World(replica("a", 1))
    seat = await world.ask()
    gone, stays = world.ask(), world.ask()
    await world.settle()
    world.seats.leave(seat, None)  # hands the seat to `gone` …
    gone.cancel()  # … who leaves before hearing of it
    assert (await stays).id == "a"
    assert world.seats.outstanding == {"a": 1}


async def test_a_call_waits_for_a_model_that_is_loading() -> None:
    world = World()
    waiting = world.ask()
    await world.settle()
    assert not waiting.done()
    world.set(replica("a"))
    world.seats.fleet_changed()
    assert (await waiting).id == "a"


async def test_waiting_in_vain_ends_with_the_reason() -> None:
    world = World()
    waiting = world.ask()
    await world.settle()
    world.status = ModelStatus("fits nowhere: needs 9 GiB", 30.0, is_failed=True)
    world.set()
    world.seats.fleet_changed()
    with pytest.raises(ModelUnavailable, match="needs 9 GiB") as refused:
        await waiting
    assert refused.value.retry_after_s == 30.0


async def test_what_no_replica_can_do_is_refused_at_once() -> None:
    world = World(replica("a"))
    with pytest.raises(InvalidRequest, match="embedding"):
        await world.seats.take(MODEL, Ability.EMBEDDING, set())


async def test_a_model_removed_while_waiting_is_said() -> None:
    world = World()
    waiting = world.ask()
    await world.settle()
    world.view = fleet()
    world.seats.fleet_changed()
    with pytest.raises(ModelUnavailable, match="removed"):
        await waiting


async def test_lines_of_models_do_not_mix() -> None:
    world = World(replica("a", 1))
    await world.ask()
    waiting = world.ask()
    await world.settle()
    assert world.seats.waiting(ModelName("other")) == 0
    assert world.seats.waiting_total() == 1
    waiting.cancel()
