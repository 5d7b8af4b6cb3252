"""Every database passes the same checks: SQLite in a file, SQLite in memory, and a real PostgreSQL."""

import asyncio
import itertools
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from tests.postgres import Postgres

from fleetmind.core.errors import Conflict, StoreError
from fleetmind.core.events import Event, EventKind
from fleetmind.core.telemetry import Metrics
from fleetmind.store.database import Database
from fleetmind.store.journal import FIRST_HASH, Journal, append_in, chain_hash
from fleetmind.store.models import Models
from fleetmind.testing.contracts_store import (
    check_database,
    check_journal,
    check_keys,
    check_models,
    check_usage,
)

KINDS = ("sqlite-file", "sqlite-memory", "postgres")
_names = (f"t{number}" for number in itertools.count())


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        server: Postgres = request.getfixturevalue("postgres")
        return server.create_database(next(_names))
    # The awkward name is deliberate: people keep homes in such directories.
    return f"sqlite:///{tmp_path}/a b%20ü/fleetmind.db" if request.param == "sqlite-file" else "sqlite://"


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    opened = await Database.open(url, metrics=Metrics())
    yield opened
    await opened.close()


def event(subject: str = "s", **data: object) -> Event:
    return Event(EventKind.SERVER_STARTED, subject, 1.5, data)


async def test_database_keeps_its_contract(database: Database, url: str) -> None:
    await check_database(database, reads_beside_writes=url != "sqlite://")


async def test_journal_keeps_its_contract(database: Database) -> None:
    await check_journal(database)


async def test_keys_keep_their_contract(database: Database) -> None:
    await check_keys(database)


async def test_models_keep_their_contract(database: Database) -> None:
    await check_models(database)


async def test_usage_keeps_its_contract(database: Database) -> None:
    await check_usage(database)


async def test_what_was_written_is_there_after_opening_again(database: Database, url: str) -> None:
    if url == "sqlite://":
        pytest.skip("a database in memory ends with its connection")
    await Models(database).save("m", {"a": 1}, event())
    await database.close()
    again = await Database.open(url)
    try:
        assert await Models(again).all() == {"m": {"a": 1}}
        verdict = await Journal(again).verify()
        assert (verdict.count, verdict.fault) == (1, None)
    finally:
        await again.close()


async def test_two_servers_extend_one_journal(database: Database, url: str) -> None:
    if url == "sqlite://":
        pytest.skip("a database in memory has one server")
    other = await Database.open(url)
    try:
        journals = (Journal(database), Journal(other))
        await asyncio.gather(*(journals[n % 2].append(event(n=n)) for n in range(60)))
        verdict = await journals[0].verify()
        assert (verdict.count, verdict.fault) == (60, None)
    finally:
        await other.close()


async def test_servers_that_open_an_empty_database_together_migrate_it_once(url: str) -> None:
    if url == "sqlite://":
        pytest.skip("a database in memory has one server")
    opened = await asyncio.gather(*(Database.open(url) for _ in range(4)))
    for one in opened:
        await Journal(one).append(event())
    assert (await Journal(opened[0]).verify()).count == 4
    await asyncio.gather(*(one.close() for one in opened))


# Tampering: by somebody who may write to the database and takes the triggers away first.


async def disarm(database: Database) -> None:
    def work(connection: Connection) -> None:
        if connection.dialect.name == "sqlite":
            names = connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).scalars().all()
            assert names
            for name in names:
                connection.execute(text(f"DROP TRIGGER {name}"))
        else:
            connection.execute(text("ALTER TABLE journal DISABLE TRIGGER ALL"))
            connection.execute(text("ALTER TABLE journal_head DISABLE TRIGGER ALL"))

    await database.write(work)


async def tampered(database: Database, *statements: str) -> str:
    """What ``verify`` says after the statements changed a journal of 25 entries, read in pages of 10."""
    log = Journal(database, page_entries=10)
    await log.append(*(event(f"s{n}", n=n) for n in range(1, 26)))
    assert (await log.verify()).fault is None
    await disarm(database)

    def work(connection: Connection) -> None:
        for statement in statements:
            connection.execute(text(statement))

    await database.write(work)
    return str((await log.verify()).fault)


@pytest.mark.parametrize(
    ("statements", "found"),
    [
        pytest.param(["UPDATE journal SET subject = 'x' WHERE position = 13"], "entry 13: was changed", id="subject"),
        pytest.param(["UPDATE journal SET data = '{}' WHERE position = 1"], "entry 1: was changed", id="data"),
        pytest.param(["UPDATE journal SET at_s = at_s + 1 WHERE position = 25"], "entry 25: was changed", id="time"),
        pytest.param(["UPDATE journal SET kind = 'x' WHERE position = 10"], "entry 10: was changed", id="kind"),
        pytest.param(["UPDATE journal SET hash = 'x' WHERE position = 11"], "entry 11: was changed", id="hash"),
        pytest.param(["DELETE FROM journal WHERE position = 1"], "entry 1: is missing", id="delete the first"),
        pytest.param(["DELETE FROM journal WHERE position = 12"], "entry 12: is missing", id="delete in the middle"),
        pytest.param(["DELETE FROM journal WHERE position > 20"], "entry 21: is missing", id="cut the tail"),
        pytest.param(["DELETE FROM journal"], "entry 1: is missing", id="delete all"),
        pytest.param(
            [
                "UPDATE journal SET position = 99 WHERE position = 7",
                "UPDATE journal SET position = 7 WHERE position = 8",
                "UPDATE journal SET position = 8 WHERE position = 99",
            ],
            "entry 7: was changed",
            id="reorder",
        ),
        pytest.param(
            ["DELETE FROM journal WHERE position = 7", "UPDATE journal SET position = 7 WHERE position = 8"],
            "entry 7: was changed",
            id="delete and close the gap",
        ),
        pytest.param(
            ["INSERT INTO journal SELECT 26, at_s, kind, subject, data, hash FROM journal WHERE position = 25"],
            "entry 26: was not written",
            id="insert at the end",
        ),
        pytest.param(
            ["INSERT INTO journal SELECT 0, at_s, kind, subject, data, hash FROM journal WHERE position = 1"],
            "entry 0: was not written",
            id="insert at the beginning",
        ),
        pytest.param(
            ["DELETE FROM journal WHERE position = 25", "UPDATE journal_head SET count = 24"],
            "entry 24: is not the one the head was written for",
            id="cut the tail and lower the head",
        ),
        pytest.param(["DELETE FROM journal_head"], "entry 0: the head is missing", id="delete the head"),
    ],
)
async def test_verify_names_the_first_entry_that_was_tampered_with(
    database: Database, statements: list[str], found: str
) -> None:
    assert (await tampered(database, *statements)).startswith(found)


async def test_the_chain_is_what_the_documentation_says(database: Database) -> None:
    await Journal(database).append(event("s", b=1, a=[2]))
    (entry,) = await Journal(database).entries()
    assert entry.hash == chain_hash(FIRST_HASH, 1, 1.5, "server.started", "s", '{"a":[2],"b":1}')


async def test_commits_and_entries_are_counted(url: str) -> None:
    metrics = Metrics()
    database = await Database.open(url, commit_interval_s=1.0, metrics=metrics)

    def fails(connection: Connection) -> None:
        append_in(connection, event())
        raise ValueError

    await asyncio.gather(*(Journal(database).append(event(), event()) for _ in range(50)))
    with pytest.raises(ValueError):
        await database.write(fails)
    await database.close()
    entries = metrics.registry.get_sample_value("fleetmind_journal_entries_total")
    commits = metrics.registry.get_sample_value("fleetmind_commits_total")
    assert entries == 100
    # Fifty works that were submitted together share commits.
    assert commits is not None
    assert 1 <= commits <= 25


# SQLite


async def test_the_database_file_and_its_logs_belong_to_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "fleetmind.db"
    database = await Database.open(f"sqlite:///{path}")
    await Models(database).save("m", {})
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["fleetmind.db", "fleetmind.db-shm", "fleetmind.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await database.close()
    assert [file.name for file in path.parent.iterdir()] == ["fleetmind.db"], "the write-ahead log was left behind"


# PostgreSQL


async def test_postgres_killed_and_started_again_is_found_again(postgres: Postgres) -> None:
    database = await Database.open(postgres.create_database(next(_names)))
    try:
        await Models(database).save("before", {})
        assert list(await Models(database).all()) == ["before"]
        postgres.kill()
        with pytest.raises(StoreError) as refused:
            await Models(database).save("meanwhile", {})
        assert "PostgreSQL is running" in refused.value.hint
        with pytest.raises(StoreError):
            await Models(database).all()
        postgres.start()
        await Models(database).save("after", {})
        assert list(await Models(database).all()) == ["after", "before"]
    finally:
        await database.close()


async def test_a_restart_of_postgres_between_two_writes_goes_unnoticed(postgres: Postgres) -> None:
    database = await Database.open(postgres.create_database(next(_names)))
    try:
        await Journal(database).append(event())
        postgres.kill()
        postgres.start()
        await asyncio.gather(*(Journal(database).append(event()) for _ in range(20)))
        verdict = await Journal(database).verify()
        assert (verdict.count, verdict.fault) == (21, None)
    finally:
        await database.close()


# Ends its own connection while it commits, as a server that dies at the worst moment does.
DIES_AT_COMMIT = (
    """CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
       $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$""",
    """CREATE CONSTRAINT TRIGGER die AFTER INSERT ON models DEFERRABLE INITIALLY DEFERRED
       FOR EACH ROW WHEN (NEW.name = 'deadly') EXECUTE FUNCTION die()""",
)


async def test_a_connection_that_breaks_during_a_commit_is_not_repeated_but_said(postgres: Postgres) -> None:
    database = await Database.open(postgres.create_database(next(_names)))
    try:
        for statement in DIES_AT_COMMIT:
            await database.write(lambda connection, s=statement: connection.execute(text(s)).close())
        begun: list[int] = []

        def deadly(connection: Connection) -> None:
            begun.append(1)
            connection.execute(text("INSERT INTO models (name, document) VALUES ('deadly', '{}')"))

        with pytest.raises(StoreError) as refused:
            await database.write(deadly)
        assert "may or may not be there" in refused.value.message
        assert len(begun) == 1, "a work whose outcome nobody knows was done twice"
        await Models(database).save("after", {})
        assert list(await Models(database).all()) == ["after"]
    finally:
        await database.close()


async def test_an_opening_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    opening = asyncio.ensure_future(Database.open(f"sqlite:///{tmp_path}/f.db"))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    writers = [thread for thread in threading.enumerate() if thread.name == "fleetmind-writer"]
    for writer in writers:
        await asyncio.to_thread(writer.join, 10)
        assert not writer.is_alive()


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"password": "hunter2"}, "Check the user and the password"),
        ({"password": "hunter2", "port": 1}, "Check that PostgreSQL is running, and the host and port"),
    ],
)
async def test_a_wrong_address_is_refused_without_showing_the_password(
    postgres: Postgres, change: dict[str, object], hint: str
) -> None:
    with pytest.raises(StoreError) as refused:
        await Database.open(postgres.url("postgres", **change))  # type: ignore[arg-type]
    assert hint in refused.value.hint
    assert "hunter2" not in repr(refused.value) + str(refused.value) + refused.value.hint
    assert refused.value.__cause__ is None


async def test_a_database_that_does_not_exist_is_refused_with_what_to_do(postgres: Postgres) -> None:
    with pytest.raises(StoreError) as refused:
        await Database.open(postgres.url("absent"))
    assert "createdb" in refused.value.hint


async def test_a_conflict_in_postgres_leaves_the_connection_usable(postgres: Postgres) -> None:
    database = await Database.open(postgres.create_database(next(_names)))
    insert = "INSERT INTO models (name, document) VALUES ('a', '{}')"
    try:
        await database.write(lambda connection: connection.execute(text(insert)).close())
        with pytest.raises(Conflict):
            await database.write(lambda connection: connection.execute(text(insert)).close())
        assert list(await Models(database).all()) == ["a"]
    finally:
        await database.close()
