"""Of ten entries taken while all three priorities wait, at least two are normal and one is low."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import cycle, islice

import pytest

from pipeline import keys
from pipeline.balancing import Replica
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.job import PRIORITIES
from pipeline.priorities import CYCLE
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.rig import FIRST, Hand, Scripted, complete, echo, prompt, query, working

FILL = "for i = 1, 60 do redis.call('XADD', KEYS[1], '*', 'data', '{}') end"
FILL_SOME = "for i = 1, ARGV[1] do redis.call('XADD', KEYS[1], '*', 'data', '{}') end"


async def fill(link: Link, stage: str) -> None:
    for priority in PRIORITIES:
        await link.call("EVAL", FILL, 1, keys.stream(stage, priority))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 13])
async def test_takes_of_any_size_keep_the_shares(link: Link, settings: Settings, size: int) -> None:
    """Every prefix of what is taken is a prefix of the cycle."""
    async with Hand(settings, "owner") as owner:
        await fill(link, "encoder")
        taken: Counter[str] = Counter()
        for takes in range(1, 50 // size + 1):
            entries = await owner.take(size)
            assert len(entries) == size
            taken.update(entry.stream for entry in entries)
            owed = Counter(islice(cycle(CYCLE), takes * size))
            assert [taken[keys.stream("encoder", p)] for p in PRIORITIES] == [owed[number] for number in (1, 2, 3)]


async def test_placed_stage_keeps_the_shares(link: Link, settings: Settings, front: Front) -> None:
    """One script call, one entry per order."""
    async with Hand(settings, "owner", "llm", placed=True) as owner:
        for priority in PRIORITIES:
            for _ in range(20):
                job = prompt(front)
                job.priority = priority
                await front.submit(job)
        for _ in range(2):
            entries = (await owner.streams.place([Replica(FIRST, slots=10)], [[FIRST]] * 10)).entries
            streams = [entry.stream for entry in entries]
            assert [streams.count(keys.stream("llm", p)) for p in PRIORITIES] == [7, 2, 1]
            await owner.settle(*[complete(entry) for entry in entries])


async def test_what_one_priority_does_not_use_goes_to_the_others(link: Link, settings: Settings) -> None:
    """Nothing idles."""
    async with Hand(settings, "owner") as owner:
        await link.call("EVAL", FILL, 1, keys.stream("encoder", "low"))
        assert len(await owner.take(30)) == 30
        await link.call("EVAL", FILL, 1, keys.stream("encoder", "high"))
        taken = [entry.stream for entry in await owner.take(20)]
        assert len(taken) == 20
        assert taken.count(keys.stream("encoder", "low")) == 2


async def test_blocked_read_brings_all_that_came_at_once(link: Link, settings: Settings) -> None:
    """One read, not one per entry."""
    async with Hand(settings, "owner") as owner:
        assert await owner.take(30) == []  # from now on it knows that nothing waits
        reading = asyncio.create_task(owner.streams.read(30))
        await wait_until(lambda: _is_blocked(link))
        await link.call("EVAL", FILL_SOME, 1, keys.stream("encoder", "normal"), 9)
        assert len(await reading) == 9


@pytest.mark.parametrize("slots", [3, 7, 30])
async def test_reading_holds_slots_and_shares_while_much_waits(link: Link, settings: Settings, slots: int) -> None:
    """A read that could not bring all is followed by takes, which keep the shares; no read brings more than asked."""
    async with Hand(settings, "owner") as owner:
        assert await owner.take(slots) == []
        await fill(link, "encoder")
        taken: list[str] = []
        while len(taken) < 80:
            entries = await owner.streams.read(slots)
            assert len(entries) <= slots
            taken += [entry.stream for entry in entries]
        share = Counter(taken[slots:])  # the first read blocked, and brought as many of each
        assert share[keys.stream("encoder", "high")] > share[keys.stream("encoder", "normal")]
        assert share[keys.stream("encoder", "normal")] > share[keys.stream("encoder", "low")] > 0


async def _is_blocked(link: Link) -> bool:
    return b"blocked_clients:1" in await link.call("INFO", "clients")


async def test_priority_is_kept_along_the_route(link: Link, settings: Settings, front: Front) -> None:
    """A low job is low at every stage."""
    async with working(settings, [Scripted("encoder", echo)]):
        job = query(front, priority="low", route=["encoder", "retriever"])
        async with Hand(settings, "next", "retriever") as following:
            await front.submit(job)
            while not (entries := await following.streams.wait()):
                pass
            assert entries[0].stream == keys.stream("retriever", "low")
            await following.settle(complete(entries[0]))
            assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
