"""The settle script: one outcome per entry, by the owner of this delivery, in one step or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from msgspec import structs

from pipeline import keys, scripts
from pipeline.accepting import Idempotency
from pipeline.balancing import Replica
from pipeline.connection import CommandRefused, Link
from pipeline.front import Front
from pipeline.job import Job
from pipeline.settings import Settings
from pipeline.streams import Entry, Settlement
from tests.rig import (
    FIRST,
    Hand,
    assert_nothing_is_left,
    bury,
    changed,
    complete,
    everything,
    forward,
    is_running,
    letters,
    outcome,
    prompt,
    query,
    release,
    retry,
)

VERBS: dict[str, Callable[[Entry], Settlement]] = {
    "forward": forward,
    "complete": complete,
    "retry": retry,
    "release": release,
    "bury": bury,
}


@pytest.mark.parametrize("verb", VERBS)
async def test_stranger_cannot_settle(link: Link, settings: Settings, front: Front, verb: str) -> None:
    """Who does not own the entry is refused, and nothing is written."""
    async with Hand(settings, "owner") as owner, Hand(settings, "stranger") as stranger:
        await front.submit(query(front))
        entry = await owner.take_one()
        before = await everything(link)
        assert await stranger.settle(VERBS[verb](entry)) == ["lost"]
        assert await everything(link) == before
        assert await owner.settle(complete(entry)) == ["settled"]


@pytest.mark.parametrize("verb", VERBS)
async def test_older_delivery_cannot_settle(link: Link, settings: Settings, front: Front, verb: str) -> None:
    """The same consumer may hold the entry again by now: an outcome of the earlier delivery is refused."""
    async with Hand(settings, "owner") as owner:
        await front.submit(query(front))
        entry = await owner.take_one()
        await link.call("XCLAIM", entry.stream, "encoder", "owner", 0, entry.id)
        before = await everything(link)
        assert await owner.settle(VERBS[verb](entry)) == ["lost"]
        assert await everything(link) == before


@pytest.mark.parametrize("verb", VERBS)
async def test_removed_consumer_cannot_settle(link: Link, settings: Settings, front: Front, verb: str) -> None:
    """After DELCONSUMER the entry has no owner."""
    async with Hand(settings, "owner") as owner:
        await front.submit(query(front))
        entry = await owner.take_one()
        await link.call("XGROUP", "DELCONSUMER", entry.stream, "encoder", "owner")
        before = await everything(link)
        assert await owner.settle(VERBS[verb](entry)) == ["lost"]
        assert await everything(link) == before


async def test_of_two_racing_consumers_one_writes_the_outcome(link: Link, settings: Settings, front: Front) -> None:
    """A paused owner and its heir settle at once, many times over: the heir's word stands, the owner's is refused."""
    async with Hand(settings, "owner") as owner, Hand(settings, "heir") as heir:
        for _ in range(20):
            await owner.live()
            job_id = (await front.submit(query(front))).job_id
            entry = await owner.take_one()
            await owner.die()
            (claimed,) = (await heir.streams.claim(entry.stream, "owner", 1, idle=False)).entries
            answers = await asyncio.gather(owner.settle(forward(entry)), heir.settle(complete(claimed)))
            assert list(answers) == [["lost"], ["settled"]]
            assert (await outcome(link, job_id)) is not None
            assert await link.call("XLEN", keys.stream("retriever")) == 0
    await assert_nothing_is_left(link)


async def test_one_lost_entry_does_not_hold_up_its_batch(link: Link, settings: Settings, front: Front) -> None:
    """Each entry of a batch is answered for itself."""
    async with Hand(settings, "owner") as owner:
        for _ in range(5):
            await front.submit(query(front))
        entries = await owner.take()
        await link.call("XCLAIM", entries[2].stream, "encoder", "thief", 0, entries[2].id)
        batch = [forward(entries[0]), complete(entries[1]), complete(entries[2]), release(entries[3]), bury(entries[4])]
        assert await owner.settle(*batch) == ["settled", "settled", "lost", "settled", "settled"]
        assert await link.call("XLEN", keys.stream("encoder")) == 2  # the stolen one and the released one
        assert await link.call("XLEN", keys.stream("retriever")) == 1
        assert len(await letters(link)) == 1


async def test_settling_twice_is_refused(link: Link, settings: Settings, front: Front) -> None:
    """What is settled is nobody's any more."""
    async with Hand(settings, "owner") as owner:
        await front.submit(query(front))
        entry = await owner.take_one()
        assert await owner.settle(forward(entry)) == ["settled"]
        before = await everything(link)
        assert await owner.settle(forward(entry)) == ["lost"]
        assert await owner.settle(complete(entry)) == ["lost"]
        assert await everything(link) == before


async def test_completing_ends_the_job_everywhere(link: Link, settings: Settings, front: Front) -> None:
    """The completion stands, with a TTL; entry, live record, in-flight member and lease are gone."""
    await link.call("HSET", keys.REPLICAS, FIRST, b'{"slots":1,"seen_ms":99999999999999}')
    await front._refresh()
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job, in_flight_limit=5)
        assert await link.call("GET", keys.LOAD + FIRST) == b"1"
        assert await link.call("SMEMBERS", keys.IN_FLIGHT + "default") == [job.id.encode()]
        assert await owner.settle(complete(await owner.take_one())) == ["settled"]
        found = await outcome(link, job.id)
        assert found is not None
        assert found.status == "completed"
        assert 0 < await link.call("PTTL", keys.COMPLETION + job.id) <= 60_000
    await assert_nothing_is_left(link)


async def test_forwarded_envelope_survives_byte_for_byte(link: Link, settings: Settings, front: Front) -> None:
    """Scripts carry envelopes, they do not read them: empty lists, long numbers and odd text stay as they are."""
    text = '{"e":[],"o":{},"n":123456789012345678901234567890,"f":1.10,"u":"ü \\u2028 🦊","s":" }"}'
    async with Hand(settings, "owner") as owner, Hand(settings, "next", "retriever") as following:
        job = query(front)
        await front.submit(job)
        entry = await owner.take_one()
        envelope = (entry.data or b"")[:-1] + b',"odd":' + text.encode() + b"}"
        target = keys.stream("retriever")
        vector = bytes(range(256))
        assert await owner.settle(Settlement(entry, job.id, "forward", target, envelope, vector)) == ["settled"]
        moved = await following.take_one()
        assert (moved.data, moved.vector) == (envelope, vector)
        delayed = Settlement(moved, job.id, "retry", 0, envelope, vector)
        assert await following.settle(delayed) == ["settled"]
        assert (await link.run(scripts.PROMOTE, (), (10, "one", 100)))[1] == 1
        again = await following.take_one()
        assert (again.data, again.vector, again.deliveries) == (envelope, vector, 1)
        assert await following.settle(Settlement(again, job.id, "release", "", envelope, vector)) == ["settled"]
        last = await following.take_one()
        assert (last.data, last.vector, last.deliveries) == (envelope, vector, 1)


async def test_live_record_names_the_entry_at_every_hop(link: Link, settings: Settings, front: Front) -> None:
    """An entry that the live record does not name is an orphan: it can be buried, and nothing else."""
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        first = await owner.take_one()
        twin = await link.call("XADD", first.stream, "*", "data", first.data or b"")
        second = await owner.take_one()
        assert second.id == twin
        before = await everything(link)
        for verb in (forward, complete, retry, release):
            assert await owner.settle(verb(second)) == ["orphan"]
        assert await everything(link) == before
        assert await owner.settle(bury(second)) == ["settled"]
        assert await outcome(link, job.id) is None
        assert len(await letters(link)) == 1
        assert await owner.settle(complete(first)) == ["settled"]
        found = await outcome(link, job.id)
        assert found is not None
        assert found.status == "completed"


async def test_burying_an_orphan_of_an_ended_job_keeps_its_outcome(
    link: Link, settings: Settings, front: Front
) -> None:
    """The one outcome stands, whatever entry turns up afterwards."""
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        entry = await owner.take_one()
        await owner.settle(complete(entry))
        before = await link.call("GET", keys.COMPLETION + job.id)
        await link.call("XADD", entry.stream, "*", "data", entry.data or b"")
        assert await owner.settle(bury(await owner.take_one())) == ["settled"]
        assert await link.call("GET", keys.COMPLETION + job.id) == before


async def test_burying_a_stranger_does_not_end_a_job_that_its_batch_mate_starts(
    link: Link, settings: Settings, front: Front
) -> None:
    """In one batch a job begins under the id of a foreign entry that is buried: the job lives, and ends by itself."""
    async with Hand(settings, "owner") as owner:
        child = query(front)
        await front.submit(query(front))
        await link.call("XADD", keys.stream("encoder"), "*", "data", b'{"id":"%b"}' % child.id.encode())
        ours, foreign = await owner.take()
        assert await owner.settle(forward(ours, start=[child]), bury(foreign, child.id)) == ["settled", "settled"]
        assert await outcome(link, child.id) is None
        assert len(await letters(link)) == 1
        assert await owner.settle(complete(await owner.take_one())) == ["settled"]
        found = await outcome(link, child.id)
        assert found is not None
        assert found.status == "completed"


async def test_further_jobs_start_in_the_same_step(link: Link, settings: Settings, front: Front) -> None:
    """With a forward and with a completion; each has its live record; none is started twice, none on refusal."""
    async with Hand(settings, "owner") as owner, Hand(settings, "stranger") as stranger:
        for _ in range(2):
            await front.submit(query(front))
        one, two = await owner.take()
        children: list[Job] = [query(front, f"child {n}") for n in range(3)]
        assert await stranger.settle(complete(one, start=children)) == ["lost"]
        assert await link.call("XLEN", keys.stream("encoder")) == 2
        assert await owner.settle(forward(one, start=children[:2]), complete(two, start=children)) == [
            "settled",
            "settled",
        ]
        started = await owner.take()
        assert sorted(complete(entry).job_id for entry in started) == sorted(child.id for child in children)
        assert await owner.settle(*[complete(entry) for entry in started]) == ["settled"] * 3


@pytest.mark.parametrize(
    "key",
    [
        keys.DEAD,
        keys.DELAYED,
        keys.LIVE_INDEX,
        keys.stream("retriever"),
        keys.stream("child"),
        keys.IN_FLIGHT + "default",
        keys.IDEMPOTENCY + "key",
        keys.LEASES + FIRST,
        keys.RUNNING + FIRST,
    ],
)
async def test_key_of_a_wrong_type_is_refused_before_the_first_write(
    link: Link, settings: Settings, front: Front, key: str
) -> None:
    """A script that fails half-way keeps what it wrote, so it must not begin."""
    await link.call("HSET", keys.REPLICAS, FIRST, b'{"slots":1,"seen_ms":99999999999999}')
    await front._refresh()
    async with Hand(settings, "owner") as owner:
        for number in range(2):
            await front.submit(
                query(front), in_flight_limit=9, idempotency=Idempotency("key", "same") if number else None
            )
        one, two = await owner.take()
        child = query(front)
        child.route = ["child"]
        await link.call("SET", key, "a string", "PX", 60_000)
        before = await everything(link)
        with pytest.raises(CommandRefused):
            await owner.settle(complete(one), forward(two, start=[child]))
        with pytest.raises(CommandRefused):
            await owner.settle(forward(one, start=[child]), complete(two))
        assert await everything(link) == before
        await link.call("DEL", key)


async def test_batch_whose_entries_lie_apart_is_settled_whole(link: Link, settings: Settings, front: Front) -> None:
    """In any order, of several streams, with entries of this consumer and of others between them."""
    async with Hand(settings, "owner") as owner, Hand(settings, "other") as other:
        jobs = [query(front, priority="high" if number % 4 == 0 else "normal") for number in range(12)]
        for job in jobs:
            await front.submit(job)
        entries = [entry for _ in range(6) for entry in (await owner.take_one(), await other.take_one())]
        ours, theirs = entries[::2], entries[1::2]
        picked = [ours[3], ours[0], ours[5]]
        stale = structs.replace(ours[4], deliveries=2)
        batch = [complete(entry) for entry in (*picked, theirs[2], stale)]
        assert await owner.settle(*batch) == ["settled"] * 3 + ["lost"] * 2
        for entry in picked:
            assert await link.call("XRANGE", entry.stream, entry.id, entry.id) == []
        assert await owner.settle(*[complete(entry) for entry in (ours[1], ours[2], ours[4])]) == ["settled"] * 3
        assert await other.settle(*[complete(entry) for entry in theirs]) == ["settled"] * 6


async def test_scripts_are_loaded_again_after_a_flush(link: Link, settings: Settings, front: Front) -> None:
    """NOSCRIPT is no failure: the text follows the hash."""
    async with Hand(settings, "owner") as owner:
        await link.call("SCRIPT", "FLUSH")
        job = query(front)
        await front.submit(job)
        await link.call("SCRIPT", "FLUSH")
        entry = await owner.take_one()
        await link.call("SCRIPT", "FLUSH")
        assert await owner.settle(complete(entry)) == ["settled"]


async def test_settle_leaves_the_llm_stage_without_lease_or_place(link: Link, settings: Settings, front: Front) -> None:
    """Forward, retry, release, bury and complete: each gives back the replica, in the same script."""
    replicas = [Replica(FIRST, slots=8)]
    async with Hand(settings, "owner", "llm", placed=True) as owner:
        for _ in VERBS:
            await front.submit(prompt(front))
        entries = (await owner.streams.place(replicas, [[FIRST]] * len(VERBS))).entries
        assert [entry.replica for entry in entries] == [FIRST] * len(VERBS)
        for number, (entry, verb) in enumerate(zip(entries, VERBS.values(), strict=True)):
            left = len(VERBS) - number
            assert await link.call("GET", keys.LOAD + FIRST) == str(left).encode()
            assert await link.call("ZCARD", keys.LEASES + FIRST) == left
            assert await link.call("ZCARD", keys.RUNNING + FIRST) == left
            assert await owner.settle(verb(entry)) == ["settled"]
        assert await link.call("GET", keys.LOAD + FIRST) == b"0"
        assert await link.call("EXISTS", keys.RUNNING + FIRST, keys.LEASES + FIRST) == 0


async def test_dead_letters_are_capped_by_count_and_drops_are_counted(
    link: Link, settings: Settings, front: Front
) -> None:
    """The oldest letters go first, and the caller hears how many went."""
    async with Hand(changed(settings, dead={"max_letters": 3}), "owner") as owner:
        for _ in range(5):
            await front.submit(query(front))
        entries = await owner.take()
        assert await owner.settle(*[bury(entry) for entry in entries]) == ["settled"] * 5
        assert owner.streams.dropped_letters == 2
        assert await link.call("XLEN", keys.DEAD) == 3


async def test_release_is_no_delivery(link: Link, settings: Settings, front: Front) -> None:
    """Work given back begins again with delivery count 1: a count above it always means a crash."""
    async with Hand(settings, "owner") as owner:
        job = query(front)
        await front.submit(job)
        for _ in range(5):
            entry = await owner.take_one()
            assert entry.deliveries == 1
            assert await owner.settle(release(entry)) == ["settled"]
        assert not await is_running(link, job.id)
