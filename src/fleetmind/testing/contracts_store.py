"""What every database must do, whichever it is.

Each ``check_*`` takes an open, fresh Database, drives it through its public face, and raises AssertionError with what
was broken. Somebody who adds a database runs these against it. Nothing here knows which database it drives.
"""

import asyncio
import threading
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial

from sqlalchemy import Connection, Executable, delete, insert, select, text, update
from sqlalchemy.exc import SQLAlchemyError

from fleetmind.core.errors import Conflict, FleetmindError, InvalidRequest, StoreError
from fleetmind.core.events import Event, EventKind
from fleetmind.core.types import KeyId
from fleetmind.store.database import WAITING_MAX, Database
from fleetmind.store.journal import ENTRIES_MAX, Journal, append_in
from fleetmind.store.keys import KeyRecord, Keys
from fleetmind.store.models import Models
from fleetmind.store.schema import journal, journal_head, models
from fleetmind.store.usage import Usage, UsageRow, UsageTotal


class _Deliberate(Exception):
    """A failure that a check makes itself."""


async def check_database(database: Database, *, reads_beside_writes: bool = True) -> None:
    """Writes and reads: results, isolation, failure, refusal, cancellation, and more at once than may wait.

    ``reads_beside_writes`` is False for a database whose readers share the writer's connection.
    """
    await _check_results(database)
    await _check_failures_stay_alone(database)
    await _check_refusals(database)
    await _check_a_hidden_failure(database)
    await _check_cancellation(database)
    await _check_no_update_is_lost(database)
    if reads_beside_writes:
        await _check_a_long_read(database)
    await database.close()
    await database.close()
    assert isinstance(await _raised(database.write(_names)), StoreError), "a closed database accepted a write"
    assert isinstance(await _raised(database.read(_names)), StoreError), "a closed database accepted a read"


async def _check_results(database: Database) -> None:
    assert await database.write(lambda connection: _put(connection, "a", "1")) == "a"
    assert await database.read(_names) == ["a"], "a committed write is not seen"
    await database.write(lambda connection: connection.execute(delete(models)).close())
    assert await database.read(_names) == []


async def _check_failures_stay_alone(database: Database) -> None:
    def work(connection: Connection, number: int) -> int:
        _put(connection, f"n{number:03}", "1")
        if number % 7 == 0:
            raise _Deliberate(str(number))
        if number % 11 == 0:
            _put(connection, f"n{number:03}", "the same name again")
        return number

    works = (database.write(partial(work, number=n)) for n in range(100))
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        if number % 7 == 0:
            assert isinstance(outcome, _Deliberate), f"work {number} should have failed by itself, was {outcome!r}"
        elif number % 11 == 0:
            assert isinstance(outcome, Conflict), f"work {number} should be a conflict, was {outcome!r}"
        else:
            assert outcome == number, f"work {number} was harmed by another: {outcome!r}"
    expected = [f"n{number:03}" for number in range(100) if number % 7 and number % 11]
    assert await database.read(_names) == expected, "a failed work left something, or took something along"
    await database.write(lambda connection: connection.execute(delete(models)).close())


async def _check_refusals(database: Database) -> None:
    refused = await _raised(database.read(lambda connection: _put(connection, "b", "1")))
    assert isinstance(refused, StoreError), f"a reader was allowed to write: {refused!r}"
    refused = await _raised(database.write(lambda connection: connection.execute(text("SELECT no_such_thing")).close()))
    assert isinstance(refused, StoreError), f"a driver's error came through: {refused!r}"
    await database.write(lambda connection: _put(connection, "b", "1"))
    assert await database.read(_names) == ["b"], "a refused work left something behind"
    await database.write(lambda connection: connection.execute(delete(models)).close())


async def _check_a_hidden_failure(database: Database) -> None:
    """A work that goes on after a failed statement: databases differ in what is left, so only a lie is wrong."""

    def work(connection: Connection) -> None:
        _put(connection, "e", "1")
        with suppress(SQLAlchemyError):
            _put(connection, "e", "again")

    refused = await _raised(database.write(work))
    expected = [] if refused else ["e"]
    assert await database.read(_names) == expected, f"acknowledged, and not there (or the reverse): {refused!r}"
    await database.write(lambda connection: connection.execute(delete(models)).close())


async def _check_cancellation(database: Database) -> None:
    waiting = [asyncio.ensure_future(database.write(lambda connection: _put(connection, "c", "1")))]
    waiting += [asyncio.ensure_future(database.write(_names_text)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert waiting[0].cancelled()
    assert all(one.exception() is None for one in waiting[1:]), "a cancelled caller harmed others"
    await database.write(lambda connection: connection.execute(delete(models)).close())


async def _check_no_update_is_lost(database: Database) -> None:
    total = WAITING_MAX + 200

    def count(connection: Connection) -> None:
        before = connection.execute(select(models.c.document).where(models.c.name == "count")).scalar_one()
        connection.execute(update(models).where(models.c.name == "count").values(document=str(int(before) + 1)))

    await database.write(lambda connection: _put(connection, "count", "0"))
    await asyncio.gather(*(database.write(count) for _ in range(total)))
    counted = await database.read(lambda connection: connection.execute(select(models.c.document)).scalar_one())
    assert counted == str(total), f"{total} increments counted to {counted}"
    await database.write(lambda connection: connection.execute(delete(models)).close())


async def _check_a_long_read(database: Database) -> None:
    began, may_end = threading.Event(), threading.Event()

    def long_read(connection: Connection) -> tuple[list[str], list[str]]:
        before = _names(connection)
        began.set()
        assert may_end.wait(30)
        return before, _names(connection)

    reading = asyncio.ensure_future(database.read(long_read))
    try:
        await asyncio.to_thread(began.wait, 30)
        await asyncio.wait_for(database.write(lambda connection: _put(connection, "d", "1")), 10)
        assert await asyncio.wait_for(database.read(_names), 10) == ["d"], "a read waited for another"
    finally:
        may_end.set()
    assert await reading == ([], []), "a read saw two states of the database"
    await database.write(lambda connection: connection.execute(delete(models)).close())


async def check_journal(database: Database) -> None:
    """The journal: order, atomicity, refusal of change, any JSON, many at once, and that it verifies."""
    log = Journal(database)
    verdict = await log.verify()
    assert (verdict.count, verdict.fault) == (0, None), f"an empty journal doesn't verify: {verdict}"
    awkward = {"text": 'é\0\ud800\U0001f600"\\\n', "big": 10**30, "float": 0.1, "deep": {"b": [None, True], "a": -0.0}}
    await log.append(_event("first", awkward), _event("second", kind=EventKind.MODEL_ADDED))
    await log.append()
    entries = await log.entries()
    assert [entry.position for entry in entries] == [1, 2]
    assert [entry.subject for entry in entries] == ["first", "second"]
    assert entries[0].data == awkward, f"data came back as {entries[0].data!r}"
    assert entries[0].at_s == 1_700_000_000.123456
    assert [entry.position for entry in await log.entries(kind=EventKind.MODEL_ADDED)] == [2]
    assert [entry.position for entry in await log.entries(after=1)] == [2]
    assert await log.entries(limit=0) == ()
    assert await log.entries(after=2) == ()

    not_json: tuple[dict[str, object], ...] = ({"x": float("nan")}, {"x": {1, 2}}, {"x": object()})
    for broken in not_json:
        refused = await _raised(log.append(_event("bad"), _event("worse", broken)))
        assert isinstance(refused, InvalidRequest), f"{broken} was accepted: {refused!r}"

    def change_and_fail(connection: Connection) -> None:
        append_in(connection, _event("never"))
        raise _Deliberate

    outcomes = await asyncio.gather(
        *(log.append(_event(f"many-{n}"), _event(f"many-{n}")) for n in range(40)),
        *(database.write(change_and_fail) for _ in range(10)),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, _Deliberate) for outcome in outcomes) == 10
    assert sum(outcome is None for outcome in outcomes) == 40
    entries = await log.entries(limit=ENTRIES_MAX + 1)
    assert [entry.position for entry in entries] == list(range(1, 83)), "positions have gaps"
    assert all(entry.subject != "never" for entry in entries)
    assert await log.last() == 82

    statements = (
        update(journal).values(subject="x"),
        delete(journal).where(journal.c.position == 82),
        update(journal_head).values(count=81),
        delete(journal_head),
    )
    for statement in statements:
        refused = await _raised(database.write(partial(_execute, statement=statement)))
        assert isinstance(refused, StoreError), f"the journal can be changed by {statement}: {refused!r}"
        assert "append-only" in refused.message
    verdict = await log.verify()
    assert (verdict.count, verdict.fault) == (82, None), f"the journal doesn't verify: {verdict}"
    assert verdict.head_hash == entries[-1].hash


async def check_keys(database: Database) -> None:
    """Keys: what goes in comes out; revoked once; used times only grow; changes and events are one."""
    store, log = Keys(database), Journal(database)
    first = KeyRecord(KeyId("a"), "first é", bytes(range(32)), frozenset({"read", "infer"}), frozenset({"m"}), 10.5)
    second = KeyRecord(KeyId("b"), "second", b"\xff" * 32, frozenset(), frozenset(), 11.0, expires_at_s=20.25)
    await store.insert(first, _event("a", kind=EventKind.KEY_CREATED))
    await store.insert(second)
    assert await store.all() == (first, second)
    for clash in (first, KeyRecord(KeyId("c"), "same digest", first.digest, frozenset(), frozenset(), 1.0)):
        refused = await _raised(store.insert(clash, _event("clash")))
        assert isinstance(refused, Conflict), f"a second key like the first was accepted: {refused!r}"

    await store.touch({KeyId("a"): 15.0, KeyId("unknown"): 15.0})
    await store.touch({KeyId("a"): 14.0, KeyId("b"): 12.0})
    await store.touch({})
    assert [record.last_used_at_s for record in await store.all()] == [15.0, 12.0]

    assert await store.revoke("a", 16.0, _event("a", kind=EventKind.KEY_REVOKED)) is True
    assert await store.revoke("a", 17.0, _event("again")) is False
    assert await store.revoke("unknown", 17.0, _event("unknown")) is False
    assert [record.revoked_at_s for record in await store.all()] == [16.0, None]
    kinds = [entry.kind for entry in await log.entries()]
    assert kinds == [EventKind.KEY_CREATED, EventKind.KEY_REVOKED], f"changes and events differ: {kinds}"


async def check_models(database: Database) -> None:
    """Models: saved, replaced and deleted with their events; any JSON and any name."""
    store, log = Models(database), Journal(database)
    document = {"path": "/m.gguf", "slots": 4, "shape": {"layers": [1, 2], "x": None}, "é": "\0\ud800"}
    await store.save("b", document, _event("b", kind=EventKind.MODEL_ADDED))
    await store.save("A/x é'\"", {})
    await store.save("b", document | {"slots": 8})
    assert await store.all() == {"A/x é'\"": {}, "b": document | {"slots": 8}}
    assert list(await store.all()) == ["A/x é'\"", "b"]
    refused = await _raised(store.save("c", {"x": float("inf")}, _event("c")))
    assert isinstance(refused, InvalidRequest)
    assert await store.delete("b", _event("b", kind=EventKind.MODEL_REMOVED)) is True
    assert await store.delete("b", _event("again")) is False
    assert list(await store.all()) == ["A/x é'\""]
    assert [entry.kind for entry in await log.entries()] == [EventKind.MODEL_ADDED, EventKind.MODEL_REMOVED]


async def check_usage(database: Database) -> None:
    """Usage: each call counted once, summed per model and key, simulated apart, pruned by age."""
    store = Usage(database)
    rows = [_usage(f"c{n}", model=f"m{n % 2}", key="k", at_s=float(n)) for n in range(10)]
    await asyncio.gather(store.append(rows[:6]), store.append(rows[4:]), store.append([]))
    await store.append([_usage("s", model="m0", key="k", at_s=1.0, is_simulated=True)])
    assert await store.totals() == (
        UsageTotal("m0", "k", False, 5, 50, 5 * 2**40, 1.25),
        UsageTotal("m0", "k", True, 1, 10, 2**40, 0.25),
        UsageTotal("m1", "k", False, 5, 50, 5 * 2**40, 1.25),
    )
    assert [(total.model, total.calls) for total in await store.totals(8.0)] == [("m0", 1), ("m1", 1)]
    assert await store.totals(99.0) == ()
    assert await store.prune(5.0) == 6
    assert await store.prune(5.0) == 0
    assert sum(total.calls for total in await store.totals()) == 5


def _put(connection: Connection, name: str, document: str) -> str:
    connection.execute(insert(models), {"name": name, "document": document})
    return name


def _execute(connection: Connection, statement: Executable) -> None:
    connection.execute(statement)


def _names(connection: Connection) -> list[str]:
    return list(connection.execute(select(models.c.name).order_by(models.c.name)).scalars())


def _names_text(connection: Connection) -> str:
    return ",".join(_names(connection))


def _event(subject: str, data: dict[str, object] | None = None, kind: EventKind = EventKind.SERVER_STARTED) -> Event:
    return Event(kind, subject, 1_700_000_000.123456, data or {})


def _usage(call_id: str, *, model: str, key: str, at_s: float, is_simulated: bool = False) -> UsageRow:
    return UsageRow(call_id, key, model, "r", "chat", "ok", 10, 2**40, 0.125, None, 0.25, at_s, is_simulated)


async def _raised(awaitable: Awaitable[object]) -> FleetmindError | None:
    try:
        await awaitable
    except FleetmindError as error:
        return error
    return None
