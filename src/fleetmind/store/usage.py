"""What calls used: one row a call, written in batches off the hot path.

Counts; it knows no prices and no limits. Invariant: a call is counted once, however often its row is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from fleetmind.store.database import Database
from fleetmind.store.schema import usage

PRUNE_ROWS_MAX = 5000


class UsageRow(msgspec.Struct, frozen=True):
    """One ended call. Times are seconds; ``at_s`` is the wall time of its end, ``ttft_s`` None without a token.

    A Struct is made in a tenth of a dataclass's time, and every call makes one.
    """

    call_id: str
    key_id: str
    model: str
    replica_id: str
    kind: str
    status: str
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    ttft_s: float | None
    duration_s: float
    at_s: float
    is_simulated: bool


_FIELDS = UsageRow.__struct_fields__


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """The sum over the calls of one model and key; simulated calls are summed apart."""

    model: str
    key_id: str
    is_simulated: bool
    calls: int
    prompt_tokens: int
    completion_tokens: int
    duration_s: float


class Usage:
    """The usage of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(self, rows: Sequence[UsageRow]) -> None:
        """Write rows, all or none. A call already there is left as it is, so a batch may be repeated."""
        if rows:
            values = [msgspec.structs.astuple(row) for row in rows]
            await self._database.write(lambda connection: _insert(connection, values))

    async def totals(self, since_s: float = 0.0) -> tuple[UsageTotal, ...]:
        """Sums over the calls that ended at ``since_s`` or later, per model and key, in the order of their names."""
        group = (usage.c.model, usage.c.key_id, usage.c.is_simulated)
        sums = (func.sum(usage.c.prompt_tokens), func.sum(usage.c.completion_tokens), func.sum(usage.c.duration_s))
        query = select(*group, func.count(), *sums).where(usage.c.at_s >= since_s).group_by(*group)
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        # The sums of PostgreSQL are decimals.
        totals = (
            UsageTotal(model, key, bool(is_simulated), calls, int(prompt), int(completion), float(duration_s))
            for model, key, is_simulated, calls, prompt, completion, duration_s in rows
        )
        return tuple(sorted(totals, key=lambda total: (total.model, total.key_id, total.is_simulated)))

    async def prune(self, before_s: float) -> int:
        """Remove calls that ended before ``before_s``, at most PRUNE_ROWS_MAX of them. Returns how many."""
        oldest = (
            select(usage.c.call_id).where(usage.c.at_s < before_s).order_by(usage.c.at_s).limit(PRUNE_ROWS_MAX)
        ).scalar_subquery()
        statement = delete(usage).where(usage.c.call_id.in_(oldest))
        return await self._database.write(lambda connection: connection.execute(statement).rowcount)


def _insert(connection: Connection, values: list[tuple[Any, ...]]) -> None:
    # The same statement twice: SQLAlchemy knows ON CONFLICT only by database. It is handed to the driver as text with
    # the values as they are: there is a row for every call, and taking them apart costs three times the insert.
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(usage).on_conflict_do_nothing()
    compiled = statement.compile(dialect=connection.dialect, column_keys=_FIELDS)
    assert tuple(compiled.positiontup or ()) == _FIELDS, "the table's columns are in the order of UsageRow"
    connection.exec_driver_sql(str(compiled), values)
