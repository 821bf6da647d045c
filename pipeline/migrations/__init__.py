"""The tables of the history, step by step: each file in `versions/` leads from one state of them to the next.

A change of `pipeline.records` gets a new file there; those that were released never change. What a database lacks is
run in one transaction.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

if TYPE_CHECKING:
    from sqlalchemy import Connection


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def lacks(connection: Connection) -> bool:
    """Say whether the tables are older than this program; those of a newer one lack nothing."""
    script = ScriptDirectory.from_config(_config())
    present = MigrationContext.configure(connection).get_current_revision()
    known = {revision.revision for revision in script.walk_revisions()}
    return present is None or (present in known and present != script.get_current_head())


def upgrade(connection: Connection) -> None:
    """Bring the tables up to date; whoever calls holds a lock, has begun a transaction, and commits."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
