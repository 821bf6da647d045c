"""A job's life through real workers on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from pipeline import flows, keys
from pipeline.connection import Link
from pipeline.consumer import Consumer
from pipeline.front import Front
from pipeline.job import Completion, Done, Job, new_id
from pipeline.settings import Settings
from pipeline.stage import Stage
from tests.conftest import wait_until

Handler = Callable[[Job], Awaitable[Done]]


class Scripted(Stage):
    """A stage whose handler is given by the test."""

    def __init__(self, name: str, handler: Handler, *, slots: int = 8) -> None:
        self.name = name
        self.slots = slots
        self._handler = handler
        self.seen: list[Job] = []

    async def handle(self, job: Job) -> Done:
        self.seen.append(job)
        return await self._handler(job)


async def echo(job: Job) -> Done:
    return Done({"answer": job.payload.get("query", "")})


@asynccontextmanager
async def working(settings: Settings, stages: Sequence[Stage]) -> AsyncIterator[list[Consumer]]:
    """Run one consumer per stage; drain them at the end."""
    consumers = [Consumer([stage], settings) for stage in stages]
    async with asyncio.TaskGroup() as group:
        for consumer in consumers:
            group.create_task(consumer.run())
        await wait_until(lambda: all(w.not_ready is None for c in consumers for w in c.workers))
        try:
            yield consumers
        finally:
            for consumer in consumers:
                consumer.stop()


def query(front: Front, text: str = "why?", lifetime_s: float = 30.0) -> Job:
    payload = flows.QueryPayload(query=text)
    return flows.new_job("query", payload, job_id=new_id(), now_ms=front.clock.now_ms(), lifetime_s=lifetime_s)


async def ask(front: Front, job: Job) -> Completion:
    accepted = await front.submit(job)
    return await front.wait(accepted.job_id, job.tenant, job.deadline_ms)


async def test_job_passes_its_route_and_leaves_only_its_completion(link: Link, settings: Settings) -> None:
    """Three stages, one answer, nothing else left."""
    stages = [Scripted(name, echo) for name in ("encoder", "retriever", "llm")]
    async with Front(settings, "test") as front, working(settings, stages):
        completion = await ask(front, query(front, "hello"))
        assert completion.status == "completed"
        assert completion.result == {"answer": "hello"}
        assert [len(stage.seen) for stage in stages] == [1, 1, 1]
        spans = set(completion.timings_ms)
        assert spans == {"encoder_wait", "encoder", "retriever_wait", "retriever", "llm_wait", "llm"}
        assert await link.call("EXISTS", keys.LIVE + completion.id) == 0
        assert await link.call("ZCARD", keys.LIVE_INDEX) == 0
        for stage in stages:
            assert await link.call("XLEN", keys.stream(stage.name)) == 0
