"""Every job has a deadline, and ends at it wherever it is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pipeline import keys, scripts
from pipeline.balancing import Replica
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.settings import Settings
from pipeline.stage import Outcome
from pipeline.streams import Entry, Streams
from tests.conftest import wait_until
from tests.rig import (
    FIRST,
    Gate,
    Hand,
    Scripted,
    ScriptedBatch,
    ask,
    assert_nothing_is_left,
    changed,
    complete,
    echo,
    everything,
    outcome,
    prompt,
    query,
    retry,
    still,
    working,
)

STREAM = keys.stream("encoder")


async def expire(link: Link) -> tuple[int, int]:
    """Run the tick that ends jobs at their deadline; return how many expired and how many were lost."""
    _, expired, lost = await link.run(scripts.EXPIRE, (), (100, 60_000))
    return expired, lost


async def pass_deadline(link: Link, *job_ids: str) -> None:
    """Let the deadline of these jobs lie in the past, for the tick."""
    for job_id in job_ids:
        await link.call("ZADD", keys.LIVE_INDEX, "XX", 1, job_id)


async def code_of(link: Link, job_id: str) -> tuple[str, str]:
    found = await outcome(link, job_id)
    assert found is not None
    assert found.error is not None
    return found.status, found.error["code"]


async def test_job_expires_while_queued(link: Link, settings: Settings, front: Front) -> None:
    """Nobody reads the stream; the others stay."""
    async with Hand(settings, "owner") as owner:
        late, early = query(front), query(front)
        for job in (late, early):
            await front.submit(job)
        await pass_deadline(link, late.id)
        assert await expire(link) == (1, 0)
        assert await code_of(link, late.id) == ("expired", "deadline_exceeded")
        (entry,) = await owner.take()
        assert complete(entry).job_id == early.id
        await owner.settle(complete(entry))
    await assert_nothing_is_left(link)


async def test_job_expires_while_delayed(link: Link, settings: Settings, front: Front) -> None:
    """Its next attempt would come after the deadline."""
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        await owner.settle(retry(await owner.take_one()))
        await pass_deadline(link, job.id)
        assert await expire(link) == (1, 0)
        assert await code_of(link, job.id) == ("expired", "deadline_exceeded")
    await assert_nothing_is_left(link)


async def test_job_expires_in_the_hands_of_a_dead_consumer(link: Link, settings: Settings, front: Front) -> None:
    """A living one is left to end it itself."""
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        entry = await owner.take_one()
        await pass_deadline(link, job.id)
        assert await expire(link) == (0, 0)
        await pass_deadline(link, job.id)
        await owner.die()
        assert await expire(link) == (1, 0)
        assert await code_of(link, job.id) == ("expired", "deadline_exceeded")
        before = await everything(link)
        assert await owner.settle(complete(entry)) == ["lost"]
        assert await everything(link) == before
    await assert_nothing_is_left(link)


async def test_running_handler_is_stopped_at_the_deadline(link: Link, settings: Settings, front: Front) -> None:
    """The worker writes the outcome."""
    gate = Gate()
    async with working(settings, [Scripted("encoder", gate)]):
        job = query(front, lifetime_s=0.3)
        completion = await ask(front, job)
        assert gate.stopped == [job.id]
        assert completion.error is not None
        assert (completion.status, completion.error["code"]) == ("expired", "deadline_exceeded")
        assert completion.worker is not None
        assert completion.finished_us >= job.deadline_ms * 1000 - 50_000  # a clock may grow sharper meanwhile
    await assert_nothing_is_left(link)


async def test_no_stage_starts_an_expired_job(link: Link, settings: Settings, front: Front) -> None:
    """It was read in time to be ended, not to be run."""
    stage = Scripted("encoder", echo)
    async with still(settings, stage) as consumer:
        job = query(front, lifetime_s=0.001)
        await front.submit(job)
        await wait_until(lambda: consumer.clock.now_ms() > job.deadline_ms)
        (worker,) = consumer.workers
        worker.start(await worker.streams.take(1))
        completion = await front.wait(job.id, job.tenant, job.deadline_ms)
        assert completion.status == "expired"
        assert completion.worker == worker.name
        assert stage.seen == []


async def test_a_handlers_own_timeout_is_no_deadline(link: Link, settings: Settings, front: Front) -> None:
    """A TimeoutError of the handler is a failed attempt."""

    async def time_out(job: Job) -> Outcome:
        raise TimeoutError("the replica is slow")

    async with working(changed(settings, retry={"max_retries": 0}), [Scripted("encoder", time_out)]):  # type: ignore[arg-type]
        completion = await ask(front, query(front))
        assert completion.error is not None
        assert (completion.status, completion.error["code"]) == ("failed", "handler_error")


async def test_batch_is_stopped_at_its_last_deadline(link: Link, settings: Settings, front: Front) -> None:
    """All its jobs expire."""

    async def hang(jobs: list[Job]) -> list[Outcome]:
        await asyncio.Event().wait()
        return []

    async with working(settings, [ScriptedBatch("encoder", hang)]):  # type: ignore[arg-type]  # lists are sequences
        found = await asyncio.gather(*(ask(front, query(front, lifetime_s=0.3)) for _ in range(3)))
        assert {completion.status for completion in found} == {"expired"}


async def test_entry_deleted_by_hand_is_lost_at_the_deadline(link: Link, settings: Settings, front: Front) -> None:
    """Not before: its job might be between two streams for all that the tick can see."""
    job = query(front)
    async with Hand(settings, "owner"):
        await front.submit(job)
        await link.call("XDEL", STREAM, await link.call("HGET", keys.LIVE + job.id, "entry"))
        assert await expire(link) == (0, 0)
        await pass_deadline(link, job.id)
        assert await expire(link) == (0, 1)
        assert await code_of(link, job.id) == ("failed", "lost")
    await assert_nothing_is_left(link)


async def test_stream_deleted_by_hand_loses_its_jobs_at_the_deadline(link: Link, front: Front) -> None:
    """Group and all."""
    job = query(front)
    await front.submit(job)
    await link.call("DEL", STREAM)
    await pass_deadline(link, job.id)
    assert await expire(link) == (0, 1)
    assert await code_of(link, job.id) == ("failed", "lost")


@pytest.mark.parametrize("retried", [False, True])
async def test_expired_job_gives_back_its_lease(link: Link, settings: Settings, front: Front, retried: bool) -> None:
    """However it ends, the replica's load falls."""
    async with Hand(settings, "owner", "llm", placed=True) as owner:
        job = prompt(front)
        await front.submit(job)
        (entry,) = (await owner.streams.place([Replica(FIRST, slots=1)], [[FIRST]])).entries
        if retried:
            await owner.settle(retry(entry))
        await owner.die()
        await pass_deadline(link, job.id)
        assert await expire(link) == (1, 0)
        assert await link.call("GET", keys.LOAD + FIRST) == b"0"
    await assert_nothing_is_left(link)


async def test_waiting_jobs_expire_by_themselves(link: Link, settings: Settings, front: Front) -> None:
    """Any worker's tick ends the jobs of every stage, in real time."""
    async with working(settings, [Scripted("llm", echo)]):
        found = await asyncio.gather(*(ask(front, query(front, lifetime_s=0.2)) for _ in range(5)))
        assert {completion.status for completion in found} == {"expired"}
        await wait_until(lambda: _no_live(link))
    await assert_nothing_is_left(link)


async def _no_live(link: Link) -> bool:
    return int(await link.call("ZCARD", keys.LIVE_INDEX)) == 0


async def test_deadline_that_comes_while_a_mate_waits_for_redis_is_seen(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's entry is adopted first, which takes as long as Redis is away; nothing late is started after that."""
    late, good = query(front, "late", lifetime_s=1.0), query(front, "good")
    started: list[str] = []
    adopt = Streams.adopt

    async def slowly(self: Streams, entry: Entry, job: Job) -> object:
        await wait_until(lambda: front.clock.now_ms() > late.deadline_ms)
        return await adopt(self, entry, job)

    async def note(jobs: Sequence[Job]) -> Sequence[Outcome]:
        started.extend(job.payload["query"] for job in jobs)
        return [Done({}) for _ in jobs]

    monkeypatch.setattr(Streams, "adopt", slowly)
    await link.call("XADD", STREAM, "*", "data", '{"id":"a1","query":"from outside"}')
    for job in (late, good):
        await front.submit(job)
    async with working(settings, [ScriptedBatch("encoder", note)]):
        await wait_until(lambda: "from outside" in started)
        expired = await front.wait(late.id, late.tenant, late.deadline_ms)
    assert (expired.status, "late" in started, "good" in started) == ("expired", False, True)
