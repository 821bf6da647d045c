"""Recovery: the work of a consumer that died goes to another, soon, once, and without taking the innocent along."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import pytest

from pipeline import keys
from pipeline.balancing import Replica
from pipeline.connection import Link
from pipeline.consumer import STEADY_S
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.settings import Settings
from pipeline.streams import Entry
from tests.conftest import PATIENCE_S, wait_until
from tests.rig import (
    FIRST,
    Gate,
    Hand,
    Mortal,
    Scripted,
    assert_nothing_is_left,
    changed,
    complete,
    echo,
    everything,
    letters,
    outcome,
    prompt,
    query,
    still,
    working,
)

STREAM = keys.stream("encoder")


async def deliver(link: Link, entry: Entry, consumer: str, times: int) -> None:
    """Make *entry* one that was delivered so many times, last to *consumer*."""
    await link.call("XCLAIM", entry.stream, "encoder", consumer, 0, entry.id, "RETRYCOUNT", times)


async def consumers_of(link: Link, stream: str = STREAM) -> set[str]:
    rows = await link.call("XINFO", "CONSUMERS", stream, "encoder")
    return {row[1].decode() for row in rows}


# --- the script -----------------------------------------------------------------------------------


async def test_nothing_is_claimed_while_the_lease_lives(link: Link, settings: Settings, front: Front) -> None:
    """However old the entry is."""
    async with Hand(settings, "owner") as owner, Hand(settings, "heir") as heir:
        await front.submit(query(front))
        entry = await owner.take_one()
        await link.call("XCLAIM", STREAM, "encoder", "owner", 0, entry.id, "IDLE", 86_400_000, "RETRYCOUNT", 1)
        before = await everything(link)
        assert (await heir.streams.claim(STREAM, "owner", 10, idle=True)).entries == []
        assert await everything(link) == before
        assert await owner.settle(complete(entry)) == ["settled"]


async def test_claim_takes_at_most_the_free_slots(link: Link, settings: Settings, front: Front) -> None:
    """And says how many are left; each claimed entry carries its new delivery count."""
    async with Hand(settings, "owner") as owner, Hand(settings, "heir") as heir:
        for _ in range(10):
            await front.submit(query(front))
        taken = await owner.take()
        await owner.die()
        first = await heir.streams.claim(STREAM, "owner", 3, idle=False)
        assert ([e.id for e in first.entries], first.left) == ([e.id for e in taken[:3]], 7)
        assert all(entry.deliveries == 2 and entry.resumed for entry in first.entries)
        rest = await heir.streams.claim(STREAM, "owner", 50, idle=False)
        assert ([e.id for e in rest.entries], rest.left) == ([e.id for e in taken[3:]], 0)
        assert await owner.settle(*[complete(entry) for entry in taken]) == ["lost"] * 10
        claimed = [*first.entries, *rest.entries]
        assert await heir.settle(*[complete(entry) for entry in claimed]) == ["settled"] * 10


async def test_two_heirs_share_what_is_left(link: Link, settings: Settings, front: Front) -> None:
    """No entry goes to both, none is forgotten."""
    async with Hand(settings, "owner") as owner, Hand(settings, "a") as one, Hand(settings, "b") as two:
        for _ in range(30):
            await front.submit(query(front))
        taken = {entry.id for entry in await owner.take()}
        await owner.die()
        claims = await asyncio.gather(*(h.streams.claim(STREAM, "owner", 4, idle=False) for h in [one, two] * 4))
        ids = [entry.id for claim in claims for entry in claim.entries]
        assert len(ids) == 30
        assert set(ids) == taken


async def test_claim_passes_over_deleted_entries(link: Link, settings: Settings, front: Front) -> None:
    """What somebody removed by hand is neither returned nor in the way."""
    async with Hand(settings, "owner") as owner, Hand(settings, "heir") as heir:
        for _ in range(4):
            await front.submit(query(front))
        taken = await owner.take()
        await link.call("XDEL", STREAM, taken[0].id, taken[2].id)
        await owner.die()
        claimed = await heir.streams.claim(STREAM, "owner", 10, idle=False)
        assert [entry.id for entry in claimed.entries] == [taken[1].id, taken[3].id]
        assert (await heir.streams.claim(STREAM, "owner", 10, idle=False)).entries == []
        assert "owner" not in await consumers_of(link)


async def test_suspect_goes_alone_to_an_idle_heir(link: Link, settings: Settings, front: Front) -> None:
    """An entry whose holders died twice never travels with others, nor with another suspect."""
    async with Hand(settings, "owner") as owner, Hand(settings, "heir") as heir:
        for _ in range(4):
            await front.submit(query(front))
        taken = await owner.take()
        await deliver(link, taken[0], "owner", 2)
        await deliver(link, taken[2], "owner", 2)
        await owner.die()
        busy = await heir.streams.claim(STREAM, "owner", 10, idle=False)
        assert ([entry.id for entry in busy.entries], busy.left) == ([taken[1].id, taken[3].id], 2)
        busy = await heir.streams.claim(STREAM, "owner", 10, idle=False)
        assert (busy.entries, busy.left) == ([], 2)
        idle = await heir.streams.claim(STREAM, "owner", 10, idle=True)
        assert ([entry.id for entry in idle.entries], idle.left) == ([taken[0].id], 1)
        assert idle.entries[0].deliveries == 3


async def test_lapsed_consumer_without_entries_is_removed(link: Link, settings: Settings) -> None:
    """One with a lease stays."""
    async with Hand(settings, "owner") as owner, Hand(settings, "heir") as heir:
        await link.call("XGROUP", "CREATECONSUMER", STREAM, "encoder", "owner")
        await heir.streams.claim(STREAM, "owner", 1, idle=False)
        assert await consumers_of(link) == {"owner"}
        await owner.die()
        await heir.streams.claim(STREAM, "owner", 1, idle=False)
        assert await consumers_of(link) == set()


async def test_claim_gives_back_nothing_of_the_job(link: Link, settings: Settings, front: Front) -> None:
    """The heir learns the job's replica; lease and running place stay with the job."""
    async with Hand(settings, "owner", "llm", placed=True) as owner, Hand(settings, "heir", "llm") as heir:
        await front.submit(prompt(front))
        (entry,) = (await owner.streams.place([Replica(FIRST, slots=1)], [[FIRST]])).entries
        await owner.die()
        (claimed,) = (await heir.streams.claim(entry.stream, "owner", 1, idle=False)).entries
        assert claimed.replica == FIRST
        assert await link.call("GET", keys.LOAD + FIRST) == b"1"
        assert await link.call("ZCARD", keys.RUNNING + FIRST) == 1
        assert (await heir.streams.place([Replica(FIRST, slots=1)], [[FIRST]])).standings[0].running == 1
        await heir.settle(complete(claimed))
        assert await link.call("GET", keys.LOAD + FIRST) == b"0"


async def test_twenty_thousand_entries_of_the_living_are_not_in_the_way(link: Link, settings: Settings) -> None:
    """A dead consumer's ten, at the end of the pending list, come in one call, which does not look at the others.

    A look at all of them is timed beside it, five times each: the quickest of five is what the work takes.
    """

    async def span_s(call: Awaitable[object]) -> float:
        began_s = time.monotonic()
        await call
        return time.monotonic() - began_s

    async with Hand(settings, "living") as living, Hand(settings, "heir") as heir:
        fill = "for i = 1, 10000 do redis.call('XADD', KEYS[1], '*', 'data', '{}') end"
        for _ in range(2):
            await link.call("EVAL", fill, 1, STREAM)
        assert len(await living.take(20_000)) == 20_000
        claims_s, looks_s = [], []
        for number in range(5):
            async with Hand(settings, f"dead-{number}") as dead:
                for _ in range(10):
                    await link.call("XADD", STREAM, "*", "data", "{}")
                theirs = await dead.take(10)
                await dead.die()
                claiming = asyncio.ensure_future(heir.streams.claim(STREAM, dead.name, 64, idle=False))
                claims_s.append(await span_s(claiming))
                looks_s.append(await span_s(link.call("XPENDING", STREAM, "encoder", "-", "+", 20_000)))
                assert [entry.id for entry in claiming.result().entries] == [entry.id for entry in theirs]
        assert min(claims_s) < min(looks_s)


# --- the claimer ----------------------------------------------------------------------------------


async def test_claim_needs_two_sightings_and_a_steady_connection(link: Link, settings: Settings, front: Front) -> None:
    """After an outage all leases have lapsed at once: owners get the time to take theirs again."""
    settings = changed(settings, worker={"lease_s": 10.0})
    stage = Scripted("encoder", echo)
    async with Hand(settings, "owner") as owner, still(settings, stage) as consumer:
        (worker,) = consumer.workers
        for _ in range(3):
            await front.submit(query(front))
        await owner.take()

        def age_sighting() -> None:
            for pair in consumer._missing:
                consumer._missing[pair] -= int(settings.worker.renew_s * 1e6)

        async def look() -> int:
            await consumer._claim_once(worker)
            return len(worker.held)

        connected = worker.streams.control.connected_at_us
        assert connected is not None
        worker.streams.control.connected_at_us = connected - int(STEADY_S * 1e6)
        assert await look() == 0  # the lease lives
        await owner.die()
        assert await look() == 0  # the first sighting
        assert await look() == 0  # too soon after it
        await owner.live()
        age_sighting()
        assert await look() == 0  # it is back
        await owner.die()
        assert await look() == 0  # the first sighting again
        age_sighting()
        worker.streams.control.connected_at_us = connected + 1_000_000
        assert await look() == 0  # we ourselves have just come back
        worker.streams.control.connected_at_us = connected - int(STEADY_S * 1e6)
        assert await look() == 3


async def test_renewal_extends_the_lease(link: Link, settings: Settings) -> None:
    """By its whole length, before it lapses, also when memory is full."""
    async with still(settings, Scripted("encoder", echo)) as consumer:
        key = keys.WORKER + consumer.name
        for maxmemory in ("0", "1mb"):
            await link.call("CONFIG", "SET", "maxmemory", maxmemory)
            try:
                await link.call("PEXPIRE", key, 300)
                await consumer.renew()
                assert await link.call("PTTL", key) > 700
            finally:
                await link.call("CONFIG", "SET", "maxmemory", "0")


async def test_claimer_takes_no_more_than_it_has_slots(link: Link, settings: Settings, front: Front) -> None:
    """The rest is for others."""
    gate = Gate()
    async with Hand(settings, "owner") as owner, still(settings, Scripted("encoder", gate, slots=2)) as consumer:
        (worker,) = consumer.workers
        for _ in range(5):
            await front.submit(query(front))
        await owner.take()
        await owner.die()
        await worker.inherit(STREAM, "owner")
        assert len(worker.held) == 2
        await worker.inherit(STREAM, "owner")
        assert len(worker.held) == 2
        gate.open()


async def test_work_of_the_dead_goes_before_new_work(link: Link, settings: Settings, front: Front) -> None:
    """Whoever always finds new work would else never have a slot for it."""
    first, second, third = jobs = [query(front) for _ in range(3)]
    may_end = {job.id: asyncio.Event() for job in jobs}

    async def handle(job: Job) -> Done:
        await may_end[job.id].wait()
        return Done({})

    stage = Scripted("encoder", handle, slots=1)
    async with Hand(settings, "owner") as owner, still(settings, stage) as consumer:
        (worker,) = consumer.workers
        await front.submit(first)
        await owner.take_one()
        await owner.die()
        await front.submit(second)
        await front.submit(third)
        await worker._feed()
        await wait_until(lambda: stage.runs(second.id))
        await worker.inherit(STREAM, "owner")  # no slot is free
        for ended, next_one in ((second, first), (first, third)):
            may_end[ended.id].set()
            await wait_until(lambda: not worker.held)
            await worker._feed()
            await wait_until(lambda next_one=next_one: stage.runs(next_one.id))  # type: ignore[misc]
        may_end[third.id].set()


async def test_crashed_workers_jobs_end_elsewhere(link: Link, settings: Settings, front: Front) -> None:
    """Once; nothing of the dead consumer is left. How soon, the fault suite tells."""
    settings = changed(settings, worker={"lease_s": 0.5})
    gate = Gate()
    dying, heir = Scripted("encoder", gate), Scripted("encoder", echo, slots=3)
    async with working(settings, [dying]) as (victim,):
        jobs = [query(front, route=["encoder"]) for _ in range(8)]
        for job in jobs:
            await front.submit(job)
        await wait_until(lambda: len(gate.waiting) == 8)
        async with working(settings, [heir]):
            await victim.crash()
            async with asyncio.timeout(PATIENCE_S):
                found = [await front.wait(job.id, job.tenant, job.deadline_ms) for job in jobs]
            assert {completion.status for completion in found} == {"completed"}
            assert sorted(job.id for job in heir.seen) == sorted(job.id for job in jobs)
            await wait_until(lambda: _lacks(link, victim.name))
    await assert_nothing_is_left(link)


async def _lacks(link: Link, consumer: str) -> bool:
    return consumer not in await consumers_of(link)


async def test_long_job_runs_once_under_a_short_lease(link: Link, settings: Settings, front: Front) -> None:
    """Liveness is the consumer's lease, not the age of the entry."""
    settings = changed(settings, worker={"lease_s": 0.5})
    gate = Gate()
    stages = [Scripted("encoder", gate) for _ in range(2)]
    async with working(settings, stages):
        job = query(front, route=["encoder"])
        await front.submit(job)

        async def is_three_leases_old() -> bool:
            rows = await link.call("XPENDING", STREAM, "encoder", "-", "+", 1)
            return bool(rows) and rows[0][2] > 3 * settings.worker.lease_s * 1000

        await wait_until(is_three_leases_old)
        gate.open()
        completion = await front.wait(job.id, job.tenant, job.deadline_ms)
        assert completion.status == "completed"
        assert [stage.runs(job.id) for stage in stages] in ([1, 0], [0, 1])


# --- poison ---------------------------------------------------------------------------------------


async def test_poison_is_buried_and_its_neighbours_are_not(link: Link, settings: Settings, front: Front) -> None:
    """A job that kills its consumer three times, among seven innocent ones in the same hands."""
    settings = changed(settings, worker={"lease_s": 0.5})
    deaths = 0
    async with asyncio.TaskGroup() as group:
        current: Mortal | None = None
        killers: list[str] = []

        async def handle(job: Job) -> Done:
            if job.payload["query"] == "kill":
                killers.append(job.id)
                await asyncio.Event().wait()
            while killers:  # hold the neighbours until the end of this consumer
                await asyncio.sleep(0.005)
            return Done({"answer": "fine"})

        def spawn() -> Mortal:
            consumer = Mortal([Scripted("encoder", handle)], settings)
            consumer.task = group.create_task(consumer.run())
            return consumer

        jobs = [query(front, "kill" if n == 3 else "live", route=["encoder"]) for n in range(8)]
        for job in jobs:
            await front.submit(job)
        current = spawn()
        while not await outcome(link, jobs[3].id):
            if killers:
                (worker,) = current.workers
                if deaths >= 2:
                    assert len(worker.held) == 1, "a suspect must run alone"
                await current.crash()
                killers.clear()
                deaths += 1
                current = spawn()
            await asyncio.sleep(0.01)
        found = [await front.wait(job.id, job.tenant, job.deadline_ms) for job in jobs]
        current.stop()
    assert deaths == settings.worker.max_deliveries
    assert [completion.status for completion in found] == ["completed"] * 3 + ["failed"] + ["completed"] * 4
    (letter,) = await letters(link)
    assert (letter["reason"], letter["job_id"], letter["deliveries"]) == ("poison", jobs[3].id, 4)
    error = found[3].error
    assert error is not None
    assert error["code"] == "poison"
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("deliveries", [3, 4])
async def test_poison_is_told_by_its_deliveries(link: Link, settings: Settings, front: Front, deliveries: int) -> None:
    """With three allowed the third delivery still runs, the fourth does not."""
    stage = Scripted("encoder", echo)
    async with Hand(settings, "owner") as owner:
        job = query(front, route=["encoder"])
        await front.submit(job)
        await deliver(link, await owner.take_one(), "owner", deliveries - 1)
        await owner.die()
        async with working(changed(settings, worker={"lease_s": 0.5}), [stage]):
            completion = await front.wait(job.id, job.tenant, job.deadline_ms)
            assert completion.status == ("completed" if deliveries == 3 else "failed")
            assert stage.runs(job.id) == (1 if deliveries == 3 else 0)


async def test_suspect_waits_for_empty_hands(link: Link, settings: Settings, front: Front) -> None:
    """All stages of a process stop reading until nothing is in hand; only then does it start, and alone."""
    settings = changed(settings, worker={"lease_s": 0.5})
    gate = Gate()
    neighbours: list[int] = []

    async def handle(job: Job) -> Done:
        neighbours.append(sum(len(worker.held) for worker in consumer.workers) - 1)
        return await echo(job)

    async with Hand(settings, "owner") as owner:
        suspect = query(front, route=["encoder"])
        await front.submit(suspect)
        await deliver(link, await owner.take_one(), "owner", 2)
        innocent = query(front, route=["retriever"])
        await front.submit(innocent)
        consumer = Mortal([Scripted("encoder", handle), Scripted("retriever", gate)], settings)
        async with asyncio.TaskGroup() as group:
            consumer.task = group.create_task(consumer.run())
            await wait_until(lambda: gate.waiting)
            await owner.die()
            quarantine = consumer._quarantine
            await wait_until(lambda: quarantine.is_on)
            await wait_until(lambda: not quarantine.is_on)  # nobody starves for it: it is tried again later
            assert neighbours == []
            gate.open()
            assert (await front.wait(suspect.id, suspect.tenant, suspect.deadline_ms)).status == "completed"
            assert neighbours == [0]
            assert (await front.wait(innocent.id, innocent.tenant, innocent.deadline_ms)).status == "completed"
            consumer.stop()
