"""Redis out of memory."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any, Final

from tests.conftest import wait_until
from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import Cluster, Layout
from tests.faults.scenarios import reach, scenario

RATE: Final = 40.0
MIX: Final = {"background": 2, "keyed": 2, "ask": 1}
PADDING: Final = 7_000
"""Characters of a question: it stands in Redis until a replica has answered."""
ROOM: Final = 9 * 512 * 1024
"""Bytes between what is used at first and maxmemory: the load fills nine tenths of it in about fifteen seconds."""
OVER: Final = 0.6
"""What maxmemory is then set to, of what an idle Redis used: it refuses to the end what might need more."""
SHEDS_WITHIN_S: Final = 40.0
ACCEPTED_AT_LEAST: Final = 0.5
WORKS_WITHIN_S: Final = 10.0
DRAINS_WITHIN_S: Final = 40.0


@scenario(8, jobs=900, least=900)
async def fill_redis(cell: Cell) -> None:
    """Let Redis reach its maxmemory under load.

    The gateway refuses new work (503 `overloaded`) before Redis is full. With Redis far over its limit the stages go
    on, also one that is killed and started meanwhile, until everything that was accepted is answered. With the limit
    lifted new work is taken again.
    """
    figures = cell.verdict.figures
    cell.may_refuse = {"overloaded"}
    cell.may_be_unknown = 0  # Redis is there all the time
    cell.least_accepted = ACCEPTED_AT_LEAST
    layout = Layout(latency="4")  # slower than the load by far: the queue before the replicas grows
    async with cell.running(layout, MIX, padding=PADDING, fields={"timeout_s": 300}) as (cluster, load, nemesis):
        memory = await _memory(cluster)
        figures["server"] = await _trusted_server(cluster, memory)
        far_below = round(memory["used_memory"] * OVER)
        limit = memory["used_memory"] + ROOM
        await cluster.redis.config_set("maxmemory", limit)
        sending = cell.background(load.run(cell.jobs, RATE))

        is_shedding = partial(load.refused.__getitem__, "overloaded")
        await reach("a client is refused for overload", is_shedding, within_s=SHEDS_WITHIN_S, every_s=0.01)
        share = (await _memory(cluster))["used_memory"] / limit
        nemesis.note("maxmemory", "redis", held=await cluster.held_by_workers())
        figures["memory at the first refusal"] = f"{share:.0%}"
        cell.require(f"the gateway refuses before Redis is full, not at {share:.0%}", 0.85 < share < 1.0)

        await cluster.redis.config_set("maxmemory", far_below)
        accepted, before = load.open, load.answered
        nemesis.note("over maxmemory", "redis", held=await cluster.held_by_workers())
        await nemesis.kill(cluster["llm-1"])
        try:
            async with asyncio.timeout(WORKS_WITHIN_S):
                figures["a worker started over maxmemory works after s"] = round(
                    await cluster.until_works(cluster["llm-1"]), 2
                )
        except TimeoutError:
            cell.require("a worker that is started over maxmemory works", False)
        await nemesis.until_recovered()
        await cluster.behave(latency="0.05")

        async def is_drained() -> bool:
            return not accepted & load.open and not await cluster.live_jobs()

        with suppress(TimeoutError):
            await wait_until(is_drained, timeout_s=DRAINS_WITHIN_S, every_s=0.05)
        figures["answered over maxmemory"] = load.answered - before
        left = len(accepted & load.open)
        cell.require(f"all {len(accepted)} that were accepted are answered over maxmemory, {left} are not", not left)
        cell.require("some were accepted by then", len(accepted) > 0)
        share = (await _memory(cluster))["used_memory"] / far_below
        cell.require(f"Redis is over its limit to the end, not at {share:.0%}", share > 1.0)

        await cluster.redis.config_set("maxmemory", 0)
        figures["answering again s"] = round(await cluster.until_answered(), 2)
        await sending
        figures["refused for overload"] = load.refused["overloaded"]
    cell.require_recovery(RECOVERY_S)


async def _trusted_server(cluster: Cluster, memory: dict[str, Any]) -> str:
    """Return the server's name and version.

    Raises:
        RuntimeError: it is not Debian's `redis-server`, or it cannot count what it uses: its maxmemory means little.
    """
    info = await cluster.redis.info("server")
    name = f"{info.get('server_name', 'redis')} {info['redis_version']}, {memory['mem_allocator']}"
    if info.get("server_name", "redis") != "redis" or not memory["mem_allocator"].startswith("jemalloc"):
        raise RuntimeError(f"this scenario needs Debian's redis-server with jemalloc (TEST_SERVER=redis), not {name}")
    return name


async def _memory(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = await cluster.redis.info("memory")
    return found
