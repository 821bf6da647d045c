"""A link on a bad network: every call ends, and nothing of one caller's reaches another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import pytest
import uvloop

from pipeline.connection import CommandRefused, Link
from pipeline.errors import BrokerUnavailable
from pipeline.settings import RedisSettings
from tests.conftest import PATIENCE_S
from tests.faults.proxy import Proxy
from tests.servers import RedisServer

MORE_THAN_FITS = bytes(30_000_000)
"""The kernel's buffers hold less, so sending this waits for the other side."""


@pytest.fixture
async def proxy(redis_server: RedisServer, link: Link) -> AsyncIterator[Proxy]:
    """A proxy before Redis; `link`, which goes past it, sees afterwards that no connection is left."""
    async with Proxy(redis_server.socket) as one:
        yield one


@pytest.fixture
async def through(proxy: Proxy) -> AsyncIterator[Link]:
    """A connection through the proxy, already made, that does not wait long for a reply."""
    one = Link(RedisSettings(url=proxy.redis_url, reply_timeout_s=0.2), "through")
    await one.call("PING")
    yield one
    await one.close()


async def test_long_command_on_a_dead_connection_ends_in_time(proxy: Proxy, through: Link) -> None:
    """Sending is bounded as receiving is; else the call, and all who wait for their turn, would hang for ever."""
    proxy.half_open()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(BrokerUnavailable, match="timed out") as caught:
            await through.call("ECHO", MORE_THAN_FITS)
    assert caught.value.unknown
    assert await through.call("ECHO", "again") == b"again"


async def test_connection_given_up_while_sending_holds_no_longer(proxy: Proxy, through: Link) -> None:
    """Whoever asks how long it has held must not be told of one that is gone."""
    proxy.freeze()
    sending = asyncio.create_task(through.call("ECHO", MORE_THAN_FITS, timeout_s=30))
    await asyncio.wait([sending], timeout=0.05)
    sending.cancel()
    with suppress(asyncio.CancelledError):
        await sending
    assert through.held_for_s() == 0


async def test_message_heard_after_a_subscription_answers_nobody(through: Link, link: Link) -> None:
    """Who leaves a subscription leaves its connection too."""
    async with aclosing(through.subscribe("news")) as heard:
        assert await anext(heard) == ("", b"")
    await link.call("PUBLISH", "news", "stray")
    assert await through.call("ECHO", "mine") == b"mine"


@pytest.mark.parametrize("word", ["LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY"])
async def test_not_now_is_an_outage_in_which_nothing_ran(through: Link, word: str) -> None:
    """Also where redis-py takes the word away from the text."""
    with pytest.raises(BrokerUnavailable) as caught:
        await through.call("EVAL", f"return redis.error_reply('{word} not now')", 0)
    assert not caught.value.unknown


async def test_refusal_of_another_kind_stays_one(through: Link) -> None:
    """Waiting would not help."""
    with pytest.raises(CommandRefused):
        await through.call("EVAL", "return redis.error_reply('NEVER this')", 0)


def test_connection_that_was_reset_while_idle_is_an_outage_on_uvloop_too() -> None:
    """uvloop answers a write to a closed transport with RuntimeError: that must end no process."""

    async def use_a_dead_connection() -> None:
        with RedisServer() as server:
            async with Proxy(server.socket) as proxy:
                one = Link(RedisSettings(url=proxy.redis_url), "through")
                for _ in range(20):
                    await one.call("PING")
                    proxy.cut()
                    await asyncio.sleep(0.005)
                    with suppress(BrokerUnavailable):
                        await one.call("PING")
                assert await one.call("ECHO", "again") == b"again"
                await one.close()

    uvloop.run(use_a_dead_connection())
