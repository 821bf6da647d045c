"""Health, readiness and numbers."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest
from prometheus_client import REGISTRY

from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import BrokerUnavailable
from tests.gateway.conftest import Running
from tests.gateway.fake import completed


async def test_liveness_asks_nobody(gateway: Running) -> None:
    """An outage of Redis is no reason to restart the gateway."""
    gateway.front.broken = BrokerUnavailable("refused")
    reply = await gateway.http.get("/livez")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


async def test_readiness_says_that_every_stage_can_work(gateway: Running) -> None:
    """200 under both names."""
    for path in ("/readyz", "/healthz"):
        reply = await gateway.http.get(path)
        assert reply.status_code == 200
        assert reply.json() == {
            "status": "ready",
            "redis": None,
            "stages": {"encoder": None, "retriever": None, "llm": None},
        }


async def test_readiness_names_the_stage_that_cannot_work_and_why(gateway: Running) -> None:
    """503 with the reason that the stage gave."""
    gateway.front.stages["retriever"] = "the index is held by another process"
    reply = await gateway.http.get("/readyz")
    assert reply.status_code == 503
    body = reply.json()
    assert body["error"]["code"] == "not_ready"
    assert body["error"]["message"] == "retriever: the index is held by another process"
    assert body["stages"] == {"encoder": None, "retriever": "the index is held by another process", "llm": None}


async def test_readiness_names_an_outage_of_redis(gateway: Running) -> None:
    """503, the reason beside it."""
    gateway.front.broken = BrokerUnavailable("connection refused")
    reply = await gateway.http.get("/readyz")
    assert (reply.status_code, reply.json()["redis"]) == (503, "connection refused")


@pytest.mark.parametrize("value", ["garbage", "[]", "{}", None])
async def test_readiness_and_numbers_outlive_a_key_that_a_stranger_wrote(
    on_redis: httpx.AsyncClient, link: Link, value: str | None
) -> None:
    """503 with a reason, not a fault of the gateway's; None stands for keys of a wrong type."""
    if value is None:
        await link.call("SET", keys.WORKERS, "x", "PX", 60_000)
        await link.call("DEL", keys.REPLICAS)
        await link.call("SET", keys.REPLICAS, "x", "PX", 60_000)
    else:
        await link.call("ZADD", keys.WORKERS, 1, "w1")
        await link.call("SET", keys.WORKER + "w1", value, "PX", 60_000)
    reply = await on_redis.get("/readyz")
    assert reply.status_code == 503
    assert "not what it should be" in reply.json()["redis"]
    assert (await on_redis.get("/metrics")).status_code == 200
    await link.call("DEL", keys.WORKERS, keys.REPLICAS)


async def test_queries_are_counted_by_how_they_ended(gateway: Running) -> None:
    """Answers, failures, refusals and clients that left are told apart, and waiting is timed."""
    before = {outcome: _queries(outcome) for outcome in ("completed", "failed", "refused", "accepted", "disconnected")}
    timed = _value("api_gateway_query_latency_seconds_count")
    gateway.front.answer = completed
    await gateway.http.post("/query", json={"query": "?"})
    await gateway.http.post("/query", json={"query": ""})
    gateway.front.answer = lambda job: completed(job, status="failed", result=None)
    await gateway.http.post("/query", json={"query": "?"})
    gateway.front.answer = None
    await gateway.http.post("/query", json={"query": "?", "background": True})
    asking = asyncio.create_task(gateway.http.post("/query", json={"query": "?"}))
    await gateway.front.next_job()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await gateway.front.until(lambda: len(gateway.front.cancels) == 1)
    assert {outcome: _queries(outcome) - count for outcome, count in before.items()} == dict.fromkeys(before, 1)
    assert _value("api_gateway_query_latency_seconds_count") - timed == 2


async def test_refusals_are_counted_by_their_code(gateway: Running) -> None:
    """Every code is one of ours; no path, no field, no tenant becomes a label."""
    before = _value("penstock_gateway_refusals_total", reason="no_such_path")
    for path in ("/a", "/b"):
        await gateway.http.get(path)
    assert _value("penstock_gateway_refusals_total", reason="no_such_path") - before == 2


async def test_the_load_of_each_replica_is_shown_as_it_is_now(gateway: Running) -> None:
    """A replica that is gone is gone from the numbers, and so are all when Redis cannot be asked."""
    gateway.front.loads = {"http://r1": 3, "http://r2": 0}
    text = (await gateway.http.get("/metrics")).text
    assert 'api_gateway_replica_load{replica="http://r1"} 3.0' in text
    assert 'api_gateway_replica_load{replica="http://r2"} 0.0' in text
    gateway.front.loads = {"http://r1": 1}
    text = (await gateway.http.get("/metrics")).text
    assert 'api_gateway_replica_load{replica="http://r1"} 1.0' in text
    assert "http://r2" not in text
    gateway.front.broken = BrokerUnavailable("refused")
    reply = await gateway.http.get("/metrics")
    assert reply.status_code == 200
    assert "http://r1" not in reply.text


def _queries(outcome: str) -> float:
    return _value("api_gateway_queries_total", outcome=outcome)


def _value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0
