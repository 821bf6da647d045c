"""The front: every waiter gets the outcome it asked for, or hears why not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from pipeline import front as front_module
from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import BrokerUnavailable, DeadlineExceeded, JobLost
from pipeline.front import Front
from pipeline.job import Completion
from pipeline.settings import Settings
from tests.conftest import PATIENCE_S, wait_until
from tests.rig import LIFE_S, Gate, Hand, Scripted, ask, changed, complete, echo, query, release, working


@pytest.fixture
def swift_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep so often that a test need not wait for it."""
    monkeypatch.setattr(front_module, "SWEEP_EVERY_S", 0.05)


async def publish(link: Link, completion: Completion) -> None:
    """Write an outcome without waking anybody."""
    await link.call("SET", keys.COMPLETION + completion.id, completion.encode(), "PX", 60_000)


async def test_many_waiters_of_one_job_all_get_its_outcome(link: Link, settings: Settings, front: Front) -> None:
    """In one gateway and in another; whoever comes too late for the wake-up finds it too."""
    gate = Gate()
    async with working(settings, [Scripted("encoder", gate)]), Front(settings, "other") as other:
        job = query(front, route=["encoder"])
        await front.submit(job)
        waiting = [
            asyncio.create_task(one.wait(job.id, job.tenant, job.deadline_ms)) for one in [front] * 20 + [other] * 20
        ]
        await wait_until(lambda: front.waiters(job.id) == other.waiters(job.id) == 20)
        waiting[0].cancel()
        await wait_until(lambda: front.waiters(job.id) == 19)
        gate.open()
        found = await asyncio.gather(*waiting[1:])
        assert len({id(completion.id) and completion.finished_us for completion in found}) == 1
        assert await front.wait(job.id, job.tenant, job.deadline_ms) == found[0]
        assert front.waiters(job.id) == other.waiters(job.id) == 0
        assert front._waiting == other._waiting == {}


@pytest.mark.usefixtures("swift_sweep")
async def test_outcome_without_a_wake_up_is_found_by_the_sweep(link: Link, settings: Settings) -> None:
    """The reply stream is a hint: here it says nothing."""
    async with Front(settings, "deaf") as front, Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        await link.call("HDEL", keys.LIVE + job.id, "reply")
        waiting = asyncio.create_task(front.wait(job.id, job.tenant, job.deadline_ms))
        await wait_until(lambda: front.waiters(job.id))
        await owner.settle(complete(await owner.take_one()))
        assert (await waiting).status == "completed"


async def test_outcome_with_a_wake_up_is_told_at_once(
    link: Link, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the sweep: it is made too slow to help."""
    monkeypatch.setattr(front_module, "SWEEP_EVERY_S", 60.0)
    async with Front(settings, "keen") as front, working(settings, [Scripted("encoder", echo)]):
        await wait_until(lambda: link.call("EXISTS", front._reply_stream))
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(20):
                await ask(front, query(front, route=["encoder"]))


async def test_short_outcome_comes_with_its_wake_up_and_a_long_one_is_fetched(
    link: Link, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither needs the sweep; the short one needs no completion either."""
    monkeypatch.setattr(front_module, "SWEEP_EVERY_S", 60.0)
    async with Front(settings, "keen") as front, Hand(settings, "owner") as owner:
        await wait_until(lambda: link.call("EXISTS", front._reply_stream))
        found: list[Sequence[str]] = []
        find = front._find

        async def noted(job_ids: Sequence[str]) -> None:
            found.append(job_ids)
            await find(job_ids)

        monkeypatch.setattr(front, "_find", noted)
        for answer in ("yes", "y" * 5_000):
            job = query(front)
            await front.submit(job)
            settlement = complete(await owner.take_one())
            settlement.a = Completion(job.id, "completed", result={"answer": answer}).encode()
            waiting = asyncio.create_task(front.wait(job.id, job.tenant, job.deadline_ms))
            assert await owner.settle(settlement) == ["settled"]
            async with asyncio.timeout(PATIENCE_S):
                assert (await waiting).result == {"answer": answer}
        assert found == [[job.id]]


@pytest.mark.usefixtures("swift_sweep")
async def test_reply_stream_keeps_nothing_that_was_read(link: Link, settings: Settings) -> None:
    """It holds outcomes: a gateway must not keep ten thousand of them twice."""
    async with Front(settings, "tidy") as front, working(settings, [Scripted("encoder", echo)]):
        await wait_until(lambda: link.call("EXISTS", front._reply_stream))
        for _ in range(20):
            await ask(front, query(front, route=["encoder"]))

        async def is_tidy() -> bool:
            return bool(await link.call("XLEN", front._reply_stream) <= 1)

        await wait_until(is_tidy)


async def test_reply_stream_of_a_dead_gateway_is_not_revived(link: Link, settings: Settings, front: Front) -> None:
    """Nobody would ever trim it, or read it."""
    async with Hand(settings, "owner") as owner:
        async with Front(settings, "mortal") as mortal:
            await wait_until(lambda: link.call("EXISTS", mortal._reply_stream))
            await mortal.submit(query(mortal))
        assert await link.call("EXISTS", mortal._reply_stream) == 0
        await owner.settle(complete(await owner.take_one()))
        assert await link.call("EXISTS", mortal._reply_stream) == 0


@pytest.mark.usefixtures("swift_sweep")
async def test_job_that_redis_forgot_is_lost(link: Link, settings: Settings) -> None:
    """Neither completion nor live record in two sweeps: the waiter hears it, and does not wait for the deadline."""
    async with Front(settings, "test") as front:
        job = query(front)
        await front.submit(job)
        waiting = [asyncio.create_task(front.wait(job.id, job.tenant, job.deadline_ms)) for _ in range(3)]
        await wait_until(lambda: front.waiters(job.id) == 3)
        await link.call("FLUSHALL")
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [JobLost] * 3
        with pytest.raises(JobLost):
            await front.wait("never-heard-of", "default", front.clock.now_ms() + 30_000)


async def test_completion_of_another_tenant_is_not_shown(link: Link, settings: Settings, front: Front) -> None:
    """Nor one that stands under the wrong id."""
    job = query(front, tenant="acme")
    await front.submit(job)
    async with Hand(settings, "owner") as owner:
        assert await front.look(job.id, "acme") == "queued"
        assert await front.look(job.id, "default") is None
        entry = await owner.take_one()
        assert await front.look(job.id, "acme") == "running"
        assert await front.look(job.id, "default") is None
        await owner.settle(complete(entry))
    found = await front.look(job.id, "acme")
    assert isinstance(found, Completion)
    assert await front.look(job.id, "default") is None
    with pytest.raises(JobLost):
        await front.wait(job.id, "default", job.deadline_ms)
    await link.call("SET", keys.COMPLETION + "another", found.encode(), "PX", 60_000)
    assert await front.look("another", "acme") is None
    with pytest.raises(JobLost):
        await front.wait("another", "acme", job.deadline_ms)


async def test_unknown_job_is_unknown(link: Link, front: Front) -> None:
    """Look and cancel say so."""
    assert await front.look("nobody", "default") is None
    assert await front.cancel("nobody", "default") == "unknown"


async def test_waiting_ends_after_the_deadline_when_nobody_writes_an_outcome(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker lives to write it; the gateway never does."""
    monkeypatch.setattr(front_module, "GRACE_S", 0.1)
    job = query(front, lifetime_s=0.1)
    with pytest.raises(DeadlineExceeded):
        await ask(front, job)
    assert front._waiting == {}
    assert await front.look(job.id, "default") == "queued"


async def test_hundreds_of_waiters_cost_one_reader(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a poll loop per request: five hundred jobs wait while Redis hears only the sweep."""
    monkeypatch.setattr(front_module, "ANSWER_WITHIN_S", 30.0)  # how fast they are accepted is another matter
    async with working(settings, [Scripted("encoder", echo, slots=64)]):
        found = await asyncio.gather(*(ask(front, query(front, f"{n}", route=["encoder"])) for n in range(500)))
        assert [completion.result for completion in found] == [{"answer": f"{n}"} for n in range(500)]
        connections = (await link.call("CLIENT", "LIST")).decode()
        assert connections.count("name=submit ") == connections.count("name=replies ") == 1
        assert connections.count("name=sweep ") <= 1


async def test_refused_submit_leaves_no_waiter(link: Link, settings: Settings) -> None:
    """Nor does one that was given up."""
    async with Front(changed(settings, admission={"max_jobs": 1}), "small") as front:
        await front.submit(query(front), wait=False)
        assert front._waiting == {}
        with pytest.raises(Exception, match="unfinished work"):
            await front.submit(query(front))
        assert front._waiting == {}


async def test_workers_and_loads_are_told(link: Link, settings: Settings, front: Front) -> None:
    """What `/readyz` and `status` stand on."""
    health = await front.health()
    assert health.redis is None
    assert health.stages == dict.fromkeys(("encoder", "retriever", "llm"), "no worker is running")
    assert not health.is_ready()
    settings = changed(settings, llm={"urls": ("http://one:1/v1",)})
    stages = [Scripted(name, echo, placed=name == "llm") for name in ("encoder", "retriever", "llm")]
    async with working(settings, stages) as consumers:
        await wait_until(lambda: _is_ready(front))
        assert {name for name, _ in await front.workers()} == {consumer.name for consumer in consumers}
        await wait_until(lambda: _knows(front, "http://one:1/v1"))
        assert await front.replica_loads() == {"http://one:1/v1": 0}


async def _is_ready(front: Front) -> bool:
    return (await front.health()).is_ready()


async def _knows(front: Front, url: str) -> bool:
    return url in await front.replica_loads()


async def test_job_between_two_stages_is_never_seen_as_unknown(link: Link, settings: Settings, front: Front) -> None:
    """Queued or running at every moment until it has ended."""
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        assert await front.look(job.id, "default") == "queued"
        entry = await owner.take_one()
        assert await front.look(job.id, "default") == "running"
        await owner.settle(release(entry))
        assert await front.look(job.id, "default") == "queued"


@pytest.mark.usefixtures("swift_sweep")
async def test_job_that_nobody_waits_for_is_forgotten(link: Link, settings: Settings) -> None:
    """A client may vanish between submit and wait: its job must not be swept for ever."""
    async with Front(settings, "test") as front, Hand(settings, "owner") as owner:
        for _ in range(3):
            await front.submit(query(front))
        await owner.settle(*[complete(entry) for entry in await owner.take()])
        await link.call("FLUSHALL")  # the completions' life has ended
        await wait_until(lambda: not front._waiting)


@pytest.mark.usefixtures("swift_sweep")
async def test_outcome_is_found_when_redis_is_out_of_memory(link: Link, settings: Settings) -> None:
    """Even the reply stream cannot be made then; the sweep goes on."""
    async with Front(settings, "test") as front, Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        await link.call("CONFIG", "SET", "maxmemory", "1mb")
        try:
            await link.call("DEL", front._reply_stream)
            await owner.settle(complete(await owner.take_one()))
            async with asyncio.timeout(PATIENCE_S):
                assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
        finally:
            await link.call("CONFIG", "SET", "maxmemory", "0")


@pytest.mark.usefixtures("swift_sweep")
@pytest.mark.parametrize("kind", ["no completion", "another type"])
async def test_outcome_that_cannot_be_read_stops_no_other(link: Link, settings: Settings, kind: str) -> None:
    """Neither the sweep nor the reader of replies dies of it; it is found when it is mended."""
    async with Front(settings, "tough") as front, Hand(settings, "owner") as owner:
        bad, good = query(front), query(front)
        for job in (bad, good):
            await front.submit(job)
        waiting = [asyncio.create_task(front.wait(job.id, job.tenant, job.deadline_ms)) for job in (bad, good)]
        key = keys.COMPLETION + bad.id
        if kind == "another type":
            await link.call("RPUSH", key, "x")
        else:
            await link.call("SET", key, '{"id":"x"}')
        await link.call("PEXPIRE", key, 60_000)
        first, second = await owner.take()
        await link.call("HDEL", keys.LIVE + good.id, "reply")  # so that the sweep must find it
        assert await owner.settle(complete(second)) == ["settled"]
        assert (await waiting[1]).status == "completed"
        assert not waiting[0].done()
        assert not any(task.done() for task in front._tasks)
        await link.call("DEL", key)
        await owner.settle(complete(first))
        assert (await waiting[0]).status == "completed"


async def test_deadlines_are_counted_from_redis_clock(
    link: Link, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock of the gateway's machine is an hour off."""
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3_600 * 10**9)
    async with Front(settings, "off") as front, working(settings, [Scripted("encoder", echo)]):
        job = query(front, route=["encoder"])
        seconds, _ = await link.call("TIME")
        assert abs(job.deadline_ms - 1_000 * (LIFE_S + int(seconds))) < 600_000
        assert (await ask(front, job)).status == "completed"


async def test_nothing_is_submitted_before_redis_clock_is_known(link: Link, settings: Settings) -> None:
    """A deadline counted from another clock may be hours off."""
    front = Front(settings, "early")
    with pytest.raises(BrokerUnavailable) as caught:
        await front.submit(query(front))
    assert not caught.value.unknown
    assert await link.call("ZCARD", keys.LIVE_INDEX) == 0
