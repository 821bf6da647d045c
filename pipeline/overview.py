"""What runs and how deep each queue is: one look at Redis, for `penstock status` and the gateway's metrics."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import orjson

from pipeline import flows, keys
from pipeline.connection import CommandRefused, parse_info
from pipeline.job import PRIORITIES, Priority
from pipeline.replicas import read_registry
from pipeline.streams import number

if TYPE_CHECKING:
    from pipeline.connection import Link

LAPSED_WITHIN_S: Final = 600.0
"""A worker that ended without a word is told of for so long."""


@dataclass(frozen=True, slots=True)
class StreamView:
    """One stream.

    Attributes:
        waiting: entries that no worker has read.
        in_hand: entries in the hands of workers.
        oldest_ms: how long the longest-held entry has been in hand, 0 where none is.
        estimated_lag: what Redis takes for the number of entries that no worker has read; None where it cannot tell,
            since an entry was deleted before it was read (a cancelled job's, say). `waiting` is always known.
    """

    stream: str
    waiting: int
    in_hand: int
    oldest_ms: int
    stage: str
    priority: Priority
    estimated_lag: int | None


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One LLM replica: slots, calls running, jobs assigned, and whether its breaker keeps callers away.

    Attributes:
        breaker_tripped: its breaker opened and no call has succeeded since; open, or one call may probe it.
    """

    url: str
    slots: int
    running: int
    leases: int
    breaker_open: bool
    breaker_tripped: bool
    service_ms: float | None


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One process.

    Attributes:
        stages: its stages and loops, each with None or the reason why it is not ready.
        loops: those of them that take no jobs and have no streams.
    """

    consumer: str
    worker: str
    stages: dict[str, str | None]
    host: str
    pid: int
    metrics: str
    loops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewayView:
    """One gateway, or another process that is no worker.

    Attributes:
        address: where it listens, host and port: a gateway for requests, others for who reads their metrics.
        kind: gateway, or telegram.
    """

    name: str
    address: str
    host: str
    pid: int
    kind: str = "gateway"


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything at one instant (almost: one command after the other).

    Attributes:
        lapsed_workers: workers that ended without a word within the last ten minutes.
        letters_ever: dead letters ever written to this Redis, those included that are gone.
        memory_limit_bytes: 0 where Redis has none.
        record_backlog: events of the history that the database does not have yet.
        record_oldest_ms: how long the oldest of them has waited, 0 where there is none.
        report_requests: requests of other back ends that no worker has turned into jobs.
        reports_repeated: requests that were known already, ever.
        responses_dropped: responses that had to go since there were too many, ever.
        connectors: processes that join the chats to a messenger.
        chats_failed, chats_expired: messages of chats that ended so, and without an answer, ever.
    """

    streams: list[StreamView]
    replicas: list[ReplicaView]
    workers: list[WorkerView]
    gateways: list[GatewayView]
    lapsed_workers: int
    live_jobs: int
    delayed: int
    dead_letters: int
    letters_ever: int
    memory_bytes: int
    memory_limit_bytes: int
    record_backlog: int
    record_oldest_ms: int
    report_requests: int = 0
    reports_repeated: int = 0
    responses_dropped: int = 0
    connectors: list[GatewayView] = field(default_factory=list)
    chats_failed: int = 0
    chats_expired: int = 0


async def look(link: Link, *, thorough: bool = True) -> Overview:
    """Look at Redis once.

    Args:
        thorough: look for streams of stages that no flow passes and no worker works on, too. That walks over all keys.

    Raises:
        BrokerUnavailable: Redis does not answer.
        CommandRefused, ValueError, TypeError, LookupError: a key is not what it should be.
    """
    now_ms = await link.time_us() // 1000
    workers, lapsed = await _workers(link, now_ms)
    stages = {stage for flow in flows.FLOWS.values() for stage in flow.route}
    stages |= {stage for worker in workers for stage in worker.stages if stage not in worker.loops}
    if thorough:
        stages |= await _stages_with_streams(link)
    streams = [await _stream(link, stage, priority) for stage in sorted(stages) for priority in PRIORITIES]
    failed, expired = await link.call("HMGET", keys.CHAT_COUNTS, "failed", "expired")
    repeated, dropped = await link.call("HMGET", keys.REPORT_COUNTS, "repeated", "dropped")
    listeners = await _gateways(link)
    memory = parse_info(await link.call("INFO", "memory"))
    return Overview(
        streams=streams,
        replicas=await _replicas(link, now_ms),
        workers=workers,
        gateways=[one for one in listeners if one.kind == "gateway"],
        connectors=[one for one in listeners if one.kind != "gateway"],
        lapsed_workers=lapsed,
        live_jobs=int(await link.call("ZCARD", keys.LIVE_INDEX)),
        delayed=int(await link.call("ZCARD", keys.DELAYED)) + await _entering(link),
        dead_letters=int(await link.call("XLEN", keys.DEAD)),
        letters_ever=await _letters_ever(link),
        memory_bytes=int(memory.get("used_memory", "0")),
        memory_limit_bytes=int(memory.get("maxmemory", "0")),
        record_backlog=int(await link.call("XLEN", keys.EVENTS)),
        record_oldest_ms=await _oldest_event_ms(link, now_ms),
        report_requests=int(await link.call("XLEN", keys.REPORT_REQUESTS)),
        reports_repeated=int(repeated or 0),
        responses_dropped=int(dropped or 0),
        chats_failed=int(failed or 0),
        chats_expired=int(expired or 0),
    )


async def _entering(link: Link) -> int:
    """Count the members of batches just accepted that are neither on their stream nor among the delayed jobs yet."""
    count = 0
    for batch in await link.call("ZRANGE", keys.ENTERING, 0, -1):
        with suppress(CommandRefused):  # a key of a wrong type: an operator must act, and is shown the rest
            wanted, entered = await link.call("HMGET", keys.BATCH + batch.decode(), "req.count", "entered")
            count += int(wanted) - int(entered) if entered else 0
    return count


async def _stages_with_streams(link: Link) -> set[str]:
    """Find streams that hold work although no worker of their stage lives."""
    found: set[str] = set()
    cursor = b"0"
    while True:
        cursor, names = await link.call("SCAN", cursor, "MATCH", keys.stream("*"), "COUNT", 1000, "TYPE", "stream")
        found |= {name.decode().removeprefix("job:").removesuffix("_in") for name in names}
        if cursor == b"0":
            return found


async def _stream(link: Link, stage: str, priority: Priority) -> StreamView:
    stream = keys.stream(stage, priority)
    length = int(await link.call("XLEN", stream))
    group = await _group(link, stream, stage)
    held = int(group.get("pending", 0))
    oldest = await link.call("XPENDING", stream, stage, "-", "+", 1) if held else []
    return StreamView(
        stream,
        waiting=max(0, length - held),
        in_hand=held,
        oldest_ms=int(oldest[0][2]) if oldest else 0,
        stage=stage,
        priority=priority,
        estimated_lag=group.get("lag"),
    )


async def _group(link: Link, stream: str, stage: str) -> dict[str, Any]:
    """Return what Redis says of the stage's group, by name; nothing where there is no stream or no group."""
    try:
        groups = [_named(row) for row in await link.call("XINFO", "GROUPS", stream)]
    except CommandRefused:  # there is no such stream: one of another type was refused before
        return {}
    return next((group for group in groups if group["name"] == stage.encode()), {})


async def _oldest_event_ms(link: Link, now_ms: int) -> int:
    for _, fields in await link.call("XRANGE", keys.EVENTS, "-", "+", "COUNT", 1):
        at_ms = number(_named(fields).get("at_ms"))
        return max(0, now_ms - int(at_ms)) if at_ms else 0
    return 0


async def _letters_ever(link: Link) -> int:
    try:
        return int(_named(await link.call("XINFO", "STREAM", keys.DEAD))["entries-added"])
    except CommandRefused:  # there was never one
        return 0


def _named(row: Iterable[Any]) -> dict[str, Any]:
    """Return the values of a flat list of names and values by name."""
    values = iter(row)
    return {name.decode(): value for name, value in zip(values, values, strict=True)}


async def _replicas(link: Link, now_ms: int) -> list[ReplicaView]:
    known = read_registry(await link.call("HGETALL", keys.REPLICAS))
    views = []
    for url, replica in sorted(known.items(), key=lambda pair: pair[0]):
        health = await link.call("HMGET", keys.HEALTH + url, "us_per_token", "tokens", "open_until_ms")
        per_token, tokens, open_until = (number(value) for value in health)
        views.append(
            ReplicaView(
                url,
                slots=replica.slots,
                running=int(await link.call("ZCARD", keys.RUNNING + url)),
                leases=int(await link.call("ZCARD", keys.LEASES + url)),
                breaker_open=(open_until or 0) > now_ms,
                breaker_tripped=bool(open_until),
                service_ms=per_token * tokens / 1000 if per_token and tokens else None,
            )
        )
    return views


async def _workers(link: Link, now_ms: int) -> tuple[list[WorkerView], int]:
    """Return those that live, and how many have ended without a word (who signs off leaves the list)."""
    listed = await link.call("ZRANGE", keys.WORKERS, 0, -1, "WITHSCORES")
    seen_ms = {name.decode(): float(score) / 1000 for name, score in zip(listed[::2], listed[1::2], strict=True)}
    if not seen_ms:
        return [], 0
    records = await link.call("MGET", *[keys.WORKER + name for name in seen_ms])
    views = []
    lapsed = 0
    for name, record in zip(seen_ms, records, strict=True):
        if record:
            body: dict[str, Any] = orjson.loads(record)
            stages = body["stages"]  # first: what is no record at all has no such part, and that is a known trouble
            loops: dict[str, str | None] = body.get("loops", {})
            views.append(
                WorkerView(
                    name, body["worker"], stages | loops, body["host"], body["pid"], body["metrics"], tuple(loops)
                )
            )
        elif now_ms - seen_ms[name] < LAPSED_WITHIN_S * 1000:
            lapsed += 1
    return sorted(views, key=lambda view: view.worker), lapsed


async def _gateways(link: Link) -> list[GatewayView]:
    records = await link.call("ZRANGE", keys.GATEWAYS, 0, -1)
    bodies = [orjson.loads(record) for record in records]
    views = [
        GatewayView(body["name"], body["address"], body["host"], body["pid"], body.get("kind", "gateway"))
        for body in bodies
    ]
    return sorted(views, key=lambda view: view.name)
