"""The proxy does to a connection what it says, and nothing else; checked against a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from pipeline.connection import Link
from pipeline.errors import BrokerUnavailable
from pipeline.settings import RedisSettings
from tests.conftest import PATIENCE_S, wait_until
from tests.faults.proxy import Proxy
from tests.servers import RedisServer

LATENCY_S = 0.05
LONG_S = 0.15
"""How long a test listens to hear nothing: thirty times what an answer takes."""


@pytest.fixture
async def proxy(redis_server: RedisServer, link: Link) -> AsyncIterator[Proxy]:
    """A proxy before Redis; `link`, which goes past it, sees afterwards that no connection is left."""
    async with Proxy(redis_server.socket, Random(1)) as one:
        yield one


@pytest.fixture
async def through(proxy: Proxy) -> AsyncIterator[Link]:
    """A connection to Redis through the proxy, already made."""
    async with linked(proxy) as one:
        yield one


@asynccontextmanager
async def linked(proxy: Proxy, name: str = "through") -> AsyncIterator[Link]:
    """Yield a connection through *proxy*, already made, and close it afterwards."""
    one = Link(RedisSettings(url=proxy.redis_url, connect_timeout_s=10), name)
    await one.call("PING")
    try:
        yield one
    finally:
        await one.close()


@asynccontextmanager
async def raw(proxy: Proxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield a bare connection through *proxy*."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def hears_nothing(reader: asyncio.StreamReader) -> bool:
    """Listen for a while; say that neither a byte nor an end came."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LONG_S):
            await reader.read(1)
            return False
    return True


async def let_pieces_travel() -> None:
    """Give the event loop turns enough to carry what was just written to the other side of the proxy."""
    for _ in range(10):
        await asyncio.sleep(0)


def stopwatch() -> Callable[[], float]:
    started = time.monotonic()
    return lambda: time.monotonic() - started


# --- relaying -----------------------------------------------------------------------------------


async def test_a_megabyte_passes_unchanged_both_ways(through: Link) -> None:
    """Bytes of every value, more than any buffer holds at once."""
    text = Random(2).randbytes(1_000_000)
    assert await through.call("ECHO", text) == text


async def test_a_megabyte_passes_unchanged_while_slow(proxy: Proxy, through: Link) -> None:
    """More than an end holds back: it stops reading, and goes on when there is room."""
    proxy.slow(0.002, 0.002)
    text = Random(2).randbytes(1_000_000)
    assert await through.call("ECHO", text) == text


async def test_connections_are_counted(proxy: Proxy) -> None:
    """How many are open now, and how many there ever were."""
    async with linked(proxy), linked(proxy):
        assert (proxy.connections, proxy.accepted) == (2, 2)
    await wait_until(lambda: proxy.connections == 0)
    assert proxy.accepted == 2


async def test_an_end_is_passed_on_after_what_was_said_before(proxy: Proxy) -> None:
    """QUIT is answered, then Redis closes: the client hears both, in this order, however slow the way."""
    proxy.slow(0.01)
    async with raw(proxy) as (reader, writer):
        writer.write(b"QUIT\r\n")
        assert await reader.read() == b"+OK\r\n"


async def test_a_client_that_closes_is_gone_from_the_server(proxy: Proxy, link: Link) -> None:
    """The end is passed on in the other direction too."""
    async with linked(proxy, "leaves"):
        assert b"name=leaves" in await link.call("CLIENT", "LIST")
    await wait_until(lambda: _is_gone(link, b"name=leaves"))


async def _is_gone(link: Link, name: bytes) -> bool:
    return name not in await link.call("CLIENT", "LIST")


async def test_nobody_behind_it_ends_the_connection(tmp_path: Path) -> None:
    """The client is not left waiting."""
    async with Proxy(tmp_path / "absent.sock") as proxy, raw(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_leaving_closes_everything(redis_server: RedisServer, link: Link) -> None:
    """Living, frozen and dead connections alike, on both sides."""
    proxy = await Proxy(redis_server.socket).__aenter__()
    async with raw(proxy) as (dead, dead_writer):
        dead_writer.write(b"PING\r\n")
        await dead.readline()
        proxy.half_open()
        async with raw(proxy) as (frozen, frozen_writer):
            frozen_writer.write(b"PING\r\n")
            await frozen.readline()
            proxy.freeze()
            async with raw(proxy) as (new, _):
                await proxy.__aexit__(None, None, None)
                for reader in (dead, frozen, new):
                    with pytest.raises(ConnectionResetError):
                        await reader.read()
    assert proxy.connections == 0
    await wait_until(lambda: _is_alone(link))


async def _is_alone(link: Link) -> bool:
    return len(await clients(link)) == 1


async def clients(link: Link) -> list[bytes]:
    """Return what Redis says of each of its connections."""
    rows: bytes = await link.call("CLIENT", "LIST")
    return rows.splitlines()


@pytest.mark.parametrize("fault", ["frozen", "late", "server hangs"])
async def test_sender_is_held_up_where_nothing_passes(redis_server: RedisServer, fault: str) -> None:
    """The proxy does not swallow what it cannot pass on: more than the kernel's buffers hold stays with the client."""
    with RedisServer(redis_server.binary) as server:
        async with Proxy(server.socket) as proxy, raw(proxy) as (reader, writer):
            writer.write(b"PING\r\n")
            await reader.readline()
            match fault:
                case "frozen":
                    proxy.freeze()
                case "late":
                    proxy.slow(30)
                case _:
                    server.pause()
            writer.write(b"*2\r\n$4\r\nECHO\r\n$30000000\r\n" + bytes(30_000_000))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2 * LONG_S):
                    await writer.drain()
            writer.transport.abort()


# --- slow ---------------------------------------------------------------------------------------


async def test_latency_is_added_in_each_direction(proxy: Proxy, through: Link) -> None:
    """There and back; and no longer once it is healed."""
    proxy.slow(LATENCY_S)
    took_s = stopwatch()
    await through.call("PING")
    assert took_s() >= 2 * LATENCY_S
    proxy.slow(30)
    asking = asyncio.create_task(through.call("PING"))
    await asyncio.wait([asking], timeout=LATENCY_S)
    assert not asking.done()
    proxy.heal()
    async with asyncio.timeout(PATIENCE_S):
        await asking


async def test_order_is_kept_under_jitter(proxy: Proxy) -> None:
    """Fifty pieces, each late by another time, arrive as they were sent."""
    async with raw(proxy) as (reader, writer):
        proxy.slow(0.02, 0.02)
        for number in range(50):
            writer.write(b"ECHO %02d\r\n" % number)
            await let_pieces_travel()
        heard = [await reader.readexactly(len(b"$2\r\n00\r\n")) for _ in range(50)]
        assert heard == [b"$2\r\n%02d\r\n" % number for number in range(50)]


async def test_jitter_spreads_latency(proxy: Proxy, through: Link) -> None:
    """Some answers come sooner than the latency says, whatever the machine adds to them; some later."""
    proxy.slow(0.1, 0.1)

    async def span_s() -> float:
        took_s = stopwatch()
        await through.call("PING")
        return took_s()

    async def is_below_the_latency() -> bool:
        return await span_s() < 2 * 0.1

    async def is_above_it() -> bool:
        return await span_s() > 2 * 0.1

    await wait_until(is_below_the_latency)
    await wait_until(is_above_it)


async def test_drip_reaches_the_client_in_drops(proxy: Proxy) -> None:
    """It takes its time; what the client sends is not slowed down."""
    async with raw(proxy) as (reader, writer):
        proxy.drip(10_000)
        took_s = stopwatch()
        writer.write(b"*2\r\n$4\r\nECHO\r\n$3000\r\n" + b"x" * 3000 + b"\r\n")
        sizes: list[int] = []
        while sum(sizes) < len(b"$3000\r\n") + 3002:
            sizes.append(len(await reader.read(10_000)))
        assert took_s() >= 0.25
        assert len(sizes) >= 5


# --- broken -------------------------------------------------------------------------------------


async def test_cut_resets_every_connection(proxy: Proxy, link: Link) -> None:
    """Also those that wait for an answer; new ones are made."""
    async with raw(proxy) as (reader, _), linked(proxy, "waits") as waiting:
        asking = asyncio.create_task(waiting.call("BLPOP", "nothing", 0, timeout_s=30))
        await wait_until(lambda: _is_blocked(link))
        assert proxy.cut() == 2
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(BrokerUnavailable) as caught:
            await asking
        assert caught.value.unknown
        await wait_until(lambda: _is_gone(link, b"name=waits"))
        assert proxy.cut() == 0
        assert await waiting.call("ECHO", "again") == b"again"


async def _is_blocked(link: Link) -> bool:
    return b"blocked_clients:1" in await link.call("INFO", "clients")


async def test_refused_connections_are_closed_at_once(proxy: Proxy, through: Link) -> None:
    """Those that exist go on; later ones are made again."""
    proxy.refuse()
    with pytest.raises(BrokerUnavailable) as caught:
        async with linked(proxy):
            pass
    assert not caught.value.unknown
    assert proxy.accepted == 1
    assert await through.call("ECHO", "goes on") == b"goes on"
    proxy.refuse(False)
    async with linked(proxy):
        assert proxy.connections == 2


async def test_half_open_connection_is_served_and_hears_nothing(proxy: Proxy, link: Link) -> None:
    """Redis hands an entry to a blocked reader that is no longer there, and keeps its connection."""
    await link.call("XGROUP", "CREATE", "s", "g", "$", "MKSTREAM")
    await link.call("PEXPIRE", "s", 60_000)
    async with linked(proxy, "reader") as reading:
        asking = asyncio.create_task(
            reading.call("XREADGROUP", "GROUP", "g", "c", "BLOCK", 0, "STREAMS", "s", ">", timeout_s=30)
        )
        await wait_until(lambda: _is_blocked(link))
        assert proxy.half_open() == 1
        await link.call("XADD", "s", "*", "data", "{}")
        assert (await link.call("XPENDING", "s", "g"))[0] == 1
        proxy.thaw()
        proxy.heal()
        await asyncio.wait([asking], timeout=LONG_S)
        assert not asking.done()
        assert proxy.connections == 0
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        assert await reading.call("ECHO", "new ones work") == b"new ones work"
        assert len([row for row in await clients(link) if b"name=reader" in row]) == 2


async def test_half_open_connection_is_not_cut(proxy: Proxy) -> None:
    """Nothing is heard any more, not even a reset."""
    async with raw(proxy) as (reader, writer):
        writer.write(b"PING\r\n")
        await reader.readline()
        proxy.half_open()
        assert proxy.cut() == 0
        writer.write(b"PING\r\n")
        assert await hears_nothing(reader)


async def test_frozen_connection_goes_on_when_thawed(proxy: Proxy, through: Link, link: Link) -> None:
    """Meanwhile the command has not reached Redis; then nothing of it is missing."""
    proxy.freeze()
    asking = asyncio.create_task(through.call("SET", "k", "v", "PX", 60_000))
    await asyncio.wait([asking], timeout=LONG_S)
    assert not asking.done()
    assert await link.call("EXISTS", "k") == 0
    proxy.thaw()
    assert await asking == b"OK"
    assert await link.call("EXISTS", "k") == 1


async def test_answer_is_held_back_while_frozen(proxy: Proxy, through: Link, link: Link) -> None:
    """The other direction is frozen too."""
    asking = asyncio.create_task(through.call("BLPOP", "k", 0))
    await wait_until(lambda: _is_blocked(link))
    proxy.freeze()
    await link.call("RPUSH", "k", "v")
    await asyncio.wait([asking], timeout=LONG_S)
    assert not asking.done()
    proxy.thaw()
    assert await asking == [b"k", b"v"]


async def test_ends_are_held_back_while_frozen(proxy: Proxy, link: Link) -> None:
    """Redis keeps the connection of a client that has closed it, until it can hear of that."""
    async with linked(proxy, "leaves"):
        proxy.freeze()
    await let_pieces_travel()
    assert not await _is_gone(link, b"name=leaves")
    proxy.thaw()
    await wait_until(lambda: _is_gone(link, b"name=leaves"))


async def test_new_connection_hears_nothing_while_frozen(proxy: Proxy, link: Link) -> None:
    """It is accepted, as the kernel of a frozen machine would, and reaches Redis after the thaw."""
    proxy.freeze()
    async with raw(proxy) as (reader, writer):
        writer.write(b"PING\r\n")
        assert await hears_nothing(reader)
        assert len(await clients(link)) == 1
        proxy.thaw()
        assert await reader.readline() == b"+PONG\r\n"


# --- lost replies -------------------------------------------------------------------------------


async def test_lost_reply_belongs_to_a_command_that_ran(proxy: Proxy, through: Link, link: Link) -> None:
    """The counter counts, yet the client saw the connection end; other commands are let alone, and so is the next."""
    proxy.lose_replies(b"INCR")
    assert await through.call("SET", "k", 1, "PX", 60_000) == b"OK"
    assert proxy.replies_lost == 0
    with pytest.raises(BrokerUnavailable) as caught:
        await through.call("INCR", "k")
    assert caught.value.unknown
    assert proxy.replies_lost == 1
    assert await link.call("GET", "k") == b"2"
    assert await through.call("INCR", "k") == 3
    assert proxy.replies_lost == 1


async def test_so_many_replies_are_lost_as_asked(proxy: Proxy, through: Link) -> None:
    """Over several connections, since each loss costs one."""
    proxy.lose_replies(b"lose me", times=3)
    lost = 0
    for _ in range(6):
        try:
            await through.call("ECHO", "lose me")
        except BrokerUnavailable:
            lost += 1
    assert (lost, proxy.replies_lost) == (3, 3)


async def test_command_in_two_pieces_is_recognised(proxy: Proxy) -> None:
    """A pattern may lie across two reads."""
    proxy.lose_replies(b"PING")
    async with raw(proxy) as (reader, writer):
        writer.write(b"PI")
        await let_pieces_travel()
        writer.write(b"NG\r\n")
        with pytest.raises(ConnectionResetError):
            await reader.readline()
    assert proxy.replies_lost == 1


async def test_command_without_a_reply_is_not_counted_as_lost(proxy: Proxy, through: Link, link: Link) -> None:
    """Its caller gave up before there was one, so the next such command loses its reply."""
    proxy.lose_replies(b"BLPOP")
    asking = asyncio.create_task(through.call("BLPOP", "nothing", 0))
    await wait_until(lambda: _is_blocked(link))
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    await wait_until(lambda: proxy.connections == 0)
    with pytest.raises(BrokerUnavailable):
        await through.call("BLPOP", "nothing", 0.01)
    assert proxy.replies_lost == 1


async def test_healed_proxy_loses_nothing(proxy: Proxy, through: Link, link: Link) -> None:
    """Not even the reply that was to be lost next."""
    proxy.lose_replies(b"BLPOP")
    asking = asyncio.create_task(through.call("BLPOP", "k", 0))
    await wait_until(lambda: _is_blocked(link))
    proxy.heal()
    await link.call("RPUSH", "k", "v")
    assert await asking == [b"k", b"v"]
