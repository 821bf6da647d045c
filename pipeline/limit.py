"""Time limits whose timer is seldom touched: for one call after another (`Limit`), and for many at a time (`Alarm`).

`asyncio.timeout` makes a timer for each call and takes it back when the call ends, which costs more than sending a
command to Redis. Here one timer stands until it rings; then it is set anew for what is under way, if anything. So
thousands of calls a second need one timer every few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

A = TypeVar("A")
K = TypeVar("K", bound=Hashable)


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


class Alarm(Generic[K]):
    """Calls *ring* for each of many whose time is over, in that order; what ends before costs an entry in a dict."""

    def __init__(self, ring: Callable[[K], None]) -> None:
        self._ring_for = ring
        self._due_s: dict[K, float] = {}  # on the loop's clock
        self._rings_s = float("inf")
        self._timer: asyncio.TimerHandle | None = None

    def set(self, key: K, span_s: float) -> None:
        """Ring for *key* in *span_s* seconds, unless it is cleared before."""
        loop = asyncio.get_running_loop()
        due_s = self._due_s[key] = loop.time() + span_s
        if due_s < self._rings_s:
            self._stand(loop, due_s)

    def clear(self, key: K) -> None:
        """Do not ring for *key* any more."""
        self._due_s.pop(key, None)

    def _stand(self, loop: asyncio.AbstractEventLoop, rings_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_s = rings_s
        self._timer = loop.call_at(rings_s, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, self._rings_s = None, float("inf")
        now_s = loop.time()
        overdue = [key for key, due_s in self._due_s.items() if due_s <= now_s]
        for key in sorted(overdue, key=self._due_s.__getitem__):
            del self._due_s[key]
            self._ring_for(key)
        if self._due_s:
            self._stand(loop, min(self._due_s.values()))

    def __repr__(self) -> str:
        return f"<Alarm set={len(self._due_s)}>"


class Patience:
    """Bounds many waits at a time."""

    def __init__(self) -> None:
        self._alarm: Alarm[asyncio.Future[Any]] = Alarm(_end)

    async def wait(self, future: asyncio.Future[A], span_s: float) -> A:
        """Return what *future* brings, in *span_s* seconds at most.

        Raises:
            TimeoutError: it took longer; the future has ended with that error too.
        """
        self._alarm.set(future, span_s)
        try:
            return await future
        finally:
            self._alarm.clear(future)


def _end(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
