"""Machines whose clocks are wrong."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import orjson

from pipeline import keys
from tests.faults.cell import Cell
from tests.faults.cluster import Cluster, Layout, Part
from tests.faults.history import read
from tests.faults.scenarios import scenario

RATE: Final = 40.0
OFF_S: Final = 3600.0
LIBRARIES: Final = "*/faketime/libfaketimeMT.so.1"
IN_A_HURRY: Final = 30
"""Requests whose deadline comes before any answer can."""
DEADLINE_S: Final = 1.0
EXPIRED_WITHIN_S: Final = 1.5  # after the deadline: half a second's tick of the expiry, and the clients' own look
SLOW_S: Final = 4.0
"""What an answer to these would take."""


def faketime(offset_s: float) -> list[str]:
    """Return the words before a command whose wall clock is to be *offset_s* off, its monotonic clock left alone.

    What Debian's `faketime --exclude-monotonic` would set, but the process stays the one that was started: `faketime`
    itself would remain in front of it and take its signals.

    Raises:
        RuntimeError: it is not installed.
    """
    found = sorted(Path("/usr/lib").glob(LIBRARIES))
    if not found:
        raise RuntimeError("this scenario needs Debian's package `faketime`: apt-get install faketime")
    return ["env", f"LD_PRELOAD={found[0]}", f"FAKETIME={offset_s:+g}s", "FAKETIME_DONT_FAKE_MONOTONIC=1"]


@scenario(17, jobs=600)
async def clocks_are_wrong(cell: Cell) -> None:
    """Clocks of a gateway and two workers are one hour off, ahead and behind.

    No latency is negative or longer than the test; nothing is claimed, no lease is lost, nothing expires but what has
    a short deadline, and that expires in time.
    """
    wrong = {"encoder-1": OFF_S, "llm-1": -OFF_S, "gateway-1": OFF_S}
    layout = Layout(gateways=2, wrap={name: faketime(offset_s) for name, offset_s in wrong.items()})
    cell.may_end = {"expired/deadline_exceeded"}  # those in a hurry; who else ends so is named below
    began_s = time.monotonic()
    async with cell.running(layout, fields={"timeout_s": 30}) as (cluster, load, nemesis):
        for name, offset_s in wrong.items():
            off_s = await _off_s(cluster, cluster[name])
            cell.require(f"the clock of {name} is {offset_s:+g} s off, not {off_s:+.0f}", abs(off_s - offset_s) < 60)
        await load.run(cell.jobs, RATE)
        for name in wrong:
            nemesis.note("clock", name, held=None)  # each works all the time under its wrong clock
        await load.quiet()
        await cluster.behave(latency=SLOW_S)
        hurried = {load.send("ask", timeout_s=DEADLINE_S) for _ in range(IN_A_HURRY)}
        await load.quiet()
        claimed = await cluster.metric("penstock_entries_claimed_total")
        leases_lost = await cluster.metric("penstock_worker_leases_lost_total")
    lasted_ms = (time.monotonic() - began_s) * 1000
    cell.require(f"nothing is claimed, not {claimed:g} entries", not claimed)
    cell.require(f"no worker lost its lease, not {leases_lost:g}", not leases_lost)
    shortest_ms, longest_ms = _extremes_ms(cell)
    cell.verdict.figures |= {"spans": f"{shortest_ms:g} to {longest_ms:g} ms"}
    cell.require(f"no latency is negative, not {shortest_ms} ms", shortest_ms >= 0)
    cell.require(f"no latency is longer than the test, not {longest_ms} ms", longest_ms <= lasted_ms)
    late_s = []
    for one in cell.requests():
        status = (one.outcomes or [{}])[0].get("status")
        if one.n not in hurried:
            cell.require(f"request {one.n} is completed, not {status}", status == "completed")
            continue
        cell.require(f"request {one.n} expires, not {status}", status == "expired")
        late_s.append((one.ended_s or 0.0) - one.submitted_s - DEADLINE_S)
    cell.verdict.figures["expired"] = f"{min(late_s):+.2f} to {max(late_s):+.2f} s"
    cell.require("no job expires early", min(late_s) > -0.05)
    cell.expect(f"every job expires within {EXPIRED_WITHIN_S:g} s", max(late_s) <= EXPIRED_WITHIN_S)


async def _off_s(cluster: Cluster, part: Part) -> float:
    """Return how far a process' wall clock is from ours, as it tells others."""
    if part.stage == "gateway":
        async with cluster.http.get(f"http://127.0.0.1:{cluster.ports[part.name]}/livez") as answer:
            return parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()
    async for name in cluster.redis.scan_iter(match=f"{keys.WORKER}{part.worker}:*"):
        started_ms = orjson.loads(await cluster.redis.get(name))["started_ms"]
        return float(started_ms / 1000 - time.time())
    return 0.0


def _extremes_ms(cell: Cell) -> tuple[float, float]:
    """Return the shortest and the longest span that any client was told of."""
    shortest_ms, longest_ms = [], []
    for line in read(cell.clients):
        if line["event"] == "spans":
            shortest_ms.append(min(line["spans"].values()))
            longest_ms.append(max(line["spans"].values()))
        elif line["event"] == "outcome" and "longest_ms" in line["outcome"]:
            shortest_ms.append(line["outcome"]["shortest_ms"])
            longest_ms.append(line["outcome"]["longest_ms"])
    return min(shortest_ms), max(longest_ms)
