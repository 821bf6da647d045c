"""The stream `record:events` in the hands of one recorder: take events, forget those that the database has.

An event is no job. It is written as often as it takes, by whoever has it, and writing it again changes nothing. So a
recorder needs no fence: it takes up what it lost sight of itself, and what those hold whose lease has lapsed, as soon
as it looks; whoever acknowledges an entry first has done so for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from pipeline import keys, scripts
from pipeline.connection import Argument
from pipeline.group_reader import Entry, GroupReader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.clock import Clock
    from pipeline.settings import Settings

GROUP: Final = "recorder"


class EventStream(GroupReader):
    """The stream, read by the consumer of this name."""

    def __init__(self, settings: Settings, consumer: str, clock: Clock) -> None:
        super().__init__(settings.redis, keys.EVENTS, GROUP, consumer, settings.history.batch)
        self._settings = settings
        self._clock = clock
        self.dropped_letters = 0

    async def rows(self, name: str, first: int) -> list[bytes]:
        """Return a portion of the list that an event names, from its element *first* on."""
        last = first + self._settings.history.batch - 1
        portion: list[bytes] = await self.link.call("LRANGE", name, first, last)
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
        dropped, _ = await self.link.run(scripts.RECORDED, (), args)
        self.dropped_letters += dropped

    def letter(self, entry: Entry, fields: Mapping[str, Any], code: str, reason: str, worker: str) -> bytes:
        """Return the dead letter of an event that cannot be written."""
        body = {
            "reason": code,
            "job_id": fields.get("id"),
            "error": {"type": "failed", "code": code, "message": reason},
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
