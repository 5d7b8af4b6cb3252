"""How each database is reached, and what its errors mean.

Makes engines whose connections are set up for our promises, and turns a driver's error into ours. It runs no
statements of its own beyond that set-up. Invariant: no text that leaves this module holds a password.
"""

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from fleetmind.core.errors import Conflict, FleetmindError, StoreError

READERS_MAX = 4
CONNECT_S_MAX = 10
BUSY_S_MAX = 5.0
STATEMENT_S_MAX = 30
WAL_BYTES_KEPT = 64 * 1024**2

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_POSTGRES_HINTS = {
    "28P01": "Check the user and the password in store.url.",
    "28000": "Check the user and the password in store.url, and the server's pg_hba.conf.",
    "3D000": "Check the database's name in store.url, or make the database with createdb.",
    "42501": "Give the user of store.url the right to create and write tables in its schema.",
    "53100": "The database server's disk is full: make space on it.",
    "53300": "The database server has no connection left: raise its max_connections.",
    "25006": "The database server is a read-only standby: name the primary in store.url.",
    "55P03": "Another process holds a lock for long: look at pg_stat_activity.",
    "57014": "A statement took too long: look at the database server's load.",
    "57P03": "The database server is starting: try again.",
}
_POSTGRES_AWAY = "Check that PostgreSQL is running, and the host and port in store.url."
_SQLITE_HINTS = {
    "SQLITE_FULL": "The disk is full: make space, it then goes on by itself.",
    "SQLITE_IOERR": "The disk is full, out of quota or broken: see `dmesg` and `df`.",
    "SQLITE_BUSY": "Another process writes to the database file: end it.",
    "SQLITE_LOCKED": "Another process writes to the database file: end it.",
    "SQLITE_READONLY": "Check that this user owns the database file and its directory.",
    "SQLITE_CANTOPEN": "Check that the database's directory exists and that this user may write there.",
    "SQLITE_CORRUPT": "The database file is damaged: move it away and put a backup in its place.",
    "SQLITE_NOTADB": "The file is not a database: move it away, or name another in store.url.",
    "SQLITE_PERM": "Check that this user owns the database file and its directory.",
}


@dataclass(frozen=True, slots=True)
class Engines:
    """One engine that makes the writing connection and one for readers; None where readers share the writer's."""

    writer: Engine
    readers: Engine | None
    shown: str
    is_sqlite: bool


def make_engines(url_text: str) -> Engines:
    """Engines for ``sqlite:///path``, ``sqlite://`` (memory) or ``postgresql://…``; nothing is connected yet.

    Raises StoreError for an address that isn't one of these, and for a database file that can't be made.
    """
    if url_text.startswith("sqlite://"):
        # The path as it stands: SQLAlchemy would take a percent sign or a question mark in it for its own.
        path = url_text.removeprefix("sqlite://")
        if path and not path.startswith("/"):
            raise StoreError(f"store.url {url_text} names a host", hint="Write sqlite:///PATH, with three slashes.")
        return _sqlite(URL.create("sqlite", database=path[1:] or None), url_text)
    try:
        url = make_url(url_text)
    except (ArgumentError, ValueError):
        # Not chained and not shown: what can't be parsed may hold the password anywhere.
        raise StoreError(
            "store.url is not an address", hint="Write sqlite:///PATH or postgresql://user:password@host/name."
        ) from None
    backend = url.get_backend_name()
    if backend != "postgresql":
        raise StoreError(
            f"store.url names {backend}, which is not supported", hint="Use sqlite:///PATH or postgresql://…."
        )
    return _postgres(url, url.render_as_string(hide_password=True))


def _sqlite(url: URL, shown: str) -> Engines:
    path = url.database or ""
    is_memory = path in ("", ":memory:")
    if not is_memory:
        _make_private(Path(path))
    arguments: dict[str, Any] = {"check_same_thread": False, "timeout": BUSY_S_MAX, "isolation_level": None}
    writer = create_engine(url, poolclass=StaticPool if is_memory else NullPool, connect_args=arguments)
    event.listen(writer, "connect", _on_connect(_sqlite_pragmas(is_memory=is_memory)))
    # The driver leaves transactions to us; a writer takes its lock at once instead of failing at its first write.
    event.listen(writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    if is_memory:
        return Engines(writer, None, shown, is_sqlite=True)
    readers = create_engine(
        url, poolclass=QueuePool, pool_size=READERS_MAX, max_overflow=0, connect_args=dict(arguments)
    )
    # A reader that checkpoints would be a second writer; see the WAL-reset bug, fixed only in SQLite 3.51.3
    # (https://sqlite.org/wal.html#walresetbug).
    event.listen(readers, "connect", _on_connect(("PRAGMA query_only=ON", "PRAGMA wal_autocheckpoint=0")))
    event.listen(readers, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return Engines(writer, readers, shown, is_sqlite=True)


def _sqlite_pragmas(*, is_memory: bool) -> tuple[str, ...]:
    pragmas = (
        "PRAGMA foreign_keys=ON",
        # Without it INSERT OR REPLACE deletes rows past the journal's triggers.
        "PRAGMA recursive_triggers=ON",
        "PRAGMA temp_store=MEMORY",
    )
    if is_memory:
        return pragmas
    # FULL, because in WAL mode NORMAL may lose acknowledged commits when the power goes.
    durable = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", f"PRAGMA journal_size_limit={WAL_BYTES_KEPT}")
    return durable + pragmas


def _make_private(path: Path) -> None:
    """Make the file before SQLite does, so that no moment passes in which others may read it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        if os.name == "posix" and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise StoreError(
            f"the database file {path} can't be opened: {error.strerror}",
            hint="Check that its directory exists, has space, and that this user owns the file.",
        ) from error


def _postgres(url: URL, shown: str) -> Engines:
    if url.drivername not in ("postgresql", "postgresql+pg8000"):
        raise StoreError(f"store.url names the driver {url.drivername}", hint="Write postgresql://…, without a driver.")
    arguments: dict[str, Any] = {"timeout": CONNECT_S_MAX, "application_name": "fleetmind"}
    if (mode := url.query.get("sslmode")) is not None:
        arguments["ssl_context"] = _tls(str(mode))
        url = url.difference_update_query(["sslmode"])
    url = url.set(drivername="postgresql+pg8000")
    bounds = (f"SET statement_timeout = '{STATEMENT_S_MAX}s'", f"SET lock_timeout = '{STATEMENT_S_MAX}s'")
    try:
        writer = create_engine(url, poolclass=NullPool, connect_args=arguments)
        readers = create_engine(
            url,
            poolclass=QueuePool,
            pool_size=READERS_MAX,
            max_overflow=0,
            pool_pre_ping=True,
            connect_args=dict(arguments),
        )
    except (ImportError, NoSuchModuleError) as error:
        raise StoreError(
            "PostgreSQL needs the driver pg8000, which is not installed", hint="pip install 'fleetmind[postgres]'"
        ) from error
    # A server told to be fast rather than safe would lose what we acknowledged.
    event.listen(writer, "connect", _on_connect((*bounds, "SET synchronous_commit = on")))
    # A session's default, so that it holds for every transaction; and with it each read is of one moment.
    read_only = ("SET default_transaction_read_only = on", "SET default_transaction_isolation = 'repeatable read'")
    event.listen(readers, "connect", _on_connect((*bounds, *read_only)))
    return Engines(writer, readers, shown, is_sqlite=False)


def _tls(mode: str) -> ssl.SSLContext | None:
    """libpq's names: disable, require (encrypted, whoever answers), verify-full (encrypted, and it is who it says)."""
    if mode == "disable":
        return None
    if mode not in ("require", "verify-full"):
        raise StoreError(f"sslmode={mode} is not supported", hint="Use disable, require or verify-full.")
    context = ssl.create_default_context()
    if mode == "require":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _on_connect(statements: tuple[str, ...]) -> Callable[[Any, Any], None]:
    def set_up(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()
        connection.commit()

    return set_up


# What errors mean


def translate(error: SQLAlchemyError | OSError, shown: str) -> FleetmindError:
    """Our error for a driver's: Conflict for a broken constraint, else StoreError with what to do next."""
    orig = error.orig if isinstance(error, DBAPIError) else error
    name = getattr(orig, "sqlite_errorname", "")
    if name:
        if name.startswith("SQLITE_CONSTRAINT"):
            # RAISE(ABORT) in a trigger is a refusal, not a clash of values.
            kind = StoreError if name == "SQLITE_CONSTRAINT_TRIGGER" else Conflict
            return kind(f"the database refused: {orig}")
        hint = next((hint for prefix, hint in _SQLITE_HINTS.items() if name.startswith(prefix)), "")
        return StoreError(f"the database {shown} failed: {orig} ({name})", hint=hint)
    if (code := postgres_code(error)) is not None:
        message = _postgres_message(orig)
        if code.startswith("23"):
            return Conflict(f"the database refused: {message}")
        hint = _POSTGRES_HINTS.get(code, _POSTGRES_AWAY if code[:2] in ("08", "57") else "")
        return StoreError(f"the database {shown} failed: {message} ({code})", hint=hint)
    if is_disconnect(error):
        return StoreError(f"the database {shown} can't be reached: {orig}", hint=_POSTGRES_AWAY)
    return StoreError(f"the database {shown} failed: {orig}")


def postgres_code(error: BaseException) -> str | None:
    """PostgreSQL's five-letter code, if the server itself answered with an error."""
    orig = error.orig if isinstance(error, DBAPIError) else error
    fields = orig.args[0] if isinstance(orig, BaseException) and orig.args else None
    return str(fields["C"]) if isinstance(fields, dict) and "C" in fields else None


def _postgres_message(orig: object) -> str:
    fields = orig.args[0] if isinstance(orig, BaseException) else {}
    return str(fields.get("M", orig)) if isinstance(fields, dict) else str(orig)


def is_busy(error: BaseException) -> bool:
    """Whether another process holds the SQLite file just now."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlite_errorname", "").startswith("SQLITE_BUSY")


def is_disconnect(error: BaseException) -> bool:
    """Whether the connection is gone: a new one may do."""
    if isinstance(error, OSError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = postgres_code(error)
    if code is not None:
        return code.startswith(("08", "57P"))
    if getattr(error.orig, "sqlite_errorname", ""):
        return False
    if "failed transaction block" in str(error.orig):
        # pg8000's word for a commit after a failed statement: the connection is sound.
        return False
    return error.connection_invalidated or type(error.orig).__name__ == "InterfaceError"
