"""What failed runs again later, so often and no more; what is delayed is moved once when its time has come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pipeline import keys, scripts
from pipeline.connection import Link
from pipeline.errors import BrokerUnavailable, Reject, RetryLater
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.settings import Settings
from pipeline.stage import Outcome
from tests.conftest import wait_until
from tests.rig import (
    FIRST,
    Hand,
    Scripted,
    ScriptedBatch,
    ask,
    assert_nothing_is_left,
    changed,
    echo,
    letters,
    outcome,
    prompt,
    query,
    retry,
    working,
)


async def test_failing_job_ends_among_the_dead_letters(link: Link, settings: Settings, front: Front) -> None:
    """Four attempts, then the outcome `failed` and its story, in one step."""

    async def fail(job: Job) -> Done:
        raise RetryLater("the replica answered 500", code="replica_error")

    stage = Scripted("encoder", fail)
    async with working(settings, [stage]):
        job = query(front)
        completion = await ask(front, job)
        assert [seen.attempt for seen in stage.seen] == [1, 2, 3, 4]
        assert (completion.status, completion.attempts) == ("failed", 4)
        assert completion.error == {"type": "failed", "code": "replica_error", "message": "the replica answered 500"}
        (letter,) = await letters(link)
        assert letter["reason"] == "attempts_exhausted"
        assert letter["job_id"] == job.id
        assert letter["attempts"] == 4
        assert letter["deliveries"] == 1
        assert letter["error"]["code"] == "replica_error"
        assert '"query":"why?"' in letter["original"]
    await assert_nothing_is_left(link)


async def test_unknown_exception_is_retried(link: Link, settings: Settings, front: Front) -> None:
    """A handler's bug is a failed attempt like any other."""

    async def stumble(job: Job) -> Done:
        if job.attempt < 3:
            raise ZeroDivisionError
        return await echo(job)

    stage = Scripted("encoder", stumble)
    async with working(settings, [stage]):
        completion = await ask(front, query(front, route=["encoder"]))
        assert (completion.status, completion.attempts) == ("completed", 3)


async def test_answer_that_no_stream_can_carry_is_a_failed_attempt(
    link: Link, settings: Settings, front: Front
) -> None:
    """An object that is not JSON must not leave the job going round between reading and settling."""

    async def answer(job: Job) -> Done:
        return Done({"answer": object()})

    for route in (["encoder"], ["encoder", "retriever"]):
        stage = Scripted("encoder", answer)
        async with working(changed(settings, retry={"max_retries": 1}), [stage]):
            completion = await ask(front, query(front, route=route))
            assert completion.status == "failed"
            assert completion.error is not None
            assert completion.error["code"] == "handler_error"
            assert [job.attempt for job in stage.seen] == [1, 2]
            assert stage.seen[1].state == {}


@pytest.mark.parametrize("wrong", [None, {"answer": "x"}, [1]])
async def test_wrong_kind_of_answer_is_a_failed_attempt(
    link: Link, settings: Settings, front: Front, wrong: object
) -> None:
    """A handler that forgot to return `Done`."""

    async def answer(job: Job) -> Done:
        return wrong  # type: ignore[return-value]  # the defect under test

    async with working(changed(settings, retry={"max_retries": 0}), [Scripted("encoder", answer)]):
        completion = await ask(front, query(front))
        assert completion.error is not None
        assert (completion.status, completion.error["code"]) == ("failed", "handler_error")


async def test_batch_stage_with_too_few_answers_fails_its_jobs(link: Link, settings: Settings, front: Front) -> None:
    """One outcome per job, or none of them counts."""

    async def one_short(jobs: list[Job]) -> list[Outcome]:
        return [Done({})] * (len(jobs) - 1)

    stage = ScriptedBatch("encoder", one_short)  # type: ignore[arg-type]  # lists are sequences
    async with working(changed(settings, retry={"max_retries": 0}), [stage]):
        found = await asyncio.gather(*(ask(front, query(front, route=["encoder"])) for _ in range(3)))
        assert {completion.status for completion in found} == {"failed"}


async def test_batch_that_fails_is_tried_one_by_one(link: Link, settings: Settings, front: Front) -> None:
    """One bad job does not take its neighbours along."""

    async def handle(jobs: list[Job]) -> list[Outcome]:
        if any(job.payload["query"] == "bad" for job in jobs):
            raise Reject("cannot be encoded", code="bad_text")
        return [Done({"answer": job.payload["query"]}) for job in jobs]

    stage = ScriptedBatch("encoder", handle)  # type: ignore[arg-type]  # lists are sequences
    jobs = [query(front, text, route=["encoder"]) for text in ("a", "bad", "c")]
    for job in jobs:
        await front.submit(job)
    async with working(settings, [stage]):
        found = [await front.wait(job.id, job.tenant, job.deadline_ms) for job in jobs]
        assert [completion.status for completion in found] == ["completed", "failed", "completed"]
        assert stage.calls == [[job.id for job in jobs], *([job.id] for job in jobs)]


async def test_reject_is_not_tried_again(link: Link, settings: Settings, front: Front) -> None:
    """It can never succeed."""

    async def reject(job: Job) -> Done:
        raise Reject("longer than the context", code="context_too_long")

    stage = Scripted("encoder", reject)
    async with working(settings, [stage]):
        completion = await ask(front, query(front))
        assert completion.error is not None
        assert (completion.status, completion.error["code"]) == ("failed", "context_too_long")
        assert len(stage.seen) == 1
        assert [letter["reason"] for letter in await letters(link)] == ["context_too_long"]


async def test_uncharged_refusals_keep_the_attempt(link: Link, settings: Settings, front: Front) -> None:
    """A refused connection may happen more often than there are attempts."""
    refusals = 6

    async def refuse(job: Job) -> Done:
        if len(stage.seen) <= refusals:
            raise RetryLater("no replica", code="no_replica", charged=False, after_s=0.01)
        return await echo(job)

    stage = Scripted("encoder", refuse)
    async with working(settings, [stage]):
        completion = await ask(front, query(front, route=["encoder"]))
        assert (completion.status, completion.attempts) == ("completed", 1)
        assert [job.attempt for job in stage.seen] == [1] * (refusals + 1)


async def test_attempts_count_anew_at_each_stage(link: Link, settings: Settings, front: Front) -> None:
    """What the encoder needed is not charged to the llm stage."""

    async def stumble(job: Job) -> Done:
        if job.attempt < 3:
            raise RetryLater("not yet", code="busy")
        return await echo(job)

    stages = [Scripted(name, stumble) for name in ("encoder", "retriever", "llm")]
    async with working(settings, stages):
        assert (await ask(front, query(front))).status == "completed"
        assert [[job.attempt for job in stage.seen] for stage in stages] == [[1, 2, 3]] * 3


async def test_wait_asked_for_by_the_other_side_is_obeyed(link: Link, settings: Settings, front: Front) -> None:
    """Retry-After is the least wait, jitter comes on top."""

    async def busy(job: Job) -> Done:
        raise RetryLater("too many requests", code="rate_limited", charged=False, after_s=5.0)

    async with working(settings, [Scripted("encoder", busy)]):
        job = query(front)
        await front.submit(job)
        await wait_until(lambda: link.call("ZSCORE", keys.DELAYED, job.id))
        due_ms = float(await link.call("ZSCORE", keys.DELAYED, job.id))
        assert 4_000 < due_ms - front.clock.now_ms() <= 5_700
        await front.cancel(job.id, job.tenant)


async def test_delayed_job_is_promoted_once_by_many_tickers(link: Link, settings: Settings, front: Front) -> None:
    """Each worker ticks; a job is either delayed or on its stream."""
    async with Hand(settings, "owner") as owner:
        for _ in range(40):
            await front.submit(query(front))
        entries = await owner.take()
        await owner.settle(*[retry(entry, 0 if n < 30 else 60_000) for n, entry in enumerate(entries)])
        links = [Link(settings.redis, f"ticker-{n}") for n in range(4)]
        replies = await asyncio.gather(
            *(one.run(scripts.PROMOTE, (), (7, "one", 100)) for one in links for _ in range(3))
        )
        assert sum(reply[1] for reply in replies) == 30
        assert max(reply[1] for reply in replies) <= 7
        assert await link.call("ZCARD", keys.DELAYED) == 10
        promoted = [entry.data for entry in await owner.take()]
        assert len(promoted) == len(set(promoted)) == 30
        for one in links:
            await one.close()


async def test_retry_on_the_llm_stage_drops_lease_and_place(link: Link, settings: Settings, front: Front) -> None:
    """A job that waits bears on no replica."""
    waiting = asyncio.Event()

    async def busy(job: Job) -> Done:
        waiting.set()
        raise RetryLater("busy", code="busy", after_s=60.0)

    async with working(changed(settings, llm={"urls": (FIRST,)}), [Scripted("llm", busy, placed=True)]):
        job = prompt(front)
        await front.submit(job)
        await wait_until(lambda: link.call("ZSCORE", keys.DELAYED, job.id))
        assert waiting.is_set()
        assert await link.call("GET", keys.LOAD + FIRST) == b"0"
        assert await link.call("EXISTS", keys.RUNNING + FIRST, keys.LEASES + FIRST) == 0
        await front.cancel(job.id, job.tenant)
        assert await outcome(link, job.id) is not None


def cancelled_future() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    return future


async def test_handlers_own_cancellation_is_a_failed_attempt(link: Link, settings: Settings, front: Front) -> None:
    """Something it waited for was cancelled: nobody asked the job to stop."""

    async def handle(job: Job) -> Done:
        await cancelled_future()
        return await echo(job)

    stage = Scripted("encoder", handle)
    async with working(changed(settings, retry={"max_retries": 1}), [stage]):
        completion = await ask(front, query(front, route=["encoder"]))
        assert (completion.status, completion.attempts) == ("failed", 2)
        assert [job.attempt for job in stage.seen] == [1, 2]
    await assert_nothing_is_left(link)


async def test_batchs_own_cancellation_is_a_failed_attempt(link: Link, settings: Settings, front: Front) -> None:
    """Of each of its jobs."""

    async def handle(jobs: Sequence[Job]) -> list[Outcome]:
        await cancelled_future()
        return []

    jobs = [query(front, route=["encoder"]) for _ in range(3)]
    for job in jobs:
        await front.submit(job)
    async with working(changed(settings, retry={"max_retries": 1}), [ScriptedBatch("encoder", handle)]):
        found = [await front.wait(job.id, job.tenant, job.deadline_ms) for job in jobs]
        assert [(completion.status, completion.attempts) for completion in found] == [("failed", 2)] * 3
    await assert_nothing_is_left(link)


async def test_redis_trouble_inside_a_handler_is_not_charged(link: Link, settings: Settings, front: Front) -> None:
    """It is ours to mend, not the job's doing."""

    async def handle(job: Job) -> Done:
        if len(stage.seen) < 3:
            raise BrokerUnavailable("away")
        return await echo(job)

    stage = Scripted("encoder", handle)
    async with working(changed(settings, retry={"max_retries": 0}), [stage]):
        completion = await ask(front, query(front, route=["encoder"]))
        assert (completion.status, completion.attempts) == ("completed", 1)
        assert [job.attempt for job in stage.seen] == [1, 1, 1]


@pytest.mark.parametrize("charged", [False, True])
async def test_outcome_written_while_waiting_counts_charged_attempts(
    link: Link, settings: Settings, front: Front, charged: bool
) -> None:
    """A refusal that did no work is none."""

    async def handle(job: Job) -> Done:
        raise RetryLater("busy", code="busy", charged=charged, after_s=60)

    async with working(settings, [Scripted("encoder", handle)]):
        job = query(front, route=["encoder"])
        await front.submit(job)
        await wait_until(lambda: link.call("ZCARD", keys.DELAYED))
        assert await front.cancel(job.id, "default") == "cancelled"
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).attempts == charged
