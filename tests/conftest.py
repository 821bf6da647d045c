"""What every test may ask for: a private Redis, workers on it, and a watch on what is left behind."""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final

import hypothesis
import pytest
import structlog

from pipeline import keys, streams
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.settings import RedisSettings, Settings, load
from tests.servers import RedisServer

PATIENCE_S: Final = 120.0
"""Of whoever waits for what must come. It ends a hang, and says nothing about how fast anything is: a machine may be
slow, busy, or stand still for seconds."""

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")  # the same examples on every machine, however busy it is


@pytest.fixture(scope="session", autouse=True)
def plain_log() -> None:
    """Tracebacks without the pictures that structlog draws for people: these take longer than the tests."""
    renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, renderer])


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One real server per test process."""
    with RedisServer() as server:
        yield server


@pytest.fixture
async def link(redis_server: RedisServer) -> AsyncIterator[Link]:
    """A connection to an empty Redis; afterwards no endless key, no task and no connection may be left."""
    connection = Link(RedisSettings(url=redis_server.url), "test")
    await connection.call("FLUSHALL")
    before = asyncio.all_tasks()
    yield connection
    try:
        leaked = await unbounded_keys(connection)
        running = {repr(task) for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
        await wait_until(lambda: _only_connection(connection))
    finally:
        await connection.close()
    assert not leaked, f"keys without a TTL that are not on the bounded list: {leaked}"
    assert not running, f"tasks that still run: {running}"


@pytest.fixture
def settings(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with short spans, so that no test waits long."""
    monkeypatch.setattr(streams, "BLOCK_MS", 50)  # a drain waits for the blocked read to end
    return short_settings(redis_server)


@pytest.fixture
async def front(link: Link, settings: Settings) -> AsyncIterator[Front]:
    """The pipeline as a gateway sees it."""
    async with Front(settings, "test") as one:
        yield one


def short_settings(server: RedisServer) -> Settings:
    """Return settings with short spans for *server*."""
    return load(
        {
            "REDIS_URL": server.url,
            "PENSTOCK_REDIS__CONNECT_TIMEOUT_S": "10",  # a loaded machine may stand still for longer than the default
            "PENSTOCK_WORKER__LEASE_S": "1",
            "PENSTOCK_WORKER__DRAIN_S": "2",
            "PENSTOCK_DELIVERIES__DRAIN_S": "2",
            "PENSTOCK_RETRY__BASE_S": "0.02",
            "PENSTOCK_RETRY__CAP_S": "0.1",
        }
    )


async def _only_connection(connection: Link) -> bool:
    return len((await connection.call("CLIENT", "LIST")).splitlines()) == 1


async def unbounded_keys(connection: Link) -> list[str]:
    """Return the keys that have no TTL and are not on the list of bounded ones."""
    names = [name.decode() for name in await connection.call("KEYS", "*")]
    strangers = [n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in keys.BOUNDED)]
    return sorted([name for name in strangers if await connection.call("PTTL", name) == -1])


async def wait_until(
    condition: Callable[[], Awaitable[object] | object], *, timeout_s: float = PATIENCE_S, every_s: float = 0.01
) -> None:
    """Wait until *condition* holds; fail loudly when it does not.

    The clock is looked at between two looks, too: the one cancellation of `asyncio.timeout` may get lost in what the
    condition calls (redis-py 8.1 loses it now and then), and this would go on for ever.
    """
    async with asyncio.timeout(timeout_s) as limit:
        while not limit.expired():
            held = condition()
            if isinstance(held, Awaitable):
                held = await held
            if held:
                return
            await asyncio.sleep(every_s)
        raise TimeoutError
