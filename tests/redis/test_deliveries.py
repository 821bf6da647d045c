"""Deliveries in Redis: accepted once, handed over at most once, with a status that only rises."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from pipeline import keys, scripts
from pipeline.accepting import Idempotency
from pipeline.connection import CommandRefused, Link
from pipeline.deliveries import AcceptedDelivery, Begun, Deliveries, Delivery, Event, Order, Told, WordOfTold
from pipeline.errors import IdempotencyMismatch, LeaseLost, Overloaded
from pipeline.flows import ReceivedMessage
from pipeline.front import Front
from pipeline.job import Completion, Job, Json, decode, error_body
from pipeline.settings import Settings
from pipeline.streams import Entry, Settlement
from tests.rig import Hand, assert_nothing_is_left, changed, everything, letters, outcome, release, retry

NOBODY = "f" * 32
TEXT = {"from": "+15005550006", "to": "+15005550009", "body": "Your parcel is here."}
FILES = [
    {"filename": "a.txt", "content_type": "text/plain", "content": "SGVsbG8="},
    {"filename": "empty.txt", "content_type": "text/plain", "content": ""},
]
NAMES = [
    {"filename": "a.txt", "content_type": "text/plain", "size_bytes": 5},
    {"filename": "empty.txt", "content_type": "text/plain", "size_bytes": 0},
]
HELD = [name | {"content": file["content"]} for name, file in zip(NAMES, FILES, strict=True)]
EVENTS: tuple[Told, ...] = ("sent", "undelivered", "failed", "delivered")
RANK = ("scheduled", "pending", "sending", "unknown", "sent", "undelivered", "failed", "delivered")


class Holder(Hand):
    """A hand that begins deliveries."""

    def __init__(self, settings: Settings, name: str, stage: str = "sms") -> None:
        super().__init__(settings, name, stage)
        self.entries: dict[str, Entry] = {}
        link = Link(settings.redis, f"{name}-deliveries")
        self.deliveries = Deliveries(link, settings, self.clock, consumer=name, entry_of=self.entries.get)

    async def __aexit__(self, *problem: object) -> None:
        await self.deliveries.close()
        await super().__aexit__(*problem)

    async def hold(self) -> tuple[Job, Entry]:
        """Take the next entry into hand."""
        entry = await self.take_one()
        job = decode(entry.data or b"")
        self.entries[job.id] = entry
        return job, entry

    async def claim(self, lapsed: Hand) -> tuple[Job, Entry]:
        """Take over the only entry of a consumer that has died."""
        await lapsed.die()
        claimed = await self.streams.claim(keys.stream(self.streams.stage), lapsed.name, 1, idle=True)
        (entry,) = claimed.entries
        job = decode(entry.data or b"")
        self.entries[job.id] = entry
        return job, entry


@asynccontextmanager
async def holding(settings: Settings, stage: str = "sms") -> AsyncIterator[Holder]:
    async with Holder(settings, f"{stage}-hand", stage) as hand:
        yield hand


@pytest.fixture
async def deliveries(front: Front) -> Deliveries:
    """The deliveries as a gateway sees them."""
    return front.deliveries


async def accept(deliveries: Deliveries, kind: str = "sms", **more: Any) -> AcceptedDelivery:
    accepting = {name: more.pop(name) for name in ("idempotency", "in_flight_limit") if name in more}
    content = TEXT | more.pop("content", {})
    return await deliveries.accept(Order(kind, more.pop("tenant", "default"), content, **more), **accepting)


async def found(deliveries: Deliveries, delivery_id: str) -> Delivery:
    delivery = await deliveries.read(delivery_id)
    assert delivery is not None
    return delivery


async def status(deliveries: Deliveries, delivery_id: str) -> str:
    return (await found(deliveries, delivery_id)).status


async def told(
    deliveries: Deliveries, source: str, event_id: str, delivery_id: str, status: Told, error: Json | None = None
) -> WordOfTold:
    """Have one event told; return what became of it."""
    (word,) = await deliveries.told(source, [Event(event_id, delivery_id, status, error)])
    return word


async def events(link: Link, delivery_id: str) -> list[dict[str, Any]]:
    """What history was told of a delivery, in order."""
    rows = [
        dict(zip((name.decode() for name in fields[::2]), fields[1::2], strict=True))
        for _, fields in await link.call("XRANGE", keys.EVENTS, "-", "+")
    ]
    return [
        {"rank": int(row["rank"]), **orjson.loads(row["data"])} for row in rows if row["id"].decode() == delivery_id
    ]


def completed(job: Job, entry: Entry, provider_id: str = "SM1") -> Settlement:
    result = {"provider": "console", "provider_id": provider_id}
    completion = Completion(job.id, "completed", result=result, worker="hand", attempts=job.attempt)
    return Settlement(entry, job.id, "complete", completion.encode())


def ended_as_poison(entry: Entry) -> Settlement:
    return ended(decode(entry.data or b""), entry, "failed", "poison")


def ended(job: Job, entry: Entry, word: str, code: str) -> Settlement:
    completion = Completion(job.id, word, error=error_body(word, code, 'said "no"'), worker="hand")  # type: ignore[arg-type]
    return Settlement(entry, job.id, "bury", completion.encode(), b'{"reason":"test"}')


# --- accepting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", keys.DELIVERY_STAGES)
async def test_a_delivery_is_stored_and_put_into_its_queue_at_once(
    link: Link, deliveries: Deliveries, kind: str
) -> None:
    """The names on the stream are what other programs look for."""
    accepted = await accept(deliveries, kind)
    ((_, fields),) = await link.call("XRANGE", f"message_queue:{kind}", "-", "+")
    assert fields[0] == b"data"
    body = orjson.loads(fields[1])
    assert body["message_id"] == accepted.id
    assert (body["retry_count"], body["scheduled_at"]) == (0, None)
    assert b"parcel" not in fields[1]  # what it says stands in one place
    delivery = await found(deliveries, accepted.id)
    assert (delivery.status, delivery.type, delivery.content) == ("pending", kind, TEXT)
    assert [one for one, _ in delivery.history] == ["pending"]
    assert delivery.history[0][1] == delivery.created_ms == delivery.due_ms
    (event,) = await events(link, accepted.id)
    assert (event["rank"], event["status"], event["recipient"]) == (0, "pending", TEXT["to"])


async def test_history_is_told_the_names_of_attachments_only(link: Link, deliveries: Deliveries) -> None:
    """It is no store of files, and an event with megabytes would wait in Redis twice."""
    accepted = await accept(deliveries, "email", content={"attachments": FILES})
    (event,) = await events(link, accepted.id)
    assert event["attachments"] == NAMES
    assert (await found(deliveries, accepted.id)).content["attachments"] == HELD


async def test_what_attachments_hold_is_read_by_who_hands_them_over(link: Link, deliveries: Deliveries) -> None:
    """It has a field of its own; who looks at a delivery is told names and sizes, who lists them how they stand."""
    accepted = await accept(deliveries, "email", content={"attachments": FILES})
    pictures = [{"filename": "attachment", "url": "https://example.com/cat.png"}]
    mms = await accept(deliveries, "mms", content={"attachments": pictures})
    (seen,) = await deliveries.find([accepted.id])
    assert seen is not None
    assert (seen.content["attachments"], seen.is_whole) == (NAMES, False)
    (standing,) = await deliveries.standing([accepted.id])
    assert standing is not None
    assert (standing.content, standing.status, standing.tenant) == ({}, "pending", "default")
    assert "SGVsbG8=" not in str(await link.call("HGET", keys.DELIVERY + accepted.id, "content"))
    whole = await found(deliveries, mms.id)
    assert (whole.content["attachments"], whole.is_whole) == (pictures, True)
    assert await link.call("HEXISTS", keys.DELIVERY + mms.id, "files") == 0


@pytest.mark.parametrize(
    ("begins", "settled", "tells", "is_kept"),
    [
        (True, None, None, True),
        (True, "completed", None, False),
        (True, "refused", None, True),
        (True, "outcome_unknown", None, True),
        (False, "deadline_exceeded", None, True),
        (True, None, "sent", False),
        (True, None, "undelivered", True),
        (True, "completed", "undelivered", False),
        (True, "outcome_unknown", "failed", True),
        (True, "outcome_unknown", "delivered", False),
    ],
)
async def test_what_attachments_hold_goes_when_nobody_can_need_it_any_more(
    link: Link,
    settings: Settings,
    deliveries: Deliveries,
    *,
    begins: bool,
    settled: str | None,
    tells: Told | None,
    is_kept: bool,
) -> None:
    """It would fill Redis for a week. One that has failed, or is unknown, can still be sent again by hand."""
    accepted = await accept(deliveries, "email", content={"attachments": FILES})
    async with holding(settings, "email") as hand:
        job, entry = await hand.hold()
        if begins:
            await hand.deliveries.begin(job, "console")
        if tells == "undelivered":  # quicker than the answer to the handing over
            assert await told(deliveries, "test", "e1", accepted.id, tells) == "applied"
        if settled == "completed":
            await hand.settle(completed(job, entry))
        elif settled is not None:
            await hand.settle(ended(job, entry, "failed", settled))
        if tells not in {None, "undelivered"}:
            assert tells is not None
            assert await told(deliveries, "test", "e1", accepted.id, tells) == "applied"
    delivery = await found(deliveries, accepted.id)
    assert delivery.is_whole == is_kept
    assert delivery.content["attachments"] == (HELD if is_kept else NAMES)


async def test_what_was_cancelled_keeps_no_files(front: Front, deliveries: Deliveries) -> None:
    """Nothing follows a cancelled delivery."""
    accepted = await accept(deliveries, "email", content={"attachments": FILES})
    assert await front.cancel(accepted.id, "default") == "cancelled"
    assert (await found(deliveries, accepted.id)).content["attachments"] == NAMES


async def test_a_scheduled_one_is_unfinished_from_its_time_on(
    link: Link, front: Front, settings: Settings, deliveries: Deliveries
) -> None:
    """Who plans a thousand for next week can send today; from their time on they count until they have ended."""
    later = [
        await accept(deliveries, due_ms=deliveries.clock.now_ms() + 3_600_000, in_flight_limit=1) for _ in range(3)
    ]
    assert await link.call("SCARD", keys.IN_FLIGHT + "default") == 0
    now = await accept(deliveries, in_flight_limit=1)
    await accept(deliveries, due_ms=deliveries.clock.now_ms() + 3_600_000, in_flight_limit=1)
    for one in later[:2]:
        await link.call("ZADD", keys.DELAYED, 1, one.id)
    assert (await link.run(scripts.PROMOTE, (), (10, "one", 100)))[1] == 2
    assert set(await link.call("SMEMBERS", keys.IN_FLIGHT + "default")) == {
        one.id.encode() for one in (now, *later[:2])
    }
    with pytest.raises(Overloaded):
        await accept(deliveries, in_flight_limit=3)
    for one in (now, *later):
        assert await front.cancel(one.id, "default") == "cancelled"
    assert await link.call("SCARD", keys.IN_FLIGHT + "default") == 0


async def test_a_scheduled_one_waits_among_the_delayed_and_is_pending_from_its_time_on(
    link: Link, deliveries: Deliveries
) -> None:
    """Promoting it is one step with its new status."""
    due_ms = deliveries.clock.now_ms() + 3_600_000
    accepted = await accept(deliveries, due_ms=due_ms, scheduled_at="2026-12-01T08:00:00Z")
    assert accepted.status == "scheduled"
    assert await link.call("XLEN", "message_queue:sms") == 0
    assert (await found(deliveries, accepted.id)).due_ms == due_ms
    await link.call("ZADD", keys.DELAYED, 1, accepted.id)  # its time has come
    assert (await link.run(scripts.PROMOTE, (), (10, "one", 100)))[1] == 1
    ((_, fields),) = await link.call("XRANGE", "message_queue:sms", "-", "+")
    assert orjson.loads(fields[1])["scheduled_at"] == "2026-12-01T08:00:00Z"
    delivery = await found(deliveries, accepted.id)
    assert [one for one, _ in delivery.history] == ["scheduled", "pending"]
    assert [event["status"] for event in await events(link, accepted.id)] == ["scheduled", "pending"]


async def test_the_same_key_is_one_delivery(link: Link, deliveries: Deliveries) -> None:
    """And another body under it is refused; a delivery of another key is its own."""
    key = Idempotency("k1", "hash", 60.0)
    first = await accept(deliveries, idempotency=key)
    again = await accept(deliveries, idempotency=key)
    assert (again.id, again.repeated, again.status) == (first.id, True, "pending")
    with pytest.raises(IdempotencyMismatch):
        await accept(deliveries, idempotency=Idempotency("k1", "other", 60.0))
    assert (await accept(deliveries, idempotency=Idempotency("k2", "hash", 60.0))).id != first.id
    assert await link.call("XLEN", "message_queue:sms") == 2


async def test_one_that_may_have_been_accepted_is_sent_again_and_accepted_once(
    link: Link, front: Front, deliveries: Deliveries
) -> None:
    """The id is the gateway's, so that the script knows it."""
    order = Order("sms", "default", TEXT)
    await deliveries.accept(order, delivery_id="a" * 32)
    again = await deliveries.accept(order, delivery_id="a" * 32)
    assert (again.id, again.repeated) == ("a" * 32, False)
    assert await link.call("XLEN", "message_queue:sms") == 1


async def test_what_is_too_much_is_refused_as_a_whole(link: Link, front: Front, settings: Settings) -> None:
    """Too much unfinished work, of all or of one key; too much that waits to be recorded. Nothing is written."""
    await accept(front.deliveries, in_flight_limit=1)
    before = await everything(link)
    with pytest.raises(Overloaded, match="as many as it may") as caught:
        await accept(front.deliveries, in_flight_limit=1)
    assert caught.value.code == "too_many_in_flight"
    for section, words in (("admission", "max_jobs"), ("history", "max_backlog")):
        full = Deliveries(Link(settings.redis, "full"), changed(settings, **{section: {words: 1}}), front.clock)
        with pytest.raises(Overloaded):
            await accept(full)
        await full.close()
    assert await everything(link) == before


# --- handing over -------------------------------------------------------------------------------


async def test_a_delivery_is_sending_before_it_is_handed_over_and_sent_once_it_was(
    link: Link, settings: Settings, deliveries: Deliveries
) -> None:
    """With the time of each; then it is kept for its time, and nothing is left of the job."""
    accepted = await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        assert await hand.deliveries.begin(job, "console") == Begun("begun")
        delivery = await found(deliveries, accepted.id)
        assert (delivery.status, delivery.provider, delivery.doubt) == ("sending", "console", True)
        assert await link.call("PTTL", keys.DELIVERY + accepted.id) == -1
        assert await hand.settle(completed(job, entry)) == ["settled"]
    delivery = await found(deliveries, accepted.id)
    assert (delivery.status, delivery.provider_id, delivery.doubt, delivery.attempts) == ("sent", "SM1", False, 1)
    assert [one for one, _ in delivery.history] == ["pending", "sending", "sent"]
    assert sorted(at_ms for _, at_ms in delivery.history) == [at_ms for _, at_ms in delivery.history]
    assert 0 < await link.call("PTTL", keys.DELIVERY + accepted.id) <= settings.deliveries.keep_s * 1000
    told = await events(link, accepted.id)
    assert [(event["rank"], event["status"]) for event in told] == [(0, "pending"), (1, "sending"), (2, "sent")]
    assert told[-1]["history"] == [list(one) for one in delivery.history]
    assert told[-1]["provider_id"] == "SM1"
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("provider_id", ['a"b', 'x"},"error":null,"worker":"y', "\\", "é\n", ""])
async def test_a_provider_may_name_a_message_as_it_likes(
    settings: Settings, deliveries: Deliveries, provider_id: str
) -> None:
    """Nothing of it is taken for a part of the record."""
    accepted = await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        await hand.deliveries.begin(job, "console")
        await hand.settle(completed(job, entry, provider_id))
    delivery = await found(deliveries, accepted.id)
    assert (delivery.status, delivery.provider_id) == ("sent", provider_id or None)


async def test_of_two_holders_of_an_entry_one_begins(settings: Settings, deliveries: Deliveries) -> None:
    """The one who lost it, to a claim or to a later delivery of its own, is told so."""
    await accept(deliveries)
    async with holding(settings) as old, Holder(settings, "heir") as heir:
        job, _ = await old.hold()
        await heir.claim(old)
        with pytest.raises(LeaseLost):
            await old.deliveries.begin(job, "console")
        assert (await heir.deliveries.begin(job, "console")).word == "begun"
        with pytest.raises(LeaseLost):
            await heir.deliveries.begin(Job("b" * 32, "delivery_sms", {}, [], 0), "console")  # it never had that


async def test_two_racing_holders_begin_once(settings: Settings, deliveries: Deliveries) -> None:
    """Whatever the order in which claim and begin reach Redis."""
    async with Holder(settings, "one") as one, Holder(settings, "two") as two:
        for _ in range(25):
            await one.live()
            await accept(deliveries)
            job, _ = await one.hold()

            async def as_heir() -> str:
                job, entry = await two.claim(one)
                word = (await two.deliveries.begin(job, "console")).word
                await two.settle(completed(job, entry) if word == "begun" else ended(job, entry, "failed", "test"))
                return word

            words = await asyncio.gather(one.deliveries.begin(job, "console"), as_heir(), return_exceptions=True)
            first = words[0].word if isinstance(words[0], Begun) else "lost"
            assert (first, words[1]) in {("begun", "doubt"), ("lost", "begun")}


async def test_an_heir_is_told_that_it_may_have_gone_out(settings: Settings, deliveries: Deliveries) -> None:
    """Unless it says that it may go out twice."""
    accepted = await accept(deliveries)
    async with holding(settings) as old, Holder(settings, "heir") as heir:
        job, _ = await old.hold()
        await old.deliveries.begin(job, "console")
        job, entry = await heir.claim(old)
        assert (await heir.deliveries.begin(job, "console")).word == "doubt"
        assert (await heir.deliveries.begin(job, "console", again=True)).word == "begun"
        await heir.settle(completed(job, entry))
    delivery = await found(deliveries, accepted.id)
    assert [one for one, _ in delivery.history] == ["pending", "sending", "sent"]


@pytest.mark.parametrize(
    ("word", "code", "wanted"),
    [
        ("failed", "outcome_unknown", "unknown"),  # the handler says so
        ("expired", "deadline_exceeded", "unknown"),  # the handler was stopped at the deadline
        ("cancelled", "cancelled", "unknown"),
        ("failed", "invalid_recipient", "failed"),  # the provider said no
        ("failed", "handler_error", "failed"),
    ],
)
async def test_what_was_begun_ends_as_unknown_unless_its_holder_knows_better(
    link: Link, settings: Settings, deliveries: Deliveries, word: str, code: str, wanted: str
) -> None:
    """The mark of `begin` is asked."""
    accepted = await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        await hand.deliveries.begin(job, "console")
        await hand.settle(ended(job, entry, word, code))
    delivery = await found(deliveries, accepted.id)
    assert (delivery.status, delivery.doubt) == (wanted, False)
    assert delivery.error == error_body(word, code, 'said "no"')
    assert (await events(link, accepted.id))[-1]["error"] == delivery.error


@pytest.mark.parametrize("code", ["outcome_unknown", "poison", "deadline_exceeded"])
async def test_what_was_never_begun_has_failed(settings: Settings, deliveries: Deliveries, code: str) -> None:
    """Whatever became of its job: it did not go out."""
    accepted = await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        await hand.settle(ended(job, entry, "failed", code))
    assert await status(deliveries, accepted.id) == "failed"


@pytest.mark.parametrize("again", [retry, lambda entry: ended_as_poison(entry)])
async def test_an_heir_that_never_began_takes_no_doubt_away(
    link: Link, settings: Settings, deliveries: Deliveries, again: Callable[[Entry], Settlement]
) -> None:
    """It fails before it comes so far, say since Redis is out of memory: what the dead one did stays unknown."""
    accepted = await accept(deliveries)
    async with holding(settings) as old, Holder(settings, "heir") as heir:
        job, _ = await old.hold()
        await old.deliveries.begin(job, "console")
        _, entry = await heir.claim(old)
        assert await heir.settle(again(entry)) == ["settled"]
        delivery = await found(deliveries, accepted.id)
        if delivery.status == "sending":
            assert delivery.doubt
            await link.call("ZADD", keys.DELAYED, 1, accepted.id)
            await link.run(scripts.PROMOTE, (), (100, "one", 100))
            job, entry = await heir.hold()
            assert (await heir.deliveries.begin(job, "console")).word == "doubt"
            await heir.settle(ended(job, entry, "failed", "outcome_unknown"))
    assert await status(deliveries, accepted.id) == "unknown"


async def test_a_provider_that_was_chosen_since_is_not_asked_again(settings: Settings, deliveries: Deliveries) -> None:
    """That it knows messages by their ids is of no use: another one may have sent this."""
    await accept(deliveries)
    async with holding(settings) as old, Holder(settings, "heir") as heir:
        job, _ = await old.hold()
        await old.deliveries.begin(job, "twilio")
        job, _ = await heir.claim(old)
        assert (await heir.deliveries.begin(job, "http", again=True)).word == "doubt"


async def test_a_copied_entry_sends_nothing(link: Link, settings: Settings, deliveries: Deliveries) -> None:
    """Neither while its delivery is under way nor when that has ended as unknown: it is no delivery."""
    accepted = await accept(deliveries)
    ((_, fields),) = await link.call("XRANGE", "message_queue:sms", "-", "+")
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        await hand.deliveries.begin(job, "console")
        await link.call("XADD", "message_queue:sms", "*", *fields)
        copied, _ = await hand.hold()
        assert (await hand.deliveries.begin(copied, "console")).word == "gone"
        await hand.settle(ended(job, entry, "failed", "outcome_unknown"))
        await link.call("DEL", keys.COMPLETION + accepted.id)
        await link.call("XADD", "message_queue:sms", "*", *fields)
        copied, _ = await hand.hold()
        assert (await hand.deliveries.begin(copied, "console")).word == "gone"
    assert await status(deliveries, accepted.id) == "unknown"


async def test_a_retry_says_how_it_went_and_a_release_does_not(settings: Settings, deliveries: Deliveries) -> None:
    """A handler that was stopped in the middle cannot know; one that raised an error does."""
    first, second = await accept(deliveries), await accept(deliveries)
    async with holding(settings) as hand:
        for accepted, again in ((first, retry), (second, release)):
            job, entry = await hand.hold()
            assert job.id == accepted.id
            await hand.deliveries.begin(job, "console")
            await hand.settle(again(entry))
    assert ((await found(deliveries, first.id)).doubt, (await found(deliveries, second.id)).doubt) == (False, True)
    assert await status(deliveries, first.id) == "sending"  # it never goes back


async def test_a_retry_is_counted_on_the_stream(link: Link, settings: Settings, deliveries: Deliveries) -> None:
    """`retry_count` follows the attempts."""
    await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        job.attempt = 3
        await hand.settle(Settlement(entry, job.id, "release", "", job.encode()))
        ((_, fields),) = await link.call("XRANGE", "message_queue:sms", "-", "+")
        assert orjson.loads(fields[1])["retry_count"] == 2
        assert decode(fields[1]).attempt == 3


# --- rates --------------------------------------------------------------------------------------


async def test_turns_are_given_at_the_rate_of_the_provider_over_all_processes(
    settings: Settings, deliveries: Deliveries
) -> None:
    """Types and processes that share a provider share its turns; one without a rate waits for nothing."""
    for kind in ("sms", "mms"):
        for _ in range(3):
            await accept(deliveries, kind)
    async with holding(settings) as sms, holding(settings, "mms") as mms:
        held = [(hand, (await hand.hold())[0]) for _ in range(3) for hand in (sms, mms)]
        begun = [await hand.deliveries.begin(job, "twilio", per_s=0.5) for hand, job in held[:4]]
        assert begun[0] == Begun("begun")
        turns = [one.turn_us or 0 for one in begun[1:]]
        assert [b - a for a, b in itertools.pairwise(turns)] == [2_000_000, 2_000_000]
        assert all(0 < one.wait_s <= 6 for one in begun[1:])
        assert (await held[4][0].deliveries.begin(held[4][1], "console")).word == "begun"
        waiting = await found(deliveries, held[1][1].id)
        assert (waiting.status, waiting.doubt) == ("pending", False)


async def test_a_turn_that_has_come_is_taken(link: Link, settings: Settings, deliveries: Deliveries) -> None:
    """It is not given anew: who waited begins."""
    await accept(deliveries)
    async with holding(settings) as hand:
        job, _ = await hand.hold()
        now_us = await link.time_us()
        assert (await hand.deliveries.begin(job, "twilio", per_s=0.001, turn_us=now_us + 60_000_000)).word == "wait"
        assert (await hand.deliveries.begin(job, "twilio", per_s=0.001, turn_us=now_us - 1)).word == "begun"


async def test_a_turn_that_is_too_far_away_is_not_given(link: Link, settings: Settings, deliveries: Deliveries) -> None:
    """Else what is sent away for a while would use the turns of others."""
    for _ in range(3):
        await accept(deliveries)
    settings = changed(settings, deliveries={"turn_wait_s": 5.0})
    async with holding(settings) as hand:
        jobs = [(await hand.hold())[0] for _ in range(3)]
        begun = [await hand.deliveries.begin(job, "twilio", per_s=0.1) for job in jobs]
        assert [one.word for one in begun] == ["begun", "busy", "busy"]
        assert begun[1].turn_us is None
        assert 5 < begun[1].wait_s <= 10
        before = await link.call("HGET", keys.PROVIDER + "twilio", "next_us")
        await hand.deliveries.begin(jobs[1], "twilio", per_s=0.1)
        assert await link.call("HGET", keys.PROVIDER + "twilio", "next_us") == before
        assert 0 < await link.call("PTTL", keys.PROVIDER + "twilio") <= 10_000


async def test_a_provider_that_asked_for_it_is_left_alone(
    link: Link, settings: Settings, deliveries: Deliveries
) -> None:
    """By everybody, also by who has waited for a turn; a shorter hold makes none shorter."""
    await accept(deliveries)
    async with holding(settings) as hand:
        job, _ = await hand.hold()
        assert await hand.deliveries.hold("twilio", 30) == 30
        assert 29 < await hand.deliveries.hold("twilio", 1) <= 30
        for turn_us in (None, 1):
            begun = await hand.deliveries.begin(job, "twilio", turn_us=turn_us)
            assert begun.word == "held"
            assert 29 < begun.wait_s <= 30
        assert (await found(deliveries, job.id)).status == "pending"
        assert (await hand.deliveries.begin(job, "console")).word == "begun"  # another one is not meant
        assert 29_000 < await link.call("PTTL", keys.PROVIDER + "twilio") <= 30_000


# --- being told ---------------------------------------------------------------------------------


async def sent(deliveries: Deliveries, hand: Holder) -> str:
    """A delivery that its provider has taken."""
    accepted = await accept(deliveries)
    job, entry = await hand.hold()
    await hand.deliveries.begin(job, "console")
    await hand.settle(completed(job, entry))
    return accepted.id


def highest(*statuses: str) -> str:
    return max(statuses, key=RANK.index)


async def test_all_orders_and_repetitions_of_what_is_told_end_in_the_same_status(
    link: Link, settings: Settings, deliveries: Deliveries
) -> None:
    """Every set of events, in every order, each told once or twice, and the first once more at the end."""
    runs = 0
    async with holding(settings) as hand:
        for size in range(1, len(EVENTS) + 1):
            for events_told in itertools.permutations(EVENTS, size):
                for twice in itertools.product((1, 2), repeat=size):
                    runs += 1
                    delivery_id = await sent(deliveries, hand)
                    order = [event for event, times in zip(events_told, twice, strict=True) for _ in range(times)]
                    for number, event in enumerate([*order, order[0]]):
                        await told(deliveries, "test", f"{delivery_id} {number}", delivery_id, event)
                    delivery = await found(deliveries, delivery_id)
                    assert delivery.status == highest("sent", *events_told), order
                    ranks = [RANK.index(one) for one, _ in delivery.history]
                    assert ranks == sorted(set(ranks)), delivery.history
    assert runs == sum(2**size * len(list(itertools.permutations(EVENTS, size))) for size in range(1, 5))
    assert await link.call("ZCARD", keys.LIVE_INDEX) == 0


async def test_what_is_told_before_the_answer_comes_to_the_same(settings: Settings, deliveries: Deliveries) -> None:
    """A callback may overtake the provider's own answer, at every place between begin and settle."""
    async with holding(settings) as hand:
        for size in range(1, len(EVENTS) + 1):
            for events_told in itertools.permutations(EVENTS, size):
                for before in range(size + 1):
                    await accept(deliveries)
                    job, entry = await hand.hold()
                    await hand.deliveries.begin(job, "console")
                    for event in events_told[:before]:
                        await told(deliveries, "test", f"{job.id} {event}", job.id, event)
                    await hand.settle(completed(job, entry))
                    for event in events_told[before:]:
                        await told(deliveries, "test", f"{job.id} {event}", job.id, event)
                    delivery = await found(deliveries, job.id)
                    assert delivery.status == highest("sent", *events_told)
                    assert delivery.provider_id == "SM1"


async def test_history_learns_what_the_answer_says_also_where_the_callback_was_quicker(
    link: Link, settings: Settings, deliveries: Deliveries
) -> None:
    """The last event is the whole truth."""
    accepted = await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        await hand.deliveries.begin(job, "console")
        await told(deliveries, "test", "e1", job.id, "delivered")
        await hand.settle(completed(job, entry))
    last = (await events(link, accepted.id))[-1]
    assert (last["status"], last["provider_id"], last["attempts"]) == ("delivered", "SM1", 1)
    assert last["rank"] == max(event["rank"] for event in await events(link, accepted.id))


async def test_an_event_counts_once(link: Link, settings: Settings, deliveries: Deliveries) -> None:
    """By its id and who tells it; what is known already is late; what nobody knows is said to be so."""
    async with holding(settings) as hand:
        delivery_id = await sent(deliveries, hand)
    error = error_body("failed", "30005", "unknown destination handset")
    assert await told(deliveries, "test", "e1", delivery_id, "undelivered", error) == "applied"
    assert (await found(deliveries, delivery_id)).error == error
    before = await everything(link)
    assert await told(deliveries, "test", "e1", delivery_id, "delivered") == "duplicate"
    assert await everything(link) == before
    assert await told(deliveries, "other", "e1", delivery_id, "sent") == "late"
    assert await told(deliveries, "test", "e2", NOBODY, "sent") == "unknown_delivery"
    assert await status(deliveries, delivery_id) == "undelivered"
    assert await told(deliveries, "test", "e3", delivery_id, "delivered") == "applied"
    assert (await found(deliveries, delivery_id)).error is None  # it arrived after all
    assert await link.call("PTTL", keys.DELIVERY + delivery_id) > 0


async def test_what_its_provider_has_taken_is_not_handed_over_again(settings: Settings, deliveries: Deliveries) -> None:
    """Told of a delivery whose job is tried again: the provider knows better than an error did."""
    accepted = await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        await hand.deliveries.begin(job, "console")
        await told(deliveries, "test", "e1", job.id, "sent")
        await hand.settle(release(entry))
        job, entry = await hand.hold()
        assert (await hand.deliveries.begin(job, "console", again=True)).word == "taken"
        await hand.settle(ended(job, entry, "failed", "handler_error"))
    assert await status(deliveries, accepted.id) == "sent"


async def test_what_was_unknown_is_known_once_the_provider_tells(settings: Settings, deliveries: Deliveries) -> None:
    """A callback raises it, as any."""
    accepted = await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        await hand.deliveries.begin(job, "console")
        await hand.settle(ended(job, entry, "failed", "outcome_unknown"))
    assert await told(deliveries, "test", "e1", accepted.id, "delivered") == "applied"
    delivery = await found(deliveries, accepted.id)
    assert [one for one, _ in delivery.history] == ["pending", "sending", "unknown", "delivered"]


# --- cancelling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_scheduled", [True, False])
async def test_what_waits_is_cancelled_at_once(
    link: Link, front: Front, deliveries: Deliveries, *, is_scheduled: bool
) -> None:
    """Scheduled or pending; nothing of the job is left, and nothing follows."""
    due_ms = deliveries.clock.now_ms() + 60_000 if is_scheduled else None
    accepted = await accept(deliveries, due_ms=due_ms)
    assert await front.cancel(accepted.id, "someone else") == "unknown"
    assert await front.cancel(accepted.id, "default") == "cancelled"
    await assert_nothing_is_left(link)
    assert await told(deliveries, "test", "e1", accepted.id, "delivered") == "late"
    delivery = await found(deliveries, accepted.id)
    assert [one for one, _ in delivery.history] == ["scheduled" if is_scheduled else "pending", "cancelled"]
    assert await front.cancel(accepted.id, "default") == "finished"
    assert (await outcome(link, accepted.id)).status == "cancelled"  # type: ignore[union-attr]
    assert await link.call("PTTL", keys.DELIVERY + accepted.id) > 0


async def test_what_is_in_hand_is_cancelled_as_long_as_it_has_not_begun(
    front: Front, settings: Settings, deliveries: Deliveries
) -> None:
    """Then it is never handed over; afterwards cancelling is too late, also while it waits to be tried again."""
    first, second = await accept(deliveries), await accept(deliveries)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        assert await front.cancel(first.id, "default") == "cancelling"
        assert await status(deliveries, first.id) == "cancelled"
        assert (await hand.deliveries.begin(job, "console")).word == "cancelled"
        assert await hand.settle(retry(entry)) == ["cancelled"]
        job, entry = await hand.hold()
        await hand.deliveries.begin(job, "console")
        assert await front.cancel(second.id, "default") == "finished"
        await hand.settle(retry(entry))
        assert await front.cancel(second.id, "default") == "finished"
    assert (await status(deliveries, first.id), await status(deliveries, second.id)) == ("cancelled", "sending")


async def test_cancel_and_begin_race_for_one_of_both(front: Front, settings: Settings, deliveries: Deliveries) -> None:
    """Never both: what the client is told to be cancelled does not go out."""
    async with holding(settings) as hand:
        for _ in range(25):
            accepted = await accept(deliveries)
            job, entry = await hand.hold()
            begun, word = await asyncio.gather(
                hand.deliveries.begin(job, "console"), front.cancel(accepted.id, "default")
            )
            assert (begun.word, word) in {("begun", "finished"), ("cancelled", "cancelling")}
            await hand.settle(completed(job, entry) if begun.word == "begun" else retry(entry))
            assert await status(deliveries, accepted.id) == ("sent" if begun.word == "begun" else "cancelled")


# --- ends nobody wanted -------------------------------------------------------------------------


async def expire(link: Link) -> None:
    await link.run(scripts.EXPIRE, (), (100, 60_000, 100, 60_000))


@pytest.mark.parametrize("is_doubtful", [True, False])
async def test_one_whose_time_is_over_is_buried_and_its_status_true(
    link: Link, settings: Settings, deliveries: Deliveries, *, is_doubtful: bool
) -> None:
    """Unknown where somebody died after it was begun; failed where it waited."""
    accepted = await accept(deliveries)
    async with holding(settings) as hand:
        job, _ = await hand.hold()
        if is_doubtful:
            await hand.deliveries.begin(job, "console")
        await hand.die()
        await link.call("ZADD", keys.LIVE_INDEX, 1, accepted.id)
        await expire(link)
    delivery = await found(deliveries, accepted.id)
    assert delivery.status == ("unknown" if is_doubtful else "failed")
    assert (delivery.error or {})["code"] == "deadline_exceeded"
    (letter,) = await letters(link)
    assert (letter["reason"], letter["stage"], letter["job_id"]) == ("deadline_exceeded", "sms", accepted.id)
    await assert_nothing_is_left(link)


async def test_one_whose_entry_was_deleted_by_hand_ends(link: Link, settings: Settings, deliveries: Deliveries) -> None:
    """As failed, with the code `lost`."""
    accepted = await accept(deliveries)
    await link.call("DEL", "message_queue:sms")
    await link.call("ZADD", keys.LIVE_INDEX, 1, accepted.id)
    await expire(link)
    delivery = await found(deliveries, accepted.id)
    assert (delivery.status, (delivery.error or {})["code"]) == ("failed", "lost")


@pytest.mark.parametrize("key", [keys.EVENTS, keys.DELIVERY])
async def test_a_key_of_a_wrong_type_stops_a_delivery_and_no_other(
    link: Link, settings: Settings, deliveries: Deliveries, key: str
) -> None:
    """Everything is looked at before anything is written; a scheduled one is put off."""
    accepted = await accept(deliveries)
    later = await accept(deliveries, due_ms=deliveries.clock.now_ms() + 60_000)
    await link.call("ZADD", keys.DELAYED, 1, later.id)
    async with holding(settings) as hand:
        job, _ = await hand.hold()
        wrong = key if key == keys.EVENTS else key + accepted.id
        saved = await link.call("DUMP", wrong)
        await link.call("DEL", wrong)
        await link.call("SET", wrong, "x", "PX", 60_000)
        before = await everything(link)
        with pytest.raises(CommandRefused):
            await hand.deliveries.begin(job, "console")
        with pytest.raises(CommandRefused):
            await told(deliveries, "test", "e1", accepted.id, "sent")
        assert await everything(link) == before
        reply = await link.run(scripts.PROMOTE, (), (10, "one", 100))
        assert reply[1:3] == ([0, 1] if key == keys.EVENTS else [1, 0])
        await link.call("DEL", wrong)
        await link.call("RESTORE", wrong, 0, saved)
        assert (await hand.deliveries.begin(job, "console")).word == "begun"


async def test_a_record_that_somebody_deleted_goes_out_to_nobody(
    link: Link, settings: Settings, deliveries: Deliveries
) -> None:
    """And its job can end all the same."""
    accepted = await accept(deliveries)
    await link.call("DEL", keys.DELIVERY + accepted.id)
    async with holding(settings) as hand:
        job, entry = await hand.hold()
        assert (await hand.deliveries.begin(job, "console")).word == "gone"
        assert await hand.settle(ended(job, entry, "failed", "gone")) == ["settled"]
    await assert_nothing_is_left(link)


# --- incoming -----------------------------------------------------------------------------------


async def test_a_message_from_outside_is_accepted_once(link: Link, deliveries: Deliveries) -> None:
    """Its request stands on the stream as it came, what it says in the history."""
    message = ReceivedMessage(
        type="sms", provider_id="SM7", sender="+15005550006", recipient="+15005550009", body="Thanks!"
    )
    request: dict[str, Any] = {"headers": {"content-type": "text/plain"}, "body": "From=%2B1500&Body=Thanks!"}
    assert await deliveries.received("twilio", "SM7", message, **request) == "accepted"
    assert await deliveries.received("twilio", "SM7", message, **request) == "duplicate"
    assert await deliveries.received("twilio", "SM8", message, **request) == "accepted"
    (_, fields), _ = await link.call("XRANGE", "webhook_queue", "-", "+")
    body = orjson.loads(fields[1])
    assert {name: body[name] for name in ("provider", "headers", "body")} == {"provider": "twilio"} | request
    assert decode(fields[1]).payload["message"]["body"] == "Thanks!"
    (event,) = await events(link, body["id"])
    assert (event["body"], event["provider"], event["provider_id"]) == ("Thanks!", "twilio", "SM7")
    assert "headers" not in event


async def test_messages_from_outside_are_refused_when_there_is_too_much(
    link: Link, front: Front, settings: Settings
) -> None:
    """Their event is not noted then, so that the provider may bring them again."""
    message = ReceivedMessage(type="sms", provider_id="SM7", sender="+1", recipient="+2")
    for section, name in (("admission", "max_jobs"), ("history", "max_backlog")):
        full = Deliveries(Link(settings.redis, "full"), changed(settings, **{section: {name: 0}}), front.clock)
        with pytest.raises(Overloaded):
            await full.received("twilio", "SM7", message, headers={}, body="")
        await full.close()
    assert await front.deliveries.received("twilio", "SM7", message, headers={}, body="") == "accepted"


# --- reading ------------------------------------------------------------------------------------


async def test_many_are_read_at_once(deliveries: Deliveries) -> None:
    """In order; None for what there is not."""
    first, second = await accept(deliveries), await accept(deliveries, "email", tenant="ann")
    one, nobody, two = await deliveries.find([first.id, NOBODY, second.id])
    assert nobody is None
    assert one is not None
    assert two is not None
    assert ((one.id, one.tenant), (two.id, two.tenant, two.type)) == (
        (first.id, "default"),
        (second.id, "ann", "email"),
    )
    assert await deliveries.find([]) == []
