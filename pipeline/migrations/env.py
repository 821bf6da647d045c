"""What Alembic runs for each command: on the connection that `pipeline.migrations` gave it."""

from __future__ import annotations

from alembic import context

# SQLite changes a table by copying it (`render_as_batch`); the transaction is the caller's.
context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
