"""Calls that gather: records that come while one script call is under way travel together in the next.

At rest a record leaves at once; under load one call carries many. This is what makes a hand-over cheap.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Final, Generic, TypeVar

from pipeline.limit import Limit, Patience

MOST: Final = 64
"""Records in one call: Redis serves nobody else meanwhile, and 64 settles take it about a millisecond."""

R = TypeVar("R")
A = TypeVar("A")


class _Caller(Generic[R, A]):
    """Some records that travel together, at most MOST, and who waits for their answers."""

    __slots__ = ("future", "records")

    def __init__(self, records: Sequence[R], future: asyncio.Future[Sequence[A]]) -> None:
        self.records = records
        self.future = future


class Batcher(Generic[R, A]):
    """Sends records through *send* in batches, one batch at a time, in order.

    *send* takes the records of one batch and returns one answer for each; what it raises is raised to everyone in that
    batch. A caller that is cancelled while its record waits takes it back; once sent, it goes its way.
    """

    def __init__(self, send: Callable[[Sequence[R]], Awaitable[Sequence[A]]]) -> None:
        self._send = send
        self._waiting: deque[_Caller[R, A]] = deque()
        self._sender: asyncio.Task[None] | None = None  # one for good: a task for each batch costs as much as a call
        self._idle: asyncio.Future[None] | None = None  # what the sender waits for while there is nothing to send
        self._answered = asyncio.Event()  # set at the end of each call
        self._limit = Limit()
        self._patience = Patience()

    async def add(self, record: R, *, within_s: float | None = None) -> A:
        """Send *record* with the next batch and return its answer; `TimeoutError` when that takes longer than told."""
        future = self._enqueue((record,))
        return (await (future if within_s is None else self._patience.wait(future, within_s)))[0]

    async def add_all(self, records: Sequence[R]) -> Sequence[A]:
        """Send *records* with the next batches and return their answers, in order."""
        if not records:
            return ()
        if len(records) <= MOST:
            return await self._enqueue(records)
        portions = [self._enqueue(records[first : first + MOST]) for first in range(0, len(records), MOST)]
        return list(chain.from_iterable(await asyncio.gather(*portions)))

    async def pause(self, at_most_s: float) -> None:
        """Wait for the call that is under way, if any, for a while at most: what is made then travels together."""
        if not self._is_sending:
            return
        self._answered.clear()
        with suppress(TimeoutError), self._limit.of(at_most_s):
            await self._answered.wait()

    async def close(self) -> None:
        """Stop sending; whoever still waits is cancelled."""
        if (sender := self._sender) is not None:
            sender.cancel()
            with suppress(asyncio.CancelledError):
                await sender
            self._sender = None
        while self._waiting:
            self._waiting.popleft().future.cancel()

    @property
    def _is_sending(self) -> bool:
        return self._has_sender and (self._idle is None or self._idle.done())

    @property
    def _has_sender(self) -> bool:
        return self._sender is not None and not self._sender.done()

    def _enqueue(self, records: Sequence[R]) -> asyncio.Future[Sequence[A]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[A]] = loop.create_future()
        self._waiting.append(_Caller(records, future))
        if not self._has_sender:
            self._sender = loop.create_task(self._send_forever(), name="batcher")
        elif self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        return future

    async def _send_forever(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                while callers := self._next():
                    await self._send_for(callers)
                    self._answered.set()
                self._answered.set()  # also where all was taken back
                self._idle = loop.create_future()
                await self._idle
                self._idle = None
        finally:
            self._idle = None
            self._answered.set()

    async def _send_for(self, callers: Sequence[_Caller[R, A]]) -> None:
        records = callers[0].records
        if len(callers) > 1:
            records = [record for caller in callers for record in caller.records]
        try:
            answers = await self._answers_to(records)
        except asyncio.CancelledError:
            for caller in callers:
                caller.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
            for caller in callers:
                if not caller.future.done():
                    caller.future.set_exception(error)
            return
        first = 0
        for caller in callers:
            end = first + len(caller.records)
            if not caller.future.done():
                caller.future.set_result(answers[first:end])
            first = end

    async def _answers_to(self, records: Sequence[R]) -> Sequence[A]:
        answers = await self._send(records)
        if len(answers) != len(records):
            raise ValueError(f"{len(answers)} answers came for {len(records)} records")
        return answers

    def _next(self) -> list[_Caller[R, A]]:
        """Return those whose records are to travel now, without what was taken back."""
        callers: list[_Caller[R, A]] = []
        left = MOST
        while self._waiting and len(self._waiting[0].records) <= left:
            caller = self._waiting.popleft()
            if not caller.future.done():
                callers.append(caller)
                left -= len(caller.records)
        return callers

    def __repr__(self) -> str:
        return f"<Batcher waiting={len(self._waiting)} sending={self._is_sending}>"
