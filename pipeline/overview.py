"""What runs and how deep each queue is: one look at Redis, for `penstock status`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from pipeline import keys
from pipeline.connection import GroupMissing
from pipeline.job import PRIORITIES
from pipeline.replicas import read_registry
from pipeline.streams import number

if TYPE_CHECKING:
    from pipeline.connection import Link


@dataclass(frozen=True, slots=True)
class StreamView:
    """One stream.

    Attributes:
        waiting: entries that no worker has read.
        in_hand: entries in the hands of workers.
        oldest_ms: how long the longest-held entry has been in hand, 0 where none is.
    """

    stream: str
    waiting: int
    in_hand: int
    oldest_ms: int


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One LLM replica: slots, calls running, jobs assigned, and whether its breaker keeps callers away."""

    url: str
    slots: int
    running: int
    leases: int
    breaker_open: bool
    service_ms: float | None


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One process: its stages, each with None or the reason why it is not ready."""

    consumer: str
    worker: str
    stages: dict[str, str | None]
    host: str
    pid: int
    metrics: str


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything at one instant (almost: one command after the other)."""

    streams: list[StreamView]
    replicas: list[ReplicaView]
    workers: list[WorkerView]
    live_jobs: int
    delayed: int
    dead_letters: int


async def look(link: Link) -> Overview:
    """Look at Redis once.

    Raises:
        BrokerUnavailable: Redis does not answer.
    """
    seconds, micros = await link.call("TIME")
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    workers = await _workers(link)
    stages = sorted({stage for worker in workers for stage in worker.stages} | await _stages_with_streams(link))
    streams = [await _stream(link, stage, keys.stream(stage, p)) for stage in stages for p in PRIORITIES]
    return Overview(
        streams=streams,
        replicas=await _replicas(link, now_ms),
        workers=workers,
        live_jobs=int(await link.call("ZCARD", keys.LIVE_INDEX)),
        delayed=int(await link.call("ZCARD", keys.DELAYED)),
        dead_letters=int(await link.call("XLEN", keys.DEAD)),
    )


async def _stages_with_streams(link: Link) -> set[str]:
    """Find streams that hold work although no worker of their stage lives."""
    found: set[str] = set()
    cursor = b"0"
    while True:
        cursor, names = await link.call("SCAN", cursor, "MATCH", keys.stream("*"), "COUNT", 1000, "TYPE", "stream")
        found |= {name.decode().removeprefix("job:").removesuffix("_in") for name in names}
        if cursor == b"0":
            return found


async def _stream(link: Link, stage: str, stream: str) -> StreamView:
    length = int(await link.call("XLEN", stream))
    try:
        held = int((await link.call("XPENDING", stream, stage))[0])
        oldest = await link.call("XPENDING", stream, stage, "-", "+", 1) if held else []
    except GroupMissing:
        held, oldest = 0, []
    return StreamView(stream, max(0, length - held), held, int(oldest[0][2]) if oldest else 0)


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
                service_ms=per_token * tokens / 1000 if per_token and tokens else None,
            )
        )
    return views


async def _workers(link: Link) -> list[WorkerView]:
    names = [name.decode() for name in await link.call("ZRANGE", keys.WORKERS, 0, -1)]
    if not names:
        return []
    records = await link.call("MGET", *[keys.WORKER + name for name in names])
    views = []
    for name, record in zip(names, records, strict=True):
        if record:
            body: dict[str, Any] = orjson.loads(record)
            views.append(WorkerView(name, body["worker"], body["stages"], body["host"], body["pid"], body["metrics"]))
    return sorted(views, key=lambda view: view.worker)
