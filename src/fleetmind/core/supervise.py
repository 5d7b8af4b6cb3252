"""The one place where coroutines that live on are started, watched and stopped.

A loop that fails is logged, counted and started again after a growing pause; nothing is swallowed and nothing is
given up. It knows no loop's purpose. Invariant: after ``stop`` returned, no loop is running except those it named.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from fleetmind.core.clock import Clock, Dice
from fleetmind.core.telemetry import Log, redact

BACKOFF_S = 0.2
BACKOFF_S_MAX = 30.0


class LoopState(StrEnum):
    """Where a loop is. A long-lived one that returns without an exception has ended: it chose to."""

    WAITING = "waiting"
    RUNNING = "running"
    BACKING_OFF = "backing_off"
    ENDED = "ended"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class LoopHealth:
    """How a loop does. ``restarts`` counts failures; ``last_ok_at_s`` is the wall time it last did well, if ever.

    For a loop with an interval doing well is returning; for a long-lived one it is having been started.
    """

    name: str
    state: LoopState
    restarts: int
    last_error: str | None
    last_ok_at_s: float | None


@dataclass(slots=True)
class _Loop:
    name: str
    run: Callable[[], Awaitable[object]]
    interval_s: float | None
    state: LoopState = LoopState.WAITING
    restarts: int = 0
    failures_in_row: int = 0
    last_error: str | None = None
    last_ok_at_s: float | None = None
    task: asyncio.Task[None] | None = None


class Supervisor:
    """Runs named loops. ``on_restart`` is told the name of each loop that failed, for counting."""

    def __init__(
        self,
        clock: Clock,
        log: Log,
        *,
        dice: Dice | None = None,
        on_restart: Callable[[str], None] | None = None,
        backoff_s: float = BACKOFF_S,
        backoff_s_max: float = BACKOFF_S_MAX,
    ) -> None:
        self._clock = clock
        self._log = log
        self._dice = dice or Dice()
        self._on_restart = on_restart
        self._backoff_s = backoff_s
        self._backoff_s_max = backoff_s_max
        self._loops: dict[str, _Loop] = {}
        self._is_started = False
        self._is_stopped = False

    def add(self, name: str, run: Callable[[], Awaitable[object]], *, interval_s: float | None = None) -> None:
        """Add a loop; after ``start`` it starts at once.

        With ``interval_s`` ``run`` is called again and again with that pause between; without, it is expected to live
        on, and is called again only when it ended by an exception. Raises ValueError for a name taken.
        """
        if name in self._loops:
            raise ValueError(f"a loop named {name!r} exists")
        assert not self._is_stopped, "a stopped supervisor takes no more loops"
        loop = self._loops[name] = _Loop(name, run, interval_s)
        if self._is_started:
            self._begin(loop)

    async def start(self) -> None:
        """Start every loop, in the order of adding."""
        assert not self._is_started
        self._is_started = True
        for loop in self._loops.values():
            self._begin(loop)

    def health(self) -> tuple[LoopHealth, ...]:
        """Every loop, in the order of adding."""
        return tuple(
            LoopHealth(loop.name, loop.state, loop.restarts, loop.last_error, loop.last_ok_at_s)
            for loop in self._loops.values()
        )

    async def stop(self, timeout_s: float) -> tuple[str, ...]:
        """Cancel the loops, last added first, each after the one before has ended; ``timeout_s`` is for all together.

        Past the deadline the rest are cancelled at once. Returns the names of those still running then.
        """
        self._is_stopped = True
        deadline = asyncio.ensure_future(self._clock.sleep(timeout_s))
        try:
            for loop in reversed(self._loops.values()):
                if loop.task is None:
                    continue
                loop.task.cancel()
                await asyncio.wait({loop.task, deadline}, return_when=asyncio.FIRST_COMPLETED)
            # Those cancelled only now, past the deadline, get the turns an orderly end takes.
            for _ in range(5):
                await asyncio.sleep(0)
        finally:
            deadline.cancel()
        stuck = tuple(loop.name for loop in self._loops.values() if loop.task is not None and not loop.task.done())
        if stuck:
            self._log.error("loops did not stop in time", loops=stuck, timeout_s=timeout_s)
        return stuck

    def _begin(self, loop: _Loop) -> None:
        loop.task = asyncio.get_running_loop().create_task(self._live(loop), name=f"loop {loop.name}")

    async def _live(self, loop: _Loop) -> None:
        try:
            while loop.state is not LoopState.ENDED:
                loop.state = LoopState.RUNNING
                pause_s = await self._once(loop)
                if pause_s is not None:
                    await self._clock.sleep(pause_s)
        finally:
            if loop.state is not LoopState.ENDED:
                loop.state = LoopState.STOPPED

    async def _once(self, loop: _Loop) -> float | None:
        """One call of ``run``. Returns the pause before the next, or None when the loop has ended."""
        began_s = self._clock.monotonic_s()
        if loop.interval_s is None:
            loop.last_ok_at_s = self._clock.now_s()
        try:
            await loop.run()
        except asyncio.CancelledError as error:
            if _is_being_cancelled():
                raise
            # Something inside was cancelled, not we: that is a failure like any other.
            return self._failed(loop, error, began_s)
        except Exception as error:
            if _is_being_cancelled():
                self._record(loop, error)
                raise asyncio.CancelledError from error
            return self._failed(loop, error, began_s)
        if loop.interval_s is None:
            loop.state = LoopState.ENDED
            return None
        loop.failures_in_row = 0
        loop.last_ok_at_s = self._clock.now_s()
        return loop.interval_s

    def _failed(self, loop: _Loop, error: BaseException, began_s: float) -> float:
        self._record(loop, error)
        loop.restarts += 1
        if self._on_restart is not None:
            self._on_restart(loop.name)
        # One that lived well for a while before it failed starts with short pauses again.
        if loop.interval_s is None and self._clock.monotonic_s() - began_s >= self._backoff_s_max:
            loop.failures_in_row = 0
        pause_s = min(self._backoff_s * 2.0 ** min(loop.failures_in_row, 60), self._backoff_s_max)
        loop.failures_in_row += 1
        loop.state = LoopState.BACKING_OFF
        # Half of it is chance, so that loops which failed together don't come back together.
        return pause_s * (0.5 + 0.5 * self._dice.uniform())

    def _record(self, loop: _Loop, error: BaseException) -> None:
        loop.last_error = redact(f"{type(error).__name__}: {error}".removesuffix(": "))
        self._log.exception("loop failed", error, loop=loop.name, restarts=loop.restarts)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
