"""API keys at rest: a digest of each, what it may do, and when it was used.

Stores and finds; whether a key is valid now is the api's business. The key itself never comes here.
Invariant: a key and the journal entry of its making or revoking are there both, or neither.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, bindparam, insert, or_, select, update

from fleetmind.core.errors import Conflict
from fleetmind.core.events import Event
from fleetmind.core.types import KeyId
from fleetmind.store.database import Database
from fleetmind.store.journal import append_in
from fleetmind.store.schema import keys


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as stored. ``digest`` is a keyed hash of it; no ``models`` means every model. Times are wall seconds."""

    id: KeyId
    name: str
    digest: bytes
    scopes: frozenset[str]
    models: frozenset[str]
    created_at_s: float
    expires_at_s: float | None = None
    revoked_at_s: float | None = None
    last_used_at_s: float | None = None


_TOUCH = (
    update(keys)
    .where(
        keys.c.id == bindparam("key_id"),
        or_(keys.c.last_used_at_s.is_(None), keys.c.last_used_at_s < bindparam("used_at_s")),
    )
    .values(last_used_at_s=bindparam("used_at_s"))
)


class Keys:
    """The keys of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, record: KeyRecord, *events: Event) -> None:
        """Add a key. Raises Conflict when its id or digest exists, StoreError."""

        def work(connection: Connection) -> None:
            connection.execute(insert(keys), _row(record))
            append_in(connection, *events)

        try:
            await self._database.write(work)
        except Conflict as error:
            raise Conflict(
                f"the key {record.id}, or one with the same digest, exists", hint="Make a new key.", param="id"
            ) from error

    async def revoke(self, key_id: str, at_s: float, *events: Event) -> bool:
        """Revoke a key for good. False, and no events, when there is none of that id or it was revoked already."""

        def work(connection: Connection) -> bool:
            statement = update(keys).where(keys.c.id == key_id, keys.c.revoked_at_s.is_(None))
            is_changed = connection.execute(statement.values(revoked_at_s=at_s)).rowcount == 1
            if is_changed:
                append_in(connection, *events)
            return is_changed

        return await self._database.write(work)

    async def all(self) -> tuple[KeyRecord, ...]:
        """Every key, also revoked ones, oldest first."""
        query = select(keys).order_by(keys.c.created_at_s, keys.c.id)
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return tuple(_record(row) for row in rows)

    async def touch(self, used_at_s: Mapping[KeyId, float]) -> None:
        """Note when keys were last used; an earlier time than the noted one is ignored, as is an unknown key."""
        if used_at_s:
            # Sorted, so that two servers lock rows in the same order.
            rows = [{"key_id": key_id, "used_at_s": at_s} for key_id, at_s in sorted(used_at_s.items())]
            await self._database.write(lambda connection: connection.execute(_TOUCH, rows).close())


def _row(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "digest": record.digest,
        "scopes": json.dumps(sorted(record.scopes)),
        "models": json.dumps(sorted(record.models)),
        "created_at_s": record.created_at_s,
        "expires_at_s": record.expires_at_s,
        "revoked_at_s": record.revoked_at_s,
        "last_used_at_s": record.last_used_at_s,
    }


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        id=KeyId(row.id),
        name=row.name,
        digest=bytes(row.digest),
        scopes=frozenset(json.loads(row.scopes)),
        models=frozenset(json.loads(row.models)),
        created_at_s=row.created_at_s,
        expires_at_s=row.expires_at_s,
        revoked_at_s=row.revoked_at_s,
        last_used_at_s=row.last_used_at_s,
    )
