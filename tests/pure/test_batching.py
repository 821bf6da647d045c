"""Calls that gather: together under load, alone at rest, each with its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pipeline.batching import MOST, Batcher
from tests.conftest import PATIENCE_S


class Sender:
    """Notes every batch; doubles each record; waits for `go` first when told to."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()
        self.error: Exception | None = None
        if not held:
            self.go.set()

    async def __call__(self, records: Sequence[int]) -> list[int]:
        self.batches.append(list(records))
        await self.go.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return [2 * record for record in records]


async def test_record_at_rest_leaves_at_once() -> None:
    """Nothing waits for company."""
    sender = Sender()
    batcher: Batcher[int, int] = Batcher(sender)
    assert [await batcher.add(1), await batcher.add(2)] == [2, 4]
    assert sender.batches == [[1], [2]]
    await batcher.close()


async def test_records_under_load_travel_together_and_in_order() -> None:
    """Those that come while a call is under way go with the next, at most so many."""
    sender = Sender(held=True)
    batcher: Batcher[int, int] = Batcher(sender)
    tasks = [asyncio.create_task(batcher.add(number)) for number in range(3 * MOST)]
    while not sender.batches:
        await asyncio.sleep(0)
    sender.go.set()
    assert await asyncio.gather(*tasks) == [2 * number for number in range(3 * MOST)]
    assert [number for batch in sender.batches for number in batch] == list(range(3 * MOST))
    assert max(len(batch) for batch in sender.batches) == MOST
    await batcher.close()


async def test_error_is_told_to_its_batch_and_no_other() -> None:
    """The next batch is sent."""
    sender = Sender(held=True)
    batcher: Batcher[int, int] = Batcher(sender)
    first = [asyncio.create_task(batcher.add(number)) for number in range(3)]
    while not sender.batches:
        await asyncio.sleep(0)
    second = asyncio.create_task(batcher.add(9))
    await asyncio.sleep(0)
    sender.error = ValueError("refused")
    sender.go.set()
    results = await asyncio.gather(*first, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 3
    assert await second == 18
    await batcher.close()


async def test_caller_that_gave_up_takes_its_record_back() -> None:
    """Unless it is under way already."""
    sender = Sender(held=True)
    batcher: Batcher[int, int] = Batcher(sender)
    sent = asyncio.create_task(batcher.add(1))
    while not sender.batches:
        await asyncio.sleep(0)
    waiting = [asyncio.create_task(batcher.add(number)) for number in (2, 3)]
    await asyncio.sleep(0)
    sent.cancel()
    waiting[0].cancel()
    sender.go.set()
    assert await waiting[1] == 6
    assert sender.batches == [[1], [3]]
    await batcher.close()


async def test_closing_leaves_nobody_waiting() -> None:
    """Those under way and those not yet sent."""
    sender = Sender(held=True)
    batcher: Batcher[int, int] = Batcher(sender)
    tasks = [asyncio.create_task(batcher.add(number)) for number in range(2 * MOST)]
    while not sender.batches:
        await asyncio.sleep(0)
    await batcher.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_wrong_number_of_answers_leaves_nobody_waiting() -> None:
    """A defect of the sender must not hang its callers."""

    async def short(records: Sequence[int]) -> list[int]:
        return []

    batcher: Batcher[int, int] = Batcher(short)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ValueError):
            await batcher.add(1)
    await batcher.close()


async def test_records_of_one_caller_get_their_answers_in_order() -> None:
    """Also when they are more than one call carries; nothing is sent for none."""
    sender = Sender()
    batcher: Batcher[int, int] = Batcher(sender)
    assert await batcher.add_all(range(2 * MOST + 1)) == [2 * number for number in range(2 * MOST + 1)]
    assert [len(batch) for batch in sender.batches] == [MOST, MOST, 1]
    assert not await batcher.add_all([])
    assert len(sender.batches) == 3
    await batcher.close()


async def test_caller_with_a_bound_takes_its_record_back_in_time() -> None:
    """What was not sent until then is not sent later."""
    sender = Sender(held=True)
    batcher: Batcher[int, int] = Batcher(sender)
    first = asyncio.create_task(batcher.add(1))
    while not sender.batches:
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await batcher.add(2, within_s=0.01)
    sender.go.set()
    assert await first == 2
    assert await batcher.add(3) == 6
    assert sender.batches == [[1], [3]]
    await batcher.close()


async def test_pause_ends_with_the_call_under_way_or_its_bound() -> None:
    """And is none where nothing is under way."""
    sender = Sender(held=True)
    batcher: Batcher[int, int] = Batcher(sender)
    async with asyncio.timeout(PATIENCE_S):
        await batcher.pause(60)
        sending = asyncio.create_task(batcher.add(1))
        while not sender.batches:
            await asyncio.sleep(0)
        await batcher.pause(0.01)
        assert not sending.done()
        pause = asyncio.create_task(batcher.pause(60))
        await asyncio.sleep(0)
        sender.go.set()
        await pause
    assert await sending == 2
    await batcher.close()


async def test_pause_ends_where_all_was_taken_back() -> None:
    """Nothing is sent then, and nothing to be waited for."""
    sender = Sender()
    batcher: Batcher[int, int] = Batcher(sender)
    assert await batcher.add(1) == 2
    taken_back = asyncio.create_task(batcher.add(2))
    await asyncio.sleep(0)
    taken_back.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await batcher.pause(2 * PATIENCE_S)
    assert sender.batches == [[1]]
    await batcher.close()


async def test_sender_that_ended_is_followed_by_another() -> None:
    """Whatever it was that it waited for was cancelled: others are sent all the same."""
    batches: list[list[int]] = []

    async def cancelled_once(records: Sequence[int]) -> list[int]:
        batches.append(list(records))
        if len(batches) == 1:
            raise asyncio.CancelledError
        return list(records)

    batcher: Batcher[int, int] = Batcher(cancelled_once)
    with pytest.raises(asyncio.CancelledError):
        await batcher.add(1)
    async with asyncio.timeout(PATIENCE_S):
        assert await batcher.add(2) == 2
    await batcher.close()


async def test_what_comes_while_it_closes_is_not_sent() -> None:
    """It is cancelled with the rest, and nothing runs on."""
    sender = Sender(held=True)
    batcher: Batcher[int, int] = Batcher(sender)
    first = asyncio.create_task(batcher.add(1))
    while not sender.batches:
        await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    late = asyncio.create_task(batcher.add(2))
    await closing
    results = await asyncio.gather(first, late, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert sender.batches == [[1]]
