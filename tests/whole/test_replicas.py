"""Replicas that are slow, broken or away, and clients that leave."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections import Counter
from typing import Any, Final

import pytest

from pipeline import keys
from pipeline.replicas import STALE_AFTER_S
from tests.conftest import wait_until
from tests.whole.system import END_S, SLACK_S, Outside, Reply, System, calls_of, command, environment, outside

FAST_S: Final = 0.1
SLOW_S: Final = 3.0
"""Far apart: on a busy machine each call waits for a processor, too, which makes unlike replicas look more alike."""
IN_FLIGHT: Final = 20  # two of three replicas serve them with room to spare
ROUND: Final = 3 * IN_FLIGHT


def by(replica: str, replies: list[Reply]) -> list[Reply]:
    """Return the replies that a replica gave."""
    return [reply for reply in replies if reply.body["replica"] == replica]


async def share_of(whole: Outside, replica: str) -> float:
    """Ask a round of questions of replicas that have nothing to do; return the share that one of them answered."""
    await whole.until_idle()
    replies = await whole.ask_many(ROUND, IN_FLIGHT)
    assert Counter(reply.status for reply in replies) == {200: ROUND}
    return len(by(replica, replies)) / ROUND


async def test_a_slow_replica_gets_less_until_it_is_fast_again(whole: Outside) -> None:
    """Slow, it is left alone, so that nobody waits for it while others have room; fast again, it gets its share back.

    A machine that stands still for a moment makes any replica look slow, so a round that it spoils is asked again. What
    the others' answers take meanwhile is a figure, and stands where figures are: `just faults --scenario 14`.
    """
    slow = whole.system.replicas[0]

    async def has_its_share() -> bool:
        if await share_of(whole, slow) > 1 / 4:
            return True
        # What is known of it grows old while nobody asks it; nobody waits for that here.
        await whole.redis.hincrby(keys.HEALTH + slow, "seen_ms", -int(STALE_AFTER_S * 1000) - 1)
        return False

    async def is_left_alone() -> bool:
        # But for one that tries whether it still is slow. By number of calls alone it would be as good as the others
        # when a round begins, and get a third of the first questions.
        return await share_of(whole, slow) <= 1 / ROUND

    await whole.behave(latency=FAST_S)
    await wait_until(has_its_share, timeout_s=2 * END_S)
    await whole.behave(slow, latency=SLOW_S)
    await wait_until(is_left_alone, timeout_s=2 * END_S)
    await whole.behave(slow, latency=FAST_S)
    await wait_until(has_its_share, timeout_s=2 * END_S)


@pytest.mark.parametrize(
    "broken", [{"status": 500}, {"mode": "garbage"}, {"mode": "empty"}, {"mode": "truncated"}], ids=str
)
async def test_another_replica_answers_for_a_broken_one(whole: Outside, broken: dict[str, Any]) -> None:
    """Whatever it says instead of an answer, the client does not notice."""
    sick = whole.system.replicas[1]
    await whole.behave(sick, **broken)
    replies = await whole.ask_many(12, 6)
    assert Counter(reply.status for reply in replies) == {200: 12}
    assert not by(sick, replies)
    assert await whole.records(sick)


async def test_another_replica_answers_for_a_killed_one(whole: Outside) -> None:
    """SIGKILL with calls in hand, then nobody listens: all are answered, and once restarted it takes part again."""
    victim = whole.system.replicas[2]
    await whole.behave(latency=0.3)
    asked = asyncio.create_task(whole.ask_many(24, 12))
    await wait_until(lambda: whole.redis.zcard(keys.RUNNING + victim), timeout_s=END_S)
    whole.system.kill(victim, signal.SIGKILL)
    assert Counter(reply.status for reply in await asked) == {200: 24}

    async def answers_again() -> bool:
        reply = await whole.ask()
        assert reply.status == 200
        return bool(reply.body["replica"] == victim)

    await wait_until(answers_again, timeout_s=END_S)


async def test_a_hanging_replica_costs_no_more_than_the_deadline(whole: Outside) -> None:
    """Questions with little time that met it end as 504 when their time is over, their calls aborted."""
    hanging = whole.system.replicas[0]
    await whole.behave(hanging, mode="hang")
    replies = await whole.ask_many(12, 6, timeout_s=1)
    met = await whole.records(hanging)
    statuses = Counter(reply.status for reply in replies)
    assert met
    assert statuses == {200: 12 - len(met), 504: len(met)}
    assert max(reply.took_s for reply in replies) < 1 + SLACK_S
    await whole.until_idle()
    assert {record["status"] for record in await whole.records(hanging)} == {"aborted"}


async def test_when_all_replicas_fail_the_reason_is_said(whole: Outside) -> None:
    """502 after all attempts, each replica asked, the last failure in the message."""
    await whole.behave(status=500)
    reply = await whole.ask()
    assert reply.status == 502
    assert reply.body["error"]["type"] == "failed"
    assert "500" in reply.body["error"]["message"]
    calls = await whole.records()
    assert calls_of(calls) == {reply.body["job_id"]: 4}
    assert {record["replica"] for record in calls} == set(whole.system.replicas)


async def test_without_a_replica_jobs_wait_until_their_deadline() -> None:
    """Nobody listens: one question ends as 504, another lives to see the replica start and is answered."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # not listening: connections are refused
        port = reserved.getsockname()[1]
        with System(LLM_URLS=f"http://127.0.0.1:{port}") as own:
            async with outside(own) as whole:
                patient = asyncio.create_task(whole.ask())
                hasty = await whole.ask(timeout_s=1)
                assert (hasty.status, hasty.body["error"]["code"]) == (504, "deadline_exceeded")
                assert 1 <= hasty.took_s < 1 + SLACK_S
                reserved.close()
                replica = await asyncio.create_subprocess_exec(
                    *command("mock-llm", "--port", str(port)),
                    cwd="/",
                    env=environment(),
                    stdout=asyncio.subprocess.DEVNULL,
                )
                try:
                    reply = await patient
                    assert reply.status == 200
                    assert reply.body["replica"] == f"http://127.0.0.1:{port}"
                    await whole.until_idle()
                finally:
                    replica.terminate()
                    await replica.wait()


async def call_of(whole: Outside) -> dict[str, Any]:
    """Wait for the one call that a replica runs, and return its record."""
    found: list[dict[str, Any]] = []

    async def runs() -> bool:
        found[:] = [record for record in await whole.records() if record["status"] == "running"]
        return bool(found)

    await wait_until(runs, timeout_s=END_S)
    (record,) = found
    return record


async def end_of(whole: Outside, job_id: str) -> dict[str, Any]:
    """Wait until the call of a job has ended, and return its record."""
    found: list[dict[str, Any]] = []

    async def ended() -> bool:
        records = await whole.records()
        found[:] = [record for record in records if record["request_id"] == job_id and record["ended_s"]]
        return bool(found)

    await wait_until(ended, timeout_s=END_S)
    (record,) = found
    return record


async def test_a_client_that_leaves_ends_its_call(whole: Outside) -> None:
    """The replica sees its connection closed long before it would have answered, and the lease is given back."""
    await whole.behave(latency=60)
    asked = asyncio.create_task(whole.ask())
    job_id = (await call_of(whole))["request_id"]
    left_s = time.time()
    asked.cancel()
    record = await end_of(whole, job_id)
    assert record["status"] == "aborted"
    assert record["ended_s"] - left_s < SLACK_S
    await whole.until_idle()
    assert (await whole.outcome(job_id))["status"] == "cancelled"


async def test_a_job_that_is_to_continue_outlives_its_client(whole: Outside) -> None:
    """With `on_disconnect: continue` the call goes on, and the answer can be fetched."""
    await whole.behave(latency=1)
    asked = asyncio.create_task(whole.ask(on_disconnect="continue"))
    job_id = (await call_of(whole))["request_id"]
    asked.cancel()
    assert (await end_of(whole, job_id))["status"] == "completed"
    outcome = await whole.outcome(job_id)
    assert outcome["status"] == "completed"
    assert outcome["result"]["answer"]
