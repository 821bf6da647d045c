"""The closer look at a real Redis: who holds what, since when, and how replicas feel."""

from __future__ import annotations

import asyncio

from pipeline import keys
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.picture import look_closely
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.rig import FIRST, Gate, Hand, Scripted, ask, query, working


async def test_an_empty_redis_has_a_picture(link: Link) -> None:
    """Nothing runs, nothing is broken."""
    picture = await look_closely(link)
    assert (picture.oldest_ms, picture.health, picture.holdings, picture.lapsed) == ({}, {}, {}, {})


async def test_each_worker_is_shown_with_what_it_holds(link: Link, settings: Settings, front: Front) -> None:
    """By stage, since when; what waits behind it has an age, too."""
    gate = Gate()
    async with working(settings, [Scripted("encoder", gate, slots=2)]):
        asking = [asyncio.create_task(ask(front, query(front, route=["encoder"]))) for _ in range(5)]
        await wait_until(lambda: len(gate.waiting) == 2)
        await wait_until(lambda: link.call("XPENDING", "job:encoder_in", "encoder", "-", "+", 1))

        async def all_submitted() -> bool:
            return bool(await link.call("XLEN", "job:encoder_in") == 5)

        await wait_until(all_submitted)
        picture = await look_closely(link)
        (worker,) = picture.seen.workers
        assert picture.holdings[worker.consumer].entries == {"encoder": 2}
        assert picture.lapsed == {}
        assert picture.oldest_ms["job:encoder_in"] >= 0
        row = next(row for row in picture.as_json()["streams"] if row["stream"] == "job:encoder_in")
        assert (row["depth"], row["waiting"], row["in_hand"]) == (5, 3, 2)
        gate.open()
        await asyncio.gather(*asking)


async def test_what_the_dead_hold_is_shown(link: Link, settings: Settings, front: Front) -> None:
    """Until somebody takes it over."""
    async with Hand(settings, "owner") as owner:
        await front.submit(query(front, route=["encoder"]))
        assert len(await owner.take()) == 1
        await owner.die()
        picture = await look_closely(link)
        (held,) = picture.lapsed.values()
        assert held.entries == {"encoder": 1}


async def test_an_entry_of_any_size_has_an_age(link: Link) -> None:
    """The age is that of the oldest, whatever it holds; it comes from Redis without the entry."""
    born_ms = await link.time_us() // 1000 - 90_000
    await link.call("XADD", "job:encoder_in", f"{born_ms}-0", "data", "x" * 100_000)
    await link.call("XADD", "job:encoder_in", "*", "data", "young")
    assert (await look_closely(link)).oldest_ms["job:encoder_in"] >= 90_000


async def test_a_replicas_record_is_read_whatever_is_in_it(link: Link) -> None:
    """Fields that a stranger wrote are none; one that no worker names any more is told as such."""
    await link.call("HSET", keys.REPLICAS, FIRST, '{"slots": 4, "seen_ms": 1}')
    await link.call("HSET", keys.HEALTH + FIRST, "failures", "2", "us_per_token", "fast", "seen_ms", "7")
    health = (await look_closely(link)).health[FIRST]
    assert (health.word, health.failures, health.tokens_per_s) == ("unserved", 2, None)
    await link.call("DEL", keys.HEALTH + FIRST, keys.REPLICAS)
