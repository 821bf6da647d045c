"""Large batches: staged portion by portion, committed as a whole, entered in the order given.

Here one of more than three messages is large.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import orjson
import pytest

from pipeline import batches, keys, scripts
from pipeline.accepting import Idempotency
from pipeline.batches import STAGED_FOR_MS, AcceptedBatch, Batches
from pipeline.connection import CommandRefused, Link
from pipeline.errors import Overloaded
from pipeline.front import Front
from pipeline.job import Priority, decode
from pipeline.overview import look
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.redis.test_batches import (
    aggregating,
    all_but_replies,
    assert_all_ended,
    counters,
    events,
    expire,
    is_closed,
    order,
    results,
)
from tests.rig import Hand, assert_nothing_is_left, changed, complete, everything, outcome, retry, working

Before = Callable[[str], Any]


@pytest.fixture(autouse=True)
def portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a large batch be one of more than three."""
    monkeypatch.setattr(batches, "AT_ONCE", 3)


async def promote(link: Link, most: int = 100, *, by: str = "one") -> list[int]:
    """Do what a worker's tick does; return how many jobs were moved and put off, and whether there is more."""
    reply: list[int] = (await link.run(scripts.PROMOTE, (), (most, by, 100)))[1:]
    return reply


async def unstage(link: Link, most: int = 100, *, after_ms: int = STAGED_FOR_MS) -> int:
    """Do what a worker's tick does."""
    return int((await link.run(scripts.UNSTAGE, (), (most, after_ms)))[1])


async def age(link: Link) -> None:
    """Let everything that is staged have rested for long."""
    for name in await link.call("ZRANGE", keys.STAGED, 0, -1):
        await link.call("ZADD", keys.STAGED, "XX", 1, name)


def between(front: Front, monkeypatch: pytest.MonkeyPatch, before: Before) -> None:
    """Do something before each call that accepts: `ask`, `stage`, `staged`."""
    run = front.batches._accepting.run

    async def wrapped(script: scripts.Script, names: Any, args: Any, **more: Any) -> Any:
        await before(str(args[20]) if script is scripts.BATCH else script.name)
        return await run(script, names, args, **more)

    monkeypatch.setattr(front.batches._accepting, "run", wrapped)


async def stage_only(front: Front, count: int, **more: Any) -> None:
    """Stage a batch that is never committed: its gateway dies."""

    async def die(step: str) -> None:
        if step == "staged":
            raise asyncio.CancelledError

    with pytest.MonkeyPatch.context() as patch:
        between(front, patch, die)
        with pytest.raises(asyncio.CancelledError):
            await front.submit_batch(order(count, **more))


async def waiting(link: Link, priority: Priority = "normal") -> list[str]:
    """The jobs on the stream, in order."""
    return [decode(fields[1]).id for _, fields in await link.call("XRANGE", keys.stream("llm", priority), "-", "+")]


async def lists(link: Link, batch_id: str) -> tuple[list[str], list[str]]:
    """The members of a batch, and those whose rows the recorder gets, both as they stand."""
    members = await link.call("LRANGE", keys.BATCH_MEMBERS + batch_id, 0, -1)
    rows = await link.call("LRANGE", keys.ROWS + batch_id, 0, -1)
    return [name.decode() for name in members], [orjson.loads(row)[0] for row in rows]


async def living(link: Link) -> list[str]:
    """The ids of all live records."""
    return sorted(name.decode().removeprefix(keys.LIVE) for name in await link.call("KEYS", keys.LIVE + "*"))


# --- staging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fatal", range(5))
async def test_gateway_killed_at_any_call_leaves_all_of_a_batch_or_nothing(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch, fatal: int, after: bool
) -> None:
    """It asks, stages three portions, commits: what was staged in vain is no job, and is taken away after a minute."""
    run, calls = front.batches._accepting.run, 0

    async def die(*args: Any, **more: Any) -> Any:
        nonlocal calls
        number, calls = calls, calls + 1
        if number != fatal or after:
            reply = await run(*args, **more)
        if number == fatal:
            raise asyncio.CancelledError
        return reply

    monkeypatch.setattr(front.batches._accepting, "run", die)
    with pytest.raises(asyncio.CancelledError):
        await front.submit_batch(order(9))
    monkeypatch.undo()
    is_accepted = fatal == 4 and after
    there = await living(link)
    staged = min(3, max(0, fatal - 1 + after))  # the first call asks, the last commits
    assert len(there) == (9 + 1 if is_accepted else 3 * staged)
    assert await link.call("ZCARD", keys.LIVE_INDEX) == len(there)
    assert await unstage(link) == 0  # its time has not come
    await age(link)
    assert await unstage(link) == (0 if is_accepted else len(there))
    if is_accepted:
        assert await promote(link) == [9, 0, 1]
        return
    for pattern in (keys.BATCH + "*", keys.ROWS + "*", keys.DELAYED, keys.EVENTS):
        assert await link.call("KEYS", pattern) == []
    await assert_nothing_is_left(link)


async def test_staged_message_is_unknown_and_is_never_ended(link: Link, front: Front) -> None:
    """Not even at its deadline: it is no job, and nobody has heard of it."""
    await stage_only(front, 5)
    for message_id in await living(link):
        assert await front.batches.message(message_id, "default") is None
        await link.call("ZADD", keys.LIVE_INDEX, 1, message_id)
    assert await promote(link) == [0, 0, 0]
    await expire(link)
    assert len(await living(link)) == 5
    for pattern in (keys.MESSAGE + "*", keys.COMPLETION + "*", keys.EVENTS):
        assert await link.call("KEYS", pattern) == []
    await age(link)
    assert await unstage(link) == 5
    await assert_nothing_is_left(link)


async def test_staging_is_taken_away_from_its_end_portion_by_portion(link: Link, front: Front) -> None:
    """Whatever is left is the beginning of it, and an index of just that."""
    await stage_only(front, 8)
    (batch_id,) = [name.decode() for name in await link.call("ZRANGE", keys.STAGED, 0, -1)]
    members, rows = await lists(link, batch_id)
    assert members == rows
    await age(link)
    for left in (5, 2, 0):
        assert await unstage(link, 3) == (3 if left else 2)
        assert await lists(link, batch_id) == (members[:left], members[:left])
        assert await living(link) == sorted(members[:left])
        assert await link.call("ZCARD", keys.LIVE_INDEX) == left
    assert await unstage(link, 3) == 0
    await assert_nothing_is_left(link)


@pytest.mark.parametrize("taken", [1, 4, 8])
async def test_batch_whose_staging_is_being_taken_away_is_staged_on(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """The commit finds that members are missing and changes nothing; then all of it is there, in order, once."""
    commits = 0

    async def take_away(step: str) -> None:
        nonlocal commits
        commits += step == "staged"
        if step == "staged" and commits == 1:
            await age(link)
            assert await unstage(link, taken) == taken

    between(front, monkeypatch, take_away)
    accepted = await front.submit_batch(order(8))
    assert commits == 2
    assert await lists(link, accepted.batch_id) == (accepted.message_ids, accepted.message_ids)
    assert await living(link) == sorted([accepted.batch_id, *accepted.message_ids])
    assert await unstage(link, after_ms=-1) == 0
    await promote(link)
    assert await waiting(link) == accepted.message_ids


async def test_portion_whose_predecessors_are_gone_is_not_staged(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway was away for a minute; it begins anew, and no member is left out or out of order."""
    stages = 0

    async def take_away(step: str) -> None:
        nonlocal stages
        stages += step == "stage"
        if step == "stage" and stages == 3:
            await age(link)
            assert await unstage(link, 4) == 4

    between(front, monkeypatch, take_away)
    accepted = await front.submit_batch(order(8))
    assert stages == 6
    assert await lists(link, accepted.batch_id) == (accepted.message_ids, accepted.message_ids)


async def test_portion_that_arrives_after_the_commit_changes_nothing(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lay in the buffer of a connection that nobody listens to any more."""
    run, staged = front.batches._accepting.run, []

    async def note(script: scripts.Script, names: Any, args: Any, **more: Any) -> Any:
        if script is scripts.STAGE:
            staged.append(args)
        return await run(script, names, args, **more)

    monkeypatch.setattr(front.batches._accepting, "run", note)
    await front.submit_batch(order(5))
    before = await all_but_replies(link)
    for args in staged:
        assert (await link.run(scripts.STAGE, (), args))[1] == b"late"
    assert await all_but_replies(link) == before


@pytest.mark.parametrize("step", ["stage", "staged"])
@pytest.mark.parametrize(
    "name", [keys.STAGED, keys.ENTERING, keys.BATCH_MEMBERS, keys.ROWS, keys.LIVE_INDEX, keys.EVENTS]
)
async def test_key_of_a_wrong_type_refuses_a_large_batch_before_anything_is_written(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    """By the commit, or by the portion that would have been staged."""
    plans: list[batches._Plan] = []
    plan, steps = batches._Plan, 0

    def noted(*args: Any) -> batches._Plan:
        plans.append(plan(*args))
        return plans[-1]

    async def spoil(reached: str) -> None:
        nonlocal steps
        if reached != step:
            return
        steps += 1
        key = name + plans[0].batch_id if name in {keys.BATCH_MEMBERS, keys.ROWS} else name
        if steps == 1:
            await link.call("SET", key, "a string", "PX", 60_000)
        if name in {keys.ENTERING, keys.EVENTS} and step == "stage":  # it has no use for these
            await link.call("DEL", key)
        before.append(await everything(link))

    before: list[dict[bytes, bytes]] = []
    monkeypatch.setattr(batches, "_Plan", noted)
    between(front, monkeypatch, spoil)
    if name in {keys.ENTERING, keys.EVENTS} and step == "stage":
        await front.submit_batch(order(5))
        return
    with pytest.raises(CommandRefused):
        await front.submit_batch(order(5))
    assert await everything(link) == before[0]
    for key in await link.call("KEYS", "*"):  # nothing is left that would go after a minute only
        await link.call("PEXPIRE", key, 60_000)


# --- admission ------------------------------------------------------------------------------------


async def test_of_two_batches_that_do_not_fit_together_one_is_accepted(
    link: Link, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were free to begin, and both are staged when the first of them is committed."""
    settings = changed(settings, admission={"max_jobs": 10})
    together = {step: asyncio.Barrier(2) for step in ("stage", "staged")}
    async with Front(settings, "one") as one, Front(settings, "other") as other:
        for front in (one, other):
            passed: set[str] = set()

            async def meet(step: str, passed: set[str] = passed) -> None:
                if step in together and step not in passed:
                    passed.add(step)
                    await together[step].wait()

            between(front, monkeypatch, meet)
        answers = await asyncio.gather(one.submit_batch(order(8)), other.submit_batch(order(8)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {AcceptedBatch, Overloaded}
    assert await unstage(link) == 8  # what was staged in vain need not rest for a minute
    assert await link.call("ZCARD", keys.LIVE_INDEX) == 9


async def test_what_others_stage_counts_before_a_batch_is_staged(link: Link, settings: Settings) -> None:
    """Memory is bounded; a question is refused, too. When it is taken away there is room again."""
    settings = changed(settings, admission={"max_jobs": 10})
    async with Front(settings, "one") as front:
        await stage_only(front, 8)
        for count in (2, 8):
            with pytest.raises(Overloaded):
                await front.submit_batch(order(count))
        assert await link.call("ZCARD", keys.LIVE_INDEX) == 8
        await age(link)
        assert await unstage(link) == 8
        await front.submit_batch(order(8))
        with pytest.raises(Overloaded):
            await front.submit_batch(order(1))  # none of them has entered yet


async def test_limit_reached_while_a_batch_is_staged_refuses_it(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was free when it was asked is checked again by the commit; what was staged goes at once."""

    async def others_come(step: str) -> None:
        if step == "stage":
            await link.call("SADD", keys.IN_FLIGHT + "default", "one", "two")

    between(front, monkeypatch, others_come)
    with pytest.raises(Overloaded) as caught:
        await front.submit_batch(order(8), in_flight_limit=2)
    assert caught.value.code == "too_many_in_flight"
    await link.call("DEL", keys.IN_FLIGHT + "default")
    assert await unstage(link) == 8
    assert await link.call("KEYS", keys.BATCH + "*") == []
    await assert_nothing_is_left(link)


async def test_same_key_at_the_same_time_is_one_large_batch(link: Link, settings: Settings, front: Front) -> None:
    """What the other gateways have staged goes at once."""
    key = Idempotency("k", "body")
    async with Front(settings, "other") as other:
        found = await asyncio.gather(*(one.submit_batch(order(7), idempotency=key) for one in (front, other)))
    assert found[0].batch_id == found[1].batch_id
    assert list(found[0].message_ids) == list(found[1].message_ids)
    await unstage(link)
    assert await link.call("ZCARD", keys.LIVE_INDEX) == 8


# --- entering -------------------------------------------------------------------------------------


async def test_members_enter_in_portions_in_the_order_given(link: Link, front: Front, settings: Settings) -> None:
    """One batch after the other; until then each is pending, and counted as delayed."""
    first = await front.submit_batch(order(5))
    second = await front.submit_batch(order(4))
    message = await front.batches.message(first.message_ids[4], "default")
    assert message is not None
    assert message["status"] == "pending"
    everyone = [*first.message_ids, *second.message_ids]
    if await link.call("ZRANGE", keys.ENTERING, 0, 0) == [second.batch_id.encode()]:  # both in one millisecond
        everyone = [*second.message_ids, *first.message_ids]
    assert (await look(link)).delayed == 9 + 2
    entered = 0
    while entered < 9:
        moved, _, more = await promote(link, 2)
        assert more == 1
        entered += moved
        assert await waiting(link) == everyone[:entered]
        assert (await look(link)).delayed == 9 - entered + 2
    while (await promote(link, 2))[2]:
        pass
    assert await waiting(link) == everyone
    assert await link.call("EXISTS", keys.ENTERING) == 0
    assert not {"entered", "due_ms"} & (await counters(link, first.batch_id)).keys()
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        await owner.settle(*(complete(entry) for entry in await owner.take()))
        await wait_until(lambda: is_closed(link, first.batch_id))
        await wait_until(lambda: is_closed(link, second.batch_id))
    assert [row["message_id"] for row in (await results(link, first.batch_id))["results"]] == first.message_ids
    await assert_all_ended(link)


async def test_member_on_its_stream_does_not_enter_again(link: Link, front: Front) -> None:
    """Should the mark how far they have come ever stand behind them."""
    accepted = await front.submit_batch(order(5))
    assert (await promote(link, 3))[0] == 3
    await link.call("HSET", keys.BATCH + accepted.batch_id, "entered", 1)
    assert (await promote(link))[0] == 2
    assert await waiting(link) == accepted.message_ids


async def test_one_worker_does_all_of_it_as_long_as_it_goes_on(link: Link, front: Front) -> None:
    """Others come in between for nothing; when it has been silent for long, one of them goes on."""
    await front.submit_batch(order(8))
    assert await promote(link, 3) == [3, 0, 1]
    assert await promote(link, 3, by="other") == [0, 0, 0]
    assert 0 < await link.call("PTTL", keys.PROMOTING) <= 100
    assert await promote(link, 3) == [3, 0, 1]
    await link.call("DEL", keys.PROMOTING)
    assert await promote(link, 3, by="other") == [2, 0, 1]
    assert await promote(link, 3, by="one") == [0, 0, 0]


async def test_delayed_job_comes_before_the_members_of_a_batch(link: Link, front: Front, settings: Settings) -> None:
    """A retry that is due does not wait until all of them have entered."""
    early = await front.submit_batch(order(1))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(retry(await owner.take_one(), delay_ms=0))
    accepted = await front.submit_batch(order(4))
    assert await promote(link, 2) == [2, 0, 1]
    assert await waiting(link) == [early.message_ids[0], accepted.message_ids[0]]


async def test_scheduled_members_enter_among_the_delayed(link: Link, front: Front) -> None:
    """On no stream before they are due; when that is can be read before they have entered, too."""
    due_ms = front.clock.now_ms() + 3_600_000
    accepted = await front.submit_batch(order(5, due_ms=due_ms))
    for _ in range(2):
        standing = await front.standing(accepted.message_ids[-1], "default")
        assert standing is not None
        assert (standing.where, standing.due_ms) == ("queued", due_ms)
        assert await promote(link) in ([0, 0, 1], [0, 0, 0])
        assert await waiting(link) == []
    scores = await link.call("ZRANGE", keys.DELAYED, 0, -1, "WITHSCORES")
    found = [name.decode() for name in scores[::2]]
    assert found == [*accepted.message_ids, accepted.batch_id]
    assert all(0 <= float(score) - due_ms < 1 for score in scores[1:-2:2])
    for score, message_id in enumerate(accepted.message_ids, 1):
        assert int(await link.call("ZSCORE", keys.LIVE_INDEX, message_id)) == due_ms + 86_400_000
        await link.call("ZADD", keys.DELAYED, "XX", score, message_id)
    assert (await promote(link))[0] == 5
    assert await waiting(link) == accepted.message_ids


async def test_member_that_ended_before_it_entered_never_enters(link: Link, settings: Settings, front: Front) -> None:
    """Cancelled, or over: it is counted, and the others are worked on."""
    accepted = await front.submit_batch(order(6))
    cancelled, over = accepted.message_ids[0], accepted.message_ids[4]
    assert await front.cancel(cancelled, "default") == "cancelled"
    await link.call("ZADD", keys.LIVE_INDEX, "XX", 1, over)
    await expire(link)
    while (await promote(link, 2))[2]:
        pass
    others = [name for name in accepted.message_ids if name not in {cancelled, over}]
    assert await waiting(link) == others
    async with aggregating(settings), Hand(settings, "owner", "llm") as owner:
        await owner.settle(*(complete(entry) for entry in await owner.take()))
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    statuses = [row["status"] for row in (await results(link, accepted.batch_id))["results"]]
    assert statuses == ["cancelled", *["completed"] * 3, "expired", "completed"]
    await assert_all_ended(link)


@pytest.mark.parametrize("entered", [0, 2])
async def test_batch_cancelled_before_it_entered_closes(
    link: Link, settings: Settings, front: Front, entered: int
) -> None:
    """Its members are cancelled where they are, and none of them is worked on."""
    accepted = await front.submit_batch(order(5))
    if entered:
        await promote(link, entered)
    assert await front.cancel(accepted.batch_id, "default") == "cancelling"
    async with aggregating(settings):
        await wait_until(lambda: is_closed(link, accepted.batch_id))
        await wait_until(lambda: _has_entered(link))
    assert await waiting(link) == []
    assert (await counters(link, accepted.batch_id))["status"] == "cancelled"
    found = [await outcome(link, message_id) for message_id in accepted.message_ids]
    assert [one.status for one in found if one] == ["cancelled"] * 5
    await assert_all_ended(link)


async def _has_entered(link: Link) -> bool:
    return not await link.call("EXISTS", keys.ENTERING)


async def _is_tidy(link: Link) -> bool:
    return not await link.call("EXISTS", keys.STAGED)


async def test_batch_whose_deadline_passes_before_it_enters_closes_with_all_of_it_expired(
    link: Link, settings: Settings, front: Front
) -> None:
    """Nobody promoted for a day; whoever comes first expires them, and nothing enters."""
    accepted = await front.submit_batch(order(5))
    for message_id in accepted.message_ids:
        await link.call("ZADD", keys.LIVE_INDEX, "XX", 1, message_id)
    await expire(link)
    assert (await promote(link))[0] == 1  # the batch's own job
    async with aggregating(settings):
        await wait_until(lambda: is_closed(link, accepted.batch_id))
    assert {row["status"] for row in (await results(link, accepted.batch_id))["results"]} == {"expired"}
    await assert_all_ended(link)


async def test_no_member_is_lost_while_it_has_not_entered(link: Link, settings: Settings, front: Front) -> None:
    """An aggregator that comes too early finds them waiting, and is put off."""
    accepted = await front.submit_batch(order(5))
    portion = await front.batches.gather(accepted.batch_id, 0, 10, close=True)
    assert portion is not None
    assert portion.lost == 0
    assert {member.state for member in portion.members} == {"queued"}


async def test_workers_let_a_batch_enter_and_take_away_what_was_never_committed(
    link: Link, settings: Settings, front: Front
) -> None:
    """By their ticks, several of them at the same time; each member once."""
    await stage_only(front, 5)
    await age(link)
    accepted = await front.submit_batch(order(200))
    async with aggregating(settings), aggregating(settings), working(settings, []):
        await wait_until(lambda: _has_entered(link))
        await wait_until(lambda: _is_tidy(link))
        assert await waiting(link, "low") == accepted.message_ids
    assert len(await living(link)) == 201
    assert len(await events(link)) == 1


@pytest.mark.parametrize("key", ["stream", "batch", "members"])
async def test_batch_that_cannot_enter_is_put_off_and_others_pass(link: Link, front: Front, key: str) -> None:
    """A key is of a wrong type; when somebody has mended it, the batch enters."""
    accepted = await front.submit_batch(order(5))
    name = {
        "stream": keys.stream("llm"),
        "batch": keys.BATCH + accepted.batch_id,
        "members": keys.BATCH_MEMBERS + accepted.batch_id,
    }[key]
    if key != "stream":
        await link.call("RENAME", name, "aside")
        await link.call("PEXPIRE", "aside", 60_000)
    await link.call("SET", name, "a string", "PX", 60_000)
    assert await promote(link) == [0, 1, 1]
    other = await front.submit_batch(order(4, retrieve=True))
    assert await promote(link) == [4, 0, 1]
    assert await link.call("XLEN", keys.stream("encoder")) == len(other.message_ids)
    await link.call("DEL", name)
    if key != "stream":
        await link.call("RENAME", "aside", name)
        await link.call("PERSIST", name)
    await link.call("ZADD", keys.ENTERING, "XX", 1, accepted.batch_id)
    assert await promote(link) == [5, 0, 1]
    assert await waiting(link) == accepted.message_ids


async def test_batch_whose_record_is_gone_does_not_enter(link: Link, front: Front) -> None:
    """Somebody deleted it by hand: nothing makes a hash of it anew that would stay for ever."""
    accepted = await front.submit_batch(order(5))
    await link.call("DEL", keys.BATCH + accepted.batch_id)
    assert await promote(link) == [0, 0, 1]
    assert await link.call("EXISTS", keys.BATCH + accepted.batch_id, keys.ENTERING) == 0


async def test_members_keep_their_order_when_their_time_comes_while_they_enter(link: Link, front: Front) -> None:
    """Those ahead are among the delayed, each due a thousandth of a millisecond after the one before."""
    for _ in range(20):  # it takes a portion in the very millisecond for which they are scheduled
        due_ms = await link.time_us() // 1000 + 30
        accepted = await front.submit_batch(order(8, due_ms=due_ms))
        await promote(link, 3)
        while await link.time_us() // 1000 < due_ms:
            pass
        while (await promote(link, 3))[2] or await link.call("ZCARD", keys.DELAYED) > 1:
            pass
        assert await waiting(link) == accepted.message_ids
        await link.call("FLUSHALL")


async def test_retry_does_not_wait_until_all_that_came_before_it_have_begun(
    link: Link, front: Front, settings: Settings
) -> None:
    """A scheduled batch is due at once; its members keep their order all the same."""
    early = await front.submit_batch(order(1))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(retry(await owner.take_one(), delay_ms=0))
    await link.call("HSET", keys.LIVE + early.message_ids[0], "record", "query")  # as a question's
    accepted = await front.submit_batch(order(8, due_ms=front.clock.now_ms() + 3_600_000))
    while (await promote(link, 4))[2]:
        pass
    for number, message_id in enumerate(accepted.message_ids, 1):
        await link.call("ZADD", keys.DELAYED, "XX", number, message_id)
    await link.call("ZADD", keys.DELAYED, front.clock.now_ms() - 1, early.message_ids[0])
    await link.call("HSET", keys.LIVE + early.message_ids[0], "entry", "", "body", "x")
    await promote(link, 4)
    assert await link.call("ZSCORE", keys.DELAYED, early.message_ids[0]) is None
    assert await link.call("ZCARD", keys.DELAYED) == 5 + 2
    await link.call("FLUSHALL")


async def test_retries_go_on_while_nothing_can_enter(link: Link, front: Front, settings: Settings) -> None:
    """The index of batches that enter is of a wrong type."""
    await front.submit_batch(order(1))
    async with Hand(settings, "owner", "llm") as owner:
        await owner.settle(retry(await owner.take_one(), delay_ms=0))
    await link.call("SET", keys.ENTERING, "a string", "PX", 60_000)
    assert await promote(link) == [1, 0, 0]
    await link.call("FLUSHALL")


async def test_another_staging_of_a_wrong_type_refuses_nobody(link: Link, front: Front) -> None:
    await stage_only(front, 5)
    (batch_id,) = [name.decode() for name in await link.call("ZRANGE", keys.STAGED, 0, -1)]
    await link.call("SET", keys.BATCH_MEMBERS + batch_id, "a string", "PX", 60_000)
    await front.submit_batch(order(5))
    await link.call("FLUSHALL")


async def test_large_batches_are_staged_one_after_the_other(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By turns, portion by portion, many at once would all be late."""
    staged: list[str] = []
    stage = Batches._stage

    async def note(self: Batches, plan: Any, first: int, portion: Sequence[Any]) -> bytes:
        staged.append(plan.batch_id)
        return await stage(self, plan, first, portion)

    monkeypatch.setattr(Batches, "_stage", note)
    found = await asyncio.gather(*(front.submit_batch(order(12)) for _ in range(4)))
    assert [batch_id for batch_id, _ in groupby(staged)] == [one.batch_id for one in found]
    assert len(staged) > len(found)
    await link.call("FLUSHALL")


async def test_batch_that_finds_memory_full_half_way_leaves_nothing(
    link: Link, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a minute: whoever comes next would be refused for it."""
    stages = 0

    async def fill(step: str) -> None:
        nonlocal stages
        stages += step == "stage"
        if stages == 2:
            await link.call("CONFIG", "SET", "maxmemory", 1)

    between(front, monkeypatch, fill)
    try:
        with pytest.raises(Overloaded):
            await front.submit_batch(order(8))
        while await unstage(link):
            pass
    finally:
        await link.call("CONFIG", "SET", "maxmemory", 0)
    await assert_nothing_is_left(link)


async def test_keys_of_a_wrong_type_stop_nobody_else(link: Link, front: Front, settings: Settings) -> None:
    """A delayed job whose record is none is put off, and `status` shows the rest where a batch is none."""
    first, second = await front.submit_batch(order(1)), await front.submit_batch(order(1))
    async with Hand(settings, "owner", "llm") as owner:
        for _ in range(2):
            await owner.settle(retry(await owner.take_one(), delay_ms=0))
    await link.call("SET", keys.LIVE + first.message_ids[0], "a string", "PX", 60_000)
    assert await promote(link) == [1, 1, 0]
    assert await waiting(link) == second.message_ids
    await link.call("ZADD", keys.ENTERING, 1, "b1")
    await link.call("SET", keys.BATCH + "b1", "a string", "PX", 60_000)
    assert (await look(link)).delayed == 3  # the one put off, and the two batches' own jobs
    await link.call("FLUSHALL")
