"""placement.plan: examples for each numbered step, then what holds of every plan."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fleetmind.core.types import GIB, MIB, ModelName, ReplicaId
from fleetmind.fleet.placement import Demand, PlacementPolicy, RefusalCode, memory_bytes_needed, plan
from fleetmind.fleet.snapshot import DeviceView, FleetSnapshot, ModelSource
from fleetmind.node.protocol import DeviceKind, ReplicaState
from fleetmind.testing.snapshots import make_model, make_replica, make_shape, make_snapshot, make_view

POLICY = PlacementPolicy(starts_max=8)
NOTHING = Demand()


# 1 keep


def test_what_is_wanted_and_healthy_stays() -> None:
    fleet = make_snapshot([make_model()], [make_view(granted=GIB)], [make_replica("r")])
    decided = plan(fleet, NOTHING, POLICY)
    assert (decided.keep, decided.start, decided.stop, decided.refusals) == (("r",), (), (), ())


def test_a_replica_on_a_device_with_a_fault_stays() -> None:
    fleet = make_snapshot([make_model()], [make_view(fault="no answer")], [make_replica("r")])
    assert plan(fleet, NOTHING, POLICY).keep == ("r",)


def test_a_failed_or_draining_replica_is_replaced() -> None:
    for state in (ReplicaState.FAILED, ReplicaState.DRAINING, ReplicaState.STOPPED):
        fleet = make_snapshot([make_model()], [make_view()], [make_replica("r", state=state)])
        decided = plan(fleet, NOTHING, POLICY)
        assert (decided.keep, len(decided.start), decided.stop) == ((), 1, ())


# 2 fit


def test_a_model_that_fits_nowhere_has_a_reason_for_each_device() -> None:
    views = [
        make_view("full", memory_bytes=4 * GIB, foreign=3 * GIB),
        make_view("small", memory_bytes=GIB),
        make_view("broken", fault="fell off the bus"),
    ]
    decided = plan(make_snapshot([make_model(memory_bytes=2 * GIB)], views), NOTHING, POLICY)
    assert decided.start == ()
    assert {(refusal.device_id, refusal.code) for refusal in decided.refusals} == {
        ("full", RefusalCode.NO_MEMORY),
        ("small", RefusalCode.TOO_LARGE),
        ("broken", RefusalCode.DEVICE_FAULT),
    }
    full = next(refusal for refusal in decided.refusals if refusal.device_id == "full")
    assert full.message == "needs 2.0 GiB, 768.0 MiB free of 4.0 GiB after 256.0 MiB reserve"
    assert (full.memory_bytes_needed, full.memory_bytes_free) == (2 * GIB, 768 * MIB)


def test_the_start_before_it_counts_against_the_next() -> None:
    models = [make_model("a", memory_bytes=14 * GIB, added_at_s=1.0), make_model("b", memory_bytes=14 * GIB)]
    decided = plan(make_snapshot(models, [make_view()]), NOTHING, POLICY)
    assert [start.model for start in decided.start] == ["a"]
    (refusal,) = decided.refusals
    assert refusal.message.startswith("needs 14.0 GiB, 9.8 GiB free of 24.0 GiB")


def test_without_devices_there_is_one_refusal() -> None:
    (refusal,) = plan(make_snapshot([make_model()]), NOTHING, POLICY).refusals
    assert (refusal.device_id, refusal.code) == (None, RefusalCode.NO_DEVICES)


def test_a_remote_model_needs_no_device() -> None:
    (start,) = plan(make_snapshot([make_model(source=ModelSource.REMOTE)]), NOTHING, POLICY).start
    assert (start.device_ids, start.memory_bytes) == ((), 0)


def test_an_engine_goes_only_where_it_can_compute() -> None:
    views = [make_view("gpu", is_simulated=False), make_view("cpu", kind=DeviceKind.CPU, is_simulated=False)]
    fleet = make_snapshot([make_model(source=ModelSource.FILE)], views)
    only_cpu = replace(POLICY, engine_kinds={"llamacpp": frozenset({DeviceKind.CPU})})
    assert plan(fleet, NOTHING, POLICY).start[0].device_ids == ("gpu",)
    (start,) = plan(fleet, NOTHING, only_cpu).start
    assert start.device_ids == ("cpu",)
    assert "not gpu the engine llamacpp computes on cpu, not on cuda" in start.reason


def test_real_models_and_simulated_devices_keep_apart_where_both_are() -> None:
    views = [make_view("sim"), make_view("cpu", kind=DeviceKind.CPU, is_simulated=False)]
    models = [make_model("fake"), make_model("real", source=ModelSource.FILE)]
    placed = {start.model: start.device_ids for start in plan(make_snapshot(models, views), NOTHING, POLICY).start}
    assert placed == {"fake": ("sim",), "real": ("cpu",)}


def test_a_fake_model_takes_no_real_gpu() -> None:
    (refusal,) = plan(make_snapshot([make_model()], [make_view(is_simulated=False)]), NOTHING, POLICY).refusals
    assert refusal.code is RefusalCode.WRONG_KIND


def test_a_file_needs_what_its_footprint_says() -> None:
    model = make_model(source=ModelSource.FILE, shape=make_shape(weights_bytes=3 * GIB))
    (start,) = plan(make_snapshot([model], [make_view()]), NOTHING, POLICY).start
    assert start.memory_bytes == memory_bytes_needed(model, DeviceKind.CUDA) > 3 * GIB


# 3 score


def best(*views: DeviceView, policy: PlacementPolicy = POLICY) -> str:
    (start,) = plan(make_snapshot([make_model(memory_bytes=4 * GIB)], views), NOTHING, policy).start
    return start.device_ids[0]


def test_the_tighter_fit_wins() -> None:
    assert best(make_view("a"), make_view("b", memory_bytes=8 * GIB)) == "b"


def test_the_idler_device_wins() -> None:
    assert best(make_view("a", utilisation=0.9), make_view("b", utilisation=0.1)) == "b"


def test_the_cooler_device_wins() -> None:
    assert best(make_view("a", temperature_c=85.0), make_view("b", temperature_c=50.0)) == "b"


def test_a_device_that_says_nothing_is_middling() -> None:
    silent = make_view("m", utilisation=None, temperature_c=None)
    assert best(silent, make_view("z", utilisation=0.1, temperature_c=40.0)) == "z"
    assert best(silent, make_view("a", utilisation=0.9, temperature_c=80.0)) == "m"


def test_a_second_replica_goes_where_the_first_is_not() -> None:
    fleet = make_snapshot([make_model(replicas=2)], [make_view("a", granted=GIB), make_view("b", granted=GIB)])
    assert {start.device_ids for start in plan(fleet, NOTHING, POLICY).start} == {("a",), ("b",)}


def test_a_gpu_comes_before_the_processor() -> None:
    hot = make_view("z", utilisation=1.0, temperature_c=95.0)
    assert best(make_view("a", kind=DeviceKind.CPU, memory_bytes=5 * GIB), hot) == "z"


def test_a_tie_goes_to_the_smaller_id() -> None:
    assert best(make_view("b"), make_view("a"), make_view("c")) == "a"


def test_the_weights_decide() -> None:
    tight, idle = make_view("tight", memory_bytes=5 * GIB, utilisation=1.0), make_view("idle")
    assert best(tight, idle, policy=replace(POLICY, memory_fit=1.0, utilisation=0.0)) == "tight"
    assert best(tight, idle, policy=replace(POLICY, memory_fit=0.0, utilisation=1.0)) == "idle"


# 4 evict


def test_what_nobody_wants_is_stopped() -> None:
    replicas = [make_replica("gone", "removed"), make_replica("new", created_at_s=2.0), make_replica("old")]
    fleet = make_snapshot(
        [make_model()], [make_view()], [*replicas[:1], replace(replicas[2], created_at_s=1.0), replicas[1]]
    )
    decided = plan(fleet, NOTHING, POLICY)
    assert decided.keep == ("old",)
    assert {stop.replica_id: stop.reason for stop in decided.stop} == {
        "gone": "the model was removed",
        "new": "1 replicas are wanted",
    }


def test_of_a_surplus_the_one_that_serves_stays() -> None:
    starting = make_replica("a", state=ReplicaState.STARTING, created_at_s=1.0)
    fleet = make_snapshot([make_model()], [make_view()], [starting, make_replica("b")])
    assert plan(fleet, NOTHING, POLICY).keep == ("b",)


def test_an_unwanted_replica_is_replaced() -> None:
    fleet = make_snapshot([make_model()], [make_view(granted=GIB)], [make_replica("r")])
    decided = plan(fleet, Demand(unwanted={ReplicaId("r"): "asked"}), POLICY)
    assert [(stop.replica_id, stop.reason) for stop in decided.stop] == [("r", "asked")]
    assert len(decided.start) == 1


def test_nothing_is_stopped_to_make_room() -> None:
    models = [make_model("a", memory_bytes=20 * GIB), make_model("b", memory_bytes=20 * GIB)]
    fleet = make_snapshot(models, [make_view(granted=20 * GIB)], [make_replica("r", "a", memory_bytes=20 * GIB)])
    decided = plan(fleet, NOTHING, POLICY)
    assert (decided.keep, decided.stop) == (("r",), ())
    assert [refusal.model for refusal in decided.refusals] == ["b"]


# 5 cap


def test_starts_are_capped_and_the_rest_waits() -> None:
    fleet = make_snapshot([make_model(str(number)) for number in range(5)], [make_view()])
    decided = plan(fleet, NOTHING, replace(POLICY, starts_max=2))
    assert (len(decided.start), len(decided.deferred)) == (2, 3)


def test_every_model_gets_its_first_replica_before_any_its_second() -> None:
    models = [make_model("greedy", replicas=3, added_at_s=1.0), make_model("modest", added_at_s=2.0)]
    decided = plan(make_snapshot(models, [make_view()]), NOTHING, replace(POLICY, starts_max=2))
    assert [start.model for start in decided.start] == ["greedy", "modest"]


def test_a_model_that_is_held_is_not_started() -> None:
    decided = plan(make_snapshot([make_model()], [make_view()]), Demand(held={ModelName("model"): "pauses"}), POLICY)
    assert decided.start == ()
    assert [(entry.model, entry.reason) for entry in decided.deferred] == [("model", "pauses")]


def test_the_demand_may_want_another_number_than_the_catalogue() -> None:
    decided = plan(make_snapshot([make_model()], [make_view()]), Demand({ModelName("model"): 3}), POLICY)
    assert len(decided.start) == 3


# What holds of every plan

names = st.sampled_from(["a", "b", "c", "d", "e"])
device_names = st.sampled_from(["cpu", "gpu-0", "gpu-1", "gpu-2"])


@st.composite
def fleets(draw: st.DrawFn) -> FleetSnapshot:
    views = []
    for device_id in draw(st.lists(device_names, unique=True, max_size=4)):
        total = draw(st.integers(1, 32)) * GIB
        views.append(
            make_view(
                device_id,
                kind=DeviceKind.CPU if device_id == "cpu" else DeviceKind.CUDA,
                memory_bytes=total,
                is_simulated=draw(st.booleans()),
                granted=draw(st.integers(0, 40)) * GIB // 2,
                foreign=draw(st.integers(0, 40)) * GIB // 2,
                utilisation=draw(st.one_of(st.none(), st.floats(0, 1))),
                temperature_c=draw(st.one_of(st.none(), st.floats(-50, 200))),
                fault=draw(st.sampled_from([None, None, None, "broken"])),
            )
        )
    models = [
        make_model(
            name,
            source=draw(st.sampled_from([ModelSource.FAKE, ModelSource.FAKE, ModelSource.FILE, ModelSource.REMOTE])),
            memory_bytes=draw(st.integers(0, 20)) * GIB,
            replicas=draw(st.integers(0, 3)),
            added_at_s=draw(st.integers(0, 3)),
        )
        for name in draw(st.lists(names, unique=True))
    ]
    replicas = [
        make_replica(
            f"r{number}",
            draw(names),
            state=draw(st.sampled_from(list(ReplicaState))),
            devices=draw(st.lists(device_names, unique=True, max_size=1)),
            created_at_s=draw(st.integers(0, 3)),
        )
        for number in range(draw(st.integers(0, 6)))
    ]
    return make_snapshot(models, views, replicas)


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    unwanted = {ReplicaId(f"r{number}"): "asked" for number in draw(st.sets(st.integers(0, 6)))}
    held = {ModelName(name): "pauses" for name in draw(st.sets(names))} if draw(st.booleans()) else {}
    return Demand(unwanted=unwanted, held=held)


policies = st.builds(
    PlacementPolicy,
    starts_max=st.integers(1, 5),
    reserve_bytes=st.sampled_from([0, 256 * MIB, 2 * GIB]),
    memory_fit=st.floats(0, 1),
    utilisation=st.floats(0, 1),
    engine_kinds=st.sampled_from([{}, {"llamacpp": frozenset({DeviceKind.CPU})}]),
)
cases = given(fleet=fleets(), demand=demands(), policy=policies)
thorough = settings(max_examples=300, deadline=None)


@thorough
@cases
def test_no_device_is_over_committed(fleet: FleetSnapshot, demand: Demand, policy: PlacementPolicy) -> None:
    granted: Counter[str] = Counter()
    for start in plan(fleet, demand, policy).start:
        for device_id in start.device_ids:
            granted[device_id] += start.memory_bytes
    for view in fleet.devices:
        new = granted[view.device.id]
        taken = view.memory_bytes_foreign + view.memory_bytes_granted + policy.reserve_bytes
        assert new == 0 or taken + new <= view.device.memory_bytes_total


@thorough
@cases
def test_every_wanted_replica_is_accounted_for(fleet: FleetSnapshot, demand: Demand, policy: PlacementPolicy) -> None:
    decided = plan(fleet, demand, policy)
    models = {replica.id: replica.model for replica in fleet.replicas}
    got = Counter(models[replica_id] for replica_id in decided.keep)
    got.update(start.model for start in decided.start)
    got.update(entry.model for entry in decided.deferred)
    refused: dict[str, list[str | None]] = {}
    for refusal in decided.refusals:
        assert refusal.message
        refused.setdefault(refusal.model, []).append(refusal.device_id)
    for name, model in fleet.models.items():
        assert got[name] <= model.replicas_wanted
        if got[name] < model.replicas_wanted:
            assert sorted(map(str, refused[name])) == sorted(view.device.id for view in fleet.devices) or (
                refused[name] == [None] and not fleet.devices
            )
        else:
            assert name not in refused


@thorough
@cases
def test_a_healthy_wanted_replica_is_never_stopped(
    fleet: FleetSnapshot, demand: Demand, policy: PlacementPolicy
) -> None:
    decided = plan(fleet, demand, policy)
    by_id = {replica.id: replica for replica in fleet.replicas}
    kept = Counter(by_id[replica_id].model for replica_id in decided.keep)
    for stop in decided.stop:
        replica = by_id[stop.replica_id]
        wanted = fleet.models[replica.model].replicas_wanted if replica.model in fleet.models else 0
        assert stop.replica_id in demand.unwanted or kept[replica.model] == wanted
        assert stop.reason


@thorough
@cases
def test_starts_are_capped_held_models_wait_and_broken_devices_get_nothing(
    fleet: FleetSnapshot, demand: Demand, policy: PlacementPolicy
) -> None:
    decided = plan(fleet, demand, policy)
    broken = {view.device.id for view in fleet.devices if view.reading is None or view.reading.fault}
    assert len(decided.start) <= policy.starts_max
    for start in decided.start:
        assert start.model not in demand.held
        assert broken.isdisjoint(start.device_ids)
        assert 0.0 <= start.score <= 1.0
        assert (start.device_ids == ()) == (fleet.models[start.model].source is ModelSource.REMOTE)


@thorough
@given(fleet=fleets(), demand=demands(), policy=policies, data=st.data())
def test_the_order_of_things_makes_no_difference(
    fleet: FleetSnapshot, demand: Demand, policy: PlacementPolicy, data: st.DataObject
) -> None:
    decided = plan(fleet, demand, policy)
    shuffled = make_snapshot(
        data.draw(st.permutations(list(fleet.models.values()))),
        data.draw(st.permutations(list(fleet.devices))),
        data.draw(st.permutations(list(fleet.replicas))),
    )
    assert plan(fleet, demand, policy) == decided
    assert plan(shuffled, demand, policy) == decided
