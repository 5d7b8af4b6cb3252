"""Runs migrations on the connection it is given, inside the transaction it is given.

Executed by Alembic, never imported. Invariant: either every step is committed by whoever began the transaction, or
none is.
"""

from alembic import context

from fleetmind.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
