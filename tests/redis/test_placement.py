"""Placement: each llm job starts in a free slot of a replica, counted over all workers, and the load told is true."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing, suppress
from random import Random

import pytest

from pipeline import keys, metrics
from pipeline.balancing import Replica
from pipeline.connection import Link
from pipeline.errors import BrokerUnavailable, JobLost, RetryLater
from pipeline.front import Front
from pipeline.job import Completion, Done, Job
from pipeline.settings import Settings
from pipeline.worker import Worker
from tests.conftest import PATIENCE_S, wait_until
from tests.rig import (
    FIRST,
    LIFE_S,
    REPLICAS,
    SECOND,
    Gate,
    Hand,
    Scripted,
    ask,
    assert_nothing_is_left,
    changed,
    complete,
    echo,
    everything,
    prompt,
    query,
    still,
    working,
)

LOADS = """
local answer = {}
for i, url in ipairs(ARGV) do
  answer[i] = {redis.call('GET', KEYS[1] .. url) or '0', redis.call('ZCARD', KEYS[2] .. url)}
end
return answer
"""


def with_replicas(settings: Settings, **fields: object) -> Settings:
    return changed(settings, llm={"urls": REPLICAS, "slots": 4, **fields})


async def loads(link: Link) -> dict[str, tuple[int, int]]:
    """Return load string and live leases of each replica, as they stand in one instant."""
    rows = await link.call("EVAL", LOADS, 2, keys.LOAD, keys.LEASES, *REPLICAS)
    return {url: (int(load), int(leases)) for url, (load, leases) in zip(REPLICAS, rows, strict=True)}


class Calls:
    """Stands for the replicas: counts the calls that run at each, and how many ran there in all."""

    def __init__(self, spans_s: Mapping[str, float] | None = None) -> None:
        self.running: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.total: Counter[str] = Counter()
        self._spans_s = spans_s or {}

    async def __call__(self, job: Job) -> Done:
        url = job.replica
        assert url is not None
        self.running[url] += 1
        self.total[url] += 1
        self.peak[url] = max(self.peak[url], self.running[url])
        try:
            await asyncio.sleep(self._spans_s.get(url, 0.005))
        finally:
            self.running[url] -= 1
        return Done({"answer": url})


async def test_slots_are_never_exceeded_over_two_workers(link: Link, settings: Settings, front: Front) -> None:
    """Three replicas with four slots each; two workers with room for many more."""
    calls = Calls()
    stages = [Scripted("llm", calls, slots=32, placed=True) for _ in range(2)]
    async with working(with_replicas(settings), stages):
        found = await asyncio.gather(*(ask(front, prompt(front)) for _ in range(150)))
        assert {completion.status for completion in found} == {"completed"}
        assert all(stage.seen for stage in stages)
        assert set(calls.peak) == set(REPLICAS)
        assert max(calls.peak.values()) == 4
    await assert_nothing_is_left(link)


async def test_equal_replicas_get_equal_shares(link: Link, settings: Settings, front: Front) -> None:
    """Within a quarter, over 150 jobs."""
    calls = Calls()
    async with working(with_replicas(settings), [Scripted("llm", calls, slots=32, placed=True)]):
        await asyncio.gather(*(ask(front, query(front, route=["llm"])) for _ in range(150)))
        assert all(37 <= calls.total[url] <= 63 for url in REPLICAS), calls.total


async def test_load_is_true_at_every_moment(link: Link, settings: Settings, front: Front) -> None:
    """Through failures, retries, moves, cancels, expiries and a crash; 0 and empty afterwards."""
    rng = Random(7)
    stages: list[Scripted] = []

    async def handle(job: Job) -> Done:
        await asyncio.sleep(rng.uniform(0, 0.01))
        match rng.randrange(6):
            case 0:
                raise RetryLater("busy", code="busy", charged=False, after_s=0.01)
            case 1:
                raise RuntimeError("broken")
            case 2:
                job.avoid.append(job.replica or "")
                stage = next(s for s in stages if s.context.worker and job.id in {seen.id for seen in s.seen})
                if await stage.context.replicas.move(job) is None:
                    raise RetryLater("no other", code="no_replica", charged=False, after_s=0.01)
                await asyncio.sleep(rng.uniform(0, 0.01))
        return Done({"answer": "fine"})

    stages += [Scripted("llm", handle, slots=16, placed=True) for _ in range(2)]
    settings = changed(with_replicas(settings), worker={"lease_s": 0.5}, retry={"max_retries": 2})
    looks = 0
    most = 0

    async def look() -> None:
        nonlocal looks, most
        while True:
            for url, (load, leases) in (await loads(link)).items():
                assert load == leases, url
                most = max(most, load)
            looks += 1
            await asyncio.sleep(rng.uniform(0, 0.004))

    async def one(number: int) -> str:
        job = query(front, route=["llm"], lifetime_s=0.05 if number % 20 == 0 else LIFE_S)
        try:
            with suppress(BrokerUnavailable):  # a busy machine may take longer than a client is kept waiting
                await front.submit(job)
                if number % 7 == 0:
                    await asyncio.sleep(rng.uniform(0, 0.02))
                    await front.cancel(job.id, job.tenant)
            return (await front.wait(job.id, job.tenant, job.deadline_ms)).status
        except JobLost:
            return "refused"

    async with working(settings, stages) as consumers:
        await wait_until(lambda: link.call("EXISTS", keys.REPLICAS))
        await front._refresh()
        watcher = asyncio.create_task(look())
        asking = [asyncio.create_task(one(number)) for number in range(250)]
        await wait_until(lambda: sum(len(stage.seen) for stage in stages) > 60)
        await consumers[0].crash()
        statuses = Counter(await asyncio.gather(*asking))
        await wait_until(lambda: looks >= 200)
        assert not watcher.done()
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        assert most > 10
        assert {"completed", "cancelled"} <= set(statuses)
    await assert_nothing_is_left(link)


async def test_taking_without_a_free_slot_takes_nothing(link: Link, settings: Settings, front: Front) -> None:
    """The stream is the waiting room: a job that cannot start stays there, and is not delivered."""
    replicas = [Replica(FIRST, slots=1), Replica(SECOND, slots=1)]
    async with Hand(settings, "a", "llm", placed=True) as one, Hand(settings, "b", "llm", placed=True) as two:
        for _ in range(5):
            await front.submit(prompt(front))
        placed = await one.streams.place(replicas, [[FIRST, SECOND]] * 4)
        assert [entry.replica for entry in placed.entries] == [FIRST, SECOND]
        assert placed.waiting == 3
        again = await two.streams.place(replicas, [[FIRST, SECOND]] * 4)
        assert (again.entries, again.waiting) == ([], 3)
        assert [standing.running for standing in again.standings] == [1, 1]
        await one.settle(complete(placed.entries[0]))
        (entry,) = (await two.streams.place(replicas, [[SECOND, FIRST]] * 4)).entries
        assert entry.replica == FIRST
        assert await two.settle(complete(entry)) == ["settled"]


async def test_late_placement_moves_the_lease_of_the_submit(link: Link, settings: Settings, front: Front) -> None:
    """The job holds one lease at every moment: the old one goes with the new one."""
    await link.call("HSET", keys.REPLICAS, FIRST, b'{"slots":1,"seen_ms":99999999999999}')
    await front._refresh()
    async with Hand(settings, "a", "llm", placed=True) as owner:
        await front.submit(query(front, route=["llm"]))
        assert (await loads(link))[FIRST] == (1, 1)
        (entry,) = (await owner.streams.place([Replica(SECOND, slots=1)], [[SECOND]])).entries
        found = await loads(link)
        assert (found[FIRST], found[SECOND]) == ((0, 0), (1, 1))
        await owner.settle(complete(entry))


async def test_only_the_owner_moves_a_job(link: Link, settings: Settings, front: Front) -> None:
    """A zombie that thaws in the middle of its call changes neither lease nor place."""
    async with (
        Hand(settings, "owner", "llm", placed=True) as owner,
        Hand(settings, "stranger", "llm", placed=True) as stranger,
    ):
        job = prompt(front)
        await front.submit(job)
        (entry,) = (await owner.streams.place([Replica(FIRST, slots=1)], [[FIRST]])).entries
        before = await everything(link)
        assert await stranger.streams.move(entry, job.id, [Replica(SECOND, slots=1)]) == "lost"
        assert await everything(link) == before
        assert await owner.streams.move(entry, job.id, [Replica(SECOND, slots=1)]) == SECOND
        found = await loads(link)
        assert (found[FIRST], found[SECOND]) == ((0, 0), (1, 1))
        assert await link.call("EXISTS", keys.RUNNING + FIRST) == 0
        assert await owner.streams.move(entry, job.id, []) == "none"
        assert await link.call("HEXISTS", keys.LIVE + job.id, "lease") == 0
        assert (await loads(link))[SECOND] == (0, 0)


async def test_breaker_opens_lets_one_probe_through_and_closes(link: Link, settings: Settings, front: Front) -> None:
    """A replica that refuses connections gets no calls, then one, then its share again."""
    is_up = False
    calls = Calls()
    probes: list[int] = []

    async def handle(job: Job) -> Done:
        if job.replica == FIRST:
            probes.append(calls.running[FIRST] + 1)
            if not is_up:
                stage.context.replicas.observe(FIRST, ok=False, refused=True)
                raise RetryLater("connection refused", code="refused", charged=False, after_s=0.001)
        done = await calls(job)
        stage.context.replicas.observe(job.replica or "", ok=True, duration_s=0.005, tokens=5)
        return done

    stage = Scripted("llm", handle, slots=8, placed=True)
    settings = changed(settings, llm={"urls": (FIRST, SECOND), "slots": 4, "breaker_open_s": 0.3})
    async with working(settings, [stage]):
        await asyncio.gather(*(ask(front, prompt(front)) for _ in range(20)))
        assert calls.total[FIRST] == 0
        tried = len(probes)
        assert 1 <= tried <= 4  # what was in hand when it opened
        await wait_until(lambda: _asked_once_more(front, probes, tried))
        assert probes[tried:] == [1]  # half open: one probe, which fails
        is_up = True
        await wait_until(lambda: _asked_once_more(front, probes, tried + 1))
        assert probes[tried + 1] == 1
        health = await link.call("HMGET", keys.HEALTH + FIRST, "failures", "open_until_ms")
        await wait_until(lambda: _is_closed(link))
        assert health is not None
        before = calls.total[FIRST]
        await asyncio.gather(*(ask(front, prompt(front)) for _ in range(40)))
        assert calls.total[FIRST] - before >= 10
        assert calls.peak[FIRST] > 1
    await assert_nothing_is_left(link)


async def _asked_once_more(front: Front, probes: list[int], tried: int) -> bool:
    """Keep some work coming, a wave of four at a time, so that a half-open replica could take too many."""
    await asyncio.gather(*(ask(front, prompt(front)) for _ in range(4)))
    return len(probes) > tried


async def _is_closed(link: Link) -> bool:
    return bool(await link.call("HGET", keys.HEALTH + FIRST, "open_until_ms") == b"0")


async def test_slow_replica_gets_a_smaller_share(link: Link, settings: Settings, front: Front) -> None:
    """Ten times slower than the others: once that is known it gets less than a sixth of the work."""
    calls = Calls({FIRST: 0.1, SECOND: 0.01, REPLICAS[2]: 0.01})

    async def handle(job: Job) -> Done:
        done = await calls(job)
        spans = {FIRST: 0.1, SECOND: 0.01, REPLICAS[2]: 0.01}
        stage.context.replicas.observe(job.replica or "", ok=True, duration_s=spans[job.replica or ""], tokens=10)
        return done

    stage = Scripted("llm", handle, slots=32, placed=True)
    async with working(with_replicas(settings), [stage]):
        await asyncio.gather(*(ask(front, prompt(front)) for _ in range(30)))
        calls.total.clear()
        await asyncio.gather(*(ask(front, prompt(front)) for _ in range(120)))
        assert calls.total[FIRST] < 20, calls.total


async def test_work_flows_when_no_wake_up_is_heard(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel is a hint; a slow poll stands behind it."""
    monkeypatch.setattr(Worker, "wake", lambda self: None)
    calls = Calls()
    settings = changed(settings, llm={"urls": (FIRST,), "slots": 2})
    async with working(settings, [Scripted("llm", calls, slots=2, placed=True)]):
        found: list[Completion] = await asyncio.gather(*(ask(front, prompt(front)) for _ in range(4)))
        assert {completion.status for completion in found} == {"completed"}


async def test_freed_slot_wakes_the_other_worker(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the slow poll: it is made too slow to help."""
    monkeypatch.setattr("pipeline.worker.WAKE_POLL_S", 30.0)
    gate = Gate()
    settings = changed(settings, llm={"urls": (FIRST,), "slots": 1})
    stages = [Scripted("llm", gate, slots=4, placed=True) for _ in range(2)]
    async with working(settings, stages):
        jobs = [prompt(front) for _ in range(2)]
        for job in jobs:
            await front.submit(job)
        await wait_until(lambda: gate.waiting)
        assert len(gate.waiting) == 1
        gate.open()
        async with asyncio.timeout(5):
            for job in jobs:
                await front.wait(job.id, job.tenant, job.deadline_ms)


async def test_freed_slot_is_told_only_while_an_entry_waits(link: Link, settings: Settings, front: Front) -> None:
    """Else every worker would look in vain after each call."""
    heard: list[bytes] = []

    async def listen() -> None:
        async with aclosing(Link(settings.redis, "ear").subscribe(keys.WAKE_CHANNEL)) as messages:
            async for _, message in messages:
                heard.append(message or b"wake")
                if message == b"end":
                    return

    async with Hand(settings, "a", "llm", placed=True) as hand:
        for _ in range(2):
            await front.submit(prompt(front))
        first, last = [
            await hand.streams.place([Replica(FIRST, slots=1)], [[FIRST]]),
            await hand.streams.place([Replica(SECOND, slots=1)], [[SECOND]]),
        ]
        await front.submit(prompt(front))
        listening = asyncio.create_task(listen())
        await wait_until(lambda: heard)
        heard.clear()
        await hand.settle(complete(first.entries[0]))
        await wait_until(lambda: heard)
        assert heard == [b"wake"]
        third = await hand.streams.place([Replica(FIRST, slots=1)], [[FIRST]])
        for placed in (last, third):
            await hand.settle(complete(placed.entries[0]))
        await link.call("PUBLISH", keys.WAKE_CHANNEL, "end")
        await listening
        assert heard == [b"wake", b"end"]


async def test_wake_ups_are_heard_by_those_who_place_only(link: Link, settings: Settings) -> None:
    """One is said for each question: a dozen other processes would be woken for nothing."""
    stages = [Scripted("encoder", Gate()), Scripted("llm", Gate(), placed=True), Scripted("chat", Gate())]

    async def listeners(channel: str) -> int:
        return int((await link.call("PUBSUB", "NUMSUB", channel))[1])

    async def all_listen() -> bool:
        return await listeners(keys.CANCEL_CHANNEL) == len(stages)

    async with working(settings, stages):
        await wait_until(all_listen)
        assert await listeners(keys.WAKE_CHANNEL) == 1


async def test_foreign_running_place_is_respected(link: Link, settings: Settings, front: Front) -> None:
    """Another llm process may run calls at the same replica."""
    async with Hand(settings, "a", "llm", placed=True) as owner:
        await front.submit(prompt(front))
        await link.call("ZADD", keys.RUNNING + FIRST, 1, "elsewhere")
        assert (await owner.streams.place([Replica(FIRST, slots=1)], [[FIRST]])).entries == []
        await link.call("ZREM", keys.RUNNING + FIRST, "elsewhere")
        assert len((await owner.streams.place([Replica(FIRST, slots=1)], [[FIRST]])).entries) == 1


@pytest.mark.parametrize(("open_for_ms", "running", "taken"), [(60_000, 0, 0), (-1, 0, 1), (-1, 1, 0)])
async def test_breaker_is_obeyed_whatever_the_caller_last_saw(
    link: Link, settings: Settings, front: Front, open_for_ms: int, running: int, taken: int
) -> None:
    """It opened a moment ago: nothing is placed there. Its time is over: one probe, and no more."""
    async with Hand(settings, "a", "llm", placed=True) as owner:
        await front.submit(prompt(front))
        await link.call("HSET", keys.HEALTH + FIRST, "open_until_ms", front.clock.now_ms() + open_for_ms)
        if running:
            await link.call("ZADD", keys.RUNNING + FIRST, 1, "elsewhere")
        placed = await owner.streams.place([Replica(FIRST, slots=4)], [[FIRST]])
        assert len(placed.entries) == taken
        await link.call("DEL", keys.HEALTH + FIRST, keys.RUNNING + FIRST)


async def test_replica_that_hangs_is_found_out_by_jobs_shorter_than_the_call_limit(
    link: Link, settings: Settings, front: Front
) -> None:
    """Their calls end at the job's deadline, before any time-out of the call: the breaker must hear of it."""
    breaker = {"breaker_failures": 2, "breaker_open_s": 60.0}
    settings = changed(settings, llm={"urls": (FIRST, SECOND), "slots": 4, **breaker})

    async def handle(job: Job) -> Done:
        if job.replica == FIRST:
            await asyncio.Event().wait()
        return Done({"answer": "x"})

    async def is_open() -> bool:
        return int(await link.call("HGET", keys.HEALTH + FIRST, "open_until_ms") or 0) > 0

    async with working(settings, [Scripted("llm", handle, placed=True)]):
        while not await is_open():
            outcomes = [ask(front, prompt(front, lifetime_s=0.2)) for _ in range(4)]
            assert {c.status for c in await asyncio.gather(*outcomes)} <= {"completed", "expired"}
        after = await asyncio.gather(*(ask(front, prompt(front)) for _ in range(8)))
        assert {completion.status for completion in after} == {"completed"}
        await assert_nothing_is_left(link)


@pytest.mark.parametrize("record", ["{}", "x", "[]", '{"slots": "many", "seen_ms": 1}'])
async def test_record_of_a_replica_that_cannot_be_read_is_dropped(
    link: Link, settings: Settings, front: Front, record: str
) -> None:
    """A stranger wrote into the registry: workers go on, and nobody is leased to what is no replica."""
    settings = changed(settings, llm={"urls": (FIRST,)})
    async with working(settings, [Scripted("llm", echo, placed=True)]):
        await link.call("HSET", keys.REPLICAS, "foo", record)
        assert list(await front.replica_loads()) in ([], [FIRST])
        await wait_until(lambda: _is_forgotten(link, "foo"))
        assert (await ask(front, prompt(front))).status == "completed"


async def _is_forgotten(link: Link, url: str) -> bool:
    return not await link.call("HEXISTS", keys.REPLICAS, url)


async def test_health_that_is_no_number_is_unknown_health(link: Link, settings: Settings, front: Front) -> None:
    """It is measured anew."""
    settings = changed(settings, llm={"urls": (FIRST,)})
    await link.call(
        "HSET", keys.HEALTH + FIRST, "us_per_token", "0", "tokens", "abc", "open_until_ms", "x", "failures", "y"
    )
    async with working(settings, [Scripted("llm", echo, placed=True)]) as (consumer,):
        assert (await ask(front, prompt(front))).status == "completed"
        consumer.workers[0].replicas.observe(FIRST, ok=True, duration_s=0.5, tokens=5)
        await wait_until(lambda: _is_measured(link))
    await link.call("DEL", keys.HEALTH + FIRST)


async def _is_measured(link: Link) -> bool:
    return bool(await link.call("HGET", keys.HEALTH + FIRST, "tokens") == b"5")


async def test_failure_is_told_at_once_and_takes_good_news_along(
    link: Link, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good news alone would be gathered for longer here than the test may take."""
    monkeypatch.setattr("pipeline.replicas.GATHER_S", 300.0)
    settings = changed(settings, llm={"urls": (FIRST, SECOND)})
    async with working(settings, [Scripted("llm", echo, placed=True)]) as (consumer,):
        replicas = consumer.workers[0].replicas
        replicas.observe(FIRST, ok=True, duration_s=0.5, tokens=5)
        replicas.observe(SECOND, ok=False, refused=True)
        await wait_until(lambda: _is_measured(link))
        assert await link.call("HGET", keys.HEALTH + SECOND, "failures") == b"1"


async def test_retry_goes_to_a_replica_that_has_not_failed_the_job(link: Link, settings: Settings) -> None:
    """Also when it is busy at first: the job waits for it, uncharged, instead of failing again where it failed."""
    settings = changed(
        settings,
        llm={"urls": (FIRST + "?slots=1", SECOND + "?slots=1"), "breaker_failures": 1_000},
        retry={"max_retries": 1},
    )
    gate = Gate()
    asked: list[str | None] = []
    retried = metrics.JOBS.labels("llm", "retried")
    before = retried._value.get()

    async def handle(job: Job) -> Done:
        if job.payload["prompt"] == "long":
            return await gate(job)
        asked.append(job.replica)
        if len(asked) == 1:
            job.avoid = [job.replica or ""]
            raise RetryLater("500", code="replica_error")
        return await echo(job)

    stage = Scripted("llm", handle, placed=True)
    async with Front(settings, "test") as front, working(settings, [stage]):
        long, short = prompt(front, "long"), prompt(front, "short")
        await front.submit(long)
        await wait_until(lambda: gate.waiting)
        await front.submit(short)
        await wait_until(lambda: retried._value.get() >= before + 2)  # once failed, once with no place to go
        gate.open()
        completion = await front.wait(short.id, short.tenant, short.deadline_ms)
        await front.wait(long.id, long.tenant, long.deadline_ms)
        assert (completion.status, completion.attempts) == ("completed", 2)
        busy = next(job.replica for job in stage.seen if job.id == long.id)
        assert asked == [SECOND if busy == FIRST else FIRST, busy]


async def test_replica_of_another_worker_may_overrun(link: Link, settings: Settings) -> None:
    """A claimed job may be at a replica that this worker was not configured with."""
    settings = changed(settings, llm={"urls": (FIRST,)})
    async with still(settings, Scripted("llm", echo, placed=True)) as consumer:
        consumer.workers[0].replicas.overran(SECOND, 1.0)
    assert await link.call("EXISTS", keys.HEALTH + SECOND) == 0


async def test_jobs_whose_group_was_destroyed_do_not_wait_for_their_own_places(
    link: Link, settings: Settings, front: Front
) -> None:
    """All twelve slots are taken when the group goes: its jobs are read again, and each finds a place."""
    gate = Gate()
    async with working(with_replicas(settings), [Scripted("llm", gate, slots=32, placed=True)]):
        jobs = [prompt(front) for _ in range(3 * 4)]
        asking = [asyncio.create_task(ask(front, job)) for job in jobs]
        await wait_until(lambda: len(gate.waiting) == len(jobs))
        for stream in ("job:llm_in:high", "job:llm_in", "job:llm_in:low"):
            await link.call("XGROUP", "DESTROY", stream, "llm")
        await wait_until(lambda: len(gate.stopped) == len(jobs))
        gate.open()
        async with asyncio.timeout(PATIENCE_S):
            found = await asyncio.gather(*asking)
        assert {completion.status for completion in found} == {"completed"}
    await assert_nothing_is_left(link)
