"""The catalogue's entries at rest, each a JSON document under the model's name.

Stores documents; what is in them is the catalogue's business. Invariant: a change and its journal entry are there
both, or neither.
"""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from fleetmind.core.events import Event
from fleetmind.store.database import Database
from fleetmind.store.journal import append_in, canonical
from fleetmind.store.schema import models


class Models:
    """The models of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, name: str, document: Mapping[str, object], *events: Event) -> None:
        """Add or replace the document of ``name``. Raises InvalidRequest when it isn't plain JSON, StoreError."""
        text = canonical(dict(document))

        def work(connection: Connection) -> None:
            statement = update(models).where(models.c.name == name).values(document=text)
            if connection.execute(statement).rowcount == 0:
                connection.execute(insert(models), {"name": name, "document": text})
            append_in(connection, *events)

        await self._database.write(work)

    async def all(self) -> dict[str, dict[str, Any]]:
        """Every document, by name, in the order of names."""
        query = select(models.c.name, models.c.document).order_by(models.c.name)
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return {row.name: json.loads(row.document) for row in sorted(rows, key=lambda row: str(row.name))}

    async def delete(self, name: str, *events: Event) -> bool:
        """Remove a document. False, and no events, when there is none."""

        def work(connection: Connection) -> bool:
            is_changed = connection.execute(delete(models).where(models.c.name == name)).rowcount == 1
            if is_changed:
                append_in(connection, *events)
            return is_changed

        return await self._database.write(work)
