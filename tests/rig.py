"""What the tests work with: stages whose handler a test gives, workers that can crash, and hands moved step by step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import orjson
from msgspec import structs

from pipeline import flows, keys
from pipeline.clock import Clock
from pipeline.connection import Link
from pipeline.consumer import Consumer
from pipeline.front import Front
from pipeline.job import Completion, Done, Job, Priority, decode, error_body, new_id
from pipeline.settings import Settings
from pipeline.stage import Context, Outcome, Stage
from pipeline.streams import Answer, Entry, Settlement, Streams, start_arguments
from tests.conftest import PATIENCE_S, wait_until

Handler = Callable[[Job], Awaitable[Done]]
BatchHandler = Callable[[Sequence[Job]], Awaitable[Sequence[Outcome]]]

FIRST, SECOND, THIRD = "http://one:1/v1", "http://two:2/v1", "http://three:3/v1"
REPLICAS = (FIRST, SECOND, THIRD)

LIFE_S = PATIENCE_S
"""Of a job that is to end well."""


# --- stages -------------------------------------------------------------------------------------


class Scripted(Stage):
    """A stage whose handler is given by the test."""

    def __init__(self, name: str, handler: Handler, *, slots: int = 8, placed: bool = False) -> None:
        self.name = name
        self.slots = slots
        self.placed = placed
        self.seen: list[Job] = []
        self.context: Context
        self._handler = handler

    async def start(self, context: Context) -> None:
        self.context = context

    async def handle(self, job: Job) -> Done:
        self.seen.append(structs.replace(job, state=dict(job.state)))  # as it came: the worker goes on to change it
        return await self._handler(job)

    def runs(self, job_id: str) -> int:
        """How often the handler was called for this job."""
        return sum(job.id == job_id for job in self.seen)


class ScriptedBatch(Stage):
    """A stage that takes its jobs in batches."""

    def __init__(self, name: str, handler: BatchHandler, *, slots: int = 8, batch: int = 8) -> None:
        self.name = name
        self.slots = slots
        self.batch = batch
        self.calls: list[list[str]] = []
        self._handler = handler

    async def handle_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        self.calls.append([job.id for job in jobs])
        return await self._handler(jobs)


async def echo(job: Job) -> Done:
    """Answer with the question."""
    return Done({"answer": job.payload.get("query") or job.payload.get("prompt", "")})


class Gate:
    """A handler that waits until it is opened, and says who stands before it."""

    def __init__(self, then: Handler = echo) -> None:
        self.waiting: list[str] = []
        self.stopped: list[str] = []
        self._open = asyncio.Event()
        self._then = then

    def open(self) -> None:
        self._open.set()

    async def __call__(self, job: Job) -> Done:
        self.waiting.append(job.id)
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.stopped.append(job.id)
            raise
        finally:
            self.waiting.remove(job.id)
        return await self._then(job)


# --- workers ------------------------------------------------------------------------------------


class Mortal(Consumer):
    """A consumer that can end as `kill -9` would end it: nothing settled, nobody told."""

    task: asyncio.Task[None]
    _crashed = False

    async def crash(self) -> None:
        self._crashed = True
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _leave(self) -> None:
        if not self._crashed:
            await super()._leave()
            return
        for worker in self.workers:
            await worker.close()
        for link in (self._link, self._ticker, self._listener):
            await link.close()


@asynccontextmanager
async def working(settings: Settings, stages: Sequence[Stage]) -> AsyncIterator[list[Mortal]]:
    """Run one consumer per stage; drain them at the end."""
    consumers = [Mortal([stage], settings) for stage in stages]
    async with asyncio.TaskGroup() as group:
        for consumer in consumers:
            consumer.task = group.create_task(consumer.run())
        await wait_until(lambda: all(w.not_ready is None for c in consumers for w in c.workers))
        try:
            yield consumers
        finally:
            for consumer in consumers:
                consumer.stop()


@asynccontextmanager
async def still(settings: Settings, stage: Scripted) -> AsyncIterator[Mortal]:
    """A consumer whose loops do not run: the test looks when it wants to."""
    consumer = Mortal([stage], settings)
    (worker,) = consumer.workers
    await worker._start_stage()
    await consumer.renew()
    try:
        yield consumer
    finally:
        for held in list(worker.held.values()):
            assert held.task is not None
            await held.task
        await worker.close()
        for link in (consumer._link, consumer._ticker, consumer._listener):
            await link.close()


def changed(settings: Settings, **sections: Mapping[str, Any]) -> Settings:
    """Return *settings* with some fields of some sections changed."""
    return settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=dict(fields)) for name, fields in sections.items()}
    )


# --- jobs ---------------------------------------------------------------------------------------


def query(
    front: Front,
    text: str = "why?",
    lifetime_s: float = LIFE_S,
    *,
    tenant: str = "default",
    priority: Priority = "normal",
    route: Sequence[str] | None = None,
) -> Job:
    """A question on its way through *route* (None: the whole route of a question)."""
    payload = flows.QueryPayload(query=text)
    job = flows.new_job(
        "query", payload, job_id=new_id(), now_ms=front.clock.now_ms(), lifetime_s=lifetime_s, tenant=tenant,
        priority=priority,
    )  # fmt: skip
    if route is not None:
        job.route = list(route)
    return job


def prompt(front: Front, text: str = "hello", lifetime_s: float = LIFE_S) -> Job:
    """A prompt straight to a replica."""
    payload = flows.PromptPayload(prompt=text)
    return flows.new_job("message", payload, job_id=new_id(), now_ms=front.clock.now_ms(), lifetime_s=lifetime_s)


async def ask(front: Front, job: Job) -> Completion:
    """Submit a job and wait for its outcome."""
    accepted = await front.submit(job)
    return await front.wait(accepted.job_id, job.tenant, job.deadline_ms)


# --- hands --------------------------------------------------------------------------------------


class Hand:
    """One consumer moved by the test: it takes and lets go when the test says so, and lives as long as it is told."""

    def __init__(self, settings: Settings, name: str, stage: str = "encoder", *, placed: bool = False) -> None:
        self.name = name
        self.clock = Clock()
        self.streams = Streams(stage, name, settings, self.clock, placed=placed)

    async def __aenter__(self) -> Self:
        await self.streams.ensure_groups()
        await self.live()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.streams.close()

    async def live(self, for_ms: int = 60_000) -> None:
        """Take a lease."""
        await self.streams.control.call("SET", keys.WORKER + self.name, "{}", "PX", for_ms)

    async def die(self) -> None:
        """Let the lease lapse now."""
        await self.streams.control.call("DEL", keys.WORKER + self.name)

    async def take(self, most: int = 100) -> list[Entry]:
        return await self.streams.take(most)

    async def take_one(self) -> Entry:
        (entry,) = await self.streams.take(1)
        return entry

    async def settle(self, *settlements: Settlement) -> list[Answer]:
        """Settle all in one script call."""
        return await self.streams._run_settle(settlements)


def forward(entry: Entry, to: str = "retriever", *, start: Sequence[Job] = ()) -> Settlement:
    job = decode(entry.data or b"")
    target = keys.stream(to, job.priority)
    return Settlement(
        entry,
        job.id,
        "forward",
        target,
        entry.data or b"",
        entry.vector or b"",
        start=[start_arguments(job) for job in start],
    )


def complete(entry: Entry, *, start: Sequence[Job] = ()) -> Settlement:
    job = decode(entry.data or b"")
    completion = Completion(job.id, "completed", tenant=job.tenant, result={"answer": "yes"}, worker="hand")
    return Settlement(entry, job.id, "complete", completion.encode(), start=[start_arguments(job) for job in start])


def retry(entry: Entry, delay_ms: int = 60_000) -> Settlement:
    job = decode(entry.data or b"")
    return Settlement(entry, job.id, "retry", delay_ms, entry.data or b"", entry.vector or b"")


def release(entry: Entry) -> Settlement:
    job = decode(entry.data or b"")
    return Settlement(entry, job.id, "release", "", entry.data or b"", entry.vector or b"")


def bury(entry: Entry, job_id: str | None = None) -> Settlement:
    if job_id is None:
        job_id = decode(entry.data or b"").id
    completion = Completion(job_id, "failed", error=error_body("failed", "test", "buried")).encode() if job_id else b""
    return Settlement(entry, job_id, "bury", completion, b'{"reason":"test"}')


# --- looking ------------------------------------------------------------------------------------


async def everything(link: Link) -> dict[bytes, bytes]:
    """Return all that Redis holds, key by key, so that two moments can be compared."""
    return {name: await link.call("DUMP", name) for name in sorted(await link.call("KEYS", "*"))}


async def outcome(link: Link, job_id: str) -> Completion | None:
    """Return a job's outcome, None while there is none."""
    text = await link.call("GET", keys.COMPLETION + job_id)
    return Completion.decode(text) if text else None


async def letters(link: Link) -> list[dict[str, Any]]:
    """Return the dead letters, oldest first."""
    return [orjson.loads(fields[1]) for _, fields in await link.call("XRANGE", keys.DEAD, "-", "+")]


async def is_running(link: Link, job_id: str) -> bool:
    """Say whether the job's entry is in somebody's hands."""
    stream, entry = await link.call("HMGET", keys.LIVE + job_id, "stream", "entry")
    if not entry:
        return False
    group = keys.stage_of(stream.decode())
    return bool(await link.call("XPENDING", stream, group, entry, entry, 1))


async def assert_nothing_is_left(link: Link) -> None:
    """No job lives, no stream holds an entry, no replica bears a load: all accepted work has ended."""
    assert await link.call("ZCARD", keys.LIVE_INDEX) == 0
    assert await link.call("ZCARD", keys.DELAYED) == 0
    assert await link.call("EXISTS", keys.STAGED, keys.ENTERING) == 0
    assert await link.call("KEYS", keys.LIVE + "*") == []
    for pattern in ("job:*_in*", keys.DELIVERY_QUEUE + "*", keys.INCOMING_QUEUE + "*"):
        for name in await link.call("KEYS", pattern):
            assert await link.call("XLEN", name) == 0, name
    for name in await link.call("KEYS", keys.DELIVERY + "*"):
        assert await link.call("PTTL", name) > 0, name
    for name in await link.call("KEYS", keys.LOAD + "*"):
        assert await link.call("GET", name) == b"0", name
    for pattern in (keys.LEASES, keys.RUNNING, keys.IN_FLIGHT):
        assert await link.call("KEYS", pattern + "*") == []
