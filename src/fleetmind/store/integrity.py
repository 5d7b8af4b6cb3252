"""Whether the database is whole. Looks and never changes anything."""

import sqlite3

from sqlalchemy import Connection, text

from fleetmind.store.database import Database


def sqlite_version() -> tuple[int, ...]:
    """The version of the SQLite library in use."""
    return sqlite3.sqlite_version_info


async def fault_of(database: Database) -> str | None:
    """What is wrong with the database's pages, None if nothing is. PostgreSQL keeps checksums of its own and is only
    asked whether it answers.

    Raises StoreError where it doesn't answer.
    """

    def look(connection: Connection) -> str | None:
        if connection.dialect.name != "sqlite":
            connection.execute(text("SELECT 1"))
            return None
        said = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
        return None if said == "ok" else str(said)

    return await database.read(look)
