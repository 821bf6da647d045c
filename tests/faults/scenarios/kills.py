"""Processes that end: killed, drained, killed while they drain."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from pipeline import keys
from tests.conftest import wait_until
from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import READY_S, STAGES, Cluster, Layout, Part
from tests.faults.history import read
from tests.faults.load import Load
from tests.faults.scenarios import scenario

RATE: Final = 75.0  # requests per second: busy, and within what two cores can do beside starting processes
DRAINS_AT_LEAST: Final = 0.95
MEASURED_AT_LEAST: Final = 200
"""Answers from which a rate is taken: four seconds' worth."""
ACCEPTED_AT_LEAST: Final = 0.98
QUESTIONS_EACH: Final = 4
"""For every encoder and retriever, so that none is left without one."""


@scenario(1, jobs=2_000, least=300, in_slice=1_500)
async def kill_one_of_each(cell: Cell) -> None:
    """`kill -9` one worker of each stage, over and over.

    Its work is in other hands within lease + 2 s.
    """
    async with cell.running(Layout(latency="0.3")) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs, RATE))
        while not sending.done():
            for stage in STAGES:
                await nemesis.until_recovered(stage)  # its survivors are the heirs
                if sending.done():
                    break
                victim = cell.rng.choice(cluster.of(stage))
                await nemesis.kill(victim, least=4 if stage == "llm" else 1)
                await cluster.until_works(victim)
        await sending
    cell.require_recovery(RECOVERY_S)


@scenario(2, jobs=2_400, least=1_000)
async def kill_all_workers(cell: Cell) -> None:
    """Kill all workers, start them again: the backlog drains as fast as ever.

    A backlog is drained twice: once undisturbed, once after all workers of all stages were killed at a third of it,
    each with work in hand. From recovery on the second one runs at 95 % of the normal rate or better. The replicas'
    slots are the bottleneck, so the rate says whether places of the dead are given back, and not how busy the machine
    is.
    """
    slots = {"PENSTOCK_LLM__SLOTS": "3"}
    async with cell.running(Layout(latency="0.15", environ=slots), {"prompt": 1}) as (cluster, load, nemesis):
        await _stop_workers(cluster)
        half = cell.jobs // 2
        normal = await _drain(cluster, load, half, None)
        await _stop_workers(cluster)

        async def kill_all() -> None:
            await _hand_out(cluster, load)
            await asyncio.gather(*(nemesis.kill(part, again_after_s=None) for part in cluster.workers))
            await asyncio.gather(*(part.start() for part in cluster.workers))
            await nemesis.until_recovered()

        again = await _drain(cluster, load, half, kill_all)
    cell.require(f"all {len(cluster.workers)} workers had work in hand when they were killed", _hits(cell) == 1.0)
    if normal is None or again is None:
        cell.require(f"{cell.jobs} requests are enough to measure a rate: 2,400 are", False)
        return
    share = again / normal
    cell.verdict.figures |= {"normal_per_s": round(normal, 1), "after_kill_per_s": round(again, 1)}
    cell.expect(f"drains at {DRAINS_AT_LEAST:.0%} of the normal rate, not {share:.1%}", share >= DRAINS_AT_LEAST)


async def _stop_workers(cluster: Cluster) -> None:
    for part in cluster.workers:
        if part.lives:
            await part.stop()


async def _hand_out(cluster: Cluster, load: Load) -> None:
    """Freeze encoders and retrievers, each with a question in hand: a read that blocks is served all the same."""
    for stage in ("retriever", "encoder"):
        parts = cluster.of(stage)
        for part in parts:
            part.signal(signal.SIGSTOP)
        for _ in range(QUESTIONS_EACH * len(parts)):
            load.send("background")
        await wait_until(lambda parts=parts: _have_work(cluster, parts), timeout_s=READY_S, every_s=0.02)  # type: ignore[misc]


async def _have_work(cluster: Cluster, parts: Sequence[Part]) -> bool:
    return all([await cluster.in_hand(part) for part in parts])


def _hits(cell: Cell) -> float:
    """Return the share of kills that met work in hand."""
    held = [line["held"] > 0 for line in read(cell.faults) if line.get("fault") == "kill"]
    return sum(held) / len(held) if held else 0.0


async def _drain(cluster: Cluster, load: Load, jobs: int, harm: Callable[[], Awaitable[None]] | None) -> float | None:
    """Pile up *jobs*, start all workers, do harm at a third; return the rate (1/s) over the last half.

    None when too few were left by then to measure it.
    """
    done = load.answered
    for _ in range(jobs):
        load.send("prompt")
    while await cluster.redis.xlen(keys.stream("llm")) < jobs:
        await asyncio.sleep(0.05)
    await asyncio.gather(*(part.start() for part in cluster.workers))
    if harm is not None:
        await _until_answered(load, done + jobs // 3)
        await harm()
    await _until_answered(load, done + jobs // 2)
    began_s, began = time.monotonic(), load.answered
    end = done + jobs * 19 // 20
    if end - began < MEASURED_AT_LEAST:
        return None
    await _until_answered(load, end)
    return (load.answered - began) / (time.monotonic() - began_s)


async def _until_answered(load: Load, count: int) -> None:
    while load.answered < count:
        await asyncio.sleep(0.01)


@scenario(4, jobs=1_500, least=600)
async def rolling_restart(cell: Cell) -> None:
    """SIGTERM to every process in turn, under load; then SIGTERM and SIGKILL during the drain.

    A rolling restart fails nothing, loses nothing and asks no replica twice; a drain that is cut short loses nothing.
    Of clients that do not send again a few may not know whether they were accepted: those whose connection, idle
    until then, was closed by a gateway that ends at the moment they used it.
    """
    layout = Layout(latency="0.3", gateways=2)
    mix = {"ask": 3, "background": 3, "keyed": 3, "foreign": 2, "prompt": 1}
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
        sending = cell.background(load.run(cell.jobs - load.sent, RATE / 2))
        for part in cluster.of("llm"):  # the others drain too fast to be killed meanwhile
            await nemesis.freeze_at_work(part, least=4)
            part.signal(signal.SIGCONT)
            part.signal(signal.SIGTERM)
            await asyncio.sleep(cell.rng.uniform(0.0, 0.1))
            dead = part.worker
            part.signal(signal.SIGSTOP)
            held = await cluster.in_hand(part)
            await part.kill()
            nemesis.note("kill", dead, held=len(held), repeats=len(held), during="drain")
            nemesis.watch(held, dead)
            await part.start()
            await cluster.until_works(part)
        await sending
    cell.require(f"no call is repeated by a rolling restart, not {repeated}", repeated == 0)
    failed = {status: count for status, count in cell.statuses().items() if status != "completed"}
    cell.require(f"nothing fails, not {failed}", not failed)
    accepted = sum(told.is_accepted for told in cell.requests())
    cell.may_be_unknown = cell.jobs - math.ceil(cell.jobs * ACCEPTED_AT_LEAST)
    claim = f"{ACCEPTED_AT_LEAST:.0%} of {cell.jobs} requests are accepted, not {accepted}"
    cell.require(claim, accepted >= cell.jobs - cell.may_be_unknown)
    cell.require_recovery(RECOVERY_S)
