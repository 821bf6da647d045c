"""The deadlines of jobs that are handled together: each job is let go in time, and its mates go on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipeline.errors import DeadlineExceeded

if TYPE_CHECKING:
    from pipeline.clock import Clock
    from pipeline.handling import Held
    from pipeline.job import Job
    from pipeline.limit import Alarm


class Deadlines:
    """An async context around one call for several jobs.

    A job whose deadline comes meanwhile is let go by *let_go*, beside the call; when none is left, the call is
    cancelled and `TimeoutError` raised. The context ends when all that was let go is settled.

    Attributes:
        are_over: no job was left, so nobody wants what the call says.
    """

    def __init__(
        self,
        jobs: Sequence[tuple[Held, Job]],
        clock: Clock,
        let_go: Callable[[Held, Job, DeadlineExceeded], Awaitable[None]],
        alarm: Alarm[Deadlines],
    ) -> None:
        """Watch over *jobs*; *alarm* calls `ring`."""
        self.are_over = False
        self._left = [(held, job) for held, job in jobs if not held.settling]
        self._clock = clock
        self._let_go = let_go
        self._letting_go: list[asyncio.Future[None]] = []
        self._alarm = alarm

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._cancelled_before = self._task.cancelling() if self._task else 0
        self._wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alarm.clear(self)
        ours = self.are_over and self._task is not None and self._task.uncancel() <= self._cancelled_before
        cancelled = kind is asyncio.CancelledError and not ours
        if self._letting_go:
            if cancelled:
                for letting_go in self._letting_go:
                    letting_go.cancel()
            await asyncio.gather(*self._letting_go, return_exceptions=cancelled)
        if ours and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _wait(self) -> None:
        next_ms = min(job.deadline_ms for _, job in self._left)
        self._alarm.set(self, max(0.0, (next_ms - self._clock.now_ms()) / 1000))

    def ring(self) -> None:
        """Let go what is due."""
        now_ms = self._clock.now_ms()
        for held, job in self._left:
            if job.deadline_ms <= now_ms and not held.settling:
                held.settling = True
                self._letting_go.append(asyncio.ensure_future(self._let_go(held, job, DeadlineExceeded())))
        self._left = [(held, job) for held, job in self._left if not held.settling]
        if self._left:
            self._wait()
        elif self._task is not None:
            self.are_over = True
            self._task.cancel()
