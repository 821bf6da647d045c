"""Leaving a provider alone that takes nothing: waits that grow, and one message at a time that tries it.

A provider is *away*, to one process, from the first hand-over to which nobody listened, or which it put off (429),
until it answers one. In between each failure in a row makes the next wait longer, and all others are put off for at
least as long. So an outage costs a few calls however many messages wait, and one line in the log when it begins and one
when it ends. None waits in hand for long: who dies with a message in hand three times is taken for its victim, and a
suspect is handled alone, so that others of the process would wait with it.

The waits are told to all processes by `hold.lua`: who is told of one takes the provider for away, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Final

from prometheus_client import Gauge

from pipeline.clock import monotonic_us
from pipeline.connection import Outage
from pipeline.errors import NOT_YET, PenstockError, RetryLater

BASE_S: Final = 0.1
"""The first wait, short: one connection that fails among many is no outage."""
CAP_S: Final = 30.0
"""The longest wait of our own."""
IN_HAND_S: Final = 1.0
"""The longest that is waited for in hand."""
LONGEST_ASKED_S: Final = 3_600.0
"""A slip of a provider must not stop all that goes out by it for days; the delivery itself obeys what was asked."""

HELD_S = Gauge(
    "penstock_delivery_held_seconds", "For how long a provider is left alone from now on, as far as known", ["provider"]
)


def wait_s(failures: int, rng: Random) -> float:
    """Return the wait after so many failures in a row, from 1 on: between a half and the whole of what has doubled."""
    return min(CAP_S, BASE_S * 2.0 ** min(failures - 1, 16)) * rng.uniform(0.5, 1.0)


class Patience:
    """What one process knows of whether a provider takes anything.

    Attributes:
        failures: in a row; 0: it is not away. Whoever hands something over notes it before, and gives it back after:
            what began before the last change says nothing new.
    """

    def __init__(self, provider: str, rng: Random | None = None) -> None:
        self.failures = 0
        self._provider = provider
        self._rng = rng or Random()
        self._until_us = 0
        self._is_tried = False
        self._stopping = asyncio.Event()
        self._outage = Outage("delivery", of=f"the provider {provider}")
        HELD_S.labels(provider).set_function(lambda: self.left_s)

    @property
    def left_s(self) -> float:
        """For how long it is to be left alone from now on."""
        return max(0.0, (self._until_us - monotonic_us()) / 1e6)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until the provider may be given something; while it is away, one has its turn at a time.

        Raises:
            RetryLater: it is to be left alone for longer, another message tries it, or this process is to stop.
        """
        if not self.failures:
            yield
            return
        if self._is_tried or self.left_s > IN_HAND_S:
            # Spread out: those that are put off together would come again together.
            after_s = max(self.left_s, wait_s(self.failures, self._rng))
            raise self.not_yet(after_s + self._rng.uniform(0.0, min(after_s, CAP_S)))
        self._is_tried = True
        try:
            await self.pause(self.left_s)
            yield
        finally:
            self._is_tried = False

    async def pause(self, for_s: float) -> None:
        """Wait, with nothing begun.

        Raises:
            RetryLater: this process is to stop.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                await self._stopping.wait()
        if self._stopping.is_set():
            raise self.not_yet(None)

    def held(self, for_s: float) -> None:
        """Note that somebody has it left alone."""
        self.failures = max(1, self.failures)
        self._leave_alone(for_s)

    def put_off(self, error: RetryLater, seen: int) -> bool:
        """Note that it took nothing, for now; say whether it is to be left alone for longer than was known."""
        self._outage.begins(PenstockError(error.code))  # its words may quote what no log may hold
        span_s = min(error.after_s or 0.0, LONGEST_ASKED_S)
        if seen == self.failures:
            self.failures += 1
            span_s = max(span_s, wait_s(self.failures, self._rng))
        return self._leave_alone(span_s)

    def answered(self, seen: int) -> None:
        """Note that it answered: it took a message, refused one, or has a fault of its own."""
        if seen == self.failures:
            self.failures = 0
            self._outage.ends()

    def stop(self) -> None:
        """Let nobody wait any longer."""
        self._stopping.set()

    def _leave_alone(self, for_s: float) -> bool:
        until_us = monotonic_us() + int(for_s * 1e6)
        if until_us <= self._until_us:
            return False
        self._until_us = until_us
        return True

    def not_yet(self, after_s: float | None) -> RetryLater:
        """Return what puts a message off, uncharged, for so long; None: for as long as a retry is."""
        message = f"the provider {self._provider} takes no more for now"
        return RetryLater(message, code=NOT_YET, after_s=after_s, charged=False)

    def __repr__(self) -> str:
        return f"<Patience {self._provider} failures={self.failures} left_s={self.left_s:.1f}>"
