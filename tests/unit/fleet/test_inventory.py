"""What the inventory makes of what it is told."""

from pathlib import Path

import pytest

from fleetmind.core.settings import Settings
from fleetmind.core.types import GIB, MIB, DeviceId, ModelName, ReplicaId
from fleetmind.fleet.catalog import Catalog
from fleetmind.fleet.inventory import Inventory
from fleetmind.fleet.snapshot import FleetSnapshot, ModelStatus
from fleetmind.node.protocol import DeviceKind, DeviceProcess, ReplicaState
from fleetmind.testing.clocks import ManualClock
from fleetmind.testing.model_files import F16, Tensor, gguf, llama
from fleetmind.testing.snapshots import make_device, make_reading, make_report

from .fakes import MemoryDocuments


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(MemoryDocuments(), Settings(), ManualClock(), home=tmp_path)


@pytest.fixture
def inventory(catalog: Catalog) -> Inventory:
    inventory = Inventory(catalog, ManualClock())
    inventory.set_devices([make_device("gpu", is_simulated=False)])
    return inventory


def told(inventory: Inventory) -> list[FleetSnapshot]:
    snapshots: list[FleetSnapshot] = []
    inventory.subscribe(snapshots.append)
    return snapshots


async def test_the_version_rises_with_models_and_replicas_only(catalog: Catalog, inventory: Inventory) -> None:
    seen = told(inventory)
    await catalog.add_fake("m", {})
    inventory.observe_replica(make_report("r", "m", devices=["gpu"]))
    assert [snapshot.version for snapshot in seen] == [1, 2]
    inventory.observe_replica(make_report("r", "m", devices=["gpu"]))
    inventory.observe_readings([make_reading("gpu", used=GIB)])
    inventory.models_changed()
    inventory.set_devices([make_device("gpu", is_simulated=False)])
    assert inventory.snapshot().version == 2
    assert len(seen) == 2
    reading = inventory.snapshot().devices[0].reading
    assert reading is not None
    assert reading.memory_bytes_used == GIB


async def test_a_replica_of_a_removed_model_serves_no_other_of_that_name(
    catalog: Catalog, inventory: Inventory
) -> None:
    await catalog.add_fake("m", {"seed": 1})
    inventory.observe_replica(make_report("old", "m", state=ReplicaState.READY, devices=["gpu"]))
    assert [replica.id for replica in inventory.snapshot().ready[ModelName("m")]] == ["old"]
    await catalog.remove("m")
    await catalog.add_fake("m", {"seed": 2})
    assert ModelName("m") not in inventory.snapshot().ready
    inventory.observe_replica(make_report("new", "m", state=ReplicaState.READY, devices=["gpu"]))
    assert [replica.id for replica in inventory.snapshot().ready[ModelName("m")]] == ["new"]
    assert len(inventory.snapshot().replicas) == 2, "it is still there, and holds its memory"


async def test_subscribers_see_the_snapshot_they_are_told_of(catalog: Catalog, inventory: Inventory) -> None:
    seen: list[tuple[FleetSnapshot, FleetSnapshot]] = []
    inventory.subscribe(lambda snapshot: seen.append((snapshot, inventory.snapshot())))
    await catalog.add_fake("m", {})
    assert all(given is current for given, current in seen)
    assert seen


def test_a_snapshot_does_not_change_under_its_reader(inventory: Inventory) -> None:
    before = inventory.snapshot()
    inventory.observe_replica(make_report("r", "m", devices=["gpu"]))
    assert before.replicas == ()
    assert inventory.snapshot().ready[ModelName("m")][0].id == "r"


def test_what_a_replica_was_granted_and_not_yet_used_is_not_free(inventory: Inventory) -> None:
    starting = make_report("r", "m", state=ReplicaState.STARTING, devices=["gpu"], memory_bytes=4 * GIB, pid=7)
    inventory.observe_replica(starting)
    inventory.observe_readings([make_reading("gpu", used=2 * GIB)])
    (view,) = inventory.snapshot().devices
    assert (view.memory_bytes_granted, view.memory_bytes_foreign) == (4 * GIB, 2 * GIB)
    assert view.memory_bytes_free(GIB) == (24 - 4 - 2 - 1) * GIB


def test_our_own_processes_are_not_counted_twice(inventory: Inventory) -> None:
    inventory.observe_replica(make_report("r", "m", devices=["gpu"], memory_bytes=4 * GIB, pid=7))
    processes = (DeviceProcess(7, "engine", 3 * GIB), DeviceProcess(8, "game", 2 * GIB))
    inventory.observe_readings([make_reading("gpu", used=5 * GIB, processes=processes)])
    (view,) = inventory.snapshot().devices
    assert (view.memory_bytes_granted, view.memory_bytes_foreign) == (4 * GIB, 2 * GIB)


def test_a_replica_that_takes_more_than_granted_is_counted_with_that(inventory: Inventory) -> None:
    inventory.observe_replica(make_report("r", "m", devices=["gpu"], memory_bytes=4 * GIB, pid=7))
    processes = (DeviceProcess(7, "engine", 6 * GIB),)
    inventory.observe_readings([make_reading("gpu", used=6 * GIB, processes=processes)])
    (view,) = inventory.snapshot().devices
    assert (view.memory_bytes_granted, view.memory_bytes_foreign) == (6 * GIB, 0)


def test_a_loaded_replica_counts_as_its_grant_where_processes_are_not_named(inventory: Inventory) -> None:
    inventory.observe_replica(make_report("r", "m", devices=["gpu"], memory_bytes=4 * GIB, pid=7))
    inventory.observe_readings([make_reading("gpu", used=5 * GIB)])
    (view,) = inventory.snapshot().devices
    assert (view.memory_bytes_granted, view.memory_bytes_foreign) == (4 * GIB, GIB)


def test_an_ended_replica_gives_its_memory_back(inventory: Inventory) -> None:
    inventory.observe_replica(make_report("r", "m", devices=["gpu"], memory_bytes=4 * GIB))
    inventory.observe_replica(make_report("r", "m", devices=["gpu"], state=ReplicaState.STOPPED))
    assert inventory.snapshot().devices[0].memory_bytes_granted == 0


def test_a_simulated_device_counts_grants_once(catalog: Catalog) -> None:
    """There the node adds our replicas' grants to what is used, also of those without a process yet."""
    inventory = Inventory(catalog, ManualClock())
    inventory.set_devices([make_device("sim", kind=DeviceKind.CUDA)])
    for replica_id, state in (("a", ReplicaState.READY), ("b", ReplicaState.STARTING)):
        inventory.observe_replica(make_report(replica_id, "m", devices=["sim"], state=state, memory_bytes=4 * GIB))
    inventory.observe_readings([make_reading("sim", used=(4 + 4 + 1) * GIB)])
    (view,) = inventory.snapshot().devices
    assert (view.memory_bytes_granted, view.memory_bytes_foreign) == (8 * GIB, GIB)


def test_a_device_that_is_not_there_is_ignored(inventory: Inventory) -> None:
    inventory.observe_readings([make_reading("elsewhere", used=GIB)])
    assert [view.device.id for view in inventory.snapshot().devices] == [DeviceId("gpu")]


async def test_becoming_failed_is_news_and_a_countdown_is_not(catalog: Catalog, inventory: Inventory) -> None:
    await catalog.add_fake("m", {})
    seen, name = told(inventory), ModelName("m")
    inventory.set_statuses({name: ModelStatus("loading", 5.0)})
    inventory.set_statuses({name: ModelStatus("loading", 4.0)})
    assert seen == []
    assert inventory.snapshot().statuses[name].retry_after_s == 4.0
    inventory.set_statuses({name: ModelStatus("broke", 60.0, is_failed=True)})
    inventory.set_statuses({name: ModelStatus("broke", 59.0, is_failed=True)})
    assert len(seen) == 1


def test_a_forgotten_replica_is_gone(inventory: Inventory) -> None:
    inventory.observe_replica(make_report("r", "m", state=ReplicaState.FAILED))
    inventory.forget_replica(ReplicaId("r"))
    inventory.forget_replica(ReplicaId("r"))
    assert inventory.snapshot().replicas == ()
    assert inventory.snapshot().version == 2


async def test_weights_mapped_from_a_file_are_not_taken_for_used_memory_of_the_processor(
    catalog: Catalog, inventory: Inventory, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(llama(), [Tensor("w", (1024, 2048), F16)]))
    await catalog.add_file(path)
    inventory.set_devices([make_device("cpu", kind=DeviceKind.CPU, is_simulated=False)])
    inventory.observe_replica(make_report("r", "m", devices=["cpu"], memory_bytes=10 * MIB))
    inventory.observe_readings([make_reading("cpu", used=100 * MIB)])
    (view,) = inventory.snapshot().devices
    assert (view.memory_bytes_granted, view.memory_bytes_foreign) == (10 * MIB, (100 - (10 - 4)) * MIB)
