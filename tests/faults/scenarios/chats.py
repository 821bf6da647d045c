"""Chats: bursts of messages in many of them, while whoever works on their runs is killed."""

from __future__ import annotations

import asyncio
from itertools import cycle
from typing import Final

import aiohttp

from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.chats import Bursts, Post
from tests.faults.cluster import Cluster, Layout
from tests.faults.history import Json
from tests.faults.scenarios import reach, scenario

STAGES: Final = ("chat", "llm")
KILLS_AT_LEAST: Final = 4
ANSWERED_WITHIN_S: Final = 300.0
"""Far below the ten minutes of a lock: what waited for one to lapse is not answered in time."""
PACE: Final = {
    "PENSTOCK_LLM__SLOTS": "4",  # so that the runs outlast some kills
    "PENSTOCK_CHATS__QUIET_MS": "200",
    "PENSTOCK_CHATS__MAX_WAIT_MS": "1000",
}


def _through(cluster: Cluster) -> Post:
    async def post(path: str, body: Json) -> tuple[int, Json]:
        try:
            async with cluster.http.post(cluster.gateway_urls[0] + path, json=body) as answer:
                return answer.status, await answer.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            return 0, {"error": {"code": type(error).__name__}}

    return post


@scenario(24, jobs=500, least=300)
async def bursts_amid_kills(cell: Cell) -> None:
    """Bursts of three messages in 500 chats at once, while workers of the stages chat and llm are killed at work.

    Every message is answered once, in order, by a reply that a replica made of just these messages. A killed run is in
    other hands within lease + 2 s, not after the ten minutes of its chat's lock. `--jobs` are chats.
    """
    layout = Layout(encoders=1, chats=2, latency="0.5", environ=PACE)
    async with cell.running(layout, {"background": 1}) as (cluster, _, nemesis):
        bursts = Bursts(_through(cluster), cluster.redis, cell.chats)
        sending = cell.background(bursts.run(cell.jobs))
        for stage in cycle(STAGES):
            if sending.done() and await bursts.are_told():
                break
            await nemesis.until_recovered(stage)  # its survivor is the heir
            victim = cell.rng.choice(cluster.of(stage))
            if await nemesis.kill(victim, spare_idle=True):
                await cluster.until_works(victim)
            await asyncio.sleep(0)
        await sending
        await reach("every message is told of", bursts.are_told, within_s=ANSWERED_WITHIN_S, every_s=0.2)
        await bursts.note_what_was_told()
    killed = [str(line["victim"]).partition("-")[0] for line in cell.faults_done() if line["fault"] == "kill"]
    cell.require(f"{KILLS_AT_LEAST} workers are killed at work, not {len(killed)}", len(killed) >= KILLS_AT_LEAST)
    for stage in STAGES:
        cell.require(f"a worker of the stage {stage} is killed at work", stage in killed)
    cell.require_recovery(RECOVERY_S)
