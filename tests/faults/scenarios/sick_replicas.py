"""Replicas that live and do not work as they should."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from pipeline import keys
from tests.faults.cell import Cell
from tests.faults.cluster import Cluster, Layout
from tests.faults.history import Told, read
from tests.faults.scenarios import scenario

RATE: Final = 60.0
LATENCY_S: Final = 0.3  # 18 calls at a time: a replica that hangs must catch as many as open a breaker
HEALTHY: Final = {"mode": "normal", "latency": LATENCY_S}
SLOWER: Final = 50
WITHIN: Final = 1.5
BREAKER_OPEN_S: Final = 5.0  # as it is by default: the suite's own second would send a probe with every fortieth job
OPENS_WITHIN_S: Final = 45.0  # a call that hangs is given up after 30 s
CLOSES_WITHIN_S: Final = 45.0  # likewise; then comes a probe
SLOTS: Final = 16
"""As many jobs may be caught by a replica that has just fallen sick."""


@dataclass(slots=True)
class _Illness:
    """One replica's illness.

    Attributes:
        opens: whether its calls fail, so that the breaker must open; a slow one is only shunned.
        lasts: how much longer than the healthy time it lasts: until the first slow answers have come, and longer.
        first, last: the requests sent while it lasted.
    """

    name: str
    patch: dict[str, Any]
    opens: bool = True
    lasts: int = 1
    first: int = 0
    last: int = 0
    victim: str = ""
    url: str = ""
    seconds: float = 0.0
    healed_s: float = 0.0


LEAST_EACH: Final = 200
"""Requests from which a P99 is taken."""
SHARES: Final = 6
"""Equal parts of the requests: before any illness, during two, and during one that lasts three times as long."""


@scenario(14, jobs=2_400, least=SHARES * LEAST_EACH)
async def sick_replica(cell: Cell) -> None:
    """A replica hangs, one answers garbage, one is 50 times slower.

    P99 of the rest - requests that the sick one was never asked for - stays within 1.5 times of what it was, few
    requests ever meet the sick one, none fails, and a breaker that opened closes again when its replica is well.

    The breaker of the slow one need not open: it counts failures in a row, and every one of its calls is answered in
    the end, well within the call's time-out. It is the balancing that shuns it, by the time its answers take.
    """
    hang = _Illness("hang", {"mode": "hang"})
    garbage = _Illness("garbage", {"mode": "garbage"})
    slow = _Illness("slow", {"latency": LATENCY_S * SLOWER}, opens=False, lasts=3)
    illnesses = (hang, garbage, slow)
    environ = {"PENSTOCK_LLM__BREAKER_OPEN_S": f"{BREAKER_OPEN_S:g}"}
    assert 1 + sum(illness.lasts for illness in illnesses) == SHARES
    share = cell.jobs // SHARES
    layout = Layout(replicas=len(illnesses) + 1, latency=str(LATENCY_S), environ=environ)
    async with cell.running(layout, mix={"ask": 1}) as (cluster, load, _):
        await load.run(int(RATE), RATE)  # connections are made
        before = range(load.sent + 1, load.sent + share + 1)
        await load.run(share, RATE)
        for illness in illnesses:
            well = {part.name for part in cluster.of("replica")} - {other.victim for other in illnesses}
            await _suffer(cell, illness, well, share * illness.lasts)
            if illness is garbage:  # two must be well while the third is slow: one alone cannot carry the rate
                await _recover(cell, garbage)
        # The calls that hung held the place of a probe until they were given up, while others were ill.
        await _recover(cell, hang)
    told = {one.n: one for one in cell.requests()}
    usual_s = p99(told[n] for n in before)
    cell.verdict.figures["usual p99"] = f"{usual_s * 1000:.0f} ms"
    for illness in illnesses:
        _judge(cell, illness, told, usual_s)


async def _suffer(cell: Cell, illness: _Illness, well: set[str], jobs: int) -> None:
    """Let the busiest of those that are *well* be ill while *jobs* requests are sent, then heal it.

    It is ill for longer where its breaker needs longer to open.
    """
    cluster, load, loop = cell.cluster, cell.load, asyncio.get_running_loop()
    sending = cell.background(load.run(jobs + int(RATE), RATE))
    await asyncio.sleep(1.0)
    # The busiest: one that was measured as slow on a busy machine is left alone for half a minute.
    urls = {name: f"http://127.0.0.1:{cluster.ports[name]}" for name in sorted(well)}
    loads = {name: int(await cluster.redis.get(keys.LOAD + url) or 0) for name, url in urls.items()}
    illness.victim, held = max(loads.items(), key=lambda pair: pair[1])
    illness.url = urls[illness.victim]
    illness.first, began_s = load.sent + 1, loop.time()
    cell.nemesis.note(illness.name, illness.victim, held=held)
    await cluster.behave(illness.victim, **illness.patch)
    await sending
    while illness.opens and not await _turned(cluster, illness.url, "open"):
        if loop.time() - began_s > OPENS_WITHIN_S:
            cell.expect(f"{illness.name}: the breaker opens within {OPENS_WITHIN_S:g} s", False)
            break
        await load.run(int(RATE), RATE)
    illness.last, illness.seconds = load.sent, loop.time() - began_s
    await cluster.behave(illness.victim, **HEALTHY)
    illness.healed_s = loop.time()


async def _recover(cell: Cell, illness: _Illness) -> None:
    """Send requests until the breaker of a replica that is well again has closed."""
    loop = asyncio.get_running_loop()
    while not await _is_closed(cell.cluster, illness.url):
        if loop.time() - illness.healed_s > CLOSES_WITHIN_S:
            cell.expect(f"{illness.name}: the breaker closes again within {CLOSES_WITHIN_S:g} s", False)
            return
        await cell.load.run(int(RATE / 4), RATE)


async def _turned(cluster: Cluster, url: str, to: str) -> int:
    """Return how often the breaker of a replica opened, or closed."""
    name = f'penstock_breaker_transitions_total{{replica="{url}",to="{to}"}}'
    return sum([int((await cluster.metrics(part)).get(name, 0)) for part in cluster.of("llm")])


async def _is_closed(cluster: Cluster, url: str) -> bool:
    opened_until = await cluster.redis.hget(keys.HEALTH + url, "open_until_ms")
    return int(opened_until or 0) == 0 and await _turned(cluster, url, "closed") > 0


def p99(requests: Iterable[Told]) -> float:
    """Return the time within which 99 of 100 were answered, in seconds."""
    spans_s = sorted((one.ended_s or math.inf) - one.submitted_s for one in requests)
    return spans_s[math.ceil(len(spans_s) * 0.99) - 1] if spans_s else math.inf


def _judge(cell: Cell, illness: _Illness, told: dict[int, Told], usual_s: float) -> None:
    asked = {line["request_id"] for line in read(cell.cluster.folder / f"{illness.victim}.jsonl")}
    everybody = [told[n] for n in range(illness.first, illness.last + 1)]
    rest = [one for one in everybody if not asked & set(one.ids)]
    met, p99_s = len(everybody) - len(rest), p99(rest)
    failed = [one.n for one in everybody if (one.outcomes or [{}])[0].get("status") != "completed"]
    cell.verdict.figures[illness.name] = (
        f"p99 {p99_s * 1000:.0f} ms (with the {met} of {len(everybody)} it met {p99(everybody) * 1000:.0f} ms)"
    )
    cell.require(f"{illness.name}: nothing fails, but {failed[:5]}", not failed)
    cell.expect(f"{illness.name}: p99 of the rest within {WITHIN} times", p99_s <= WITHIN * usual_s)
    cell.require(f"{illness.name}: {LEAST_EACH} others at least, not {len(rest)}", len(rest) >= LEAST_EACH)
    most = SLOTS + math.ceil(illness.seconds / BREAKER_OPEN_S)
    cell.require(f"{illness.name}: at most {most} meet the sick one, not {met}", met <= most)
