"""Deliveries in Redis: accepted, given to a provider, told of, read.

A delivery is a job (flows `delivery_sms`, `delivery_mms`, `delivery_email`) and a record of its own, `delivery:<id>`,
which has the same id, says what is to go out and how it stands, and outlives the job. Its status only rises
(`raise_delivery` in the scripts' prelude): so whoever tells of it, in whatever order and however often, the same comes
of it. docs/DELIVERIES.md tells the whole life of a delivery.

A message goes out at most once where the provider cannot know it by its id. Just before it is handed over, `begin`
marks it; whoever ends it, or has it retried, says with that how it went. An heir who finds the mark knows that nobody
does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from pipeline import flows, keys, metrics, scripts
from pipeline.accepting import Idempotency, key_arguments, limit_arguments, refusal
from pipeline.batching import MOST
from pipeline.clock import Clock
from pipeline.connection import Argument, Link, insist, run_in_hand, within
from pipeline.errors import LeaseLost, Reject
from pipeline.flows import FLOWS, DeliveryPayload, IncomingPayload, ReceivedMessage
from pipeline.job import Job, Json, new_id

if TYPE_CHECKING:
    from pipeline.settings import Settings
    from pipeline.streams import Entry

DELIVERY_FLOWS: Final = frozenset(f"delivery_{kind}" for kind in keys.DELIVERY_STAGES)

Status = Literal[
    "scheduled", "pending", "sending", "unknown", "sent", "undelivered", "failed", "delivered", "cancelled"
]
Told = Literal["sent", "undelivered", "failed", "delivered"]
"""What a provider may tell."""
WordOfTold = Literal["applied", "late", "duplicate", "unknown_delivery"]
WordOfReceived = Literal["accepted", "duplicate"]
WordOfBegin = Literal["begun", "busy", "held", "doubt", "taken", "cancelled", "gone"]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be delivered.

    Attributes:
        content: `from`, `to`, and what else was given of `subject`, `body`, `html`, `attachments`, `metadata`. An
            attachment is an object with `filename`, `content_type`, and `content` (base64) or `url`.
        scheduled_at: when to send it, as its sender wrote it, and `due_ms` the same instant; None: now.
        retry_of: the delivery that this one repeats by hand.
    """

    type: str
    tenant: str
    content: Json
    scheduled_at: str | None = None
    due_ms: int | None = None
    retry_of: str | None = None


@dataclass(frozen=True, slots=True)
class AcceptedDelivery:
    """A delivery was accepted, now or earlier under the same Idempotency-Key (`repeated`).

    Attributes:
        status: with which it was accepted, `scheduled` or `pending`.
    """

    id: str
    status: str
    deadline_ms: int
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a delivery stands.

    Attributes:
        content: see `Order`; an attachment that was carried has `size_bytes`, and its `content` where that was read and
            is kept still. Empty where only the standing was read.
        due_ms: when it was to go out.
        history: each status it has had, with the instant when it came to it.
        doubt: somebody has begun to hand it over, and has not said yet how it went.
    """

    id: str
    tenant: str
    type: str
    status: str
    content: Json
    created_ms: int
    due_ms: int
    history: list[tuple[str, int]]
    provider: str | None
    provider_id: str | None
    error: Json | None
    attempts: int
    retry_of: str | None
    doubt: bool

    @property
    def is_whole(self) -> bool:
        """Whether it could go out as it was read: what it carried is there."""
        return all("content" in one or "url" in one for one in self.content.get("attachments", ()))


@dataclass(frozen=True, slots=True)
class Begun:
    """May it be given to its provider now?

    Attributes:
        word: `begun` only; `busy` and `held`: not before `wait_s` is over; else see begin.lua.
        turn_us: the turn it was given, which is to be waited for; None: no waiting.
    """

    word: str
    wait_s: float = 0.0
    turn_us: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What a provider tells of a delivery.

    Attributes:
        id: by which the provider knows this event; the same when it tells it again.
        error: `{"type", "code", "message"}` of one that has failed.
    """

    id: str
    delivery_id: str
    status: Told
    error: Json | None = None


class Deliveries:
    """The deliveries in Redis, over one connection; `clock` is Redis' time."""

    def __init__(
        self,
        link: Link,
        settings: Settings,
        clock: Clock,
        *,
        consumer: str = "",
        entry_of: Callable[[str], Entry | None] = lambda _: None,
    ) -> None:
        """Work over *link*.

        Args:
            consumer: who holds the entries of the deliveries that begin here.
            entry_of: returns the entry in hand of a job.
        """
        self.clock = clock
        self._link = link
        self._settings = settings
        self._consumer = consumer
        self._entry_of = entry_of

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()

    # --- accepting -------------------------------------------------------------------------------

    async def accept(
        self,
        order: Order,
        *,
        delivery_id: str = "",
        idempotency: Idempotency | None = None,
        in_flight_limit: int | None = None,
        reply: str = "",
    ) -> AcceptedDelivery:
        """Accept a delivery: when this returns, it is in Redis and reaches a status that is final.

        Args:
            delivery_id: a fresh id; made here when empty.
            in_flight_limit: unfinished jobs its tenant may have.
            reply: the stream of the gateway that waits for its outcome.

        Raises:
            Overloaded: too much unfinished work, of all, of this tenant (`too_many_in_flight`), or of the recorder.
            IdempotencyMismatch: the key was used with another body.
            Reject: what it repeats has gone out, as its provider has told by now (`already_sent`), or has not ended yet
                (`under_way`).
            BrokerUnavailable: no answer within a second; with `unknown` it may have been accepted all the same.
        """
        self.clock.require()
        settings, flow = self._settings, FLOWS[f"delivery_{order.type}"]
        job = flows.new_job(
            flow.name, DeliveryPayload(scheduled_at=order.scheduled_at), job_id=delivery_id or new_id(),
            now_ms=order.due_ms or self.clock.now_ms(), lifetime_s=settings.lifetimes.delivery_s, tenant=order.tenant,
        )  # fmt: skip
        job.retry_of = order.retry_of
        stage, tail = job.launch()
        content, files = _parted(order.content)
        reply_of = await insist(
            self._link,
            scripts.DELIVER,
            (
                job.id, order.type, order.tenant, orjson.dumps(content), orjson.dumps(_asked(order, content)), tail,
                keys.stream(stage, job.priority), job.deadline_ms, order.due_ms or 0,
                int(settings.deliveries.keep_s * 1000), settings.admission.max_jobs, settings.history.max_backlog,
                *limit_arguments(order.tenant, in_flight_limit), reply, *key_arguments(idempotency),
                order.retry_of or "", orjson.dumps(files) if any(one is not None for one in files) else b"",
            ),
            self.clock,
            settings.redis.reconnect_cap_s,
        )  # fmt: skip
        word, answering, status = (part.decode() for part in reply_of[1:])
        if word == "already_sent":
            raise Reject(f"the delivery {order.retry_of} has gone out, as its provider has told since", code=word)
        if word == "under_way":
            raise Reject(f"the delivery {order.retry_of} has not ended yet: it may still go out by itself", code=word)
        if word not in {"accepted", "repeated"}:
            raise refusal(word, in_flight_limit)
        return AcceptedDelivery(answering, status or "pending", job.deadline_ms, repeated=word == "repeated")

    async def received(
        self, provider: str, event_id: str, message: ReceivedMessage, *, headers: dict[str, str], body: str
    ) -> WordOfReceived:
        """Accept a message that a provider brings from outside: when this returns, it will be carried on, once.

        Args:
            event_id: by which the provider knows it; the same when it brings it again.
            headers: of its request, those that tell of the message.
            body: of its request, as it came.

        Raises:
            Overloaded: too much unfinished work, or too much that waits to be recorded.
            BrokerUnavailable: no answer within a second.
        """
        self.clock.require()
        settings = self._settings
        payload = IncomingPayload(provider=provider, headers=headers, body=body, message=message)
        job = flows.new_job(
            "incoming", payload, job_id=new_id(), now_ms=self.clock.now_ms(),
            lifetime_s=settings.lifetimes.incoming_s, tenant=settings.deliveries.incoming_tenant,
        )  # fmt: skip
        stage, tail = job.launch()
        reply = await insist(
            self._link,
            scripts.INCOMING,
            (
                _event_key(provider, event_id), int(settings.deliveries.event_id_s * 1000), job.id, tail,
                keys.stream(stage, job.priority), job.tenant, job.deadline_ms, flows.record_of(job),
                settings.admission.max_jobs, settings.history.max_backlog,
            ),
            self.clock,
            settings.redis.reconnect_cap_s,
        )  # fmt: skip
        word: WordOfReceived = reply[1].decode()
        if word not in {"accepted", "duplicate"}:
            raise refusal(word)
        return word

    # --- handing over ----------------------------------------------------------------------------

    async def begin(
        self, job: Job, provider: str, *, per_s: float = 0.0, turn_us: int | None = None, again: bool = False
    ) -> Begun:
        """Ask whether the delivery of a job in hand may be given to its provider now; if so, it is `sending`.

        Args:
            per_s: how many messages a second the provider takes from all processes together; 0: any number.
            turn_us: the turn that was given before, and has come.
            again: whether this provider may be given it twice: it knows a message by its id.

        Raises:
            LeaseLost: the job is no longer in this hand.
            BrokerUnavailable: Redis does not answer; it is not to be handed over then.
        """
        entry = self._entry_of(job.id)
        if entry is None:
            raise LeaseLost
        gap_us = int(1e6 / per_s) if per_s else 0
        reply = await self._run(
            scripts.BEGIN,
            (
                entry.stream, keys.stage_of(entry.stream), entry.id, entry.deliveries, self._consumer, job.id, provider,
                gap_us, int(self._settings.deliveries.turn_wait_s * 1000), "" if turn_us is None else turn_us,
                "again" if again else "",
            ),
        )  # fmt: skip
        word = reply[1].decode()
        if word == "lost":
            raise LeaseLost
        wait_s = int(reply[2]) / 1e6 if len(reply) > 2 else 0.0
        return Begun(word, wait_s, int(reply[3]) if word == "wait" else None)

    async def hold(self, provider: str, for_s: float) -> float:
        """Leave a provider alone for a while, in all processes; return for how long it is from now on."""
        reply = await self._run(scripts.HOLD, (provider, int(for_s * 1000)))
        return int(reply[1]) / 1000

    # --- being told ------------------------------------------------------------------------------

    async def told(self, source: str, events: Sequence[Event]) -> list[WordOfTold]:
        """Note what a provider tells of deliveries.

        Args:
            source: who tells it.

        Returns:
            Of each event, in order: `applied`; `late`: the delivery stands higher already; `duplicate`: this event was
            told before; `unknown_delivery`: there is none of this id, or it is kept no longer.

        Raises:
            BrokerUnavailable: no answer within a second. Some may have been noted: who tells all of them again is told
                which.
        """
        words: list[WordOfTold] = []
        for first in range(0, len(events), MOST):
            some = events[first : first + MOST]
            args: list[Argument] = [int(self._settings.deliveries.event_id_s * 1000)]
            for one in some:
                error = orjson.dumps(one.error) if one.error else b""
                args += [_event_key(source, one.id), one.delivery_id, one.status, error]
            reply = await insist(self._link, scripts.TOLD, args, self.clock, self._settings.redis.reconnect_cap_s)
            for one, (word, *more) in zip(some, reply[1:], strict=True):
                words.append(word.decode())
                if more:
                    _count(one.status, *more)
        return words

    # --- reading ---------------------------------------------------------------------------------

    async def read(self, delivery_id: str) -> Delivery | None:
        """Return a delivery with all that it carries; None where Redis knows none of this id (any more).

        Raises what `Link.run` does, and ValueError, KeyError: its key holds what Penstock never wrote.
        """
        return (await self._read([delivery_id], _ALL))[0]

    async def read_many(self, ids: Sequence[str]) -> list[Delivery | None]:
        """Return deliveries, in order, without what their attachments hold; see `read`."""
        return await self._read(ids, _TEXT)

    async def find(self, ids: Sequence[str]) -> list[Delivery | None]:
        """Return what `read_many` does, where somebody at a gateway waits for it.

        Raises:
            BrokerUnavailable: no answer within a second.
        """
        return await within(self.read_many(ids))

    async def standing(self, ids: Sequence[str]) -> list[Delivery | None]:
        """Return how deliveries stand, and nothing of what they say; see `find`."""
        return await within(self._read(ids, _STANDING))

    async def _read(self, ids: Sequence[str], fields: Sequence[str]) -> list[Delivery | None]:
        rows = await self._link.run(scripts.DELIVERIES, (), (len(fields), *fields, *ids)) if ids else []
        return [_delivery(delivery_id, fields, row) for delivery_id, row in zip(ids, rows, strict=True)]

    async def _run(self, script: scripts.Script, args: Sequence[Argument]) -> Any:
        return await run_in_hand(self._link, script, args, self.clock)

    def __repr__(self) -> str:
        return f"<Deliveries over {self._link.name}>"


def _count(status: Told, kind: bytes, provider: bytes, took_ms: bytes) -> None:
    labels = (kind.decode(), provider.decode())
    metrics.DELIVERIES_TOLD.labels(*labels, status).inc()
    if status == "delivered":
        metrics.DELIVERED_S.labels(*labels).observe(int(took_ms) / 1000)


def _parted(content: Json) -> tuple[Json, list[str | None]]:
    """Part what is to be delivered from what its attachments hold (base64; None of one that is an address).

    A list of deliveries would carry megabytes of them, and nobody needs them once the message has gone out.
    """
    given: list[Json] = content.get("attachments", [])
    if not given:
        return content, []
    files = [one.get("content") for one in given]
    named = [_named(one, file) for one, file in zip(given, files, strict=True)]
    return content | {"attachments": named}, files


def _named(attachment: Json, file: str | None) -> Json:
    named = {name: value for name, value in attachment.items() if name != "content"}
    return named if file is None else named | {"size_bytes": len(file) // 4 * 3 - file[-2:].count("=")}


def _asked(order: Order, content: Json) -> Json:
    """Return what history is told of a delivery; of attachments their names: it is no store of files."""
    asked: Json = {name: content[name] for name in ("subject", "body", "html", "metadata") if name in content}
    names = ("filename", "content_type", "size_bytes", "url")
    listed = [
        {name: one[name] for name in names if one.get(name) is not None} for one in content.get("attachments", ())
    ]
    asked |= {"type": order.type, "sender": content["from"], "recipient": content["to"]}
    asked |= {"attachments": listed} if listed else {}
    asked |= {"scheduled_ms": order.due_ms} if order.due_ms else {}
    return asked | ({"retry_of": order.retry_of} if order.retry_of else {})


def told_of(message_id: str, message: Mapping[str, Any]) -> Json:
    """Return what a webhook tells of a message from outside.

    Args:
        message: what `flows.ReceivedMessage` holds, and `provider`.
    """
    names = ("type", "sender", "recipient", "subject", "body", "media", "provider", "provider_id")
    told = {name: message.get(name) for name in names}
    return {"message_id": message_id, "from": told.pop("sender"), "to": told.pop("recipient")} | told


def _event_key(source: str, event_id: str) -> str:
    """Return an event as it stands in keys: ids of providers may be long, and hold anything."""
    return hashlib.sha256(f"{source}\n{event_id}".encode()).hexdigest()[:32]


_STANDING: Final = (
    "tenant", "type", "status", "created_ms", "due_ms", "history", "provider", "provider_id", "error", "attempts",
    "retry_of", "doubt",
)  # fmt: skip
_TEXT: Final = (*_STANDING, "content")
_ALL: Final = (*_TEXT, "files")
"""Fields of a delivery's record: how it stands; and what it says; and what its attachments hold."""


def _delivery(delivery_id: str, names: Sequence[str], row: Sequence[bytes | None]) -> Delivery | None:
    fields = {name: value.decode() for name, value in zip(names, row, strict=True) if value is not None}
    if not fields:
        return None
    content: Json = orjson.loads(fields["content"]) if "content" in names else {}
    for one, file in zip(content.get("attachments", ()), orjson.loads(fields.get("files", "[]")), strict=False):
        if file is not None:
            one["content"] = file
    return Delivery(
        id=delivery_id,
        tenant=fields["tenant"],
        type=fields["type"],
        status=fields["status"],
        content=content,
        created_ms=int(fields["created_ms"]),
        due_ms=int(fields["due_ms"]),
        history=[(status, at_ms) for status, at_ms in orjson.loads(fields["history"])],
        provider=fields.get("provider") or None,
        provider_id=fields.get("provider_id") or None,
        error=orjson.loads(fields["error"]) if fields.get("error") else None,
        attempts=int(fields.get("attempts") or 0),
        retry_of=fields.get("retry_of"),
        doubt="doubt" in fields,
    )
