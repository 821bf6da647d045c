"""A stream that one loop reads through a group: what comes, what was left behind, and what those left who are gone.

For entries that are no jobs: who takes them lets go of them with a script of its own, which says what a second sending
may do. So no count is kept here of what is in hand: what was taken and not let go of comes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipeline import scripts
from pipeline.clock import monotonic_us
from pipeline.connection import Argument, CommandRefused, Link
from pipeline.errors import PenstockError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.settings import RedisSettings

BLOCK_MS: Final = 1_000
LOOK_EVERY_S: Final = 1.0
"""Between looks for what was left behind."""
NO_SUSPECT: Final = 1_000_000_000
"""Deliveries: no entry of this stream kills who reads it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the stream: flat names and values; nothing where it was deleted by hand.

    Attributes:
        deliveries: how often it was given to somebody who then died, and once more.
    """

    id: bytes
    fields: Sequence[bytes]
    deliveries: int = 1


class GroupReader:
    """A stream in the hands of one consumer.

    Args:
        most: entries taken at once.
        suspect_from: deliveries from which an entry may have killed its holders: it is claimed alone.
    """

    def __init__(
        self, redis: RedisSettings, stream: str, group: str, consumer: str, most: int, suspect_from: int = NO_SUSPECT
    ) -> None:
        self.link = Link(redis, group)
        self._stream, self._group, self._consumer = stream, group, consumer
        self._most, self._suspect_from = most, suspect_from
        self._reply_timeout_s = redis.reply_timeout_s
        self._has_group = False
        self._looked_us: int | None = None
        self._after: str | bytes = "0"  # of what this consumer holds, how far the present look has come

    async def take(self) -> list[Entry]:
        """Return the next entries, up to a batch: what was left behind first; none when none come for a while.

        What `take` returned before should have been let go of: it comes again, now and then, between others.

        Raises:
            PenstockError: Redis is away, or the stream is of a wrong type.
        """
        try:
            if not self._has_group:
                await self._make_group()
            if self._looked_us is None or monotonic_us() - self._looked_us > LOOK_EVERY_S * 1e6:
                if left := await self._take_up():
                    return left
                self._looked_us = monotonic_us()
            return await self._read(">", BLOCK_MS)
        except PenstockError:  # a reply may be lost, and with it the sight of what it brought
            self.look_again()
            self._has_group = False
            raise

    def look_again(self) -> None:
        """Look for what was left behind before anything new is taken."""
        self._looked_us, self._after = None, "0"

    async def _make_group(self) -> None:
        """Make the stream and its group where they are missing; from the beginning, so that nothing is passed over."""
        try:
            await self.link.call("XGROUP", "CREATE", self._stream, self._group, "0", "MKSTREAM")
        except CommandRefused as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._has_group = True

    async def _take_up(self) -> list[Entry]:
        """Return what this consumer holds without knowing, else what one without a lease holds.

        What it holds is gone through once: what cannot be let go of is found again at the next look.
        """
        if own := await self._read(self._after, None):
            self._after = own[-1].id
            return own
        self._after = "0"
        found = await self.link.run(scripts.LAPSED, (self._stream,), (self._group,))
        for name in found[2::2]:
            if name.decode() == self._consumer:  # at its start, or after an outage of Redis
                continue
            args = (self._group, name, self._consumer, self._most, "idle", self._suspect_from)
            reply = await self.link.run(scripts.CLAIM, (self._stream,), args)
            rows = zip(reply[3::4], reply[4::4], reply[5::4], strict=True)
            if entries := [Entry(entry, fields or (), count) for entry, count, fields in rows]:
                return entries
        return []

    async def _read(self, after: str | bytes, block_ms: int | None) -> list[Entry]:
        block: tuple[Argument, ...] = () if block_ms is None else ("BLOCK", block_ms)
        reply = await self.link.call(
            "XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", self._most, *block,
            "STREAMS", self._stream, after, timeout_s=self._reply_timeout_s + (block_ms or 0) / 1000,
        )  # fmt: skip
        return [Entry(entry, fields or ()) for entry, fields in reply[0][1]] if reply else []

    async def close(self) -> None:
        """Close the connection."""
        await self.link.close()
