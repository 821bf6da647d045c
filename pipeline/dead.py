"""Dead letters, as an operator sees them: list, show, retry, discard.

A letter holds the story of an entry that could not be worked on, and the entry itself. Prompts and documents stand in
`original` only, so listings show none of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson
from msgspec import structs

from pipeline import flows, keys, scripts
from pipeline.accepting import Idempotency
from pipeline.batches import MESSAGE_FLOWS, Batches, order_again
from pipeline.batches import Order as Batch
from pipeline.clock import Clock, monotonic_us
from pipeline.deliveries import DELIVERY_FLOWS, Deliveries, Order
from pipeline.errors import MalformedEntry, Reject
from pipeline.job import OURS, Job, decode, decode_foreign, new_id

if TYPE_CHECKING:
    from pipeline.connection import Link
    from pipeline.settings import Settings

_LETTER_ID: Final = re.compile(r"\d+-\d+")
RETRIED_FOR_S: Final = 86_400.0
"""A message of a dead letter is sent once in this time: longer than anybody tries again who was interrupted."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    Attributes:
        id: its place in `job:dead`.
        reason: short and stable: `not_json`, `poison`, `attempts_exhausted`, ...
        error: the last error, as the outcome shows it.
        original: the entry's `data` as it was; None where it had none.
    """

    id: str
    reason: str
    stage: str
    stream: str
    entry: str
    job_id: str | None
    error: dict[str, str] | None
    attempts: int
    deliveries: int
    worker: str
    at_ms: int
    original: str | None

    def summary(self) -> dict[str, Any]:
        """Return everything but the entry's content."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "original"}


class DeadLetters:
    """The stream `job:dead`."""

    def __init__(self, link: Link, settings: Settings) -> None:
        self._link = link
        self._settings = settings

    async def count(self) -> int:
        """Return how many letters there are."""
        return int(await self._link.call("XLEN", keys.DEAD))

    async def list(self, most: int) -> list[Letter]:
        """Return up to *most* letters, newest first."""
        rows = await self._link.call("XREVRANGE", keys.DEAD, "+", "-", "COUNT", most)
        return [_letter(*row) for row in rows]

    async def show(self, letter_id: str) -> Letter:
        """Return one letter.

        Raises:
            Reject: there is none of that id (`unknown_letter`).
        """
        rows = []
        if _LETTER_ID.fullmatch(letter_id):
            rows = await self._link.call("XRANGE", keys.DEAD, letter_id, letter_id)
        if not rows:
            raise _unknown(letter_id)
        return _letter(*rows[0])

    async def retry(self, letter_id: str, now_ms: int) -> str:
        """Start the letter's job again from the beginning of its route, under a new id; return that id.

        The old outcome stands. The new job names the old one in `retry_of`. A message becomes a message again, in a
        batch of its own, as when its sender repeats it; a delivery becomes another delivery, due now. An event of the
        history is put back to be written, and keeps its record's id.

        Raises:
            Reject: no such letter (`unknown_letter`), nothing in it that could be run (`not_a_job`), or a delivery that
                Redis keeps no longer (`content_gone`), that went out after all (`already_sent`), or that still may
                (`under_way`).
            Overloaded: it is a message or a delivery, and too much is unfinished.
        """
        letter = await self.show(letter_id)
        if letter.stream == keys.EVENTS:
            return await self._recall(letter)
        job = self._again(letter, now_ms)
        if job.flow in DELIVERY_FLOWS:
            return await self._deliver(letter, job, now_ms)
        if (order := await self._order(job)) is not None:
            return await self._send(letter, order, now_ms)
        stage, tail = job.launch()
        stream = keys.stream(stage, job.priority)
        args = (letter_id, job.id, tail, stream, job.tenant, job.deadline_ms, flows.record_of(job))
        if await self._link.run(scripts.REVIVE, (), args) != b"revived":
            raise _unknown(letter_id)
        return job.id

    async def _order(self, job: Job) -> Batch | None:
        """Return what its sender would send to repeat a message; None of any other job, and where its batch is gone."""
        if job.flow not in MESSAGE_FLOWS:
            return None
        text = await self._link.call("GET", f"{keys.MESSAGE}{job.retry_of}")
        batch_key = f"{keys.BATCH}{orjson.loads(text).get('batch_id') if text else ''}"
        tenant, queue_id, told = await self._link.call("HMGET", batch_key, "tenant", "queue", "asked")
        if tenant is None or tenant.decode() != job.tenant:
            return None
        return order_again(job, queue_id.decode(), orjson.loads(told or b"{}"))

    async def _send(self, letter: Letter, order: Batch, now_ms: int) -> str:
        """Accept the message, once however often it is tried, and only then take the letter away; return its id."""
        batches = Batches(self._link, self._settings, _clock_at(now_ms))
        accepted = await batches.accept(order, idempotency=_once(letter))
        job_id = accepted.message_ids[0] if accepted.message_ids else accepted.batch_id  # sent, and forgotten, long ago
        return await self._taken_away(letter, job_id, repeated=accepted.repeated)

    async def _deliver(self, letter: Letter, job: Job, now_ms: int) -> str:
        """Accept the delivery anew, once however often it is tried, and only then take the letter away."""
        deliveries = Deliveries(self._link, self._settings, _clock_at(now_ms))
        old = await deliveries.read(job.retry_of or "")
        # Of one that went out after all, its attachments are gone too: that it went out is what matters, see `accept`.
        if old is None or old.tenant != job.tenant or not (old.is_whole or old.status in {"sent", "delivered"}):
            message = f"letter {letter.id}: Redis keeps no longer all that it said; its sender has to send it again"
            raise Reject(message, code="content_gone")
        again = Order(old.type, old.tenant, old.content, retry_of=old.id)
        accepted = await deliveries.accept(again, idempotency=_once(letter))
        return await self._taken_away(letter, accepted.id, repeated=accepted.repeated)

    async def _taken_away(self, letter: Letter, job_id: str, *, repeated: bool) -> str:
        """Take the letter away and return the id of the job that it has become.

        Raises:
            Reject: `unknown_letter`, another retry was quicker.
        """
        if not await self._link.call("XDEL", keys.DEAD, letter.id) and repeated:
            raise _unknown(letter.id)
        return job_id

    async def _recall(self, letter: Letter) -> str:
        fields: dict[str, str] = orjson.loads(letter.original or "{}")
        if "kind" not in fields:
            raise Reject(f"letter {letter.id} holds no event that could be written", code="not_an_event")
        values = [part for pair in fields.items() for part in pair]
        if await self._link.run(scripts.RECALL, (), (letter.id, *values)) != b"recalled":
            raise _unknown(letter.id)
        return fields.get("id", "-")

    async def discard(self, letter_id: str) -> None:
        """Throw one letter away.

        Raises:
            Reject: there is none of that id (`unknown_letter`).
        """
        if not _LETTER_ID.fullmatch(letter_id) or not await self._link.call("XDEL", keys.DEAD, letter_id):
            raise _unknown(letter_id)

    def _again(self, letter: Letter, now_ms: int) -> Job:
        data = (letter.original or "").encode()
        lifetimes = self._settings.lifetimes.model_dump()
        try:
            if not data.startswith(OURS):
                foreign = flows.adopt(letter.stage, decode_foreign(data), now_ms=now_ms, lifetimes=lifetimes)
                return structs.replace(foreign, id=new_id(), retry_of=foreign.id)
            old = decode(data)
            flow = flows.FLOWS[old.flow]
            if old.flow == "report":
                message = "a report is asked for again by a new request: its sender has an answer to the old one"
                raise Reject(message, code="not_repeatable")
        except (MalformedEntry, KeyError) as error:
            message = f"letter {letter.id} holds no job that could run again: {error}"
            raise Reject(message, code="not_a_job") from error
        return Job(
            id=new_id(),
            flow=old.flow,
            payload=old.payload,
            route=list(flow.route),
            deadline_ms=now_ms + int(lifetimes[flow.lifetime] * 1000),
            tenant=old.tenant,
            priority=old.priority,
            at_us=now_ms * 1000,
            retry_of=old.id,
        )


def _once(letter: Letter) -> Idempotency:
    key = f"dead:{letter.id}"
    return Idempotency(key, key, RETRIED_FOR_S)


def _clock_at(now_ms: int) -> Clock:
    clock = Clock()
    clock.observe(now_ms * 1000, monotonic_us())
    return clock


def _unknown(letter_id: str) -> Reject:
    return Reject(f"there is no dead letter {letter_id!r}; `penstock dead list` shows them", code="unknown_letter")


def _letter(letter_id: bytes, fields: list[bytes]) -> Letter:
    body = orjson.loads(fields[1])
    return Letter(id=letter_id.decode(), **body)
