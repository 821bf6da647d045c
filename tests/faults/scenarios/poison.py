"""A payload that kills whoever works on it."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from bisect import bisect
from collections.abc import Sequence
from typing import Final

import orjson

from pipeline import keys
from pipeline.settings import WorkerSettings
from tests.conftest import wait_until
from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import Cluster, Layout, Part
from tests.faults.history import Told
from tests.faults.load import Load
from tests.faults.scenarios import reach, scenario
from tests.faults.troubled import KILL

RATE: Final = 40.0
INNOCENT: Final = 15
CALM_SHARE: Final = 0.25  # of all requests: sent before there is any poison, to know the usual throughput
KEPT_THROUGHPUT: Final = 0.9
DEATHS: Final = WorkerSettings().max_deliveries
BURIED_WITHIN_S: Final = 60.0
STEP_S: Final = 0.25
WINDOW_S: Final = 5.0
"""A lease and two seconds: in each such span the others are to keep their throughput."""


@scenario(10, jobs=1_600, least=800)
async def payload_that_kills(cell: Cell) -> None:
    """A payload that kills its worker, among 15 innocent ones in the same hands.

    Only the killer is buried, after `worker.max_deliveries` deaths, and its client hears `failed`, code `poison`; the
    others are answered, and everybody else keeps 90 % of the throughput from before, in every five seconds of
    the sending. Of those who were never in the killer's company 99 % have their answer within lease + 2 s; how long its
    neighbours wait, who run one by one as suspects, is reported.
    """
    cell.may_end = {"failed/poison"}  # the killer; who else ends so is named below
    troubled = ["tests.faults.troubled", "encoder"]
    layout = Layout(modules={"encoder-1": troubled, "encoder-2": troubled})
    calm = int(cell.jobs * CALM_SHARE)
    async with cell.running(layout, again=0.0) as (cluster, load, nemesis):  # a repeated id is buried, too
        await load.run(calm, RATE)
        for part in cluster.of("encoder"):
            part.may_die = True  # whoever has the killer in hand ends by itself; how often is demanded below
        cell.background(_supervise(cluster)).set_name("the supervision of the encoders")
        sending = cell.background(load.run(cell.jobs - calm, RATE))
        await asyncio.sleep(1.0)
        killer, innocent, victim = await _poison(cluster, load)
        began_s = time.monotonic()
        held = await _questions_in_hand(cluster, victim)
        nemesis.note("poison", victim.worker, held=len(held))
        together = sum(f"Request {number}." in question for number in innocent for question in held)
        cell.require(f"{INNOCENT} innocent ones were in the killer's hands, not {together}", together == INNOCENT)
        await sending
        ended_s = time.monotonic()
        await reach("the killer is buried", lambda: _has_letters(cluster), within_s=BURIED_WITHIN_S, every_s=0.1)
        await load.quiet()
        letters = [orjson.loads(fields[b"data"]) for _, fields in await cluster.redis.xrange(keys.DEAD)]
        deaths = sum(part.generation - 1 for part in cluster.of("encoder"))
    told = {one.n: one for one in cell.requests()}
    others_s = sorted(_span_s(one) for n, one in told.items() if n > calm and n != killer and n not in innocent)
    p99_s, neighbours_s = others_s[math.ceil(len(others_s) * 0.99) - 1], max(_span_s(told[n]) for n in innocent)
    cell.verdict.figures |= {
        "p99 of the others s": round(p99_s, 2),
        "slowest neighbour s": round(neighbours_s, 2),
    }
    cell.expect(f"p99 of the others is at most {RECOVERY_S:g} s, not {p99_s:.2f}", p99_s <= RECOVERY_S)
    usual, kept = _throughputs([one for n, one in told.items() if n not in {killer, *innocent}], calm, began_s, ended_s)
    cell.verdict.figures |= {"deaths": deaths, "throughput": f"{kept:.1f}/s in the worst window (usual {usual:.1f}/s)"}
    cell.require(f"workers died {DEATHS} times, not {deaths}", deaths == DEATHS)
    buried = [(letter["reason"], letter["job_id"], letter["deliveries"] - 1) for letter in letters]
    wanted = [("poison", job_id, DEATHS) for job_id in told[killer].ids]
    cell.require(f"only the killer is buried, as {wanted}, not {buried}", buried == wanted)
    heard = {(outcome["status"], outcome.get("code")) for outcome in told[killer].outcomes}
    cell.require(f"the killer's client heard failed, poison, not {heard}", heard == {("failed", "poison")})
    failed = [n for n, one in told.items() if n != killer and (one.outcomes or [{}])[0].get("status") != "completed"]
    cell.require(f"all others are answered, but not {failed[:5]}", not failed)
    share = kept / usual if usual else 0.0
    claim = f"the others keep {KEPT_THROUGHPUT:.0%} of their throughput in any {WINDOW_S:g} s, not {share:.0%}"
    cell.require(claim, share >= KEPT_THROUGHPUT)


def _span_s(one: Told) -> float:
    return (one.ended_s or math.inf) - one.submitted_s


def _throughputs(others: Sequence[Told], calm: int, began_s: float, ended_s: float) -> tuple[float, float]:
    """Return how many of the others were answered per second in the calm, and in the worst window after the poison."""
    answered_s = sorted(one.ended_s for one in others if one.ended_s is not None)
    calm_s = [one.submitted_s for one in others if one.n <= calm]
    usual = _between(answered_s, calm_s[0], calm_s[-1]) / (calm_s[-1] - calm_s[0])
    steps = range(int((ended_s - WINDOW_S - began_s) / STEP_S) + 1)
    begins_s = [began_s + step * STEP_S for step in steps]
    return usual, min(_between(answered_s, begin_s, begin_s + WINDOW_S) for begin_s in begins_s) / WINDOW_S


def _between(instants_s: Sequence[float], from_s: float, to_s: float) -> int:
    return bisect(instants_s, to_s) - bisect(instants_s, from_s)


async def _poison(cluster: Cluster, load: Load) -> tuple[int, list[int], Part]:
    """Put a killer and its neighbours into the hands of one encoder; return their numbers, and who died of it."""
    victim, other = cluster.of("encoder")
    for part in (victim, other):
        part.signal(signal.SIGSTOP)
    try:
        # A frozen worker's blocked read is still served, with one entry: let the usual load see to that first.
        await wait_until(lambda: _has_backlog(cluster), timeout_s=2.0, every_s=0.01)
        innocent = [load.send("ask") for _ in range(INNOCENT // 2)]
        killer = load.send("ask", f" {KILL}")
        innocent += [load.send("ask") for _ in range(INNOCENT - len(innocent))]
        await wait_until(lambda: _are_there(cluster, innocent), timeout_s=2.0, every_s=0.01)
        victim.signal(signal.SIGCONT)
        await victim.wait()
    finally:
        other.signal(signal.SIGCONT)
    return killer, innocent, victim


async def _has_backlog(cluster: Cluster) -> bool:
    """Say whether an entry waits that nobody has taken: then no read is blocked any more."""
    stream = keys.stream("encoder")
    # Both at one instant: an entry that is added and handed out in between would pass for one that waits.
    async with cluster.redis.pipeline(transaction=True) as pipe:
        length, summary = await pipe.xlen(stream).xpending(stream, "encoder").execute()
    return int(length) > int(summary["pending"])


async def _are_there(cluster: Cluster, numbers: list[int]) -> bool:
    rows = await cluster.redis.xrange(keys.stream("encoder"))
    text = b"".join(fields[b"data"] for _, fields in rows)
    return all(b"Request %d." % number in text for number in numbers) and KILL.encode() in text


async def _questions_in_hand(cluster: Cluster, part: Part) -> list[str]:
    found = []
    for stream, entry_id, _ in await cluster.in_hand(part):
        found += [fields[b"data"].decode() for _, fields in await cluster.redis.xrange(stream, entry_id, entry_id)]
    return found


async def _has_letters(cluster: Cluster) -> bool:
    return bool(await cluster.redis.xlen(keys.DEAD))


async def _supervise(cluster: Cluster) -> None:
    """Start encoders again when they die, as whoever runs them would."""
    while True:
        await asyncio.sleep(0.5)
        for part in cluster.of("encoder"):
            if not part.lives:
                await part.start()
