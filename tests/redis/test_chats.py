"""A chat's run, from the message that starts it to the script that ends it, edge by edge, on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from pipeline import keys
from pipeline.accepting import Idempotency
from pipeline.chats import Chats, ChatWatch, Message, Persona
from pipeline.clock import Clock, monotonic_us
from pipeline.connection import Link
from pipeline.errors import IdempotencyMismatch, Overloaded, RetryLater, TooManyPersonas
from pipeline.front import Front
from pipeline.job import Done, Job, decode
from pipeline.settings import Settings
from stages.chat import Chat
from tests.conftest import PATIENCE_S, wait_until
from tests.rig import Gate, Hand, Scripted, assert_nothing_is_left, bury, changed, complete, letters, outcome, working


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Answer at once, unless a test says otherwise."""
    return changed(settings, chats={"single_ms": 0, "quiet_ms": 0, "max_wait_ms": 0})


@pytest.fixture
async def chats(link: Link, settings: Settings) -> AsyncIterator[Chats]:
    one = Chats(Link(settings.redis, "chats"), settings, await clock_of(link))
    yield one
    await one.close()


@pytest.fixture
async def hand(link: Link, settings: Settings) -> AsyncIterator[Hand]:
    async with Hand(settings, "hand", "chat") as one:
        yield one


async def clock_of(link: Link) -> Clock:
    clock, sent_us = Clock(), monotonic_us()
    clock.observe(await link.time_us(), sent_us)
    return clock


async def say(chats: Chats, message_id: str, chat: str = "c", **more: Any) -> str:
    said = await chats.say("default", chat, Message(message_id, "ann", f"text of {message_id}"), **more)
    return said.what


async def run_of(link: Link, chat: str = "c") -> str | None:
    """Return the job that holds a chat's lock."""
    lock = await link.call("GET", keys.CHAT_LOCK + chat)
    return lock.decode().rpartition(":")[0] if lock else None


async def waiting(link: Link, chat: str = "c") -> list[str]:
    return [orjson.loads(one)["message_id"] for one in await link.call("LRANGE", keys.CHAT_QUEUE + chat, 0, -1)]


async def age(link: Link, by_ms: int) -> None:
    """Have the first message that waits be older than it is; of the future, with a span below 0."""
    element = orjson.loads(await link.call("LINDEX", keys.CHAT_QUEUE + "c", 0))
    older = orjson.dumps(element | {"at_ms": element["at_ms"] - by_ms})
    await link.call("LSET", keys.CHAT_QUEUE + "c", 0, older)
    await link.call("HSET", keys.CHAT_OPEN + "c", element["message_id"], older)


async def told(chats: Chats, chat: str = "c") -> list[tuple[str, list[str]]]:
    """Return the events of a chat: type and message ids."""
    found = [orjson.loads(text) for _, text in await chats.events(chat, "0-0")]
    return [(event["type"], event["message_ids"]) for event in found]


async def history(link: Link) -> list[dict[str, Any]]:
    """Return the turns that history is told of, in order."""
    rows = []
    for _, fields in await link.call("XRANGE", keys.EVENTS, "-", "+"):
        event = dict(zip(fields[::2], fields[1::2], strict=True))
        if event[b"kind"] == b"chat":
            rows += [data for _, data in orjson.loads(event[b"data"])["rows"]]
    return rows


async def save(chats: Chats, run: str, *message_ids: str) -> str:
    word, _ = await chats.save("c", run, message_ids, text="well", state="{}", about={})
    return word


# --- saying -------------------------------------------------------------------------------------


async def test_first_message_starts_a_run_and_later_ones_join_it(link: Link, chats: Chats) -> None:
    """One lock, one job, however many messages; the queue keeps their order, and both keys have their life."""
    assert [await say(chats, name) for name in "abc"] == ["started", "joined", "joined"]
    assert await waiting(link) == ["a", "b", "c"]
    run = await run_of(link)
    assert run is not None
    assert await link.call("XLEN", keys.stream("chat")) == 1
    assert 540_000 < await link.call("PTTL", keys.CHAT_LOCK + "c") <= 600_000
    assert 1_790_000 < await link.call("PTTL", keys.CHAT_QUEUE + "c") <= 1_800_000
    ((_, fields),) = await link.call("XRANGE", keys.stream("chat"), "-", "+")
    job = decode(fields[1])
    lock = await link.call("GET", keys.CHAT_LOCK + "c")
    assert (job.id, job.payload["epoch"]) == (run, int(lock.rpartition(b":")[2]))
    assert job.deadline_ms - job.at_us // 1000 == 540_000


async def test_many_who_speak_at_the_same_time_start_one_run(link: Link, settings: Settings) -> None:
    """Twenty connections at once: each message waits, and there is one job."""
    clock = await clock_of(link)
    crowd = [Chats(Link(settings.redis, f"one-{i}"), settings, clock) for i in range(20)]
    words = await asyncio.gather(*(say(one, f"m{i}") for i, one in enumerate(crowd)))
    for one in crowd:
        await one.close()
    assert sorted(words) == ["joined"] * 19 + ["started"]
    assert sorted(await waiting(link)) == sorted(f"m{i}" for i in range(20))
    assert await link.call("ZCARD", keys.LIVE_INDEX) == 1


async def test_same_message_id_twice_is_one_message(link: Link, chats: Chats) -> None:
    """While it waits, and after it was answered."""
    await say(chats, "a")
    again = await chats.say("default", "c", Message("a", "ann", "other words"))
    assert not again.is_new
    run = await run_of(link)
    assert run is not None
    await chats.take("c", run, begin=True)
    assert await save(chats, run, "a") == "saved"
    again = await chats.say("default", "c", Message("a", "ann", "other words"))
    assert not again.is_new
    assert await waiting(link) == []


async def test_an_id_counts_once_for_as_long_as_its_message_waits(link: Link, chats: Chats) -> None:
    """Though it is none of the last thousand any more; and a key under which it came again is used up."""
    await say(chats, "a")
    await link.call("DEL", keys.CHAT_SEEN + "c")
    again = await chats.say("default", "c", Message("a", "ann", "x"), idempotency=Idempotency("k", "hash", 60))
    assert (again.is_new, again.waiting) == (False, 1)
    with pytest.raises(IdempotencyMismatch):
        await chats.say("default", "c", Message("b", "ann", "y"), idempotency=Idempotency("k", "other", 60))
    assert await waiting(link) == ["a"]


async def test_what_is_too_much_is_refused_and_leaves_nothing(link: Link, settings: Settings) -> None:
    """A full chat, a tenant's own limit, and a pipeline that is full; a chat that has a run may go on."""
    settings = changed(settings, chats={"max_waiting": 2}, admission={"max_jobs": 1})
    chats = Chats(Link(settings.redis, "chats"), settings, await clock_of(link))
    await say(chats, "a")
    await say(chats, "b")
    with pytest.raises(Overloaded) as full:
        await say(chats, "c")
    assert full.value.code == "too_many_waiting"
    with pytest.raises(Overloaded) as overloaded:
        await say(chats, "a", "other")
    assert overloaded.value.code == "overloaded"
    assert await link.call("EXISTS", keys.CHAT + "other", keys.CHAT_QUEUE + "other") == 0
    await chats.close()


async def test_a_run_counts_among_the_jobs_of_its_tenant(link: Link, chats: Chats, hand: Hand) -> None:
    """Until it ends; the next run of a chat counts, too."""
    await say(chats, "a", in_flight_limit=1)
    with pytest.raises(Overloaded) as refused:
        await say(chats, "a", "other", in_flight_limit=1)
    assert refused.value.code == "too_many_in_flight"
    await say(chats, "b", in_flight_limit=1)
    await hand.settle(complete(await hand.take_one()))
    assert await link.call("SCARD", keys.IN_FLIGHT + "default") == 1
    run = await run_of(link)
    assert run is not None
    await save(chats, run, "a", "b")
    await hand.settle(complete(await hand.take_one()))
    await assert_nothing_is_left(link)
    assert await say(chats, "a", "other", in_flight_limit=1) == "started"


async def test_high_priority_goes_first_at_every_stage(link: Link, chats: Chats, hand: Hand) -> None:
    """A run has the priority of the message that started it, and the next run that of the last one."""
    await chats.say("default", "c", Message("a", "ann", "text", "high"))
    assert await link.call("XLEN", keys.stream("chat", "high")) == 1
    entry = await hand.take_one()
    run = decode(entry.data or b"")
    assert run.priority == "high"
    await chats.take("c", run.id, begin=True)
    await save(chats, run.id, "a")
    await chats.say("default", "c", Message("b", "ann", "text", "low"))
    await hand.settle(complete(entry))
    assert await link.call("XLEN", keys.stream("chat", "low")) == 1


# --- when to answer -----------------------------------------------------------------------------


async def test_a_single_message_to_an_idle_chat_does_not_wait_for_quiet(link: Link, settings: Settings) -> None:
    """Two messages do, from the last one on, and typing makes it longer, up to a bound."""
    settings = changed(settings, chats={"single_ms": 40, "quiet_ms": 5_000, "max_wait_ms": 20_000})
    chats = Chats(Link(settings.redis, "chats"), settings, await clock_of(link))
    await say(chats, "a")
    run = await run_of(link)
    assert run is not None
    alone = await chats.take("c", run, begin=True)
    assert alone.word == "taken" or alone.wait_ms <= 40
    await say(chats, "b")
    both = await chats.take("c", run, begin=True)
    assert (both.word, 4_000 < both.wait_ms <= 5_000) == ("wait", True)
    # Let the messages be four seconds older; then somebody types.
    said_ms = int(await link.call("HGET", keys.CHAT + "c", "said_ms"))
    await link.call("HSET", keys.CHAT + "c", "said_ms", said_ms - 4_500)
    assert (await chats.take("c", run, begin=True)).wait_ms <= 500
    await chats.typing("c")
    assert (await chats.take("c", run, begin=True)).wait_ms > 4_000
    await age(link, 20_001)
    assert (await chats.take("c", run, begin=True)).word == "taken", "the bound, however much is typed"
    await chats.close()


async def test_a_single_message_soon_after_another_waits_for_quiet(link: Link, settings: Settings) -> None:
    """The chat is not idle: whoever has just spoken may not be done."""
    settings = changed(settings, chats={"quiet_ms": 5_000, "max_wait_ms": 20_000})
    chats = Chats(Link(settings.redis, "chats"), settings, await clock_of(link))
    await link.call("HSET", keys.CHAT + "c", "active_ms", chats.clock.now_ms() - 1_000)
    await say(chats, "a")
    run = await run_of(link)
    assert run is not None
    assert (await chats.take("c", run, begin=True)).word == "wait"
    await chats.close()


async def test_nobody_waits_for_a_clock_that_was_set_back(link: Link, settings: Settings) -> None:
    """A message that seems to come from the future is answered now."""
    settings = changed(settings, chats={"quiet_ms": 5_000, "max_wait_ms": 20_000})
    chats = Chats(Link(settings.redis, "chats"), settings, await clock_of(link))
    await say(chats, "a")
    await say(chats, "b")
    run = str(await run_of(link))
    assert (await chats.take("c", run, begin=True)).word == "wait"
    await age(link, -3_600_000)
    assert (await chats.take("c", run, begin=True)).word == "taken"
    await chats.close()


# --- taking and saving --------------------------------------------------------------------------


async def test_save_takes_out_exactly_what_was_answered(link: Link, chats: Chats, hand: Hand) -> None:
    """One script: queue, turns, event, history; what came meanwhile is the next run's."""
    await say(chats, "a")
    await say(chats, "b")
    entry = await hand.take_one()
    run = decode(entry.data or b"").id
    taken = await chats.take("c", run, begin=True)
    assert [message["message_id"] for message in taken.messages] == ["a", "b"]
    assert await say(chats, "c") == "merged"
    word, answered = await chats.save("c", run, ["a", "b"], text='so "so"', state='{"mood":"fine"}', about={"n": 1})
    assert (word, answered) == ("saved", 2)
    assert await waiting(link) == ["c"]
    assert await told(chats) == [("reply", ["a", "b"])]
    ((_, text),) = await chats.events("c", "0-0")
    event = orjson.loads(text)
    assert (event["chat_id"], event["text"], event["message_id"]) == ("c", 'so "so"', run)
    turns = await chats.turns("c")
    assert [(turn["role"], turn["text"]) for turn in turns] == [
        ("user", "text of a"),
        ("user", "text of b"),
        ("assistant", 'so "so"'),
    ]
    rows = await history(link)
    assert [(row["role"], row["status"], row["is_processed"]) for row in rows] == [
        ("user", "answered", True),
        ("user", "answered", True),
        ("assistant", "sent", True),
    ]
    assert rows[0]["answered_by"] == run
    assert rows[2]["about"] == {"n": 1}
    await hand.settle(complete(entry))
    following = await run_of(link)
    assert following not in {None, run}
    after = await chats.take("c", str(following), begin=True)
    assert ([m["message_id"] for m in after.messages], after.state, len(after.turns)) == (["c"], '{"mood":"fine"}', 3)


async def test_a_run_saves_and_sends_once(link: Link, chats: Chats, hand: Hand) -> None:
    """It may crash between its save and its end: whoever runs it again hears that it was done."""
    await say(chats, "a")
    run = decode((await hand.take_one()).data or b"").id
    await chats.take("c", run, begin=True)
    assert await save(chats, run, "a") == "saved"
    assert await save(chats, run, "a") == "already"
    assert await told(chats) == [("reply", ["a"])]
    assert len(await history(link)) == 2


async def test_a_batch_holds_so_many_messages_and_the_next_run_takes_the_rest(link: Link, settings: Settings) -> None:
    """A full batch waits for nothing."""
    settings = changed(settings, chats={"max_batch": 2, "quiet_ms": 60_000, "max_wait_ms": 60_000})
    chats = Chats(Link(settings.redis, "chats"), settings, await clock_of(link))
    for name in "abc":
        await say(chats, name)
    run = await run_of(link)
    assert run is not None
    taken = await chats.take("c", run, begin=True)
    assert [message["message_id"] for message in taken.messages] == ["a", "b"]
    await chats.close()


async def test_a_batch_is_no_longer_than_a_prompt_may_be(link: Link, settings: Settings, hand: Hand) -> None:
    """Characters count, not bytes; a message that is too long for itself is answered alone, and nobody waits."""
    settings = changed(settings, chats={"prompt_chars": 100, "quiet_ms": 60_000, "max_wait_ms": 60_000})
    chats = Chats(Link(settings.redis, "chats"), settings, await clock_of(link))
    for message_id, text in (("a", "\U0001f600" * 60), ("b", "x" * 40), ("c", "y"), ("d", "z" * 200), ("e", "y")):
        await chats.say("default", "c", Message(message_id, "ann", text))
    for batch in (["a", "b"], ["c"], ["d"]):
        entry = await hand.take_one()
        run = decode(entry.data or b"").id
        taken = await chats.take("c", run, begin=True)
        assert [message["message_id"] for message in taken.messages] == batch
        await save(chats, run, *batch)
        await hand.settle(complete(entry))
    assert (await chats.take("c", str(await run_of(link)), begin=True)).word == "wait", "this one has room for company"
    await chats.close()


async def test_the_lock_changes_hands_in_the_script_that_ends_a_run(link: Link, chats: Chats, hand: Hand) -> None:
    """With nothing left it is free, and the next message starts a run of its own."""
    await say(chats, "a")
    entry = await hand.take_one()
    run = decode(entry.data or b"").id
    await chats.take("c", run, begin=True)
    await save(chats, run, "a")
    assert await run_of(link) == run
    await hand.settle(complete(entry))
    assert await run_of(link) is None
    await assert_nothing_is_left(link)
    assert await say(chats, "b") == "started"


# --- losing the lock ----------------------------------------------------------------------------


async def test_a_run_whose_lock_has_lapsed_saves_nothing_and_its_messages_get_another(
    link: Link, chats: Chats, hand: Hand
) -> None:
    """Its end starts the next run, with the same messages, though nobody speaks any more."""
    await say(chats, "a")
    entry = await hand.take_one()
    run = decode(entry.data or b"").id
    await chats.take("c", run, begin=True)
    await link.call("DEL", keys.CHAT_LOCK + "c")
    assert await save(chats, run, "a") == "lost"
    assert await told(chats) == []
    await hand.settle(complete(entry))
    following = await run_of(link)
    assert following not in {None, run}
    assert [m["message_id"] for m in (await chats.take("c", str(following), begin=True)).messages] == ["a"]


async def test_a_run_whose_lock_another_has_can_neither_take_nor_save_nor_end_anything(
    link: Link, chats: Chats, hand: Hand
) -> None:
    """The lock lapsed, somebody spoke, and a second run has begun; then the first one comes back."""
    await say(chats, "a")
    entry = await hand.take_one()
    old = decode(entry.data or b"").id
    await chats.take("c", old, begin=True)
    await link.call("DEL", keys.CHAT_LOCK + "c")
    assert await say(chats, "b") == "started"
    new = await run_of(link)
    assert (await chats.take("c", old, begin=True)).word == "lost"
    assert await save(chats, old, "a") == "lost"
    await hand.settle(bury(entry))
    assert await run_of(link) == new
    assert await waiting(link) == ["a", "b"]
    assert await told(chats) == []


async def test_a_lock_whose_run_is_gone_stops_nobody(link: Link, chats: Chats) -> None:
    """Somebody deleted the run by hand: the next message starts another one, for both."""
    await say(chats, "a")
    run = await run_of(link)
    await link.call("DEL", keys.LIVE + str(run), keys.stream("chat"))
    assert await say(chats, "b") == "started"
    assert await run_of(link) not in {None, run}
    assert await waiting(link) == ["a", "b"]


# --- failing ------------------------------------------------------------------------------------


async def test_messages_of_a_failed_run_get_their_outcome_and_the_others_the_next_run(
    link: Link, chats: Chats, hand: Hand
) -> None:
    """Nobody waits for a next message that never comes; and what fails is not tried for ever."""
    await say(chats, "a")
    entry = await hand.take_one()
    run = decode(entry.data or b"").id
    await chats.take("c", run, begin=True)
    await say(chats, "b")
    await hand.settle(bury(entry))
    assert await told(chats) == [("failed", ["a"])]
    assert await waiting(link) == ["b"]
    assert await run_of(link) not in {None, run}
    (row,) = await history(link)
    assert (row["message_id"], row["status"], row["is_processed"], row["text"]) == ("a", "failed", False, "text of a")


async def test_a_run_that_fails_after_its_save_takes_nobodys_message_along(
    link: Link, chats: Chats, hand: Hand
) -> None:
    """Its reply was sent: what waits now was never a part of it."""
    await say(chats, "a")
    entry = await hand.take_one()
    run = decode(entry.data or b"").id
    await chats.take("c", run, begin=True)
    await say(chats, "b")
    await save(chats, run, "a")
    await hand.settle(bury(entry))
    assert await told(chats) == [("reply", ["a"])]
    assert await waiting(link) == ["b"]


async def test_a_run_nobody_worked_on_is_followed_by_another_until_its_messages_are_too_old(
    link: Link, chats: Chats, front: Front
) -> None:
    """Half an hour after they were said they expire, each with an event and a row."""
    await say(chats, "a")
    first = await run_of(link)
    assert first is not None
    await front.cancel(first, "default")
    second = await run_of(link)
    assert second not in {None, first}
    await age(link, 1_800_001)
    await front.cancel(str(second), "default")
    assert await run_of(link) is None
    assert await told(chats) == [("expired", ["a"])]
    assert [row["status"] for row in await history(link)] == ["expired"]
    await assert_nothing_is_left(link)


async def test_messages_that_redis_dropped_are_told_as_expired(link: Link, chats: Chats, hand: Hand) -> None:
    """The queue's life ended, say: their run finds out, and so does the next message."""
    await say(chats, "a")
    await age(link, 1)  # of those of one millisecond nobody knows the order any more
    await say(chats, "b")
    await link.call("DEL", keys.CHAT_QUEUE + "c")
    run = decode((await hand.take_one()).data or b"").id
    assert (await chats.take("c", run, begin=True)).word == "empty"
    assert await told(chats) == [("expired", ["a", "b"])]
    assert await link.call("HGETALL", keys.CHAT_COUNTS) == [b"expired", b"2"]
    await say(chats, "c")
    assert [row["text"] for row in await history(link)] == ["text of a", "text of b"]
    assert await told(chats) == [("expired", ["a", "b"])]


async def test_messages_that_came_after_the_queue_was_dropped_do_not_fail_with_those_before(
    link: Link, chats: Chats, hand: Hand
) -> None:
    """They stand where the batch stood, and were taken by nobody."""
    await say(chats, "a")
    entry = await hand.take_one()
    run = decode(entry.data or b"").id
    await chats.take("c", run, begin=True)
    await link.call("DEL", keys.CHAT_QUEUE + "c")
    await say(chats, "b")
    await hand.settle(bury(entry))
    assert await told(chats) == [("expired", ["a"])]
    assert await waiting(link) == ["b"]
    assert await run_of(link) not in {None, run}


STRANGE = (
    b"hello",
    b'{"text":"x"}',
    b'["a"]',
    b"\xff\xfe",
    b'{"message_id":"z","user_id":"u","text":"I look like one","at_ms":1}',
    b'{"message_id":"z",and broken inside,"at_ms":1}',
    b'{"message_id":"a","text":"said by another","at_ms":1}',
)
"""What strangers may put into a queue: nothing of it was said."""


async def test_what_a_stranger_puts_into_the_queue_is_dropped(link: Link, chats: Chats) -> None:
    """What was never said can not be answered; a message that stands there twice is one."""
    await say(chats, "a")
    (said,) = await link.call("LRANGE", keys.CHAT_QUEUE + "c", 0, -1)
    await link.call("LPUSH", keys.CHAT_QUEUE + "c", STRANGE[4])
    await link.call("RPUSH", keys.CHAT_QUEUE + "c", *STRANGE, said)
    run = await run_of(link)
    taken = await chats.take("c", str(run), begin=True)
    assert (taken.dropped, [m["message_id"] for m in taken.messages]) == (len(STRANGE) + 2, ["a"])
    assert await waiting(link) == ["a"]


async def test_a_queue_that_holds_nothing_but_strange_elements_keeps_no_run_busy(
    link: Link, chats: Chats, settings: Settings
) -> None:
    """They come to the queue after the run has looked; the next run finds nobody to answer, and is the last."""
    gate = Gate(Model())
    async with working(settings, [Chat(settings), Scripted("llm", gate)]):
        await say(chats, "a")
        await wait_until(lambda: gate.waiting)
        await link.call("RPUSH", keys.CHAT_QUEUE + "c", *STRANGE)
        gate.open()
        await wait_until(lambda: has_told(chats, 1))
        await wait_until(lambda: is_free(link))
    assert await told(chats) == [("reply", ["a"])]
    await assert_nothing_is_left(link)


async def test_strange_elements_do_not_spoil_what_history_is_told_of_others(link: Link, chats: Chats) -> None:
    """One event tells of all that a clear ends: each row in it must be readable."""
    await say(chats, "a")
    await link.call("RPUSH", keys.CHAT_QUEUE + "c", *STRANGE)
    await chats.clear("default", "c")
    assert await told(chats) == [("cleared", ["a"])]
    assert [(row["message_id"], row["status"]) for row in await history(link)] == [("a", "cleared")]


async def test_a_run_that_fails_before_it_has_its_messages_fails_them(link: Link, chats: Chats, hand: Hand) -> None:
    """Its persona's key is broken, say: the next run would meet the same, and write a dead letter every second."""
    await say(chats, "a")
    await say(chats, "b")
    entry = await hand.take_one()
    await hand.settle(bury(entry))
    assert await run_of(link) is None
    assert await told(chats) == [("failed", ["a", "b"])]
    assert await link.call("HGETALL", keys.CHAT_COUNTS) == [b"failed", b"2"]
    assert [row["status"] for row in await history(link)] == ["failed", "failed"]
    await assert_nothing_is_left(link)


async def test_a_key_of_a_wrong_type_stops_a_script_before_it_writes(link: Link, chats: Chats, hand: Hand) -> None:
    """An operator must act; nothing is half done, and the run's end waits for it."""
    await say(chats, "a")
    entry = await hand.take_one()
    run = decode(entry.data or b"").id
    await chats.take("c", run, begin=True)
    await link.call("SET", keys.CHAT_TURNS + "c", "x", "PX", 60_000)
    with pytest.raises(Exception, match="should be a list"):
        await save(chats, run, "a")
    with pytest.raises(Exception, match="should be a list"):
        await hand.settle(complete(entry))
    assert (await waiting(link), await told(chats), await run_of(link)) == (["a"], [], run)
    await link.call("DEL", keys.CHAT_TURNS + "c")
    assert await save(chats, run, "a") == "saved"


async def test_a_full_redis_refuses_messages_and_still_ends_runs(link: Link, chats: Chats, hand: Hand) -> None:
    """What is accepted can be answered; a message is refused as overload."""
    await say(chats, "a")
    entry = await hand.take_one()
    run = decode(entry.data or b"").id
    await link.call("CONFIG", "SET", "maxmemory", 1)
    try:
        with pytest.raises(Overloaded):
            await say(chats, "b")
        await chats.take("c", run, begin=True)
        assert await save(chats, run, "a") == "saved"
        await hand.settle(complete(entry))
    finally:
        await link.call("CONFIG", "SET", "maxmemory", 0)
    assert await run_of(link) is None


# --- beginning anew -----------------------------------------------------------------------------


async def test_nothing_from_before_a_clear_is_sent_after_it(link: Link, chats: Chats, hand: Hand) -> None:
    """Queue, lock, turns and state go, the epoch rises, and the old run can do nothing any more."""
    await say(chats, "a")
    entry = await hand.take_one()
    old = decode(entry.data or b"").id
    taken = await chats.take("c", old, begin=True)
    await save(chats, old, "a")
    await say(chats, "b")
    await hand.settle(complete(entry))
    entry = await hand.take_one()
    run = decode(entry.data or b"")
    await chats.take("c", run.id, begin=True)
    epoch, cleared, was_answering = await chats.clear("default", "c")
    assert (cleared, was_answering) == (1, True)
    assert epoch > run.payload["epoch"]
    assert await save(chats, run.id, "b") == "lost"
    assert await chats.turns("c") == []
    assert await hand.streams.is_cancelled(run.id), "its call to a model is broken off"
    assert await say(chats, "c") == "started"
    await hand.settle(complete(entry))
    new = await run_of(link)
    taken = await chats.take("c", str(new), begin=True)
    assert ([m["message_id"] for m in taken.messages], taken.state, taken.turns) == (["c"], "", [])
    assert await told(chats) == [("reply", ["a"]), ("cleared", ["b"])]


async def test_clearing_a_chat_whose_run_still_waits_ends_that_run(link: Link, chats: Chats) -> None:
    """Nobody had it in hand; no reply was on its way."""
    await say(chats, "a")
    run = await run_of(link)
    _, cleared, was_answering = await chats.clear("default", "c")
    assert (cleared, was_answering) == (1, False)
    found = await outcome(link, str(run))
    assert found is not None
    assert found.status == "cancelled"
    await assert_nothing_is_left(link)


async def test_the_epoch_rises_with_every_clear(link: Link, chats: Chats) -> None:
    """Also of a chat where nobody has spoken, and twice in a millisecond; watchers hear of each."""
    epochs = [(await chats.clear("default", "c"))[0] for _ in range(5)]
    assert epochs == sorted(set(epochs))
    assert await told(chats) == [("cleared", [])] * 5


async def test_another_persona_begins_the_chat_anew(link: Link, chats: Chats) -> None:
    """And is what the next run works with."""
    await chats.set_persona("default", "poet", Persona("You rhyme.", temperature=0.75, model="m2", policy="interrupt"))
    await say(chats, "a")
    _, cleared, _ = await chats.clear("default", "c", persona="poet")
    assert cleared == 1
    await say(chats, "b")
    run = await run_of(link)
    taken = await chats.take("c", str(run), begin=True)
    assert taken.persona == Persona("You rhyme.", temperature=0.75, model="m2", policy="interrupt")
    await chats.clear("default", "c")
    await say(chats, "d")
    taken = await chats.take("c", str(await run_of(link)), begin=True)
    assert taken.persona.system_prompt == "You rhyme.", "a clear keeps the persona"


# --- interrupting -------------------------------------------------------------------------------


async def test_a_message_interrupts_the_reply_where_the_persona_wants_it(link: Link, chats: Chats, hand: Hand) -> None:
    """The call is broken off, and one reply answers all together."""
    await chats.set_persona("default", "hasty", Persona(policy="interrupt"))
    await chats.clear("default", "c", persona="hasty")
    await say(chats, "a")
    assert await say(chats, "b") == "joined", "nothing was taken yet"
    entry = await hand.take_one()
    old = decode(entry.data or b"").id
    await chats.take("c", old, begin=True)
    assert await say(chats, "c") == "interrupted"
    assert await hand.streams.is_cancelled(old)
    assert await save(chats, old, "a", "b") == "lost"
    await hand.settle(complete(entry))
    new = await run_of(link)
    taken = await chats.take("c", str(new), begin=True)
    assert [m["message_id"] for m in taken.messages] == ["a", "b", "c"]
    await save(chats, str(new), "a", "b", "c")
    assert await told(chats) == [("cleared", []), ("reply", ["a", "b", "c"])]


async def test_nobody_is_interrupted_for_ever(link: Link, chats: Chats, hand: Hand) -> None:
    """Once the first message has waited long enough its reply is made, whatever is said."""
    await chats.set_persona("default", "hasty", Persona(policy="interrupt"))
    await chats.clear("default", "c", persona="hasty")
    await say(chats, "a")
    run = decode((await hand.take_one()).data or b"").id
    await chats.take("c", run, begin=True)
    first = orjson.loads(await link.call("LINDEX", keys.CHAT_QUEUE + "c", 0))
    await link.call("LSET", keys.CHAT_QUEUE + "c", 0, orjson.dumps(first | {"at_ms": first["at_ms"] - 30_001}))
    assert await say(chats, "b") == "merged"


# --- a whole run --------------------------------------------------------------------------------


class Model:
    """An llm stage that answers the two brains, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []

    async def __call__(self, job: Job) -> Done:
        messages = job.state["ask"]["messages"]
        self.asked.append(messages)
        is_state = "JSON" in messages[0]["content"]
        said = " + ".join(one["content"] for one in messages[1:])
        answer = 'Sure: {"mood": "merry", "facts": []}' if is_state else f"heard: {said}"
        return Done({"answer": answer, "model": "m", "usage": None, "finish_reason": "stop"})


async def test_several_messages_one_reply(link: Link, chats: Chats, settings: Settings) -> None:
    """The first brain's state is in the second one's prompt, and in the next run's."""
    model = Model()
    for name in "abc":
        await say(chats, name)
    async with working(settings, [Chat(settings), Scripted("llm", model)]):
        await wait_until(lambda: has_told(chats, 1))
        await say(chats, "d")
        await wait_until(lambda: has_told(chats, 2))
        await wait_until(lambda: is_free(link))
    assert await told(chats) == [("reply", ["a", "b", "c"]), ("reply", ["d"])]
    state, reply, state_2, reply_2 = model.asked
    assert [one["content"] for one in reply[1:]] == ["text of a", "text of b", "text of c"]
    assert "text of a\nuser: text of b\nuser: text of c" in state[1]["content"]
    assert '"mood":"merry"' in reply[0]["content"]
    assert '"mood":"merry"' in state_2[1]["content"]
    assert [one["role"] for one in reply_2[1:]] == ["user", "user", "user", "assistant", "user"]
    await assert_nothing_is_left(link)


async def has_told(chats: Chats, count: int) -> bool:
    return len(await told(chats)) >= count


async def is_free(link: Link, chat: str = "c") -> bool:
    return await run_of(link, chat) is None


async def test_messages_during_a_reply_are_answered_in_the_next_batch(
    link: Link, chats: Chats, settings: Settings
) -> None:
    """One run at a time, in order."""
    model = Model()
    gate = Gate(model)
    async with working(settings, [Chat(settings), Scripted("llm", gate)]):
        await say(chats, "a")
        await wait_until(lambda: gate.waiting)
        assert await say(chats, "b") == "merged"
        assert await say(chats, "c") == "merged"
        gate.open()
        await wait_until(lambda: has_told(chats, 2))
        await wait_until(lambda: is_free(link))
    assert await told(chats) == [("reply", ["a"]), ("reply", ["b", "c"])]
    assert len(model.asked) == 4


async def test_a_clear_breaks_off_the_call_to_the_model(link: Link, chats: Chats, settings: Settings) -> None:
    """No tokens are paid for a reply that nobody will see."""
    gate = Gate(Model())
    async with working(settings, [Chat(settings), Scripted("llm", gate)]):
        await say(chats, "a")
        await wait_until(lambda: gate.waiting)
        await chats.clear("default", "c")
        await wait_until(lambda: gate.stopped)
        gate.open()
        await say(chats, "b")
        await wait_until(lambda: has_told(chats, 2))
        await wait_until(lambda: is_free(link))
    assert await told(chats) == [("cleared", ["a"]), ("reply", ["b"])]
    await assert_nothing_is_left(link)


async def test_a_killed_run_goes_on_elsewhere_and_answers_once(link: Link, chats: Chats, settings: Settings) -> None:
    """Both processes die with the run in hand; others take it over when the lease is gone, not the lock."""
    gate = Gate(Model())
    async with working(settings, [Chat(settings)]):
        async with working(settings, [Scripted("llm", gate)]) as (first,):
            await say(chats, "a")
            await wait_until(lambda: gate.waiting)
            run = await run_of(link)
            await first.crash()
        async with working(settings, [Scripted("llm", Model())]):
            await wait_until(lambda: has_told(chats, 1))
            await wait_until(lambda: is_free(link))
    assert await told(chats) == [("reply", ["a"])]
    turns = await chats.turns("c")
    assert turns[-1]["message_id"] == run, "the same run"


async def test_a_model_that_fails_for_good_fails_the_batch(link: Link, chats: Chats, settings: Settings) -> None:
    """The sender hears of it, and the chat goes on."""
    model = Model()

    async def fail(job: Job) -> Done:
        if "text of a" in str(job.state["ask"]):
            raise RetryLater("no", code="replica_error")
        return await model(job)

    async with working(settings, [Chat(settings), Scripted("llm", fail)]):
        await say(chats, "a")
        await wait_until(lambda: has_told(chats, 1))
        await say(chats, "b")
        await wait_until(lambda: has_told(chats, 2))
        await wait_until(lambda: is_free(link))
    assert await told(chats) == [("failed", ["a"]), ("reply", ["b"])]
    assert [letter["reason"] for letter in await letters(link)] == ["attempts_exhausted"]


async def test_a_first_brain_that_writes_no_json_leaves_the_state_as_it_was(
    link: Link, chats: Chats, settings: Settings
) -> None:
    """The reply is made all the same."""
    await link.call("HSET", keys.CHAT + "c", "state", '{"mood":"old"}')

    async def mumble(job: Job) -> Done:
        return Done({"answer": "mumble {"})

    async with working(settings, [Chat(settings), Scripted("llm", mumble)]):
        await say(chats, "a")
        await wait_until(lambda: has_told(chats, 1))
        await wait_until(lambda: is_free(link))
    assert await link.call("HGET", keys.CHAT + "c", "state") == b'{"mood":"old"}'


async def test_a_silent_model_fails_the_batch(link: Link, chats: Chats, settings: Settings) -> None:
    """Nothing is sent to a person as a reply that holds nothing."""

    async def nothing(job: Job) -> Done:
        return Done({"answer": " \n"})

    async with working(settings, [Chat(settings), Scripted("llm", nothing)]):
        await say(chats, "a")
        await wait_until(lambda: has_told(chats, 1))
    assert await told(chats) == [("failed", ["a"])]


async def test_a_run_waits_for_its_time_among_the_delayed_jobs(link: Link, settings: Settings) -> None:
    """Uncharged, and in nobody's hands; a clear ends it there, and what is said then is answered in its time."""
    settings = changed(settings, chats={"single_ms": 30, "quiet_ms": 300, "max_wait_ms": 5_000})
    chats = Chats(Link(settings.redis, "chats"), settings, await clock_of(link))
    async with working(settings, [Chat(settings), Scripted("llm", Model())]):
        await say(chats, "a")
        await say(chats, "b")
        await wait_until(lambda: is_delayed(link))
        run = await run_of(link)
        await chats.clear("default", "c")
        found = await outcome(link, str(run))
        assert found is not None
        assert found.status == "cancelled"
        for name in "def":
            await say(chats, name)
        await wait_until(lambda: has_told(chats, 2))
        await wait_until(lambda: is_free(link))
    assert await told(chats) == [("cleared", ["a", "b"]), ("reply", ["d", "e", "f"])]
    await chats.close()


async def is_delayed(link: Link) -> bool:
    return bool(await link.call("ZCARD", keys.DELAYED))


# --- images ---


async def test_an_image_is_told_once_and_not_after_a_clear(link: Link, chats: Chats) -> None:
    """It is kept under its reply's id, for a day."""
    epoch, _, _ = await chats.clear("default", "c")
    for word in ("kept", "already"):
        assert await chats.keep_image("c", epoch, "run-1", b"\x89PNG\0", "image/png", ["a", "b"]) == word
    assert await chats.image("c", "run-1") == (b"\x89PNG\0", b"image/png")
    assert await chats.image("c", "run-2") is None
    assert 86_000_000 < await link.call("PTTL", keys.CHAT_IMAGE + "c:run-1") <= 86_400_000
    await chats.clear("default", "c")
    assert await chats.keep_image("c", epoch, "run-2", b"x", "image/png") == "lost"
    assert await chats.keep_image("nobody", epoch, "run-2", b"x", "image/png") == "lost"
    assert await told(chats) == [("cleared", []), ("image", ["a", "b"]), ("cleared", [])]


async def test_an_image_job_begins_with_the_end_of_a_run_whose_persona_wants_one(
    link: Link, chats: Chats, settings: Settings
) -> None:
    """At low priority, and nobody waits for it; without a server that makes images there is none."""
    await chats.set_persona("default", "painter", Persona(image_prompt="In oil:"))
    await chats.clear("default", "c", persona="painter")
    painting = changed(settings, images={"url": "http://127.0.0.1:1"})
    for chosen, images in ((settings, 0), (painting, 1)):
        async with working(chosen, [Chat(chosen), Scripted("llm", Model())]):
            await say(chats, f"m{images}")
            await wait_until(lambda: is_free(link))
        assert await link.call("XLEN", keys.stream("image", "low")) == images
    ((_, fields),) = await link.call("XRANGE", keys.stream("image", "low"), "-", "+")
    event = orjson.loads((await chats.events("c", "0-0"))[-1][1])
    assert decode(fields[1]).payload == {
        "chat": "c",
        "epoch": event["epoch"],
        "message_id": event["message_id"],
        "message_ids": event["message_ids"],
        "prompt": "In oil:\n\n" + event["text"],
    }


# --- personas -----------------------------------------------------------------------------------


async def test_a_tenant_has_so_many_personas_and_may_change_them(link: Link, settings: Settings) -> None:
    """They are kept for ever, so they have a bound; another tenant's are none of them."""
    settings = changed(settings, chats={"max_personas": 1})
    chats = Chats(Link(settings.redis, "chats"), settings, Clock())
    await chats.set_persona("default", "p", Persona("one"))
    with pytest.raises(TooManyPersonas):
        await chats.set_persona("default", "q", Persona("two"))
    await chats.set_persona("default", "p", Persona("three"))
    await chats.set_persona("anna", "q", Persona("four"))
    assert await chats.persona("default", "q") is None
    assert await chats.persona("default", "p") == Persona("three")
    await chats.close()


# --- watching -----------------------------------------------------------------------------------


async def test_who_watches_hears_of_events_over_one_subscription(link: Link, chats: Chats, settings: Settings) -> None:
    """Of this chat, and of no other; the subscription ends with its last watcher."""
    watch = ChatWatch(Link(settings.redis, "watch"), settings.redis.reconnect_cap_s)
    async with watch.of("c") as news, watch.of("other") as other:
        async with asyncio.timeout(PATIENCE_S):
            await news.wait()  # the subscription holds
            await other.wait()
            news.clear()
            other.clear()
            await chats.clear("default", "c")
            await news.wait()
        assert not other.is_set()
