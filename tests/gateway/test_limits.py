"""Bounds: what a slow, endless, crowded or broken client can make the gateway hold."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from gateway.limits import MAX_HEAD_BYTES
from tests.conftest import PATIENCE_S
from tests.gateway.conftest import Running, Start
from tests.gateway.fake import completed
from tests.gateway.raw import Connection, connect, request

SOON_S = 0.1


@pytest.mark.parametrize(
    "begun",
    [
        b"P",
        b"POST /query HTTP/1.1\r\nhost: x\r\n",
        b"POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n",
        b'POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"query": ',
        b"POST /query HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{",
        b"\r\n",
    ],
    ids=["method", "head", "no body", "half a body", "half a chunk", "empty lines"],
)
async def test_a_request_that_does_not_arrive_is_cut_off(start: Start, begun: bytes) -> None:
    """408 once the time to receive is over, then the connection is closed; no job was made."""
    gateway = await start(receive_timeout_s=SOON_S)
    async with connect(gateway.address) as client:
        await client.send(begun)
        status, body = await client.reply()
        assert (status, body["error"]["code"]) == (408, "receive_timeout")
        assert await client.rest() == b""
    assert gateway.front.jobs == {}


@pytest.mark.parametrize("drip", [b"x", b"x: y\r\n"], ids=["letters", "headers"])
async def test_a_request_that_drips_in_is_cut_off_all_the_same(start: Start, drip: bytes) -> None:
    """Bytes now and then do not buy time: the whole request has one deadline."""
    gateway = await start(receive_timeout_s=SOON_S)
    async with connect(gateway.address) as client:
        await client.send(b"POST /query HTTP/1.1\r\n")
        dripping = asyncio.create_task(_drip(client, drip))
        assert (await client.reply())[0] == 408
        dripping.cancel()


async def _drip(client: Connection, drip: bytes) -> None:
    while True:
        await asyncio.sleep(SOON_S / 10)
        try:
            await client.send(drip)
        except ConnectionError:
            return


async def test_a_second_request_has_its_own_deadline(start: Start) -> None:
    """A connection that was good once is watched like a new one."""
    gateway = await start(receive_timeout_s=SOON_S)
    gateway.front.answer = completed
    async with connect(gateway.address) as client:
        await client.send(request())
        assert (await client.reply())[0] == 200
        await client.send(request()[:30])
        assert (await client.reply())[0] == 408


async def test_a_connection_that_asks_nothing_is_closed_without_a_word(start: Start) -> None:
    """Browsers open connections that they may never use."""
    gateway = await start(receive_timeout_s=SOON_S)
    async with connect(gateway.address) as client:
        assert await client.rest() == b""


async def test_the_time_to_answer_is_not_the_time_to_receive(start: Start) -> None:
    """A slow pipeline, or a client that has begun its next request meanwhile, is no reason to cut."""
    gateway = await start(receive_timeout_s=SOON_S)
    async with connect(gateway.address) as client:
        await client.send(request())
        job = await gateway.front.next_job()
        await client.send(b"\r\n")
        await asyncio.sleep(3 * SOON_S)  # the claim is that nothing happens in this time
        gateway.front.finish(job.id)
        assert (await client.reply())[0] == 200


async def test_a_client_that_reads_nothing_is_dropped(start: Start) -> None:
    """It asks for more than its connection holds, and takes none of it; another one is answered meanwhile."""
    gateway = await start(send_timeout_s=SOON_S)
    async with connect(gateway.address) as client:
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]  # a client that does not read
        asking = asyncio.create_task(_drip(client, b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 20))
        async with asyncio.timeout(PATIENCE_S):
            await asking  # it ends with the connection


async def test_a_refused_body_is_discarded_for_a_bounded_time(start: Start) -> None:
    """After a 413 the rest may still come, for as long as any request may take."""
    gateway = await start(receive_timeout_s=SOON_S, max_body_bytes=1024)
    async with connect(gateway.address) as client:
        await client.send(b"POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999\r\n\r\n{")
        assert (await client.reply())[0] == 413
        assert await client.rest() == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"x: y\r\n" * (MAX_HEAD_BYTES // 6 + 1) + b"\r\n",
        b"GET /livez HTTP/1.1\r\nx: " + b"y" * MAX_HEAD_BYTES,
    ],
    ids=["path", "one header", "many headers", "endless"],
)
async def test_a_head_over_its_bound_is_431(gateway: Running, sent: bytes) -> None:
    """Whole or endless, it is refused and the connection closed."""
    async with connect(gateway.address) as client:
        await client.send(sent)
        status, body = await client.reply()
        assert (status, body["error"]["code"]) == (431, "head_too_large")
        assert await client.rest() == b""


async def test_endless_trailers_are_cut_off(gateway: Running) -> None:
    """The parser would keep them; nobody reads them."""
    async with connect(gateway.address) as client:
        await client.send(b"POST /query HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        await _until_it_runs(gateway)
        await client.send(b"x: " + b"y" * MAX_HEAD_BYTES * 2)
        assert (await client.reply())[0] == 431


async def test_a_large_body_in_small_chunks_is_no_large_head(start: Start) -> None:
    """What counts as head is only what the parser keeps."""
    gateway = await start()
    gateway.front.answer = completed
    body = b'{"query": "' + b"x" * 15_000 + b'"' + b" " * 30_000 + b"}"
    chunks = b"".join(b"1\r\n%b\r\n" % body[at : at + 1] for at in range(len(body)))
    async with connect(gateway.address) as client:
        await client.send(b"POST /query HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        await client.send(chunks + b"0\r\n\r\n")
        assert (await client.reply())[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"BREW /query HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/3.7\r\n\r\n",
        b"POST /query HTTP/1.1\r\ncontent-length: many\r\n\r\n",
        b"POST /query HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"POST /query HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"POST /query HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_is_400_as_json(gateway: Running, sent: bytes) -> None:
    """Also a request whose end two parsers could see in two places."""
    async with connect(gateway.address) as client:
        await client.send(sent)
        status, body = await client.reply()
        assert (status, body["error"]["code"]) == (400, "invalid_http")
        assert await client.rest() == b""


async def test_an_offer_to_upgrade_is_ignored(gateway: Running) -> None:
    """Java's client offers HTTP/2 with every request; it is served as HTTP/1.1, body and all, twice."""
    gateway.front.answer = completed
    offer = request(connection="Upgrade, HTTP2-Settings", upgrade="h2c", HTTP2_Settings="AAEAAEAAAAIAAAABAAMAAABk")
    async with connect(gateway.address) as client:
        for _ in range(2):
            await client.send(offer)
            assert (await client.reply())[0] == 200


async def test_pipelined_requests_are_answered_in_order(gateway: Running) -> None:
    """Several requests sent at once, each with its answer."""
    gateway.front.answer = lambda job: completed(job, result={"answer": job.payload["query"]})
    async with connect(gateway.address) as client:
        await client.send(b"".join(request(body=b'{"query": "%d"}' % number) for number in range(3)))
        assert [(await client.reply())[1]["answer"] for _ in range(3)] == ["0", "1", "2"]


async def test_one_connection_too_many_is_told_so_and_may_still_ask_for_health(start: Start) -> None:
    """A crowded gateway refuses work, yet does not look dead to who watches it."""
    gateway = await start(max_connections=2)
    async with AsyncExitStack() as stack:
        first, second, third = [await stack.enter_async_context(connect(gateway.address)) for _ in range(3)]
        livez = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
        for client in (first, second, third):
            await client.send(livez)
            assert (await client.reply())[0] == 200
        await third.send(request())
        status, body = await third.reply()
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        assert await third.rest() == b""
        gateway.front.answer = completed
        await first.send(request())
        assert (await first.reply())[0] == 200


async def test_a_client_that_leaves_before_its_body_leaves_no_job(gateway: Running) -> None:
    """Half a request is none."""
    async with connect(gateway.address) as client:
        await client.send(request()[:-3])
        await _until_it_runs(gateway)
    tasks = set(gateway.server.server_state.tasks)
    if tasks:
        await asyncio.wait(tasks)
    assert gateway.front.jobs == {}


async def _until_it_runs(gateway: Running) -> None:
    """Wait until the server has seen a request's head."""
    async with asyncio.timeout(PATIENCE_S):
        while not gateway.server.server_state.tasks:
            await asyncio.sleep(0)
