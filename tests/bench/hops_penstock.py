"""Three no-op hops through Penstock: stages and submitter use what the real stages and the gateway use, all of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from pipeline.consumer import Consumer
from pipeline.front import Front
from pipeline.job import Done, Job, Json, new_id
from pipeline.settings import Settings, load
from pipeline.stage import Outcome, Stage
from tests.bench.loads import Call

HOPS: Final = ("one", "two", "three")
BATCHES: Final = {"one": 32, "two": 16, "three": 1}
"""As encoder, retriever and llm have it: two stages that work in bulk, and one that handles each job by itself."""
SLOTS: Final = 64
LIFE_MS: Final = 60_000


class Noop(Stage):
    """Does nothing, as fast as it can."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.slots = SLOTS
        self.batch = BATCHES[name]

    async def handle(self, job: Job) -> Done:
        return Done({})

    async def handle_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        return [Done({}) for _ in jobs]


def settings(url: str) -> Settings:
    """Return the settings of all processes here: the defaults."""
    return load({"REDIS_URL": url})


async def work(url: str, hop: int) -> None:
    """Be one stage until told to stop."""
    consumer = Consumer([Noop(HOPS[hop])], settings(url))
    consumer.stop_on_signals()
    for worker in consumer.workers:
        await worker.streams.ensure_groups()  # so that "ready" is true
    gc.freeze()  # as the processes of stages and the gateway do
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await consumer.run()


def job_of(front: Front, payload: Json, route: Sequence[str], life_ms: int = LIFE_MS) -> Job:
    """Return a new job along *route*."""
    return Job(
        id=new_id(),
        flow="message",
        payload=payload,
        route=list(route),
        deadline_ms=front.clock.now_ms() + life_ms,
        at_us=front.clock.now_us(),
    )


@asynccontextmanager
async def submitting(url: str, payload: Json) -> AsyncIterator[Call]:
    """Give the call: submit one job and wait for its outcome."""
    async with Front(settings(url), "bench") as front:

        async def call(_number: int) -> None:
            job = job_of(front, payload, HOPS)
            await front.submit(job)
            completion = await front.wait(job.id, job.tenant, job.deadline_ms)
            if completion.status != "completed":
                raise RuntimeError(completion.status)

        gc.freeze()
        yield call
