"""One job's trouble is no other's: batch mates, neighbours of a suspect, and all who share keys with a broken one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from pipeline import keys, scripts
from pipeline import quarantine as quarantine_module
from pipeline.balancing import Replica
from pipeline.connection import CommandRefused, Link
from pipeline.front import Front
from pipeline.job import Done, Job, Priority
from pipeline.settings import Settings
from pipeline.stage import Outcome
from pipeline.streams import Entry
from tests.conftest import wait_until
from tests.rig import (
    FIRST,
    SECOND,
    THIRD,
    Gate,
    Hand,
    Mortal,
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


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A short lease: consumers are soon taken for dead, and patience begins short."""
    return changed(settings, worker={"lease_s": 0.5})


async def submit(front: Front, jobs: Sequence[Job]) -> None:
    for job in jobs:
        await front.submit(job)


async def statuses(front: Front, jobs: Sequence[Job]) -> list[str]:
    return [(await front.wait(job.id, job.tenant, job.deadline_ms)).status for job in jobs]


@asynccontextmanager
async def suspects(
    link: Link, front: Front, settings: Settings, count: int, *, innocent: Sequence[Job] = ()
) -> AsyncIterator[list[Job]]:
    """Jobs whose holders died twice, in the hands of a dead consumer called `owner`, before *innocent* ones."""
    async with Hand(settings, "owner") as owner:
        jobs = [query(front, "suspect", route=["encoder"]) for _ in range(count)]
        await submit(front, [*jobs, *innocent])
        for entry in (await owner.take())[:count]:
            await link.call("XCLAIM", STREAM, "encoder", "owner", 0, entry.id, "RETRYCOUNT", 2, "JUSTID")
        await owner.die()
        yield jobs


class Neighbours:
    """A handler that notes how many others are in hand while a suspect runs."""

    def __init__(self, others: Gate) -> None:
        self.seen: list[int] = []
        self.consumer: Mortal
        self._others = others

    async def __call__(self, job: Job) -> Done:
        if job.payload["query"] != "suspect":
            return await self._others(job)
        self.seen.append(sum(len(worker.held) for worker in self.consumer.workers) - 1)
        return await echo(job)


# --- batches --------------------------------------------------------------------------------------


async def test_batch_mate_ends_at_its_own_deadline(link: Link, settings: Settings, front: Front) -> None:
    """While the batch goes on; the others complete with it."""
    gate = asyncio.Event()

    async def handle(jobs: Sequence[Job]) -> list[Outcome]:
        await gate.wait()
        return [await echo(job) for job in jobs]

    stage = ScriptedBatch("encoder", handle)
    short = query(front, lifetime_s=0.3, route=["encoder"])
    mates = [query(front, text, route=["encoder"]) for text in ("a", "b")]
    await submit(front, [mates[0], short, mates[1]])
    async with working(settings, [stage]):
        assert await statuses(front, [short]) == ["expired"]
        assert [await outcome(link, job.id) for job in mates] == [None, None]
        gate.set()
        found = [await front.wait(job.id, job.tenant, job.deadline_ms) for job in mates]
        assert [completion.result for completion in found] == [{"answer": "a"}, {"answer": "b"}]
        assert stage.calls == [[mates[0].id, short.id, mates[1].id]]
        ended = await outcome(link, short.id)
        assert ended is not None
        assert ended.status == "expired"
    await assert_nothing_is_left(link)


async def test_batch_is_of_one_priority(link: Link, settings: Settings, front: Front) -> None:
    """A question that was read together with documents does not wait for them."""
    gate = asyncio.Event()

    async def handle(jobs: Sequence[Job]) -> list[Outcome]:
        if any(job.payload["query"] == "document" for job in jobs):
            await gate.wait()
        return [await echo(job) for job in jobs]

    stage = ScriptedBatch("encoder", handle)
    slow = [query(front, "document", route=["encoder"]) for _ in range(3)]
    for job in slow:
        job.priority = "low"
    quick = query(front, "question", route=["encoder"])
    await submit(front, [*slow, quick])
    async with working(settings, [stage]):
        assert await statuses(front, [quick]) == ["completed"]
        assert [await outcome(link, job.id) for job in slow] == [None, None, None]
        gate.set()
        assert await statuses(front, slow) == ["completed"] * 3
    assert sorted(map(len, stage.calls)) == [1, 3]


async def test_batch_stops_when_none_of_its_jobs_has_time_left(link: Link, settings: Settings, front: Front) -> None:
    """Nobody would want its answer."""
    stopped = asyncio.Event()

    async def handle(jobs: Sequence[Job]) -> list[Outcome]:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return []

    jobs = [query(front, lifetime_s=lifetime_s, route=["encoder"]) for lifetime_s in (0.3, 0.4)]
    await submit(front, jobs)
    async with working(settings, [ScriptedBatch("encoder", handle)]):
        assert await statuses(front, jobs) == ["expired", "expired"]
        await wait_until(stopped.is_set)
    await assert_nothing_is_left(link)


# --- suspects -------------------------------------------------------------------------------------


async def test_suspects_do_not_stop_the_others(link: Link, settings: Settings, front: Front) -> None:
    """Between two of them reading goes on: an innocent job passes before the second has its turn."""
    gate = Gate()

    async def handle(job: Job) -> Done:
        return await (gate if job.payload["query"] == "suspect" else echo)(job)

    stage = Scripted("encoder", handle)
    async with suspects(link, front, settings, 3) as jobs, working(settings, [stage]):
        await wait_until(lambda: gate.waiting)
        innocent = query(front, "me", route=["encoder"])
        await front.submit(innocent)
        gate.open()
        assert await statuses(front, [innocent]) == ["completed"]
        assert sum(stage.runs(job.id) for job in jobs) == 1
        assert await statuses(front, jobs) == ["completed"] * 3


async def test_suspect_runs_among_calls_longer_than_a_lease(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience grows until it outlasts them, and they go on meanwhile."""
    monkeypatch.setattr(quarantine_module, "LEAST_REST_S", 0.1)
    settings = changed(settings, worker={"lease_s": 0.25})
    call_s = 3 * settings.worker.lease_s

    async def handle(job: Job) -> Done:
        if job.payload["query"] != "suspect":
            await asyncio.sleep(call_s)
        return await echo(job)

    stage = Scripted("encoder", handle)
    async with suspects(link, front, settings, 1) as jobs, working(settings, [stage]):

        async def feed(number: int) -> None:
            await asyncio.sleep(call_s * number / 4)  # so that hands are never empty by themselves
            while not stage.runs(jobs[0].id):
                await ask(front, query(front, "long", route=["encoder"]))

        async with asyncio.TaskGroup() as group:
            feeders = [group.create_task(feed(number)) for number in range(4)]
            assert await statuses(front, jobs) == ["completed"]
        assert all(feeder.done() for feeder in feeders)
        assert len(stage.seen) > len(feeders)


async def test_suspect_found_by_reconciliation_runs_alone(link: Link, settings: Settings, front: Front) -> None:
    """The claim of it was served to a connection that died: it is ours, and waits for empty hands all the same."""
    gate = Gate()
    handle = Neighbours(gate)
    async with suspects(link, front, settings, 1) as jobs, Hand(settings, "heir") as heir:
        async with working(settings, [Scripted("encoder", handle)]) as (handle.consumer,):
            innocent = query(front, "live", route=["encoder"])
            await front.submit(innocent)
            await wait_until(lambda: gate.waiting)
            (worker,) = handle.consumer.workers
            heir.streams._consumer = handle.consumer.name
            assert (await heir.streams.claim(STREAM, "owner", 1, idle=True)).entries
            await wait_until(lambda: worker._own_suspects)
            await wait_until(lambda: handle.consumer._quarantine.is_on)
            assert handle.seen == []
            gate.open()
            assert await statuses(front, [*jobs, innocent]) == ["completed"] * 2
        assert handle.seen == [0]


async def test_suspect_in_still_hands_stays_ours(link: Link, settings: Settings, front: Front) -> None:
    """Reconciliation notes it and starts nothing."""
    gate = Gate()
    async with suspects(link, front, settings, 1), still(settings, Scripted("encoder", gate)) as consumer:
        (worker,) = consumer.workers
        (entry,) = (await worker.streams.claim(STREAM, "owner", 1, idle=True)).entries
        await consumer.renew()
        await consumer.renew()
        await wait_until(lambda: worker._own_suspects)
        assert worker.held == {}
        assert list(worker._own_suspects) == [(STREAM, entry.id)]


async def test_suspect_waits_for_a_claim_in_flight(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Innocent entries on their way into these hands are neighbours already."""
    gate = Gate()
    handle = Neighbours(gate)
    innocent = [query(front, "live", route=["encoder"]) for _ in range(2)]
    async with (
        suspects(link, front, settings, 1, innocent=innocent) as jobs,
        working(settings, [Scripted("encoder", handle)]) as (handle.consumer,),
    ):
        (worker,) = handle.consumer.workers
        claim, go, sent = worker.streams.claim, asyncio.Event(), asyncio.Event()

        async def slow(stream: str, lapsed: str, most: int, *, idle: bool) -> object:
            claimed = await claim(stream, lapsed, most, idle=idle)
            if not idle and claimed.entries:
                sent.set()
                await go.wait()
            return claimed

        monkeypatch.setattr(worker.streams, "claim", slow)
        await wait_until(sent.is_set)
        worker._suspects.add((STREAM, "owner"))
        await wait_until(lambda: handle.consumer._quarantine.is_on)
        go.set()
        await wait_until(lambda: len(gate.waiting) == 2)
        assert handle.seen == []
        gate.open()
        assert await statuses(front, [*jobs, *innocent]) == ["completed"] * 3
        assert handle.seen == [0]


# --- keys of a wrong type -------------------------------------------------------------------------


async def test_promotion_goes_on_past_a_key_of_a_wrong_type(link: Link, settings: Settings, front: Front) -> None:
    """What cannot be moved is put off, not lost; it is moved when an operator has mended its stream."""
    async with Hand(settings, "one") as one, Hand(settings, "other", "retriever") as other:
        jobs = [query(front, route=[stage]) for stage in ("encoder", "retriever")]
        await submit(front, jobs)
        await one.settle(retry(await one.take_one(), 0))
        await other.settle(retry(await other.take_one(), 0))
        await link.call("RENAME", STREAM, "aside")
        await link.call("SET", STREAM, "x")
        assert (await link.run(scripts.PROMOTE, (), (10, "one", 100)))[1:3] == [1, 1]
        assert await link.call("XLEN", keys.stream("retriever")) == 1
        assert await link.call("ZRANGE", keys.DELAYED, 0, -1) == [jobs[0].id.encode()]
        await link.call("RENAME", "aside", STREAM)
        await link.call("ZADD", keys.DELAYED, 1, jobs[0].id)
        assert (await link.run(scripts.PROMOTE, (), (10, "one", 100)))[1:3] == [1, 0]
        assert await one.settle(complete(await one.take_one())) == ["settled"]
        assert await other.settle(complete(await other.take_one())) == ["settled"]
    await assert_nothing_is_left(link)


async def test_expiry_goes_on_past_a_key_of_a_wrong_type(link: Link, settings: Settings, front: Front) -> None:
    """The others' deadlines hold."""
    bad, good = query(front, tenant="bad"), query(front)
    await front.submit(bad, in_flight_limit=10)
    await front.submit(good)
    await link.call("SET", keys.IN_FLIGHT + "bad", "x")
    await link.call("ZADD", keys.LIVE_INDEX, "XX", 1, bad.id, 2, good.id)
    assert (await link.run(scripts.EXPIRE, (), (10, 60_000)))[1:] == [1, 0]
    found = await outcome(link, good.id)
    assert found is not None
    assert found.status == "expired"
    await link.call("DEL", keys.IN_FLIGHT + "bad")
    await link.call("ZADD", keys.LIVE_INDEX, "XX", 1, bad.id)
    assert (await link.run(scripts.EXPIRE, (), (10, 60_000)))[1:] == [1, 0]
    await assert_nothing_is_left(link)


@asynccontextmanager
async def wrong(link: Link, key: str) -> AsyncIterator[None]:
    """*key* is a string for a while; what it held is put aside."""
    held = await link.call("EXISTS", key)
    if held:
        await link.call("RENAME", key, "aside")
    await link.call("SET", key, "x")
    yield
    if held:
        await link.call("RENAME", "aside", key)
    else:
        await link.call("DEL", key)


@pytest.mark.parametrize("broken", [keys.RUNNING, keys.LEASES])
async def test_placing_goes_round_a_replica_with_a_broken_key(
    link: Link, settings: Settings, front: Front, broken: str
) -> None:
    """It has no slot as long as that lasts; the others have theirs."""
    replicas = [Replica(url, slots=2) for url in (FIRST, SECOND)]
    async with Hand(settings, "owner", "llm", placed=True) as owner:
        await submit(front, [prompt(front) for _ in range(3)])
        async with wrong(link, broken + FIRST):
            placed = await owner.streams.place(replicas, [[FIRST, SECOND]] * 3)
            assert [entry.replica for entry in placed.entries] == [SECOND, SECOND]
            assert [standing.running for standing in placed.standings] == [-1, 2]
            assert placed.waiting == 1
        placed_later = await owner.streams.place(replicas, [[FIRST, SECOND]])
        assert [entry.replica for entry in placed_later.entries] == [FIRST]
        assert [standing.running for standing in placed_later.standings] == [1, 2]
        await owner.settle(*[complete(entry) for entry in (*placed.entries, *placed_later.entries)])
    await assert_nothing_is_left(link)


async def test_worker_goes_round_a_replica_with_a_broken_key(link: Link, settings: Settings, front: Front) -> None:
    """And back to it when it is mended."""
    settings = changed(settings, llm={"urls": (FIRST, SECOND), "slots": 1})
    gate = Gate()
    stage = Scripted("llm", gate, placed=True)
    jobs = [prompt(front) for _ in range(2)]
    async with working(settings, [stage]):
        async with wrong(link, keys.RUNNING + FIRST):
            await submit(front, jobs)
            await wait_until(lambda: gate.waiting)
            assert [job.replica for job in stage.seen] == [SECOND]
        await wait_until(lambda: len(gate.waiting) == 2)
        assert [job.replica for job in stage.seen] == [SECOND, FIRST]
        gate.open()
        assert await statuses(front, jobs) == ["completed"] * 2
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("broken", [keys.RUNNING, keys.LEASES])
async def test_lease_that_cannot_be_given_back_is_its_own_jobs_trouble(
    link: Link, settings: Settings, front: Front, broken: str
) -> None:
    """Its job is not placed anywhere else, since it would hold two; the next one is."""
    await link.call("HSET", keys.REPLICAS, FIRST, b'{"slots":1,"seen_ms":99999999999999}')
    await front._refresh()
    stuck, free = query(front, route=["llm"]), prompt(front)
    await submit(front, [stuck, free])
    async with Hand(settings, "owner", "llm", placed=True) as owner:
        async with wrong(link, broken + FIRST):
            placed = await owner.streams.place([Replica(SECOND, slots=2)], [[SECOND]] * 2)
            assert [entry.replica for entry in placed.entries] == ["", SECOND]
            assert placed.standings[0].running == 1
            before = await everything(link)
            with pytest.raises(CommandRefused):
                await owner.streams.move(placed.entries[0], stuck.id, [Replica(SECOND, slots=2)])
            assert await everything(link) == before
        assert await owner.streams.move(placed.entries[0], stuck.id, [Replica(SECOND, slots=2)]) == SECOND
        await owner.settle(*[complete(entry) for entry in placed.entries])
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("broken", [keys.RUNNING, keys.LEASES])
async def test_moving_goes_round_a_replica_with_a_broken_key(
    link: Link, settings: Settings, front: Front, broken: str
) -> None:
    """The job takes the next one of its order."""
    job = prompt(front)
    await front.submit(job)
    async with Hand(settings, "owner", "llm", placed=True) as owner:
        (entry,) = (await owner.streams.place([Replica(FIRST, slots=1)], [[FIRST]])).entries
        async with wrong(link, broken + SECOND):
            order = [Replica(url, slots=1) for url in (SECOND, THIRD)]
            assert await owner.streams.move(entry, job.id, order) == THIRD
        assert await link.call("GET", keys.LOAD + FIRST) == b"0"
        await owner.settle(complete(entry))
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("key", [keys.HEALTH + FIRST, keys.LIVE + "another"])
async def test_placing_reads_past_what_it_cannot_read(link: Link, settings: Settings, front: Front, key: str) -> None:
    """A replica's health is an estimate; a live record that is none is a stranger's entry."""
    another, job = prompt(front), prompt(front)
    another.id = "another"
    await submit(front, [another, job])
    async with Hand(settings, "owner", "llm", placed=True) as owner:
        async with wrong(link, key):
            entries = (await owner.streams.place([Replica(FIRST, slots=2)], [[FIRST]] * 2)).entries
            assert entries[1].replica == FIRST
        assert len(entries) == 2
        await owner.settle(*[complete(entry) for entry in entries])
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("priority", ["high", "low"])
async def test_stream_of_a_wrong_type_hides_nothing_that_was_read(
    link: Link, settings: Settings, front: Front, priority: Priority, *, placed: bool
) -> None:
    """What another priority has is delivered and heard of; a call that finds nothing else says what is wrong."""
    stage = "llm" if placed else "encoder"
    jobs = [query(front, route=[stage]) for _ in range(3)]
    await submit(front, jobs)
    async with Hand(settings, "owner", stage, placed=placed) as owner:

        async def take() -> list[Entry]:
            if placed:
                return (await owner.streams.place([Replica(FIRST, slots=9)], [[FIRST]] * 9)).entries
            return await owner.take(9)

        async with wrong(link, keys.stream(stage, priority)):
            entries = await take()
            assert len(entries) == 3
            with pytest.raises(CommandRefused):
                await take()
        assert await take() == []
        await owner.settle(*[complete(entry) for entry in entries])
    await assert_nothing_is_left(link)


async def test_lease_is_renewed_past_a_list_of_workers_of_a_wrong_type(
    link: Link, settings: Settings, front: Front
) -> None:
    """The list is for people; what this consumer holds is still compared."""
    async with still(settings, Scripted("encoder", echo)) as consumer:
        job = query(front, route=["encoder"])
        await front.submit(job)
        await link.call("XREADGROUP", "GROUP", "encoder", consumer.name, "COUNT", 1, "STREAMS", STREAM, ">")
        async with wrong(link, keys.WORKERS):
            await link.call("PEXPIRE", keys.WORKER + consumer.name, 100)
            for _ in range(2):
                await consumer.renew()
            assert await link.call("PTTL", keys.WORKER + consumer.name) > 100
            assert await statuses(front, [job]) == ["completed"]
    await assert_nothing_is_left(link)


# --- jobs to start --------------------------------------------------------------------------------


async def test_job_to_start_that_cannot_be_written_hurts_only_its_own(
    link: Link, settings: Settings, front: Front
) -> None:
    """The job that wanted it fails; those settled at the same time complete, at their first attempt."""
    gate = Gate()

    async def handle(job: Job) -> Done:
        done = await gate(job)
        if job.payload["query"] != "bad":
            return done
        child = query(front, "child")
        child.payload = {"query": object()}
        return Done(done.value, start=(child,))

    stage = Scripted("encoder", handle)
    jobs = [query(front, text, route=["encoder"]) for text in ("bad", "a", "b", "c")]
    async with working(changed(settings, retry={"max_retries": 0}), [stage]):
        await submit(front, jobs)
        await wait_until(lambda: len(gate.waiting) == 4)
        gate.open()
        assert await statuses(front, jobs) == ["failed", "completed", "completed", "completed"]
        assert [stage.runs(job.id) for job in jobs] == [1] * 4
