"""Many questions at once: all answered, spread evenly, counted truly."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from pipeline import keys
from tests.conftest import wait_until
from tests.whole.system import END_S, Outside, calls_of

IN_FLIGHT: Final = 50
CALL_S: Final = 0.2
"""Long beside what the questions cost this machine: replicas that wait for a processor are not alike."""
LOOKS: Final = 1_000

LOADS = """
local answer = {}
for _, url in ipairs(ARGV) do
  answer[#answer + 1] = tonumber(redis.call('GET', KEYS[1] .. url) or '0')
  answer[#answer + 1] = redis.call('ZCARD', KEYS[2] .. url)
end
return answer
"""
"""Load string and live leases of each replica, read in one script."""


async def test_five_hundred_questions_are_answered_by_all_replicas_alike(whole: Outside) -> None:
    """500 at 50 in flight over three replicas: each is answered by one call, and the shares differ by 10 % at most.

    A machine that stands still for a moment makes replicas look unlike: then they are asked once more.
    """

    async def all_alike() -> bool:
        await whole.reset()
        await whole.behave(latency=CALL_S)
        replies = await whole.ask_many(500, IN_FLIGHT)
        assert Counter(reply.status for reply in replies) == {200: 500}
        calls = {url: await whole.records(url) for url in whole.system.replicas}
        made = calls_of(record for records in calls.values() for record in records)
        assert set(made.values()) == {1}
        # A client that was refused, for want of an answer in time, asks again what may have been accepted all the same.
        assert made.keys() >= {reply.body["job_id"] for reply in replies}
        shares = sorted(len(records) for records in calls.values())
        await whole.until_idle()
        return shares[-1] <= 1.1 * shares[0]

    await wait_until(all_alike, timeout_s=2 * END_S)


async def test_load_equals_leases_at_every_look(whole: Outside) -> None:
    """1,000 looks under load, each at all replicas in one script: the string and the leases are never unequal."""
    await whole.behave(latency=CALL_S)
    busy = 0
    async with whole.under_load(IN_FLIGHT):
        for _ in range(LOOKS):
            found = await whole.redis.eval(LOADS, 2, keys.LOAD, keys.LEASES, *whole.system.replicas)
            assert found[::2] == found[1::2]
            busy += any(found)
            await asyncio.sleep(0)
    assert busy > LOOKS / 2
