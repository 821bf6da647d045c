"""Cancelling: at once where a job waits, by its worker where it runs, never twice, never too late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pipeline import keys
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.settings import Settings
from pipeline.stage import Outcome
from tests.conftest import PATIENCE_S, wait_until
from tests.rig import (
    Gate,
    Hand,
    Scripted,
    ScriptedBatch,
    ask,
    assert_nothing_is_left,
    bury,
    changed,
    complete,
    echo,
    everything,
    forward,
    outcome,
    query,
    release,
    retry,
    still,
    working,
)


async def test_queued_job_ends_at_once(link: Link, settings: Settings, front: Front) -> None:
    """Its entry is gone with it; its neighbours stay."""
    async with Hand(settings, "owner") as owner:
        jobs = [query(front) for _ in range(3)]
        for job in jobs:
            await front.submit(job)
        assert await front.cancel(jobs[1].id, "default") == "cancelled"
        found = await outcome(link, jobs[1].id)
        assert found is not None
        assert found.status == "cancelled"
        entries = await owner.take()
        assert [complete(entry).job_id for entry in entries] == [jobs[0].id, jobs[2].id]


async def test_delayed_job_ends_at_once(link: Link, settings: Settings, front: Front) -> None:
    """It is never promoted."""
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        await owner.settle(retry(await owner.take_one()))
        assert await front.cancel(job.id, "default") == "cancelled"
        found = await outcome(link, job.id)
        assert found is not None
        assert found.status == "cancelled"
    await assert_nothing_is_left(link)


async def test_running_job_is_stopped_by_its_worker(link: Link, settings: Settings, front: Front) -> None:
    """The handler is cancelled soon, the worker writes the outcome, others go on."""
    gate = Gate()
    async with working(settings, [Scripted("encoder", gate)]):
        job, other = (query(front, route=["encoder"]) for _ in range(2))
        for each in (job, other):
            await front.submit(each)
        await wait_until(lambda: len(gate.waiting) == 2)
        assert await front.cancel(job.id, "default") == "cancelling"
        async with asyncio.timeout(PATIENCE_S):
            completion = await front.wait(job.id, job.tenant, job.deadline_ms)
        assert completion.status == "cancelled"
        assert gate.stopped == [job.id]
        gate.open()
        assert (await front.wait(other.id, other.tenant, other.deadline_ms)).status == "completed"
    await assert_nothing_is_left(link)


async def test_ten_cancels_at_once_give_one_outcome(link: Link, settings: Settings, front: Front) -> None:
    """All callers hear that it is being cancelled, or is."""
    gate = Gate()
    async with working(settings, [Scripted("encoder", gate)]):
        job = query(front)
        await front.submit(job)
        await wait_until(lambda: gate.waiting)
        fronts = [Front(settings, f"other-{n}") for n in range(10)]
        words = await asyncio.gather(*(one.cancel(job.id, "default") for one in fronts))
        assert set(words) <= {"cancelling", "finished"}
        assert words[0] == "cancelling" or "cancelling" in words
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "cancelled"
        assert gate.stopped == [job.id]
        for one in fronts:
            await one.__aexit__(None, None, None)


async def test_finished_job_stays_as_it_is(link: Link, settings: Settings, front: Front) -> None:
    """Too late is told as too late."""
    async with working(settings, [Scripted("encoder", echo)]):
        job = query(front, route=["encoder"])
        before = await ask(front, job)
        assert await front.cancel(job.id, "default") == "finished"
        assert await outcome(link, job.id) == before


async def test_job_of_another_tenant_is_unknown(link: Link, settings: Settings, front: Front) -> None:
    """Waiting, running or finished: nothing changes, nothing is told."""
    async with Hand(settings, "owner") as owner:
        job = query(front, tenant="acme")
        await front.submit(job)
        for step in range(3):
            before = await everything(link)
            assert await front.cancel(job.id, "default") == "unknown"
            assert await front.cancel("no-such-job", "acme") == "unknown"
            assert await everything(link) == before
            if step == 0:
                entry = await owner.take_one()
            elif step == 1:
                await owner.settle(complete(entry))


async def test_mark_outlives_the_channel(link: Link, settings: Settings, front: Front) -> None:
    """A worker that did not hear of it lets the job end as cancelled at its next hop, retry or release."""
    for verb in (forward, retry, release):
        async with Hand(settings, "owner") as owner:
            job = query(front)
            await front.submit(job)
            entry = await owner.take_one()
            assert await front.cancel(job.id, "default") == "cancelling"
            assert await owner.settle(verb(entry)) == ["cancelled"]
            found = await outcome(link, job.id)
            assert found is not None
            assert found.status == "cancelled"
    await assert_nothing_is_left(link)


async def test_cancel_said_while_nobody_listened_is_obeyed(link: Link, settings: Settings, front: Front) -> None:
    """Pub/sub forgets; a worker that listens again looks at the marks of what it has in hand."""
    gate = Gate()
    async with working(settings, [Scripted("encoder", gate)]):
        jobs = [query(front) for _ in range(2)]
        for job in jobs:
            await front.submit(job)
        await wait_until(lambda: len(gate.waiting) == 2)
        await link.call("HSET", keys.LIVE + jobs[0].id, "cancel", "1")
        await link.call("CLIENT", "KILL", "TYPE", "pubsub")
        completion = await front.wait(jobs[0].id, jobs[0].tenant, jobs[0].deadline_ms)
        assert completion.status == "cancelled"
        assert gate.stopped == [jobs[0].id]
        gate.open()
        await wait_until(lambda: link.call("XLEN", keys.stream("retriever")))


async def test_work_that_was_done_all_the_same_counts(link: Link, settings: Settings, front: Front) -> None:
    """A completion that races with the mark stands, a failure too: cancelling asks, the settle decides."""
    async with Hand(settings, "owner") as owner:
        for verb, status in ((complete, "completed"), (bury, "failed")):
            job = query(front)
            await front.submit(job)
            entry = await owner.take_one()
            await front.cancel(job.id, "default")
            await owner.settle(verb(entry))
            found = await outcome(link, job.id)
            assert found is not None
            assert found.status == status


async def test_marked_job_is_not_run_by_the_heir(link: Link, settings: Settings, front: Front) -> None:
    """Its holder died before it could obey."""
    stage = Scripted("encoder", echo)
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        await owner.take_one()
        assert await front.cancel(job.id, "default") == "cancelling"
        await owner.die()
        async with working(changed(settings, worker={"lease_s": 0.5}), [stage]):
            assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "cancelled"
            assert stage.seen == []
    await assert_nothing_is_left(link)


async def test_batch_goes_on_while_one_of_its_jobs_is_wanted(link: Link, settings: Settings, front: Front) -> None:
    """One job cannot be taken out of a call; its outcome is `cancelled` all the same."""
    opened = asyncio.Event()

    async def hold(jobs: Sequence[Job]) -> Sequence[Outcome]:
        await opened.wait()
        return [Done({"answer": job.payload["query"]}) for job in jobs]

    stage = ScriptedBatch("encoder", hold)
    jobs = [query(front, route=["encoder"]) for _ in range(3)]
    for job in jobs:
        await front.submit(job)
    async with working(settings, [stage]) as (consumer,):
        await wait_until(lambda: stage.calls)
        assert await front.cancel(jobs[1].id, "default") == "cancelling"
        held = list(consumer.workers[0].held.values())
        await wait_until(lambda: [one.reason for one in held] == [None, "cancelled", None])
        opened.set()
        found = [await front.wait(job.id, job.tenant, job.deadline_ms) for job in jobs]
        assert [completion.status for completion in found] == ["completed", "cancelled", "completed"]
    await assert_nothing_is_left(link)


async def test_batch_is_stopped_when_none_of_its_jobs_is_wanted(link: Link, settings: Settings, front: Front) -> None:
    """Also when another entry of the same read had already ended before the call."""
    stopped = asyncio.Event()

    async def hold(jobs: Sequence[Job]) -> Sequence[Outcome]:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return []

    stage = ScriptedBatch("encoder", hold)
    await link.call("XADD", keys.stream("encoder"), "*", "data", "no job at all")
    jobs = [query(front) for _ in range(2)]
    for job in jobs:
        await front.submit(job)
    async with working(settings, [stage]):
        await wait_until(lambda: stage.calls)
        for job in jobs:
            assert not stopped.is_set()
            assert await front.cancel(job.id, "default") == "cancelling"
        async with asyncio.timeout(PATIENCE_S):
            await stopped.wait()
            found = [await front.wait(job.id, job.tenant, job.deadline_ms) for job in jobs]
        assert {completion.status for completion in found} == {"cancelled"}
    await assert_nothing_is_left(link)


async def test_cancel_heard_before_the_entry_arrived_is_obeyed(link: Link, settings: Settings, front: Front) -> None:
    """Redis had served the read, so the job counted as running; the hint overtook the reply."""
    stage = Scripted("encoder", echo)
    async with still(settings, stage) as consumer:
        (worker,) = consumer.workers
        job, mate = query(front, route=["encoder"]), query(front, route=["encoder"])
        for one in (job, mate):
            await front.submit(one)
        entries = await worker.streams.take(2)
        assert await front.cancel(job.id, "default") == "cancelling"
        worker.cancel(job.id)
        worker.start(entries)
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "cancelled"
        assert (await front.wait(mate.id, mate.tenant, mate.deadline_ms)).status == "completed"
        assert (stage.runs(job.id), stage.runs(mate.id)) == (0, 1)
    await assert_nothing_is_left(link)
