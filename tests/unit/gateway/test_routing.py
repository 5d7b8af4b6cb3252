import dataclasses
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from fleetmind.core.types import ModelName, ReplicaId
from fleetmind.fleet.snapshot import FleetSnapshot, ReplicaView, snapshot
from fleetmind.gateway.routing import explain, route
from fleetmind.node.protocol import Ability, Endpoint, ReplicaState

MODEL = ModelName("m")


def replica(
    name: str, slots: int = 2, state: ReplicaState = ReplicaState.READY, *, can_chat: bool = True
) -> ReplicaView:
    return ReplicaView(
        id=ReplicaId(name),
        model=MODEL,
        state=state,
        device_ids=(),
        memory_bytes=0,
        slots=slots,
        context_tokens=0,
        abilities=frozenset({Ability.CHAT} if can_chat else {Ability.EMBEDDING}),
        endpoint=Endpoint("http://127.0.0.1:1"),
    )


def fleet(*replicas: ReplicaView) -> FleetSnapshot:
    return snapshot(version=1, at_s=0, devices=(), models={}, replicas=replicas)


def choose(view: FleetSnapshot, taken: Mapping[str, int] | None = None, tried: set[str] = frozenset()) -> str | None:  # type: ignore[assignment]
    chosen = route(MODEL, Ability.CHAT, view, {ReplicaId(k): v for k, v in (taken or {}).items()}, tried)  # type: ignore[arg-type]
    return chosen.replica.id if chosen.replica else None


def test_the_smallest_share_of_slots_taken_wins() -> None:
    view = fleet(replica("a", 4), replica("b", 8))
    assert choose(view, {"a": 1, "b": 1}) == "b"
    assert choose(view, {"a": 1, "b": 3}) == "a"
    assert choose(view, {"a": 2, "b": 4}) == "a"


def test_one_already_tried_is_taken_only_when_there_is_no_other() -> None:
    view = fleet(replica("a"), replica("b"))
    assert choose(view, tried={"a"}) == "b"
    assert choose(view, {"b": 2}, {"a"}) is None
    assert choose(fleet(replica("a")), tried={"a"}) == "a"


def test_full_replicas_and_none_are_told_apart() -> None:
    full = route(MODEL, Ability.CHAT, fleet(replica("a", 1)), {ReplicaId("a"): 1})
    assert (full.replica, full.is_busy, full.lacks_ability) == (None, True, False)
    none = route(MODEL, Ability.CHAT, fleet(), {})
    assert (none.replica, none.is_busy, none.lacks_ability) == (None, False, False)
    unable = route(MODEL, Ability.CHAT, fleet(replica("a", can_chat=False)), {})
    assert (unable.replica, unable.lacks_ability) == (None, True)


def test_one_call_more_may_wait_where_the_engine_says_so() -> None:
    ahead = dataclasses.replace(replica("a", 1), calls_ahead=1)
    assert choose(fleet(ahead), {"a": 1}) == "a"
    assert choose(fleet(ahead), {"a": 2}) is None
    assert choose(fleet(ahead, replica("b", 1)), {"a": 1}) == "b", "a free slot comes first"


def test_only_ready_replicas_serve() -> None:
    others = [state for state in ReplicaState if state is not ReplicaState.READY]
    assert choose(fleet(*(replica(state.value, state=state) for state in others))) is None


def test_every_replica_is_explained() -> None:
    view = fleet(
        replica("a", 2),
        replica("b", 2),
        replica("c", 1),
        replica("d", can_chat=False),
        replica("e", state=ReplicaState.STARTING),
    )
    lines = explain(MODEL, Ability.CHAT, view, {ReplicaId("b"): 1, ReplicaId("c"): 1})
    assert [line.split(":")[1].split()[0] for line in lines] == ["chosen", "not", "full", "cannot", "not"]


replicas = st.lists(
    st.builds(replica, st.uuids().map(str), st.integers(1, 4), st.sampled_from(ReplicaState), can_chat=st.booleans()),
    max_size=6,
)


@given(replicas, st.data())
def test_a_route_is_always_ready_able_free_and_the_same_again(views: list[ReplicaView], data: st.DataObject) -> None:
    taken = {view.id: data.draw(st.integers(0, view.slots)) for view in views}
    first = route(MODEL, Ability.CHAT, fleet(*views), taken)
    assert first == route(MODEL, Ability.CHAT, fleet(*views), taken)
    able = [v for v in views if v.state is ReplicaState.READY and Ability.CHAT in v.abilities and taken[v.id] < v.slots]
    if first.replica is None:
        assert not able
    else:
        assert first.replica in able
        assert all(taken[first.replica.id] / first.replica.slots <= taken[v.id] / v.slots for v in able)
