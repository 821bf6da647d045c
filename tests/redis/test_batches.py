"""Batches: accepted as a whole or not at all, each member counted once, always closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from prometheus_client import REGISTRY

from pipeline import batches, connection, keys, scripts
from pipeline.accepting import Idempotency
from pipeline.batches import AcceptedBatch, Batches, Message, Order
from pipeline.connection import CommandRefused, Link
from pipeline.dead import DeadLetters
from pipeline.errors import BrokerUnavailable, IdempotencyMismatch, MaybeAccepted, Overloaded
from pipeline.front import Front
from pipeline.job import Completion, decode
from pipeline.settings import Settings
from stages.aggregator import Aggregator
from tests.conftest import wait_until
from tests.rig import (
    Gate,
    Hand,
    Mortal,
    Scripted,
    assert_nothing_is_left,
    bury,
    changed,
    complete,
    everything,
    letters,
    outcome,
    retry,
    working,
)

HOOK = "https://example.com/hook"


def order(count: int, *, tenant: str = "default", **more: Any) -> Order:
    """So many messages of one queue."""
    return Order(tenant, "q", [Message(f"prompt {number}") for number in range(count)], **more)


async def counters(link: Link, batch_id: str) -> dict[str, str]:
    """What `batch:<id>` says."""
    flat = await link.call("HGETALL", keys.BATCH + batch_id)
    return {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}


async def results(link: Link, batch_id: str) -> dict[str, Any]:
    """The results that the aggregator wrote."""
    text = await link.call("GET", keys.BATCH_RESULTS + batch_id)
    assert text is not None
    value: dict[str, Any] = orjson.loads(text)
    return value


async def events(link: Link) -> list[dict[str, Any]]:
    """What the recorder is told, in order."""
    found = []
    for _, fields in await link.call("XRANGE", keys.EVENTS, "-", "+"):
        event: dict[str, Any] = {n.decode(): v.decode() for n, v in zip(fields[::2], fields[1::2], strict=True)}
        found.append(event | {"data": orjson.loads(event["data"]), "rank": int(event["rank"])})
    return found


async def is_closed(link: Link, batch_id: str) -> bool:
    """Say whether the batch is closed."""
    return bool(await link.call("HEXISTS", keys.BATCH + batch_id, "closed_ms"))


async def all_but_replies(link: Link) -> dict[bytes, bytes]:
    """All that Redis holds, without what a gateway keeps alive for itself."""
    return {name: value for name, value in (await everything(link)).items() if not name.startswith(b"reply:")}


def closed_so_far() -> float:
    """How many batches this process has counted as completed."""
    return REGISTRY.get_sample_value("penstock_batches_closed_total", {"status": "completed"}) or 0.0


async def make_due(link: Link, job_id: str) -> None:
    """Let the time of a delayed job have come."""
    assert await link.call("ZADD", keys.DELAYED, "XX", "CH", 1, job_id) == 1


async def promote(link: Link) -> int:
    """Do what every worker's tick does."""
    return int((await link.run(scripts.PROMOTE, (), (100, "one", 100)))[1])


async def expire(link: Link) -> None:
    """Do what every worker's tick does."""
    await link.run(scripts.EXPIRE, (), (10, 1_000, 100, 60_000))


@asynccontextmanager
async def aggregating(settings: Settings) -> AsyncIterator[None]:
    """Run an aggregator for the block's time."""
    async with working(settings, [Aggregator(settings)]):
        yield


async def assert_all_ended(link: Link) -> None:
    """Nothing lives, and what is left of batches goes by itself; what the recorder would take is taken away."""
    rows = await link.call("KEYS", keys.ROWS + "*")
    await link.call("DEL", keys.EVENTS, *rows)
    await assert_nothing_is_left(link)
    for pattern in (keys.BATCH, keys.MESSAGE, keys.BATCH_RESULTS):
        for name in await link.call("KEYS", pattern + "*"):
            assert 0 < await link.call("PTTL", name) <= 7 * 86_400_000, name


# --- accepting ------------------------------------------------------------------------------------


@pytest.fixture
def portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a large batch be one of more than three."""
    monkeypatch.setattr(batches, "AT_ONCE", 3)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.usefixtures("portions")
async def test_batch_is_there_as_a_whole(link: Link, settings: Settings, front: Front, count: int) -> None:
    """Counters, members in order, a job for each, one to gather them; the recorder is told of all."""
    accepted = await front.submit_batch(order(count))
    assert len(accepted.message_ids) == count
    found = await counters(link, accepted.batch_id)
    assert (found["req.count"], found["res.count"], found["status"]) == (str(count), "0", "pending")
    members = await link.call("LRANGE", keys.BATCH_MEMBERS + accepted.batch_id, 0, -1)
    assert [member.decode() for member in members] == accepted.message_ids
    assert await link.call("ZCARD", keys.LIVE_INDEX) == count + 1
    await promote(link)
    async with Hand(settings, "owner", "llm") as owner:
        jobs = [decode(entry.data or b"") for entry in await owner.take()]
    assert sorted(job.id for job in jobs) == sorted(accepted.message_ids)
    assert len({job.accepted_us for job in jobs}) == count
    prompts = {job.id: job.payload["prompt"] for job in jobs}
    assert [prompts[message_id] for message_id in accepted.message_ids] == [f"prompt {n}" for n in range(count)]
    (told,) = await events(link)
    assert (told["kind"], told["id"], told["rank"], told["data"]["request_count"]) == (
        "batch", accepted.batch_id, 0, count,
    )  # fmt: skip
    rows = [orjson.loads(row) for row in await link.call("LRANGE", told["rows"], 0, -1)]
    assert [(row[0], row[1]["position"], row[1]["prompt"]) for row in rows] == [
        (message_id, number, f"prompt {number}") for number, message_id in enumerate(accepted.message_ids)
    ]
    assert {row[1]["batch_id"] for row in rows} == {accepted.batch_id}


async def test_large_batches_wait_behind_everything_else(link: Link, settings: Settings, front: Front) -> None:
    """Above a size that can be set; smaller ones do not."""
    settings = changed(settings, messages={"low_priority_from": 2})
    async with Front(settings, "other") as other:
        await other.submit_batch(order(2))
        await other.submit_batch(order(3))
    assert await link.call("XLEN", keys.stream("llm")) == 2
    assert await link.call("XLEN", keys.stream("llm", "low")) == 3


@pytest.mark.parametrize("later_ms", [None, 3_600_000], ids=["now", "later"])
@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.usefixtures("portions")
async def test_members_begin_in_the_order_given(link: Link, front: Front, count: int, later_ms: int | None) -> None:
    """However they were accepted, and although they are due at the same time."""
    due_ms = None if later_ms is None else front.clock.now_ms() + later_ms
    accepted = await front.submit_batch(order(count, due_ms=due_ms))
    await promote(link)
    found = [name.decode() for name in await link.call("ZRANGE", keys.DELAYED, 0, -1)]
    if due_ms is None:
        entries = await link.call("XRANGE", keys.stream("llm"), "-", "+")
        found = [decode(fields[1]).id for _, fields in entries]
    assert [name for name in found if name != accepted.batch_id] == accepted.message_ids
    standing = await front.standing(accepted.message_ids[-1], "default")
    assert standing is not None
    assert standing.due_ms is None or due_ms is None or standing.due_ms == due_ms


@pytest.mark.usefixtures("portions")
async def test_batch_is_processing_once_a_member_is_in_hand(link: Link, front: Front, settings: Settings) -> None:
    """Also where the first of them waits for its next attempt."""

    async def status() -> str:
        standing = await front.batches.standing(accepted.batch_id, "default")
        assert standing is not None
        return standing.status

    accepted = await front.submit_batch(order(8))
    assert await promote(link) == 8
    assert await status() == "pending"
    async with Hand(settings, "owner", "llm") as owner:
        first = await owner.take_one()
        assert await status() == "processing"
        await owner.settle(retry(first))
        assert await status() == "pending"
        await owner.take_one()
        assert await status() == "processing"


async def test_scheduled_batch_begins_when_it_is_due(link: Link, front: Front) -> None:
    """Until then it is on no stream; its deadline counts from there."""
    due_ms = front.clock.now_ms() + 3_600_000
    accepted = await front.submit_batch(order(2, due_ms=due_ms))
    assert await promote(link) == 0
    for message_id in accepted.message_ids:
        assert 0 <= float(await link.call("ZSCORE", keys.DELAYED, message_id)) - due_ms < 1
        assert int(await link.call("HGET", keys.LIVE + message_id, "deadline")) == due_ms + 86_400_000
        await make_due(link, message_id)
    assert await promote(link) == 2


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.usefixtures("portions")
async def test_batch_sent_again_is_one_batch(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Every reply is lost once; the gateway sends again, and the scripts know what they have done."""
    run, lost = front.batches._accepting.run, 0

    async def deaf(*args: Any, **more: Any) -> Any:
        nonlocal lost
        reply = await run(*args, **more)
        lost += 1
        if lost % 2:
            raise BrokerUnavailable("the reply was lost", unknown=True)
        return reply

    monkeypatch.setattr(front.batches._accepting, "run", deaf)
    accepted = await front.submit_batch(order(count))
    assert lost == 2 * (1 if count == 2 else 5)
    assert await link.call("ZCARD", keys.LIVE_INDEX) == count + 1
    assert await link.call("LLEN", keys.BATCH_MEMBERS + accepted.batch_id) == count
    assert await link.call("LLEN", keys.ROWS + accepted.batch_id) == count
    assert len(await events(link)) == 1


@pytest.mark.usefixtures("portions")
@pytest.mark.parametrize("count", [2, 8])
async def test_refused_batch_leaves_nothing(link: Link, settings: Settings, front: Front, count: int) -> None:
    """Too many jobs, too many of this key, a recorder that is behind: nothing was created."""
    await link.call("XADD", keys.EVENTS, "*", "kind", "other")
    for change, code in (
        ({"admission": {"max_jobs": count}}, "overloaded"),
        ({"history": {"max_backlog": 1}}, "overloaded"),
        ({}, "too_many_in_flight"),
    ):
        async with Front(changed(settings, **change), "other") as other:
            await link.call("SADD", keys.IN_FLIGHT + "default", "one", "two")
            with pytest.raises(Overloaded) as caught:
                await other.submit_batch(order(count), in_flight_limit=2 if not change else None)
            assert caught.value.code == code
    await link.call("DEL", keys.IN_FLIGHT + "default")
    assert await link.call("KEYS", keys.BATCH + "*") == []
    assert await link.call("EXISTS", keys.LIVE_INDEX, keys.DELAYED) == 0
    assert await link.call("XLEN", keys.EVENTS) == 1
    assert await link.call("KEYS", keys.LIVE + "*") == []  # not even staged
    assert await link.call("KEYS", keys.ROWS + "*") == []


@pytest.mark.usefixtures("portions")
async def test_repeated_batch_is_not_staged_again(link: Link, front: Front) -> None:
    """Its key is looked up first, as is another body under the same key."""
    first = await front.submit_batch(order(8), idempotency=Idempotency("k", "body"))
    before = await all_but_replies(link)
    again = await front.submit_batch(order(8), idempotency=Idempotency("k", "body"))
    assert again == AcceptedBatch(first.batch_id, first.message_ids, repeated=True)
    with pytest.raises(IdempotencyMismatch):
        await front.submit_batch(order(8), idempotency=Idempotency("k", "other"))
    assert await all_but_replies(link) == before


async def test_many_batches_at_once_are_all_accepted(link: Link, front: Front) -> None:
    """However long each of them waits for those before it; Redis is well."""
    sizes = [1 + number % 50 for number in range(1_000)]
    accepted = await asyncio.gather(*(front.submit_batch(order(size)) for size in sizes))
    assert [len(one.message_ids) for one in accepted] == sizes
    assert await link.call("ZCARD", keys.LIVE_INDEX) == sum(sizes) + len(sizes)


@pytest.mark.usefixtures("portions")
@pytest.mark.parametrize(("count", "step", "unknown"), [(2, "here", 1), (8, "ask", 0), (8, "staged", 1)])
async def test_those_in_line_hear_at_once_that_redis_does_not_answer(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch, count: int, step: str, unknown: int
) -> None:
    """Only the one whose commit was under way may have been accepted; who comes later is served."""
    monkeypatch.setattr(connection, "ANSWER_WITHIN_S", 0.1)
    run = front.batches._accepting.run

    async def deaf(script: scripts.Script, *args: Any, **more: Any) -> Any:
        if script is scripts.BATCH and args[1][20] == step:
            await asyncio.Event().wait()
        return await run(script, *args, **more)

    monkeypatch.setattr(front.batches._accepting, "run", deaf)
    found = await asyncio.gather(*(front.submit_batch(order(count)) for _ in range(50)), return_exceptions=True)
    refused = [error for error in found if isinstance(error, BrokerUnavailable)]
    assert len(refused) == 50
    assert [isinstance(error, MaybeAccepted) for error in refused] == [error.unknown for error in refused]
    assert sum(error.unknown for error in refused) == unknown
    monkeypatch.undo()
    assert await link.call("EXISTS", keys.EVENTS, keys.DELAYED) == 0
    await front.submit_batch(order(count))


async def test_batch_whose_turn_does_not_come_is_told_so_and_not_accepted(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code is that of too much work: Redis is there."""
    monkeypatch.setattr(connection, "ANSWER_WITHIN_S", 10.0)
    run, entered, go_on = front.batches._accepting.run, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any, **more: Any) -> Any:
        entered.set()
        await go_on.wait()
        return await run(*args, **more)

    monkeypatch.setattr(front.batches._accepting, "run", slow)
    first = asyncio.create_task(front.submit_batch(order(1)))
    await entered.wait()
    monkeypatch.setattr(batches, "IN_LINE_FOR_S", 0.01)
    with pytest.raises(Overloaded) as caught:
        await front.submit_batch(order(1))
    assert caught.value.code == "overloaded"
    go_on.set()
    accepted = await first
    assert await link.call("KEYS", keys.BATCH_MEMBERS + "*") == [(keys.BATCH_MEMBERS + accepted.batch_id).encode()]


async def test_batch_that_was_never_sent_was_certainly_not_accepted(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no connection to send it over."""
    monkeypatch.setattr(connection, "ANSWER_WITHIN_S", 0.1)

    async def refuse(*args: Any) -> None:
        raise BrokerUnavailable("no connection to Redis")

    monkeypatch.setattr(front.batches._accepting, "open", refuse)
    with pytest.raises(BrokerUnavailable) as caught:
        await front.submit_batch(order(1))
    assert not caught.value.unknown


async def test_key_of_a_wrong_type_refuses_the_whole_batch(link: Link, front: Front) -> None:
    """The script looks before it writes."""
    await link.call("SET", keys.stream("llm"), "a string")
    before = await all_but_replies(link)
    with pytest.raises(CommandRefused):
        await front.submit_batch(order(3))
    assert await all_but_replies(link) == before


async def test_same_key_and_body_is_the_same_batch(link: Link, settings: Settings, front: Front) -> None:
    """With the same members, also when it has been closed; another body is refused."""
    key, other = Idempotency("k", "body"), Idempotency("k", "other body")
    first = await front.submit_batch(order(3), idempotency=key)
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        again = await front.submit_batch(order(3), idempotency=key)
        assert again == AcceptedBatch(first.batch_id, first.message_ids, repeated=True)
        await owner.settle(*(complete(entry) for entry in await owner.take()))
        await wait_until(lambda: is_closed(link, first.batch_id))
        assert (await front.submit_batch(order(3), idempotency=key)).batch_id == first.batch_id
        with pytest.raises(IdempotencyMismatch):
            await front.submit_batch(order(3), idempotency=other)
    await assert_all_ended(link)


async def test_same_key_at_the_same_time_is_one_batch(link: Link, settings: Settings, front: Front) -> None:
    """Two gateways race; one batch is accepted, and both hear of it."""
    key = Idempotency("k", "body")
    async with Front(settings, "other") as other:
        both = await asyncio.gather(
            *(one.submit_batch(order(3), idempotency=key) for one in (front, other, front, other))
        )
    assert len({accepted.batch_id for accepted in both}) == 1
    assert len({tuple(accepted.message_ids) for accepted in both}) == 1
    assert sum(accepted.repeated for accepted in both) == 3
    assert await link.call("ZCARD", keys.LIVE_INDEX) == 4


async def test_batch_counts_as_one_job_of_its_key(link: Link, settings: Settings, front: Front) -> None:
    """Until it is closed."""
    first = await front.submit_batch(order(5), in_flight_limit=1)
    with pytest.raises(Overloaded):
        await front.submit_batch(order(1), in_flight_limit=1)
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        await owner.settle(*(complete(entry) for entry in await owner.take()))
        await wait_until(lambda: is_closed(link, first.batch_id))
        await front.submit_batch(order(1), in_flight_limit=1)


# --- counting -------------------------------------------------------------------------------------


async def test_member_is_counted_once_however_it_ends(link: Link, settings: Settings, front: Front) -> None:
    """Completed, failed, expired, cancelled: each in its own way, each once, each with its result in its place."""
    accepted = await front.submit_batch(order(5))
    done, failed, expired, cancelled, lost = accepted.message_ids
    async with Hand(settings, "owner", "llm") as owner:
        entries = {decode(entry.data or b"").id: entry for entry in await owner.take(3)}
        assert set(entries) == {done, failed, expired}
        settlements = [complete(entries[done]), bury(entries[failed])]
        assert await owner.settle(*settlements) == ["settled", "settled"]
        assert await owner.settle(*settlements) == ["lost", "lost"]
        assert (await counters(link, accepted.batch_id))["res.count"] == "2"
        await owner.die()
        await link.call("ZADD", keys.LIVE_INDEX, 1, expired)
        await expire(link)
        assert await front.cancel(cancelled, "default") == "cancelled"
        (entry,) = await link.call("XRANGE", keys.stream("llm"), "-", "+")
        await link.call("XDEL", keys.stream("llm"), entry[0])
        await link.call("ZADD", keys.LIVE_INDEX, 1, lost)
        await expire(link)
    async with aggregating(settings):
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    found = await counters(link, accepted.batch_id)
    assert (found["res.count"], found["failed.count"], found["status"]) == ("5", "4", "completed_with_errors")
    body = await results(link, accepted.batch_id)
    assert [row["message_id"] for row in body["results"]] == accepted.message_ids
    assert [row["status"] for row in body["results"]] == ["completed", "failed", "expired", "cancelled", "failed"]
    assert body["results"][4]["error"]["code"] == "lost"
    told = [event for event in await events(link) if event["rank"] == 10]
    assert [event["id"] for event in told if event["kind"] == "batch"] == [accepted.batch_id]
    assert sorted(event["id"] for event in told if event["kind"] == "message") == sorted(accepted.message_ids)
    await assert_all_ended(link)


async def test_result_of_a_member_is_its_outcome_with_its_batch(link: Link, settings: Settings, front: Front) -> None:
    """`message:<id>` reads like a completion; it stays when that has gone."""
    accepted = await front.submit_batch(order(1))
    (message_id,) = accepted.message_ids
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(complete(await owner.take_one()))
    text = await link.call("GET", keys.MESSAGE + message_id)
    assert Completion.decode(text) == await outcome(link, message_id)
    assert orjson.loads(text)["batch_id"] == accepted.batch_id
    assert await link.call("PTTL", keys.MESSAGE + message_id) > 6 * 86_400_000


async def test_retried_member_is_not_counted(link: Link, settings: Settings, front: Front) -> None:
    """It has not ended."""
    accepted = await front.submit_batch(order(1))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(retry(await owner.take_one(), delay_ms=0))
        assert (await counters(link, accepted.batch_id))["res.count"] == "0"
        await promote(link)
        await owner.settle(complete(await owner.take_one()))
    assert (await counters(link, accepted.batch_id))["res.count"] == "1"


async def test_two_settles_of_one_member_count_once(link: Link, settings: Settings, front: Front) -> None:
    """A worker that was presumed dead settles at the same time as its heir."""
    accepted = await front.submit_batch(order(2))
    async with Hand(settings, "old", "llm") as old, Hand(settings, "heir", "llm") as heir:
        entries = await old.take()
        await old.die()
        claimed = await heir.streams.claim(entries[0].stream, "old", 10, idle=False)
        answers = await asyncio.gather(
            old.settle(*map(complete, entries)), heir.settle(*map(complete, claimed.entries)),
            old.settle(*map(complete, entries)),
        )  # fmt: skip
    assert [set(some) for some in answers] == [{"lost"}, {"settled"}, {"lost"}]
    assert (await counters(link, accepted.batch_id))["res.count"] == "2"


async def test_members_that_end_at_the_same_time_are_all_counted(link: Link, settings: Settings, front: Front) -> None:
    """Twenty hands settle one each; exactly one of them is the last."""
    accepted = await front.submit_batch(order(20, webhook_url=HOOK))
    async with Hand(settings, "owner", "llm") as owner:
        entries = await owner.take()
        others = [Hand(settings, "owner", "llm") for _ in entries]
        await asyncio.gather(*(hand.settle(complete(entry)) for hand, entry in zip(others, entries, strict=True)))
        for hand in others:
            await hand.streams.close()
    assert (await counters(link, accepted.batch_id))["res.count"] == "20"
    assert float(await link.call("ZSCORE", keys.DELAYED, accepted.batch_id)) <= front.clock.now_ms()


async def test_closed_batch_does_not_change(link: Link, settings: Settings, front: Front) -> None:
    """Its own job was buried while a member ran: that member's result is kept, the counters stay."""
    accepted = await front.submit_batch(order(1))
    await make_due(link, accepted.batch_id)
    await promote(link)
    async with Hand(settings, "owner", "llm") as owner, Hand(settings, "killer", "aggregator") as killer:
        entry = await owner.take_one()
        await killer.settle(bury(await killer.take_one()))
        assert await is_closed(link, accepted.batch_id)
        before = await counters(link, accepted.batch_id)
        assert before["status"] == "completed_with_errors"
        await owner.settle(complete(entry))
    assert await counters(link, accepted.batch_id) == before
    assert await link.call("EXISTS", keys.MESSAGE + accepted.message_ids[0]) == 1
    await assert_all_ended(link)


async def test_counters_deleted_by_hand_are_not_revived(link: Link, settings: Settings, front: Front) -> None:
    """A hash that HINCRBY made anew would stay for ever."""
    accepted = await front.submit_batch(order(1))
    await link.call("DEL", keys.BATCH + accepted.batch_id)
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(complete(await owner.take_one()))
    assert await link.call("EXISTS", keys.BATCH + accepted.batch_id) == 0
    assert await link.call("PTTL", keys.MESSAGE + accepted.message_ids[0]) > 0


@pytest.mark.parametrize("name", [keys.BATCH, keys.BATCH_DONE])
async def test_counters_of_a_wrong_type_stop_the_settle_before_it_writes(
    link: Link, settings: Settings, front: Front, name: str
) -> None:
    """The outcome is kept by its worker until somebody has mended the key."""
    accepted = await front.submit_batch(order(1))
    async with Hand(settings, "owner", "llm") as owner:
        entry = await owner.take_one()
        await link.call("SET", name + accepted.batch_id, "a string")
        before = await all_but_replies(link)
        with pytest.raises(CommandRefused):
            await owner.settle(complete(entry))
        assert await all_but_replies(link) == before
        await link.call("DEL", name + accepted.batch_id)
        assert await owner.settle(complete(entry)) == ["settled"]


# --- closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7])
async def test_batch_closes_as_soon_as_its_last_member_has_ended(
    link: Link, settings: Settings, front: Front, count: int
) -> None:
    """Results in order, its own completion, one webhook's job; long before its deadline."""
    accepted = await front.submit_batch(order(count, single=count == 1, webhook_url=HOOK, tenant="acme"))
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        entries = await owner.take()
        await owner.settle(*(complete(entry) for entry in reversed(entries)))
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    body = await results(link, accepted.batch_id)
    assert (body["batch_id"], body["status"]) == (accepted.batch_id, "completed")
    assert [row["message_id"] for row in body["results"]] == accepted.message_ids
    found = await outcome(link, accepted.batch_id)
    assert found is not None
    assert found.result is not None
    assert (found.tenant, found.result["batch_status"], found.result["response_count"]) == ("acme", "completed", count)
    async with Hand(settings, "sender", "webhook") as sender:
        webhook = decode((await sender.take_one()).data or b"")
    assert webhook.tenant == "acme"
    assert webhook.payload["webhook_id"] == f"msg_{accepted.batch_id}"
    assert webhook.payload["queue"] == "acme:q"
    assert webhook.payload["event"] == ("message.completed" if count == 1 else "batch.completed")
    assert webhook.payload.get("message_id") == (accepted.message_ids[0] if count == 1 else None)
    told = [event for event in await events(link) if event["kind"] == "webhook"]
    assert [(event["id"], event["rank"]) for event in told] == [(webhook.id, 0)]
    assert told[0]["data"] == webhook.payload


@pytest.mark.parametrize(("hook", "kept_s"), [(None, 60), (HOOK, 3_600)])
async def test_results_are_kept_for_as_long_as_somebody_may_be_told(
    link: Link, settings: Settings, front: Front, hook: str | None, kept_s: int
) -> None:
    """Whatever the setting says of other results: a webhook reads them when it is sent."""
    settings = changed(settings, messages={"keep_s": 60}, lifetimes={"webhook_s": 3_600})
    accepted = await front.submit_batch(order(1, webhook_url=hook))
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        await owner.settle(complete(await owner.take_one()))
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    left_ms = await link.call("PTTL", keys.BATCH_RESULTS + accepted.batch_id)
    assert (kept_s - 30) * 1000 < left_ms <= kept_s * 1000


async def test_long_results_are_read_in_pieces_beside_everything_else(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No single answer of Redis is long, and nobody waits behind them; what goes meanwhile is gone as a whole."""
    monkeypatch.setattr(batches, "PIECE_BYTES", 7)
    text = bytes(range(256))
    await link.call("SET", keys.BATCH_RESULTS + "b", text, "PX", 60_000)
    assert await front.batches.results("b") == text
    assert await front.batches.results("none") is None
    reading, pieces = front.batches._reading.call, 0

    async def call(*args: Any) -> Any:
        nonlocal pieces
        pieces += args[0] == "GETRANGE"
        if pieces == 2:
            await link.call("DEL", keys.BATCH_RESULTS + "b")
        return await reading(*args)

    monkeypatch.setattr(front.batches._reading, "call", call)
    assert await front.batches.results("b") is None
    monkeypatch.undo()
    async with front.batches._reading._turn:  # somebody reads
        assert await front.batches.standing("none", "default") is None


async def test_batch_closes_at_its_deadline_with_the_member_that_was_lost(
    link: Link, settings: Settings, front: Front
) -> None:
    """One member's record is gone without a trace: it fails as lost, is counted, and history hears of it."""
    accepted = await front.submit_batch(order(3))
    kept, gone, other = accepted.message_ids
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        entries = {decode(entry.data or b"").id: entry for entry in await owner.take()}
        await owner.settle(complete(entries[kept]), complete(entries[other]))
        await link.call("DEL", keys.LIVE + gone)
        await make_due(link, accepted.batch_id)
        await wait_until(lambda: is_closed(link, accepted.batch_id))
        assert await owner.settle(complete(entries[gone])) == ["orphan"]
    body = await results(link, accepted.batch_id)
    assert [row["status"] for row in body["results"]] == ["completed", "failed", "completed"]
    assert body["results"][1]["error"]["code"] == "lost"
    found = await counters(link, accepted.batch_id)
    assert (found["res.count"], found["failed.count"], found["status"]) == ("3", "1", "completed_with_errors")
    (told,) = [event for event in await events(link) if event["id"] == gone]
    assert (told["kind"], told["rank"], told["data"]["error"]["code"]) == ("message", 10, "lost")


async def test_aggregator_waits_for_members_that_still_run(link: Link, settings: Settings, front: Front) -> None:
    """Called too early, it charges nothing, and comes again when the last has ended."""
    accepted = await front.submit_batch(order(1))
    await make_due(link, accepted.batch_id)
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        entry = await owner.take_one()
        live = keys.LIVE + accepted.batch_id

        async def was_put_off() -> bool:
            return int(await link.call("HGET", live, "attempts") or -1) == 0

        await wait_until(was_put_off)
        assert not await is_closed(link, accepted.batch_id)
        await owner.settle(complete(entry))
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    assert (await counters(link, accepted.batch_id))["status"] == "completed"


async def test_cancelled_batch_ends_its_members_and_closes(link: Link, settings: Settings, front: Front) -> None:
    """What waits ends at once, what runs is told; what had ended keeps its result."""
    gate = Gate()
    accepted = await front.submit_batch(order(4))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(complete(await owner.take_one()))
    stages = [Scripted("llm", gate, slots=1), Aggregator(settings)]
    async with working(settings, stages):
        await wait_until(lambda: len(gate.waiting) == 1)
        assert await front.cancel(accepted.batch_id, "other") == "unknown"
        assert await front.cancel(accepted.batch_id, "default") == "cancelling"
        assert await front.cancel(accepted.batch_id, "default") == "cancelling"
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    body = await results(link, accepted.batch_id)
    assert body["status"] == "cancelled"
    assert [row["status"] for row in body["results"]] == ["completed", "cancelled", "cancelled", "cancelled"]
    assert len(gate.stopped) == 1
    assert (await counters(link, accepted.batch_id))["status"] == "cancelled"
    await assert_all_ended(link)


async def test_batch_that_has_all_its_results_cannot_be_cancelled(link: Link, settings: Settings, front: Front) -> None:
    """It is only not gathered yet."""
    accepted = await front.submit_batch(order(1))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(complete(await owner.take_one()))
    assert await front.cancel(accepted.batch_id, "default") == "finished"
    async with aggregating(settings):
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    assert await front.cancel(accepted.batch_id, "default") == "finished"
    assert (await counters(link, accepted.batch_id))["status"] == "completed"


async def test_batch_whose_record_is_gone_is_buried(link: Link, settings: Settings, front: Front) -> None:
    """Nothing is left to gather; its story is kept."""
    accepted = await front.submit_batch(order(1))
    await link.call("DEL", keys.BATCH + accepted.batch_id)
    await make_due(link, accepted.batch_id)
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        await wait_until(lambda: outcome(link, accepted.batch_id))
        await owner.settle(complete(await owner.take_one()))
    assert [letter["reason"] for letter in await letters(link)] == ["batch_gone"]
    await assert_all_ended(link)


async def was_told(link: Link, settings: Settings, batch_id: str) -> bool:
    """Take what tells the receiver off its stream; say whether there was such a job, of this batch."""
    async with Hand(settings, "sender", "webhook") as sender:
        told = [decode(entry.data or b"").payload for entry in await sender.take()]
        return [one["webhook_id"] for one in told] == [f"msg_{batch_id}"]


@pytest.mark.parametrize("where", ["delayed", "on_its_stream", "in_dead_hands"])
async def test_batch_that_nobody_gathered_in_time_is_a_dead_letter(
    link: Link, settings: Settings, front: Front, where: str
) -> None:
    """It is closed as it stands, and a retry by hand gathers its results and tells its receiver."""
    accepted = await front.submit_batch(order(2, webhook_url=HOOK))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(*(complete(entry) for entry in await owner.take(2)))
    async with Hand(settings, "holder", "aggregator") as holder:
        if where != "delayed":
            await promote(link)
        if where == "in_dead_hands":
            await holder.take_one()
            await holder.die()
        await link.call("ZADD", keys.LIVE_INDEX, 1, accepted.batch_id)
        await expire(link)
    assert await is_closed(link, accepted.batch_id)
    (letter,) = await letters(link)
    assert (letter["reason"], letter["stage"], letter["job_id"]) == (
        "deadline_exceeded", "aggregator", accepted.batch_id,
    )  # fmt: skip
    assert not await link.call("EXISTS", keys.BATCH_RESULTS + accepted.batch_id)
    dead = DeadLetters(link, settings)
    async with aggregating(settings):
        again = await dead.retry((await dead.list(1))[0].id, front.clock.now_ms())
        await wait_until(lambda: outcome(link, again))
    assert [row["status"] for row in (await results(link, accepted.batch_id))["results"]] == ["completed"] * 2
    assert await was_told(link, settings, accepted.batch_id)


async def test_batch_whose_time_ends_in_an_aggregators_hands_is_a_dead_letter(
    link: Link, settings: Settings, front: Front
) -> None:
    """As one that nobody ever took; its outcome says that it expired."""
    settings = changed(settings, lifetimes={"message_s": 0.1, "batch_s": 0.3})
    accepted = await Batches(link, settings, front.clock).accept(order(1, webhook_url=HOOK))
    gate = Gate()
    async with working(settings, [Scripted("aggregator", gate)]):
        await make_due(link, accepted.batch_id)
        await wait_until(lambda: outcome(link, accepted.batch_id))
    found = await outcome(link, accepted.batch_id)
    assert found is not None
    assert found.status == "expired"
    assert [letter["reason"] for letter in await letters(link)] == ["deadline_exceeded"]


async def test_entry_of_a_batch_that_vanished_is_told_of(link: Link, settings: Settings, front: Front) -> None:
    """Somebody deleted it by hand: nothing can be retried, but nothing is hidden either."""
    accepted = await front.submit_batch(order(1, webhook_url=HOOK))
    await make_due(link, accepted.batch_id)
    await promote(link)
    await link.call("DEL", keys.stream("aggregator"))
    await link.call("ZADD", keys.LIVE_INDEX, 1, accepted.batch_id)
    await expire(link)
    (letter,) = await letters(link)
    assert (letter["reason"], letter["original"]) == ("lost", None)


async def test_closed_batch_is_not_gathered_once_results_are_gone(link: Link, settings: Settings, front: Front) -> None:
    """Members that ended well are not made lost by a retry that comes too late."""
    accepted = await front.submit_batch(order(2))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(*(complete(entry) for entry in await owner.take(2)))
    await link.call("ZADD", keys.LIVE_INDEX, 1, accepted.batch_id)
    await expire(link)
    await link.call("DEL", keys.MESSAGE + accepted.message_ids[1])
    dead = DeadLetters(link, settings)
    async with aggregating(settings):
        again = await dead.retry((await dead.list(1))[0].id, front.clock.now_ms())
        await wait_until(lambda: outcome(link, again))
    assert [letter["reason"] for letter in await letters(link)] == ["data_gone"]
    assert not await link.call("EXISTS", keys.BATCH_RESULTS + accepted.batch_id)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fatal", range(5))
async def test_aggregator_killed_at_any_call_closes_the_batch_once(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch, fatal: int, after: bool
) -> None:
    """Before each of its calls to Redis and after it: the batch closes, with one webhook and one event.

    It is counted once, but where the last reply died with who waited for it.
    """
    monkeypatch.setattr("stages.aggregator.AT_ONCE", 2)
    counted = closed_so_far()
    accepted = await front.submit_batch(order(5, webhook_url=HOOK))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(*(complete(entry) for entry in await owner.take()))
    doomed = Mortal([Aggregator(settings)], settings)
    (worker,) = doomed.workers
    calls, reached = 0, asyncio.Event()

    def killing(call: Any) -> Any:
        async def wrapped(*args: Any, **more: Any) -> Any:
            nonlocal calls
            number, calls = calls, calls + 1
            reply = None if number == fatal and not after else await call(*args, **more)
            if number == fatal:
                reached.set()
                await asyncio.Event().wait()
            return reply

        return wrapped

    for owner_of_call, name in (
        (worker.batches._link, "run"), (worker.batches._link, "call"), (worker.streams, "_run_settle"),
    ):  # fmt: skip
        monkeypatch.setattr(owner_of_call, name, killing(getattr(owner_of_call, name)))
    doomed.task = asyncio.create_task(doomed.run())
    await reached.wait()
    await doomed.crash()
    async with aggregating(settings):
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    body = await results(link, accepted.batch_id)
    assert [row["message_id"] for row in body["results"]] == accepted.message_ids
    assert await link.call("XLEN", keys.stream("webhook")) == 1
    closed = [event for event in await events(link) if event["kind"] == "batch" and event["rank"] == 10]
    assert len(closed) == 1
    assert (await counters(link, accepted.batch_id))["res.count"] == "5"
    assert closed_so_far() - counted == (0 if after and fatal == 4 else 1)
