"""Submitting: a job is accepted in one step, once, or refused with nothing written."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from msgspec import structs

from pipeline import keys, scripts
from pipeline.accepting import Idempotency
from pipeline.connection import CommandRefused, Link, OutOfMemory
from pipeline.errors import BrokerUnavailable, IdempotencyMismatch, Overloaded
from pipeline.front import Accepted, Front
from pipeline.job import Job, decode
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.rig import (
    REPLICAS,
    Hand,
    Scripted,
    assert_nothing_is_left,
    bury,
    changed,
    complete,
    echo,
    everything,
    prompt,
    query,
    retry,
    working,
)
from tests.servers import RedisServer
from tests.wire import Wire


async def register(link: Link, front: Front, urls: tuple[str, ...] = REPLICAS) -> None:
    """Make replicas known to the gateway."""
    now_ms = front.clock.now_ms()
    for url in urls:
        await link.call("HSET", keys.REPLICAS, url, orjson.dumps({"slots": 4, "seen_ms": now_ms}))
    await front._refresh()


# --- once -----------------------------------------------------------------------------------------


async def test_job_sent_again_is_one_job(link: Link, settings: Settings, front: Front) -> None:
    """A gateway may send a job again after an unknown reply: the script knows its id, also when it has ended."""
    job = query(front)
    assert not (await front.submit(job)).repeated
    before = await everything(link)
    for _ in range(3):
        assert (await front.submit(job)).job_id == job.id
    assert await everything(link) == before
    async with Hand(settings, "owner") as owner:
        await owner.settle(complete(await owner.take_one()))
    assert (await front.submit(job)).job_id == job.id
    await assert_nothing_is_left(link)


async def test_reply_lost_after_the_script_ran_leaves_one_job(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway sends again by itself."""
    run = front._submitter.run
    sent = 0

    async def deaf_once(*args: object, **more: object) -> object:
        nonlocal sent
        sent += 1
        reply = await run(*args, **more)  # type: ignore[arg-type]  # passes on what it was given
        if sent == 1:
            raise BrokerUnavailable("the reply was lost", unknown=True)
        return reply

    monkeypatch.setattr(front._submitter, "run", deaf_once)
    accepted = await front.submit(query(front))
    assert not accepted.repeated
    assert sent == 2
    assert await link.call("XLEN", keys.stream("encoder")) == 1
    assert await link.call("ZCARD", keys.LIVE_INDEX) == 1


async def test_submit_that_was_given_up_is_not_sent_again(
    link: Link, settings: Settings, redis_server: RedisServer
) -> None:
    """Its client has heard 503 by the time the dead connection is noticed: the job would run for nobody."""
    async with Wire(redis_server) as wire:
        settings = changed(settings, redis={"url": wire.url, "reply_timeout_s": 1.2})
        async with Front(settings, "cut off") as front:
            await front.submit(query(front), wait=False)
            wire.kill("submit")
            ghost, job = query(front), query(front)
            with pytest.raises(BrokerUnavailable) as caught:
                await front.submit(ghost)
            assert caught.value.unknown
            await wait_until(lambda: _is_accepted(front, job))
            assert await link.call("EXISTS", keys.LIVE + job.id) == 1
            assert await link.call("EXISTS", keys.LIVE + ghost.id) == 0


async def _is_accepted(front: Front, job: Job) -> bool:
    """Submit as a client does that hears 503 and tries again."""
    try:
        await front.submit(job)
    except BrokerUnavailable:
        return False
    return True


async def test_after_an_unknown_reply_only_what_is_waited_for_is_sent_again(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two jobs in one call one client hung up: the other's job is accepted, and gets its own answer."""
    hung_up, patient = query(front), query(front)
    run = front._submitter.run
    sent = 0

    async def cut_once(*args: object, **more: object) -> object:
        nonlocal sent
        sent += 1
        if sent > 1:
            return await run(*args, **more)  # type: ignore[arg-type]  # passes on what it was given
        asking[0].cancel()
        raise BrokerUnavailable("cut before it arrived", unknown=True)

    monkeypatch.setattr(front._submitter, "run", cut_once)
    asking = [asyncio.create_task(front.submit(job)) for job in (hung_up, patient)]
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1] == Accepted(patient.id)
    assert sent == 2
    assert await link.call("KEYS", keys.LIVE + "*") == [(keys.LIVE + patient.id).encode()]


async def test_hundred_submits_under_one_key_are_one_job(link: Link, settings: Settings, front: Front) -> None:
    """All callers get the same answer."""
    stages = [Scripted(name, echo) for name in ("encoder", "retriever", "llm")]
    idempotency = Idempotency("default:key", "body")

    async def caller() -> tuple[bool, str, object]:
        job = query(front, "same")
        accepted = await front.submit(job, idempotency=idempotency)
        completion = await front.wait(accepted.job_id, job.tenant, job.deadline_ms)
        return accepted.repeated, completion.id, completion.result

    async with working(settings, stages):
        answers = await asyncio.gather(*(caller() for _ in range(100)))
        assert sorted(repeated for repeated, _, _ in answers) == [False] + [True] * 99
        assert len({job_id for _, job_id, _ in answers}) == 1
        assert all(result == {"answer": "same"} for _, _, result in answers)
        assert len(stages[0].seen) == 1


async def test_key_keeps_its_outcome_longer_than_the_completion_lives(
    link: Link, settings: Settings, front: Front
) -> None:
    """A repeat the next morning gets the answer of the evening."""
    idempotency = Idempotency("default:key", "body", ttl_s=3600)
    job = query(front)
    await front.submit(job, idempotency=idempotency)
    assert 3_500_000 < await link.call("PTTL", keys.IDEMPOTENCY + idempotency.key) <= 3_600_000
    async with Hand(settings, "owner") as owner:
        await owner.settle(complete(await owner.take_one()))
    await link.call("DEL", keys.COMPLETION + job.id)
    assert await front.submit(query(front), idempotency=idempotency) == structs.replace(
        await front.submit(query(front), idempotency=idempotency), job_id=job.id, repeated=True
    )
    kept = await front.idempotent_outcome(idempotency.key)
    assert kept is not None
    assert (kept.id, kept.status) == (job.id, "completed")
    assert await link.call("XLEN", keys.stream("encoder")) == 0


async def test_key_that_ended_before_its_job_is_not_revived(link: Link, settings: Settings, front: Front) -> None:
    """HSET would make a new hash without a TTL."""
    idempotency = Idempotency("default:key", "body")
    await front.submit(query(front), idempotency=idempotency)
    await link.call("DEL", keys.IDEMPOTENCY + idempotency.key)
    async with Hand(settings, "owner") as owner:
        await owner.settle(complete(await owner.take_one()))
    assert await link.call("EXISTS", keys.IDEMPOTENCY + idempotency.key) == 0


async def test_same_key_with_another_body_is_a_mismatch(link: Link, front: Front) -> None:
    """Nothing is written for it."""
    await front.submit(query(front), idempotency=Idempotency("default:key", "one body"))
    before = await everything(link)
    with pytest.raises(IdempotencyMismatch):
        await front.submit(query(front), idempotency=Idempotency("default:key", "another body"))
    assert await everything(link) == before


async def test_stamps_rise_also_when_the_clock_is_set_back(link: Link, settings: Settings, front: Front) -> None:
    """`accepted_us` orders jobs by acceptance, whatever Redis' clock does."""
    ahead_us = front.clock.now_us() + 3_600_000_000
    await link.call("SET", keys.STAMP, ahead_us)
    await asyncio.gather(*(front.submit(query(front)) for _ in range(20)))
    async with Hand(settings, "owner") as owner:
        stamps = [decode(entry.data or b"").accepted_us for entry in await owner.take()]
        assert stamps == list(range(ahead_us + 1, ahead_us + 21))


# --- admission ------------------------------------------------------------------------------------


async def test_overload_is_refused_and_nothing_is_written(link: Link, settings: Settings) -> None:
    """Delayed jobs count as well as those on streams."""
    async with Front(changed(settings, admission={"max_jobs": 2}), "small") as front, Hand(settings, "owner") as owner:
        await front.submit(query(front))
        await front.submit(query(front))
        entry = await owner.take_one()
        await owner.settle(retry(entry))
        before = await everything(link)
        with pytest.raises(Overloaded) as refused:
            await front.submit(query(front))
        assert refused.value.code == "overloaded"
        assert await everything(link) == before
        await owner.settle(complete(await owner.take_one()))
        await front.submit(query(front))


async def test_in_flight_limit_counts_members_and_returns_to_zero(link: Link, settings: Settings, front: Front) -> None:
    """Per tenant; however a job ends, its member goes; sending one again adds none."""
    key = keys.IN_FLIGHT + "acme"
    async with Hand(settings, "owner") as owner:
        jobs = [query(front, tenant="acme") for _ in range(4)]
        for job in jobs:
            for _ in range(2):
                await front.submit(job, in_flight_limit=4)
        assert await link.call("SCARD", key) == 4
        before = await everything(link)
        with pytest.raises(Overloaded) as refused:
            await front.submit(query(front, tenant="acme"), in_flight_limit=4)
        assert refused.value.code == "too_many_in_flight"
        assert await everything(link) == before
        await front.submit(query(front, tenant="other"), in_flight_limit=4)
        one, two, *_ = await owner.take(2)
        await owner.settle(complete(one), bury(two))
        await front.cancel(jobs[2].id, "acme")
        assert await link.call("SCARD", key) == 1
        await link.call("ZADD", keys.LIVE_INDEX, 1, jobs[3].id)  # its deadline has passed
        await link.run(scripts.EXPIRE, (), (10, 1000))
        assert await link.call("EXISTS", key) == 0


async def test_full_memory_refuses_new_jobs_and_lets_old_ones_end(link: Link, settings: Settings, front: Front) -> None:
    """Submitting needs memory to spare; settling, renewing, claiming, promoting and cancelling must always work."""
    async with Hand(settings, "owner") as owner, Hand(settings, "heir") as heir:
        jobs = [query(front) for _ in range(5)]
        for job in jobs:
            await front.submit(job)
        entries = await owner.take(3)
        while await link.call("XLEN", front._reply_stream) > 1:
            await front._refresh()  # drops what was read of it
        await link.call("CONFIG", "SET", "maxmemory", "1mb")
        try:
            before = await everything(link)
            with pytest.raises(OutOfMemory):
                await front._submitter.run(scripts.SUBMIT, (), front._submit_arguments([]))
            with pytest.raises(Overloaded):
                await front.submit(query(front))
            await front._refresh()
            with pytest.raises(Overloaded, match="nearly"):
                await front.submit(query(front))
            assert await everything(link) == before
            await link.call("SCRIPT", "FLUSH")
            assert await owner.settle(complete(entries[0]), retry(entries[1], 0)) == ["settled"] * 2
            await link.run(scripts.RENEW, (), ("owner", 60_000, "{}", "", keys.stream("encoder"), "encoder"))
            assert (await link.run(scripts.PROMOTE, (), (10, "one", 100)))[1] == 1
            await owner.die()
            assert len((await heir.streams.claim(entries[2].stream, "owner", 5, idle=False)).entries) == 1
            assert await front.cancel(jobs[3].id, "default") == "cancelled"
        finally:
            await link.call("CONFIG", "SET", "maxmemory", "0")
        await front._refresh()
        await front.submit(query(front))


# --- leases ---------------------------------------------------------------------------------------


async def test_query_is_leased_to_the_replica_with_the_fewest_leases(link: Link, front: Front) -> None:
    """Thirty queries over three replicas, one of which bears five leases already."""
    await register(link, front)
    for number in range(5):
        await link.call("ZADD", keys.LEASES + REPLICAS[0], number, f"elsewhere-{number}")
    for _ in range(10):
        await front.submit(query(front))
    counts = [await link.call("ZCARD", keys.LEASES + url) for url in REPLICAS]
    assert counts == [5, 5, 5]
    for _ in range(30):
        await front.submit(query(front))
    assert [await link.call("GET", keys.LOAD + url) for url in REPLICAS] == [b"15"] * 3


async def test_ties_between_replicas_fall_at_random(link: Link, front: Front) -> None:
    """A gateway that starts does not send its first job to the first replica of the list, always."""
    await register(link, front)
    first: set[bytes] = set()
    while len(first) < len(REPLICAS):  # each draw misses one replica with probability 2/3: it ends
        job = query(front)
        await front.submit(job)
        first.add(await link.call("HGET", keys.LIVE + job.id, "lease"))
        await front.cancel(job.id, "default")


async def test_other_flows_take_no_lease_when_submitted(link: Link, front: Front) -> None:
    """They are placed at call time."""
    await register(link, front)
    await front.submit(prompt(front))
    assert await link.call("KEYS", keys.LEASES + "*") == []


async def test_replica_with_an_open_breaker_is_not_leased_to(link: Link, front: Front) -> None:
    """Unless all are open: then the job may wait for any."""
    now_ms = front.clock.now_ms()
    for url in REPLICAS[:2]:
        await link.call("HSET", keys.HEALTH + url, "open_until_ms", now_ms + 60_000)
        await link.call("PEXPIRE", keys.HEALTH + url, 60_000)
    await register(link, front)
    for _ in range(5):
        await front.submit(query(front))
    assert await link.call("ZCARD", keys.LEASES + REPLICAS[2]) == 5


# --- wrong types ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        keys.stream("encoder"),
        keys.LIVE_INDEX,
        keys.STAMP,
        keys.DELAYED,
        keys.IN_FLIGHT + "default",
        keys.IDEMPOTENCY + "key",
        keys.LEASES + REPLICAS[0],
    ],
)
async def test_key_of_a_wrong_type_refuses_the_whole_submit(link: Link, front: Front, key: str) -> None:
    """A member of the in-flight set without a job would count against its tenant for ever."""
    await register(link, front, REPLICAS[:1])
    await link.call("DEL", key)
    await link.call("LPUSH", key, "a list")
    await link.call("PEXPIRE", key, 60_000)
    before = await everything(link)
    with pytest.raises(CommandRefused):
        await front.submit(query(front), in_flight_limit=9, idempotency=Idempotency("key", "body"))
    assert await everything(link) == before
    await link.call("DEL", key)
    await front.submit(query(front))
