"""Redis emptied, and consumer groups destroyed."""

from __future__ import annotations

import asyncio
import signal
from typing import Final

from pipeline import keys
from pipeline.job import PRIORITIES
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.checkers import leftovers
from tests.faults.cluster import STAGES, Cluster, Layout
from tests.faults.scenarios import scenario

RATE: Final = 60.0
AGAIN_WITHIN_S: Final = 5.0
QUIET_S: Final = 2.0
IDLE_SHARE: Final = 0.3
"""Of one core, in the seconds after the fault: a process at rest uses a twentieth, a loop without a pause all of it."""


@scenario(6, jobs=1_200, least=400)
async def empty_redis(cell: Cell) -> None:
    """Empty Redis (FLUSHALL) and destroy consumer groups, under load.

    A new question is answered within 5 s; no process runs hot. After FLUSHALL every client hears of its loss: who
    waits, 503 `job_lost`; who asks later, 404 `job_not_found`; nobody is left in silence. A destroyed group alone
    loses nothing.
    """
    cell.may_be_unknown = 0  # Redis is there all the time
    cell.least_accepted = 1.0
    # again=0: a foreign sender that repeats itself when its outcome is forgotten gets a second job, and rightly so
    async with cell.running(Layout(latency="0.3"), again=0.0) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs // 2, RATE))
        waiting: set[int] = set()
        while True:
            await asyncio.sleep(cell.rng.uniform(1.0, 2.0))
            if sending.done():
                break
            held = await cluster.held_by_workers()
            cell.may_lose.update(load.numbers)
            waiting.update(_waiting(cell))
            await cluster.redis.flushall()
            load.forget()
            nemesis.note("flushall", "redis", held=held)
            await _require_answer(cell, "FLUSHALL")
        await sending
        await _until_idle(cluster)
        await load.ask_after()
        for code in ("job_lost", "job_not_found"):
            cell.verdict.figures[f"heard {code}"] = load.lost[code]
            cell.require(f"some client heard {code}", load.lost[code] > 0)
        cell.require(f"every client heard of its job, {len(load.open)} did not", not load.open)
        silent = waiting - {one.n for one in cell.requests() if one.outcomes}
        cell.verdict.figures["waited at a FLUSHALL"] = len(waiting)
        cell.require(f"who waited heard an answer or job_lost, requests {sorted(silent)[:5]} did not", not silent)
        cell.require("somebody waited at a FLUSHALL", len(waiting) > 0)

    async with cell.running(Layout(latency="0.3")) as (cluster, load, nemesis):
        await cluster.redis.flushall()  # at rest, and of a cluster whose leftovers are looked at after other faults
        await _require_rest(cell, "FLUSHALL")
        await _require_answer(cell, "FLUSHALL at rest")
        sending = cell.background(load.run(cell.jobs // 2, RATE))
        while not sending.done():
            for stage in STAGES:
                victim = cell.rng.choice(cluster.of(stage))
                held_entries = await nemesis.freeze_at_work(victim)
                pending = await _destroy_groups(cluster, stage)
                victim.signal(signal.SIGCONT)
                # Calls under way go on, cannot be settled, and are made again.
                nemesis.note("destroy", stage, held=len(held_entries), repeats=pending if stage == "llm" else 0)
                await _require_answer(cell, f"destroying {stage}'s groups")
        await sending
        await _until_idle(cluster)
        for stage in STAGES:
            await _destroy_groups(cluster, stage)
        await _require_rest(cell, "destroying all groups")
        await _require_answer(cell, "destroying all groups")


def _waiting(cell: Cell) -> list[int]:
    """Return the requests whose clients wait for an answer on an open connection."""
    return [
        one.n
        for one in cell.requests()
        if one.kind in {"ask", "consult"} and not (one.ids or one.outcomes or one.refusals or one.is_unknown)
    ]


async def _destroy_groups(cluster: Cluster, stage: str) -> int:
    """Destroy a stage's groups; return how many entries were in hand there at that moment."""
    pending = 0
    for priority in PRIORITIES:
        stream = keys.stream(stage, priority)
        async with cluster.redis.pipeline(transaction=True) as pipe:
            summary, _ = await pipe.xpending(stream, stage).xgroup_destroy(stream, stage).execute()
        pending += int(summary["pending"])
    return pending


async def _require_answer(cell: Cell, fault: str) -> None:
    """Demand that a new question is answered in time."""
    try:
        took_s = await cell.cluster.until_answered(AGAIN_WITHIN_S)
    except TimeoutError:
        cell.expect(f"a question was answered within {AGAIN_WITHIN_S:g} s of {fault}", False)
        return
    name = f"{fault}: slowest answer s"
    cell.verdict.figures[name] = max(cell.verdict.figures.get(name, 0.0), round(took_s, 2))


async def _require_rest(cell: Cell, fault: str) -> None:
    """Demand that no process of ours uses much CPU in the seconds after a fault that met nothing to do."""
    parts = [*cell.cluster.workers, *cell.cluster.of("gateway")]
    before = {part: part.cpu_s() for part in parts}
    await asyncio.sleep(QUIET_S)
    shares = {part.name: (part.cpu_s() - before[part]) / QUIET_S for part in parts}
    busiest = max(shares, key=lambda name: shares[name])
    cell.verdict.figures[f"CPU after {fault}"] = f"{shares[busiest]:.0%} ({busiest})"
    cell.expect(f"{busiest} rests after {fault}: {shares[busiest]:.0%} of a core", shares[busiest] < IDLE_SHARE)


async def _until_idle(cluster: Cluster) -> None:
    """Wait until nothing is on its way any more."""

    async def is_idle() -> bool:
        return not (await leftovers.check(cluster.redis)).work

    await wait_until(is_idle, timeout_s=60, every_s=0.1)
