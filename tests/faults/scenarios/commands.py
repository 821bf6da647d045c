"""Connections to Redis whose callers give up."""

from __future__ import annotations

from tests.faults.cell import Cell
from tests.faults.cluster import RedisPart
from tests.faults.commands import CANCELLED_SHARE, cancelled_commands
from tests.faults.scenarios import scenario


@scenario(15, jobs=10_000, least=500, in_slice=3_000)
async def cancelled_at_random(cell: Cell) -> None:
    """10,000 Redis commands through a slow proxy, 20 % cancelled at random.

    No reply reaches the wrong caller, and no connection is left.
    """
    server = RedisPart(cell.folder, "everysec", {})
    await server.start()
    try:
        seen = await cancelled_commands(server.socket, cell.verdict.seed, cell.jobs)
    finally:
        await server.kill()
    cell.verdict.figures |= {"commands": seen.commands, "cancelled": seen.cancelled, "wrong_replies": seen.wrong}
    cell.require(f"no reply reaches the wrong caller, not {seen.wrong}", seen.wrong == 0)
    cell.require(f"no connection is left, not {seen.connections_left}", seen.connections_left == 0)
    cell.require(
        f"a fifth is cancelled, not {seen.cancelled} of {seen.commands}",
        seen.cancelled >= seen.commands * CANCELLED_SHARE,
    )
