"""What a model without a ready replica says of itself."""

from fleetmind.core.types import GIB, ModelName
from fleetmind.fleet.placement import Demand, PlacementPolicy, plan
from fleetmind.fleet.restarts import Restarts
from fleetmind.fleet.snapshot import FleetSnapshot, ModelStatus
from fleetmind.fleet.statuses import Known, statuses_of
from fleetmind.node.protocol import ReplicaState
from fleetmind.testing.snapshots import make_model, make_replica, make_snapshot, make_view

MODEL = ModelName("model")


def status(fleet: FleetSnapshot, known: Known | None = None, held: str = "") -> ModelStatus:
    decided = plan(fleet, Demand(held={MODEL: held} if held else {}), PlacementPolicy())
    return statuses_of(fleet, decided, known or Known(), 100.0)[MODEL]


def test_a_ready_model_has_none() -> None:
    fleet = make_snapshot([make_model()], [make_view()], [make_replica()])
    assert statuses_of(fleet, plan(fleet, Demand(), PlacementPolicy()), Known(), 0.0) == {}


def test_nobody_wants_it() -> None:
    assert status(make_snapshot([make_model(replicas=0)], [make_view()])).is_failed


def test_loading_promises_what_it_took_the_last_time() -> None:
    fleet = make_snapshot([make_model()], [make_view()], [make_replica(state=ReplicaState.STARTING)])
    loading = status(fleet, Known(load_s={MODEL: 8.0}, waited_s={MODEL: 3.0}))
    assert (loading.reason, loading.retry_after_s, loading.is_failed) == ("it is loading", 5.0, False)
    assert status(fleet, Known(load_s={MODEL: 8.0}, waited_s={MODEL: 30.0})).retry_after_s == 1.0


def test_a_file_that_is_gone() -> None:
    fleet = make_snapshot([make_model()], [make_view()])
    gone = status(fleet, Known(file_faults={MODEL: "the file is gone"}), held="the file is gone")
    assert (gone.reason, gone.is_failed) == ("the file is gone", True)


def test_failed_says_how_often_why_and_when_again() -> None:
    record = Restarts(failed_starts=3, not_before_s=142.0, is_failed=True, reason="exit status 1")
    failed = status(make_snapshot([make_model()], [make_view()]), Known(restarts={MODEL: record}), held="pauses")
    assert failed == ModelStatus("it failed to start 3 times in a row: exit status 1", 42.0, is_failed=True)


def test_a_pause_is_not_the_end() -> None:
    record = Restarts(failed_starts=1, not_before_s=100.5, reason="exit status 1")
    pausing = status(make_snapshot([make_model()], [make_view()]), Known(restarts={MODEL: record}), held="pauses")
    assert (pausing.is_failed, pausing.retry_after_s) == (False, 1.0)


def test_what_fits_nowhere_says_so_with_numbers_unless_room_is_being_made() -> None:
    model, view = make_model(memory_bytes=20 * GIB), make_view(foreign=10 * GIB)
    unplaced = status(make_snapshot([model], [view]))
    assert unplaced.is_failed
    assert unplaced.reason.startswith("it fits on no device: gpu-0 needs 20.0 GiB, 13.8 GiB free of 24.0 GiB")
    leaving = make_replica("other", "other", state=ReplicaState.DRAINING)
    assert not status(make_snapshot([model], [view], [leaving])).is_failed


def test_waiting_for_a_turn_is_no_failure() -> None:
    assert not status(make_snapshot([make_model()], [make_view()])).is_failed
