"""A payload that kills whoever works on it."""

from __future__ import annotations

import asyncio
import math
import signal
from typing import Final

import orjson

from pipeline import keys
from pipeline.settings import WorkerSettings
from tests.conftest import wait_until
from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import Cluster, Layout, Part
from tests.faults.history import Told
from tests.faults.load import Load
from tests.faults.scenarios import scenario
from tests.faults.troubled import KILL

RATE: Final = 40.0
INNOCENT: Final = 15
CALM_SHARE: Final = 0.25  # of all requests: sent before there is any poison, to know the usual throughput
KEPT_THROUGHPUT: Final = 0.9
DEATHS: Final = WorkerSettings().max_deliveries
BURIED_WITHIN_S: Final = 60.0
WINDOW_S: Final = 2.0


@scenario(10, jobs=1_600)
async def payload_that_kills(cell: Cell) -> None:
    """A payload that kills its worker, among 15 innocent ones in the same hands.

    Only the killer is buried, after `worker.max_deliveries` deaths, and its client hears `failed`, code `poison`; the
    others are answered, and everybody else keeps 90 % of the throughput from before. Of those who were
    never in the killer's company 99 % have their answer within lease + 2 s; how long its neighbours wait, who run one
    by one as suspects, is reported.
    """
    cell.may_end = {"failed/poison"}  # the killer; who else ends so is named below
    troubled = ["tests.faults.troubled", "encoder"]
    layout = Layout(modules={"encoder-1": troubled, "encoder-2": troubled})
    calm = int(cell.jobs * CALM_SHARE)
    async with cell.running(layout, again=0.0) as (cluster, load, nemesis):  # a repeated id is buried, too
        usual = await _throughput(load, calm)
        supervising = asyncio.create_task(_supervise(cluster))
        try:
            sending = asyncio.create_task(_throughput(load, cell.jobs - calm, besides=INNOCENT + 1))
            await asyncio.sleep(1.0)
            killer, innocent, victim = await _poison(cluster, load)
            held = await _questions_in_hand(cluster, victim)
            nemesis.note("poison", victim.worker, held=len(held))
            together = sum(f"Request {number}." in question for number in innocent for question in held)
            cell.require(f"{INNOCENT} innocent ones were in the killer's hands, not {together}", together == INNOCENT)
            kept = await sending
            await wait_until(lambda: _has_letters(cluster), timeout_s=BURIED_WITHIN_S, every_s=0.1)
            await load.quiet()
        finally:
            supervising.cancel()
            await asyncio.gather(supervising, return_exceptions=True)
        letters = [orjson.loads(fields[b"data"]) for _, fields in await cluster.redis.xrange(keys.DEAD)]
        deaths = sum(part.generation - 1 for part in cluster.of("encoder"))
    told = {one.n: one for one in cell.requests()}
    others_s = sorted(_span_s(one) for n, one in told.items() if n > calm and n != killer and n not in innocent)
    p99_s, neighbours_s = others_s[math.ceil(len(others_s) * 0.99) - 1], max(_span_s(told[n]) for n in innocent)
    cell.verdict.figures |= {
        "p99 of the others s": round(p99_s, 2),
        "slowest neighbour s": round(neighbours_s, 2),
        "answered in the worst 2 s": _worst_window([one for n, one in told.items() if n > calm]),
    }
    cell.require(f"p99 of the others is at most {RECOVERY_S:g} s, not {p99_s:.2f}", p99_s <= RECOVERY_S)
    cell.verdict.figures |= {"deaths": deaths, "throughput": f"{kept:.1f}/s (usual {usual:.1f}/s)"}
    cell.require(f"workers died {DEATHS} times, not {deaths}", deaths == DEATHS)
    buried = [(letter["reason"], letter["job_id"], letter["deliveries"] - 1) for letter in letters]
    wanted = [("poison", job_id, DEATHS) for job_id in told[killer].ids]
    cell.require(f"only the killer is buried, as {wanted}, not {buried}", buried == wanted)
    heard = {(outcome["status"], outcome.get("code")) for outcome in told[killer].outcomes}
    cell.require(f"the killer's client heard failed, poison, not {heard}", heard == {("failed", "poison")})
    failed = [n for n, one in told.items() if n != killer and (one.outcomes or [{}])[0].get("status") != "completed"]
    cell.require(f"all others are answered, but not {failed[:5]}", not failed)
    cell.require(f"the others kept {KEPT_THROUGHPUT:.0%} of their throughput", kept >= KEPT_THROUGHPUT * usual)


def _span_s(one: Told) -> float:
    return (one.ended_s or math.inf) - one.submitted_s


def _worst_window(requests: list[Told]) -> int:
    """Return how many were answered in the two seconds with the fewest answers, while they were sent."""
    submitted_s, ended_s = [one.submitted_s for one in requests], [one.ended_s for one in requests if one.ended_s]
    begins_s = range(math.ceil(min(submitted_s)), int(max(submitted_s) - WINDOW_S))
    return min((sum(begin_s < at_s <= begin_s + WINDOW_S for at_s in ended_s) for begin_s in begins_s), default=0)


async def _throughput(load: Load, jobs: int, besides: int = 0) -> float:
    """Send so many requests, and return how many were answered per second meanwhile, *besides* so many others."""
    loop = asyncio.get_running_loop()
    began_s, before = loop.time(), load.answered
    await load.run(jobs, RATE)
    return (load.answered - before - besides) / (loop.time() - began_s)


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
    pending = (await cluster.redis.xpending(stream, "encoder"))["pending"]
    return int(await cluster.redis.xlen(stream)) - int(pending) > 0


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
