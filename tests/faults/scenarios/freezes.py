"""Processes and connections that stand still, and wake up when others have gone on without them."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Final

from pipeline import keys
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import LEASE_S, READY_S, Cluster, Layout, Part
from tests.faults.scenarios import scenario

REFUSED: Final = "penstock_stale_writes_refused_total"
ABORTED: Final = "penstock_handlers_aborted_total"
CLAIMED: Final = "penstock_entries_claimed_total"
RENEW_S: Final = min(LEASE_S / 3, 0.9)
LONG_S: Final = 2 * LEASE_S
"""Longer than a lease, the claimers' two looks, and a renewal."""
BLOCKED_S: Final = 3 * LEASE_S
"""Longer by the start of the process that takes over."""


@scenario(3, jobs=800, in_slice=500)
async def zombies(cell: Cell) -> None:
    """SIGSTOP for two leases, then SIGCONT; and an event loop that is blocked for as long.

    Whatever the thawed worker tries with entries that others took over is refused, and counted.
    """
    troubled = {"llm-2": ["tests.faults.troubled", "llm"]}
    layout = Layout(latency="1.5", modules=troubled, environ={"PENSTOCK_LLM__SLOTS": "64"})
    async with cell.running(layout) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs, 40.0))
        refused = []
        while not sending.done():
            victim = cell.rng.choice(cluster.of("llm"))
            refused.append(await _refused_by(cluster, victim, nemesis.make_zombie(victim, LONG_S, least=6)))
        await sending
        blocked = await _block_its_loop(cell, cluster, cluster["llm-2"])
    cell.verdict.figures |= {"refused_by_zombies": refused, "refused_by_blocked_loop": blocked}
    cell.require(f"every thawed worker tries and is refused, not {refused}", all(count > 0 for count in refused))
    cell.require("the worker whose loop was blocked tries and is refused", blocked > 0)


async def _refused_by(cluster: Cluster, part: Part, harm: object) -> int:
    """Return how many stale writes of *part* are refused in consequence of some harm."""
    before = await cluster.metric(REFUSED, part)
    await harm  # type: ignore[misc]  # an awaitable of whatever result
    give_up_s = time.monotonic() + 2 * LEASE_S
    while time.monotonic() < give_up_s:
        if after := await cluster.metric(REFUSED, part) - before:
            return int(after)
        await asyncio.sleep(0.1)
    return 0


async def _block_its_loop(cell: Cell, cluster: Cluster, part: Part) -> int:
    """Have a question block the event loop of the one llm worker left; let a new one take over; return the refusals."""
    other = cluster["llm-1"]
    await other.stop()
    number = cell.load.send("background", suffix=f" BLOCK-FOR {BLOCKED_S:g}")
    await wait_until(lambda: _holds(cluster, part, 1), timeout_s=READY_S)
    await other.start()
    count = await _refused_by(cluster, part, asyncio.sleep(BLOCKED_S))
    cell.nemesis.note("blocked loop", part.worker, held=1, n=number)
    return count


@scenario(12, jobs=40)
async def longer_than_a_lease(cell: Cell) -> None:
    """A job that runs three times longer than the lease runs once.

    Each of many such calls is made once, and none is claimed by anybody.
    """
    async with cell.running(Layout(latency=f"{3 * LEASE_S:g}"), {"background": 1, "prompt": 1}) as (cluster, load, _):
        await load.run(cell.jobs, 20.0)
        await load.quiet()
        claimed = await cluster.metric(CLAIMED)
        lost = await cluster.metric("penstock_worker_leases_lost_total")
    made = cell.calls().made
    cell.require(f"{cell.jobs} calls are made, not {made}", made == cell.jobs)
    cell.require(f"nothing is claimed, not {claimed:g}; no lease is lost, not {lost:g}", claimed == lost == 0)


@scenario(13, jobs=60)
async def cut_off(cell: Cell) -> None:
    """A worker alone is cut off from Redis for two leases while its process lives, then connected again.

    What others took over meanwhile it aborts within its next renewals; what it tries all the same is refused.
    """
    layout = Layout(latency=f"{3 * LEASE_S:g}", proxied=frozenset({"llm-1"}))
    async with cell.running(layout, {"background": 1, "prompt": 1}) as (cluster, load, nemesis):
        part, proxy = cluster["llm-1"], cluster.proxies["llm-1"]
        taken_s = []
        for how in ("silent", "refused"):
            sending = cell.background(load.run(cell.jobs // 2, 40.0))
            await sending
            await wait_until(lambda: _holds(cluster, part, 6), timeout_s=30, every_s=0.05)
            held = await cluster.in_hand(part)
            aborted = await cluster.metric(ABORTED, part)
            if how == "silent":
                proxy.freeze()
            else:
                proxy.refuse()
                proxy.cut()
            nemesis.watch(held, part.worker)
            await asyncio.sleep(LONG_S)
            lost = [entry for entry in held if await cluster.owner(*entry) != part.worker]
            ids = await cluster.job_ids(lost)
            nemesis.note(f"cut off ({how})", part.worker, held=len(held), lost=len(lost), ids=ids)
            proxy.heal()
            healed_s = time.monotonic()
            cell.require("others took over what it held", len(lost) > 0)
            least = aborted + len(lost)
            await wait_until(lambda: _has_aborted(cluster, part, least), timeout_s=3 * LEASE_S, every_s=0.02)  # noqa: B023
            taken_s.append(round(time.monotonic() - healed_s, 2))
            await load.quiet()
    cell.verdict.figures["aborted_after_s"] = taken_s
    aborted_calls = cell.calls().aborted
    cell.require(f"the replicas saw calls aborted, {aborted_calls}", aborted_calls > 0)


async def _holds(cluster: Cluster, part: Part, least: int) -> bool:
    return len(await cluster.in_hand(part)) >= least


async def _has_aborted(cluster: Cluster, part: Part, least: float) -> bool:
    return await cluster.metric(ABORTED, part) >= least


@scenario(18, jobs=100)
async def redis_stalls(cell: Cell) -> None:
    """Redis is stalled (SIGSTOP), or dead, for two leases while 50 calls run.

    Every lease lapses at once, yet each call is made once, and nobody takes anything from anybody.
    """
    layout = Layout(latency=f"lognormal:{LONG_S:g},0.3", fsync="always", environ={"PENSTOCK_LLM__SLOTS": "32"})
    async with cell.running(layout, {"background": 1, "prompt": 1}) as (cluster, load, nemesis):
        for how in ("stalled", "killed"):
            await load.run(cell.jobs // 2, 100.0)
            await wait_until(lambda: _runs(cluster, cell.jobs // 2), timeout_s=30, every_s=0.05)
            held = cell.jobs // 2
            if how == "stalled":
                cluster.server.signal(signal.SIGSTOP)
                await asyncio.sleep(LONG_S)
                cluster.server.signal(signal.SIGCONT)
            else:
                await cluster.server.kill()
                await asyncio.sleep(LONG_S)
                await cluster.server.start()
            nemesis.note(f"redis {how}", "redis", held=held)
            await load.quiet()
        claimed = await cluster.metric(CLAIMED)
    called = cell.calls()
    cell.require(f"{cell.jobs} calls are made, not {called.made}", called.made == cell.jobs)
    cell.require(f"nothing is claimed, not {claimed:g}", claimed == 0)


async def _runs(cluster: Cluster, count: int) -> bool:
    running = [await cluster.redis.zcard(keys.RUNNING + url) for url in cluster.replica_urls]
    return bool(sum(running) >= count)


@scenario(19, jobs=12)
async def half_open(cell: Cell) -> None:
    """A connection is half-open while a consumer's read blocks on it.

    The entry given to the dead socket is worked on within two renewals.
    """
    layout = Layout(encoders=1, proxied=frozenset({"encoder-1"}))
    spans_s = []
    async with cell.running(layout, {"foreign": 1}) as (cluster, load, nemesis):
        part, proxy = cluster["encoder-1"], cluster.proxies["encoder-1"]
        for _ in range(cell.jobs):
            await asyncio.sleep(cell.rng.uniform(0.2, 0.8))  # somewhere within a blocked read
            number = load.sent + 1
            proxy.half_open(containing=b"XREADGROUP")
            load.send("foreign")
            began_s = time.monotonic()
            await wait_until(lambda: _is_begun(cluster, f"foreign-{number}"), timeout_s=30, every_s=0.005)  # noqa: B023
            spans_s.append(time.monotonic() - began_s)
            nemesis.note("half-open read", part.worker, held=1)
            await wait_until(lambda: not load.open, timeout_s=30)
        taken_up = await cluster.metric("penstock_entries_taken_up_total")
    cell.verdict.figures |= {"worked_on_after_max_s": round(max(spans_s), 2), "taken_up": taken_up}
    cell.require(f"worked on within two renewals, not {max(spans_s):.2f} s", max(spans_s) <= 2 * RENEW_S + 0.5)
    cell.require("entries were served to dead sockets", taken_up > 0)


async def _is_begun(cluster: Cluster, job_id: str) -> bool:
    """Say whether the encoder has adopted the entry: it has a live record, or its outcome already."""
    return bool(await cluster.redis.exists(keys.LIVE + job_id, keys.COMPLETION + job_id))
