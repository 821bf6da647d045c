"""Deliveries, and messages that came from outside."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "deliveries",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.Text()),
        sa.Column("sender", sa.Text()),
        sa.Column("recipient", sa.Text()),
        sa.Column("subject", sa.Text()),
        sa.Column("body", sa.Text()),
        sa.Column("html", sa.Text()),
        sa.Column("attachments", sa.JSON(none_as_null=True)),
        sa.Column("metadata", sa.JSON(none_as_null=True)),
        sa.Column("scheduled_ms", sa.BigInteger()),
        sa.Column("retry_of", sa.Text()),
        sa.Column("created_ms", sa.BigInteger()),
        sa.Column("status", sa.Text()),
        sa.Column("history", sa.JSON(none_as_null=True)),
        sa.Column("provider", sa.Text()),
        sa.Column("provider_id", sa.Text()),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("attempts", sa.BigInteger()),
        sa.Column("changed_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "delivery_id"),
    )
    for name, columns in {
        "deliveries_by_time": [],
        "deliveries_by_type": ["type"],
        "deliveries_by_status": ["status"],
        "deliveries_by_recipient": ["recipient"],
    }.items():
        op.create_index(name, "deliveries", ["tenant", *columns, "created_ms", "delivery_id"])
    op.create_table(
        "incoming",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("incoming_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("provider", sa.Text()),
        sa.Column("provider_id", sa.Text()),
        sa.Column("type", sa.Text()),
        sa.Column("sender", sa.Text()),
        sa.Column("recipient", sa.Text()),
        sa.Column("subject", sa.Text()),
        sa.Column("body", sa.Text()),
        sa.Column("media", sa.JSON(none_as_null=True)),
        sa.Column("created_ms", sa.BigInteger()),
        sa.Column("status", sa.Text()),
        sa.Column("result", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("finished_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "incoming_id"),
    )
    op.create_index("incoming_by_time", "incoming", ["tenant", "created_ms", "incoming_id"])
