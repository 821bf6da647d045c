"""`penstock status` on a terminal: goes on, says when Redis is away, comes back by itself, ends with Ctrl-C."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from rich.console import Console

from pipeline.connection import Link
from pipeline.settings import RedisSettings
from pipeline.status import follow
from tests.cli.conftest import clean_environment
from tests.conftest import wait_until
from tests.faults.proxy import Proxy
from tests.servers import RedisServer

EVERY_S = 0.02


class Screen:
    """What was shown since the last look."""

    def __init__(self) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, width=80, height=24, force_terminal=True, color_system=None)

    def forget(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    async def until(self, words: str, but_not: str = "\0") -> None:
        """Wait for a picture that comes from now on, with *words* and without *but_not*."""
        self.forget()

        def is_shown() -> bool:
            shown = self.file.getvalue().split("\x1b[H")[1:]  # each picture begins in the upper left corner
            return any(words in one and but_not not in one for one in shown)

        await wait_until(is_shown)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that a test may stop."""
    with RedisServer() as server:
        yield server


@asynccontextmanager
async def following(url: str, reply_timeout_s: float = 0.2) -> AsyncIterator[Screen]:
    screen = Screen()
    settings = RedisSettings(url=url, reply_timeout_s=reply_timeout_s, connect_timeout_s=reply_timeout_s)
    task = asyncio.create_task(follow(lambda: Link(settings, "penstock"), screen.console, EVERY_S))
    try:
        yield screen
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()


async def test_redis_may_go_away_and_come_back(own_redis: RedisServer) -> None:
    """Said plainly, above the last picture, and taken back as soon as it is over: stopped, frozen, started anew."""
    async with following(own_redis.url) as screen:
        await screen.until("0 jobs alive", but_not="away")
        own_redis.pause()
        await screen.until("Redis is away")
        own_redis.resume()
        await screen.until("0 jobs alive", but_not="away")
        own_redis.stop()
        await screen.until("Below is what was last seen")
        own_redis.start()
        await screen.until("0 jobs alive", but_not="away")


async def test_a_slow_redis_is_not_told_to_be_away(own_redis: RedisServer) -> None:
    """A look is some fifty commands, which take longer together than one may; what counts is each of them."""
    async with Proxy(own_redis.socket) as proxy:
        proxy.slow(0.03)
        async with following(proxy.redis_url, reply_timeout_s=1.0) as screen:
            await screen.until("0 jobs alive", but_not="Redis is")


async def test_a_redis_that_was_never_there_is_waited_for(own_redis: RedisServer) -> None:
    """Started too early, it says what is missing."""
    own_redis.stop()
    async with following(own_redis.url) as screen:
        await screen.until("--redis-url")
        own_redis.start()
        await screen.until("no worker", but_not="away")


async def test_a_key_of_a_wrong_type_is_told_and_looked_at_again(own_redis: RedisServer) -> None:
    """An operator sees which, mends it, and the table is back."""
    async with following(own_redis.url) as screen:
        link = Link(RedisSettings(url=own_redis.url), "test")
        await link.call("SET", "job:dead", "a string")
        await screen.until("WRONGTYPE")
        await link.call("DEL", "job:dead")
        await screen.until("0 jobs alive", but_not="No picture")
        await link.close()


async def test_on_a_terminal_it_goes_on_until_ctrl_c(own_redis: RedisServer) -> None:
    """And that is its proper end: exit code 0, the last picture stays."""
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "penstock", "status", "--every", "0.1", "--redis-url", own_redis.url],
        cwd="/",
        env=clean_environment(TERM="xterm", COLUMNS="80", LINES="24"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs do not have
    )
    os.close(slave)
    shown = bytearray()
    loop = asyncio.get_running_loop()
    loop.add_reader(master, lambda: shown.extend(_read(loop, master)))
    try:
        await wait_until(lambda: shown.count(b"0 jobs alive") >= 3)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        await wait_until(lambda: shown.rpartition(b"\x1b[?1049l")[2].count(b"0 jobs alive") == 1)
        assert b"Traceback" not in shown
    finally:
        loop.remove_reader(master)
        os.close(master)


def _read(loop: asyncio.AbstractEventLoop, terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # the other end is closed
        loop.remove_reader(terminal)
        return b""
