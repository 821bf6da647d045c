"""Deliveries at work: workers that hand them over, die, are told to wait, and are repeated by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import orjson
import pytest
import structlog
from prometheus_client import REGISTRY

from pipeline import keys
from pipeline.connection import Link
from pipeline.dead import DeadLetters
from pipeline.deliveries import AcceptedDelivery, Deliveries, Delivery, Event, Order, Told
from pipeline.errors import ConfigError, InDoubt, Reject, RetryLater
from pipeline.flows import ReceivedMessage
from pipeline.front import Front
from pipeline.job import decode
from pipeline.settings import HttpProviderSettings, Settings
from stages import delivery, incoming
from stages.delivery import Courier, Shared
from stages.providers import TYPES, HandOver, Outgoing, Provider, Sent, Type
from stages.providers.http import Http
from tests.conftest import wait_until
from tests.receivers import receiving, stay_silent
from tests.rig import assert_nothing_is_left, changed, letters, working

TEXT = {"from": "+15005550006", "to": "+15005550009", "body": "Your secret parcel is here."}


class Scripted(Provider):
    """A provider that does what the test says, and notes each message that reached it."""

    name = "console"
    types: ClassVar[frozenset[Type]] = frozenset(TYPES)

    def __init__(self, *answers: Exception | Callable[[Outgoing], Awaitable[Sent]], idempotent: bool = False) -> None:
        self.is_idempotent = idempotent  # type: ignore[misc]  # of this one
        self.got: list[Outgoing] = []
        self.log: list[str] = []
        self._answers = list(answers)

    async def start(self) -> None:
        self.log.append("start")

    async def stop(self) -> None:
        self.log.append("stop")

    async def send(self, message: Outgoing) -> Sent:
        self.got.append(message)
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, Exception):
            raise answer
        return await answer(message) if answer else Sent(f"P{len(self.got)}")


async def never(_: Outgoing) -> Sent:
    """Take the message, and never say so."""
    await asyncio.Event().wait()
    raise AssertionError


def courier(settings: Settings, provider: Provider, kind: Type = "sms") -> Courier:
    return Courier(kind, Shared(provider), settings.deliveries)


async def accept(front: Front, kind: str = "sms", **more: Any) -> AcceptedDelivery:
    return await front.deliver(Order(kind, "default", TEXT | more.pop("content", {}), **more))


async def until(deliveries: Deliveries, delivery_id: str, *statuses: str) -> Delivery:
    """Wait until a delivery has come to one of these."""
    found: list[Delivery] = []

    async def has_come() -> bool:
        found[:] = [one for one in await deliveries.read_many([delivery_id]) if one is not None]
        return bool(found) and found[0].status in statuses

    await wait_until(has_come)
    return found[0]


def statuses(delivery: Delivery) -> list[str]:
    return [status for status, _ in delivery.history]


async def test_a_delivery_reaches_its_provider_once_with_all_that_was_given(
    link: Link, front: Front, settings: Settings
) -> None:
    """And nothing is left of the work but its record."""
    settings = changed(settings, deliveries={"public_url": "https://example.com/base/"})
    given = {
        "subject": "Hello", "html": "<b>Hi</b>", "metadata": {"order": 7},
        "attachments": [{"filename": "a.txt", "content_type": "text/plain", "content": "SGVsbG8="}],
    }  # fmt: skip
    provider = Scripted()
    provider.calls_back = True  # type: ignore[misc]
    async with working(settings, [courier(settings, provider, "email")]):
        accepted = await accept(front, "email", content=given)
        found = await until(front.deliveries, accepted.id, "sent")
    assert statuses(found) == ["pending", "sending", "sent"]
    assert (found.provider, found.provider_id, found.attempts) == ("console", "P1", 1)
    (message,) = provider.got
    assert (message.id, message.type, message.sender, message.to) == (accepted.id, "email", TEXT["from"], TEXT["to"])
    assert (message.subject, message.html, message.metadata) == ("Hello", "<b>Hi</b>", {"order": 7})
    assert message.attachments[0].content == b"Hello"
    assert message.callback_url == f"https://example.com/base/api/v1/webhooks/console?delivery={accepted.id}"
    assert provider.log == ["start", "stop"]
    await assert_nothing_is_left(link)


async def test_types_of_one_provider_share_it(settings: Settings) -> None:
    """Opened for the first that starts, closed with the last that stops."""
    provider = Scripted()
    shared = Shared(provider)
    couriers: Sequence[Courier] = [Courier(kind, shared, settings.deliveries) for kind in TYPES]
    async with working(settings, couriers):
        assert provider.log == ["start"]
    assert provider.log == ["start", "stop"]


def test_a_process_has_all_three_and_what_comes_in(settings: Settings) -> None:
    """With slots of their own; a provider that does not carry a type is refused by the name of the setting."""
    settings = changed(settings, deliveries={"mms_concurrency": 3, "incoming_concurrency": 2})
    assert [(stage.name, stage.slots) for stage in delivery.build(settings)] == [
        ("sms", 16), ("mms", 3), ("email", 16), ("incoming", 2),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="PENSTOCK_DELIVERIES__INCOMING_URL"):
        incoming.build(changed(settings, deliveries={"incoming_url": "http://127.0.0.1/hook"}))


# --- crashes ------------------------------------------------------------------------------------


async def crash_while_sending(
    front: Front, settings: Settings, provider: Scripted
) -> tuple[AcceptedDelivery, Scripted]:
    """Kill a worker between `sending` and the provider's answer; another one with the same provider follows."""
    async with working(settings, [courier(settings, provider)]) as (victim,):
        accepted = await accept(front)
        await wait_until(lambda: bool(provider.got))
        await victim.crash()
    return accepted, provider


async def test_a_crash_between_sending_and_the_answer_is_unknown(link: Link, front: Front, settings: Settings) -> None:
    """It is never sent again by itself: an operator decides, and that is a delivery of its own."""
    accepted, provider = await crash_while_sending(front, settings, Scripted(never))
    async with working(settings, [courier(settings, provider)]):
        found = await until(front.deliveries, accepted.id, "unknown")
        assert len(provider.got) == 1
        assert statuses(found) == ["pending", "sending", "unknown"]
        assert (found.error or {})["code"] == "outcome_unknown"
        (letter,) = await DeadLetters(link, settings).list(10)
        assert (letter.reason, letter.stage) == ("outcome_unknown", "sms")
        now_ms = front.clock.now_ms()
        again = await DeadLetters(link, settings).retry(letter.id, now_ms)
        repeated = await until(front.deliveries, again, "sent")
    assert (repeated.retry_of, repeated.content) == (accepted.id, TEXT)
    assert [message.id for message in provider.got] == [accepted.id, again]
    assert (await until(front.deliveries, accepted.id, "unknown")).history == found.history
    assert await DeadLetters(link, settings).count() == 0
    await assert_nothing_is_left(link)


async def test_a_provider_that_knows_messages_by_their_id_is_asked_again(
    link: Link, front: Front, settings: Settings
) -> None:
    """Safely repeated: the same id both times."""
    accepted, provider = await crash_while_sending(front, settings, Scripted(never, idempotent=True))
    async with working(settings, [courier(settings, provider)]):
        found = await until(front.deliveries, accepted.id, "sent")
    assert statuses(found) == ["pending", "sending", "sent"]
    assert [message.id for message in provider.got] == [accepted.id] * 2
    assert await letters(link) == []


async def test_a_crash_before_it_was_begun_leaves_no_doubt(link: Link, front: Front, settings: Settings) -> None:
    """Who waited for its turn had not handed it over."""
    provider = Scripted()
    provider.per_s = 0.05
    async with working(settings, [courier(settings, provider)]) as (victim,):
        first, second = await accept(front), await accept(front)
        await until(front.deliveries, first.id, "sent")
        await wait_until(lambda: len(victim.workers[0].held) == 1)
        await wait_until(lambda: link.call("HGET", keys.PROVIDER + "console", "next_us"))
        await victim.crash()
    await link.call("DEL", keys.PROVIDER + "console")
    async with working(settings, [courier(settings, provider)]):
        found = await until(front.deliveries, second.id, "sent")
    assert statuses(found) == ["pending", "sending", "sent"]
    assert Counter(message.id for message in provider.got) == {first.id: 1, second.id: 1}


async def test_a_drain_that_stops_a_hand_over_leaves_the_doubt(front: Front, settings: Settings) -> None:
    """The work is given back, but nobody knows whether it had been done."""
    settings = changed(settings, deliveries={"drain_s": 0.0})
    provider = Scripted(never)
    async with working(settings, [courier(settings, provider)]):
        accepted = await accept(front)
        await wait_until(lambda: bool(provider.got))
    found = await until(front.deliveries, accepted.id, "sending")
    assert found.doubt
    async with working(settings, [courier(settings, provider)]):
        await until(front.deliveries, accepted.id, "unknown")
    assert len(provider.got) == 1


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code", "reason"),
    [
        (Reject("no such number +15005550009", code="invalid_recipient"), "failed", "invalid_recipient", None),
        (InDoubt("the connection broke"), "unknown", "outcome_unknown", None),
        (RetryLater("the provider is ill", code="bad_status"), "failed", "bad_status", "attempts_exhausted"),
        (RuntimeError("it says +15005550009"), "unknown", "outcome_unknown", None),
    ],
)
async def test_a_failure_ends_as_its_kind_says(
    link: Link, front: Front, settings: Settings, error: Exception, status: str, code: str, reason: str | None
) -> None:
    """At once, or after its retries; a dead letter at the end, which quotes nothing of it, as no log does."""
    provider = Scripted(*[error] * 10)
    with structlog.testing.capture_logs() as lines:
        async with working(settings, [courier(settings, provider)]):
            accepted = await accept(front)
            found = await until(front.deliveries, accepted.id, "failed", "unknown")
    assert (found.status, (found.error or {})["code"]) == (status, code)
    assert len(provider.got) == found.attempts == (settings.retry.max_retries + 1 if reason else 1)
    assert statuses(found) == ["pending", "sending", status]
    (letter,) = await letters(link)
    assert letter["reason"] == (reason or code)
    shown = repr([letter, lines])
    assert "+1500" not in shown
    assert "secret" not in shown
    assert not any(line.get("exc_info") for line in lines)  # a traceback ends in what the error says


async def test_a_failure_that_passes_is_tried_again(front: Front, settings: Settings) -> None:
    """It stays `sending` meanwhile, and each try is counted."""
    provider = Scripted(RetryLater("ill", code="bad_status"), RetryLater("away", code="unreachable"))
    async with working(settings, [courier(settings, provider)]):
        found = await until(front.deliveries, (await accept(front)).id, "sent")
    assert (statuses(found), found.attempts) == (["pending", "sending", "sent"], 3)


UNTOLD = InDoubt("the connection broke")
ILL = RetryLater("ill", code="bad_status")
AWAY = RetryLater("away", code="unreachable", charged=False)
NO = Reject("no", code="refused")


@pytest.mark.parametrize(
    ("answers", "status", "code"),
    [
        ([UNTOLD] * 4, "unknown", "outcome_unknown"),
        ([RuntimeError("it broke")] * 4, "unknown", "outcome_unknown"),
        ([UNTOLD, ILL, ILL, ILL], "unknown", "outcome_unknown"),
        ([ILL, ILL, ILL, UNTOLD], "unknown", "outcome_unknown"),
        ([UNTOLD, AWAY, ILL, ILL, ILL], "unknown", "outcome_unknown"),
        ([UNTOLD, NO], "unknown", "outcome_unknown"),
        ([UNTOLD, AWAY, UNTOLD], "sent", None),
        ([ILL, AWAY, ILL], "sent", None),
        ([ILL] * 4, "failed", "bad_status"),
        ([ILL, AWAY, NO], "failed", "refused"),
    ],
)
async def test_a_doubt_that_is_asked_again_ends_with_a_success_only(
    link: Link, front: Front, settings: Settings, answers: list[Exception], status: str, code: str | None
) -> None:
    """Where the provider knows a message by its id: what it may have had once is never said to have failed."""
    provider = Scripted(*answers, idempotent=True)
    async with working(settings, [courier(settings, provider)]):
        found = await until(front.deliveries, (await accept(front)).id, "sent", "failed", "unknown")
    assert (found.status, (found.error or {}).get("code")) == (status, code)
    assert len(provider.got) == len(answers) + (status == "sent")
    charged = sum(answer not in (AWAY, NO) for answer in answers)
    assert found.attempts == charged + (status == "sent" or NO in answers)
    assert not found.doubt
    await assert_nothing_is_left(link)


async def test_a_crash_is_not_forgotten_by_the_failures_that_follow(front: Front, settings: Settings) -> None:
    """What the one who died had handed over may have gone out, whatever its heirs hear."""
    accepted, provider = await crash_while_sending(front, settings, Scripted(never, *[ILL] * 4, idempotent=True))
    async with working(settings, [courier(settings, provider)]):
        found = await until(front.deliveries, accepted.id, "failed", "unknown")
    assert (found.status, (found.error or {})["code"]) == ("unknown", "outcome_unknown")


async def test_a_doubt_outlives_the_time_of_its_delivery(front: Front, settings: Settings) -> None:
    """It waited to be asked again when its time ended."""
    settings = changed(settings, lifetimes={"delivery_s": 1.5}, retry={"base_s": 60.0, "cap_s": 60.0})
    provider = Scripted(*[UNTOLD] * 10, idempotent=True)
    async with Front(settings, "short") as short, working(settings, [courier(settings, provider)]):
        accepted = await accept(short)
        found = await until(front.deliveries, accepted.id, "failed", "unknown")
    assert found.status == "unknown"


async def test_a_gateway_that_never_answers_may_have_the_message(front: Front, settings: Settings) -> None:
    """It is asked again as often as it may be, under one id."""
    settings = changed(settings, retry={"max_retries": 1})
    own = HttpProviderSettings(url="http://127.0.0.1:1", timeout_s=0.2, connect_timeout_s=1.0)
    async with receiving([stay_silent] * 9) as receiver:
        http = Http(own.model_copy(update={"url": receiver.url}))
        async with working(settings, [courier(settings, http)]):
            found = await until(front.deliveries, (await accept(front)).id, "failed", "unknown")
        assert (found.status, (found.error or {})["code"], found.attempts) == ("unknown", "outcome_unknown", 2)
        assert {news.headers["idempotency-key"] for news in receiver.got} == {found.id}


async def cancels_itself(_: Outgoing) -> Sent:
    """Wait for something that somebody cancels."""
    step: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
    step.cancel()
    return await step


async def answers_nothing(_: Outgoing) -> Sent:
    return None  # type: ignore[return-value]  # the slip that is meant


async def answers_strangely(_: Outgoing) -> Sent:
    return Sent("\ud800")


@pytest.mark.parametrize(
    ("answer", "status"),
    [(cancels_itself, "unknown"), (answers_nothing, "unknown"), (answers_strangely, "sent")],
)
async def test_a_slip_of_a_provider_sends_nothing_twice(
    front: Front, settings: Settings, answer: Callable[[Outgoing], Awaitable[Sent]], status: str
) -> None:
    """A cancellation of its own is none of ours, and an answer that says nothing is no word that it was not taken."""
    provider = Scripted(answer)
    async with working(settings, [courier(settings, provider)]):
        found = await until(front.deliveries, (await accept(front)).id, "unknown", "failed", "sent")
    assert (found.status, found.attempts, len(provider.got)) == (status, 1, 1)
    assert statuses(found) == ["pending", "sending", status]


async def test_what_its_provider_has_already_is_not_counted_as_handed_over(
    link: Link, front: Front, settings: Settings
) -> None:
    """It has told so meanwhile, and is given it no second time; nor is any time negative."""

    def counted(name: str) -> float:
        return REGISTRY.get_sample_value(f"penstock_delivery_{name}", {"stage": "sms", "provider": "console"}) or 0.0

    before, before_s = counted("sent_total"), counted("sent_seconds_sum")
    provider = Scripted()
    accepted, ahead = await accept(front), await accept(front)
    await front.deliveries.told("console", [Event("e1", accepted.id, "delivered")])
    await link.call("HINCRBY", keys.DELIVERY + ahead.id, "due_ms", 3_600_000)  # the clock was set back
    async with working(settings, [courier(settings, provider)]):
        await until(front.deliveries, ahead.id, "sent")
        for one in (accepted, ahead):
            await wait_until(partial(link.call, "EXISTS", keys.COMPLETION + one.id))
    assert [message.id for message in provider.got] == [ahead.id]
    assert (counted("sent_total") - before, counted("sent_seconds_sum") - before_s) == (1, 0)


async def test_reasons_of_strangers_are_counted_as_one(front: Front, settings: Settings) -> None:
    """Each would be a series of its own, for ever."""
    labels = {"stage": "sms", "provider": "console", "reason": "other"}
    before = REGISTRY.get_sample_value("penstock_delivery_attempts_failed_total", labels) or 0
    provider = Scripted(*[Reject("no", code=f"reason_{number}") for number in range(3)])
    async with working(settings, [courier(settings, provider)]):
        for number in range(3):
            found = await until(front.deliveries, (await accept(front)).id, "failed")
            assert (found.error or {})["code"] == f"reason_{number}"
    assert REGISTRY.get_sample_value("penstock_delivery_attempts_failed_total", labels) == before + 3


async def test_a_provider_that_asks_for_patience_is_left_alone_by_all(
    link: Link, front: Front, settings: Settings
) -> None:
    """Nothing is begun before it may be, by no type that uses it, and no attempt is charged."""
    provider = Scripted(RetryLater("too many", code="rate_limited", after_s=1.0, charged=False))
    shared = Shared(provider)
    async with working(settings, [Courier(kind, shared, settings.deliveries) for kind in ("sms", "mms")]):
        first = await accept(front)
        await wait_until(lambda: link.call("HEXISTS", keys.PROVIDER + "console", "held_until_ms"))
        until_ms = int(await link.call("HGET", keys.PROVIDER + "console", "held_until_ms"))
        others = [await accept(front, kind) for kind in ("sms", "mms", "sms")]
        found = [await until(front.deliveries, one.id, "sent") for one in (first, *others)]
    assert [one.attempts for one in found] == [1] * 4
    assert len(provider.got) == 5
    assert all(at_ms >= until_ms for one in found[1:] for status, at_ms in one.history if status == "sending")


async def test_a_rate_holds_over_several_processes(front: Front, settings: Settings) -> None:
    """By the times that Redis gave: between two begun of one provider lies what its rate asks for."""
    provider = Scripted()
    provider.per_s = 20.0
    stages = [courier(settings, provider), courier(settings, provider)]
    async with working(settings, stages):
        accepted = [await accept(front) for _ in range(8)]
        found = [await until(front.deliveries, one.id, "sent") for one in accepted]
    begun = sorted(at_ms for one in found for status, at_ms in one.history if status == "sending")
    # A turn that came late on a busy machine may be close to the next one; all of them together cannot be.
    assert begun[-1] - begun[0] >= 7 * 50 - 2


# --- by hand ------------------------------------------------------------------------------------


async def test_a_cancelled_delivery_in_hand_is_stopped(link: Link, front: Front, settings: Settings) -> None:
    """While it waits for its turn; it never reaches its provider."""
    provider = Scripted()
    provider.per_s = 0.05
    async with working(settings, [courier(settings, provider)]) as (worker,):
        first, second = await accept(front), await accept(front)
        await until(front.deliveries, first.id, "sent")
        await wait_until(lambda: len(worker.workers[0].held) == 1)
        assert await front.cancel(second.id, "default") == "cancelling"
        await wait_until(lambda: not worker.workers[0].held)
    assert statuses(await until(front.deliveries, second.id, "cancelled")) == ["pending", "cancelled"]
    assert [message.id for message in provider.got] == [first.id]
    await assert_nothing_is_left(link)


@pytest.mark.parametrize(("word", "is_repeated"), [("sent", False), ("delivered", False), ("undelivered", True)])
async def test_a_dead_letter_of_what_went_out_after_all_is_not_repeated(
    link: Link, front: Front, settings: Settings, word: Told, *, is_repeated: bool
) -> None:
    """A provider may have told so since: the letter stays, and says why. What did not arrive may be tried again."""
    provider = Scripted(InDoubt("the connection broke"))
    async with working(settings, [courier(settings, provider)]):
        accepted = await accept(front)
        await until(front.deliveries, accepted.id, "unknown")
        await front.deliveries.told("twilio", [Event("E1", accepted.id, word)])
        dead = DeadLetters(link, settings)
        (letter,) = await dead.list(10)
        if is_repeated:
            again = await dead.retry(letter.id, front.clock.now_ms())
            await until(front.deliveries, again, "sent")
        else:
            with pytest.raises(Reject, match="has gone out") as caught:
                await dead.retry(letter.id, front.clock.now_ms())
            assert caught.value.code == "already_sent"
    assert len(provider.got) == 1 + is_repeated
    assert await dead.count() == 1 - is_repeated


async def test_a_dead_letter_of_a_delivery_under_way_is_not_repeated(
    link: Link, front: Front, settings: Settings
) -> None:
    """Somebody has copied its entry: that is a letter, and the delivery itself still goes out."""
    freed = asyncio.Event()

    async def slowly(_: Outgoing) -> Sent:
        await freed.wait()
        return Sent("P1")

    provider = Scripted(slowly)
    async with working(settings, [courier(settings, provider)]):
        accepted = await accept(front)
        await wait_until(lambda: bool(provider.got))
        ((_, fields),) = await link.call("XRANGE", "message_queue:sms", "-", "+")
        await link.call("XADD", "message_queue:sms", "*", *fields)
        dead = DeadLetters(link, settings)
        await wait_until(dead.count)
        (letter,) = await dead.list(10)
        with pytest.raises(Reject, match="has not ended yet") as caught:
            await dead.retry(letter.id, front.clock.now_ms())
        assert caught.value.code == "under_way"
        freed.set()
        await until(front.deliveries, accepted.id, "sent")
    assert len(provider.got) == 1


async def test_what_its_provider_has_is_not_made_ready_again(link: Link, front: Front, settings: Settings) -> None:
    """Its attachments are gone by then, and without them nothing could be: that would be a letter of what arrived."""
    files = [{"filename": "a.txt", "content_type": "text/plain", "content": "SGVsbG8="}]
    provider = Scripted(never)
    async with working(settings, [courier(settings, provider, "email")]) as (victim,):
        accepted = await accept(front, "email", content={"attachments": files})
        await wait_until(lambda: bool(provider.got))
        await victim.crash()
    await front.deliveries.told("sendgrid", [Event("E1", accepted.id, "delivered")])

    class Strict(Scripted):
        async def prepare(self, message: Outgoing) -> HandOver:
            raise Reject("an attachment has no content", code="invalid_attachment")

    async with working(settings, [courier(settings, Strict(), "email")]):

        async def has_ended() -> bool:
            return not await link.call("EXISTS", keys.LIVE + accepted.id)

        await wait_until(has_ended)
    assert await letters(link) == []
    assert statuses(await until(front.deliveries, accepted.id, "delivered")) == ["pending", "sending", "delivered"]


async def test_a_dead_letter_is_repeated_once(link: Link, front: Front, settings: Settings) -> None:
    """However many try; one whose content is gone says so."""
    provider = Scripted(Reject("no", code="refused"), Reject("no", code="refused"))
    async with working(settings, [courier(settings, provider)]):
        for _ in range(2):
            await until(front.deliveries, (await accept(front)).id, "failed")
    dead = DeadLetters(link, settings)
    gone, letter = await dead.list(10)
    await link.call("DEL", keys.DELIVERY + str(gone.job_id))
    with pytest.raises(Reject) as caught:
        await dead.retry(gone.id, front.clock.now_ms())
    assert caught.value.code == "content_gone"
    assert await dead.count() == 2
    now_ms = front.clock.now_ms()
    links = [Link(settings.redis, f"operator{number}") for number in range(3)]
    tries = [DeadLetters(one, settings).retry(letter.id, now_ms) for one in links]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    for one in links:
        await one.close()
    assert len({one for one in outcomes if isinstance(one, str)}) == 1  # two that came at once may both have done it
    assert await link.call("XLEN", "message_queue:sms") == 1
    assert await dead.count() == 1


async def test_a_dead_letter_goes_out_again_with_its_attachments(link: Link, front: Front, settings: Settings) -> None:
    """They are kept as long as it may be repeated; once it went out they are gone, and that is said."""
    files = [{"filename": "a.txt", "content_type": "text/plain", "content": "SGVsbG8="}]
    provider = Scripted(InDoubt("perhaps"), InDoubt("perhaps"))
    async with working(settings, [courier(settings, provider, "email")]):
        for _ in range(2):
            accepted = await accept(front, "email", content={"attachments": files})
            await until(front.deliveries, accepted.id, "unknown")
        dead = DeadLetters(link, settings)
        arrived, letter = await dead.list(10)
        told: list[tuple[str, Told, str]] = [("e1", "sent", "already_sent"), ("e2", "undelivered", "content_gone")]
        for event, word, code in told:
            await front.deliveries.told("test", [Event(event, str(arrived.job_id), word)])
            with pytest.raises(Reject) as caught:
                await dead.retry(arrived.id, front.clock.now_ms())
            assert caught.value.code == code
        again = await until(front.deliveries, await dead.retry(letter.id, front.clock.now_ms()), "sent")
    assert again.retry_of == letter.job_id
    assert [message.attachments[0].content for message in provider.got] == [b"Hello"] * 3


# --- from outside -------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "https://example.com/hook"])
async def test_a_message_from_outside_is_told_where_somebody_wants_to_know(
    link: Link, front: Front, settings: Settings, url: str
) -> None:
    """One webhook, begun in the step that ends the job."""
    settings = changed(settings, deliveries={"incoming_url": url})
    message = ReceivedMessage(type="sms", provider_id="SM7", sender="+1500", recipient="+1501", body="Thanks!")
    async with working(settings, [incoming.build(settings)]):
        for _ in range(2):
            await front.deliveries.received("twilio", "SM7", message, headers={"a": "b"}, body="Body=Thanks!")
        await wait_until(lambda: _is_empty(link))
    rows = await link.call("XRANGE", keys.stream("webhook"), "-", "+")
    assert len(rows) == (1 if url else 0)
    for _, fields in rows:
        job = decode(fields[1])
        assert (job.payload["event"], job.payload["url"], job.payload["queue"]) == ("message.received", url, "incoming")
        assert job.payload["data"] == {
            "message_id": job.payload["message_id"], "from": "+1500", "to": "+1501", "type": "sms", "subject": None,
            "body": "Thanks!", "media": [], "provider": "twilio", "provider_id": "SM7",
        }  # fmt: skip
        await link.call("DEL", keys.stream("webhook"))
    for _, fields in await link.call("XRANGE", keys.EVENTS, "-", "+"):
        assert b"Body=" not in fields[-1], orjson.loads(fields[-1])


async def _is_empty(link: Link) -> bool:
    return not await link.call("XLEN", "webhook_queue")
