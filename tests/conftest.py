"""What every test may ask for: a private Redis, workers on it, and a watch on what is left behind."""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from pipeline import keys
from pipeline.connection import Link
from pipeline.settings import RedisSettings, Settings, load
from tests.servers import RedisServer


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One real server per test process."""
    with RedisServer() as server:
        yield server


@pytest.fixture
async def link(redis_server: RedisServer) -> AsyncIterator[Link]:
    """A connection to an empty Redis; afterwards no key may be left that could grow for ever."""
    connection = Link(RedisSettings(url=redis_server.url), "test")
    await connection.call("FLUSHALL")
    yield connection
    try:
        leaked = await unbounded_keys(connection)
    finally:
        await connection.close()
    assert not leaked, f"keys without a TTL that are not on the bounded list: {leaked}"


@pytest.fixture
def settings(redis_server: RedisServer) -> Settings:
    """Settings with short spans, so that no test waits long."""
    return load({"REDIS_URL": redis_server.url, "PENSTOCK_WORKER__LEASE_S": "1", "PENSTOCK_WORKER__DRAIN_S": "2"})


async def unbounded_keys(connection: Link) -> list[str]:
    """Return the keys that have no TTL and are not on the list of bounded ones."""
    names = [name.decode() for name in await connection.call("KEYS", "*")]
    strangers = [n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in keys.BOUNDED)]
    return sorted([name for name in strangers if await connection.call("PTTL", name) == -1])


async def wait_until(
    condition: Callable[[], Awaitable[object] | object], *, timeout_s: float = 10.0, every_s: float = 0.01
) -> None:
    """Wait until *condition* holds; fail loudly when it does not."""
    async with asyncio.timeout(timeout_s):
        while True:
            held = condition()
            if isinstance(held, Awaitable):
                held = await held
            if held:
                return
            await asyncio.sleep(every_s)
