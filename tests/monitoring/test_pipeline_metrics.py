"""What the gateway's `/metrics` tells of streams, workers, replicas and Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.app import create_app
from gateway.metrics import QUERY_OUTCOME, pipeline_metrics
from pipeline import front as front_module
from pipeline import keys, scripts
from pipeline.connection import Link
from pipeline.consumer import Consumer
from pipeline.front import Front
from pipeline.metrics import TURN_WAIT_S
from pipeline.overview import WorkerView, look
from pipeline.settings import RedisSettings, Settings
from tests.conftest import wait_until
from tests.faults.proxy import Proxy
from tests.gateway.fake import NOTHING
from tests.rig import FIRST, SECOND, Scripted, changed, echo
from tests.servers import RedisServer


async def test_depth_pending_and_age_are_told_by_stage_and_priority(link: Link, gateway: httpx.AsyncClient) -> None:
    """Three wait, two are in hand for a minute."""
    stream = keys.stream("llm", "high")
    await link.call("XGROUP", "CREATE", stream, "llm", "0", "MKSTREAM")
    entries = [await link.call("XADD", stream, "*", "data", "{}") for _ in range(5)]
    await link.call("XREADGROUP", "GROUP", "llm", "w", "COUNT", 2, "STREAMS", stream, ">")
    await link.call("XCLAIM", stream, "llm", "w", 0, entries[0], "IDLE", 60_000)
    told = await _told(gateway)
    of = {"stage": "llm", "priority": "high"}
    assert told("penstock_stream_waiting", **of) == 3
    assert told("penstock_stream_pending", **of) == 2
    assert 60 <= told("penstock_stream_oldest_pending_seconds", **of) < 120
    assert told("penstock_stream_lag", **of) == 3
    assert told("penstock_stream_lag_known", **of) == 1
    assert told("penstock_stream_waiting", stage="encoder", priority="normal") == 0  # of every stage that flows pass


async def test_lag_that_redis_cannot_tell_is_absent_and_depth_is_right(link: Link, gateway: httpx.AsyncClient) -> None:
    """An entry in the middle was deleted before it was read."""
    stream = keys.stream("llm")
    await link.call("XGROUP", "CREATE", stream, "llm", "0", "MKSTREAM")
    entries = [await link.call("XADD", stream, "*", "data", "{}") for _ in range(4)]
    await link.call("XREADGROUP", "GROUP", "llm", "w", "COUNT", 1, "STREAMS", stream, ">")
    await link.call("XDEL", stream, entries[2])
    told = await _told(gateway)
    of = {"stage": "llm", "priority": "normal"}
    assert told("penstock_stream_lag", **of) is None
    assert told("penstock_stream_lag_known", **of) == 0
    assert told("penstock_stream_waiting", **of) == 2


async def test_workers_are_counted_by_stage_and_by_whether_they_can_work(
    link: Link, gateway: httpx.AsyncClient, settings: Settings
) -> None:
    """A stage that nobody works on counts none: its absence must be seen."""
    consumer = Consumer([Scripted("encoder", echo)], settings)
    try:
        await consumer.renew()
        told = await _told(gateway)
    finally:
        await consumer._leave()
    assert told("penstock_stage_workers", stage="encoder", state="ready") == 0
    assert told("penstock_stage_workers", stage="encoder", state="not_ready") == 1
    assert told("penstock_stage_workers", stage="retriever", state="ready") == 0


def test_a_worker_of_two_stages_counts_at_both() -> None:
    """At each by its own state."""
    worker = WorkerView("w:1", "w", {"llm": None, "encoder": "starting"}, "here", 1, "")
    metrics = pipeline_metrics(replace(NOTHING, workers=[worker]), redis_up=True, max_jobs=1, max_backlog=1)
    (family,) = [metric for metric in metrics if metric.name == "penstock_stage_workers"]
    assert {tuple(sample.labels.values()): sample.value for sample in family.samples} == {
        ("llm", "ready"): 1,
        ("llm", "not_ready"): 0,
        ("encoder", "ready"): 0,
        ("encoder", "not_ready"): 1,
    }


async def test_a_worker_that_ended_without_a_word_is_told_of_and_one_that_signed_off_is_not(
    link: Link, settings: Settings
) -> None:
    """For ten minutes. Signing off needs no group: Redis may have been emptied meanwhile."""
    killed = Consumer([Scripted("encoder", echo)], settings)
    ended = Consumer([Scripted("encoder", echo)], settings)
    try:
        for consumer in (killed, ended):
            await consumer.renew()
        assert (await look(link)).lapsed_workers == 0
        await link.call("DEL", keys.WORKER + killed.name)
        await ended._leave()
        assert (await look(link)).lapsed_workers == 1
        now_us = float(await link.call("ZSCORE", keys.WORKERS, killed.name))
        await link.call("ZADD", keys.WORKERS, now_us - 601e6, killed.name)
        assert (await look(link)).lapsed_workers == 0
    finally:
        await killed._leave()


async def test_a_replica_is_told_with_its_slots_its_calls_and_its_breaker(
    link: Link, settings: Settings, gateway: httpx.AsyncClient
) -> None:
    """The breaker counts as open until a call has succeeded: half open, too."""
    llm = changed(settings, llm={"urls": (f"{FIRST}?slots=3", SECOND)})
    consumer = Consumer([Scripted("llm", echo, placed=True)], llm)
    (worker,) = consumer.workers
    try:
        await worker.replicas.register()
        await link.call("ZADD", keys.RUNNING + FIRST, 1, "job")
        await link.run(scripts.OBSERVE, (), (5, 1, 30_000, FIRST, "refused", 0, 0))
        health = keys.HEALTH + FIRST
        await wait_until(lambda: _is_past(link, health))
        told = await _told(gateway)
    finally:
        await consumer._leave()
    assert told("penstock_replica_slots", replica=FIRST) == 3
    assert told("penstock_replica_running", replica=FIRST) == 1
    assert told("penstock_replica_breaker_open", replica=FIRST) == 1
    assert told("penstock_replica_breaker_open", replica=SECOND) == 0


async def test_dead_letters_are_told_as_kept_and_as_ever_written(link: Link, gateway: httpx.AsyncClient) -> None:
    """The second never falls: an alert sees it grow whatever is discarded."""
    letters = [await link.call("XADD", keys.DEAD, "*", "data", "{}") for _ in range(3)]
    await link.call("XDEL", keys.DEAD, letters[0])
    told = await _told(gateway)
    assert told("penstock_dead_letters_kept") == 2
    assert told("penstock_dead_letters_written_total") == 3


async def test_messages_of_chats_without_an_answer_are_counted_wherever_they_end(
    link: Link, gateway: httpx.AsyncClient
) -> None:
    """A script of any process ends them, so Redis counts."""
    await link.call("HSET", keys.CHAT_COUNTS, "failed", 2)
    told = await _told(gateway)
    assert (
        told("penstock_chat_unanswered_total", ended="failed"),
        told("penstock_chat_unanswered_total", ended="expired"),
    ) == (2, 0)


async def test_room_is_told_beside_what_is_taken(link: Link, gateway: httpx.AsyncClient, settings: Settings) -> None:
    """Jobs and memory."""
    told = await _told(gateway)
    assert told("penstock_jobs_live") == 0
    assert told("penstock_jobs_limit") == settings.admission.max_jobs
    assert told("penstock_redis_memory_bytes") > 0
    assert told("penstock_redis_memory_limit_bytes") == 0
    assert told("penstock_redis_up") == 1


async def test_without_redis_nothing_old_is_told(cut_off: httpx.AsyncClient) -> None:
    """Only that it is away."""
    told = await _told(cut_off)
    assert told("penstock_redis_up") == 0
    assert told("penstock_jobs_live") is None
    assert told("penstock_stage_workers", stage="llm", state="ready") is None


async def test_a_slow_redis_is_not_away(redis_server: RedisServer, settings: Settings) -> None:
    """Each command is answered in time, and a look is many: together they may take longer than one may."""
    async with Proxy(redis_server.socket) as proxy:
        slow = settings.model_copy(update={"redis": RedisSettings(url=proxy.redis_url)})
        async with Front(slow, "test") as front:
            proxy.slow(0.02)  # each way
            transport = httpx.ASGITransport(create_app(slow, front))
            async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as client:
                told = await _told(client)
    assert told("penstock_redis_up") == 1
    assert told("penstock_jobs_live") == 0


async def test_figures_that_do_not_come_in_time_are_missing_and_redis_is_up(
    gateway: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alert misses them; another one would call for the wrong remedy."""
    monkeypatch.setattr(front_module, "LOOK_WITHIN_S", 0.0)
    told = await _told(gateway)
    assert told("penstock_redis_up") == 1
    assert told("penstock_jobs_live") is None


async def test_a_key_of_a_wrong_type_takes_the_figures_and_not_the_rest(link: Link, gateway: httpx.AsyncClient) -> None:
    """Redis is up, and an alert misses the figures."""
    await link.call("SET", keys.stream("llm"), "x", "PX", 60_000)
    told = await _told(gateway)
    assert told("penstock_redis_up") == 1
    assert told("penstock_jobs_live") is None
    assert told("api_gateway_queries_total", outcome="completed") is not None


@pytest.mark.parametrize(("question", "outcome"), [("", "refused"), ("Why?", "unavailable")])
async def test_a_refusal_is_the_clients_fault_or_ours(cut_off: httpx.AsyncClient, question: str, outcome: str) -> None:
    """A wrong field spends nobody's budget; Redis away spends ours."""
    before = QUERY_OUTCOME[outcome]._value.get()
    await cut_off.post("/query", json={"query": question})
    assert QUERY_OUTCOME[outcome]._value.get() == before + 1


async def test_a_command_that_waits_for_its_turn_is_timed_and_one_that_does_not_is_not(
    redis_server: RedisServer,
) -> None:
    """The hot path pays nothing."""
    connection = Link(RedisSettings(url=redis_server.url), "turns")

    def waits() -> float:
        (family,) = TURN_WAIT_S.collect()
        return next(s.value for s in family.samples if s.name.endswith("_count") and s.labels["connection"] == "turns")

    try:
        await connection.call("PING")
        await connection.call("PING")
        assert waits() == 0
        await asyncio.gather(*(connection.call("PING") for _ in range(5)))
        assert waits() == 4
    finally:
        await connection.close()


async def _is_past(link: Link, health: str) -> bool:
    open_until_ms = float(await link.call("HGET", health, "open_until_ms"))
    return await link.time_us() / 1000 > open_until_ms


class _Told:
    """A page of metrics; called with a name and labels it gives the value, None where there is none."""

    def __init__(self, page: str) -> None:
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples.get((name, frozenset(labels.items())))  # type: ignore[return-value]  # None fails a comparison


async def _told(gateway: httpx.AsyncClient) -> _Told:
    reply = await gateway.get("/metrics")
    assert reply.status_code == 200
    return _Told(reply.text)
