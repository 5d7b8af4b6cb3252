"""The only reader of time and chance.

Everything that needs the hour, a pause or a die takes a Clock or Dice as a value, so that tests and the simulator
move time by hand and replay a seed. Nothing else in the project imports ``time``, ``random`` or ``secrets``.
"""

import random
import secrets
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    """Reads and waits for time."""

    def now_s(self) -> float:
        """Seconds since 1970, UTC; may step. For showing and recording."""
        ...

    def monotonic_s(self) -> float:
        """Seconds since some start; never steps back. For durations and deadlines."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds``."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        import asyncio  # who sleeps here has it already; the command line's clients never need it

        await asyncio.sleep(seconds)


class Dice:
    """Chance for decisions. One seed reproduces every draw; without a seed it is taken from the system."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(64) if seed is None else seed
        self._random = random.Random(self.seed)  # noqa: S311 - decisions, not secrets

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()

    def choice(self, among: Sequence[T]) -> T:
        """One of ``among``, each as likely."""
        return self._random.choice(among)


def secret_token(size_bytes: int = 32) -> bytes:
    """Bytes nobody can guess, for keys. Never seeded."""
    return secrets.token_bytes(size_bytes)


def monotonic_ns() -> int:
    """The monotonic clock in whole nanoseconds, for timing the hot path."""
    return time.perf_counter_ns()


def pause(seconds: float) -> None:
    """Block this thread for ``seconds``. For programs without an event loop: the command line's clients."""
    time.sleep(seconds)
