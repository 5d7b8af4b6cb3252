"""Whether the database is whole. Looks and never changes anything."""

import sqlite3

from sqlalchemy import Connection, text

from fleetmind.core.errors import StoreError
from fleetmind.store.database import Database


def sqlite_version() -> tuple[int, ...]:
    """The version of the SQLite library in use."""
    return sqlite3.sqlite_version_info


async def fault_of(database: Database, *, is_thorough: bool = False) -> str | None:
    """What is wrong with the database's pages, None if nothing is; ``is_thorough`` compares the indexes too.

    PostgreSQL keeps checksums of its own and is only asked whether it answers. Raises StoreError where it doesn't.
    """
    pragma = "integrity_check" if is_thorough else "quick_check"

    def look(connection: Connection) -> str | None:
        if connection.dialect.name != "sqlite":
            connection.execute(text("SELECT 1"))
            return None
        said = connection.execute(text(f"PRAGMA {pragma}(1)")).scalar_one()
        return None if said == "ok" else str(said)

    try:
        return await database.read(look)
    except StoreError as error:
        # Some damage stops the check itself.
        if "SQLITE_CORRUPT" in error.message:
            return error.message
        raise
