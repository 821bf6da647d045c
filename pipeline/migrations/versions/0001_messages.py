"""The first tables: messages and batches, webhooks, queues, API keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "api_keys",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.Text()),
        sa.Column("created_ms", sa.BigInteger()),
        sa.Column("revoked_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "name"),
    )
    op.create_table(
        "batches",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("queue_id", sa.Text()),
        sa.Column("request_count", sa.BigInteger()),
        sa.Column("webhook_url", sa.Text()),
        sa.Column("webhook_event", sa.Text()),
        sa.Column("created_ms", sa.BigInteger()),
        sa.Column("status", sa.Text()),
        sa.Column("response_count", sa.BigInteger()),
        sa.Column("failed_count", sa.BigInteger()),
        sa.Column("closed_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "batch_id"),
    )
    op.create_index("batches_by_queue", "batches", ["tenant", "queue_id", "created_ms", "batch_id"])
    op.create_index("batches_by_status", "batches", ["tenant", "status", "created_ms", "batch_id"])
    op.create_index("batches_by_time", "batches", ["tenant", "created_ms", "batch_id"])
    op.create_table(
        "messages",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("batch_id", sa.Text()),
        sa.Column("queue_id", sa.Text()),
        sa.Column("position", sa.BigInteger()),
        sa.Column("prompt", sa.Text()),
        sa.Column("system_prompt", sa.Text()),
        sa.Column("model", sa.Text()),
        sa.Column("retrieve", sa.Boolean()),
        sa.Column("retry_of", sa.Text()),
        sa.Column("schedule_at_ms", sa.BigInteger()),
        sa.Column("created_ms", sa.BigInteger()),
        sa.Column("status", sa.Text()),
        sa.Column("result", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("worker", sa.Text()),
        sa.Column("replica", sa.Text()),
        sa.Column("attempts", sa.BigInteger()),
        sa.Column("timings_ms", sa.JSON(none_as_null=True)),
        sa.Column("finished_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "message_id"),
    )
    op.create_index("messages_by_batch", "messages", ["tenant", "batch_id", "position", "message_id"])
    op.create_index("messages_by_queue", "messages", ["tenant", "queue_id", "created_ms", "message_id"])
    op.create_index("messages_by_status", "messages", ["tenant", "status", "created_ms", "message_id"])
    op.create_index("messages_by_time", "messages", ["tenant", "created_ms", "message_id"])
    op.create_table(
        "queues",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("queue_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.JSON(none_as_null=True)),
        sa.Column("changed_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "queue_id"),
    )
    op.create_table(
        "webhooks",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("webhook_id", sa.Text()),
        sa.Column("queue", sa.Text()),
        sa.Column("batch_id", sa.Text()),
        sa.Column("message_id", sa.Text()),
        sa.Column("url", sa.Text()),
        sa.Column("event", sa.Text()),
        sa.Column("created_ms", sa.BigInteger()),
        sa.Column("status", sa.Text()),
        sa.Column("result", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("worker", sa.Text()),
        sa.Column("attempts", sa.BigInteger()),
        sa.Column("finished_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("tenant", "job_id"),
    )
    op.create_index("webhooks_by_webhook_id", "webhooks", ["tenant", "webhook_id", "created_ms"])
