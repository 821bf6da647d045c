"""Processes and connections that stand still, and wake up when others have gone on without them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from typing import Final

from pipeline import keys
from pipeline.settings import RedisSettings
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import LEASE_S, READY_S, Cluster, Holding, Layout, Part
from tests.faults.history import Json, read
from tests.faults.proxy import Proxy
from tests.faults.scenarios import reach, scenario
from tests.faults.troubled import block

REFUSED: Final = "penstock_stale_writes_refused_total"
TAKEN_UP: Final = "penstock_entries_taken_up_total"
CLAIMED: Final = "penstock_entries_claimed_total"
RENEW_S: Final = min(LEASE_S / 3, 0.9)
LONG_S: Final = 2 * LEASE_S
"""Longer than a lease, the claimers' two looks, and a renewal."""
CALL_S: Final = 0.75 * LONG_S
"""Of those whose worker is frozen all have ended when it is thawed; its heir, who takes over after a lease or later,
still has them in hand then. So nothing but the owner check keeps the thawed worker from settling them.
"""
BLOCKED_S: Final = 3 * LEASE_S
"""Longer by the start of the process that takes over."""
MOST_CALLS: Final = 500
"""What Redis, two workers and the clients carry at a time while one of them is frozen."""
SETTLES_LATE_S: Final = LEASE_S / 2
ABORTED_WITHIN_S: Final = 0.3
"""After the first renewal that came through: less than the time to the second."""
RENEWS_WITHIN_S: Final = RENEW_S + RedisSettings().reconnect_cap_s
"""After the connection is there again: whatever was under way over it has been given up by then."""
LEFT_S: Final = 0.3
"""Of a blocked read, when its connection becomes half-open."""
LEAST_HELD: Final = 12
"""Entries of a worker that is to be cut off; some of their calls end meanwhile, some go on."""
ENDS_MEANWHILE_S: Final = 0.7 * LONG_S
"""What the quicker replica takes for an answer: more than the worker needs to get the rest into its hands, and less
than it is cut off for."""


@scenario(3, jobs=800, least=300, in_slice=300)
async def zombies(cell: Cell) -> None:
    """SIGSTOP for two leases, then SIGCONT; and an event loop that is blocked for as long.

    Whatever the thawed worker tries with entries that others took over is refused, and counted: for llm workers, and
    for an encoder that was frozen between its work and its settle.
    """
    modules = {
        "llm-2": ["tests.faults.troubled", "llm"],
        **{f"encoder-{n}": ["tests.faults.troubled", "encoder"] for n in (1, 2)},
    }
    layout = Layout(latency=f"{CALL_S:g}", modules=modules, environ={"PENSTOCK_LLM__SLOTS": "64"})
    async with cell.running(layout) as (cluster, load, nemesis):
        await cluster.behave(slots=0)  # any number: what waited for a slot would not have ended when its worker thaws
        sending = cell.background(load.run(cell.jobs, 30.0))
        refused = []
        while not sending.done():
            victim = cell.rng.choice(cluster.of("llm"))
            refused.append(await _refused_by(cluster, victim, nemesis.make_zombie(victim, LONG_S, least=6)))
        await sending
        await wait_until(lambda: not load.open, timeout_s=READY_S)
        encoder = await _freeze_an_encoder(cell)
        await wait_until(lambda: not load.open, timeout_s=READY_S)  # or its question is among what the next one holds
        blocked = await _block_its_loop(cell, cluster, cluster["llm-2"])
    cell.verdict.figures |= {
        "refused_by_zombies": refused, "refused_by_encoder": encoder, "refused_by_blocked_loop": blocked,
    }  # fmt: skip
    frozen = [(line["held"], line["lost"]) for line in read(cell.faults) if line.get("fault") == "zombie"]
    cell.require(f"others take over all that the frozen hold, not {frozen}", all(held == lost for held, lost in frozen))
    cell.require(f"every thawed worker tries and is refused, not {refused}", refused != [] and all(refused))
    cell.require("the encoder that was thawed tries and is refused", encoder > 0)
    cell.require("the worker whose loop was blocked tries and is refused", blocked > 0)


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
    cell.nemesis.note("blocked loop", part.worker, held=len(held), repeats=len(lost), **what)
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


@scenario(13, jobs=60, least=48)
async def cut_off(cell: Cell) -> None:
    """A worker alone is cut off from Redis for two leases while its process lives, then connected again.

    What others took over meanwhile it aborts on the first renewal after the gap, as the replicas' records tell: the
    calls of just these jobs, but for those that were answered meanwhile; what it tries with them is refused, and
    counted. Each call is made once more, by the heir.
    """
    # Room for all of them: otherwise another worker might hold every place.
    environ = {"PENSTOCK_LLM__SLOTS": f"{4 * cell.jobs}"}
    layout = Layout(latency=f"{3 * LEASE_S:g}", proxied=frozenset({"llm-1"}), environ=environ)
    async with cell.running(layout, {"background": 1, "prompt": 1}) as (cluster, load, _):
        await cluster.behave(slots=4 * cell.jobs)
        for how in ("silent", "refused"):
            # Balancing has measured nothing yet, or would give all calls to the quicker one.
            await cluster.behave("replica-1", latency=ENDS_MEANWHILE_S if how == "silent" else 3 * LEASE_S)
            await load.run(cell.jobs // 2, 40.0)
            await _cut_off(cell, how)


async def _cut_off(cell: Cell, how: str) -> None:
    """Cut off the first llm worker with work in hand, heal it, and demand what its calls come to."""
    cluster, load, nemesis = cell.cluster, cell.load, cell.nemesis
    part, proxy = cluster["llm-1"], cluster.proxies["llm-1"]
    give_up_s = time.monotonic() + READY_S
    while not await _holds(cluster, part, LEAST_HELD):
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"not within {READY_S:g} s: {part.name} holds {LEAST_HELD} entries")
        load.send("prompt")
        await asyncio.sleep(0.1)
    if how == "silent":
        proxy.freeze()
    else:
        proxy.refuse()
        proxy.cut()
    held = await cluster.in_hand(part)  # now: nothing more can come into its hands
    refused = await cluster.metric(REFUSED, part)
    watching = nemesis.watch(held, part.worker)
    id_of = await cluster.job_ids(held)
    await asyncio.sleep(LONG_S)
    watching.cancel()
    lost = await cluster.lost(held, part)
    ids = [id_of[one] for one in lost if one in id_of]
    healed_s = time.time()  # by the wall clock, as the replicas' records are
    what = {"lost": len(lost), "ids": ids, "looked_s": healed_s}
    nemesis.note(f"cut off ({how})", part.worker, held=len(held), repeats=len(lost), **what)
    cell.require(f"{how}: it has no lease any more", not await cluster.has_lease(part))
    proxy.heal()
    await reach(f"{part.name} has its lease again", lambda: cluster.has_lease(part), within_s=READY_S, every_s=0.005)
    renewed_s = time.time()
    cell.require(f"{how}: others took over what it held, not {len(ids)} of {len(held)}", 0 < len(ids) == len(held))
    await load.quiet()
    refused = await cluster.metric(REFUSED, part) - refused
    _judge_calls(cell, how, ids, refused, healed_s, renewed_s)


def _judge_calls(cell: Cell, how: str, ids: list[str], refused: float, healed_s: float, renewed_s: float) -> None:
    """Demand that the calls of lost entries were aborted, or in vain, and each made once more, as the records tell."""
    calls: dict[str, list[Json]] = {job_id: [] for job_id in ids}
    for path in cell.cluster.records():
        for line in read(path):
            if line["request_id"] in calls:
                calls[line["request_id"]].append(line)
    aborted_s = [line["ended_s"] for some in calls.values() for line in some if line["status"] == "aborted"]
    in_vain = sum(sum(line["status"] == "completed" for line in some) == 2 for some in calls.values())
    after_s = [ended_s - renewed_s for ended_s in aborted_s]
    cell.verdict.figures[f"cut off ({how})"] = (
        f"renewed after {renewed_s - healed_s:.2f} s, {len(aborted_s)} aborted "
        f"{max(after_s, default=0.0):+.2f} s later, {in_vain} answered in vain, {refused:g} refused"
    )
    made = sorted({len(some) for some in calls.values()})
    cell.require(f"{how}: each of the {len(ids)} calls is made once more, not {made} times in all", made == [2])
    heirs = {
        str(one.outcomes[0].get("worker")).partition(".")[0] for one in cell.requests() if calls.keys() & set(one.ids)
    }
    cell.require(f"{how}: the heir has answered, not {sorted(heirs)}", heirs == {"llm-2"})
    cell.require(f"{how}: it aborts what goes on, not {len(aborted_s)}", len(aborted_s) == len(ids) - in_vain > 0)
    cell.require(f"{how}: it aborts nothing while it cannot know", min(aborted_s, default=healed_s) >= healed_s)
    claim = f"{how}: it renews within {RENEWS_WITHIN_S:.1f} s, not {renewed_s - healed_s:.2f}"
    cell.expect(claim, renewed_s - healed_s <= RENEWS_WITHIN_S)
    claim = f"{how}: aborted within {ABORTED_WITHIN_S:g} s of the first renewal, not {max(after_s, default=0.0):.2f}"
    cell.expect(claim, max(after_s, default=0.0) <= ABORTED_WITHIN_S)
    cell.require(f"{how}: the {in_vain} answers that came too late are refused, not {refused:g}", refused == in_vain)
    cell.require("some answers came while it was cut off", how != "silent" or in_vain > 0)


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
            await reach(f"{half} calls run at once", lambda: _run(cluster, half), within_s=READY_S)
            held = await cluster.held_by_workers()
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
    cell.may_be_unknown, cell.least_accepted = 0, 1.0  # nobody sends while Redis is away
    called = cell.calls()
    cell.require(f"{2 * half} calls are made, not {called.made}", called.made == 2 * half)
    cell.require(f"nothing is claimed, not {claimed:g}", claimed == 0)


async def _run(cluster: Cluster, count: int) -> bool:
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
            number = load.sent + 1
            before = await cluster.metric(TAKEN_UP)
            await _kill_a_blocked_read(cell, cluster, proxy)
            load.send("foreign")
            began_s = time.monotonic()
            is_held = partial(_holds, cluster, part, 1)
            with suppress(TimeoutError):
                await wait_until(is_held, timeout_s=RENEW_S, every_s=0.001)
            nemesis.note("half-open read", part.worker, held=len(await cluster.in_hand(part)))
            is_begun = partial(_is_begun, cluster, f"foreign-{number}")
            await reach("the entry is worked on", is_begun, within_s=READY_S, every_s=0.005)
            spans_s.append(time.monotonic() - began_s)
            await reach("its client has heard", lambda: not load.open, within_s=READY_S)
            taken_up.append(int(await cluster.metric(TAKEN_UP) - before))
    cell.verdict.figures |= {"worked_on_after_max_s": round(max(spans_s), 2), "taken_up": taken_up}
    cell.expect(f"worked on within two renewals, not {max(spans_s):.2f} s", max(spans_s) <= 2 * RENEW_S + 0.5)
    one_each = all(count == 1 for count in taken_up)
    cell.require(f"in every round one entry is served to the dead socket and taken up, not {taken_up}", one_each)


async def _kill_a_blocked_read(cell: Cell, cluster: Cluster, proxy: Proxy) -> None:
    """Make a connection half-open on which Redis has just blocked a reader, so that the next entry goes there."""
    give_up_s = time.monotonic() + READY_S
    while time.monotonic() < give_up_s:
        await asyncio.sleep(cell.rng.uniform(0.1, 0.5))  # somewhere within a read
        if reader := await _blocked_reader(cluster):
            dead = proxy.half_open(containing=b"XREADGROUP")
            if dead and await _blocked_reader(cluster) == reader:
                return
    raise TimeoutError(f"not within {READY_S:g} s: a read of the encoder blocks in Redis")


async def _blocked_reader(cluster: Cluster) -> int:
    """Return the id of the connection on which Redis blocks the encoder's read, with time left; 0 without any."""
    if time.time() % 1 > 1 - LEFT_S:
        return 0
    for client in await cluster.redis.client_list():
        # Idle for 0 s: the read began within this second of the wall clock, and lasts for a whole one.
        if client["name"] == "encoder-reader" and "b" in client["flags"] and int(client["idle"]) == 0:
            return int(client["id"])
    return 0


async def _is_begun(cluster: Cluster, job_id: str) -> bool:
    """Say whether the encoder has adopted the entry: it has a live record, or its outcome already."""
    return bool(await cluster.redis.exists(keys.LIVE + job_id, keys.COMPLETION + job_id))
