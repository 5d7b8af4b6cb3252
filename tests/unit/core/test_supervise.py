"""Loops: back-off, health, ordered stop. Time is moved by hand."""

import asyncio
import io
import itertools
import json
import logging
from collections.abc import Iterator

import pytest

from fleetmind.core.clock import Dice
from fleetmind.core.supervise import LoopHealth, LoopState, Supervisor
from fleetmind.core.telemetry import JsonFormatter, log
from fleetmind.testing.clocks import ManualClock, settle


class Watch:
    """A supervisor with a clock in hand and its log lines in memory."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.restarted: list[str] = []
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(JsonFormatter())
        self.supervisor = Supervisor(
            self.clock, log("test.supervise"), dice=Dice(1), on_restart=self.restarted.append, backoff_s=1.0
        )

    def health(self, name: str) -> LoopHealth:
        return next(health for health in self.supervisor.health() if health.name == name)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch()
    logger = logging.getLogger("fleetmind.test.supervise")
    logger.addHandler(watch.handler)
    logger.propagate = False
    yield watch
    logger.removeHandler(watch.handler)
    logger.propagate = True


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_loop_with_an_interval_is_called_again_and_again(watch: Watch) -> None:
    calls: list[float] = []

    async def run() -> None:
        calls.append(watch.clock.monotonic_s())

    watch.supervisor.add("tick", run, interval_s=10.0)
    assert watch.health("tick").state is LoopState.WAITING
    await watch.supervisor.start()
    await watch.clock.advance(35.0)
    assert [call - calls[0] for call in calls] == [0.0, 10.0, 20.0, 30.0]
    health = watch.health("tick")
    assert (health.state, health.restarts, health.last_error) == (LoopState.RUNNING, 0, None)
    assert health.last_ok_at_s == watch.clock.now_s() - 5.0
    assert await watch.supervisor.stop(1.0) == ()
    assert watch.health("tick").state is LoopState.STOPPED
    await watch.clock.advance(100.0)
    assert len(calls) == 4


async def test_pauses_after_failures_double_up_to_the_longest_and_reset_after_success(watch: Watch) -> None:
    calls: list[float] = []
    fails = True

    async def run() -> None:
        calls.append(watch.clock.monotonic_s())
        if fails:
            raise ValueError("broken")

    watch.supervisor.add("flaky", run, interval_s=5.0)
    await watch.supervisor.start()
    await watch.clock.advance(200.0)
    pauses = [after - before for before, after in itertools.pairwise(calls)]
    for number, pause_s in enumerate(pauses):
        longest_s = min(2.0**number, 30.0)
        assert longest_s / 2 <= pause_s <= longest_s + 1e-6, f"pause {number} was {pause_s}"
    health = watch.health("flaky")
    assert health.state is LoopState.BACKING_OFF
    assert health.restarts == len(calls) == len(watch.restarted)
    assert health.last_error == "ValueError: broken"
    assert health.last_ok_at_s is None
    # Each failure is in the log, with its traceback.
    assert [line["event"] for line in watch.lines()] == ["loop failed"] * len(calls)
    assert all("ValueError: broken" in str(line["traceback"]) for line in watch.lines())

    fails = False
    await watch.clock.advance(40.0)
    assert watch.health("flaky").state is LoopState.RUNNING
    fails = True
    await watch.clock.advance(5.0)
    failed_at_s = calls[-1]
    await watch.clock.advance(1.0)
    assert len([call for call in calls if call > failed_at_s]) == 1, "the pauses did not start anew after a success"
    await watch.supervisor.stop(1.0)


async def test_a_long_lived_loop_is_started_again_only_when_it_fails(watch: Watch) -> None:
    starts = 0

    async def run() -> None:
        nonlocal starts
        starts += 1
        if starts < 3:
            raise OSError("gone")

    watch.supervisor.add("link", run)
    await watch.supervisor.start()
    await watch.clock.advance(60.0)
    assert starts == 3
    assert watch.health("link").state is LoopState.ENDED
    assert watch.health("link").restarts == 2
    assert await watch.supervisor.stop(1.0) == ()
    assert watch.health("link").state is LoopState.ENDED


async def test_a_loop_that_lived_well_before_it_failed_comes_back_soon(watch: Watch) -> None:
    starts: list[float] = []

    async def run() -> None:
        starts.append(watch.clock.monotonic_s())
        await watch.clock.sleep(100.0)
        raise OSError("gone")

    watch.supervisor.add("link", run)
    await watch.supervisor.start()
    await watch.clock.advance(520.0)
    assert len(starts) == 6
    assert all(after - before <= 101.0 for before, after in itertools.pairwise(starts))
    await watch.supervisor.stop(1.0)


async def test_one_failing_loop_leaves_the_others_alone(watch: Watch) -> None:
    calls = 0

    async def good() -> None:
        nonlocal calls
        calls += 1

    async def bad() -> None:
        raise RuntimeError

    watch.supervisor.add("bad", bad, interval_s=1.0)
    watch.supervisor.add("good", good, interval_s=1.0)
    await watch.supervisor.start()
    await watch.clock.advance(10.5)
    assert calls == 11
    assert watch.health("bad").last_error == "RuntimeError"
    await watch.supervisor.stop(1.0)


async def test_a_cancellation_from_inside_is_a_failure_not_the_end(watch: Watch) -> None:
    starts = 0

    async def run() -> None:
        nonlocal starts
        starts += 1
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    watch.supervisor.add("odd", run)
    await watch.supervisor.start()
    await watch.clock.advance(3.0)
    assert starts >= 2
    assert watch.health("odd").last_error == "CancelledError"
    await watch.supervisor.stop(1.0)


async def test_loops_stop_in_the_reverse_order_each_after_the_one_before(watch: Watch) -> None:
    order: list[str] = []

    def loop(name: str) -> None:
        async def run() -> None:
            try:
                await forever()
            finally:
                order.append(f"{name} ends")
                await asyncio.sleep(0)
                order.append(f"{name} ended")

        watch.supervisor.add(name, run)

    for name in ("a", "b", "c"):
        loop(name)
    await watch.supervisor.start()
    await settle()
    assert await watch.supervisor.stop(5.0) == ()
    assert order == ["c ends", "c ended", "b ends", "b ended", "a ends", "a ended"]
    assert watch.clock.sleepers() == 0


async def test_a_loop_that_does_not_stop_is_named_and_does_not_keep_the_others(watch: Watch) -> None:
    release = asyncio.Event()
    ended: list[str] = []

    async def stubborn() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            await release.wait()

    async def tidy() -> None:
        try:
            await forever()
        finally:
            ended.append("tidy")

    watch.supervisor.add("tidy", tidy)
    watch.supervisor.add("stubborn", stubborn)
    await watch.supervisor.start()
    await settle()
    stopping = asyncio.ensure_future(watch.supervisor.stop(5.0))
    await watch.clock.advance(4.9)
    assert not stopping.done()
    await watch.clock.advance(0.2)
    assert await stopping == ("stubborn",)
    assert ended == ["tidy"]
    assert watch.lines()[-1]["loops"] == ["stubborn"]
    release.set()
    await settle()


async def test_a_failure_while_stopping_is_logged(watch: Watch) -> None:
    async def run() -> None:
        try:
            await forever()
        finally:
            raise OSError("the disk is full")

    watch.supervisor.add("writer", run)
    await watch.supervisor.start()
    await settle()
    assert await watch.supervisor.stop(1.0) == ()
    health = watch.health("writer")
    assert (health.state, health.last_error) == (LoopState.STOPPED, "OSError: the disk is full")
    assert watch.lines()[0]["event"] == "loop failed"
    assert watch.restarted == []


async def test_a_loop_added_later_starts_at_once_and_names_are_unique(watch: Watch) -> None:
    await watch.supervisor.start()
    watch.supervisor.add("late", forever)
    await settle()
    assert watch.health("late").state is LoopState.RUNNING
    with pytest.raises(ValueError, match="late"):
        watch.supervisor.add("late", forever)
    await watch.supervisor.stop(1.0)


async def test_an_error_shown_as_health_holds_no_key(watch: Watch) -> None:
    async def run() -> None:
        raise ValueError(f"refused: Bearer fm_abcdefgh_{'x' * 43}_123456")

    watch.supervisor.add("call", run)
    await watch.supervisor.start()
    await settle()
    assert watch.health("call").last_error == "ValueError: refused: Bearer ***"
    await watch.supervisor.stop(1.0)
