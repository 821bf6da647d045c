"""Webhooks on a real Redis: secrets, retries by schedule, the story that an outcome tells, and at least once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from typing import Any

import orjson
import pytest

from pipeline import flows, keys, scripts
from pipeline.connection import Link
from pipeline.errors import RotatedLately
from pipeline.front import Front
from pipeline.job import Job, new_id
from pipeline.settings import Settings
from pipeline.webhooks import OVERLAP_S, Secrets, new_webhook_id
from stages.webhook import build
from tests.conftest import PATIENCE_S, wait_until
from tests.receivers import Receiver, answer, receiving, stay_silent
from tests.rig import LIFE_S, assert_nothing_is_left, changed, letters, outcome, working

RESULTS = {"batch_id": "b1", "status": "completed", "results": [{"message_id": "m1", "status": "completed"}]}
QUEUE = "acme:orders"


@pytest.fixture
async def kept(link: Link) -> None:
    """The results of a batch."""
    await link.call("SET", keys.BATCH_RESULTS + "b1", orjson.dumps(RESULTS), "PX", 60_000)


@pytest.fixture
def outside(settings: Settings) -> Settings:
    """Settings with which loopback may be called."""
    return changed(settings, webhook={"allow_private": True})


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of three retries that no test waits for."""
    monkeypatch.setitem(flows.FLOWS, "webhook", replace(flows.FLOWS["webhook"], retries_s=(0.01, 0.02, 0.03)))


def webhook(front: Front, url: str, lifetime_s: float = LIFE_S, **payload: Any) -> Job:
    """A webhook's job, as a batch's end starts it."""
    told = flows.WebhookPayload(
        url=url, event="batch.completed", webhook_id=new_webhook_id(), queue=QUEUE, batch_id="b1", **payload
    )
    return flows.new_job(
        "webhook", told, job_id=new_id(), now_ms=front.clock.now_ms(), lifetime_s=lifetime_s, tenant="acme"
    )


# --- secrets ------------------------------------------------------------------------------------


async def test_whoever_asks_at_once_gets_the_same_secret(front: Front, link: Link) -> None:
    """One is made, for each queue its own."""
    found = await asyncio.gather(*(front.secrets(QUEUE) for _ in range(20)), front.secrets("other"))
    assert len({secrets.current for secrets in found[:-1]}) == 1
    assert found[-1].current != found[0].current
    assert found[0].current.startswith("whsec_")
    assert found[0].before is None
    assert "whsec_" not in repr(found[0])
    assert await link.call("HGET", keys.QUEUE + QUEUE, "secret") == found[0].current.encode()


async def test_a_rotated_secret_signs_for_a_day(front: Front, link: Link) -> None:
    """Beside the new one; then it is gone."""
    first = await front.secrets(QUEUE)
    second = await front.rotate_secret(QUEUE)
    assert second.current != first.current
    assert second.before == first.current
    assert await front.secrets(QUEUE) == second
    until_ms = int(await link.call("HGET", keys.QUEUE + QUEUE, "secret_before_until_ms"))
    assert abs(until_ms - front.clock.now_ms() - OVERLAP_S * 1000) < 10_000
    await link.call("HSET", keys.QUEUE + QUEUE, "secret_before_until_ms", front.clock.now_ms() - 1_000)
    assert (await front.secrets(QUEUE)).before is None
    assert await link.call("HKEYS", keys.QUEUE + QUEUE) == [b"secret"]


async def test_a_secret_is_not_rotated_twice_within_its_day(front: Front, link: Link) -> None:
    """The receiver may still have the first one, which would end at once."""
    first = await front.secrets(QUEUE)
    second = await front.rotate_secret(QUEUE)
    with pytest.raises(RotatedLately):
        await front.rotate_secret(QUEUE)
    assert await front.secrets(QUEUE) == Secrets(second.current, first.current)
    await link.call("HSET", keys.QUEUE + QUEUE, "secret_before_until_ms", front.clock.now_ms() - 1_000)
    third = await front.rotate_secret(QUEUE)
    assert third.before == second.current


async def test_a_secret_leaves_a_queues_other_fields_alone(front: Front, link: Link) -> None:
    """They are its defaults."""
    await link.call("HSET", keys.QUEUE + QUEUE, "model", "m")
    await front.secrets(QUEUE)
    await front.rotate_secret(QUEUE)
    assert await link.call("HGET", keys.QUEUE + QUEUE, "model") == b"m"


# --- the life of a webhook ----------------------------------------------------------------------


@pytest.mark.usefixtures("kept", "soon")
async def test_a_receiver_that_comes_back_is_told(link: Link, front: Front, outside: Settings) -> None:
    """The attempts travel with the job and stand in its outcome; the news is one and the same."""
    secret = (await front.secrets(QUEUE)).current
    async with receiving([answer(500), answer(302)]) as receiver, working(outside, [build(outside)]):
        job = webhook(front, receiver.url)
        await front.submit(job)
        completion = await front.wait(job.id, "acme", job.deadline_ms)
    assert (completion.status, completion.attempts) == ("completed", 3)
    assert completion.result is not None
    assert [attempt["status"] for attempt in completion.result["attempts"]] == [500, 302, 204]
    assert {news.id for news in receiver.got} == {job.payload["webhook_id"]}
    assert len({news.raw for news in receiver.got}) == 1
    assert [news.verified(secret)["data"] for news in receiver.got] == [RESULTS] * 3
    await assert_nothing_is_left(link)


@pytest.mark.usefixtures("kept", "soon")
async def test_a_receiver_that_never_comes_back_is_given_up(link: Link, front: Front, outside: Settings) -> None:
    """With its story in the outcome and among the dead letters."""
    async with receiving([answer(500)] * 9) as receiver, working(outside, [build(outside)]):
        job = webhook(front, receiver.url)
        await front.submit(job)
        completion = await front.wait(job.id, "acme", job.deadline_ms)
    assert (completion.status, len(receiver.got)) == ("failed", 4)
    assert completion.error is not None
    assert completion.error["code"] == "bad_status"
    assert completion.result is not None
    assert completion.result["url"] == receiver.url
    assert [attempt["status"] for attempt in completion.result["attempts"]] == [500] * 4
    (letter,) = await letters(link)
    assert (letter["reason"], letter["job_id"]) == ("attempts_exhausted", job.id)


@pytest.mark.usefixtures("kept")
async def test_410_is_the_end_at_once(link: Link, front: Front, outside: Settings) -> None:
    """Failed, code `gone`, after one attempt."""
    async with receiving([answer(410)]) as receiver, working(outside, [build(outside)]):
        job = webhook(front, receiver.url)
        await front.submit(job)
        completion = await front.wait(job.id, "acme", job.deadline_ms)
    assert completion.error is not None
    assert (completion.status, completion.error["code"], len(receiver.got)) == ("failed", "gone", 1)
    assert completion.result is not None
    assert [attempt["status"] for attempt in completion.result["attempts"]] == [410]


@pytest.mark.usefixtures("kept")
async def test_a_webhook_waits_as_its_schedule_says(link: Link, front: Front, outside: Settings) -> None:
    """Five seconds after the first attempt, a tenth more at most; whoever looks sees when, and what was."""
    async with receiving([answer(500)]) as receiver, working(outside, [build(outside)]):
        job = webhook(front, receiver.url)
        await front.submit(job, wait=False)
        await wait_until(lambda: link.call("ZSCORE", keys.DELAYED, job.id))
        standing = await front.standing(job.id, "acme")
        assert standing is not None
        assert (standing.where, standing.job.attempt) == ("queued", 2)
        (attempt,) = standing.job.state["attempts"]
        assert standing.due_ms is not None
        assert 5_000 <= standing.due_ms - attempt["at_ms"] <= 5_500 + 2_000
        assert await front.standing(job.id, "another") is None
        assert await front.cancel(job.id, "acme") == "cancelled"
    await assert_nothing_is_left(link)


@pytest.mark.usefixtures("kept")
async def test_a_wait_that_is_cut_short_keeps_its_story(link: Link, front: Front, outside: Settings) -> None:
    """Cancelled or expired while nobody held it: the script that ends it tells of the attempts too."""
    async with receiving([answer(500), answer(503)]) as receiver, working(outside, [build(outside)]):
        jobs = [webhook(front, receiver.url), webhook(front, receiver.url)]
        for job in jobs:
            await front.submit(job, wait=False)
            await wait_until(lambda job=job: link.call("ZSCORE", keys.DELAYED, job.id))  # type: ignore[misc]
        await front.cancel(jobs[0].id, "acme")
        await link.call("ZADD", keys.LIVE_INDEX, 1, jobs[1].id)  # its deadline has passed
        await link.run(scripts.EXPIRE, (), (10, 60_000))
    for job, status, said in zip(jobs, ("cancelled", "expired"), (500, 503), strict=True):
        completion = await outcome(link, job.id)
        assert completion is not None
        assert completion.status == status
        assert completion.result is not None
        assert completion.result["webhook_id"] == job.payload["webhook_id"]
        assert [attempt["status"] for attempt in completion.result["attempts"]] == [said]


# --- at least once ------------------------------------------------------------------------------


@pytest.mark.usefixtures("kept")
async def test_a_stage_killed_before_it_could_note_the_answer_tells_again(
    link: Link, front: Front, outside: Settings
) -> None:
    """Killed between the receiver's 200 and the settle: told again under the same id. Once settled, never again."""
    environ = os.environ | {
        "PENSTOCK_REDIS__URL": outside.redis.url,
        "PENSTOCK_WEBHOOK__ALLOW_PRIVATE": "true",
        "PENSTOCK_WORKER__LEASE_S": "1",
    }
    async with receiving() as receiver:
        job = webhook(front, receiver.url)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "stages", "webhook", env=environ, stdout=asyncio.subprocess.DEVNULL
        )
        try:
            await wait_until(lambda: link.call("KEYS", keys.WORKER + "*"))
            answered = asyncio.Event()

            async def hold(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
                await link.call("CLIENT", "PAUSE", 30_000, "WRITE")
                await answer(200)(receiver, writer)
                answered.set()

            receiver.behaviours.append(hold)
            await front.submit(job, wait=False)
            await asyncio.wait_for(answered.wait(), PATIENCE_S)
            await wait_until(lambda: _is_settling(link))
        finally:
            process.send_signal(signal.SIGKILL)
            await process.wait()
        await wait_until(lambda: _has_gone(link))
        await link.call("CLIENT", "UNPAUSE")
        assert await outcome(link, job.id) is None
        assert len(receiver.got) == 1
        async with working(outside, [build(outside)]):
            completion = await front.wait(job.id, "acme", job.deadline_ms)
            assert completion.status == "completed"
            assert [news.id for news in receiver.got] == [job.payload["webhook_id"]] * 2
    await assert_nothing_is_left(link)


@pytest.mark.usefixtures("kept")
async def test_a_stage_that_stalls_is_not_believed_afterwards(link: Link, front: Front, outside: Settings) -> None:
    """It crashed in the middle of an attempt: another makes the attempt, with the state that was settled last."""
    async with receiving([stay_silent]) as receiver:
        async with working(outside, [build(outside)]) as (first,):
            job = webhook(front, receiver.url)
            await front.submit(job, wait=False)
            await receiver.told.wait()
            await first.crash()
        async with working(outside, [build(outside)]):
            completion = await front.wait(job.id, "acme", job.deadline_ms)
    assert completion.status == "completed"
    assert completion.result is not None
    assert [attempt["status"] for attempt in completion.result["attempts"]] == [204]
    assert [news.id for news in receiver.got] == [job.payload["webhook_id"]] * 2


async def _clients(link: Link) -> list[str]:
    text: bytes = await link.call("CLIENT", "LIST")
    return text.decode().splitlines()


async def _is_settling(link: Link) -> bool:
    """Say whether the settling connection waits for Redis to go on."""
    return any(
        "name=webhook-settler" in line and "cmd=evalsha" in line and " flags=b" in line for line in await _clients(link)
    )


async def _has_gone(link: Link) -> bool:
    return not any("name=webhook-" in line for line in await _clients(link))
