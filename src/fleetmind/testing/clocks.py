"""A clock that tests and simulations move by hand.

Nothing here waits for real time. Invariant: sleepers wake in the order of their deadlines, and everything that a
wake-up makes runnable has run before time moves on.
"""

import asyncio
import heapq
from itertools import count

# Turns of the event loop after which a chain of wake-ups is taken to have come to rest.
SETTLE_TURNS = 30


class ManualClock:
    """A Clock whose time stands still until ``advance`` or ``step`` moves it. Use it from one event loop."""

    def __init__(self, now_s: float = 1_800_000_000.0) -> None:
        self._now_s = now_s
        self._monotonic_s = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()

    def now_s(self) -> float:
        return self._now_s

    def monotonic_s(self) -> float:
        return self._monotonic_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic_s + seconds, next(self._order), future))
        await future

    def sleepers(self) -> int:
        """How many wait for time to pass."""
        return sum(not future.done() for _, _, future in self._sleepers)

    def step(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an administrator does; durations don't notice."""
        self._now_s += seconds

    async def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, waking every sleeper at its own moment."""
        assert seconds >= 0
        await settle()
        end_s = self._monotonic_s + seconds
        while self._sleepers and self._sleepers[0][0] <= end_s:
            deadline_s, _, future = heapq.heappop(self._sleepers)
            if future.done():
                continue
            self._move_to(deadline_s)
            future.set_result(None)
            await settle()
        self._move_to(end_s)
        await settle()

    def _move_to(self, monotonic_s: float) -> None:
        self._now_s += max(0.0, monotonic_s - self._monotonic_s)
        self._monotonic_s = max(self._monotonic_s, monotonic_s)


async def settle() -> None:
    """Give everything runnable its turns, without letting time pass. Threads and sockets are not waited for."""
    for _ in range(SETTLE_TURNS):
        await asyncio.sleep(0)
