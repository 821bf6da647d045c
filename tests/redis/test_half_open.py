"""Half-open connections: each of a worker's dies silently, one at a time, and the worker goes on by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pipeline import metrics
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.rig import FIRST, Gate, Mortal, Scripted, assert_nothing_is_left, changed, echo, prompt, working
from tests.servers import RedisServer
from tests.wire import Wire


@pytest.fixture
async def wire(link: Link, redis_server: RedisServer) -> AsyncIterator[Wire]:
    async with Wire(redis_server) as one:
        yield one


@pytest.fixture
def wired(settings: Settings, wire: Wire) -> Settings:
    """Settings of workers whose connections can die silently."""
    return changed(settings, redis={"url": wire.url}, llm={"urls": (FIRST,)})


def count_renewals(consumer: Mortal) -> list[int]:
    """Return a list that grows with every renewal that Redis answered."""
    done: list[int] = []
    run = consumer._link.run

    async def counted(*args: object, **more: object) -> object:
        reply = await run(*args, **more)  # type: ignore[arg-type]  # passes on what it was given
        done.append(len(done))
        return reply

    consumer._link.run = counted  # type: ignore[method-assign]  # counts
    return done


async def test_lease_does_not_wait_for_another_connection(
    link: Link, wired: Settings, wire: Wire, front: Front
) -> None:
    """Taking up and registering go over the control connection; what hangs there costs no lease."""
    lost = metrics.LEASES_LOST._value.get()
    gate = Gate()
    async with working(wired, [Scripted("llm", gate, placed=True), Scripted("encoder", echo)]) as (consumer, _):
        job = prompt(front)
        await front.submit(job)
        await wait_until(lambda: gate.waiting)
        wire.kill("llm-control")
        renewals = count_renewals(consumer)
        await wait_until(lambda: len(renewals) == 6, timeout_s=4)  # two leases long
        assert metrics.LEASES_LOST._value.get() == lost
        gate.open()
        assert (await front.wait(job.id, job.tenant, job.deadline_ms)).status == "completed"
        assert gate.stopped == []
    await assert_nothing_is_left(link)


async def test_dead_lease_connection_is_replaced_within_the_lease(
    link: Link, wired: Settings, wire: Wire, front: Front
) -> None:
    """The renewal's own reply is waited for a third of a lease, however long others wait for theirs."""
    lost = metrics.LEASES_LOST._value.get()
    async with working(changed(wired, worker={"lease_s": 2.0}), [Scripted("encoder", echo)]) as (consumer,):
        renewals = count_renewals(consumer)
        await wait_until(lambda: renewals)
        wire.kill("lease")
        seen = len(renewals)
        await wait_until(lambda: len(renewals) == seen + 2, timeout_s=4)
        assert metrics.LEASES_LOST._value.get() == lost
