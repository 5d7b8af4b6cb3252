"""The journal: what happened, in order, never changed.

Appends events and checks that nobody changed them. Every entry's hash covers the hash before it, so a change
anywhere breaks the chain from there on; the head, kept apart, shows when the end is missing. This finds damage and
careless or partial tampering; somebody who may write to the database and recomputes all of it is not stopped.
Invariant: entry n's hash is SHA-256(hash of n-1 as hex, newline, canonical JSON of entry n), hash 0 being 64 zeros.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, insert, select, update

from fleetmind.core.errors import InvalidRequest, JournalBroken
from fleetmind.core.events import Event
from fleetmind.store.database import Database
from fleetmind.store.schema import journal, journal_head
from fleetmind.store.writer import JOURNAL_ENTRIES

FIRST_HASH = "0" * 64
PAGE_ENTRIES = 1000
ENTRIES_MAX = 1000
DATA_CHARS_MAX = 256 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """An event in its place. ``kind`` is text: a journal may hold kinds that a newer version wrote."""

    position: int
    at_s: float
    kind: str
    subject: str
    data: Mapping[str, object]
    hash: str


@dataclass(frozen=True, slots=True)
class Fault:
    """The first place where the journal is not what was written."""

    position: int
    reason: str

    def __str__(self) -> str:
        return f"entry {self.position}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``verify`` found: ``count`` entries are sound, the last of them with ``head_hash``."""

    count: int
    head_hash: str
    fault: Fault | None


def canonical(value: object) -> str:
    """The one JSON text of a value: keys sorted, no spaces, ASCII. Raises InvalidRequest for what isn't JSON."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"not plain JSON: {error}", hint="Keep to texts, finite numbers, lists and objects."
        ) from error


def chain_hash(before: str, position: int, at_s: float, kind: str, subject: str, data: str) -> str:
    """The hash of an entry that follows the hash ``before``; ``data`` is canonical JSON."""
    row = canonical([position, at_s, kind, subject, data])
    # A hash that somebody wrote into the database can be any text; it must not fail, only not fit.
    return hashlib.sha256(f"{before}\n{row}".encode("utf-8", "surrogatepass")).hexdigest()


_LOCK_HEAD = (
    update(journal_head)
    .where(journal_head.c.id == 1)
    .values(count=journal_head.c.count + bindparam("added"))
    .returning(journal_head.c.count, journal_head.c.hash)
)
_MOVE_HEAD = update(journal_head).where(journal_head.c.id == 1).values(hash=bindparam("new_hash"))
_INSERT = insert(journal)


def append_in(connection: Connection, *events: Event) -> None:
    """Append events inside the caller's transaction, so that a change and its event are one.

    Raises InvalidRequest for an event that isn't plain JSON or is larger than DATA_CHARS_MAX.
    """
    if not events:
        return
    texts = [_data_text(event) for event in events]
    # First of all: the row stays locked until the commit, so that two servers can't both continue from one head.
    count, before = connection.execute(_LOCK_HEAD, {"added": len(events)}).one()
    rows: list[dict[str, Any]] = []
    for position, (event, data) in enumerate(zip(events, texts, strict=True), start=count - len(events) + 1):
        kind, at_s = str(event.kind), float(event.at_s)
        before = chain_hash(before, position, at_s, kind, event.subject, data)
        rows.append(
            {"position": position, "at_s": at_s, "kind": kind, "subject": event.subject, "data": data, "hash": before}
        )
    connection.execute(_INSERT, rows)
    connection.execute(_MOVE_HEAD, {"new_hash": before})
    connection.info[JOURNAL_ENTRIES] = connection.info.get(JOURNAL_ENTRIES, 0) + len(rows)


def _data_text(event: Event) -> str:
    text = canonical(dict(event.data))
    if len(text) > DATA_CHARS_MAX:
        raise InvalidRequest(f"the event {event.kind} holds {len(text)} characters", hint="Keep events small.")
    if "\0" in event.subject or not event.subject.isprintable():
        raise InvalidRequest(f"the subject {event.subject!r} is not an id", hint="Use printable characters.")
    return text


class Journal:
    """The journal of one database."""

    def __init__(self, database: Database, *, page_entries: int = PAGE_ENTRIES) -> None:
        """``page_entries`` is how many ``verify`` holds in memory at once."""
        self._database = database
        self._page_entries = page_entries

    async def append(self, *events: Event) -> None:
        """Append events, all or none; they are on disk when this returns. Raises StoreError, InvalidRequest."""
        await self._database.write(lambda connection: append_in(connection, *events))

    async def entries(self, after: int = 0, limit: int = 100, kind: str | None = None) -> tuple[Entry, ...]:
        """Up to ``limit`` (at most ENTRIES_MAX) entries past position ``after``, oldest first.

        Raises JournalBroken for an entry that can't be read, StoreError.
        """
        query = select(journal).where(journal.c.position > after).order_by(journal.c.position)
        if kind is not None:
            query = query.where(journal.c.kind == str(kind))
        query = query.limit(max(0, min(limit, ENTRIES_MAX)))
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return tuple(_entry(row) for row in rows)

    async def last(self) -> int:
        """The position of the newest entry; 0 for none."""
        return await self._database.read(
            lambda connection: connection.execute(select(func.coalesce(func.max(journal.c.position), 0))).scalar_one()
        )

    async def verify(self) -> Verdict:
        """Check the whole chain up to the head of this moment, a page at a time; appends go on meanwhile."""
        head = await self._database.read(_read_head)
        if head is None:
            return Verdict(0, FIRST_HASH, Fault(0, "the head is missing"))
        count, head_hash, last = head
        done, before = 0, FIRST_HASH
        after: int | None = None
        while done < count:
            rows = await self._database.read(partial(_page, after=after, limit=self._page_entries))
            if not rows:
                return Verdict(done, before, Fault(done + 1, f"is missing; the journal had {count} entries"))
            for row in rows[: count - done]:
                fault = _check(row, done + 1, before)
                if fault is not None:
                    return Verdict(done, before, fault)
                done, before = done + 1, row.hash
            after = rows[-1].position
        if before != head_hash:
            return Verdict(done, before, Fault(done, "is not the one the head was written for"))
        if last != count:
            return Verdict(done, before, Fault(count + 1, "was not written by Fleetmind: the head doesn't know it"))
        return Verdict(done, before, None)


def _read_head(connection: Connection) -> tuple[int, str, int] | None:
    head = connection.execute(select(journal_head.c.count, journal_head.c.hash).where(journal_head.c.id == 1)).first()
    last = connection.execute(select(func.max(journal.c.position))).scalar()
    if head is None:
        return None
    count, head_hash = head
    return count, head_hash, last or 0


def _page(connection: Connection, after: int | None, limit: int) -> list[Row[Any]]:
    query = select(journal).order_by(journal.c.position).limit(limit)
    # The first page has no lower bound: an entry before the first would be missed.
    return list(connection.execute(query if after is None else query.where(journal.c.position > after)))


def _check(row: Row[Any], position: int, before: str) -> Fault | None:
    if not isinstance(row.position, int):
        # SQLite keeps what it is given, whatever the column's type.
        return Fault(position, f"is missing; {row.position!r} is in its place")
    if row.position > position:
        return Fault(position, f"is missing; {row.position} follows {position - 1}")
    if row.position < position:
        return Fault(row.position, "was not written by Fleetmind")
    try:
        expected = chain_hash(before, position, row.at_s, row.kind, row.subject, row.data)
    except InvalidRequest:
        expected = ""
    if row.hash != expected:
        return Fault(position, "was changed, or the one before it was: its hash doesn't fit")
    return None


def _entry(row: Row[Any]) -> Entry:
    try:
        data = json.loads(row.data)
    except (TypeError, ValueError) as error:
        raise JournalBroken(
            f"entry {row.position} of the journal was changed: it isn't JSON",
            hint="Run `fleetmind doctor`, and put a backup of the database in its place.",
        ) from error
    return Entry(row.position, row.at_s, row.kind, row.subject, data, row.hash)
