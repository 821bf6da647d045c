"""The llm stage and its connections: replicas that break, hang, drip and hang up; calls that are cancelled."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from pipeline.errors import RetryLater
from pipeline.flows import FLOWS
from pipeline.job import Job
from pipeline.settings import Settings
from stages import llm
from stages.http import Pool, Target, Unreachable
from stages.llm import build
from tests.conftest import PATIENCE_S
from tests.stages.llm_bench import (
    Behaviour,
    Build,
    Exchange,
    FakeContext,
    FakeReplicas,
    benches,
    calls,
    drip,
    greet,
    hang_up,
    raw,
    reply,
    reset,
    say,
    stay_silent,
    stop_half_way,
)


@pytest.fixture
async def bench() -> AsyncIterator[Build]:
    async with benches() as build_bench:
        yield build_bench


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of flow `message` end after a second, which is much for an answer and little for a test."""
    monkeypatch.setitem(FLOWS, "message", replace(FLOWS["message"], call_timeout_s=1.0))


# --- Connections --------------------------------------------------------------------------------

TRUNCATED = b'HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{"choices": [{"message"'
CUT_CHUNK = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40\r\n{"choices'
BAD_CHUNK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"
UNTIL_CLOSE = b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"choices": [{"mess'
UPGRADE = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"
NOT_GZIP = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (raw(TRUNCATED), "bad_answer"),
        (raw(CUT_CHUNK), "bad_answer"),
        (raw(BAD_CHUNK), "bad_answer"),
        (raw(UNTIL_CLOSE), "bad_answer"),
        (raw(NOT_GZIP), "bad_answer"),
        (raw(b"220 smtp.example.org ESMTP\r\n\r\n"), "bad_answer"),
        (raw(b"\x00\xff" * 50), "bad_answer"),
        (raw(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n"), "bad_answer"),
        (raw(b"HTTP/1.1 200 \xff\xfe\r\ncontent-length: 2\r\n\r\n{}"), "bad_answer"),
        (raw(UPGRADE), "replica_misconfigured"),
        (raw(b"HTTP/1.1 200 OK\r\n"), "connection_lost"),
        (hang_up, "connection_lost"),
        (reset, "connection_lost"),
        (reply(200, "not JSON"), "bad_answer"),
        (reply(302, "", "location: http://127.0.0.1:1/"), "replica_misconfigured"),
    ],
    ids=[
        "truncated", "cut-chunk", "bad-chunk", "until-close", "not-gzip", "not-http", "noise", "huge-header",
        "odd-reason", "upgrade",
        "half-a-head", "hang-up", "reset", "not-json", "redirect",
    ],
)  # fmt: skip
async def test_a_broken_exchange_is_charged_once_and_tried_elsewhere(
    bench: Build, behaviour: Behaviour, code: str
) -> None:
    """Whatever breaks on a fresh connection counts once against its replica, and the next one answers."""
    b = await bench([behaviour], [])
    before = calls(code)
    job = b.job()
    done = await b.stage.handle(job)
    assert (done.value["answer"], job.attempt) == ("hello", 2)
    assert calls(code) == before + 1
    assert len(b.replicas[0].exchanges) == 1
    assert [(o.ok, o.refused) for o in b.registry.observations] == [(False, False), (True, False)]


ANSWER = b'{"choices": [{"message": {"content": "whole"}}]}'
IN_CHUNKS = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (9, ANSWER[:9], len(ANSWER) - 9, ANSWER[9:])
PACKED = gzip.compress(ANSWER)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n\r\n" + ANSWER,
        b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + IN_CHUNKS,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER,
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(PACKED) + PACKED,
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER + b"HTTP/1.1 500 Unasked\r\n\r\n",
    ],
    ids=["until-close", "http-1.0", "chunked", "continue", "packed", "two-answers"],
)
async def test_an_answer_is_understood_however_it_is_framed(bench: Build, data: bytes) -> None:
    """Every form that servers and proxies give an answer is the same answer, and serves one call only."""
    b = await bench([raw(data)])
    done = await b.stage.handle(b.job())
    assert done.value["answer"] == "whole"
    assert (await b.stage.handle(b.job())).value["answer"] == "hello"
    assert b.replicas[0].connections == 2


@pytest.mark.usefixtures("short_calls")
@pytest.mark.parametrize("behaviour", [stay_silent, stop_half_way, drip], ids=["silent", "half-way", "drip"])
async def test_a_call_is_bounded_in_time_and_the_replica_sees_it_end(bench: Build, behaviour: Behaviour) -> None:
    """The whole call has one limit, however busily the replica keeps the connection alive."""
    b = await bench([behaviour], [])
    job = b.job()
    done = await asyncio.wait_for(b.stage.handle(job), PATIENCE_S)
    assert (done.value["answer"], job.attempt) == ("hello", 2)
    await asyncio.wait_for(b.replicas[0].left.wait(), PATIENCE_S)


async def test_a_replica_that_accepts_but_never_shakes_hands_is_unreachable() -> None:
    """The connect time-out covers TLS too, and charges nothing."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    left = asyncio.Event()
    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        stage = build(Settings.model_validate({"llm": {"connect_timeout_s": 0.1}}))
        registry = FakeReplicas([f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
        await stage.start(FakeContext(registry))
        with pytest.raises(RetryLater) as caught:
            await stage.handle(Job("j", "message", {"prompt": "p"}, [], 0, replica=registry.urls[0]))
        await stage.stop()
        await asyncio.wait_for(left.wait(), PATIENCE_S)
    assert (caught.value.code, caught.value.charged) == ("replica_unreachable", False)
    assert registry.observations[0].refused


async def test_a_connection_that_ends_before_anything_was_written_never_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody can have read the request, so whoever must not send it twice may send it again."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    pool = Pool(connect_timeout_s=PATIENCE_S, keep_alive_s=1.0, max_answer_bytes=1_000)
    connect = pool._connect

    async def connect_and_lose(target: Target) -> Any:
        connection = await connect(target)
        await asyncio.wait_for(connection.ended, PATIENCE_S)
        return connection

    monkeypatch.setattr(pool, "_connect", connect_and_lose)
    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        target = Target.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", {})
        with pytest.raises(Unreachable):
            await pool.post(target, "j", b"{}")


@pytest.mark.parametrize("url", ["http://[::zz]", "http://127.0.0.1:99999"])
async def test_an_address_that_cannot_be_used_is_charged_and_tried_elsewhere(bench: Build, url: str) -> None:
    """A wrong address is one replica's trouble, seen in its observations, and raises nothing unforeseen."""
    b = await bench([], [])
    b.registry.urls[0] = url
    job = b.job()
    done = await b.stage.handle(job)
    assert (done.value["answer"], job.attempt, job.avoid) == ("hello", 2, [url])
    assert [(o.url, o.ok) for o in b.registry.observations] == [(url, False), (b.replicas[1].url, True)]


async def test_an_endless_answer_is_cut(bench: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded whatever a replica sends."""
    monkeypatch.setattr(llm, "MAX_ANSWER_BYTES", 1 << 20)

    async def flood(exchange: Exchange) -> bool:
        await exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await exchange.send(b" " * 200_000)  # ends with the connection

    b = await bench([flood])
    error = await b.failure(b.job())
    assert (error.code, str(error)) == ("bad_answer", "the replica's answer is larger than 1 MiB")
    await asyncio.wait_for(b.replicas[0].left.wait(), PATIENCE_S)


async def test_connections_are_kept_and_used_again(bench: Build) -> None:
    """Two calls in a row share one connection."""
    b = await bench([])
    await b.stage.handle(b.job())
    await b.stage.handle(b.job())
    assert b.replicas[0].connections == 1


async def test_an_idle_connection_goes_when_its_time_is_over(bench: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier than servers close theirs, so that no call meets a closing connection."""
    monkeypatch.setattr(llm, "KEEP_ALIVE_S", 0.05)
    b = await bench([])
    await b.stage.handle(b.job())
    await asyncio.wait_for(b.replicas[0].left.wait(), PATIENCE_S)
    await b.stage.handle(b.job())
    assert b.replicas[0].connections == 2


async def test_a_connection_that_speaks_unasked_is_given_up(bench: Build) -> None:
    """Its words would be taken for the answer to the next call."""

    async def greet_and_go_on(exchange: Exchange) -> bool:
        await greet(exchange)
        await asyncio.sleep(0.05)  # until the first answer was read
        await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        return True

    b = await bench([greet_and_go_on])
    await b.stage.handle(b.job())
    await asyncio.wait_for(b.replicas[0].left.wait(), PATIENCE_S)
    assert (await b.stage.handle(b.job())).value["answer"] == "hello"
    assert b.replicas[0].connections == 2


async def test_a_connection_that_died_while_idle_is_replaced_at_no_charge(bench: Build) -> None:
    """The replica closed its end just as the request was under way: it is sent again, over a fresh connection."""
    for ending in (hang_up, reset):
        b = await bench([greet, ending, say("again")])
        await b.stage.handle(b.job())
        job = b.job()
        done = await b.stage.handle(job)
        assert (done.value["answer"], job.attempt, job.avoid) == ("again", 1, [])
        assert b.replicas[0].connections == 2
        assert [o.ok for o in b.registry.observations] == [True, True]


async def test_a_request_that_kills_its_connection_again_is_charged_once(bench: Build) -> None:
    """The second end, on a fresh connection, is the replica's."""
    b = await bench([greet, hang_up, hang_up])
    await b.stage.handle(b.job())
    error = await b.failure(b.job())
    assert (error.code, len(b.replicas[0].exchanges)) == ("connection_lost", 3)
    assert [o.ok for o in b.registry.observations] == [True, False]


async def test_a_kept_connection_that_ends_within_an_answer_is_charged(bench: Build) -> None:
    """Once an answer has begun, the replica was at work."""
    b = await bench([greet, raw(TRUNCATED)])
    await b.stage.handle(b.job())
    error = await b.failure(b.job())
    assert (error.code, len(b.replicas[0].exchanges)) == ("bad_answer", 2)


async def test_a_kept_connection_that_ends_late_is_charged(bench: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that dies at work is not mistaken for one that closed an idle connection."""
    b = await bench([greet, hang_up])
    await b.stage.handle(b.job())
    monkeypatch.setattr(llm, "STALE_S", 0.0)
    error = await b.failure(b.job())
    assert (error.code, len(b.replicas[0].exchanges)) == ("connection_lost", 2)


async def test_more_calls_than_any_pools_default_run_at_once(bench: Build) -> None:
    """Slots are the only limit: 150 calls wait for one another at the replica."""
    together = asyncio.Event()
    arrived = 0

    async def wait_for_all(exchange: Exchange) -> bool:
        nonlocal arrived
        arrived += 1
        if arrived == 150:
            together.set()
        await together.wait()
        return await greet(exchange)

    b = await bench([wait_for_all] * 150)
    done = await asyncio.wait_for(asyncio.gather(*(b.stage.handle(b.job()) for _ in range(150))), PATIENCE_S)
    assert {outcome.value["answer"] for outcome in done} == {"hello"}


# --- Cancellation -------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", [stay_silent, stop_half_way, drip], ids=["waiting", "half-way", "dripping"])
async def test_a_cancelled_call_is_seen_by_the_replica_at_once(bench: Build, behaviour: Behaviour) -> None:
    """Cancelling the handler closes the connection, and observes nothing."""
    b = await bench([greet, behaviour])
    await b.stage.handle(b.job())
    b.registry.observations.clear()
    b.replicas[0].asked.clear()
    before = calls("cancelled")
    running = asyncio.create_task(b.stage.handle(b.job()))
    await asyncio.wait_for(b.replicas[0].asked.wait(), PATIENCE_S)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wait_for(b.replicas[0].left.wait(), PATIENCE_S)
    assert b.registry.observations == []
    assert calls("cancelled") == before + 1


async def test_the_stage_goes_on_after_a_cancelled_call(bench: Build) -> None:
    """A half-used connection never serves the next job."""
    b = await bench([stop_half_way, say("fresh")])
    running = asyncio.create_task(b.stage.handle(b.job()))
    await asyncio.wait_for(b.replicas[0].asked.wait(), PATIENCE_S)
    running.cancel()
    await asyncio.wait([running])
    done = await b.stage.handle(b.job())
    assert done.value["answer"] == "fresh"
