"""Stopping: quiet, then drain; what is not done by then is given back, and nothing of the process is left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import ConfigError, NotReady
from pipeline.front import Front
from pipeline.job import PRIORITIES, Done, Job, decode
from pipeline.settings import Settings
from pipeline.stage import Context, Outcome
from pipeline.streams import Claimed
from tests.conftest import wait_until
from tests.rig import (
    FIRST,
    Gate,
    Hand,
    Mortal,
    Scripted,
    ScriptedBatch,
    assert_nothing_is_left,
    changed,
    complete,
    echo,
    prompt,
    query,
    working,
)


async def consumers_of(link: Link, stage: str) -> list[bytes]:
    """Return the consumers of all three streams of a stage."""
    streams = [keys.stream(stage, priority) for priority in PRIORITIES]
    return [row[1] for name in streams for row in await link.call("XINFO", "CONSUMERS", name, stage)]


async def test_running_work_is_finished_and_no_more_is_begun(link: Link, settings: Settings, front: Front) -> None:
    """Then consumer and lease are gone."""
    gate = Gate()
    stage = Scripted("encoder", gate, slots=2)
    async with working(settings, [stage]) as (consumer,):
        jobs = [query(front, route=["encoder"]) for _ in range(4)]
        for job in jobs:
            await front.submit(job)
        await wait_until(lambda: len(gate.waiting) == 2)
        consumer.stop()
        await wait_until(lambda: consumer.workers[0]._quiet)
        gate.open()
        await consumer.task
    assert [job.id for job in stage.seen] == [job.id for job in jobs[:2]]
    assert gate.stopped == []
    for job in jobs[:2]:
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
    assert await link.call("EXISTS", keys.WORKER + consumer.name) == 0
    assert await link.call("ZCARD", keys.WORKERS) == 0
    assert await consumers_of(link, "encoder") == []
    assert await link.call("XLEN", keys.stream("encoder")) == 2


@pytest.mark.parametrize("stage_name", ["encoder", "llm"])
async def test_work_longer_than_the_drain_is_given_back(
    link: Link, settings: Settings, front: Front, stage_name: str
) -> None:
    """Another worker does it, as a first delivery: giving back is no crash."""
    settings = changed(settings, worker={"drain_s": 0.1}, llm={"urls": (FIRST,)})
    gate = Gate()
    placed = stage_name == "llm"
    async with working(settings, [Scripted(stage_name, gate, placed=placed)]) as (consumer,):
        jobs = [query(front, route=[stage_name]) for _ in range(3)]
        for job in jobs:
            await front.submit(job)
        await wait_until(lambda: len(gate.waiting) == 3)
        consumer.stop()
        await consumer.task
    assert len(gate.stopped) == 3
    assert await link.call("EXISTS", keys.WORKER + consumer.name) == 0
    assert await consumers_of(link, stage_name) == []
    assert await link.call("KEYS", keys.RUNNING + "*") == []
    async with Hand(settings, "next", stage_name) as following:
        entries = await following.take()
        assert sorted(decode(entry.data or b"").id for entry in entries) == sorted(job.id for job in jobs)
        assert [entry.deliveries for entry in entries] == [1, 1, 1]
        assert await following.settle(*[complete(entry) for entry in entries]) == ["settled"] * 3
    await assert_nothing_is_left(link)


async def test_rolling_restart_under_load_fails_nothing(link: Link, settings: Settings, front: Front) -> None:
    """Old and new workers overlap; every job runs once."""
    settings = changed(settings, llm={"urls": (FIRST,)})
    seen: list[str] = []

    async def handle(job: Job) -> Done:
        seen.append(job.id)
        await asyncio.sleep(0.005)
        return await echo(job)

    def spawn(group: asyncio.TaskGroup) -> Mortal:
        consumer = Mortal([Scripted("llm", handle, placed=True)], settings)
        consumer.task = group.create_task(consumer.run())
        return consumer

    async with asyncio.TaskGroup() as group:
        current = spawn(group)
        jobs = [prompt(front) for _ in range(120)]
        asking = []
        for number, job in enumerate(jobs):
            await front.submit(job)
            asking.append(group.create_task(front.wait(job.id, job.tenant, job.deadline_ms)))
            if number % 40 == 20:
                following = spawn(group)
                current.stop()
                current = following
        found = await asyncio.gather(*asking)
        current.stop()
    assert {completion.status for completion in found} == {"completed"}
    assert sorted(seen) == sorted(job.id for job in jobs)
    await assert_nothing_is_left(link)


async def test_stage_that_is_not_ready_is_tried_again_and_jobs_wait(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason stands in the worker's record, for `/readyz`."""
    monkeypatch.setattr("pipeline.worker.NOT_READY_RETRY_S", 0.02)
    is_there = asyncio.Event()

    class Late(Scripted):
        async def start(self, context: Context) -> None:
            if not is_there.is_set():
                raise NotReady("the index is not there yet")

    consumer = Mortal([Late("encoder", echo)], settings)
    async with asyncio.TaskGroup() as group:
        consumer.task = group.create_task(consumer.run())
        job = query(front, route=["encoder"])
        await front.submit(job)
        await wait_until(lambda: _says(front, "the index is not there yet"))
        is_there.set()
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
        consumer.stop()


async def _says(front: Front, reason: str) -> bool:
    return (await front.health()).stages["encoder"] == reason


async def test_stage_that_cannot_ever_work_ends_the_process(link: Link, settings: Settings) -> None:
    """The error itself comes out, not a group of errors."""

    class Wrong(Scripted):
        async def start(self, context: Context) -> None:
            raise ConfigError("no such tokenizer")

    with pytest.raises(ConfigError, match="no such tokenizer"):
        await Mortal([Wrong("encoder", echo)], settings).run()
    assert await link.call("KEYS", keys.WORKER + "*") == []


async def test_two_stages_in_one_process_share_its_lease(link: Link, settings: Settings, front: Front) -> None:
    """One consumer, one lease, two groups."""
    stages = [Scripted("encoder", echo), Scripted("retriever", echo)]
    consumer = Mortal(stages, settings)
    async with asyncio.TaskGroup() as group:
        consumer.task = group.create_task(consumer.run())
        job = query(front, route=["encoder", "retriever"])
        await front.submit(job)
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
        assert await link.call("KEYS", keys.WORKER + "*") == [(keys.WORKER + consumer.name).encode()]
        consumer.stop()
    for stage in stages:
        assert await consumers_of(link, stage.name) == []


async def test_claim_under_way_is_drained_too(link: Link, settings: Settings, front: Front) -> None:
    """What a stopping worker still claims is its own work: it must not be left behind, delivered and not begun."""
    settings = changed(settings, worker={"lease_s": 0.5})
    stage = Scripted("encoder", echo)
    claimed, go_on = asyncio.Event(), asyncio.Event()
    job = query(front, route=["encoder"])
    async with Hand(settings, "dead") as dead:
        await front.submit(job)
        await dead.take_one()
        await dead.die()
    async with working(settings, [stage]) as (consumer,):
        (worker,) = consumer.workers
        claim = worker.streams.claim

        async def slow_claim(stream: str, lapsed: str, most: int, *, idle: bool) -> Claimed:
            found = await claim(stream, lapsed, most, idle=idle)
            if found.entries:
                claimed.set()
                await go_on.wait()
            return found

        worker.streams.claim = slow_claim  # type: ignore[method-assign]  # the pause under test
        await claimed.wait()
        consumer.stop()
        await wait_until(lambda: worker._quiet)
        for _ in range(100):  # whatever is going to be cancelled is cancelled by now
            await link.call("PING")
        go_on.set()
        await consumer.task
    assert stage.runs(job.id) == 1
    assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
    assert consumer.name.encode() not in await consumers_of(link, "encoder")


async def test_drained_batch_beside_a_burial_is_given_back(link: Link, settings: Settings, front: Front) -> None:
    """The burial is on its way when the drain ends: its mate goes back unstarted, as a first delivery."""
    settings = changed(settings, worker={"drain_s": 0})
    stage = ScriptedBatch("encoder", echo_all)
    await link.call("XADD", keys.stream("encoder"), "*", "data", "not json")
    job = query(front, route=["encoder"])
    await front.submit(job)
    consumer = Mortal([stage], settings)
    (worker,) = consumer.workers
    await worker._start_stage()
    await consumer.renew()
    async with worker.streams._settler._turn:  # no settle passes
        worker.start(await worker.streams.take(8))
        await wait_until(lambda: any(held.settling for held in worker.held.values()))
        await worker.quiet()
        drain = asyncio.create_task(worker.drain(0))
        await wait_until(lambda: all(held.reason or held.settling for held in worker.held.values()))
    await drain
    await consumer._leave()
    assert stage.calls == []
    async with Hand(settings, "next") as hand:
        entry = await hand.take_one()
        assert entry.deliveries == 1
        assert await hand.settle(complete(entry)) == ["settled"]
    await assert_nothing_is_left(link)


async def echo_all(jobs: Sequence[Job]) -> list[Outcome]:
    return [await echo(job) for job in jobs]


async def test_what_was_tried_before_the_drain_is_not_forgotten(link: Link, settings: Settings, front: Front) -> None:
    """Charged calls stay charged and failed replicas avoided; every span is counted once."""
    settings = changed(settings, worker={"drain_s": 0.05}, llm={"urls": (FIRST,)})
    gate = Gate()

    async def fail_over(job: Job) -> Done:
        job.attempt, job.avoid = 3, [FIRST]
        job.state["half"] = object()  # whatever a handler left behind is not carried on
        return await gate(job)

    async with working(settings, [Scripted("llm", fail_over, placed=True)]) as (consumer,):
        job = prompt(front)
        began_us = front.clock.now_us()
        await front.submit(job)
        await wait_until(lambda: gate.waiting)
        consumer.stop()
        await consumer.task
    assert await link.call("HGET", keys.LIVE + job.id, "attempts") == b"2"  # as an outcome without a worker tells them
    async with Hand(settings, "next", "llm") as following:
        entry = await following.take_one()
        again = decode(entry.data or b"")
        assert (again.attempt, again.avoid, again.state) == (3, [FIRST], {})
        assert again.timings_ms.keys() == {"llm_wait", "llm"}
        assert again.at_us > began_us
        assert sum(again.timings_ms.values()) == pytest.approx((again.at_us - began_us) / 1000, abs=20)
        assert await following.settle(complete(entry)) == ["settled"]
    await assert_nothing_is_left(link)
