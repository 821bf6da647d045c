"""Which webhook a webhook repeats."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add it."""
    op.add_column("webhooks", sa.Column("retry_of", sa.Text()))
