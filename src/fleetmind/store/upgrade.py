"""Brings a database to the present revision of its tables.

Looks first whether there is anything to do: Alembic costs 10 MB and a fifth of a second, which a normal start does
not pay. Invariant: a database is at one revision, whole, or untouched.
"""

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from fleetmind.core.errors import StoreError

REVISION = "0001"
_DIRECTORY = Path(__file__).parent / "migrations"
# Any number will do, so long as every Fleetmind uses the same.
_LOCK_KEY = 5_263_847_101


def upgrade(connection: Connection) -> bool:
    """Migrate if needed, inside the caller's transaction; whether anything was done.

    Raises StoreError for a database written by a newer Fleetmind.
    """
    if _revision(connection) == REVISION:
        return False
    if connection.dialect.name == "postgresql":
        # Two servers that start together: the second waits, and then finds nothing to do.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        connection.execute(text("SET LOCAL statement_timeout = 0"))
    revision = _revision(connection)
    if revision == REVISION:
        return False
    _migrate(connection, revision)
    return True


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _migrate(connection: Connection, revision: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    # The value is interpolated, and a path may hold a percent sign.
    config.set_main_option("script_location", str(_DIRECTORY).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        if revision is not None:
            ScriptDirectory.from_config(config).get_revision(revision)
    except CommandError as error:
        raise StoreError(
            f"the database is at revision {revision}, which this Fleetmind doesn't know",
            hint="A newer Fleetmind wrote it: install that version again, or use another database.",
        ) from error
    command.upgrade(config, "head")
