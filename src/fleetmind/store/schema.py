"""The tables, as statements see them.

Pure declarations. How they come to be on disk is the migrations' business; a test holds the two together.
Invariant: nothing here is of one database only, so that one set of statements serves SQLite and PostgreSQL.
"""

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

# Append-only; triggers refuse UPDATE and DELETE. Position counts from 1 without gaps.
journal = Table(
    "journal",
    metadata,
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("at_s", Double, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("subject", Text, nullable=False),
    Column("data", Text, nullable=False),
    Column("hash", String(64), nullable=False),
    Index("journal_kind", "kind", "position"),
)

# One row: how many entries there are and the last one's hash. Updating it first is the lock of an append.
journal_head = Table(
    "journal_head",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("count", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("scopes", Text, nullable=False),
    Column("models", Text, nullable=False),
    Column("created_at_s", Double, nullable=False),
    Column("expires_at_s", Double),
    Column("revoked_at_s", Double),
    Column("last_used_at_s", Double),
)

models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("document", Text, nullable=False),
)

usage = Table(
    "usage",
    metadata,
    Column("call_id", String(64), primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("replica_id", Text, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("status", String(64), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("queue_s", Double, nullable=False),
    Column("ttft_s", Double),
    Column("duration_s", Double, nullable=False),
    Column("at_s", Double, nullable=False),
    Column("is_simulated", Boolean, nullable=False),
    Index("usage_at", "at_s"),
)
