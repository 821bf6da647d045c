"""The stream `record:events` in the hands of one recorder: take events, forget those that the database has.

An event is no job. It is written as often as it takes, by whoever has it, and writing it again changes nothing. So a
recorder needs no fence: it takes up what it lost sight of itself, and what those hold whose lease has lapsed, as soon
as it looks; whoever acknowledges an entry first has done so for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from pipeline import keys, scripts
from pipeline.clock import monotonic_us
from pipeline.connection import Argument, CommandRefused, Link
from pipeline.errors import PenstockError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.clock import Clock
    from pipeline.settings import Settings

GROUP: Final = "recorder"
BLOCK_MS: Final = 1_000
LOOK_EVERY_S: Final = 1.0
"""Between looks for what was left behind."""
NO_SUSPECT: Final = 1_000_000_000
"""Deliveries: no event kills who reads it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the stream: flat names and values; nothing where it was deleted by hand."""

    id: bytes
    fields: Sequence[bytes]


class EventStream:
    """The stream, read by the consumer of this name."""

    def __init__(self, settings: Settings, consumer: str, clock: Clock) -> None:
        self._settings = settings
        self._consumer = consumer
        self._clock = clock
        self._link = Link(settings.redis, "recorder")
        self._has_group = False
        self._looked_us: int | None = None
        self.dropped_letters = 0

    async def take(self) -> list[Entry]:
        """Return the next entries, up to a batch: what was left behind first; none when none come for a while.

        What `take` returned before must have been let go of, or it comes again.

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
            self._has_group, self._looked_us = False, None
            raise

    async def _make_group(self) -> None:
        """Make the stream and its group where they are missing; from the beginning, so that nothing is passed over."""
        try:
            await self._link.call("XGROUP", "CREATE", keys.EVENTS, GROUP, "0", "MKSTREAM")
        except CommandRefused as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._has_group = True

    async def _take_up(self) -> list[Entry]:
        """Return what this recorder holds without knowing, else what one without a lease holds."""
        if own := await self._read("0", None):
            return own
        found = await self._link.run(scripts.LAPSED, (keys.EVENTS,), (GROUP,))
        for name in found[2::2]:
            if name.decode() == self._consumer:  # at its start, or after an outage of Redis
                continue
            args = (GROUP, name, self._consumer, self._settings.history.batch, "idle", NO_SUSPECT)
            reply = await self._link.run(scripts.CLAIM, (keys.EVENTS,), args)
            if entries := [Entry(entry, fields or ()) for entry, fields in zip(reply[3::4], reply[5::4], strict=True)]:
                return entries
        return []

    async def _read(self, after: str, block_ms: int | None) -> list[Entry]:
        block: tuple[Argument, ...] = () if block_ms is None else ("BLOCK", block_ms)
        reply = await self._link.call(
            "XREADGROUP", "GROUP", GROUP, self._consumer, "COUNT", self._settings.history.batch, *block,
            "STREAMS", keys.EVENTS, after, timeout_s=self._settings.redis.reply_timeout_s + (block_ms or 0) / 1000,
        )  # fmt: skip
        return [Entry(entry, fields or ()) for entry, fields in reply[0][1]] if reply else []

    async def rows(self, name: str, first: int) -> list[bytes]:
        """Return a portion of the list that an event names, from its element *first* on."""
        last = first + self._settings.history.batch - 1
        portion: list[bytes] = await self._link.call("LRANGE", name, first, last)
        return portion

    async def forget(self, letters: Mapping[bytes, Sequence[bytes]], lists: Sequence[str]) -> None:
        """Acknowledge and delete entries and their lists. May be sent again after an unknown reply.

        Args:
            letters: by entry, what of it could not be written and goes to `job:dead`.
        """
        dead = self._settings.dead
        args: list[Argument] = [GROUP, dead.max_letters, int(dead.max_age_s * 1000), len(lists), *lists]
        for entry, some in letters.items():
            args += [entry, len(some), *some]
        dropped, _ = await self._link.run(scripts.RECORDED, (), args)
        self.dropped_letters += dropped

    def letter(self, entry: Entry, fields: Mapping[str, Any], code: str, reason: PenstockError, worker: str) -> bytes:
        """Return the dead letter of an event that cannot be written."""
        body = {
            "reason": code,
            "job_id": fields.get("id"),
            "error": {"type": "failed", "code": code, "message": str(reason)},
            "attempts": 1,
            "deliveries": 1,
            "stage": GROUP,
            "stream": keys.EVENTS,
            "entry": entry.id.decode(),
            "worker": worker,
            "at_ms": self._clock.now_ms(),
            "original": orjson.dumps(fields).decode(),
        }
        return orjson.dumps(body)

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()
