"""A link: one command in flight, every reply to its own caller, and a clear word for what went wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from random import Random

import pytest
from structlog.testing import capture_logs

from pipeline import connection
from pipeline.connection import Backoff, CommandRefused, GroupMissing, Link, Outage, reconnect_delay_s, within
from pipeline.errors import BrokerUnavailable, ConfigError
from pipeline.settings import RedisSettings
from tests.conftest import wait_until
from tests.servers import RedisServer


@pytest.fixture
def own_server(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A server that this test may freeze."""
    with RedisServer(redis_server.binary) as server:
        yield server


async def test_time_in_which_the_process_stood_still_does_not_count_against_redis(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer lay there all the time; a silent Redis is given up all the same."""
    monkeypatch.setattr(connection, "ANSWER_WITHIN_S", 0.01)

    async def stand_still() -> None:
        time.sleep(0.1)  # nobody else has a turn

    async with asyncio.TaskGroup() as group:
        answer = group.create_task(within(link.call("PING")))
        group.create_task(stand_still())
    assert answer.result() == b"PONG"
    with pytest.raises(BrokerUnavailable):
        await within(asyncio.Event().wait())


async def test_cancelled_calls_never_shift_replies(link: Link) -> None:
    """Six hundred calls through one link, a third of them cancelled half-way: each other gets what it asked for."""
    rng = Random(3)
    tasks: dict[bytes, asyncio.Task[object]] = {}
    for number in range(200):
        for text in (f"{number} a".encode(), f"{number} b".encode(), f"{number} c".encode()):
            tasks[text] = asyncio.create_task(link.call("ECHO", text))
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
        tasks[f"{number} {rng.choice('abc')}".encode()].cancel()
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    answered = [text for text, result in zip(tasks, results, strict=True) if result == text]
    cancelled = [result for result in results if isinstance(result, asyncio.CancelledError)]
    assert len(answered) + len(cancelled) == 600
    assert len(cancelled) > 50
    assert await link.call("ECHO", "last") == b"last"


async def test_reply_that_does_not_come_is_unknown(link: Link) -> None:
    """The connection is given up with it, so that the late reply reaches nobody."""
    with pytest.raises(BrokerUnavailable) as caught:
        await link.call("BLPOP", "nothing", 0, timeout_s=0.05)
    assert caught.value.unknown
    assert link.connected_at_us is None
    assert await link.call("ECHO", "next") == b"next"


async def test_nobody_there_is_known(redis_server: RedisServer) -> None:
    """The command has certainly not run."""
    absent = Link(RedisSettings(url=f"unix://{redis_server.directory}/absent.sock"), "test")
    with pytest.raises(BrokerUnavailable) as caught:
        await absent.call("PING")
    assert not caught.value.unknown
    assert absent.held_for_s() == 0
    await absent.close()


async def test_connection_killed_while_nothing_is_under_way_is_made_anew(link: Link, redis_server: RedisServer) -> None:
    """Nobody is told: what is sent next was sent to nobody before."""
    other = Link(RedisSettings(url=redis_server.url), "victim")
    await other.call("PING")
    await link.call("CLIENT", "KILL", "ID", other.client_id)
    await wait_until(lambda: other.held_for_s() == 0)
    assert await other.call("ECHO", "again") == b"again"
    assert other.held_for_s() > 0
    await other.close()


async def test_connection_killed_during_a_call_fails_that_call(link: Link, redis_server: RedisServer) -> None:
    """It may have run; the next call works."""
    other = Link(RedisSettings(url=redis_server.url), "victim")
    waiting = asyncio.create_task(other.call("BLPOP", "nothing", 0))
    await wait_until(lambda: _is_blocked(link))
    await link.call("CLIENT", "KILL", "ID", other.client_id)
    with pytest.raises(BrokerUnavailable) as caught:
        await waiting
    assert caught.value.unknown
    assert await other.call("ECHO", "again") == b"again"
    await other.close()


async def test_reply_that_comes_as_the_waiting_ends_is_kept(link: Link) -> None:
    """A subscription looks up from time to time: what is said in that moment is heard all the same."""
    await link.call("PING")
    wire = link._wire
    assert wire is not None
    waiting = asyncio.create_task(wire.reply())
    await asyncio.sleep(0)
    wire.data_received(b"$4\r\nsaid\r\n")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await wire.reply() == b"said"


async def test_connection_that_is_not_logged_in_any_more_is_left(own_server: RedisServer) -> None:
    """The next one logs in anew, and says so where it cannot."""
    other = Link(RedisSettings(url=own_server.url), "other")
    await other.call("CONFIG", "SET", "requirepass", "secret")
    await other.call("RESET")
    with pytest.raises(BrokerUnavailable, match="NOAUTH"):
        await other.call("PING")
    assert other.held_for_s() == 0
    with pytest.raises(BrokerUnavailable, match="no connection to Redis: Authentication required"):
        await other.call("PING")
    await other.close()


async def test_long_commands_and_replies_arrive_whole(link: Link) -> None:
    """Longer than any buffer between: they come in pieces."""
    text = bytes(range(256)) * 40_000
    assert await link.call("ECHO", text) == text
    assert await link.call("ECHO", "after it") == b"after it"


async def test_refusals_are_told_apart(link: Link) -> None:
    """A missing group can be created, a wrong type needs a person."""
    with pytest.raises(GroupMissing):
        await link.call("XREADGROUP", "GROUP", "g", "c", "STREAMS", "s", ">")
    await link.call("SET", "s", "text", "PX", 60_000)
    with pytest.raises(CommandRefused):
        await link.call("XADD", "s", "*", "data", "{}")
    assert await link.call("ECHO", "fine") == b"fine"


async def test_settings_that_cannot_work_are_the_operators() -> None:
    """Not an outage: waiting would not help."""
    with pytest.raises(ConfigError):
        Link(RedisSettings(url="http://127.0.0.1"), "test")


async def test_subscription_hears_and_ends_with_its_connection(link: Link, redis_server: RedisServer) -> None:
    """Whoever listens must know when nothing can be heard any more."""
    listener = Link(RedisSettings(url=redis_server.url), "listener")
    heard: list[tuple[str, bytes]] = []

    async def listen() -> None:
        async for item in listener.subscribe("one", "two"):
            heard.append(item)  # noqa: PERF401 - the loop ends with an error

    task = asyncio.create_task(listen())
    await wait_until(lambda: _has_listener(link))
    await link.call("PUBLISH", "one", b"\x00\xff")
    await link.call("PUBLISH", "two", "text")
    await wait_until(lambda: len(heard) == 3)
    assert heard == [("", b""), ("one", b"\x00\xff"), ("two", b"text")]
    await link.call("CLIENT", "KILL", "TYPE", "pubsub")
    with pytest.raises(BrokerUnavailable):
        await task
    await listener.close()


async def _has_listener(link: Link) -> bool:
    return int((await link.call("PUBSUB", "NUMSUB", "two"))[1]) > 0


async def test_read_only_node_is_left(link: Link, redis_server: RedisServer) -> None:
    """After a failover the address may lead to the new primary by now."""
    other = Link(RedisSettings(url=redis_server.url), "other")
    await other.call("PING")
    await link.call("REPLICAOF", "127.0.0.1", 1)
    try:
        with pytest.raises(BrokerUnavailable) as caught:
            await other.call("SET", "x", 1)
        assert not caught.value.unknown
        assert other.connected_at_us is None
    finally:
        await link.call("REPLICAOF", "NO", "ONE")
        await other.close()


async def test_sockets_own_timeout_is_no_empty_reply(link: Link, redis_server: RedisServer) -> None:
    """ETIMEDOUT is a TimeoutError too: the connection is dead, and nobody may take that for a nil."""
    other = Link(RedisSettings(url=redis_server.url), "other")
    await other.call("PING")
    asking = asyncio.create_task(other.call("BLPOP", "nothing", 0))
    await wait_until(lambda: _is_blocked(link))
    other._wire.connection_lost(TimeoutError(110, "Connection timed out"))  # type: ignore[union-attr]
    with pytest.raises(BrokerUnavailable, match="went away") as caught:
        await asking
    assert caught.value.unknown
    await other.close()


async def _is_blocked(link: Link) -> bool:
    return b"blocked_clients:1" in await link.call("INFO", "clients")


async def test_connecting_that_was_cancelled_is_begun_anew(link: Link, own_server: RedisServer) -> None:
    """Replies to a handshake cut short must not reach the next caller."""
    other = Link(RedisSettings(url=own_server.url), "other")
    own_server.pause()
    asking = asyncio.create_task(other.call("ECHO", "first"))
    await wait_until(lambda: other._connection.is_connected)
    asking.cancel()
    own_server.resume()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await other.call("ECHO", "second") == b"second"
    await other.close()


async def test_backoff_grows_with_failures_in_a_row_and_tells_the_outage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun once, ended once; the first failure after a success waits as briefly as the very first."""
    waits: list[float] = []

    async def note(delay_s: float) -> None:
        waits.append(delay_s)

    monkeypatch.setattr(asyncio, "sleep", note)
    backoff = Backoff(0.05, Outage("here"))
    with capture_logs() as lines:
        for _ in range(3):
            await backoff.failed(BrokerUnavailable("gone"))
        backoff.succeeded()
        backoff.succeeded()
        await backoff.wait()
    assert waits == [reconnect_delay_s(failures, 0.05) for failures in (0, 1, 2, 0)] == [0.02, 0.04, 0.05, 0.02]
    assert [line["event"] for line in lines] == ["redis is away", "redis is back"]
