"""A time limit for one call after another: ends what takes too long, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.limit import Alarm, Limit, Patience
from tests.conftest import PATIENCE_S


async def test_call_that_takes_too_long_ends() -> None:
    """As `asyncio.timeout` ends it, and the limit says that it was it."""
    limit = Limit()
    with pytest.raises(TimeoutError), limit.of(0.01):
        await asyncio.Event().wait()
    assert limit.expired
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_timer_that_stands_ends_no_later_call_too_early() -> None:
    """The timer of a call that has ended rings while another is under way: that one has its whole time."""
    limit = Limit()
    for _ in range(5):
        with limit.of(0.02):
            await asyncio.sleep(0)
    with limit.of(PATIENCE_S):
        await asyncio.sleep(0.05)
    assert not limit.expired


async def test_shorter_limit_after_a_longer_one_is_kept() -> None:
    """The timer that stands would ring too late."""
    limit = Limit()
    with limit.of(60.0):
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(TimeoutError), limit.of(0.01):
            await asyncio.Event().wait()
    assert limit.expired


async def test_cancellation_by_others_stays_one() -> None:
    """Also when the limit expires in the same turn."""
    limit = Limit()

    async def call() -> None:
        with limit.of(0.01):
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not limit.expired


async def test_error_inside_comes_out_as_it_is() -> None:
    """A time-out of somebody else is not the limit's."""
    limit = Limit()
    with pytest.raises(TimeoutError, match="the socket's"), limit.of(5.0):
        raise TimeoutError("the socket's")
    assert not limit.expired


async def test_future_is_waited_for_as_long_as_told() -> None:
    """Its answer, or `TimeoutError`; and nothing is left behind in the task."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[int] = loop.create_future()
    patience = Patience()
    loop.call_soon(answered.set_result, 7)
    assert await patience.wait(answered, 5.0) == 7
    with pytest.raises(TimeoutError):
        await patience.wait(loop.create_future(), 0.01)


async def test_alarm_rings_for_each_at_its_time_and_not_for_what_was_cleared() -> None:
    """Also for one that is nearer than all before, and for one that is left when the timer has rung."""
    rung: list[str] = []
    all_rung = asyncio.Event()

    def ring(name: str) -> None:
        rung.append(name)
        if name == "last":
            all_rung.set()

    alarm = Alarm(ring)
    for name, span_s in (("far", 60.0), ("last", 0.06), ("cleared", 0.01), ("first", 0.02)):
        alarm.set(name, span_s)
    alarm.clear("cleared")
    async with asyncio.timeout(PATIENCE_S):
        await all_rung.wait()
    assert rung == ["first", "last"]
