"""Any process may be killed or frozen at any moment: what was accepted is answered, or reported as failed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Final

import pytest

from tests.cli.conftest import lives
from tests.conftest import wait_until
from tests.whole.system import END_S, LEASE_S, SLACK_S, Outside, System, outside

CALL_S: Final = 0.5
PARTS: Final = 15  # of `up`; the last one starts when the others are ready


async def kill_with_work_in_hand(whole: Outside, stage: str) -> list[str]:
    """Kill a stage's process at an instant when it held jobs; return their ids."""
    pid = whole.system.pid_of(stage)
    assert pid is not None
    held: list[str] = []
    try:
        while not held:
            os.kill(pid, signal.SIGSTOP)  # frozen, it keeps what it holds while we look
            held = await whole.pending(stage)
            if not held:
                os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(0)
    finally:
        os.kill(pid, signal.SIGKILL)
    return held


@pytest.mark.parametrize("stage", ["encoder", "retriever", "llm"])
async def test_work_of_a_killed_stage_is_done_by_its_successor(whole: Outside, stage: str) -> None:
    """SIGKILL under load, with work in hand: all is answered. How soon what it held, the fault suite tells."""
    if stage == "llm":
        await whole.behave(latency=CALL_S)
    async with whole.under_load(20) as load:
        held = await kill_with_work_in_hand(whole, stage)
        await wait_until(lambda: whole.works(whole.system.pid_of(stage)), timeout_s=END_S)
        await wait_until(lambda: set(held) <= {reply.body.get("job_id") for reply in load.replies}, timeout_s=END_S)
    assert set(load.statuses()) == {200}


async def test_jobs_outlive_the_gateway_that_accepted_them(whole: Outside) -> None:
    """SIGKILL under load: its clients lose their connections, its background jobs are done, and it comes back."""
    await whole.behave(latency=CALL_S)
    async with whole.under_load(20) as load:
        accepted = [(await whole.ask(background=True)).body["job_id"] for _ in range(20)]
        killed = whole.system.kill("gateway", signal.SIGKILL)
        await wait_until(lambda: whole.system.pid_of("gateway") not in {None, killed}, timeout_s=END_S)
        await whole.until_ready()
        outcomes = [await whole.outcome(job_id) for job_id in accepted]
        answered = load.statuses()[200]
        await wait_until(lambda: load.statuses()[200] > answered, timeout_s=END_S)
    assert {outcome["status"] for outcome in outcomes} == {"completed"}
    assert set(load.statuses()) <= {0, 200}


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
async def test_an_outage_of_redis_is_said_at_once_and_survived(whole: Outside, end: signal.Signals) -> None:
    """Frozen for longer than a lease, then thawed or killed: 503 at once, and what was accepted is answered."""
    await whole.behave(latency=CALL_S)
    waiting = [asyncio.create_task(whole.ask()) for _ in range(10)]
    accepted = [(await whole.ask(background=True)).body["job_id"] for _ in range(10)]
    frozen = whole.system.kill("redis", signal.SIGSTOP)
    try:
        frozen_s = time.monotonic()
        while time.monotonic() < frozen_s + LEASE_S:
            reply = await whole.ask()
            assert reply.status == 503
            assert reply.body["error"]["code"] == "redis_unavailable"
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.took_s < SLACK_S
        readiness = await whole.send("GET", "/readyz")
        assert (readiness.status, (await whole.send("GET", "/livez")).status) == (503, 200)
        assert readiness.body["redis"]
    finally:
        os.kill(frozen, end)
    assert {reply.status for reply in await asyncio.gather(*waiting)} == {200}
    assert {(await whole.outcome(job_id))["status"] for job_id in accepted} == {"completed"}
    await whole.until_ready()
    assert (await whole.ask()).status == 200


async def test_sigterm_answers_what_was_accepted_and_leaves_no_process() -> None:
    """Under load `up` drains: every question that was accepted has its answer, the exit code is 0."""
    with System(PENSTOCK_WORKER__DRAIN_S=f"{END_S / 2:g}") as own:
        async with outside(own) as whole:
            await whole.behave(latency=CALL_S)
            asked = [asyncio.create_task(whole.ask()) for _ in range(40)]
            await wait_until(lambda: whole.has_live_jobs(40), timeout_s=END_S)
            await wait_until(lambda: len(own.children()) == PARTS, timeout_s=END_S)
            children = own.children()
            code = await own.end(signal.SIGTERM)
            replies = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200] * 40
    assert code == 0
    assert not any(lives(pid) for pid in children)


async def test_sigkill_leaves_no_process_and_the_next_start_finishes_the_work() -> None:
    """Nobody can stop its processes in order: all end, and what they held is answered by the next `up`."""
    with System() as own:
        async with outside(own) as whole:
            await whole.behave(latency=60)
            accepted = [(await whole.ask(background=True)).body["job_id"] for _ in range(10)]
            await wait_until(lambda: whole.has_in_hand("llm", 10), timeout_s=END_S)
        children = own.children()
        await own.end(signal.SIGKILL)
        await wait_until(lambda: not any(lives(pid) for pid in children), timeout_s=END_S)
        own.start()
        async with outside(own) as whole:
            outcomes = [await whole.outcome(job_id) for job_id in accepted]
    assert {outcome["status"] for outcome in outcomes} == {"completed"}
