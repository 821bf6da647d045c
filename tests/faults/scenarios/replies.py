"""Replies that get lost after the command ran."""

from __future__ import annotations

import asyncio
from typing import Final

from pipeline import scripts
from tests.faults.cell import Cell
from tests.faults.cluster import Layout
from tests.faults.scenarios import scenario

EVERY_S: Final = 0.15
LOSERS: Final = {
    "gateway-1": scripts.SUBMIT, "encoder-1": scripts.SETTLE, "retriever-1": scripts.SETTLE, "llm-1": scripts.SETTLE,
    "llm-2": scripts.PLACE,
}  # fmt: skip
"""Who loses replies, and to which script."""


@scenario(7, jobs=1_200, in_slice=800)
async def lost_replies(cell: Cell) -> None:
    """A reply is lost after its command ran, on submit, on settle and on placing.

    One job, one outcome, and one call: nothing that ran runs again.
    """
    layout = Layout(proxied=frozenset(LOSERS))
    async with cell.running(layout) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs, 80.0))
        while not sending.done():
            name, script = cell.rng.choice(list(LOSERS.items()))
            proxy = cluster.proxies[name]
            before = proxy.replies_lost
            proxy.lose_replies(script.sha.encode())
            await asyncio.sleep(EVERY_S)
            if proxy.replies_lost > before:
                nemesis.note(f"lost reply to {script.name}", cluster[name].worker, held=1)
        await sending
    called = cell.calls()
    cell.require(f"no job is called for twice, not {called.repeated}", called.repeated == 0)
    unknown = sum(told.is_unknown and not told.is_accepted for told in cell.requests())
    cell.require(f"{called.strangers} calls for jobs of nobody, {unknown} unknown", called.strangers <= unknown)
