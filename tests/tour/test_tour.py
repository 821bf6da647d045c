"""A tour of the pipeline, to be read from top to bottom: one idea per test, on a real Redis, without mocks.

A *job* travels through *stages*. Each stage reads one stream (`job:<stage>_in`), does its part, and hands the job to
the next stage of the job's route; the last one writes the outcome to `job:completion:<id>`. A stage is a function from
job to `Done`; a `Consumer` is a process that runs stages; a `Front` is the pipeline as a gateway sees it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

import stages
from pipeline import flows, keys
from pipeline.consumer import Consumer
from pipeline.errors import Reject, RetryLater
from pipeline.front import Front
from pipeline.job import Completion, Done, Job, Priority, new_id
from pipeline.settings import Settings
from pipeline.stage import Stage
from stages.__main__ import build
from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pipeline.connection import Link


class Simple(Stage):
    """A stage made of one function."""

    def __init__(self, name: str, handle: Callable[[Job], Awaitable[Done]], slots: int = 8) -> None:
        self.name = name
        self.slots = slots
        self._handle = handle

    async def handle(self, job: Job) -> Done:
        return await self._handle(job)


async def answer(job: Job) -> Done:
    """Answer with the question, loudly."""
    return Done({"answer": job.payload["query"].upper()})


@asynccontextmanager
async def running(settings: Settings, *found: Stage) -> AsyncIterator[None]:
    """Run one consumer for all these stages, and let it drain afterwards."""
    consumer = Consumer(found, settings)
    async with asyncio.TaskGroup() as group:
        group.create_task(consumer.run())
        try:
            yield
        finally:
            consumer.stop()


def question(front: Front, text: str = "why?", *route: str, priority: Priority = "normal") -> Job:
    """A question on its route; without one, on the route that all questions take."""
    job = flows.new_job(
        "query", flows.QueryPayload(query=text), job_id=new_id(), now_ms=front.clock.now_ms(), lifetime_s=120.0,
        priority=priority,
    )  # fmt: skip
    job.route = list(route) or job.route
    return job


async def ask(front: Front, job: Job) -> Completion:
    """Submit a job and wait for its outcome."""
    await front.submit(job)
    return await front.wait(job.id, job.tenant, job.deadline_ms)


# --- 1 --------------------------------------------------------------------------------------------


async def test_a_job_passes_its_route(front: Front, settings: Settings) -> None:
    """Encoder, retriever, llm: each adds to the job's state, and the end shows what the flow promises."""

    async def encode(job: Job) -> Done:
        return Done({"words": job.payload["query"].split()})

    async def retrieve(job: Job) -> Done:
        return Done({"sources": [f"about {word}" for word in job.state["words"]]})

    async def call(job: Job) -> Done:
        return Done({"answer": f"I read {len(job.state['sources'])} sources"})

    async with running(settings, Simple("encoder", encode), Simple("retriever", retrieve), Simple("llm", call)):
        completion = await ask(front, question(front, "what turbines want"))
    assert completion.status == "completed"
    assert completion.result == {
        "answer": "I read 3 sources",
        "sources": ["about what", "about turbines", "about want"],
    }
    assert "encoder" in completion.timings_ms
    assert "llm_wait" in completion.timings_ms


async def test_a_crash_costs_time_and_no_job(front: Front, settings: Settings) -> None:
    """A worker process is killed with a job in its hands; its lease lapses, and another worker claims the job."""
    environ = dict(os.environ, REDIS_URL=settings.redis.url, PENSTOCK_WORKER__LEASE_S="1")
    command = [sys.executable, "-m", "tests.tour.one_worker"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            job = question(front, "still here?", "encoder")
            await front.submit(job)
            assert process.stdout is not None
            while f"holding {job.id}".encode() not in (await asyncio.to_thread(process.stdout.readline)):
                assert process.poll() is None, "the worker did not start"
        finally:
            process.kill()
    async with running(settings, Simple("encoder", answer)):
        completion = await front.wait(job.id, job.tenant, job.deadline_ms)
    assert completion.result == {"answer": "STILL HERE?"}


async def test_a_failure_is_tried_again(front: Front, settings: Settings) -> None:
    """`RetryLater` (or any exception) puts the job among the delayed ones; its attempt rises."""
    attempts: list[int] = []

    async def stumble(job: Job) -> Done:
        attempts.append(job.attempt)
        if job.attempt < 3:
            raise RetryLater("not yet", code="busy")
        return await answer(job)

    async with running(settings, Simple("encoder", stumble)):
        completion = await ask(front, question(front, "now?", "encoder"))
    assert completion.result == {"answer": "NOW?"}
    assert attempts == [1, 2, 3]


async def test_what_can_never_succeed_becomes_a_dead_letter(front: Front, settings: Settings, link: Link) -> None:
    """`Reject` ends the job as failed, and `job:dead` keeps its story."""

    async def refuse(job: Job) -> Done:
        raise Reject("this question is too long", code="too_long")

    async with running(settings, Simple("encoder", refuse)):
        job = question(front)
        completion = await ask(front, job)
    assert completion.status == "failed"
    assert completion.error == {"type": "failed", "code": "too_long", "message": "this question is too long"}
    ((_, fields),) = await link.call("XRANGE", keys.DEAD, "-", "+")
    letter = orjson.loads(fields[1])
    assert (letter["job_id"], letter["reason"], letter["stage"]) == (job.id, "too_long", "encoder")


async def test_a_job_can_be_cancelled(front: Front, settings: Settings) -> None:
    """One that waits ends at once; one that runs is stopped by its worker."""
    started = asyncio.Event()

    async def brood(job: Job) -> Done:
        started.set()
        await asyncio.Event().wait()
        return Done({})

    waiting, handled = question(front, "a", "retriever"), question(front, "b", "encoder")
    await front.submit(waiting)
    assert await front.cancel(waiting.id, "default") == "cancelled"
    async with running(settings, Simple("encoder", brood)):
        await front.submit(handled)
        await started.wait()
        assert await front.cancel(handled.id, "default") == "cancelling"
        completion = await front.wait(handled.id, handled.tenant, handled.deadline_ms)
    assert completion.status == "cancelled"


async def test_any_program_can_send_a_job(link: Link, settings: Settings) -> None:
    """One XADD with an id and a question; the answer stands under that id for a minute."""
    async with running(settings, *(Simple(name, answer) for name in ("encoder", "retriever", "llm"))):
        await link.call("XADD", "job:encoder_in", "*", "data", '{"id":"a1","query":"hello?"}')
        await wait_until(lambda: link.call("GET", "job:completion:a1"))
        completion = orjson.loads(await link.call("GET", "job:completion:a1"))
    assert completion["status"] == "completed"
    assert completion["result"] == {"answer": "HELLO?"}


async def test_urgent_jobs_go_first_and_nobody_starves(front: Front, settings: Settings) -> None:
    """Of ten jobs taken while all three priorities wait, seven are high, two normal, one low."""
    order: list[str] = []

    async def note(job: Job) -> Done:
        order.append(job.priority)
        return Done({})

    priorities: tuple[Priority, ...] = ("low", "normal", "high")
    jobs = [question(front, "?", "encoder", priority=priority) for priority in priorities for _ in range(10)]
    for job in jobs:
        await front.submit(job)
    async with running(settings, Simple("encoder", note, slots=1)):
        for job in jobs:
            await front.wait(job.id, job.tenant, job.deadline_ms)
    first = order[:10]
    assert (first.count("high"), first.count("normal"), first.count("low")) == (7, 2, 1)


async def test_a_stage_is_one_file(
    front: Front, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put it into `stages/`, name it in a route, run `python -m stages shout`: nothing else knows of it."""
    (tmp_path / "shout.py").write_text(
        """
from pipeline.job import Done, Job
from pipeline.stage import Stage


class Shout(Stage):
    name = "shout"
    slots = 4

    async def handle(self, job: Job) -> Done:
        return Done({"answer": job.payload["query"] + "!"})


def build(settings):
    return Shout()
"""
    )
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path)])
    [stage] = build("shout", settings)
    assert isinstance(stage, Stage)
    async with running(settings, stage):
        completion = await ask(front, question(front, "hello", "shout"))
    monkeypatch.delitem(sys.modules, "stages.shout")
    assert completion.result == {"answer": "hello!"}
