"""Real mock replicas, each in a process of its own, on a port of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import pytest

from tests.conftest import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

ROOT = Path(__file__).parents[2]

_PROGRAM = """
import json, sys
from pathlib import Path
from loadtest.mock import MockOptions, run
options = json.loads(sys.argv[1])
if "record" in options:
    options["record"] = Path(options["record"])
run(MockOptions(**options))
"""


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until *condition* holds.

    Raises:
        TimeoutError: it never did. The bound is the function's own, because pytest's does not cover a second wait in
            the fixture's end.
    """
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Replica:
    """A mock replica's process."""

    process: subprocess.Popen[str]
    url: str


@dataclass(frozen=True)
class Mock:
    """A running mock replica and a client for it."""

    process: subprocess.Popen[str]
    url: str
    session: aiohttp.ClientSession

    def chat(self, text: str, **fields: Any) -> aiohttp.client._RequestContextManager:
        """Ask for a chat completion; *fields* go into the body beside the usual ones, *text* is the request id too."""
        body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
        return self.session.post(f"{self.url}/v1/chat/completions", json=body, headers={"x-request-id": text})

    async def status_of(self, text: str) -> int:
        """Ask, read the whole answer, and return its status."""
        async with self.chat(text) as response:
            await response.read()
            return response.status

    async def behave(self, **fields: Any) -> None:
        """Change the behaviour of the requests that come from now on."""
        async with self.session.post(f"{self.url}/mock/behaviour", json=fields) as response:
            assert response.status == 200, await response.text()

    async def asked(self) -> dict[str, Any]:
        """Return what the replica has on record."""
        async with self.session.get(f"{self.url}/mock/requests") as response:
            record: dict[str, Any] = await response.json()
            return record

    async def shows(self, **counts: int) -> None:
        """Wait until the record has these *counts*, such as running=1."""

        async def has_them() -> bool:
            record = await self.asked()
            return all(record[name] == count for name, count in counts.items())

        await until(has_them)


class StartMock(Protocol):
    """Starts a mock replica with the options given; it is stopped at the end of the test and must end well."""

    def __call__(self, **options: Any) -> Mock: ...


def _start(options: dict[str, Any]) -> Replica:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _PROGRAM, json.dumps({"latency": "0", "models": ["m"], **options})],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready["ready"] == "mock-llm"
    return Replica(process, ready["url"])


def _stop(replica: Replica) -> None:
    with replica.process as process:
        process.terminate()
        assert process.wait(timeout=PATIENCE_S) == 0


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client without limits of its own."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.fixture
def start_mock(session: aiohttp.ClientSession) -> Iterator[StartMock]:
    """Start mock replicas of a test's own, for what is set at the start; the latency is 0 unless it is given."""
    with ExitStack() as stack:

        def start(**options: Any) -> Mock:
            replica = _start(options)
            stack.callback(_stop, replica)
            return Mock(replica.process, replica.url, session)

        yield start


@pytest.fixture(scope="session")
def shared_replica() -> Iterator[Replica]:
    """One replica for all tests that can tell it what to do; a process for each would be most of their time."""
    replica = _start({})
    yield replica
    _stop(replica)


@pytest.fixture
async def mock(shared_replica: Replica, session: aiohttp.ClientSession) -> AsyncIterator[Mock]:
    """The shared replica, as it was at its start, with nothing in hand and nothing on record."""
    mock = Mock(shared_replica.process, shared_replica.url, session)
    yield mock
    await mock.shows(running=0, waiting=0)
    for path in ("behaviour", "requests"):
        async with session.delete(f"{mock.url}/mock/{path}") as response:
            assert response.status == 200
