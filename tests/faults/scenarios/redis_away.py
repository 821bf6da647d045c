"""Redis killed and started again."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import suppress
from typing import Final

from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import Cluster, Layout
from tests.faults.nemesis import TRY_FOR_S
from tests.faults.scenarios import scenario

RATE: Final = 60.0
AGAIN_WITHIN_S: Final = 10.0


@scenario(5, jobs=1_200)
async def kill_redis(cell: Cell) -> None:
    """Kill Redis under load and start it again, with `appendfsync always` and with `everysec`.

    With `always` nothing accepted is lost; with `everysec` what is lost is told. No process of ours is started again.
    """
    for fsync in ("always", "everysec"):
        async with cell.running(Layout(latency="0.3", fsync=fsync)) as (cluster, load, _):
            before = _lives(cluster)
            sending = cell.background(load.run(cell.jobs // 2, RATE))
            answered_s = []
            while True:
                await asyncio.sleep(cell.rng.uniform(0.5, 2.0))
                if sending.done():
                    break
                answered_s.append(await kill_at_work(cell, away_s=cell.rng.uniform(0.0, 1.5)))
            await sending
            cell.verdict.figures[f"{fsync}: answering again, p50/max s"] = (
                f"{statistics.median(answered_s):.2f}/{max(answered_s):.2f}"
            )
            cell.require(f"{fsync}: every process lived on", _lives(cluster) == before)
            if fsync != "always":
                cell.may_lose.update(load.numbers)


async def kill_at_work(cell: Cell, away_s: float) -> float:
    """Kill Redis while jobs are unfinished, start it after a while; return how long until a question was answered."""
    cluster = cell.cluster
    with suppress(TimeoutError):
        await wait_until(cluster.live_jobs, timeout_s=TRY_FOR_S)
    held = await cluster.live_jobs()
    await cluster.server.kill()
    cell.nemesis.note("kill", "redis", held=held)
    await asyncio.sleep(away_s)
    await cluster.server.start()
    return await cluster.until_answered(AGAIN_WITHIN_S)


def _lives(cluster: Cluster) -> dict[str, int]:
    """Return the living processes of ours by name, with their process ids."""
    return {part.name: part.pid for part in cluster.parts.values() if part is not cluster.server and part.lives}
