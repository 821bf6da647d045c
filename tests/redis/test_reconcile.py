"""At every renewal a worker compares what it has in hand with what Redis says it holds."""

from __future__ import annotations

from msgspec import structs
from prometheus_client import Counter

from pipeline import keys, metrics
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.rig import Gate, Scripted, assert_nothing_is_left, changed, echo, letters, outcome, query, still, working

STREAM = keys.stream("encoder")


def value(counter: Counter, *labels: str) -> float:
    """Return what a counter shows now."""
    return float((counter.labels(*labels) if labels else counter)._value.get())


async def test_entry_served_to_a_dead_connection_is_taken_up_and_runs_once(
    link: Link, settings: Settings, front: Front
) -> None:
    """Redis delivered it to our name over a connection that nobody read: it is ours, and nobody would claim it."""
    gate = Gate()
    stage = Scripted("encoder", gate, slots=1)
    taken_up = value(metrics.TAKEN_UP, "encoder")
    async with working(settings, [stage]) as (consumer,):
        first, second = (query(front, route=["encoder"]) for _ in range(2))
        await front.submit(first)
        await wait_until(lambda: gate.waiting)  # its one slot is full, so it does not read
        await front.submit(second)
        rows = await link.call("XREADGROUP", "GROUP", "encoder", consumer.name, "COUNT", 1, "STREAMS", STREAM, ">")
        assert rows
        gate.open()
        for job in (first, second):
            assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
        assert [stage.runs(first.id), stage.runs(second.id)] == [1, 1]
        assert value(metrics.TAKEN_UP, "encoder") == taken_up + 1
    await assert_nothing_is_left(link)


async def test_own_entry_is_taken_up_at_the_second_look(link: Link, settings: Settings, front: Front) -> None:
    """At the first it may be on its way: read, and not yet in hand."""
    stage = Scripted("encoder", echo)
    async with still(settings, stage) as consumer:
        job = query(front)
        await front.submit(job)
        await link.call("XREADGROUP", "GROUP", "encoder", consumer.name, "COUNT", 1, "STREAMS", STREAM, ">")
        await consumer.renew()
        assert consumer.workers[0]._following_up is None
        await consumer.renew()
        await wait_until(lambda: stage.runs(job.id))


async def test_late_delivery_of_what_was_taken_up_is_not_run_again(
    link: Link, settings: Settings, front: Front
) -> None:
    """The old connection may still bring the entry after reconciliation found it."""
    gate = Gate()
    stage = Scripted("encoder", gate, slots=1)
    async with working(settings, [stage]) as (consumer,):
        (worker,) = consumer.workers
        first, second = (query(front, route=["encoder"]) for _ in range(2))
        await front.submit(first)
        await wait_until(lambda: gate.waiting)
        await front.submit(second)
        await link.call("XREADGROUP", "GROUP", "encoder", consumer.name, "COUNT", 1, "STREAMS", STREAM, ">")
        await wait_until(lambda: second.id in gate.waiting)
        (held,) = [held for held in worker.held.values() if held.job and held.job.id == second.id]
        gate.open()
        await wait_until(lambda: outcome(link, second.id))
        await wait_until(lambda: not worker.held)
        assert worker.start([structs.replace(held.entry, resumed=False)]) == 0
        assert worker.held == {}
        assert stage.runs(second.id) == 1


async def test_stolen_entry_is_aborted_at_the_next_renewal(link: Link, settings: Settings, front: Front) -> None:
    """A stranger holds it now: the handler stops, and nothing of it is written."""
    gate = Gate()
    aborted = value(metrics.ABORTED, "encoder", "lost")
    async with working(settings, [Scripted("encoder", gate)]):
        stolen, kept = (query(front, route=["encoder"]) for _ in range(2))
        for job in (stolen, kept):
            await front.submit(job)
        await wait_until(lambda: len(gate.waiting) == 2)
        entry = await link.call("HGET", keys.LIVE + stolen.id, "entry")
        await link.call("XCLAIM", STREAM, "encoder", "stranger", 0, entry)
        await wait_until(lambda: gate.stopped == [stolen.id])
        assert value(metrics.ABORTED, "encoder", "lost") == aborted + 1
        gate.open()
        await front.wait(kept.id, kept.tenant, kept.deadline_ms)
        assert gate.stopped == [stolen.id]
        assert await outcome(link, stolen.id) is None
        # A stranger without a lease is a dead consumer like any other: its entry is claimed and runs to its end.
        assert (await front.wait(stolen.id, stolen.tenant, stolen.deadline_ms)).status == "completed"
    await assert_nothing_is_left(link)


async def test_settling_a_stolen_entry_is_refused_and_counted(link: Link, settings: Settings, front: Front) -> None:
    """Between theft and renewal the fence alone protects the job."""
    gate = Gate()
    refused = value(metrics.STALE_WRITES, "encoder")
    settings = changed(settings, worker={"lease_s": 10.0})
    async with working(settings, [Scripted("encoder", gate)]):
        job = query(front, route=["encoder"])
        await front.submit(job)
        await wait_until(lambda: gate.waiting)
        await link.call("SET", keys.WORKER + "stranger", "{}", "PX", 60_000)
        entry = await link.call("HGET", keys.LIVE + job.id, "entry")
        await link.call("XCLAIM", STREAM, "encoder", "stranger", 0, entry)
        gate.open()
        await wait_until(lambda: value(metrics.STALE_WRITES, "encoder") == refused + 1)
        assert await outcome(link, job.id) is None
        assert await letters(link) == []
        assert await link.call("XLEN", STREAM) == 1


async def test_lease_deleted_by_hand_is_taken_again_and_work_goes_on(
    link: Link, settings: Settings, front: Front
) -> None:
    """What is still ours by Redis' own list is not stopped, and nobody else starts it."""
    gate = Gate()
    lost = value(metrics.LEASES_LOST)
    settings = changed(settings, worker={"lease_s": 10.0})
    stages = [Scripted("encoder", gate) for _ in range(2)]
    async with working(settings, stages) as consumers:
        job = query(front, route=["encoder"])
        await front.submit(job)
        await wait_until(lambda: gate.waiting)
        for consumer in consumers:
            await link.call("DEL", keys.WORKER + consumer.name)
        for consumer in consumers:
            await wait_until(lambda name=consumer.name: link.call("EXISTS", keys.WORKER + name))  # type: ignore[misc]
        assert value(metrics.LEASES_LOST) == lost + 2
        gate.open()
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
        assert gate.stopped == []
        assert sum(stage.runs(job.id) for stage in stages) == 1


async def test_pending_entry_that_vanished_is_given_up(link: Link, settings: Settings, front: Front) -> None:
    """Delivered to our name, never read, and deleted by hand: at its deadline the job is `lost`, not in limbo."""
    gate = Gate()
    stage = Scripted("encoder", gate, slots=1)
    async with working(settings, [stage]) as (consumer,):
        first = query(front, route=["encoder"])
        second = query(front, lifetime_s=0.5, route=["encoder"])
        await front.submit(first)
        await wait_until(lambda: gate.waiting)
        await front.submit(second)
        await link.call("XREADGROUP", "GROUP", "encoder", consumer.name, "COUNT", 1, "STREAMS", STREAM, ">")
        await link.call("XDEL", STREAM, await link.call("HGET", keys.LIVE + second.id, "entry"))
        completion = await front.wait(second.id, second.tenant, second.deadline_ms)
        assert (completion.status, completion.error and completion.error["code"]) == ("failed", "lost")
        assert stage.runs(second.id) == 0
        gate.open()
        await front.wait(first.id, first.tenant, first.deadline_ms)
