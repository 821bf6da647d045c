"""Shares of the priorities: of ten entries taken while all three wait, seven are high, two normal, one low.

The shares follow a fixed cycle, so every ten entries in a row keep them, wherever one begins to count. What a
priority does not use goes to high, then normal, then low: nobody starves and nothing idles.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

CYCLE: Final = (1, 1, 2, 1, 1, 1, 2, 1, 1, 3)
"""Which stream is owed each of ten entries: 1 high, 2 normal, 3 low."""


class Shares:
    """A position in the cycle."""

    def __init__(self) -> None:
        self._position = 0

    def ahead(self, count: int) -> list[int]:
        """Return the streams owed the next *count* entries, in order."""
        start = self._position
        return [CYCLE[(start + i) % len(CYCLE)] for i in range(count)]

    def owed(self, count: int) -> tuple[int, int, int]:
        """Return how many of the next *count* entries each stream is owed."""
        ahead = list(islice(self.ahead(count), count))
        return ahead.count(1), ahead.count(2), ahead.count(3)

    def took(self, count: int) -> None:
        """Move on by *count* entries."""
        self._position = (self._position + count) % len(CYCLE)
