"""Redis out of memory."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from tests.conftest import wait_until
from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import Cluster, Layout
from tests.faults.scenarios import scenario

RATE: Final = 40.0
MIX: Final = {"background": 2, "keyed": 2, "ask": 1}
PADDING: Final = 7_000
"""Characters of a question: it stands in Redis, and its prompt beside it, until a replica has answered."""
ROOM: Final = 10 * 1024 * 1024
"""Bytes between what is used at first and maxmemory: the load fills nine tenths of it in about fifteen seconds."""
OVER: Final = 0.6
"""What maxmemory is then set to, of what is used: Redis refuses every command that might need more."""
SHEDS_WITHIN_S: Final = 40.0
WORKS_WITHIN_S: Final = 10.0
OVER_FOR_S: Final = 5.0


@scenario(8, jobs=900)
async def fill_redis(cell: Cell) -> None:
    """Let Redis reach its maxmemory under load.

    The gateway refuses new work (503 `overloaded`) before Redis is full. With Redis far over its limit the stages go
    on, also one that is killed and started meanwhile. With the limit lifted all that was accepted is answered.
    """
    figures = cell.verdict.figures
    layout = Layout(latency="4")  # slower than the load by far: the queue before the replicas grows
    async with cell.running(layout, MIX, padding=PADDING, fields={"timeout_s": 300}) as (cluster, load, nemesis):
        memory = await _memory(cluster)
        if not memory["mem_allocator"].startswith("jemalloc"):
            figures["allocator"] = memory["mem_allocator"]  # it knows less exactly what it uses
        limit = memory["used_memory"] + ROOM
        await cluster.redis.config_set("maxmemory", limit)
        sending = cell.background(load.run(cell.jobs, RATE))

        await wait_until(lambda: load.refused, timeout_s=SHEDS_WITHIN_S)
        share = (await _memory(cluster))["used_memory"] / limit
        nemesis.note("maxmemory", "redis", held=await cluster.live_jobs())
        figures["memory at the first refusal"] = f"{share:.0%}"
        cell.require(f"the gateway refuses before Redis is full, not at {share:.0%}", 0.85 < share < 1.0)

        limit = round((await _memory(cluster))["used_memory"] * OVER)
        await cluster.redis.config_set("maxmemory", limit)
        nemesis.note("over maxmemory", "redis", held=await cluster.live_jobs())
        before, began_s = load.answered, asyncio.get_running_loop().time()
        await nemesis.kill(cluster["llm-1"])
        try:
            async with asyncio.timeout(WORKS_WITHIN_S):
                figures["a worker started over maxmemory works after s"] = round(
                    await cluster.until_works(cluster["llm-1"]), 2
                )
        except TimeoutError:
            cell.require("a worker that is started over maxmemory works", False)
        await nemesis.until_recovered()
        await asyncio.sleep(max(0.0, OVER_FOR_S - (asyncio.get_running_loop().time() - began_s)))
        share = (await _memory(cluster))["used_memory"] / limit
        cell.require(f"Redis is over its limit to the end, not at {share:.0%}", share > 1.0)
        figures["answered over maxmemory"] = load.answered - before
        cell.require("the stages go on over maxmemory", load.answered > before)

        await cluster.behave(latency="0.05")
        await cluster.redis.config_set("maxmemory", 0)
        figures["answering again s"] = round(await cluster.until_answered(), 2)
        await sending
        figures["refused for overload"] = load.refused["overloaded"]
    cell.require_recovery(RECOVERY_S)


async def _memory(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = await cluster.redis.info("memory")
    return found
