"""Redis away, frozen, emptied, killed: everything resumes by itself, and what was accepted ends once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest

from pipeline import keys, metrics
from pipeline.connection import Link
from pipeline.consumer import Consumer
from pipeline.errors import BrokerUnavailable, JobLost, Overloaded, PenstockError
from pipeline.front import Front
from pipeline.job import Completion, Done, Job
from pipeline.settings import RedisSettings, Settings
from tests.conftest import PATIENCE_S, short_settings, wait_until
from tests.rig import Gate, Scripted, ask, assert_nothing_is_left, changed, echo, outcome, prompt, query, working
from tests.servers import RedisServer

ROUTE = ("encoder", "retriever", "llm")


def assert_no_hot_loop(commands_run: int, began: float) -> None:
    """A gateway and three workers at rest run 150 commands per second, a loop without a pause ten thousand."""
    assert commands_run < 1_000 + 1_000 * (time.monotonic() - began)


@pytest.fixture
def own_server(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A server that this test may freeze and kill, with every write on disk before its reply."""
    with RedisServer(redis_server.binary, appendonly=True, appendfsync="always") as server:
        yield server


@pytest.fixture
async def own_link(own_server: RedisServer) -> AsyncIterator[Link]:
    link = Link(RedisSettings(url=own_server.url), "test")
    yield link
    await link.close()


async def commands(link: Link) -> int:
    """Return how many commands Redis has run, those inside scripts included."""
    text: bytes = await link.call("INFO", "stats")
    (line,) = [line for line in text.decode().splitlines() if line.startswith("total_commands_processed:")]
    return int(line.split(":")[1])


async def ask_until_answered(front: Front, job: Job) -> Completion:
    """Submit a job as a gateway's client would, again and again under one id until it is accepted; then wait."""
    while True:
        try:
            await front.submit(job)
            break
        except BrokerUnavailable:
            await asyncio.sleep(0.02)
    return await front.wait(job.id, job.tenant, job.deadline_ms)


# --- emptied --------------------------------------------------------------------------------------


async def test_flushed_redis_works_again_and_the_waiting_hear_of_their_loss(
    link: Link, settings: Settings, front: Front
) -> None:
    """Without a hot loop; the handlers of what is gone are stopped."""
    gate = Gate()
    stages = [Scripted("encoder", gate), Scripted("retriever", echo), Scripted("llm", echo)]
    async with working(settings, stages):
        lost = [query(front) for _ in range(3)]
        for job in lost:
            await front.submit(job)
        waiting = [asyncio.create_task(front.wait(job.id, job.tenant, job.deadline_ms)) for job in lost]
        await wait_until(lambda: len(gate.waiting) == 3)
        before, began = await commands(link), time.monotonic()
        await link.call("FLUSHALL")
        await wait_until(lambda: len(gate.stopped) == 3)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [JobLost] * 3
        gate.open()
        async with asyncio.timeout(PATIENCE_S):
            assert (await ask(front, query(front))).status == "completed"
        assert_no_hot_loop(await commands(link) - before, began)
        assert [stages[0].runs(job.id) for job in lost] == [1, 1, 1]
    await assert_nothing_is_left(link)


async def test_flushed_redis_knows_its_replicas_again(link: Link, settings: Settings, front: Front) -> None:
    """Registry, groups and lease return with the next renewal."""
    settings = changed(settings, llm={"urls": ("http://one:1/v1",)})
    async with working(settings, [Scripted("llm", echo, placed=True)]):
        await ask(front, prompt(front))
        await link.call("FLUSHALL")
        assert (await ask(front, prompt(front))).status == "completed"
        await wait_until(lambda: link.call("EXISTS", keys.REPLICAS))


@pytest.mark.parametrize("stage", ["encoder", "llm"])
async def test_destroyed_group_is_created_again_and_loses_nothing(
    link: Link, settings: Settings, front: Front, stage: str
) -> None:
    """The entries are still on the stream: they are delivered again, from its beginning.

    One that comes back to the hands that hold it goes on there; any other handler is stopped and its job runs anew.
    """
    settings = changed(settings, llm={"urls": ("http://one:1/v1",)})
    gate = Gate()
    scripted = Scripted(stage, gate, placed=stage == "llm")
    async with working(settings, [scripted]):
        running = [query(front, route=[stage]) for _ in range(3)]
        for job in running:
            await front.submit(job)
        await wait_until(lambda: len(gate.waiting) == 3)
        before, began = await commands(link), time.monotonic()
        await link.call("XGROUP", "DESTROY", keys.stream(stage), stage)
        await wait_until(lambda: _is_whole(link, stage, running))
        gate.open()
        async with asyncio.timeout(PATIENCE_S):
            for job in running:
                assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
            assert (await ask(front, query(front, route=[stage]))).status == "completed"
        assert_no_hot_loop(await commands(link) - before, began)
    await assert_nothing_is_left(link)


async def _is_whole(link: Link, stage: str, jobs: list[Job]) -> bool:
    """Say whether all these jobs are in somebody's hands again."""
    with suppress(PenstockError):
        return int((await link.call("XPENDING", keys.stream(stage), stage))[0]) == len(jobs)
    return False


# --- frozen ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("settings")
async def test_frozen_redis_is_told_at_once(own_server: RedisServer, own_link: Link) -> None:
    """Submit, look and cancel answer `BrokerUnavailable`; when it thaws, all work again, each with its own reply."""
    settings = changed(short_settings(own_server), redis={"reply_timeout_s": 60.0})
    async with Front(settings, "test") as front, working(settings, [Scripted(name, echo) for name in ROUTE]):
        known = await ask(front, query(front))
        own_server.pause()
        try:
            late = query(front)
            began = time.monotonic()
            results = await asyncio.gather(
                front.submit(late), front.look(known.id, "default"), front.cancel(known.id, "default"), front.health(),
                return_exceptions=True,
            )  # fmt: skip
            assert time.monotonic() - began < settings.redis.reply_timeout_s / 2  # who serves a client waits less long
            assert [type(result) for result in results[:3]] == [BrokerUnavailable] * 3
            assert isinstance(results[0], BrokerUnavailable)
            assert results[0].unknown
            # Once more: by now the connections have to be made anew, and hang half-way.
            again = await asyncio.gather(
                front.look(known.id, "default"), front.cancel(known.id, "default"), return_exceptions=True
            )
            assert [type(result) for result in again] == [BrokerUnavailable] * 2
        finally:
            own_server.resume()
        assert await front.look(known.id, "default") == known
        assert await front.cancel(known.id, "default") == "finished"
        assert (await ask_until_answered(front, late)).status == "completed"
        assert (await ask_until_answered(front, query(front))).status == "completed"
        await wait_until(lambda: _is_empty(own_link))


async def _is_empty(link: Link) -> bool:
    return int(await link.call("ZCARD", keys.LIVE_INDEX)) == 0


@pytest.mark.usefixtures("settings")
async def test_connection_cut_off_half_way_gives_no_reply_to_the_next_caller(own_server: RedisServer) -> None:
    """A caller that gives up while the connection is being made must not leave its greeting for the next one."""
    own_server.pause()
    link = Link(RedisSettings(url=own_server.url, connect_timeout_s=5.0), "impatient")
    try:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await link.call("ECHO", "first")
    finally:
        own_server.resume()
    for number in range(5):
        assert await link.call("ECHO", f"later {number}") == f"later {number}".encode()
    await link.close()


# --- a reply lost -------------------------------------------------------------------------------


@pytest.mark.parametrize("ran", [True, False])
async def test_settle_whose_reply_was_lost_is_sent_again(
    link: Link, settings: Settings, front: Front, *, ran: bool
) -> None:
    """Whether it ran or not: one outcome; and what the second sending is told is no refusal."""
    refused = metrics.STALE_WRITES.labels("encoder")._value.get()
    async with working(settings, [Scripted("encoder", echo)]) as (consumer,):
        settler = consumer.workers[0].streams._settler
        run = settler.run
        sent = 0

        async def deaf_once(*args: object) -> object:
            nonlocal sent
            sent += 1
            if sent == 1 and not ran:
                raise BrokerUnavailable("cut before it arrived", unknown=True)
            reply = await run(*args)  # type: ignore[arg-type]  # passes on what it was given
            if sent == 1:
                raise BrokerUnavailable("cut before the reply", unknown=True)
            return reply

        settler.run = deaf_once  # type: ignore[assignment]  # the cut under test
        jobs = [query(front, f"{number}", route=["encoder"]) for number in range(5)]
        found = await asyncio.gather(*(ask(front, job) for job in jobs))
        assert [completion.result for completion in found] == [{"answer": f"{number}"} for number in range(5)]
        await wait_until(lambda: not consumer.workers[0].held)
        assert sent >= 2
        for completion in found:
            assert await outcome(link, completion.id) == completion
    assert metrics.STALE_WRITES.labels("encoder")._value.get() == refused
    await assert_nothing_is_left(link)


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("settings")
async def test_killed_redis_loses_and_doubles_nothing(own_server: RedisServer, own_link: Link) -> None:
    """Two hundred jobs, a SIGKILL in their midst, `appendfsync always`: each ends once, and no process is restarted."""
    settings = short_settings(own_server)
    outcomes: Counter[str] = Counter()

    killed = asyncio.Event()

    async def slowly(job: Job) -> Done:
        await asyncio.sleep(0.01)
        if len(stages[2].seen) >= 40:
            await killed.wait()
        return await echo(job)

    stages = [Scripted(name, slowly, slots=16) for name in ROUTE]
    async with Front(settings, "test") as front, working(settings, stages) as consumers:
        jobs = [query(front, f"question {number}", lifetime_s=60) for number in range(200)]
        asking = [asyncio.create_task(ask_until_answered(front, job)) for job in jobs]
        for task in asking:
            task.add_done_callback(lambda task: outcomes.update([task.result().id]))
        await wait_until(lambda: len(stages[2].seen) >= 40)
        assert len(outcomes) < 150
        own_server.kill()
        killed.set()
        own_server.start()
        found = await asyncio.gather(*asking)
        assert {completion.status for completion in found} == {"completed"}
        assert [completion.result for completion in found] == [{"answer": job.payload["query"]} for job in jobs]
        assert outcomes == Counter(job.id for job in jobs)
        for completion in found:
            assert await outcome(own_link, completion.id) == completion  # written once
        for stage in stages:
            assert Counter(job.id for job in stage.seen) == Counter(job.id for job in jobs)
        assert not any(consumer.task.done() for consumer in consumers)
        await assert_nothing_is_left(own_link)


@pytest.mark.usefixtures("settings")
async def test_worker_started_while_redis_is_away_waits_for_it(redis_server: RedisServer) -> None:
    """Nothing needs a certain order of starting."""
    server = RedisServer(redis_server.binary)
    settings = short_settings(server)
    stage = Scripted("encoder", echo)
    consumer = Consumer([stage], settings)
    async with asyncio.TaskGroup() as group:
        group.create_task(consumer.run())
        async with Front(settings, "test") as front:
            with pytest.raises(PenstockError):
                await front.submit(query(front))
            await wait_until(lambda: consumer.workers[0].not_ready not in {None, "starting"})
            with server:
                assert (await ask_until_answered(front, query(front, route=["encoder"]))).status == "completed"
                consumer.stop()
                await wait_until(lambda: not any(worker.held for worker in consumer.workers))
        await asyncio.sleep(0)


@pytest.mark.usefixtures("settings")
async def test_worker_started_on_a_full_redis_works(own_server: RedisServer, own_link: Link) -> None:
    """Only work that is done makes room, so a stage does not wait for room before it begins."""
    settings = short_settings(own_server)
    async with Front(settings, "test") as front:
        jobs = [query(front, route=["encoder"]) for _ in range(3)]
        for job in jobs:
            await front.submit(job)
        await own_link.call("CONFIG", "SET", "maxmemory", 1)
        async with working(settings, [Scripted("encoder", echo)]):
            async with asyncio.timeout(PATIENCE_S):
                for job in jobs:
                    assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
            with pytest.raises(Overloaded):
                await front.submit(query(front))
    await assert_nothing_is_left(own_link)


async def test_entry_that_redis_refuses_to_settle_does_not_hold_up_others(
    link: Link, settings: Settings, front: Front
) -> None:
    """Somebody put a string where a set belongs: one job waits for an operator, its neighbours pass."""
    gate = Gate()
    async with working(settings, [Scripted("llm", gate)]):
        stuck, free = query(front, route=["llm"]), query(front, route=["llm"])
        await front.submit(stuck, in_flight_limit=5)
        await front.submit(free)
        await wait_until(lambda: len(gate.waiting) == 2)
        await link.call("SET", keys.IN_FLIGHT + "default", "no set", "EX", 60)
        gate.open()
        assert (await front.wait(free.id, "default", free.deadline_ms)).status == "completed"
        assert await front.look(stuck.id, "default") == "running"
        await link.call("DEL", keys.IN_FLIGHT + "default")
        assert (await front.wait(stuck.id, "default", stuck.deadline_ms)).status == "completed"
    await assert_nothing_is_left(link)
