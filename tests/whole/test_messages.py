"""Messages and batches through real processes: every message answered once, in order, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import signal
from typing import Final

import orjson

from pipeline import keys
from tests.conftest import wait_until
from tests.whole.system import END_S, Json, Outside

SIZES: Final = [1 + 7 * number % 20 for number in range(40)]
FAILING_SHARE: Final = 0.2


async def closed(whole: Outside, batch_id: str) -> Json:
    """Wait until a batch is closed; return how it stands."""
    found: Json = {}

    async def is_closed() -> bool:
        nonlocal found
        reply = await whole.send("GET", f"/batch/{batch_id}")
        found = reply.body
        return reply.status == 200 and found["closed_ms"] is not None

    await wait_until(is_closed, timeout_s=END_S, every_s=0.1)
    return found


async def restarted(whole: Outside, name: str, killed: int) -> None:
    """Wait until a killed process has a successor."""
    await wait_until(lambda: whole.system.pid_of(name) not in {None, killed}, timeout_s=END_S)


async def create(whole: Outside, number: int, size: int) -> Json:
    """Send one batch; the prompts tell which message they are."""
    messages = [{"prompt": f"Batch {number}, message {position}."} for position in range(size)]
    reply = await whole.send("POST", "/message/create", {"queue_id": "whole", "messages": messages})
    assert reply.status == 200, reply.body
    return reply.body


async def judge(whole: Outside, created: list[Json]) -> None:
    """Hold every batch against what was asked, what Redis counted, and what the replicas saw."""
    asked = {
        message_id: f"Batch {number}, message {position}."
        for number, body in enumerate(created)
        for position, message_id in enumerate(body["message_ids"])
    }
    answered: dict[str, str] = {}
    for record in await whole.records():
        if record["status"] == "completed":
            answered[str(record["request_id"])] = record["messages"][-1]["content"]
    for body in created:
        found = await closed(whole, body["batch_id"])
        size = len(body["message_ids"])
        assert (found["status"], found["request_count"], found["response_count"]) == ("completed", size, size)
        counts = await whole.redis.hmget(keys.BATCH + body["batch_id"], "req.count", "res.count")
        assert [int(count) for count in counts] == [size, size]
        results = (await whole.send("GET", f"/batch/{body['batch_id']}/results")).body["results"]
        assert [row["message_id"] for row in results] == body["message_ids"]
        assert {row["status"] for row in results} == {"completed"}
        kept = orjson.loads(await whole.redis.get(keys.BATCH_RESULTS + body["batch_id"]))
        assert kept["results"] == results
    assert {message_id: answered.get(message_id) for message_id in asked} == asked


async def test_batches_are_answered_in_order_while_a_replica_fails(whole: Outside) -> None:
    """Forty batches at once over three replicas, one of which fails every fifth call."""
    await whole.behave(whole.system.replicas[0], fail_rate=FAILING_SHARE)
    created = await asyncio.gather(*(create(whole, number, size) for number, size in enumerate(SIZES)))
    for body in created:
        await closed(whole, body["batch_id"])
    await judge(whole, list(created))


async def test_batches_survive_the_death_of_whoever_works_on_them(whole: Outside) -> None:
    """Stages, aggregator and gateway are killed while the batches run: each closes once, with all its results."""
    await whole.behave(latency=0.1)
    created = list(await asyncio.gather(*(create(whole, number, size) for number, size in enumerate(SIZES))))
    for name in ("llm", "aggregator", "gateway", "aggregator"):
        await restarted(whole, name, whole.system.kill(name, signal.SIGKILL))
    await whole.until_ready()
    for body in created:
        await closed(whole, body["batch_id"])
    await judge(whole, created)


async def test_replicas_that_say_429_are_obeyed(whole: Outside) -> None:
    """Retry-After is waited for, and no attempt is charged."""
    await whole.behave(status=429, retry_after_s=1)
    body = await create(whole, 0, 3)

    async def all_were_refused() -> bool:
        return {str(record["request_id"]) for record in await whole.records()} == set(body["message_ids"])

    await wait_until(all_were_refused, timeout_s=END_S)
    await whole.behave(status=None)
    assert (await closed(whole, body["batch_id"]))["status"] == "completed"
    results = (await whole.send("GET", f"/batch/{body['batch_id']}/results")).body["results"]
    assert [row["attempts"] for row in results] == [1, 1, 1]


async def test_ten_thousand_messages_are_accepted_in_one_call(whole: Outside) -> None:
    """All of them; and cancelled together: none is left."""
    await whole.behave(latency=1)  # none of the replicas is through with its share before the batch is cancelled
    body = await create(whole, 0, 10_000)
    assert (body["message_count"], len(set(body["message_ids"]))) == (10_000, 10_000)
    assert (await whole.send("POST", f"/batch/{body['batch_id']}/cancel")).status == 202
    found = await closed(whole, body["batch_id"])
    assert (found["status"], found["response_count"]) == ("cancelled", 10_000)
