"""The recorder as a process among others, killed again and again while PostgreSQL restarts: no record is missing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest

from pipeline import keys
from pipeline.records import Event, Records
from tests.conftest import wait_until
from tests.history.conftest import a_postgres, new_database
from tests.postgres import PostgresServer
from tests.whole.system import END_S, System, outside, penstock

MESSAGES = 2_000


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL that this test may restart."""
    with a_postgres() as running:
        yield running


def events(number: int) -> list[Event]:
    asked = {"batch_id": f"b{number // 10}", "position": number % 10, "prompt": f"p{number}", "created_ms": number}
    ended = {"status": "completed", "result": {"answer": f"a{number}"}, "finished_us": 1_000}
    return [
        Event("message", f"m{number}", "default", 0, 1, asked),
        Event("message", f"m{number}", "default", 10, 1, ended),
    ]


async def test_no_record_is_missing_after_kills_and_a_restart_of_the_database(server: PostgresServer) -> None:
    """`kill -9` strikes between commit and acknowledgement as anywhere else; each row is there once, and whole."""
    url = await new_database(server)
    with System(DATABASE_URL=url, PENSTOCK_HISTORY__BATCH="20") as system:
        async with outside(system) as whole:

            async def tell() -> None:
                for number in range(MESSAGES):
                    for event in reversed(events(number)):
                        await whole.redis.xadd(keys.EVENTS, event.fields())

            async def backlog() -> int:
                return int(await whole.redis.xlen(keys.EVENTS))

            telling = asyncio.create_task(tell())
            for strike in range(4):
                left = await written(url)
                await wait_until(lambda: has_grown(url, left), timeout_s=END_S)  # noqa: B023 - used at once
                killed = system.kill("recorder", signal.SIGKILL)
                if strike == 1:
                    server.crash()
                    server.start()
                await wait_until(lambda: system.pid_of("recorder") not in {None, killed}, timeout_s=END_S)  # noqa: B023
            await telling

            async def is_written() -> bool:
                return await backlog() == 0

            await wait_until(is_written, timeout_s=END_S)
            assert await whole.redis.xlen(keys.DEAD) == 0
            code, said, _ = await penstock("status", "--once", "--data-dir", str(system.data_dir))
            assert (code, "recorder" in said) == (0, True)
    records = Records.open(url)
    found: dict[str, tuple[str, str]] = {}
    after = None
    while True:
        rows, after = await records.messages("default", after=after, limit=1_000)
        found |= {row["message_id"]: (row["prompt"], row["result"]["answer"]) for row in rows}
        if after is None:
            break
    await records.close()
    assert found == {f"m{number}": (f"p{number}", f"a{number}") for number in range(MESSAGES)}


async def written(url: str) -> int:
    """Return how many messages the database has; 0 while it has no tables or is away."""
    import asyncpg

    try:
        connection = await asyncpg.connect(url)
    except (OSError, asyncpg.PostgresError):
        return 0
    try:
        return int(await connection.fetchval("SELECT count(*) FROM messages"))
    except asyncpg.PostgresError:
        return 0
    finally:
        await connection.close()


async def has_grown(url: str, before: int) -> bool:
    return await written(url) > before or before >= MESSAGES
