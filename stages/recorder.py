"""The recorder: writes events of the stream `record:events` into the database, in bulk.

Take, write, commit, forget: an event leaves Redis only after the database has it, and what is written again after a
crash changes nothing. While the database is away events wait in their stream and in hand, and nothing else does.
An event that can never be written goes to the dead letters with its reason; the others of its transaction pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from pipeline import metrics
from pipeline.clock import monotonic_us
from pipeline.connection import Backoff, Outage
from pipeline.errors import HistoryUnavailable, MalformedEntry, PenstockError, Reject
from pipeline.events import EventStream
from pipeline.group_reader import Entry
from pipeline.records import KINDS, PRIVATE, Event, Records
from pipeline.stage import Loop, Stopped, unless

if TYPE_CHECKING:
    from pipeline.clock import Clock
    from pipeline.settings import Settings

log = structlog.get_logger(__name__)

A = TypeVar("A")

REST_S: Final = 0.1
"""Between two transactions: ten in a second cost much less than one for each few events. What comes alone is written at
once all the same."""
DATABASE_AGAIN_S: Final = 2.0
"""The longest wait between two tries to reach the database."""


def build(settings: Settings) -> Recorder:
    """Return the recorder."""
    return Recorder(settings, Records.open(settings.history.url, timeout_s=settings.history.timeout_s))


@dataclass(slots=True)
class _Burial:
    """What of an entry cannot be written: the event as names and values, and why."""

    entry: Entry
    fields: dict[str, str]
    reason: MalformedEntry | Reject


class Recorder(Loop):
    """Any number may run."""

    name = "recorder"

    def __init__(self, settings: Settings, records: Records) -> None:
        self._settings = settings
        self._records = records
        self._redis = Backoff(settings.redis.reconnect_cap_s, Outage(self.name))
        self._database = Backoff(DATABASE_AGAIN_S, Outage(self.name, of="the database"))
        self._ready = metrics.READY.labels(self.name)
        for kind in KINDS:  # a counter that begins at 1 shows no increase
            for outcome in ("written", "buried"):
                metrics.EVENTS.labels(kind, outcome)
        metrics.DEAD_DROPPED.labels(self.name)

    async def run(self, consumer: str, clock: Clock, stop: asyncio.Event) -> None:
        """Write events until *stop*."""
        self._worker, self._clock, self._stop = consumer, clock, stop
        self._stream = EventStream(self._settings, consumer, clock)
        try:
            await self._reach_database(self._prepare)
            while not stop.is_set():
                if entries := await unless(self._reach_redis(self._stream.take), self._stop):
                    began_us = monotonic_us()
                    await self._record(entries)
                    await self._rest(began_us, len(entries))
        except Stopped:
            return  # what is in hand is another's as soon as the lease is gone
        finally:
            self._ready.set(0)
            await self._stream.close()
            await self._records.close()

    async def _prepare(self) -> None:
        if not self._settings.history.auto_upgrade:
            await self._records.check()
        elif await self._records.upgrade():
            log.info("the tables of the history were brought up to date")

    # --- one batch -------------------------------------------------------------------------------

    async def _record(self, entries: Sequence[Entry]) -> None:
        """Write the events of these entries, then forget them."""
        events: list[tuple[Entry, Event]] = []
        burials: list[_Burial] = []
        for entry in entries:
            if not entry.fields:  # deleted by hand
                continue
            try:
                events.append((entry, Event.decode(entry.fields)))
            except MalformedEntry as reason:
                burials.append(_Burial(entry, _as_text(entry.fields), reason))
        burials += await self._write(events)
        lists = []
        for entry, event in events:
            if event.rows:
                lists.append(event.rows)
                burials += await self._write_rows(entry, event)
        await self._forget(entries, burials, lists)

    async def _write_rows(self, entry: Entry, event: Event) -> list[_Burial]:
        """Write the events of the list that *event* names, portion by portion."""
        burials: list[_Burial] = []
        first = 0
        while portion := await self._reach_redis(lambda: self._stream.rows(event.rows, first)):  # noqa: B023 - used at once
            began_us = monotonic_us()
            first += len(portion)
            events: list[tuple[Entry, Event]] = []
            for element, found in zip(portion, event.members(portion), strict=True):
                if isinstance(found, MalformedEntry):
                    fields = {"rows": event.rows, "element": element.decode(errors="replace")}
                    burials.append(_Burial(entry, fields, found))
                else:
                    events.append((entry, found))
            burials += await self._write(events)
            if len(portion) < self._settings.history.batch:
                break  # all of a list is there before its event: nothing follows, and who sent one message has one
            await self._rest(began_us, len(portion))
        return burials

    async def _rest(self, began_us: int, taken: int) -> None:
        """Let more events come for the next transaction, and others use the processor.

        Where a transaction was full there is more already: then it is half of the time.
        """
        took_s = (monotonic_us() - began_us) / 1e6
        full = taken >= self._settings.history.batch
        await unless(asyncio.sleep(min(took_s, REST_S) if full else REST_S), self._stop)

    async def _write(self, events: Sequence[tuple[Entry, Event]]) -> list[_Burial]:
        """Write events in one transaction; where the database refuses one, find it and write the others."""
        if not events:
            return []
        try:
            await self._reach_database(lambda: self._records.apply([event for _, event in events]))
        except Reject as reason:
            if len(events) == 1:
                [(entry, event)] = events
                return [_Burial(entry, event.fields(), reason)]
            half = len(events) // 2
            return await self._write(events[:half]) + await self._write(events[half:])
        now_ms = self._clock.now_ms()
        for _, event in events:
            metrics.EVENTS.labels(event.kind, "written").inc()
            metrics.RECORD_LAG_S.observe(max(0, now_ms - event.at_ms) / 1000)
        return []

    async def _forget(self, entries: Sequence[Entry], burials: Sequence[_Burial], lists: Sequence[str]) -> None:
        letters: dict[bytes, list[bytes]] = {entry.id: [] for entry in entries}
        for burial in burials:
            kind = burial.fields.get("kind", "")
            code = burial.reason.code
            reason = "withheld, since it may quote personal data" if kind in PRIVATE else str(burial.reason)
            log.error("an event cannot be written; it goes to the dead letters", code=code, reason=reason)
            letter = self._stream.letter(burial.entry, burial.fields, code, reason, self._worker)
            letters[burial.entry.id].append(letter)
            metrics.EVENTS.labels(kind if kind in KINDS else "unknown", "buried").inc()
            metrics.DEAD_LETTERS.labels(self.name, code).inc()
        await self._reach_redis(lambda: self._stream.forget(letters, lists))
        metrics.DEAD_DROPPED.labels(self.name).inc(self._stream.dropped_letters)
        self._stream.dropped_letters = 0

    # --- what may be away ------------------------------------------------------------------------

    async def _reach_database(self, call: Callable[[], Awaitable[A]]) -> A:
        while True:
            try:
                answer = await call()
            except HistoryUnavailable as error:
                if self._database.failures == 0:
                    metrics.DATABASE_OUTAGES.inc()
                self._say(str(error))
                await unless(self._database.failed(error), self._stop)
            except Reject:
                self._say(None)
                raise
            else:
                self._database.succeeded()
                self._say(None)
                return answer

    def _say(self, not_ready: str | None) -> None:
        self.not_ready = not_ready
        self._ready.set(not_ready is None)
        metrics.DATABASE_UP.set(not_ready is None)

    async def _reach_redis(self, call: Callable[[], Awaitable[A]]) -> A:
        while True:
            try:
                answer = await call()
            except PenstockError as error:  # a key of a wrong type, too: an operator must act, and events wait
                await unless(self._redis.failed(error), self._stop)
            else:
                self._redis.succeeded()
                return answer


def _as_text(fields: Sequence[bytes]) -> dict[str, str]:
    values = [value.decode(errors="replace") for value in fields]
    return dict(zip(values[::2], values[1::2], strict=False))
