"""Running a suspected entry alone: empty hands all through the process, without starving its neighbours.

An entry whose holder died twice may have killed it. It runs alone, so that what dies with it can only be blamed on it.
For that every worker of the process stops reading and finishes what it holds. Two rules keep suspects from stopping
everybody else: the wait for empty hands has a bound (a lease at first, doubled with each wait in vain, since calls may
be longer than a lease), and after each suspect, or wait in vain, reading goes on for as long as it was stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Final, Protocol

from pipeline.clock import monotonic_us

LOOK_S: Final = 0.02
LEAST_REST_S: Final = 1.0
LONGEST_PATIENCE_S: Final = 900.0


class Holder(Protocol):
    """A worker, as far as this module cares: something that holds entries."""

    @property
    def held(self) -> Sized: ...  # noqa: D102 - the class says it


class Quarantine:
    """One per process.

    Attributes:
        holders: all workers of the process.
    """

    def __init__(self, lease_s: float) -> None:
        self.holders: list[Holder] = []
        self._first_patience_s = self._patience_s = lease_s
        self._bringing = 0
        self._since_us: int | None = None
        self._rest_until_us = 0

    @property
    def is_on(self) -> bool:
        """Whether a suspect runs, or waits for empty hands: nobody may bring entries meanwhile."""
        return self._since_us is not None

    def is_due(self) -> bool:
        """Say whether a suspect may ask for empty hands now."""
        return not self.is_on and monotonic_us() >= self._rest_until_us

    @contextmanager
    def bringing(self) -> Iterator[None]:
        """Note that entries may be on their way into this process's hands."""
        self._bringing += 1
        try:
            yield
        finally:
            self._bringing -= 1

    async def begin(self) -> bool:
        """Stop all reading and wait until all hands are empty; False when patience ended first."""
        self._since_us = monotonic_us()
        try:
            async with asyncio.timeout(self._patience_s):
                while self._bringing or any(len(holder.held) for holder in self.holders):  # noqa: ASYNC110 - many places
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            self.end()
            self._patience_s = min(LONGEST_PATIENCE_S, 2 * self._patience_s)
            return False
        except BaseException:
            self.end()
            raise
        self._patience_s = self._first_patience_s
        return True

    def end(self) -> None:
        """Let reading go on, for at least as long as it was stopped before the next suspect has its turn."""
        if self._since_us is None:
            return
        now_us = monotonic_us()
        self._rest_until_us = now_us + max(int(LEAST_REST_S * 1e6), now_us - self._since_us)
        self._since_us = None

    def __repr__(self) -> str:
        return f"<Quarantine is_on={self.is_on} bringing={self._bringing} patience_s={self._patience_s}>"
