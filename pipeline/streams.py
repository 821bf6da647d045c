"""One stage's streams, as its worker sees them: take, settle, claim, each one script call.

Hides Redis: which command, which key, what a lost reply means. Every method may raise `BrokerUnavailable`; `settle`
never does: an outcome whose reply was lost stays in hand and is sent again until Redis has answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog
from msgspec import Struct

from pipeline import keys, scripts
from pipeline.batching import Batcher
from pipeline.clock import Clock, monotonic_us
from pipeline.connection import Argument, Backoff, CommandRefused, Link, Outage
from pipeline.errors import BrokerUnavailable, PenstockError
from pipeline.flows import record_of
from pipeline.job import Job
from pipeline.priorities import Shares

if TYPE_CHECKING:
    from pipeline.balancing import Replica
    from pipeline.settings import Settings

log = structlog.get_logger(__name__)

BLOCK_MS: Final = 1_000
"""A blocked read is never cut off, since it may just have been served; it ends by itself so often."""

REFUSED_AGAIN_S: Final = 1.0
GATHER_S: Final = 0.02
"""How long a read waits, at most, for outcomes on their way: what comes meanwhile travels together from here on."""

Verb = Literal["forward", "complete", "retry", "release", "bury"]
Answer = Literal["settled", "cancelled", "lost", "orphan"]
_ANSWERS: Final[dict[bytes, Answer]] = {
    b"settled": "settled", b"cancelled": "cancelled", b"lost": "lost", b"orphan": "orphan"
}  # fmt: skip


class Entry(Struct, frozen=True):
    """One entry in this consumer's hands.

    Attributes:
        deliveries: how often it was delivered; together with the consumer's name this is the fence.
        data: the field `data`; None when the entry has none.
        extra: names of fields that are neither `data` nor `vector`.
        replica: where its job was placed; "" when nowhere.
        resumed: somebody may have worked on it before: it was claimed, or found pending.
    """

    stream: str
    id: bytes
    deliveries: int
    data: bytes | None
    vector: bytes | None = None
    replica: str = ""
    resumed: bool = False
    extra: tuple[bytes, ...] = ()


class Settlement(Struct, eq=False):
    """What is to become of one entry: the verb, and what the settle script needs for it."""

    entry: Entry
    job_id: str
    verb: Verb
    a: Argument = ""
    b: Argument = ""
    c: Argument = ""
    start: Sequence[Sequence[Argument]] = ()
    unknown: bool = False


class Claimed(Struct, frozen=True):
    """What a claim brought.

    Attributes:
        left: entries of the lapsed consumer that it still holds.
    """

    entries: list[Entry]
    left: int


class Streams:
    """The streams of one stage, read by one consumer.

    Uses three connections: one for reads that block, one for settling, one for the rest.

    Attributes:
        dropped_letters: dead letters that settles had to drop since somebody last looked.
        suspect_from: deliveries from which an entry may have killed its holders: it is given away alone only.
    """

    def __init__(self, stage: str, consumer: str, settings: Settings, clock: Clock, *, placed: bool) -> None:
        self.stage = stage
        self.names = tuple(keys.stream(stage, priority) for priority in ("high", "normal", "low"))
        self.control = Link(settings.redis, f"{stage}-control")
        self._reader = Link(settings.redis, f"{stage}-reader")
        self._settler = Link(settings.redis, f"{stage}-settler")
        self._consumer = consumer
        self._settings = settings
        self._clock = clock
        self._placed = placed
        self._shares = Shares()
        self._more_waits = True  # than the last read could bring
        self._outbox: Batcher[Settlement, Answer | CommandRefused] = Batcher(self._send)
        self._outage = Outage(f"{stage} settle")
        self.dropped_letters = 0
        self.suspect_from = min(2, settings.worker.max_deliveries)

    async def close(self) -> None:
        """Close the connections."""
        await self._outbox.close()
        for link in (self.control, self._reader, self._settler):
            await link.close()

    # --- reading ---------------------------------------------------------------------------------

    async def ensure_groups(self) -> None:
        """Create the stage's groups where they are missing, at the beginning of the stream: nothing is skipped."""
        await self.control.run(scripts.GROUPS, self.names, (self.stage,))

    async def read(self, most: int) -> list[Entry]:
        """Return up to *most* entries that wait now, or the first to come; nothing when none comes for a while.

        The script that keeps the shares is called while more waits than a read may bring. Else one plain read, which
        costs Redis a tenth of it, blocks until something comes and brings all of that.
        """
        await self._outbox.pause(GATHER_S)
        entries = await self.take(most) if self._more_waits else []
        return entries or await self.wait(most)

    async def take(self, most: int) -> list[Entry]:
        """Return up to *most* entries that wait now, by the shares of the priorities."""
        sent_us = monotonic_us()
        args = (self.stage, self._consumer, most, *self._shares.owed(most))
        reply = await self._reader.run(scripts.TAKE, self.names, args)
        self._clock.observe(int(reply[0]), sent_us)
        entries = [
            _entry(self.names[number - 1], entry_id, fields, deliveries=1)
            for number, entry_id, fields in zip(reply[1::3], reply[2::3], reply[3::3], strict=True)
        ]
        self._shares.took(len(entries))
        self._more_waits = len(entries) == most
        return entries

    async def wait(self, most: int = 1) -> list[Entry]:
        """Return the first entries to come, nothing when none come for a while.

        Redis counts by stream, so each may bring a third of *most*; where that is less than one, up to three come.
        """
        count = max(1, most // len(self.names))
        reply = await self._reader.call(
            "XREADGROUP", "GROUP", self.stage, self._consumer, "COUNT", count, "BLOCK", BLOCK_MS, "STREAMS",
            *self.names, ">", ">", ">", timeout_s=self._settings.redis.reply_timeout_s + BLOCK_MS / 1000,
        )  # fmt: skip
        entries: list[Entry] = []
        self._more_waits = False
        for name, rows in reply or ():
            stream = name.decode()
            entries += [_entry(stream, entry_id, fields, deliveries=1) for entry_id, fields in rows]
            self._more_waits = self._more_waits or len(rows) >= count
        self._shares.took(len(entries))
        return entries

    async def stop_waiting(self) -> None:
        """End a blocked read now, as if nothing had come."""
        await self.control.call("CLIENT", "UNBLOCK", self._reader.client_id)

    async def place(self, replicas: Sequence[Replica], orders: Sequence[Sequence[str]]) -> Placed:
        """Take one entry per order, each with a running place at the first free replica of that order.

        The reply also tells how all *replicas* stand now.
        """
        number_of = {replica.url: number for number, replica in enumerate(replicas, start=1)}
        args: list[Argument] = [self.stage, self._consumer, len(replicas), len(orders)]
        for replica in replicas:
            args += [replica.url, 0 if replica.is_open else replica.slots]
        for owed, order in zip(self._shares.ahead(len(orders)), orders, strict=True):
            args += [owed, len(order), *(number_of[url] for url in order)]
        sent_us = monotonic_us()
        reply = await self._reader.run(scripts.PLACE, self.names, args)
        self._clock.observe(int(reply[0]), sent_us)
        rows, found = reply[2 : 2 + len(replicas)], reply[2 + len(replicas) :]
        entries = [
            _entry(self.names[number - 1], entry_id, fields, deliveries=1, replica=url.decode())
            for number, entry_id, fields, url in zip(found[0::4], found[1::4], found[2::4], found[3::4], strict=True)
        ]
        self._shares.took(len(entries))
        return Placed(entries, int(reply[1]), [_standing(row) for row in rows])

    async def fetch(self, stream: str, entry_id: bytes, deliveries: int) -> Entry | None:
        """Return one pending entry by its id; None when it is gone, and then it is not pending any more either.

        An entry deleted by hand stays in the pending list, and a job that seems to be in living hands never ends.
        """
        rows = await self.control.call("XRANGE", stream, entry_id, entry_id)
        if rows:
            return _entry(stream, *rows[0], deliveries=deliveries, resumed=True)
        await self.control.call("XACK", stream, self.stage, entry_id)
        return None

    async def is_cancelled(self, job_id: str) -> bool:
        """Say whether the job is marked as to be cancelled.

        Worth asking only for a job that somebody had in hand before, or whose cancelling was heard while its read was
        under way: a job that waits is not marked but ended.
        """
        return bool(await self.control.call("HEXISTS", keys.LIVE + job_id, "cancel"))

    # --- taking over from the dead ---------------------------------------------------------------

    async def lapsed(self) -> list[tuple[str, str]]:
        """Return (stream, consumer) for every consumer of this stage that has no lease now."""
        sent_us = monotonic_us()
        reply = await self.control.run(scripts.LAPSED, self.names, (self.stage,))
        self._clock.observe(int(reply[0]), sent_us)
        return [(self.names[number - 1], name.decode()) for number, name in zip(reply[1::2], reply[2::2], strict=True)]

    async def claim(self, stream: str, lapsed: str, most: int, *, idle: bool) -> Claimed:
        """Take over up to *most* entries of a lapsed consumer; a suspect only alone, and only when *idle*."""
        args = (self.stage, lapsed, self._consumer, most, "idle" if idle else "", self.suspect_from)
        reply = await self.control.run(scripts.CLAIM, (stream,), args)
        rows = zip(reply[3::4], reply[4::4], reply[5::4], reply[6::4], strict=True)
        entries = [
            _entry(stream, entry_id, fields, deliveries=count, replica=url.decode(), resumed=True)
            for entry_id, count, fields, url in rows
        ]
        return Claimed(entries, int(reply[2]))

    # --- letting go ------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> list[Answer]:
        """Let go of entries, together with others'; returns only when Redis has answered for each.

        Returns:
            "lost" only when another consumer, or a later delivery, owns the entry; "settled" also when an earlier
            sending, whose reply was lost, may have done it.
        """
        answers: list[Answer] = []
        for settlement, answer in zip(settlements, await self._outbox.add_all(settlements), strict=True):
            final = answer if type(answer) is str else await self._insist(settlement, answer)
            answers.append("settled" if final == "lost" and settlement.unknown else final)
        return answers

    async def _insist(self, settlement: Settlement, answer: Answer | CommandRefused) -> Answer:
        """Send an outcome again until Redis takes it."""
        while isinstance(answer, CommandRefused):
            # A key of the wrong type, say: an operator must act. The outcome is kept, and others pass by.
            log.error("redis refuses to settle an entry; trying again", stage=self.stage, error=str(answer))
            await asyncio.sleep(REFUSED_AGAIN_S)
            answer = await self._outbox.add(settlement)
        return answer

    async def adopt(self, entry: Entry, job: Job) -> Literal["adopted", "lost", "duplicate"]:
        """Put *job* in the place of a foreign entry. May be sent again after an unknown reply: it runs once."""
        stage, tail = job.launch()
        reply = await self.control.run(
            scripts.ADOPT,
            (),
            (
                entry.stream, self.stage, entry.id, entry.deliveries, self._consumer, job.id, tail, job.tenant,
                job.deadline_ms, keys.stream(stage, job.priority),
            ),
        )  # fmt: skip
        answer: Literal["adopted", "lost", "duplicate"] = reply[1].decode()
        return answer

    async def move(self, entry: Entry, job_id: str, order: Sequence[Replica]) -> str:
        """Change the replica of a job in hand. Returns "lost", "none" or the new replica's URL."""
        args: list[Argument] = [entry.stream, self.stage, entry.id, entry.deliveries, self._consumer, job_id]
        for replica in order:
            args += [replica.url, replica.slots]
        reply: bytes = await self.control.run(scripts.MOVE, (), args)
        return reply.decode()

    async def _send(self, batch: Sequence[Settlement]) -> list[Answer | CommandRefused]:
        """Send one batch until Redis answers; one that is refused as a whole, piece by piece."""
        backoff = Backoff(self._settings.redis.reconnect_cap_s, self._outage)
        while True:
            try:
                reply = await self._run_settle(batch)
            except CommandRefused as error:  # nothing was written: the script checks everything first
                if len(batch) == 1:
                    return [error]
                return [answer for settlement in batch for answer in await self._send([settlement])]
            except PenstockError as error:  # away, out of memory, the password changed: an outcome is never given up
                if isinstance(error, BrokerUnavailable) and error.unknown:
                    for settlement in batch:
                        settlement.unknown = True
                await backoff.failed(error)
            else:
                backoff.succeeded()
                return [*reply]

    async def _run_settle(self, batch: Sequence[Settlement]) -> list[Answer]:
        settings = self._settings
        args: list[Argument] = [
            self._consumer,
            int(settings.worker.completion_ttl_s * 1000),
            settings.dead.max_letters,
            int(settings.dead.max_age_s * 1000),
            "placed" if self._placed else "",
            self.stage,
        ]
        for settlement in batch:
            entry = settlement.entry
            args += [
                entry.stream, entry.id, entry.deliveries, settlement.job_id, settlement.verb, settlement.a,
                settlement.b, settlement.c, len(settlement.start),
            ]  # fmt: skip
            for new_job in settlement.start:
                args += new_job
        sent_us = monotonic_us()
        reply: list[Any] = await self._settler.run(scripts.SETTLE, (), args)
        self._clock.observe(int(reply[0]), sent_us)
        self.dropped_letters += reply[1]
        return [_ANSWERS[word] for word in reply[2:]]


class Standing(Struct, frozen=True):
    """How one replica stands, as the placing script counted it.

    Attributes:
        running: -1 where its keys are of a wrong type: it gets no jobs until an operator has mended them.
        seen_ms: when its last good answer came, 0 never.
    """

    running: int
    leases: int
    us_per_token: float | None
    tokens: float | None
    open_until_ms: int
    seen_ms: int


class Placed(Struct, frozen=True):
    """What a placing brought: entries, and the picture for the next one."""

    entries: list[Entry]
    waiting: int
    standings: list[Standing]


def start_arguments(job: Job) -> list[Argument]:
    """Return what a script needs to accept *job* on its first stage."""
    stage, tail = job.launch()
    return [job.id, tail, keys.stream(stage, job.priority), job.tenant, job.deadline_ms, 0, record_of(job)]


def _entry(
    stream: str,
    entry_id: bytes,
    fields: list[bytes] | None,
    *,
    deliveries: int,
    replica: str = "",
    resumed: bool = False,
) -> Entry:
    if fields and len(fields) == 2 and fields[0] == b"data":  # as nearly all are
        return Entry(stream, entry_id, deliveries, fields[1], None, replica, resumed)
    data = vector = None
    extra: tuple[bytes, ...] = ()
    for name, value in zip(fields[::2], fields[1::2], strict=True) if fields else ():
        if name == b"data":
            data = value
        elif name == b"vector":
            vector = value
        else:
            extra += (name,)
    return Entry(stream, entry_id, deliveries, data, vector, replica, resumed, extra)


def number(value: Any) -> float | None:
    """Return a number that Redis holds as text; None where there is none, or something else stands there."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _standing(row: Sequence[Any]) -> Standing:
    running, leases, us_per_token, tokens, open_until_ms, seen_ms = row
    return Standing(
        int(running),
        int(leases),
        number(us_per_token),
        number(tokens),
        int(number(open_until_ms) or 0),
        int(number(seen_ms) or 0),
    )
