"""Group commit on a real SQLite file: what shares a commit, what a full disk does, what a stuck file does."""

import asyncio
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from fleetmind.core.errors import Conflict, StoreError
from fleetmind.core.events import Event, EventKind
from fleetmind.core.telemetry import Metrics
from fleetmind.store.database import Database
from fleetmind.store.integrity import fault_of
from fleetmind.store.journal import Journal
from fleetmind.store.models import Models


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def database(tmp_path: Path, metrics: Metrics) -> AsyncIterator[Database]:
    opened = await Database.open(f"sqlite:///{tmp_path}/f.db", commit_interval_s=30.0, metrics=metrics)
    yield opened
    await opened.close()


def commits(metrics: Metrics) -> int:
    return int(metrics.registry.get_sample_value("fleetmind_commits_total") or 0)


def put(connection: Connection, name: str, size: int = 2) -> None:
    connection.execute(
        text("INSERT INTO models (name, document) VALUES (:n, :d)"), {"n": name, "d": '"' + "x" * size + '"'}
    )


async def test_works_submitted_together_share_one_commit(database: Database, metrics: Metrics) -> None:
    await asyncio.gather(*(database.write(lambda connection, n=n: put(connection, f"m{n}")) for n in range(100)))
    assert commits(metrics) == 1
    await database.write(lambda connection: put(connection, "alone"))
    assert commits(metrics) == 2


async def test_the_interval_bounds_a_commit(tmp_path: Path, metrics: Metrics) -> None:
    database = await Database.open(f"sqlite:///{tmp_path}/f.db", commit_interval_s=0.0, metrics=metrics)
    await asyncio.gather(*(database.write(lambda connection, n=n: put(connection, f"m{n}")) for n in range(10)))
    await database.close()
    assert commits(metrics) == 10


async def test_nobody_is_answered_before_the_commit(database: Database, tmp_path: Path) -> None:
    in_second, may_end = threading.Event(), threading.Event()

    def second(connection: Connection) -> None:
        in_second.set()
        assert may_end.wait(30)

    first = asyncio.ensure_future(database.write(lambda connection: put(connection, "first")))
    waiting = asyncio.ensure_future(database.write(second))
    await asyncio.to_thread(in_second.wait, 30)
    # The first one's work is done, but its group's commit is not.
    assert not first.done()
    other = sqlite3.connect(tmp_path / "f.db")
    assert other.execute("SELECT count(*) FROM models").fetchone() == (0,)
    may_end.set()
    await asyncio.gather(first, waiting)
    assert other.execute("SELECT count(*) FROM models").fetchone() == (1,)
    other.close()


async def test_a_caller_that_left_before_its_turn_is_not_served(database: Database) -> None:
    in_first, may_end = threading.Event(), threading.Event()

    def first(connection: Connection) -> None:
        in_first.set()
        assert may_end.wait(30)

    holding = asyncio.ensure_future(database.write(first))
    await asyncio.to_thread(in_first.wait, 30)
    leaving = asyncio.ensure_future(database.write(lambda connection: put(connection, "left")))
    staying = asyncio.ensure_future(database.write(lambda connection: put(connection, "stayed")))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait({leaving})
    may_end.set()
    await asyncio.gather(holding, staying)
    assert list(await Models(database).all()) == ["stayed"]


async def test_close_finishes_what_was_accepted(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite:///{tmp_path}/f.db")
    writing = [asyncio.ensure_future(database.write(lambda c, n=n: put(c, f"m{n}"))) for n in range(50)]
    await asyncio.sleep(0)
    await database.close()
    await asyncio.gather(*writing)
    again = await Database.open(f"sqlite:///{tmp_path}/f.db")
    assert len(await Models(again).all()) == 50
    await again.close()


async def test_sqlite_is_set_up_to_lose_nothing(database: Database) -> None:
    def settings(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "query_only")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    full = 2
    assert await database.write(settings) == ["wal", full, 1, 0]
    assert (await database.read(settings))[3] == 1
    autocheckpoint = await database.read(
        lambda connection: connection.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar()
    )
    assert autocheckpoint == 0, "a reader that checkpoints is a second writer"


async def test_a_full_database_refuses_the_large_work_alone_and_goes_on(database: Database) -> None:
    journal = Journal(database)

    def bound(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 20}")

    await database.write(bound)
    works = [database.write(lambda connection, n=n: put(connection, f"small{n}")) for n in range(10)]
    for place in (8, 5, 2):
        works.insert(place, database.write(lambda connection: put(connection, "large", 10_000_000)))
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for place in (2, 6, 10):
        refused = outcomes[place]
        assert isinstance(refused, StoreError)
        assert "make space" in refused.hint
        outcomes[place] = None
    assert outcomes == [None] * 13, "a work was harmed by one that filled the disk"
    await database.write(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count=1000000").close())
    await database.write(lambda connection: put(connection, "large", 10_000_000))
    await journal.append(Event(EventKind.SERVER_STARTED, "s", 1.0))
    assert len(await Models(database).all()) == 11
    assert await fault_of(database, is_thorough=True) is None


async def test_a_full_memory_database_keeps_what_it_had(tmp_path: Path) -> None:
    database = await Database.open("sqlite://")
    await database.write(lambda connection: put(connection, "before"))
    await database.write(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count=100").close())
    with pytest.raises(StoreError):
        await database.write(lambda connection: put(connection, "large", 10_000_000))
    await database.write(lambda connection: put(connection, "after"))
    assert list(await Models(database).all()) == ["after", "before"]
    await database.close()


@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_a_commit_that_fails_harms_its_group_but_not_the_next(tmp_path: Path, kind: str) -> None:
    database = await Database.open(f"sqlite:///{tmp_path}/f.db" if kind == "file" else "sqlite://")

    def deferred(connection: Connection) -> None:
        # A foreign key that SQLite looks at only when it commits, and then leaves the transaction open.
        connection.exec_driver_sql("CREATE TABLE child (name TEXT REFERENCES models DEFERRABLE INITIALLY DEFERRED)")
        connection.exec_driver_sql("INSERT INTO child VALUES ('no such model')")

    with pytest.raises(Conflict):
        await database.write(deferred)
    await database.write(lambda connection: put(connection, "next"))
    assert list(await Models(database).all()) == ["next"]
    await database.close()


# A limit on the size of files fails writes as a full disk does, for real, in the middle of a commit.
FULL_DISK = """
import asyncio, resource, sys
from sqlalchemy import text
from fleetmind.core.errors import StoreError
from fleetmind.store.database import Database
from fleetmind.store.integrity import fault_of
from fleetmind.store.models import Models

async def main(url):
    database = await Database.open(url)
    models = Models(database)
    await models.save("before", {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
    failures = 0
    for number in range(100):
        try:
            await asyncio.gather(*(models.save(f"m{number}-{n}", {"x": "y" * 2000}) for n in range(3)))
        except StoreError as error:
            assert "disk is full" in error.hint, (error.message, error.hint)
            failures += 1
    assert failures, "the limit was never reached"
    assert "before" in await models.all()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await models.save("after", {})
    assert {"before", "after"} <= set(await models.all())
    assert await fault_of(database, is_thorough=True) is None
    await database.close()

asyncio.run(main(sys.argv[1]))
"""


def test_a_full_disk_is_a_clear_error_and_passes_when_there_is_space(tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
        pytest.skip("the size of files is limited here already")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, f"sqlite:///{tmp_path}/f.db"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


async def test_our_own_mistake_reaches_the_caller_and_the_writer_goes_on(database: Database) -> None:
    def ends_the_transaction(connection: Connection) -> None:
        put(connection, "stray")
        connection.exec_driver_sql("ROLLBACK")

    with pytest.raises(StoreError):
        await asyncio.wait_for(database.write(ends_the_transaction), 10)
    await asyncio.wait_for(database.write(lambda connection: put(connection, "next")), 10)
    assert list(await Models(database).all()) == ["next"]
