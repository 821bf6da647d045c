"""Reports, the people they are about, and who was erased."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "erasures",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("epoch", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("erased_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "epoch"),
    )
    op.create_table(
        "reports",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("report_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("report_type", sa.Text()),
        sa.Column("inputs", sa.JSON(none_as_null=True)),
        sa.Column("language", sa.Text()),
        sa.Column("request_id", sa.Text()),
        sa.Column("user_id", sa.Text()),
        sa.Column("epoch", sa.Text()),
        sa.Column("created_ms", sa.BigInteger()),
        sa.Column("status", sa.Text()),
        sa.Column("cached", sa.Boolean()),
        sa.Column("report", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("worker", sa.Text()),
        sa.Column("replica", sa.Text()),
        sa.Column("attempts", sa.BigInteger()),
        sa.Column("timings_ms", sa.JSON(none_as_null=True)),
        sa.Column("finished_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "report_id"),
    )
    op.create_index("reports_by_user", "reports", ["tenant", "user_id", "created_ms", "report_id"])
    op.create_table(
        "users",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.Text()),
        sa.Column("created_ms", sa.BigInteger()),
        sa.Column("updated_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "user_id"),
    )
