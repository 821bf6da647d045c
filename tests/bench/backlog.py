"""backlog: whether a long queue slows the pipeline down, and what a queued job costs in Redis' memory."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import orjson

from pipeline import keys
from pipeline.batching import MOST
from pipeline.connection import Link, parse_info
from pipeline.front import Front, _Submission
from pipeline.job import Json
from tests.bench import cpu
from tests.bench.figures import Report, Window, in_turns, ratios, spread
from tests.bench.hops import PAYLOAD_BYTES, payload
from tests.bench.hops_penstock import HOPS, job_of, settings
from tests.bench.processes import Child, Processes
from tests.servers import RedisServer, server_binary

DEPTHS: Final = "0,10000,200000"
BUSY: Final = 512
"""Jobs alive beyond the depth: eight times a stage's slots, so that a depth of 0 is a pipeline with enough to do."""
AT_ONCE: Final = 128
LOOK_S: Final = 0.002
LIFE_MS: Final = 3_600_000
FILL_S: Final = 300.0


def run(
    *, rounds: int = 3, seconds: float = 4.0, warm: float = 1.0, depths: str = DEPTHS, appendonly: bool = False
) -> Report:
    """Queue the jobs once per depth, each in a Redis of its own; then measure the depths in turns, in each round.

    One no-op stage takes from the front of the queue while the feeder adds at its end what was done, so the depth stays
    what it is. Between its turns the stage is stopped. Done is what was accepted and is not alive any more.
    """
    chosen = [int(depth) for depth in depths.split(",")]
    report = Report("backlog", {"rounds": rounds, "payload_bytes": PAYLOAD_BYTES, "appendonly": appendonly})
    windows: dict[int, list[Window]] = {depth: [] for depth in chosen}
    with ExitStack() as stack:
        processes = stack.enter_context(Processes())
        places: dict[int, tuple[RedisServer, Child]] = {}
        for depth in chosen:
            redis = stack.enter_context(RedisServer(appendonly=appendonly))
            options = json.dumps({"url": redis.url, "payload": payload()})
            feeder = processes.start(f"feeder{depth}", "tests.bench.driver", "backlog", options, talks=True)
            feeder.line()
            places[depth] = redis, feeder
            if depth:
                memory = feeder.ask(FILL_S, do="fill", depth=depth)
                per_job = (memory["after"] - memory["before"]) / depth
                sys.stderr.write(f"{depth} queued in {memory['seconds']:.1f} s\n")
                columns = {"bytes_per_job": per_job, "times_the_payload": per_job / PAYLOAD_BYTES}
                report.row(
                    "memory of Redis per queued job", f"{depth:,}", **{n: spread([v]) for n, v in columns.items()}
                )
        for number in range(rounds):
            for depth in in_turns(chosen, number):
                redis, feeder = places[depth]
                words = ("--work", "hops_penstock", redis.url, "0")
                stage = processes.start("stage", "tests.bench.driver", *words, talks=True)
                stage.line()
                pids = {"stage": stage.pid, "redis": redis.pid}
                held = {"depth": depth + BUSY, "warm_s": warm, "seconds": seconds}
                windows[depth].append(feeder.window(do="hold", pids=pids, **held))
                processes.end("stage")
                sys.stderr.write(f"round {number + 1}: {depth} queued: {windows[depth][-1].rate:.0f}/s\n")
    rates = {depth: [window.rate for window in found] for depth, found in windows.items()}
    for depth, found in windows.items():
        report.row(
            "throughput of one hop",
            f"{depth:,} queued",
            jobs_per_s=spread(rates[depth]),
            of_the_first=ratios(rates[depth], rates[chosen[0]]),
            CPU_us_per_job=spread([window.cpu_per_call(["stage", "redis"]) for window in found]),
            redis_us_per_job=spread([window.cpu_per_call(["redis"]) for window in found]),
        )
    report.notes.append("the feeder's CPU time is not in the figures; it shares the cores")
    report.notes.append(f"used_memory, allocator of {Path(server_binary()).name}; no stage has read the jobs yet")
    return report


# --- The feeder: runs in the driver's process ---------------------------------------------------


class Feeder:
    """Keeps so many jobs alive."""

    def __init__(self, front: Front, link: Link, payload: Json) -> None:
        self._front = front
        self._link = link
        self._payload = payload
        self._accepted = 0

    async def alive(self) -> int:
        """Return how many jobs are accepted and not ended."""
        return int(await self._link.call("ZCARD", keys.LIVE_INDEX))

    async def used(self) -> int:
        """Return the bytes that Redis uses."""
        return int(parse_info(await self._link.call("INFO", "memory"))["used_memory"])

    async def add(self, count: int) -> None:
        """Submit that many jobs.

        Straight through the script call that gathers submits: what a gateway does for each caller besides is not to be
        measured here, and would take the CPU time of what is.
        """
        for some in (min(MOST, count - at) for at in range(0, count, MOST)):
            jobs = [job_of(self._front, self._payload, HOPS[:1], LIFE_MS) for _ in range(some)]
            answers = await self._front._send([_Submission(job, False, "", None, None) for job in jobs])
            if any(word != "accepted" for word, _ in answers):
                raise RuntimeError(f"not accepted: {answers}")
            self._accepted += some

    async def ended(self) -> int:
        """Return how many jobs have ended so far."""
        return self._accepted - await self.alive()


async def fill(feeder: Feeder, depth: int, pids: Mapping[str, int]) -> Json:
    """Queue *depth* jobs; return Redis' memory before and after."""
    before, began = await feeder.used(), perf_counter()
    await feeder.add(depth)
    return {"before": before, "after": await feeder.used(), "seconds": perf_counter() - began}


async def hold(feeder: Feeder, depth: int, warm_s: float, seconds: float, pids: Mapping[str, int]) -> Json:
    """Keep the depth for a while and count what ends."""

    async def until(instant: float) -> None:
        while perf_counter() < instant:
            await feeder.add(min(AT_ONCE, depth - await feeder.alive()))
            await asyncio.sleep(LOOK_S)

    await feeder.add(depth - await feeder.alive())
    await until(perf_counter() + warm_s)
    before, began, ended = cpu.spent_by(pids), perf_counter(), await feeder.ended()
    await until(began + seconds)
    spent, took, ended = cpu.between(before, cpu.spent_by(pids)), perf_counter() - began, await feeder.ended() - ended
    return Window(took, ended, {}, spent, []).as_json()


COMMANDS: Final[dict[str, Any]] = {"fill": fill, "hold": hold}


@asynccontextmanager
async def submitting(url: str, payload: Json) -> AsyncIterator[Feeder]:
    """Give the feeder."""
    assert len(orjson.dumps(payload)) == PAYLOAD_BYTES
    link = Link(settings(url).redis, "feeder")
    async with Front(settings(url), "bench") as front:
        try:
            yield Feeder(front, link, payload)
        finally:
            await link.close()
