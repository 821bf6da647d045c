"""A long list of pending entries in living hands."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import orjson

from pipeline import keys, scripts
from pipeline.job import PRIORITIES
from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import LEASE_S, Cluster, Layout
from tests.faults.history import read
from tests.faults.scenarios import scenario

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RATE: Final = 40.0
STAGE: Final = "llm"
ENTRIES: Final = 20_000
HANDS: Final = 4
AT_ONCE: Final = 1_000
ONE_PASS_S: Final = 0.5
"""Between the first and the last entry of one dead worker in other hands: a claim and what watching it takes."""
SETTLED_WITHIN_S: Final = 1.0
"""An heir has settled what it claimed: killed before that, its entries would rightly be taken for killers."""
CLAIM_MS: Final = 10.0


@scenario(11, jobs=900)
async def claim_behind_a_backlog(cell: Cell) -> None:
    """Kill workers behind 20,000 pending entries of living consumers.

    All that a dead one held is claimed in one pass within lease + 2 s, a claim takes Redis no more than 10 ms, and none
    of the living ones' entries is touched.
    """
    async with cell.running(Layout(latency="0.3")) as (cluster, load, nemesis), _backlog(cell):
        await cluster.redis.config_set("slowlog-max-len", 1_000_000)
        await cluster.redis.config_set("slowlog-log-slower-than", 0)  # every command
        sending = cell.background(load.run(cell.jobs, RATE))
        while not sending.done():
            for victim in cluster.of(STAGE):
                if sending.done():
                    break
                await nemesis.kill(victim)
                await cluster.until_works(victim)
                await nemesis.until_recovered()
                await asyncio.sleep(SETTLED_WITHIN_S)
        await sending
        await cluster.redis.config_set("slowlog-log-slower-than", -1)
        claims = await _claims_ms(cluster)
        cell.verdict.figures["claims"] = len(claims)
        cell.verdict.figures["slowest claim ms"] = max(claims)
        cell.expect(f"a claim takes at most {CLAIM_MS:g} ms, not {max(claims)}", max(claims) <= CLAIM_MS)
    spread_s = _longest_spread_s(cell)
    cell.verdict.figures["first to last entry claimed s"] = spread_s
    cell.expect(f"all entries of a dead worker are claimed at once, not over {spread_s} s", spread_s <= ONE_PASS_S)
    cell.require_recovery(RECOVERY_S)


@asynccontextmanager
async def _backlog(cell: Cell) -> AsyncIterator[None]:
    """Have living consumers that hold many entries, all of them in front of what comes later.

    The entries are the hands' own, and no client waits for them: in the end the hands take them away again.
    """
    cluster, stream = cell.cluster, keys.stream(STAGE)
    hands = [f"hand-{number}:{cell.rng.getrandbits(32):08x}" for number in range(HANDS)]
    stop = asyncio.Event()
    living = cell.background(_live(cluster, hands, stop))
    workers = cluster.of(STAGE)
    for worker in workers:
        worker.signal(signal.SIGSTOP)  # or they would take some of them
    for hand in hands:
        for _ in range(ENTRIES // HANDS // AT_ONCE):
            async with cluster.redis.pipeline(transaction=False) as pipe:
                for _ in range(AT_ONCE):
                    pipe.xadd(stream, {"data": orjson.dumps({"id": f"{hand}:of-no-client", "prompt": "Well?"})})
                pipe.xreadgroup(STAGE, hand, {stream: ">"}, count=AT_ONCE)
                await pipe.execute()
    for worker in workers:
        worker.signal(signal.SIGCONT)
    try:
        yield
        for hand in hands:
            rows = await cluster.redis.xpending_range(stream, STAGE, "-", "+", ENTRIES, hand)
            once = sum(row["times_delivered"] == 1 for row in rows)
            cell.require(f"{hand} holds all its entries, not {once}", once == ENTRIES // HANDS)
            for i in range(0, len(rows), AT_ONCE):
                ids = [row["message_id"] for row in rows[i : i + AT_ONCE]]
                await cluster.redis.xack(stream, STAGE, *ids)
                await cluster.redis.xdel(stream, *ids)
    finally:
        stop.set()
        await living


async def _live(cluster: Cluster, hands: list[str], stop: asyncio.Event) -> None:
    """Renew the hands' leases until told to stop; then they sign off."""
    while not stop.is_set():
        for hand in hands:
            await cluster.redis.set(keys.WORKER + hand, b"{}", px=int(LEASE_S * 1000))
        await asyncio.sleep(LEASE_S / 6)
    for hand in hands:
        await cluster.redis.delete(keys.WORKER + hand)
        for priority in PRIORITIES:
            await cluster.redis.xgroup_delconsumer(keys.stream(STAGE, priority), STAGE, hand)


async def _claims_ms(cluster: Cluster) -> list[float]:
    """Return how long each claim kept Redis busy, in milliseconds."""
    begins = f"EVALSHA {scripts.CLAIM.sha}".encode()
    log = await cluster.redis.slowlog_get(-1)
    return [line["duration"] / 1000 for line in log if line["command"].startswith(begins)]


def _longest_spread_s(cell: Cell) -> float:
    """Return the longest time between the first and the last entry of one dead worker in other hands."""
    times: dict[str, list[float]] = {}
    for line in read(cell.faults):
        if line["event"] == "recovered":
            times.setdefault(line["victim"], []).append(line["after_s"])
    return max((round(max(found) - min(found), 3) for found in times.values()), default=0.0)
