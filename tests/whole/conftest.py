"""One running system for many tests: each finds it ready and must leave it idle."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator

import pytest

from tests.whole.system import Outside, System, outside

LOG_CHARS = 5_000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the system's log beside a failure."""
    report = yield
    running = getattr(item, "funcargs", {}).get("system")
    if report.failed and isinstance(running, System):
        report.sections.append(("log of `penstock up`", running.log.read_text(errors="replace")[-LOG_CHARS:]))
    return report


@pytest.fixture(scope="session")
def system() -> Iterator[System]:
    """One system per test process, with three mock replicas."""
    with System() as running:
        yield running


@pytest.fixture
async def whole(system: System) -> AsyncIterator[Outside]:
    """The shared system, ready; afterwards nothing may be left in it: no work, no lease, no key without an end."""
    async with outside(system) as connected:
        await connected.until_ready()
        await connected.reset()
        yield connected
        await connected.until_ready()
        await connected.reset()
        await connected.until_idle()
