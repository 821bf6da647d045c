"""One running system for many tests: each finds it ready and must leave it idle."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator

import pytest

from tests.whole.system import Outside, System, outside

LOG_CHARS = 5_000
LOGGED_BEFORE = pytest.StashKey[int]()
"""How much the log held when a test began, in bytes."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show beside a failure what the system has logged since the test began: what was before is another test's."""
    report = yield
    running = getattr(item, "funcargs", {}).get("system")
    if report.failed and isinstance(running, System):
        logged = running.log.read_bytes()[item.stash.get(LOGGED_BEFORE, 0) :].decode(errors="replace")
        report.sections.append(("log of `penstock up`", logged[-LOG_CHARS:]))
    return report


@pytest.fixture(scope="session")
def system() -> Iterator[System]:
    """One system per test process, with three mock replicas."""
    with System() as running:
        yield running


@pytest.fixture
async def whole(system: System, request: pytest.FixtureRequest) -> AsyncIterator[Outside]:
    """The shared system, ready; afterwards nothing may be left in it: no work, no call, no lease, no endless key."""
    async with outside(system) as connected:
        request.node.stash[LOGGED_BEFORE] = system.log.stat().st_size
        await connected.until_ready()
        await connected.reset()
        yield connected
        await connected.until_ready()
        await connected.reset()  # what is left ends the sooner
        await connected.until_idle()
