"""Processes and connections that stand still, and wake up when others have gone on without them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable
from typing import Final

from pipeline import keys
from pipeline.settings import RedisSettings
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import LEASE_S, READY_S, Cluster, Holding, Layout, Part
from tests.faults.history import read
from tests.faults.scenarios import scenario
from tests.faults.troubled import block

REFUSED: Final = "penstock_stale_writes_refused_total"
TAKEN_UP: Final = "penstock_entries_taken_up_total"
CLAIMED: Final = "penstock_entries_claimed_total"
RENEW_S: Final = min(LEASE_S / 3, 0.9)
LONG_S: Final = 2 * LEASE_S
"""Longer than a lease, the claimers' two looks, and a renewal."""
BLOCKED_S: Final = 3 * LEASE_S
"""Longer by the start of the process that takes over."""
MOST_CALLS: Final = 500
"""What Redis, two workers and the clients carry at a time while one of them is frozen."""
SETTLES_LATE_S: Final = LEASE_S / 2
ABORTED_WITHIN_S: Final = 2 * RENEW_S + RedisSettings().reconnect_cap_s
"""Two renewals after the connection is there again."""


@scenario(3, jobs=800, in_slice=500)
async def zombies(cell: Cell) -> None:
    """SIGSTOP for two leases, then SIGCONT; and an event loop that is blocked for as long.

    Whatever the thawed worker tries with entries that others took over is refused, and counted: for llm workers, and
    for an encoder that was frozen between its work and its settle.
    """
    modules = {
        "llm-2": ["tests.faults.troubled", "llm"],
        **{f"encoder-{n}": ["tests.faults.troubled", "encoder"] for n in (1, 2)},
    }
    layout = Layout(latency="1.5", modules=modules, environ={"PENSTOCK_LLM__SLOTS": "64"})
    async with cell.running(layout) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs, 40.0))
        refused = []
        while not sending.done():
            victim = cell.rng.choice(cluster.of("llm"))
            refused.append(await _refused_by(cluster, victim, nemesis.make_zombie(victim, LONG_S, least=6)))
        await sending
        await wait_until(lambda: not load.open, timeout_s=60)
        encoder = await _freeze_an_encoder(cell)
        await wait_until(lambda: not load.open, timeout_s=60)  # or its question is among what the next one holds
        blocked = await _block_its_loop(cell, cluster, cluster["llm-2"])
    cell.verdict.figures |= {
        "refused_by_zombies": refused, "refused_by_encoder": encoder, "refused_by_blocked_loop": blocked,
    }  # fmt: skip
    frozen = [(line["held"], line["lost"]) for line in read(cell.faults) if line.get("fault") == "zombie"]
    cell.require(f"others take over all that the frozen hold, not {frozen}", all(held == lost for held, lost in frozen))
    cell.require(f"every thawed worker tries and is refused, not {refused}", refused != [] and all(refused))
    cell.require("the encoder that was thawed tries and is refused", encoder > 0)
    cell.require("the worker whose loop was blocked tries and is refused", blocked > 0)
    # A call goes on while its worker is frozen, and its heir makes it again.
    cell.may_repeat = sum(line.get("lost", 0) for line in read(cell.faults))


async def _freeze_an_encoder(cell: Cell) -> int:
    """Freeze an encoder that has done its work and has not settled it yet; return how many writes were refused.

    It takes a moment for that: a question that blocks its event loop just there, for less than a lease. Without it an
    encoder has nothing in hand for longer than a read.
    """
    cluster = cell.cluster
    cell.load.send("background", suffix=f" {block('encoder', SETTLES_LATE_S)}")
    holders: list[Part] = []

    async def is_held() -> bool:
        holders[:] = [part for part in cluster.of("encoder") if await cluster.in_hand(part)]
        return bool(holders)

    await wait_until(is_held, timeout_s=READY_S, every_s=0.005)
    return await _refused_by(cluster, holders[0], cell.nemesis.make_zombie(holders[0], LONG_S))


async def _refused_by(cluster: Cluster, part: Part, harm: Awaitable[object]) -> int:
    """Return how many stale writes of *part* are refused in consequence of some harm."""
    before = await cluster.metric(REFUSED, part)
    await harm
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
    number = cell.load.send("background", suffix=f" {block('llm', BLOCKED_S)}")
    await wait_until(lambda: _holds(cluster, part, 1), timeout_s=READY_S)
    held = await cluster.in_hand(part)
    id_of = await cluster.job_ids(held)  # before its heir can have settled it
    await other.start()
    lost: list[Holding] = []
    looked_s = 0.0

    async def wait_and_look() -> None:
        nonlocal looked_s
        await asyncio.sleep(BLOCKED_S)  # it is blocked for longer, by the call before
        lost.extend(await cluster.lost(held, part))
        looked_s = time.time()

    count = await _refused_by(cluster, part, wait_and_look())
    ids = [id_of[one] for one in lost]
    what = {"lost": len(lost), "ids": ids, "looked_s": looked_s, "n": number}
    cell.nemesis.note("blocked loop", part.worker, held=len(held), **what)
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

    What others took over meanwhile it aborts within two renewals, as the replicas' records tell: the calls of just
    these jobs, and each is made once more, by the heir. What it tries all the same is refused.
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
            began_s = time.time()
            if how == "silent":
                proxy.freeze()
            else:
                proxy.refuse()
                proxy.cut()
            watching = nemesis.watch(held, part.worker)
            await asyncio.sleep(LONG_S)
            watching.cancel()
            lost = await cluster.lost(held, part)
            ids = list((await cluster.job_ids(lost)).values())
            healed_s = time.time()  # by the wall clock, as the replicas' records are
            what = {"lost": len(lost), "ids": ids, "looked_s": healed_s}
            nemesis.note(f"cut off ({how})", part.worker, held=len(held), **what)
            proxy.heal()
            cell.require(f"others took over what it held, not {len(ids)} of {len(held)}", 0 < len(ids) == len(held))
            await load.quiet()
            aborted_s = [ended_s - healed_s for ended_s in _aborted_s(cell, ids, since_s=began_s)]
            taken_s.append(round(max(aborted_s, default=0.0), 2))
            cell.require(
                f"{how}: of the {len(ids)} calls it had lost each is aborted once, not {len(aborted_s)}",
                len(aborted_s) == len(ids),
            )
            cell.require(f"{how}: it aborts nothing while it cannot know", min(aborted_s, default=0.0) >= 0)
    cell.verdict.figures["aborted_after_s"] = taken_s
    slowest_s = max(taken_s)
    cell.require(f"aborted within {ABORTED_WITHIN_S:.1f} s, not {slowest_s}", slowest_s <= ABORTED_WITHIN_S)


def _aborted_s(cell: Cell, ids: list[str], since_s: float) -> list[float]:
    """Return when calls of some jobs were aborted, as the replicas' own records have it, by the wall clock."""
    lines = [line for path in cell.cluster.records() for line in read(path)]
    return [
        line["ended_s"]
        for line in lines
        if line["request_id"] in ids and line["status"] == "aborted" and line["ended_s"] >= since_s
    ]


async def _holds(cluster: Cluster, part: Part, least: int) -> bool:
    return len(await cluster.in_hand(part)) >= least


@scenario(18, jobs=100)
async def redis_stalls(cell: Cell) -> None:
    """Redis is stalled (SIGSTOP), or dead, for two leases while 50 calls run.

    Every lease lapses at once, yet each call is made once, and nobody takes anything from anybody.
    """
    half = cell.jobs // 2
    if not 0 < half <= MOST_CALLS:
        raise ValueError(f"--jobs must be between 2 and {2 * MOST_CALLS}, not {cell.jobs}: half of them run at once")
    # Whatever replica a call falls to, it runs at once.
    at_once = {"PENSTOCK_LLM__SLOTS": f"{half}", "PENSTOCK_LLM__CONCURRENCY": f"{half}"}
    layout = Layout(latency=f"lognormal:{LONG_S:g},0.3", fsync="always", environ=at_once)
    async with cell.running(layout, {"background": 1, "prompt": 1}) as (cluster, load, nemesis):
        await cluster.behave(slots=half)
        for how in ("stalled", "killed"):
            await load.run(half, 100.0)
            await wait_until(lambda: _runs(cluster, half), timeout_s=30, every_s=0.05)
            if how == "stalled":
                cluster.server.signal(signal.SIGSTOP)
                await asyncio.sleep(LONG_S)
                cluster.server.signal(signal.SIGCONT)
            else:
                await cluster.server.kill()
                await asyncio.sleep(LONG_S)
                await cluster.server.start()
            nemesis.note(f"redis {how}", "redis", held=half)
            await load.quiet()
        claimed = await cluster.metric(CLAIMED)
    called = cell.calls()
    cell.require(f"{2 * half} calls are made, not {called.made}", called.made == 2 * half)
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
    spans_s, taken_up = [], []
    async with cell.running(layout, {"foreign": 1}) as (cluster, load, nemesis):
        part, proxy = cluster["encoder-1"], cluster.proxies["encoder-1"]
        for _ in range(cell.jobs):
            await asyncio.sleep(cell.rng.uniform(0.2, 0.8))  # somewhere within a blocked read
            number = load.sent + 1
            before = await cluster.metric(TAKEN_UP)
            proxy.half_open(containing=b"XREADGROUP")
            load.send("foreign")
            began_s = time.monotonic()
            await wait_until(lambda: _is_begun(cluster, f"foreign-{number}"), timeout_s=30, every_s=0.005)  # noqa: B023
            spans_s.append(time.monotonic() - began_s)
            nemesis.note("half-open read", part.worker, held=1)
            await wait_until(lambda: not load.open, timeout_s=30)
            taken_up.append(int(await cluster.metric(TAKEN_UP) - before))
    cell.verdict.figures |= {"worked_on_after_max_s": round(max(spans_s), 2), "taken_up": taken_up}
    cell.require(f"worked on within two renewals, not {max(spans_s):.2f} s", max(spans_s) <= 2 * RENEW_S + 0.5)
    one_each = all(count == 1 for count in taken_up)
    cell.require(f"in every round one entry is served to the dead socket and taken up, not {taken_up}", one_each)


async def _is_begun(cluster: Cluster, job_id: str) -> bool:
    """Say whether the encoder has adopted the entry: it has a live record, or its outcome already."""
    return bool(await cluster.redis.exists(keys.LIVE + job_id, keys.COMPLETION + job_id))
