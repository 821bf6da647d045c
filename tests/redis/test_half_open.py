"""Half-open connections: each of a worker's dies silently, one at a time, and the worker goes on by itself."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator

import pytest

from pipeline import metrics, streams
from pipeline.connection import Link
from pipeline.consumer import STEADY_S
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.rig import (
    FIRST,
    Gate,
    Hand,
    Mortal,
    Scripted,
    ask,
    assert_nothing_is_left,
    changed,
    echo,
    prompt,
    query,
    working,
)
from tests.servers import RedisServer
from tests.wire import Wire

LONG_S = 60.0
"""The most that a reply may be waited for: what comes in half of that has not waited for one."""


@pytest.fixture
async def wire(link: Link, redis_server: RedisServer) -> AsyncIterator[Wire]:
    async with Wire(redis_server) as one:
        yield one


@pytest.fixture
def wired(settings: Settings, wire: Wire) -> Settings:
    """Settings of workers whose connections can die silently."""
    return changed(settings, redis={"url": wire.url}, llm={"urls": (FIRST,)})


def count_renewals(consumer: Mortal) -> list[int]:
    """Return a list that grows with every renewal that Redis answered."""
    done: list[int] = []
    run = consumer._link.run

    async def counted(*args: object, **more: object) -> object:
        reply = await run(*args, **more)  # type: ignore[arg-type]  # passes on what it was given
        done.append(len(done))
        return reply

    consumer._link.run = counted  # type: ignore[method-assign]  # counts
    return done


async def test_lease_does_not_wait_for_another_connection(
    link: Link, wired: Settings, wire: Wire, front: Front
) -> None:
    """Taking up and registering go over the control connection; what hangs there costs no lease."""
    wired = changed(wired, redis={"reply_timeout_s": LONG_S}, worker={"lease_s": 10.0})
    lost = metrics.LEASES_LOST._value.get()
    gate = Gate()
    async with working(wired, [Scripted("llm", gate, placed=True), Scripted("encoder", echo)]) as (consumer, _):
        job = prompt(front)
        await front.submit(job)
        await wait_until(lambda: gate.waiting)
        wire.kill("llm-control")
        renewals = count_renewals(consumer)
        await wait_until(lambda: len(renewals) == 3, timeout_s=LONG_S / 2)
        assert metrics.LEASES_LOST._value.get() == lost
        gate.open()
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
        assert gate.stopped == []
        await consumer.crash()  # draining would wait for the control connection
    await assert_nothing_is_left(link)


async def test_dead_lease_connection_is_replaced_within_the_lease(
    link: Link, wired: Settings, wire: Wire, front: Front
) -> None:
    """The renewal's own reply is waited for a third of a lease, however long others wait for theirs."""
    lost = metrics.LEASES_LOST._value.get()
    wired = changed(wired, redis={"reply_timeout_s": LONG_S}, worker={"lease_s": 10.0})
    async with working(wired, [Scripted("encoder", echo)]) as (consumer,):
        renewals = count_renewals(consumer)
        await wait_until(lambda: renewals)
        wire.kill("lease")
        seen = len(renewals)
        await wait_until(lambda: len(renewals) == seen + 2, timeout_s=LONG_S / 2)
        assert metrics.LEASES_LOST._value.get() == lost


@pytest.fixture
def brief(wired: Settings) -> Settings:
    """A reply is taken as lost after a second, so that a test need not wait for five."""
    return changed(wired, redis={"reply_timeout_s": 1.0})


async def test_entry_served_to_a_dead_reader_does_not_wait_for_it(
    link: Link, wired: Settings, wire: Wire, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renewal finds it; the reader is missed much later only."""
    monkeypatch.setattr(streams, "BLOCK_MS", int(LONG_S * 1000))
    wired = changed(wired, redis={"reply_timeout_s": LONG_S})
    stage = Scripted("encoder", echo)
    async with working(wired, [stage]) as (consumer,):
        await wait_until(lambda: _is_reading(link))
        wire.kill("encoder-reader")
        job = query(front, route=["encoder"])
        began = time.monotonic()
        assert (await ask(front, job)).status == "completed"
        assert time.monotonic() - began < LONG_S / 2
        assert stage.runs(job.id) == 1
        await consumer.crash()  # draining would wait for the reader
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("name", ["reader", "settler", "control"])
@pytest.mark.parametrize("stage_name", ["encoder", "llm"])
async def test_work_goes_on_past_a_dead_connection(
    link: Link, brief: Settings, wire: Wire, front: Front, name: str, stage_name: str
) -> None:
    """Read, handled and settled once each, in time: the loss is noticed, and made good."""
    stage = Scripted(stage_name, echo, placed=stage_name == "llm")
    async with working(brief, [stage]):
        await ask(front, query(front, route=[stage_name]))
        wire.kill(f"{stage_name}-{name}")
        jobs = [query(front, route=[stage_name]) for _ in range(3)]
        found = await asyncio.gather(*(ask(front, job) for job in jobs))
        assert {completion.status for completion in found} == {"completed"}
        assert [stage.runs(job.id) for job in jobs] == [1, 1, 1]
    await assert_nothing_is_left(link)


async def test_retry_is_promoted_past_a_dead_ticker(link: Link, brief: Settings, wire: Wire, front: Front) -> None:
    """Here nobody else ticks."""
    failures = iter([RuntimeError("once")])

    async def fail_once(job: Job) -> Done:
        for error in failures:
            raise error
        return await echo(job)

    async with working(brief, [Scripted("encoder", fail_once)]):
        await wait_until(lambda: wire.knows("tick"))
        wire.kill("tick")
        assert (await ask(front, query(front, route=["encoder"]))).status == "completed"
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("name", ["listen", "encoder-control"])
async def test_cancelling_is_heard_past_a_dead_connection(
    link: Link, brief: Settings, wire: Wire, front: Front, name: str
) -> None:
    """A silent subscription is probed; what was published meanwhile stands in the live record."""
    gate = Gate()
    async with working(brief, [Scripted("encoder", gate)]):
        job = query(front, route=["encoder"])
        await front.submit(job)
        await wait_until(lambda: gate.waiting)
        await wait_until(lambda: wire.knows("listen"))
        wire.kill(name)
        assert await front.cancel(job.id, "default") == "cancelling"
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "cancelled"
    await assert_nothing_is_left(link)


@pytest.mark.parametrize(("name", "reply_s"), [("encoder-control", 1.0), ("retriever-control", LONG_S)])
async def test_dead_workers_jobs_are_claimed_past_a_dead_connection(
    link: Link,
    settings: Settings,
    wired: Settings,
    wire: Wire,
    front: Front,
    name: str,
    reply_s: float,
) -> None:
    """Once the new connection has held for a while (here for a lease), over two looks.

    One stage's connection does not hold up the claims of another stage in the same process.
    """
    wired = changed(wired, redis={"reply_timeout_s": reply_s})
    assert wired.worker.lease_s < STEADY_S
    stages = [Scripted("retriever", echo), Scripted("encoder", echo)]
    job = query(front, route=["encoder"])
    async with Hand(settings, "dead") as dead:
        await front.submit(job)
        await dead.take_one()
        consumer = Mortal(stages, wired)
        async with asyncio.TaskGroup() as group:
            consumer.task = group.create_task(consumer.run())
            await wait_until(lambda: all(worker.not_ready is None for worker in consumer.workers))
            wire.kill(name)
            began = time.monotonic()
            await dead.die()
            assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
            assert time.monotonic() - began < LONG_S / 2
            await consumer.crash()  # draining would wait for the connection
    await assert_nothing_is_left(link)


async def _is_reading(link: Link) -> bool:
    """Say whether Redis holds a blocked read of the encoder's worker."""
    clients: bytes = await link.call("CLIENT", "LIST")
    return re.search(rb"name=encoder-reader .*flags=\S*b", clients) is not None
