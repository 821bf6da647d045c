"""Processes that end: killed, drained, killed while they drain."""

from __future__ import annotations

from typing import Final

from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import STAGES, Layout
from tests.faults.scenarios import scenario

RATE: Final = 60.0  # requests per second: busy, and within what two cores can do beside starting processes


@scenario(1, jobs=2_000, in_slice=1_500)
async def kill_one_of_each(cell: Cell) -> None:
    """Kill one worker of each stage, over and over.

    Its work is in other hands within lease + 2 s.
    """
    async with cell.running(Layout(latency="0.3")) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs, RATE))
        while not sending.done():
            for stage in STAGES:
                await nemesis.until_recovered(stage)  # its survivors are the heirs
                victim = cell.rng.choice(cluster.of(stage))
                await nemesis.kill(victim)
                await cluster.until_works(victim)
        await sending
    cell.require_recovery(RECOVERY_S)
