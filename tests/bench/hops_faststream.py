"""Three no-op hops through FastStream on Redis streams, set up as its documentation has it for throughput.

Consumer groups, several messages in flight at each hop, no logging, no dependency injection or validation on the way
(`apply_types=False`), streams kept short. The submitter hears of the end of a job through the last stream.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from pipeline.job import Json
from tests.bench.loads import Call

WORKERS: Final = "BENCH_WORKERS"
"""Environment variable: messages that a hop handles at once; 0 leaves out the option, which is one at a time."""
AT_ONCE: Final = 64
POLL_MS: Final = 1_000
KEPT: Final = 10_000
LAST: Final = "faststream:3"


def _broker(url: str) -> Any:
    from faststream.redis import RedisBroker

    silent: Any = None  # FastStream takes it and logs nothing; its types do not say so
    return RedisBroker(url, logger=silent, apply_types=False)


async def work(url: str, hop: int) -> None:
    """Be one hop until killed."""
    from faststream.redis import StreamSub

    broker = _broker(url)
    there = f"faststream:{hop + 1}"

    async def handle(job: Json) -> None:
        await broker.publish({"id": job["id"]} if hop == 2 else job, stream=there, maxlen=KEPT)

    stream = StreamSub(
        f"faststream:{hop}", group="hops", consumer="c", max_records=AT_ONCE, polling_interval=POLL_MS, last_id="$"
    )
    if workers := int(os.environ[WORKERS]):
        broker.subscriber(stream=stream, max_workers=workers)(handle)
    else:
        broker.subscriber(stream=stream)(handle)
    await broker.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        await asyncio.Event().wait()
    finally:
        await broker.stop()


@asynccontextmanager
async def submitting(url: str, payload: Json) -> AsyncIterator[Call]:
    """Give the call: publish one job and wait until its id comes out at the end."""
    from faststream.redis import StreamSub

    broker = _broker(url)
    waiting: dict[str, asyncio.Future[None]] = {}

    async def ended(job: Json) -> None:
        future = waiting.pop(job["id"], None)
        if future is not None and not future.done():
            future.set_result(None)

    stream = StreamSub(LAST, max_records=AT_ONCE, polling_interval=POLL_MS)
    broker.subscriber(stream=stream)(ended)

    async def call(_number: int) -> None:
        job_id = uuid.uuid4().hex
        future = waiting[job_id] = asyncio.get_running_loop().create_future()
        await broker.publish({"id": job_id, "payload": payload}, stream="faststream:0", maxlen=KEPT)
        await future

    await broker.start()
    try:
        yield call
    finally:
        await broker.stop()
