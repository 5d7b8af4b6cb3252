"""The clock that tests move: if it lied, every other test would."""

import asyncio

from fleetmind.testing.clocks import ManualClock


async def test_sleepers_wake_in_order_each_at_its_own_moment() -> None:
    clock = ManualClock(now_s=100.0)
    began_s = clock.monotonic_s()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, *pauses_s: float) -> None:
        for pause_s in pauses_s:
            await clock.sleep(pause_s)
            woken.append((name, clock.monotonic_s() - began_s))

    sleeping = [asyncio.ensure_future(one) for one in (sleeper("a", 3.0), sleeper("b", 1.0, 1.0), sleeper("c", 9.0))]
    await clock.advance(0.5)
    assert woken == []
    assert clock.sleepers() == 3
    await clock.advance(4.0)
    assert woken == [("b", 1.0), ("b", 2.0), ("a", 3.0)]
    assert clock.now_s() == 104.5
    sleeping[2].cancel()
    await clock.advance(10.0)
    assert clock.sleepers() == 0
    assert len(woken) == 3


async def test_a_step_of_the_wall_clock_wakes_nobody() -> None:
    clock = ManualClock(now_s=100.0)
    sleeping = asyncio.ensure_future(clock.sleep(5.0))
    clock.step(-1000.0)
    await clock.advance(4.0)
    assert not sleeping.done()
    assert clock.now_s() == -896.0
    await clock.advance(1.0)
    assert sleeping.done()
