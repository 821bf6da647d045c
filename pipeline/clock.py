"""The two clocks of a process.

Redis' `TIME` is the only clock that processes share: scripts return it, and each process keeps the offset
between it and its own monotonic clock. Spans are measured on the monotonic clock; the wall clock of a machine
is never read for a decision, so a machine whose clock is an hour off changes nothing.
"""

from __future__ import annotations

import time

from pipeline.errors import BrokerUnavailable

_FORGET_AFTER_S = 30.0  # crystals drift apart by up to 100 us/s, so an old measurement, however sharp, is dropped


def monotonic_us() -> int:
    """Return this machine's monotonic clock, in microseconds."""
    return time.monotonic_ns() // 1000


class Clock:
    """Redis' time as seen from this process: monotonic clock plus an offset that every script's reply improves.

    The error of one observation is at most half its round trip, so the sharpest recent one is kept
    (Cristian's algorithm, "Probabilistic clock synchronization", 1989).
    Before the first observation the machine's wall clock stands in, good enough for a log and for nothing else.
    """

    def __init__(self) -> None:
        self._offset_us = time.time_ns() // 1000 - monotonic_us()
        self._error_us: float = float("inf")
        self._observed_at_us = 0

    def observe(self, redis_us: int, sent_us: int) -> None:
        """Learn from a reply that carried Redis' time.

        Args:
            redis_us: Redis' clock when the script ran.
            sent_us: our monotonic clock when the command was sent.
        """
        now = monotonic_us()
        error = (now - sent_us) / 2
        offset = redis_us - (sent_us + int(error))
        stale = now - self._observed_at_us > _FORGET_AFTER_S * 1e6
        contradicted = abs(offset - self._offset_us) > error + self._error_us  # Redis' own clock was set
        if stale or contradicted or error <= self._error_us:
            self._offset_us, self._error_us, self._observed_at_us = offset, error, now

    @property
    def is_set(self) -> bool:
        """Whether Redis' time was ever observed."""
        return self._observed_at_us > 0

    def require(self) -> None:
        """Make sure that Redis' time is known: a deadline would be counted from a clock that may be hours off.

        Raises:
            BrokerUnavailable: it was never observed.
        """
        if not self.is_set:
            raise BrokerUnavailable("Redis has not been reached yet")

    def now_us(self) -> int:
        """Return Redis' time, in microseconds since the epoch."""
        return monotonic_us() + self._offset_us

    def now_ms(self) -> int:
        """Return Redis' time, in milliseconds since the epoch."""
        return (monotonic_us() + self._offset_us) // 1000

    def __repr__(self) -> str:
        return f"<Clock offset_us={self._offset_us} error_us={self._error_us:.0f}>"
