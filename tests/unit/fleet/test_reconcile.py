"""The reconciler drives a recording node on a clock moved by hand."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fleetmind.core.errors import NotFound
from fleetmind.core.settings import FleetSettings, Settings
from fleetmind.core.telemetry import Metrics
from fleetmind.core.types import GIB, ModelName, ReplicaId
from fleetmind.fleet.catalog import Catalog
from fleetmind.fleet.inventory import Inventory
from fleetmind.fleet.reconcile import Reconciler
from fleetmind.fleet.snapshot import ModelStatus
from fleetmind.node.protocol import Device, ReplicaState
from fleetmind.testing.clocks import ManualClock, settle
from fleetmind.testing.model_files import tiny_model
from fleetmind.testing.snapshots import make_device

from .fakes import MemoryDocuments, MemoryJournal, RecordingNode

SETTINGS = FleetSettings(restart_backoff_s_max=8.0)


class World:
    """One fleet with everything around it recorded."""

    def __init__(self, home: Path, settings: FleetSettings = SETTINGS, devices: tuple[Device, ...] = ()) -> None:
        self.clock = ManualClock()
        self.node = RecordingNode(self.clock, devices or (make_device(),))
        self.journal = MemoryJournal()
        self.metrics = Metrics()
        self.outstanding: dict[ReplicaId, int] = {}
        self.catalog = Catalog(MemoryDocuments(), Settings(), self.clock, home=home)
        self.inventory = Inventory(self.catalog, self.clock)
        self.reconciler = Reconciler(
            self.catalog,
            self.inventory,
            self.node,
            self.journal,
            settings,
            self.clock,
            self.metrics,
            lambda replica_id: self.outstanding.get(replica_id, 0),
        )

    async def step(self) -> None:
        await self.reconciler.step()

    async def pass_s(self, seconds: float) -> None:
        await self.clock.advance(seconds)
        await self.step()

    def status(self, name: str = "m") -> ModelStatus:
        return self.inventory.snapshot().statuses[ModelName(name)]

    def is_ready(self, name: str = "m") -> bool:
        return ModelName(name) in self.inventory.snapshot().ready

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Its loops, as a supervisor would run them."""
        tasks = [asyncio.create_task(run()) for run in self.reconciler.loops().values()]  # type: ignore[arg-type]
        try:
            await settle()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(tmp_path: Path) -> MakeWorld:
    return lambda **changes: World(tmp_path, **changes)


async def test_a_wanted_model_is_started_and_serves(world: World) -> None:
    await world.catalog.add_fake("m", {"memory_bytes": 4 * GIB, "ttft_s": 1.0}, slots=3)
    await world.step()
    (report,) = world.node.replicas()
    spec = report.spec
    assert (spec.model, spec.engine, spec.slots, spec.device_ids) == ("m", "fake", 3, ("gpu-0",))
    assert spec.memory_bytes == 4 * GIB
    assert spec.options == {"ttft_s": 1.0}, "simulated memory is not really held"
    assert world.status().reason == "it is loading"
    world.node.ready("m")
    await world.step()
    assert world.is_ready()
    assert world.inventory.snapshot().statuses == {}
    assert world.journal.kinds() == ["replica.starting", "placement.planned", "replica.ready"]


async def test_nothing_changes_when_nothing_changes(world: World) -> None:
    await world.catalog.add_fake("m", {})
    await world.step()
    world.node.ready("m")
    await world.step()
    version, events, told = world.inventory.snapshot().version, len(world.journal.events), len(world.node.told)
    for _ in range(20):
        await world.pass_s(1.0)
    assert world.inventory.snapshot().version == version
    assert (len(world.journal.events), len(world.node.told)) == (events, told)


async def test_a_remote_model_is_started_without_a_device(world: World) -> None:
    await world.catalog.add_remote("m", "http://example.org", remote_model="big", key_env="KEY")
    await world.step()
    (report,) = world.node.replicas()
    assert (report.spec.device_ids, report.spec.url, report.spec.key_env) == ((), "http://example.org/v1", "KEY")
    assert report.spec.remote_model == "big"


async def test_starts_are_capped_per_step(world: World) -> None:
    for number in range(5):
        await world.catalog.add_fake(f"m{number}", {})
    counts = []
    for _ in range(4):
        await world.step()
        counts.append(world.node.begun())
    assert counts == [2, 4, 5, 5]


# Failing starts


async def test_starts_that_fail_are_paused_then_given_a_rest_then_tried_again(world: World) -> None:
    await world.catalog.add_fake("m", {})
    began: list[float] = []
    for _ in range(200):
        before = world.node.begun()
        await world.step()
        if world.node.begun() > before:
            began.append(world.clock.monotonic_s() - 1000.0)
            world.node.fail("m", "exit status 1")
            await world.step()
        await world.clock.advance(0.5)
    assert began[:3] == [0.0, 0.5, 1.5]
    assert began[3] == pytest.approx(61.5)
    assert len(began) == 4
    status = world.status()
    assert status.is_failed
    assert "failed to start" in status.reason
    assert "exit status 1" in status.reason
    assert 0 < status.retry_after_s <= 60.0


async def test_a_pause_shorter_than_the_interval_is_kept_by_the_loop(world: World) -> None:
    await world.catalog.add_fake("m", {})
    async with world.running():
        world.node.fail("m")
        world.reconciler.wake()
        await settle()
        assert world.node.begun() == 1
        await world.clock.advance(0.5)
        assert world.node.begun() == 2


@pytest.mark.parametrize("cure", ["owner", "model", "devices"])
async def test_a_failed_model_is_tried_at_once_when_something_changed(world: World, cure: str) -> None:
    await world.catalog.add_fake("m", {})
    for _ in range(3):
        await world.pass_s(5.0)
        world.node.fail("m")
        await world.step()
    assert world.status().is_failed
    assert world.node.begun() == 3
    if cure == "owner":
        (failed,) = world.node.of("m")
        await world.reconciler.restart(failed)
    elif cure == "model":
        await world.catalog.remove("m")
        await world.catalog.add_fake("m", {"ttft_s": 1.0})
    else:
        world.node.found = (*world.node.found, make_device("gpu-1"))
    await world.step()
    assert world.node.begun() == 4


async def test_what_the_node_refuses_outright_counts_as_a_failed_start(world: World) -> None:
    await world.catalog.add_fake("m", {})
    world.node.refuses = "there is no engine 'fake'"
    for _ in range(10):
        await world.pass_s(5.0)
    assert world.node.replicas() == ()
    assert world.status().is_failed
    assert "no engine" in world.status().reason
    assert world.journal.kinds().count("replica.failed") == 3
    world.node.refuses = ""
    await world.pass_s(60.0)
    assert world.node.begun() == 1


async def test_the_last_failure_stays_to_be_seen_until_the_model_is_well(world: World) -> None:
    await world.catalog.add_fake("m", {})
    await world.step()
    for _ in range(2):
        world.node.fail("m")
        await world.step()
        await world.pass_s(2.0)
    assert len(world.node.of("m", ReplicaState.FAILED)) == 1
    world.node.ready("m")
    await world.step()
    assert world.node.of("m", ReplicaState.FAILED) == []
    assert [replica.state for replica in world.inventory.snapshot().replicas] == [ReplicaState.READY]


# Crashes


async def test_fifty_kills_in_a_row_and_it_comes_back_each_time_at_once(world: World) -> None:
    await world.catalog.add_fake("m", {})
    await world.step()
    for kill in range(50):
        world.node.ready("m")
        await world.pass_s(10.0)
        assert world.is_ready()
        world.node.fail("m", "killed by signal 9")
        await world.step()
        assert world.node.begun() == kill + 2


async def test_fifty_kills_right_after_the_start_and_it_still_comes_back(world: World) -> None:
    await world.catalog.add_fake("m", {})
    await world.step()
    for _ in range(50):
        world.node.ready("m")
        await world.step()
        world.node.fail("m", "killed by signal 9")
        await world.step()
        for _ in range(9):
            if world.node.of("m", ReplicaState.STARTING):
                break
            assert not world.status().is_failed
            await world.pass_s(1.0)
        assert world.node.of("m", ReplicaState.STARTING), "the pause is bounded by restart_backoff_s_max"


async def test_a_crash_seen_only_at_its_end_is_a_crash(world: World) -> None:
    """Ready and gone between two steps: still a replica that served, not a start that failed."""
    await world.catalog.add_fake("m", {})
    await world.step()
    world.node.ready("m")
    await world.clock.advance(60.0)
    world.node.fail("m")
    await world.step()
    assert world.journal.kinds().count("replica.ready") == 1
    assert world.node.begun() == 2


# Stopping


async def test_a_removed_model_drains_before_it_stops(world: World) -> None:
    await world.catalog.add_fake("m", {})
    async with world.running():
        replica_id = world.node.ready("m")
        world.reconciler.wake()
        await settle()
        world.outstanding[replica_id] = 2
        await world.catalog.remove("m")
        await settle()
        assert world.node.told[-1] == ("drain", replica_id)
        assert not world.is_ready(), "no new calls from here on"
        await world.clock.advance(5.0)
        assert ("stop", replica_id) not in world.node.told
        world.outstanding[replica_id] = 0
        await world.clock.advance(1.0)
        assert world.node.told[-2:] == [("stop", replica_id), ("forget", replica_id)]
        await settle()
    assert world.inventory.snapshot().replicas == ()
    assert "replica.stopped" in world.journal.kinds()


async def test_draining_has_an_end(world: World) -> None:
    await world.catalog.add_fake("m", {})
    async with world.running():
        replica_id = world.node.ready("m")
        world.reconciler.wake()
        await settle()
        world.outstanding[replica_id] = 1
        await world.catalog.remove("m")
        await settle()
        await world.clock.advance(29.0)
        assert ("stop", replica_id) not in world.node.told
        await world.clock.advance(2.0)
        assert world.node.told.count(("stop", replica_id)) == 1


async def test_a_crash_while_draining_is_no_failure(world: World) -> None:
    await world.catalog.add_fake("m", {}, replicas=1)
    await world.step()
    replica_id = world.node.ready("m")
    await world.step()
    world.outstanding[replica_id] = 1
    await world.reconciler.restart(replica_id)
    await world.step()
    world.node.move(replica_id, ReplicaState.FAILED, "killed")
    await world.step()
    assert world.metrics.replica_failures_total.labels("m")._value.get() == 0
    assert replica_id not in world.node.reports or world.node.of("m", ReplicaState.STARTING)


async def test_a_restart_replaces_the_replica(world: World) -> None:
    await world.catalog.add_fake("m", {})
    async with world.running():
        first = world.node.ready("m")
        world.reconciler.wake()
        await settle()
        await world.reconciler.restart(first)
        await settle()
        assert ("drain", first) in world.node.told
        second = world.node.ready("m")
        await world.clock.advance(2.0)
        assert second != first
        assert world.node.of("m") == [second]


async def test_a_restart_of_nothing_is_not_found(world: World) -> None:
    with pytest.raises(NotFound):
        await world.reconciler.restart(ReplicaId("nobody"))


async def test_where_only_one_fits_the_next_waits_for_the_first_to_go(world: World) -> None:
    await world.catalog.add_fake("m", {"memory_bytes": 20 * GIB})
    async with world.running():
        first = world.node.ready("m")
        world.reconciler.wake()
        await settle()
        world.outstanding[first] = 1
        await world.reconciler.restart(first)
        await settle()
        assert not world.status().is_failed, "room is being made"
        assert world.node.begun() == 1
        world.outstanding[first] = 0
        await world.clock.advance(3.0)
        assert world.node.begun() == 2


async def test_a_model_that_was_changed_gets_new_replicas(world: World) -> None:
    await world.catalog.add_fake("m", {"ttft_s": 1.0})
    await world.step()
    first = world.node.ready("m")
    await world.step()
    await world.catalog.remove("m")
    await world.catalog.add_fake("m", {"ttft_s": 2.0})
    await world.step()
    assert world.node.reports[first].state is ReplicaState.DRAINING
    (second,) = world.node.of("m", ReplicaState.STARTING)
    assert world.node.reports[second].spec.options == {"ttft_s": 2.0}


# Not placed


async def test_what_fits_nowhere_says_so_once_in_the_journal(world: World) -> None:
    await world.catalog.add_fake("m", {"memory_bytes": 99 * GIB})
    for used in range(5):
        world.node.used["gpu-0"] = used * GIB  # type: ignore[index]
        await world.pass_s(1.0)
    assert world.journal.kinds() == ["placement.planned"]
    assert world.status().is_failed
    assert "gpu-0 needs 99.0 GiB" in world.status().reason
    decided = world.reconciler.explain()
    assert decided is not None
    assert decided.refusals[0].device_id == "gpu-0"


async def test_it_is_started_as_soon_as_there_is_room(world: World) -> None:
    await world.catalog.add_fake("m", {"memory_bytes": 20 * GIB})
    world.node.used = {device.id: 10 * GIB for device in world.node.found}
    await world.step()
    assert world.node.begun() == 0
    world.node.used = {}
    await world.pass_s(1.0)
    assert world.node.begun() == 1


async def test_a_model_whose_file_is_gone_waits_for_it(world: World, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model())
    world.node.found = (replace(make_device("cpu"), is_simulated=False),)
    await world.catalog.add_file(path)
    path.rename(tmp_path / "away")
    await world.step()
    assert world.node.begun() == 0
    assert world.status().is_failed
    assert "is gone" in world.status().reason
    (tmp_path / "away").rename(path)
    await world.pass_s(1.0)
    assert world.node.begun() == 1


# Loops


async def test_no_wake_up_is_lost(world: World) -> None:
    """A change while a step is writing its journal leads to another step without any time passing."""
    world.journal.may_write.clear()
    await world.catalog.add_fake("one", {})
    async with world.running():
        await world.catalog.add_fake("two", {})
        await settle()
        assert world.node.begun() == 1, "the first step still hangs in the journal"
        world.journal.may_write.set()
        await settle()
        assert world.node.begun() == 2


async def test_steps_do_not_overlap(world: World) -> None:
    await world.catalog.add_fake("m", {})
    world.journal.may_write.clear()
    steps = [asyncio.create_task(world.step()) for _ in range(10)]
    await settle()
    world.journal.may_write.set()
    await asyncio.gather(*steps)
    assert world.node.begun() == 1
    assert world.journal.kinds() == ["replica.starting", "placement.planned"]


async def test_devices_are_read_once_an_interval_however_often_it_is_woken(world: World) -> None:
    async with world.running():
        for _ in range(50):
            world.reconciler.wake()
            await settle()
        assert world.node.reads == 1
        await world.clock.advance(3.0)
        assert world.node.reads == 4


async def test_a_reported_failure_is_looked_into_at_once(world: World) -> None:
    await world.catalog.add_fake("m", {})
    async with world.running():
        replica_id = world.node.ready("m")
        world.reconciler.report_failure(replica_id, "connection refused")
        world.reconciler.report_failure(replica_id, "connection refused")
        world.reconciler.report_failure(ReplicaId("gone"), "connection refused")
        await settle()
        assert world.node.told.count(("check", replica_id)) == 1
        assert world.is_ready()


async def test_a_journal_that_refuses_does_not_stop_the_fleet_and_loses_nothing(world: World) -> None:
    await world.catalog.add_fake("m", {})
    world.journal.refuses = True
    await world.step()
    world.node.ready("m")
    await world.step()
    assert world.is_ready()
    world.journal.refuses = False
    await world.step()
    assert world.journal.kinds() == ["replica.starting", "placement.planned", "replica.ready"]


async def test_metrics_follow(world: World) -> None:
    await world.catalog.add_fake("m", {})
    await world.step()
    world.node.ready("m")
    await world.step()
    text = world.metrics.render().decode()
    assert 'fleetmind_replicas{model="m",state="ready"} 1.0' in text
    assert 'state="starting"' not in text
    assert 'fleetmind_replica_starts_total{model="m"} 1.0' in text
    assert 'fleetmind_device_memory_bytes_total{device="gpu-0"}' in text
    assert "fleetmind_device_power_w{device" not in text, "a device that doesn't say is not zero"


async def test_a_surplus_is_stopped(make_world: MakeWorld) -> None:
    world = make_world(settings=FleetSettings(starts_max=5))
    await world.catalog.add_fake("m", {}, replicas=3)
    await world.step()
    for replica_id in world.node.of("m"):
        world.node.move(replica_id, ReplicaState.READY)
    await world.step()
    await world.catalog.remove("m")
    await world.catalog.add_fake("m", {}, replicas=1)
    await world.step()
    assert len(world.node.of("m", ReplicaState.DRAINING)) == 2
    assert len(world.node.of("m", ReplicaState.READY)) == 1
