"""Processes that end: killed, drained, killed while they drain."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Final

from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import STAGES, Cluster, Layout
from tests.faults.load import Load
from tests.faults.scenarios import scenario

RATE: Final = 75.0  # requests per second: busy, and within what two cores can do beside starting processes
DRAINS_AT_LEAST: Final = 0.95


@scenario(1, jobs=2_000, in_slice=1_500)
async def kill_one_of_each(cell: Cell) -> None:
    """`kill -9` one worker of each stage, over and over.

    Its work is in other hands within lease + 2 s.
    """
    async with cell.running(Layout(latency="0.3")) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs, RATE))
        while not sending.done():
            for stage in STAGES:
                await nemesis.until_recovered(stage)  # its survivors are the heirs
                victim = cell.rng.choice(cluster.of(stage))
                await nemesis.kill(victim, least=4 if stage == "llm" else 1)
                await cluster.until_works(victim)
        await sending
    cell.require_recovery(RECOVERY_S)


@scenario(2, jobs=2_400)
async def kill_all_workers(cell: Cell) -> None:
    """Kill all workers, start them again: the backlog drains as fast as ever.

    A backlog is drained twice by workers of the same kind: once undisturbed, once after all of them were killed at a
    third of it. From recovery on the second one runs at 95 % of the normal rate or better. The replicas' slots are the
    bottleneck, so the rate says whether places of the dead are given back, and not how busy the machine is.
    """
    slots = {"PENSTOCK_LLM__SLOTS": "3"}
    async with cell.running(Layout(latency="0.15", environ=slots), {"prompt": 1}) as (cluster, load, nemesis):
        await _stop_workers(cluster)
        half = cell.jobs // 2
        normal = await _drain(cell, cluster, load, half, None)
        await _stop_workers(cluster)

        async def kill_all() -> None:
            await asyncio.gather(*(nemesis.kill(part, again_after_s=None) for part in cluster.of("llm")))
            await asyncio.gather(*(part.start() for part in cluster.of("llm")))
            await nemesis.until_recovered()

        again = await _drain(cell, cluster, load, half, kill_all)
        for part in cluster.of("encoder", "retriever"):
            await part.start()
    share = again / normal
    cell.verdict.figures |= {"normal_per_s": round(normal, 1), "after_kill_per_s": round(again, 1)}
    cell.require(f"drains at {DRAINS_AT_LEAST:.0%} of the normal rate, not {share:.1%}", share >= DRAINS_AT_LEAST)


async def _stop_workers(cluster: Cluster) -> None:
    for part in cluster.workers:
        if part.lives:
            await part.stop()


async def _drain(cell: Cell, cluster: Cluster, load: Load, jobs: int, harm: object) -> float:
    """Pile up *jobs*, start the llm workers, do harm at a third; return the rate (1/s) over the last half."""
    done = load.answered
    for _ in range(jobs):
        load.send("prompt")
    while await cluster.live_jobs() + await cluster.redis.xlen("job:llm_in") < jobs:
        await asyncio.sleep(0.05)
    for part in cluster.of("llm"):
        await part.start()
    if harm is not None:
        await _until_answered(load, done + jobs // 3)
        await harm()  # type: ignore[operator]
    await _until_answered(load, done + jobs // 2)
    began_s, began = time.monotonic(), load.answered
    await _until_answered(load, done + jobs * 19 // 20)
    return (load.answered - began) / (time.monotonic() - began_s)


async def _until_answered(load: Load, count: int) -> None:
    while load.answered < count:
        await asyncio.sleep(0.01)


@scenario(4, jobs=1_500, in_slice=900)
async def rolling_restart(cell: Cell) -> None:
    """SIGTERM to every process in turn, under load; then SIGTERM and SIGKILL during the drain.

    A rolling restart fails nothing, loses nothing and asks no replica twice; a drain that is cut short loses nothing.
    """
    layout = Layout(latency="0.3", gateways=2)
    mix = {"keyed": 4, "foreign": 2, "prompt": 1}
    async with cell.running(layout, mix) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs * 2 // 3, RATE / 3))
        for part in [*cluster.workers, *cluster.of("gateway")]:
            code = await part.stop()
            nemesis.note("drain", part.worker, held=None)
            cell.require(f"{part.name} ends with exit code 0, not {code}", code == 0)
            await part.start()
            if part.stage in STAGES:
                await cluster.until_works(part)
            else:
                await cluster.until_ready()
        await sending
        repeated = cell.calls().repeated
        sending = cell.background(load.run(cell.jobs // 3, RATE / 2))
        for part in cluster.of("llm"):  # the others drain too fast to be killed meanwhile
            held = await nemesis.freeze_at_work(part, least=4)
            part.signal(signal.SIGCONT)
            part.signal(signal.SIGTERM)
            await asyncio.sleep(cell.rng.uniform(0.0, 0.1))
            dead = part.worker
            part.signal(signal.SIGSTOP)
            held = await cluster.in_hand(part)
            await part.kill()
            nemesis.note("kill", dead, held=len(held), during="drain")
            nemesis.watch(held, dead)
            await part.start()
            await cluster.until_works(part)
        await sending
    cell.require(f"no call is repeated by a rolling restart, not {repeated}", repeated == 0)
    failed = {status: count for status, count in cell.statuses().items() if status != "completed"}
    cell.require(f"nothing fails, not {failed}", not failed)
    cell.require_recovery(RECOVERY_S)
