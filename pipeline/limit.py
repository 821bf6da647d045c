"""A time limit for one call after another, whose timer is seldom touched.

`asyncio.timeout` makes a timer for each call and takes it back when the call ends, which costs more than sending a
command to Redis. Here one timer stands until it rings; then it is set anew for the call that is under way, if any. So
thousands of calls a second need one timer every few seconds.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self, TypeVar

A = TypeVar("A")


class Limit:
    """Bounds one call at a time: `with limit.of(5.0): ...` raises `TimeoutError` as `asyncio.timeout` does.

    Attributes:
        expired: whether it was this limit that ended the last call.
    """

    def __init__(self) -> None:
        self.expired = False
        self._span_s = 0.0
        self._due_s: float | None = None  # on the loop's clock; None while no call is under way
        self._rings_s = float("inf")
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelled_before = 0

    def of(self, span_s: float) -> Self:
        """Return the limit for the next call, in seconds."""
        self._span_s = span_s
        return self

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self.expired = False
        self._task = asyncio.current_task()
        self._cancelled_before = self._task.cancelling() if self._task else 0
        self._due_s = loop.time() + self._span_s
        if self._due_s < self._rings_s:
            self._set(loop, self._due_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task, self._due_s = self._task, None, None
        if self.expired and task is not None:
            # Others may have cancelled the task meanwhile: then that is what ends it.
            alone = task.uncancel() <= self._cancelled_before
            if alone and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _set(self, loop: asyncio.AbstractEventLoop, rings_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_s = rings_s
        self._timer = loop.call_at(rings_s, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, self._rings_s = None, float("inf")
        if self._due_s is None or self._task is None:
            return
        if loop.time() < self._due_s:
            self._set(loop, self._due_s)
            return
        self.expired = True
        self._task.cancel()

    def __repr__(self) -> str:
        return f"<Limit span_s={self._span_s} under_way={self._due_s is not None} expired={self.expired}>"


async def within(future: asyncio.Future[A], span_s: float) -> A:
    """Return what *future* brings, in *span_s* seconds at most.

    For many that wait at the same time: a timer of its own each, yet no task has to be cancelled, as for
    `asyncio.timeout`, so it costs a fifth of that.

    Raises:
        TimeoutError: it took longer; the future has ended with that error too.
    """
    timer = asyncio.get_running_loop().call_later(span_s, _end, future)
    try:
        return await future
    finally:
        timer.cancel()


def _end(future: asyncio.Future[A]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
