"""Of ten entries taken while all three priorities wait, at least two are normal and one is low."""

from __future__ import annotations

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
from tests.rig import FIRST, Hand, Scripted, complete, echo, prompt, query, working

FILL = "for i = 1, 60 do redis.call('XADD', KEYS[1], '*', 'data', '{}') end"


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
