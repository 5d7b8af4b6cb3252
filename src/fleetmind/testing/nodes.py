"""A node for tests: the real daemon with real processes, in a directory of its own.

``changes`` lets a test await what it expects instead of sleeping. Invariant: leaving the context leaves no process.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fleetmind.core.clock import Clock, SystemClock
from fleetmind.core.settings import NodeSettings
from fleetmind.node.daemon import NodeDaemon
from fleetmind.node.devices import DeviceReader, DeviceSource
from fleetmind.node.engine import Engine
from fleetmind.node.ledger import Orphan
from fleetmind.node.processor import Processor
from fleetmind.node.protocol import ReplicaReport, ReplicaState


class Changes:
    """Every report the daemon gave, in order."""

    def __init__(self) -> None:
        self.seen: list[ReplicaReport] = []
        self._waiters: list[tuple[Callable[[ReplicaReport], bool], asyncio.Future[ReplicaReport]]] = []

    def take(self, report: ReplicaReport) -> None:
        """What to give the daemon as ``on_change``."""
        self.seen.append(report)
        for matches, waiter in self._waiters:
            if not waiter.done() and matches(report):
                waiter.set_result(report)

    async def expect(self, matches: Callable[[ReplicaReport], bool], within_s: float = 20.0) -> ReplicaReport:
        """The first report, seen already or to come, that ``matches``. Raises TimeoutError."""
        for report in self.seen:
            if matches(report):
                return report
        waiter: asyncio.Future[ReplicaReport] = asyncio.get_running_loop().create_future()
        self._waiters.append((matches, waiter))
        return await asyncio.wait_for(waiter, within_s)

    async def expect_state(self, state: ReplicaState, within_s: float = 20.0) -> ReplicaReport:
        """The first report in ``state``."""
        return await self.expect(lambda report: report.state is state, within_s)


class Node:
    """A running daemon, what it reported, and the orphans it ended when it started."""

    def __init__(self, daemon: NodeDaemon, changes: Changes, orphans: tuple[Orphan, ...]) -> None:
        self.daemon = daemon
        self.changes = changes
        self.orphans = orphans


@asynccontextmanager
async def running_node(
    home: Path,
    engines: Sequence[Engine],
    *,
    settings: NodeSettings | None = None,
    sources: Sequence[DeviceSource] | None = None,
    environ: Mapping[str, str] = os.environ,
    probe_s_max: float = 5.0,
) -> AsyncIterator[Node]:
    """A daemon with these engines and, unless told otherwise, this machine's processor."""
    clock: Clock = SystemClock()
    changes = Changes()
    daemon = NodeDaemon(
        run_dir=home / "run",
        log_dir=home / "logs",
        devices=DeviceReader([Processor(clock)] if sources is None else sources, clock),
        engines={engine.facts.name: engine for engine in engines},
        settings=settings or NodeSettings(),
        clock=clock,
        on_change=changes.take,
        environ=environ,
        probe_s_max=probe_s_max,
    )
    orphans = await daemon.start()
    loops = [asyncio.ensure_future(loop()) for loop in daemon.loops().values()]
    try:
        yield Node(daemon, changes, orphans)
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await daemon.close()
