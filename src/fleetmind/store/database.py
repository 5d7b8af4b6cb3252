"""The database: reads beside one stream of writes.

The only door through which SQL is spoken. It knows no tables; journal, keys, models and usage do.
Invariant: what ``write`` returned is on disk, and survives the loss of the process and of the machine's power.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from fleetmind.core.errors import StoreError
from fleetmind.core.telemetry import Metrics
from fleetmind.store.connections import READERS_MAX, Engines, make_engines, translate
from fleetmind.store.writer import Job, Writer

T = TypeVar("T")

# Works that may wait for a commit; whoever comes then waits to be let in.
WAITING_MAX = 1024


class Database:
    """An open database. Belongs to the event loop it was opened in."""

    def __init__(self, engines: Engines, *, commit_interval_s: float, metrics: Metrics | None) -> None:
        """Use ``open``."""
        self._loop = asyncio.get_running_loop()
        self._engines = engines
        self._writer = Writer(engines, self._loop, self._settle, commit_interval_s=commit_interval_s, metrics=metrics)
        self._readers = ThreadPoolExecutor(READERS_MAX, "fleetmind-reader") if engines.readers else None
        self._room = asyncio.Semaphore(WAITING_MAX)
        self._fresh: list[Job] = []
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, url: str, *, commit_interval_s: float = 0.003, metrics: Metrics | None = None) -> "Database":
        """Connect, and bring the tables to the present revision.

        ``url`` is ``sqlite:///path`` (the file is made, mode 0600), ``sqlite://`` (memory) or ``postgresql://…``. A
        commit gathers works for at most ``commit_interval_s``; a work that comes alone never waits for others.
        Raises StoreError.
        """
        database = cls(make_engines(url), commit_interval_s=commit_interval_s, metrics=metrics)
        await database._writer.open()
        return database

    @property
    def shown(self) -> str:
        """The address, without its password."""
        return self._engines.shown

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in the writer's thread and return its result once it is committed.

        What ``work`` raises is raised here, and nothing it did remains; others in its group are not harmed. It must
        not end the transaction itself. It may be begun twice, so it must have no effect but on the database; it is
        committed once. If the caller is cancelled, a work not yet begun is dropped, and one that is goes on.
        Raises Conflict for a broken constraint, StoreError when the database refuses.
        """
        return await self._submit(work, is_read=False)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a reader's thread, on one consistent view of what is committed; writers don't wait for it.

        Raises StoreError, also for a ``work`` that tries to write.
        """
        if self._readers is None:
            return await self._submit(work, is_read=True)
        self._check_open()
        return await self._loop.run_in_executor(self._readers, self._read, work)

    async def close(self) -> None:
        """Finish the works accepted, then disconnect. Later works are refused; closing again is harmless."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _submit(self, work: Callable[[Connection], T], *, is_read: bool) -> T:
        await self._room.acquire()
        try:
            self._check_open()
        except StoreError:
            self._room.release()
            raise
        future: asyncio.Future[T] = self._loop.create_future()
        self._fresh.append(Job(work, future, is_read=is_read))
        if len(self._fresh) == 1:
            # All that are submitted in this turn of the loop travel together: one wake-up, and mostly one commit.
            self._loop.call_soon(self._hand_over)
        return await future

    def _hand_over(self) -> None:
        jobs, self._fresh = self._fresh, []
        self._writer.hand_over(jobs)

    def _settle(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._room.release()
            if job.future.done():
                continue
            if job.error is None:
                job.future.set_result(job.result)
            else:
                job.future.set_exception(job.error)

    def _read(self, work: Callable[[Connection], Any]) -> Any:
        assert self._engines.readers is not None
        try:
            with self._engines.readers.connect() as connection, connection.begin():
                return work(connection)
        except (SQLAlchemyError, OSError) as error:
            raise translate(error, self.shown) from error

    async def _close(self) -> None:
        if self._readers is not None:
            await asyncio.to_thread(self._readers.shutdown)
        if self._engines.readers is not None:
            # Before the writer: the last to close writes the log back, and that must not be a reader.
            self._engines.readers.dispose()
        await self._writer.close()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise StoreError("the database is closed", hint="The server is stopping.")
