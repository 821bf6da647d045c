"""Replies that get lost after the command ran."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import suppress
from typing import Final

from pipeline import scripts
from pipeline.scripts import Script
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import Cluster, Layout, Part
from tests.faults.history import read
from tests.faults.scenarios import scenario

RATE: Final = 80.0
EVERY_S: Final = 0.15
LOST_AT_LEAST: Final = 20
TAKEN_UP: Final = "penstock_entries_taken_up_total"
TAKEN_UP_WITHIN_S: Final = 2.0  # two renewals: each looks after what lies in a worker's hands
LOSERS: Final = (
    ("gateway-1", scripts.SUBMIT), ("encoder-1", scripts.SETTLE), ("retriever-1", scripts.SETTLE),
    ("llm-1", scripts.SETTLE), ("llm-1", scripts.PLACE),
)  # fmt: skip
"""Who loses replies, and to which script."""


@scenario(7, jobs=1_200, least=700, in_slice=2_300)
async def lost_replies(cell: Cell) -> None:
    """A reply is lost after its command ran, on submit, on settle and on placing.

    One job, one outcome, and one call: nothing that ran runs again.
    """
    # One llm worker: of two that are woken for a job, one would place nothing.
    layout = Layout(llms=1, proxied=frozenset(name for name, _ in LOSERS))
    lost: Counter[str] = Counter()
    turns: list[tuple[str, Script]] = []
    placing: asyncio.Task[None] | None = None
    async with cell.running(layout) as (cluster, load, nemesis):

        async def note_place(part: Part, before: float) -> None:
            held = await _taken_up(cluster, part, before)
            lost[scripts.PLACE.name] += held > 0
            nemesis.note(f"lost reply to {scripts.PLACE.name}", part.worker, held=held)

        sending = cell.background(load.run(cell.jobs, RATE))
        while not sending.done():
            if not turns:
                turns = cell.rng.sample(LOSERS, len(LOSERS))
            name, script = turns.pop()
            proxy, part = cluster.proxies[name], cluster[name]
            if script is scripts.PLACE and placing is not None and not placing.done():
                continue
            before, taken_up = proxy.replies_lost, await cluster.metric(TAKEN_UP, part)
            proxy.lose_replies(script.sha.encode())
            await asyncio.sleep(EVERY_S)
            proxy.heal()  # else what nobody sent now would be lost in another turn, under another's name
            if proxy.replies_lost == before:
                continue
            if script is scripts.PLACE:
                # It may have found nothing to place; where it did, it takes up later what it was never told of.
                placing = cell.background(note_place(part, taken_up))
            else:  # it is sent for somebody's job
                lost[script.name] += 1
                nemesis.note(f"lost reply to {script.name}", part.worker, held=proxy.replies_lost - before)
        await sending
        if placing is not None:
            await placing
    cell.verdict.figures["lost replies"] = dict(lost)
    cell.require(f"at least {LOST_AT_LEAST} replies are lost, not {lost.total()}", lost.total() >= LOST_AT_LEAST)
    for name in sorted({script.name for _, script in LOSERS}):
        cell.require(f"a reply to {name} is lost", lost[name] > 0)
    cell.may_be_unknown = lost[scripts.SUBMIT.name]
    repeated = cell.calls().repeated
    cell.require(f"no job is called for twice, not {repeated}", repeated == 0)
    strangers = _strangers(cell)
    cell.require(f"no call is made for a job of nobody, not {strangers[:5]}", not strangers)


async def _taken_up(cluster: Cluster, part: Part, before: float) -> int:
    """Return how many entries a worker has found in its hands that no reply had told it of, waiting for the first."""
    found = 0.0

    async def has_some() -> bool:
        nonlocal found
        found = await cluster.metric(TAKEN_UP, part) - before
        return found > 0

    with suppress(TimeoutError):
        await wait_until(has_some, timeout_s=TAKEN_UP_WITHIN_S, every_s=0.05)
    return int(found)


def _strangers(cell: Cell) -> list[str]:
    """Return the jobs of calls that no client was told of, but for the questions of clients that heard nothing."""
    requests = cell.requests()
    told_of = {job_id for one in requests for job_id in one.ids}
    unknown = {f"Request {one.n}." for one in requests if one.is_unknown and not one.is_accepted}
    return [
        line["request_id"]
        for path in cell.cluster.records()
        for line in read(path)
        if line["request_id"] not in told_of
        and not unknown.intersection(re.findall(r"Request \d+\.", str(line.get("messages", ""))))
    ]
