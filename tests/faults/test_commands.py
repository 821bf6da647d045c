"""Calls that are cancelled anywhere on their way over a slow network harm nobody else."""

from __future__ import annotations

from pipeline.connection import Link
from tests.faults.commands import CANCELLED_SHARE, cancelled_commands
from tests.servers import RedisServer


async def test_every_reply_reaches_its_caller_while_others_cancel(link: Link, redis_server: RedisServer) -> None:
    """Two thousand commands over twenty shared links: no reply goes astray, no connection is left open."""
    came = await cancelled_commands(redis_server.socket, seed=15, commands=2_000)
    assert came.wrong == 0
    assert came.connections_left == 0
    assert came.answered + came.cancelled == came.commands == 2_000
    assert came.cancelled > 0.5 * CANCELLED_SHARE * came.commands  # else it says little
