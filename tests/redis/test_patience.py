"""A provider that takes nothing is left alone, and a process that stops begins nothing any more."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import structlog
from prometheus_client import REGISTRY

from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import Reject, RetryLater
from pipeline.front import Front
from pipeline.settings import Settings
from stages import patience
from stages.delivery import Courier, Shared
from stages.patience import Patience
from stages.providers import HandOver, Outgoing, Sent
from tests.conftest import wait_until
from tests.redis.test_delivering import Scripted, accept, courier, never, statuses, until
from tests.rig import changed, letters, working

MESSAGES = 60


class Moody(Scripted):
    """A provider that takes nothing while it is away."""

    def __init__(self, error: RetryLater) -> None:
        super().__init__()
        self.error: RetryLater | None = error
        self.tries = 0

    async def send(self, message: Outgoing) -> Sent:
        self.tries += 1
        if self.error is not None:
            raise self.error
        return await super().send(message)


@pytest.mark.parametrize(
    "error",
    [
        RetryLater("nobody listens at +15005550009", code="unreachable", charged=False),
        RetryLater("too many", code="rate_limited", charged=False),
        RetryLater("too many", code="rate_limited", after_s=0.0, charged=False),
    ],
    ids=["unreachable", "429", "429 and no wait"],
)
async def test_an_outage_costs_a_few_calls_however_many_messages_wait(
    link: Link, front: Front, settings: Settings, monkeypatch: pytest.MonkeyPatch, error: RetryLater
) -> None:
    """One message at a time tries it, in waits that grow; no attempt is charged, and the log tells of it once."""
    monkeypatch.setattr(patience, "BASE_S", 0.05)
    settings = changed(settings, deliveries={"sms_concurrency": 4})
    provider = Moody(error)
    stage = courier(settings, provider)
    with structlog.testing.capture_logs() as lines:
        async with working(settings, [stage]):
            accepted = [await accept(front) for _ in range(MESSAGES)]
            await wait_until(lambda: stage._patience.failures >= 5)
            tries, failures = provider.tries, stage._patience.failures
            assert tries <= 4 + failures  # what was in hand at its beginning, and one for each wait
            await wait_until(
                lambda: link.call("HEXISTS", keys.PROVIDER + "console", "held_until_ms")
            )  # others are told
            provider.error = None
            found = [await until(front.deliveries, one.id, "sent") for one in accepted]
    assert {one.attempts for one in found} == {1}
    assert len(provider.got) == len({message.id for message in provider.got}) == MESSAGES
    outage = [line["event"] for line in lines if line["event"].startswith("the provider")]
    assert outage == ["the provider console is away", "the provider console is back"]
    assert "+1500" not in repr(lines)
    assert await letters(link) == []


async def test_a_process_that_hears_of_an_outage_lets_one_message_try(
    link: Link, front: Front, settings: Settings
) -> None:
    """Another one has found out: all would call at once when the wait is over."""
    settings = changed(settings, deliveries={"sms_concurrency": 8})
    at_once, most = 0, 0
    freed = asyncio.Event()

    async def slowly(_: Outgoing) -> Sent:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await freed.wait()
        at_once -= 1
        return Sent("P")

    provider = Scripted(*[slowly] * 8)
    stage = courier(settings, provider)
    accepted = [await accept(front) for _ in range(8)]
    await front.deliveries.hold(
        "console", 3.0
    )  # all eight hear of it, also where the machine stands still for a second
    async with working(settings, [stage]):

        async def others_are_put_off() -> bool:
            return at_once > 0 and await link.call("ZCARD", keys.DELAYED) == 7

        await wait_until(others_are_put_off)
        assert most == 1
        freed.set()
        for one in accepted:
            await until(front.deliveries, one.id, "sent")
    assert stage._patience.failures == 0


async def test_a_long_wait_is_not_waited_for_in_hand(front: Front, settings: Settings) -> None:
    """Who asked for an hour has it, and the stage may be stopped and started meanwhile."""
    provider = Moody(RetryLater("in an hour", code="rate_limited", after_s=3_600.0, charged=False))
    stage = courier(settings, provider)
    async with working(settings, [stage]) as (worker,):
        accepted = [await accept(front) for _ in range(3)]
        await wait_until(lambda: provider.tries > 0 and not worker.workers[0].held)
        await wait_until(lambda: front.deliveries.read(accepted[-1].id))
    assert REGISTRY.get_sample_value("penstock_delivery_held_seconds", {"provider": "console"}) == pytest.approx(
        3_600, abs=600
    )


@pytest.mark.parametrize(
    ("error", "failures"),
    [
        (Reject("no", code="refused"), 0),
        (RetryLater("it is ill", code="gateway_error", after_s=600.0), 0),
        (RetryLater("no answer", code="timeout", after_s=600.0), 1),
    ],
    ids=["refusal", "fault", "silence"],
)
async def test_an_answer_ends_an_outage(front: Front, settings: Settings, error: Exception, failures: int) -> None:
    """The provider works: it is the message that it does not want, or it has a fault of its own."""
    provider = Scripted(error)
    stage = courier(settings, provider)
    stage._patience.held(0.0)
    async with working(settings, [stage]) as (worker,):
        await accept(front)
        await wait_until(lambda: bool(provider.got) and not worker.workers[0].held)
    assert stage._patience.failures == failures


async def test_who_only_waits_is_not_taken_for_the_victim_of_its_message(
    link: Link, front: Front, settings: Settings
) -> None:
    """However often a process dies while a provider is left alone: what it had was put off, and is nobody's."""
    accepted = await accept(front)
    provider = Scripted()
    for _ in range(settings.worker.max_deliveries + 2):
        await front.deliveries.hold("console", 25.0)
        stage = courier(settings, provider)
        async with working(settings, [stage]) as (worker,):
            await link.call("ZADD", keys.DELAYED, "XX", 1, accepted.id)
            await wait_until(lambda: stage._patience.failures > 0 and not worker.workers[0].held)  # noqa: B023
            await worker.crash()
    await link.call("DEL", keys.PROVIDER + "console")
    async with working(settings, [courier(settings, provider)]):
        await link.call("ZADD", keys.DELAYED, "XX", 1, accepted.id)
        found = await until(front.deliveries, accepted.id, "sent", "failed")
    assert (found.status, found.attempts) == ("sent", 1)


async def test_a_doubt_waits_for_nobody(front: Front, settings: Settings) -> None:
    """Nothing is to be handed over, so it is told at once, also while the provider is away."""
    provider = Scripted(never)
    async with working(settings, [courier(settings, provider)]) as (victim,):
        accepted = await accept(front)
        await wait_until(lambda: bool(provider.got))
        await victim.crash()
    await front.deliveries.hold("console", 600.0)
    stage = courier(settings, provider)
    stage._patience.held(600.0)
    async with working(settings, [stage]):
        await until(front.deliveries, accepted.id, "unknown")
    assert len(provider.got) == 1


def test_what_began_before_says_nothing_new() -> None:
    """Of many that failed together one makes the wait longer, and a late success of before does not end the outage."""
    one = Patience("console")
    away = RetryLater("away", code="unreachable", charged=False)
    assert one.put_off(away, 0)
    left_s = one.left_s
    assert not any(one.put_off(away, 0) for _ in range(5))
    assert (one.failures, one.left_s <= left_s) == (1, True)
    one.answered(0)
    assert one.failures == 1
    one.answered(1)
    assert one.failures == 0


# --- stopping -----------------------------------------------------------------------------------


async def test_who_waits_for_its_turn_is_given_back_at_a_stop(link: Link, front: Front, settings: Settings) -> None:
    """Nothing is begun that might be cut off, and nobody waits for a turn that is far away."""
    settings = changed(settings, deliveries={"drain_s": 600.0})
    provider = Scripted()
    provider.per_s = 0.05
    async with working(settings, [courier(settings, provider)]) as (worker,):
        first, second = await accept(front), await accept(front)
        await until(front.deliveries, first.id, "sent")
        await wait_until(lambda: len(worker.workers[0].held) == 1)
    found = await until(front.deliveries, second.id, "pending")
    assert not found.doubt
    await link.call("DEL", keys.PROVIDER + "console")
    async with working(settings, [courier(settings, Scripted())]):
        found = await until(front.deliveries, second.id, "sent")
    assert (statuses(found), found.attempts) == (["pending", "sending", "sent"], 1)


async def test_a_hand_over_is_given_the_time_of_deliveries_to_end(front: Front, settings: Settings) -> None:
    """Other work of the process is stopped long before."""
    settings = changed(settings, worker={"drain_s": 0.0}, deliveries={"drain_s": 600.0})
    answered = asyncio.Event()

    async def slowly(_: Outgoing) -> Sent:
        await answered.wait()
        return Sent("P1")

    provider = Scripted(slowly)
    async with working(settings, [courier(settings, provider)]) as (worker,):
        accepted = await accept(front)
        await wait_until(lambda: bool(provider.got))
        worker.stop()
        await wait_until(lambda: worker.workers[0]._quiet)
        answered.set()
    assert statuses(await until(front.deliveries, accepted.id, "sent")) == ["pending", "sending", "sent"]


async def test_a_stop_does_not_wait_for_a_redis_that_is_away(front: Front, settings: Settings) -> None:
    """The long time is for hand-overs: what has ended only waits to be noted, as in every stage."""
    settings = changed(settings, worker={"drain_s": 0.2}, deliveries={"drain_s": 100_000.0})
    other = Link(settings.redis, "other")

    async def while_redis_stands_still(_: Outgoing) -> Sent:
        await other.call("CLIENT", "PAUSE", 60_000, "WRITE")
        return Sent("P1")

    provider = Scripted(while_redis_stands_still)
    async with working(settings, [courier(settings, provider)]) as (worker,):
        accepted = await accept(front)
        await wait_until(lambda: any(held.settling for held in worker.workers[0].held.values()))
    assert await other.call("HGET", keys.DELIVERY + accepted.id, "status") == b"sending"  # it stands still yet
    await other.call("CLIENT", "UNPAUSE")
    await other.close()


# --- before it is begun -------------------------------------------------------------------------


async def test_what_cannot_be_made_ready_fails_before_it_is_begun(front: Front, settings: Settings) -> None:
    """It was never `sending`, and leaves no doubt; what can be is made ready once, however long it waits."""

    class Careful(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.prepared: list[str] = []

        async def prepare(self, message: Outgoing) -> HandOver:
            if "bad" in message.body:
                raise Reject("it cannot be sent", code="invalid_content")
            self.prepared.append(message.id)
            return partial(self.send, message)

    provider = Careful()
    await front.deliveries.hold("console", 0.2)
    async with working(settings, [Courier("sms", Shared(provider), settings.deliveries)]):
        bad, good = await accept(front, content={"body": "bad"}), await accept(front)
        failed = await until(front.deliveries, bad.id, "failed")
        await until(front.deliveries, good.id, "sent")
    assert statuses(failed) == ["pending", "failed"]
    assert provider.prepared == [message.id for message in provider.got] == [good.id]
