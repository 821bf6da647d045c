"""Chats: what was said in them, and personas."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "chats",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("chat_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger()),
        sa.Column("changed_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "chat_id"),
    )
    op.create_table(
        "chat_turns",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("turn_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("chat_id", sa.Text()),
        sa.Column("seq", sa.BigInteger()),
        sa.Column("epoch", sa.BigInteger()),
        sa.Column("role", sa.Text()),
        sa.Column("message_id", sa.Text()),
        sa.Column("user_id", sa.Text()),
        sa.Column("text", sa.Text()),
        sa.Column("at_ms", sa.BigInteger()),
        sa.Column("status", sa.Text()),
        sa.Column("is_processed", sa.Boolean()),
        sa.Column("answered_by", sa.Text()),
        sa.Column("about", sa.JSON(none_as_null=True)),
        sa.PrimaryKeyConstraint("tenant", "turn_id"),
    )
    op.create_index("chat_turns_by_chat", "chat_turns", ["tenant", "chat_id", "seq"])
    op.create_table(
        "personas",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.JSON(none_as_null=True)),
        sa.Column("changed_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "name"),
    )
