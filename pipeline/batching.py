"""Calls that gather: records that come while one script call is under way travel together in the next.

At rest a record leaves at once; under load one call carries many. This is what makes a hand-over cheap.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, Generic, TypeVar

from pipeline.limit import Limit, Patience

MOST: Final = 64
"""Records in one call: Redis serves nobody else meanwhile, and 64 settles take it about a millisecond."""

R = TypeVar("R")
A = TypeVar("A")


class _Caller(Generic[A]):
    """Who waits for the answers to some records; they may come with more than one call."""

    __slots__ = ("_answers", "_records", "future")

    def __init__(self, records: int) -> None:
        self.future: asyncio.Future[list[A]] = asyncio.get_running_loop().create_future()
        self._answers: list[A] = []  # in order, since records travel in order
        self._records = records

    def answer(self, answer: A) -> None:
        self._answers.append(answer)
        if len(self._answers) == self._records and not self.future.done():
            self.future.set_result(self._answers)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Batcher(Generic[R, A]):
    """Sends records through *send* in batches, one batch at a time, in order.

    *send* takes the records of one batch and returns one answer for each; what it raises is raised to everyone in that
    batch. A caller that is cancelled while its record waits takes it back; once sent, it goes its way.
    """

    def __init__(self, send: Callable[[Sequence[R]], Awaitable[Sequence[A]]]) -> None:
        self._send = send
        self._waiting: deque[tuple[R, _Caller[A]]] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()  # set at the end of each call
        self._limit = Limit()
        self._patience = Patience()

    async def add(self, record: R, *, within_s: float | None = None) -> A:
        """Send *record* with the next batch and return its answer; `TimeoutError` when that takes longer than told."""
        return (await self.add_all((record,), within_s=within_s))[0]

    async def add_all(self, records: Sequence[R], *, within_s: float | None = None) -> list[A]:
        """Send *records* with the next batches and return their answers, in order."""
        if not records:
            return []
        caller: _Caller[A] = _Caller(len(records))
        self._waiting.extend([(record, caller) for record in records])
        if self._sender is None:
            self._sender = asyncio.create_task(self._drain(), name="batcher")
        return await (caller.future if within_s is None else self._patience.wait(caller.future, within_s))

    async def pause(self, at_most_s: float) -> None:
        """Wait for the call that is under way, if any, for a while at most: what is made then travels together."""
        if self._sender is None:
            return
        self._answered.clear()
        with suppress(TimeoutError), self._limit.of(at_most_s):
            await self._answered.wait()

    async def close(self) -> None:
        """Stop sending; whoever still waits is cancelled."""
        if self._sender is not None:
            self._sender.cancel()
            with suppress(asyncio.CancelledError):
                await self._sender
        while self._waiting:
            self._waiting.popleft()[1].future.cancel()

    async def _drain(self) -> None:
        try:
            while batch := self._next():
                try:
                    answers = await self._send([record for record, _ in batch])
                    pairs = list(zip(batch, answers, strict=True))
                except asyncio.CancelledError:
                    for _, caller in batch:
                        caller.future.cancel()
                    raise
                except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
                    for _, caller in batch:
                        caller.fail(error)
                else:
                    for (_, caller), answer in pairs:
                        caller.answer(answer)
                self._answered.set()
        finally:
            self._sender = None
            self._answered.set()

    def _next(self) -> list[tuple[R, _Caller[A]]]:
        """Return what is to travel now, without what was taken back."""
        batch: list[tuple[R, _Caller[A]]] = []
        while self._waiting and len(batch) < MOST:
            item = self._waiting.popleft()
            if not item[1].future.done():
                batch.append(item)
        return batch

    def __repr__(self) -> str:
        return f"<Batcher waiting={len(self._waiting)} sending={self._sender is not None}>"
