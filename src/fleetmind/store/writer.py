"""The one writing connection, in a thread of its own, and its group commit.

Works that wait together are committed together: one flush of the disk serves them all. It knows no tables.
Invariant: a work's future is resolved only after the commit that holds it; a work that fails takes nobody with it.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from sqlalchemy import Connection, RootTransaction
from sqlalchemy.exc import SQLAlchemyError

from fleetmind.core.clock import monotonic_ns
from fleetmind.core.errors import FleetmindError, StoreError
from fleetmind.core.telemetry import Metrics, log
from fleetmind.store.connections import BUSY_S_MAX, Engines, is_busy, is_disconnect, translate
from fleetmind.store.upgrade import upgrade

# How often a work is begun at most: once more after its group was lost before the commit.
ATTEMPTS_MAX = 2
JOURNAL_ENTRIES = "journal_entries"


class Job:
    """One work and who waits for it. Begun at most ATTEMPTS_MAX times, committed at most once."""

    __slots__ = ("attempts", "entries", "error", "future", "is_read", "result", "work")

    def __init__(self, work: Callable[[Connection], Any], future: asyncio.Future[Any], *, is_read: bool) -> None:
        self.work = work
        self.future = future
        self.is_read = is_read
        self.attempts = 0
        self.entries = 0
        self.result: Any = None
        self.error: BaseException | None = None


class _TransactionLost(Exception):
    """The transaction is gone with everything in it; nothing of it was committed."""


class Writer:
    """Runs jobs handed over in batches. ``settle`` is called in the loop with the jobs that have their outcome."""

    def __init__(
        self,
        engines: Engines,
        loop: asyncio.AbstractEventLoop,
        settle: Callable[[Sequence[Job]], None],
        *,
        commit_interval_s: float,
        metrics: Metrics | None,
    ) -> None:
        self._engines = engines
        self._loop = loop
        self._settle = settle
        self._interval_ns = int(commit_interval_s * 1e9)
        self._metrics = metrics
        self._log = log("store.writer")
        self._queue: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._connection: Connection | None = None
        # So many of the next jobs are committed one by one: their group was lost because of one of them.
        self._singles = 0
        self._opened: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._run, name="fleetmind-writer", daemon=True)

    async def open(self) -> None:
        """Connect and migrate. Raises StoreError; the thread has then ended."""
        self._thread.start()
        try:
            await asyncio.shield(self._opened)
        except asyncio.CancelledError:
            # Whoever wanted it has gone: let the thread end as soon as it has opened.
            self._queue.put(None)
            raise

    def hand_over(self, jobs: list[Job]) -> None:
        """Queue jobs; never blocks. How many may wait is the caller's business."""
        self._queue.put(jobs)

    async def close(self) -> None:
        """Finish what is queued, then end the thread."""
        self._queue.put(None)
        await asyncio.shield(self._ended)

    # The thread

    def _run(self) -> None:
        try:
            self._open()
        except BaseException as error:  # noqa: BLE001 - the thread's outermost handler: the opener gets it
            self._in_loop(self._opened.set_exception, error)
            return
        self._in_loop(self._opened.set_result, None)
        waiting: deque[Job] = deque()
        while (jobs := self._queue.get()) is not None:
            waiting.extend(jobs)
            while waiting:
                self._serve(waiting)
        self._close()
        self._in_loop(self._ended.set_result, None)

    def _open(self) -> None:
        end_ns = monotonic_ns() + int(BUSY_S_MAX * 1e9)
        while True:
            try:
                connection = self._connected()
                with connection.begin():
                    upgrade(connection)
                return
            except (SQLAlchemyError, OSError) as error:
                self._disconnect()
                if not is_busy(error) or monotonic_ns() > end_ns:
                    raise translate(error, self._engines.shown) from None
                # Turning a file to WAL, or the last one closing it, locks it without regard to busy_timeout.
                threading.Event().wait(0.02)
            except FleetmindError:
                self._disconnect()
                raise

    def _serve(self, waiting: deque[Job]) -> None:
        """One group, from its first job to its answers. Every job taken is answered or waits again."""
        group: list[Job] = []
        try:
            self._commit(waiting, group)
        except _TransactionLost:
            group = self._wait_again(waiting, group)
        except (SQLAlchemyError, OSError, StoreError) as error:
            self._fail(group, error)
        except Exception as error:  # noqa: BLE001 - our own mistake must not leave callers waiting for ever
            self._log.exception("the writer failed", error)
            self._fail(group, StoreError(f"the writer failed: {error!r}", hint="This is a bug: see the log."))
        self._answer(group)

    def _commit(self, waiting: deque[Job], group: list[Job]) -> None:
        """Move jobs from ``waiting`` to ``group``, run them in one transaction, and commit it."""
        try:
            connection = self._connected()
            transaction = connection.begin()
        except (SQLAlchemyError, OSError):
            # Whoever waits now would only meet the same, each after a timeout of its own.
            group.extend(waiting)
            waiting.clear()
            raise
        end_ns = monotonic_ns() + self._interval_ns
        holds_work = False
        while waiting:
            job = waiting.popleft()
            group.append(job)
            if not job.future.cancelled():
                self._run_job(connection, job, needs_savepoint=holds_work)
                if job.error is None:
                    holds_work = True
                elif not holds_work:
                    # The first needs no savepoint: its rollback is the transaction's.
                    transaction.rollback()
                    transaction = connection.begin()
            if self._singles > 0:
                self._singles -= 1
                break
            if monotonic_ns() >= end_ns:
                break
            if not waiting:
                self._drain(waiting)
        if holds_work:
            self._check_transaction(connection)
            self._flush(transaction, group)
        else:
            transaction.rollback()

    def _check_transaction(self, connection: Connection) -> None:
        """Never acknowledge what SQLite has given up, should a work have hidden the error from us.

        Its driver's commit does nothing when no transaction is open; PostgreSQL's raises.
        """
        if self._engines.is_sqlite and not getattr(connection.connection.driver_connection, "in_transaction", False):
            raise _TransactionLost

    def _flush(self, transaction: RootTransaction, group: Sequence[Job]) -> None:
        began_ns = monotonic_ns()
        try:
            transaction.commit()
        except (SQLAlchemyError, OSError) as error:
            if is_disconnect(error):
                # Repeating could do the work twice; whoever asked must look.
                raise StoreError(
                    "the connection to the database broke during a commit: the change may or may not be there",
                    hint="Look whether it is there before you repeat it.",
                ) from error
            raise
        if self._metrics is not None:
            self._metrics.commits_total.inc()
            self._metrics.commit_seconds.observe((monotonic_ns() - began_ns) / 1e9)
            self._metrics.journal_entries_total.inc(sum(job.entries for job in group if job.error is None))

    def _run_job(self, connection: Connection, job: Job, *, needs_savepoint: bool) -> None:
        """Run one job; its failure is kept on it, and what it did is undone if others are in the transaction."""
        job.attempts += 1
        job.error = None
        connection.info[JOURNAL_ENTRIES] = 0
        try:
            if needs_savepoint:
                connection.exec_driver_sql("SAVEPOINT work")
            job.result = self._read(connection, job) if job.is_read else job.work(connection)
            if needs_savepoint:
                connection.exec_driver_sql("RELEASE SAVEPOINT work")
            job.entries = connection.info[JOURNAL_ENTRIES]
        except Exception as error:
            # Kept for whoever waits for this job, who gets it raised.
            job.error = error
            if is_disconnect(error):
                raise _TransactionLost from error
            if needs_savepoint:
                self._undo(connection)

    def _undo(self, connection: Connection) -> None:
        try:
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT work")
            connection.exec_driver_sql("RELEASE SAVEPOINT work")
        except (SQLAlchemyError, OSError) as error:
            # On a full disk SQLite gives the whole transaction up: https://sqlite.org/lang_transaction.html
            raise _TransactionLost from error

    def _read(self, connection: Connection, job: Job) -> Any:
        # Only a database in memory is read here: its readers share the one connection.
        connection.exec_driver_sql("PRAGMA query_only=ON")
        try:
            return job.work(connection)
        finally:
            connection.exec_driver_sql("PRAGMA query_only=OFF")

    def _drain(self, waiting: deque[Job]) -> None:
        with suppress(Empty):
            while (jobs := self._queue.get_nowait()) is not None:
                waiting.extend(jobs)
            # The end was asked for: leave it to be found once this group and what waits are done.
            self._queue.put(None)

    def _wait_again(self, waiting: deque[Job], group: list[Job]) -> list[Job]:
        """Put the jobs that lost their transaction through no fault of theirs back. Returns those with an outcome."""
        self._reset()
        again: list[Job] = []
        settled: list[Job] = []
        for job in group:
            is_lost = job.error is None or is_disconnect(job.error)
            (again if is_lost and job.attempts < ATTEMPTS_MAX else settled).append(job)
            if job.error is None and job.attempts >= ATTEMPTS_MAX:
                job.error = StoreError("the transaction was lost twice", hint="See the log; then try again.")
        if not (group[-1].error and is_disconnect(group[-1].error)):
            # One of them broke the transaction, and might again: none shares one with it.
            self._singles = len(again)
        waiting.extendleft(reversed(again))
        return settled

    def _fail(self, group: Sequence[Job], error: SQLAlchemyError | OSError | StoreError) -> None:
        """Nothing of the group was committed, or nobody knows: all who did well are told so."""
        self._reset()
        for job in group:
            if job.error is None or is_disconnect(job.error):
                job.error = error if isinstance(error, StoreError) else translate(error, self._engines.shown)

    def _reset(self) -> None:
        """End whatever transaction is open, and make sure that the next group finds a sound connection."""
        if not self._engines.is_sqlite:
            self._disconnect()
        elif self._connection is not None:
            # Kept, because a database in memory lives as long as its connection. The driver is asked too: SQLAlchemy
            # doesn't roll back what it believes ended, and a failed commit leaves SQLite's transaction open.
            self._connection.rollback()
            driver = self._connection.connection.driver_connection
            assert driver is not None
            driver.rollback()

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._engines.writer.connect()
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError, OSError):
                connection.invalidate()
            with suppress(SQLAlchemyError, OSError):
                connection.close()

    def _answer(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            if isinstance(job.error, SQLAlchemyError | OSError):
                job.error = translate(job.error, self._engines.shown)
        self._in_loop(self._settle, jobs)

    def _close(self) -> None:
        # The last connection to close writes the log of SQLite back into the file.
        if self._connection is not None:
            with suppress(SQLAlchemyError, OSError):
                self._connection.close()
        self._engines.writer.dispose()

    def _in_loop(self, call: Callable[..., object], *arguments: object) -> None:
        # A loop that is closed has nobody left who waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)
