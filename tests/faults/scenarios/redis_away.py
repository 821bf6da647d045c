"""Redis killed and started again."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final

from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import Cluster, Layout
from tests.faults.history import Told
from tests.faults.nemesis import TRY_FOR_S
from tests.faults.scenarios import scenario

RATE: Final = 60.0
AGAIN_WITHIN_S: Final = 10.0
ANSWERED_WITHIN_S: Final = 1.0
"""A client whose request was sent before a kill has heard yes or 503 by then."""
DELAYED_S: Final = 2.0
"""For so long `everysec` delays a write while an fsync runs (the comment in Redis' `flushAppendOnlyFile`)."""


EVERYSEC_SHARE: Final = 2 / 3
"""Of the requests: so that there are several kills, far enough from each other."""
BETWEEN_KILLS_S: Final = {"always": (0.5, 2.0), "everysec": (2.5 * DELAYED_S, 3.5 * DELAYED_S)}
EXEMPT_AT_MOST: Final = 0.5
"""Share of those accepted under `everysec` that may be lost, since they were so fresh at a kill."""
ACCEPTED_AT_LEAST: Final = 0.6


@scenario(5, jobs=1_500, least=1_200)
async def kill_redis(cell: Cell) -> None:
    """Kill Redis under load and start it again, with `appendfsync always` and with `everysec`.

    Nothing accepted is lost: with `always` in any case, with `everysec` because the kernel keeps what a killed process
    has written. There Redis may delay a write, and with it may lose what it answered, for two seconds while the disk
    is busy: only what was accepted or ended so shortly before a kill may be lost. How much that is is reported, and is
    at most half of all; how much was lost is, too. No process of ours is started again.
    """
    away: list[tuple[float, float]] = []  # from a kill until Redis served again, on the monotonic clock
    for fsync in ("always", "everysec"):
        async with cell.running(Layout(latency="0.3", fsync=fsync)) as (cluster, load, _):
            before = _lives(cluster)
            earlier = len(away)
            share = EVERYSEC_SHARE if fsync == "everysec" else 1 - EVERYSEC_SHARE
            sending = cell.background(load.run(round(cell.jobs * share), RATE))
            answered_s = []
            while True:
                await asyncio.sleep(cell.rng.uniform(*BETWEEN_KILLS_S[fsync]))
                if sending.done():
                    break
                killed_s = time.monotonic()
                answered_s.append(await _kill_at_work(cell, away_s=cell.rng.uniform(0.0, 1.5)))
                away.append((killed_s, time.monotonic()))
            await sending
            cell.require(f"{fsync}: Redis was killed", len(answered_s) > 0)
            cell.verdict.figures[f"{fsync}: answering again, p50/max s"] = (
                f"{statistics.median(answered_s or [0.0]):.2f}/{max(answered_s, default=0.0):.2f}"
            )
            cell.require(f"{fsync}: every process lived on", _lives(cluster) == before)
        if fsync == "everysec":
            requests = [one for one in cell.requests() if one.n in load.numbers]
            cell.may_lose.update(_freshest(requests, [killed_s for killed_s, _ in away[earlier:]]))
            accepted = sum(one.is_accepted for one in requests)
            exempt = len(cell.may_lose) / max(accepted, 1)
            cell.verdict.figures["everysec: might have lost"] = f"{len(cell.may_lose)} of {accepted} ({exempt:.0%})"
            claim = f"everysec: at most {EXEMPT_AT_MOST:.0%} of the accepted might have been lost, not {exempt:.0%}"
            cell.require(claim, exempt <= EXEMPT_AT_MOST)
    cell.least_accepted = ACCEPTED_AT_LEAST
    # Who sends while Redis is away, or has only just sent, may hear nothing of it.
    cell.may_be_unknown = sum(
        any(killed_s - ANSWERED_WITHIN_S <= one.submitted_s <= again_s for killed_s, again_s in away)
        for one in cell.requests()
    )


def _freshest(requests: Iterable[Told], killed_s: Sequence[float]) -> Iterator[int]:
    """Yield the requests that were accepted, or ended, within the last seconds before a kill."""
    for one in requests:
        instants_s = [at_s for at_s in (one.accepted_s, one.ended_s) if at_s is not None]
        if any(0.0 <= end_s - at_s <= DELAYED_S for at_s in instants_s for end_s in killed_s):
            yield one.n


async def _kill_at_work(cell: Cell, away_s: float) -> float:
    """Kill Redis while workers have work in hand, start it again; return how long until a question was answered."""
    cluster = cell.cluster
    with suppress(TimeoutError):
        await wait_until(cluster.held_by_workers, timeout_s=TRY_FOR_S)
    held = await cluster.held_by_workers()
    await cluster.server.kill()
    cell.nemesis.note("redis killed", "redis", held=held)
    await asyncio.sleep(away_s)
    await cluster.server.start()
    return await cluster.until_answered(AGAIN_WITHIN_S)


def _lives(cluster: Cluster) -> dict[str, int]:
    """Return the living processes of ours by name, with their process ids."""
    return {part.name: part.pid for part in cluster.parts.values() if part is not cluster.server and part.lives}
