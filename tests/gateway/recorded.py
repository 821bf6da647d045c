"""The recorder's work, done when a test says so."""

from __future__ import annotations

from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import MalformedEntry
from pipeline.records import Event, Records


async def record(link: Link, records: Records) -> None:
    """Write to history what Redis has to tell of, and take it out of Redis."""
    for entry, fields in await link.call("XRANGE", keys.EVENTS, "-", "+"):
        event = Event.decode(fields)
        events = [event]
        if event.rows:
            for one in event.members(await link.call("LRANGE", event.rows, 0, -1)):
                assert not isinstance(one, MalformedEntry)
                events.append(one)
        await records.apply(events)
        await link.call("XDEL", keys.EVENTS, entry)
        if event.rows:
            await link.call("DEL", event.rows)
