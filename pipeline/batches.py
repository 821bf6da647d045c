"""Batches of messages: accepted as a whole or not at all, counted, gathered, read.

A message is a job that belongs to a batch; a single one has a batch of its own. A batch is a job, too, delayed until
its members' deadline and a little more. Whoever ends a member keeps its result (`message:<id>`) and counts it in the
same script; the last one makes the batch's job due at once. That job (stage aggregator) gathers the results in order,
and with its end the batch is closed. So a batch closes when its members have ended, and at its deadline in any case.

A small batch is accepted by one script. Of a large one the members are staged first, portion by portion, as live
records that nobody works on. One script then commits the batch and touches none of them: workers have them enter the
queue in the order given, portion by portion again, so that nobody else has to wait for Redis. What was never committed
is nothing, and is taken away after a minute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import orjson

from pipeline import flows, keys, scripts
from pipeline.accepting import Idempotency, key_arguments, limit_arguments, refusal
from pipeline.clock import Clock, monotonic_us
from pipeline.connection import IN_LINE_FOR_S, Argument, Line, Link, insist, within
from pipeline.errors import BrokerUnavailable, MaybeAccepted, Overloaded, PenstockError, TooManyQueues
from pipeline.job import Job, Json, Priority, new_id

if TYPE_CHECKING:
    from pipeline.settings import Settings

AT_ONCE: Final = 50
"""Members that one script takes: about 1 ms during which Redis serves nobody else."""
PAUSE_S: Final = 0.002
"""After each portion that is staged, at most: where Redis is slow a batch must still be accepted within two seconds."""
STAGED_FOR_MS: Final = 60_000
"""Members that were staged go when nothing was added to them for so long, and no commit came."""
AT_ONCE_BYTES: Final = 1 << 20
PIECE_BYTES: Final = 4 << 20
"""Of results, read by one command: some ten milliseconds, far from what a client waits for one answer of Redis."""
MESSAGE_FLOWS: Final = ("message", "message_retrieve")
"""What members of a batch may be; the second answers from the documents."""
FIRST_TO_BEGIN: Final = 16
"""Members looked at to say whether a batch has begun: the very first may have been handed back meanwhile."""
GRACE_MS: Final = 5_000
"""After the members' deadline: whoever holds one, or the next tick, has ended it by then."""


LOST: Final = {"type": "failed", "code": "lost", "message": "nothing is known of this message any more"}
"""The error of a message that Redis has lost before it had its outcome."""


@dataclass(frozen=True, slots=True)
class Message:
    """One prompt, as it goes to the model."""

    prompt: str
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What one request asks for.

    Attributes:
        queue_id: as the client named it.
        single: it asked for one message, not for a batch that happens to hold one.
        due_ms: when to begin; None: now.
        retry_of: the message that this one repeats by hand.
    """

    tenant: str
    queue_id: str
    messages: Sequence[Message]
    single: bool = False
    model: str | None = None
    retrieve: bool = False
    webhook_url: str | None = None
    webhook_event: str | None = None
    due_ms: int | None = None
    retry_of: str | None = None


@dataclass(frozen=True, slots=True)
class AcceptedBatch:
    """A batch was accepted, now or earlier under the same Idempotency-Key (`repeated`).

    Attributes:
        message_ids: in the order given; none where Redis has let go of the batch since.
    """

    batch_id: str
    message_ids: Sequence[str]
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """How a batch stands.

    Attributes:
        status: `pending`, `processing`, or how it was closed.
    """

    batch_id: str
    queue_id: str
    status: str
    request_count: int
    response_count: int
    failed_count: int
    created_ms: int
    closed_ms: int | None
    webhook_url: str | None

    @property
    def is_closed(self) -> bool:
        """Say whether nothing changes any more."""
        return self.closed_ms is not None


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a batch: `state` is `queued`, `running`, `ended` or `lost`; `text` its result once it has one.

    Each result is kept as long as its batch, but counted from its own end: so it goes first, and only history has it.
    """

    id: str
    text: bytes
    state: str

    @property
    def is_alive(self) -> bool:
        """Say whether it may still end."""
        return self.state in {"queued", "running"}

    @property
    def is_remembered(self) -> bool:
        """Say whether it has ended, and only history still knows how."""
        return self.state == "ended" and not self.text

    def result(self) -> Json:
        """Return it as the results of a batch show it: as lost where nothing is kept of it."""
        if self.text:
            return result_of(self.text)
        if not self.is_alive:
            return {"message_id": self.id, "status": "failed", "error": LOST}
        return {"message_id": self.id, "status": "processing" if self.state == "running" else "pending"}


@dataclass(frozen=True, slots=True)
class Portion:
    """Some members of a batch, in order.

    Attributes:
        verdict: how the batch would be closed now.
        is_cancelled: the batch is to be cancelled.
        lost: how many of these were found to be lost, just now.
    """

    verdict: str
    is_cancelled: bool
    lost: int
    members: list[Member]


@dataclass(frozen=True, slots=True)
class Queue:
    """What messages of a queue get where they name nothing themselves."""

    model: str | None = None
    system_prompt: str | None = None
    webhook_url: str | None = None
    webhook_event: str | None = None


class Batches:
    """The batches in Redis, over connections of their own: a large one must not hold up anything else.

    Batches are accepted over one of these by turns, and the time that Redis has to answer runs from one's turn: nobody
    is refused because a thousand others came at once. Results, which may be very long, are read over another one, piece
    by piece.
    """

    def __init__(self, link: Link, settings: Settings, clock: Clock, *, accepting: Link | None = None) -> None:
        """Work over *link*, and where many may come at once over another one that does nothing but accept."""
        self._link = link
        self._reading = Link(settings.redis, "results")
        self._accepting = accepting or link
        self._line = Line()
        self._staging = Line()
        self._settings = settings
        self._clock = clock

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()
        await self._reading.close()
        await self._accepting.close()

    # --- accepting -------------------------------------------------------------------------------

    async def accept(
        self,
        order: Order,
        *,
        idempotency: Idempotency | None = None,
        in_flight_limit: int | None = None,
    ) -> AcceptedBatch:
        """Accept a batch: when this returns, all of it is in Redis; when it raises, nothing is.

        Args:
            in_flight_limit: unfinished jobs its tenant may have; a batch counts as one.

        Raises:
            Overloaded: too much unfinished work, of all, of this tenant (`too_many_in_flight`), or of the recorder; or
                too many came before it.
            IdempotencyMismatch: the key was used with another body.
            MaybeAccepted: no answer within a second of its turn, and the batch may be there all the same.
            BrokerUnavailable: no answer within a second of its turn.
        """
        self._clock.require()
        plan = _Plan(order, self._settings, self._clock.now_ms())
        head = self._commit_arguments(plan, idempotency, in_flight_limit)
        until_us = monotonic_us() + int(IN_LINE_FOR_S * 1e6)
        word = answering = ""
        for _ in range(2):  # once more, should what was staged have gone again
            word, answering = await self._place(plan, head, until_us)
            if word != "unstaged":
                break
        match word:
            case "accepted":
                return AcceptedBatch(plan.batch_id, plan.ids)
            case "repeated":
                return AcceptedBatch(answering, await self._ids_of(answering, until_us), repeated=True)
            case "unstaged":
                raise BrokerUnavailable("Redis forgot a part of the batch while it was being accepted")
        raise refusal(word, in_flight_limit)

    async def _place(self, plan: _Plan, head: Sequence[Argument], until_us: int) -> tuple[str, str]:
        portions = _portions(plan.members())
        async with self._line.turn(until_us):
            first = next(portions)  # made in its turn: what waits in line takes no more memory than it came with
            second = next(portions, None)
            if second is None:
                return await self._commit([*head, "here", *(part for member in first for part in member)])
        async with self._staging.turn(until_us):  # one after the other: many at once would all be late
            try:
                return await self._place_large(plan, head, until_us, chain((first, second), portions))
            except Overloaded:  # it was too late, or memory is full: others need what it has taken
                await self._give_up(plan.batch_id)
                raise

    async def _place_large(
        self, plan: _Plan, head: Sequence[Argument], until_us: int, portions: Iterable[Sequence[_Row]]
    ) -> tuple[str, str]:
        async with self._line.turn(until_us):  # what is refused anyway is not staged: it would lie there for a minute
            reply = await self._prepare(scripts.BATCH, [*head, "ask", plan.size])
        if reply[1] != b"free":
            return reply[1].decode(), reply[2].decode()
        staged = 0
        for portion in portions:
            async with self._line.turn(until_us):
                began_us = monotonic_us()
                if await self._stage(plan, staged, portion) == b"unstaged":
                    return "unstaged", plan.batch_id
                took_s = (monotonic_us() - began_us) / 1e6
            staged += len(portion)
            await asyncio.sleep(min(took_s, PAUSE_S))  # half of the time is everybody else's
        async with self._line.turn(until_us):
            return await self._commit([*head, "staged", plan.size])

    async def _give_up(self, batch_id: str) -> None:
        """Let what was staged go now, unless it was committed; else, with Redis away, it goes in a minute."""
        with suppress(PenstockError):
            await within(self._accepting.run(scripts.UNSTAGE, (), (AT_ONCE, STAGED_FOR_MS, batch_id)))

    async def _stage(self, plan: _Plan, first: int, portion: Sequence[_Row]) -> bytes:
        args: list[Argument] = [plan.batch_id, first, plan.stream, plan.order.tenant, plan.deadline_ms]
        for member in portion:
            args += member
        word: bytes = (await self._prepare(scripts.STAGE, args))[1]
        return word

    async def _prepare(self, script: scripts.Script, args: Sequence[Argument]) -> Any:
        """Do what comes before a commit: whatever becomes of it, nothing is accepted by it."""
        try:
            return await self._insist(script, args)
        except BrokerUnavailable as error:
            raise BrokerUnavailable(str(error)) from error

    async def _commit(self, args: Sequence[Argument]) -> tuple[str, str]:
        try:
            reply = await self._insist(scripts.BATCH, args)
        except BrokerUnavailable as error:
            if error.unknown:
                raise MaybeAccepted from error
            raise
        return reply[1].decode(), reply[2].decode()

    async def _insist(self, script: scripts.Script, args: Sequence[Argument]) -> Any:
        return await insist(self._accepting, script, args, self._clock, self._settings.redis.reconnect_cap_s)

    async def _ids_of(self, batch_id: str, until_us: int) -> list[str]:
        async with self._line.turn(until_us):
            found = await within(self._accepting.call("LRANGE", keys.BATCH_MEMBERS + batch_id, 0, -1))
        return [member.decode() for member in found]

    def _commit_arguments(
        self, plan: _Plan, idempotency: Idempotency | None, in_flight_limit: int | None
    ) -> list[Argument]:
        settings, order, job = self._settings, plan.order, plan.job
        stage, tail = job.launch()
        return [
            plan.batch_id, order.tenant, plan.stream, order.due_ms or 0, plan.deadline_ms,
            settings.admission.max_jobs, settings.history.max_backlog,
            *limit_arguments(order.tenant, in_flight_limit), *key_arguments(idempotency),
            tail, keys.stream(stage, job.priority), job.deadline_ms, plan.closes_ms,
            int(settings.messages.keep_s * 1000), order.queue_id, orjson.dumps(plan.told()), plan.created_ms,
        ]  # fmt: skip

    # --- gathering -------------------------------------------------------------------------------

    async def gather(self, batch_id: str, first: int, most: int, *, close: bool = False) -> Portion | None:
        """Return how members stand, from number *first* on; None when there is no such batch.

        Args:
            close: end those that are lost.
        """
        fallback_ms = int(self._settings.worker.completion_ttl_s * 1000)
        reply = await self._link.run(scripts.GATHER, (), (batch_id, first, most, "close" if close else "", fallback_ms))
        if reply[0] == b"gone":
            return None
        rows = zip(reply[3::3], reply[4::3], reply[5::3], strict=True)
        members = [Member(member.decode(), text, state.decode()) for member, text, state in rows]
        return Portion(reply[0].decode(), reply[1] == b"cancel", int(reply[2]), members)

    async def cancel_member(self, message_id: str, tenant: str) -> None:
        """Cancel one member: at once while it waits, by its worker while it runs."""
        ttl_ms = int(self._settings.worker.completion_ttl_s * 1000)
        await self._link.run(scripts.CANCEL, (), (message_id, tenant, ttl_ms))

    async def keep_results(self, batch_id: str, text: bytes, *, told: bool) -> None:
        """Write what the batch's results are, for good; doing it twice changes nothing.

        Args:
            told: somebody is to be told of them: then they are kept for as long as that may be tried, too.
        """
        keep_s = self._settings.messages.keep_s
        ttl_ms = int(max(keep_s, self._settings.lifetimes.webhook_s if told else 0) * 1000)
        await self._link.call("SET", keys.BATCH_RESULTS + batch_id, text, "PX", ttl_ms)

    # --- reading ---------------------------------------------------------------------------------

    async def standing(self, batch_id: str, tenant: str) -> Standing | None:
        """Return how a batch stands; None when Redis does not know it, or not of this tenant."""
        names = (
            "tenant",
            "queue",
            "status",
            "req.count",
            "res.count",
            "failed.count",
            "created_ms",
            "closed_ms",
            "asked",
        )
        found = await within(self._link.call("HMGET", keys.BATCH + batch_id, *names))
        if found[0] is None or found[0].decode() != tenant:
            return None
        texts = [value.decode() if value is not None else "" for value in found]
        wanted, ended, failed, created_ms = (int(text or 0) for text in texts[3:7])
        status = texts[2]
        if not texts[7]:
            status = "processing" if ended or await self._has_begun(batch_id) else "pending"
        closed_ms = int(texts[7]) if texts[7] else None
        webhook_url = orjson.loads(texts[8] or b"{}").get("webhook_url")
        return Standing(batch_id, texts[1], status, wanted, ended, failed, created_ms, closed_ms, webhook_url)

    async def _has_begun(self, batch_id: str) -> bool:
        """Say whether one of the first members is in somebody's hands, or was: those given first begin first."""
        portion = await within(self.gather(batch_id, 0, FIRST_TO_BEGIN))
        return portion is not None and any(member.state == "running" for member in portion.members)

    async def members(self, batch_id: str, first: int, most: int) -> list[Member] | None:
        """Return members in order; None when Redis does not know the batch."""
        portion: Portion | None = await within(self.gather(batch_id, first, most))
        return None if portion is None else portion.members

    async def results(self, batch_id: str) -> bytes | None:
        """Return the text that the aggregator wrote; None while there is none."""
        key = keys.BATCH_RESULTS + batch_id
        size = int(await within(self._reading.call("STRLEN", key)))
        pieces: list[bytes] = []
        for first in range(0, size, PIECE_BYTES):
            pieces.append(await within(self._reading.call("GETRANGE", key, first, first + PIECE_BYTES - 1)))
            if not pieces[-1]:  # they have gone meanwhile
                return None
        return b"".join(pieces) or None

    async def message(self, message_id: str, tenant: str) -> Json | None:
        """Return how a message stands; None when Redis does not know it, or not of this tenant."""
        reply = await within(self._link.run(scripts.MESSAGE, (), (message_id,)))
        if not reply or reply[1].decode() != tenant:
            return None
        text, _, state, batch_id, queue_id, created_ms, told = (part.decode() for part in reply)
        shown = Member(message_id, text.encode(), state).result()
        shown |= {"batch_id": batch_id, "queue_id": queue_id or None}
        if retry_of := orjson.loads(told or "{}").get("retry_of"):
            shown["retry_of"] = retry_of
        return shown | {"created_ms": int(created_ms)} if created_ms else shown

    # --- queues ----------------------------------------------------------------------------------

    async def queue(self, tenant: str, queue_id: str) -> Queue:
        """Return a queue's defaults: empty ones of a queue that nobody has set up."""
        names = Queue.__slots__
        key = keys.QUEUE + keys.of_tenant(tenant, queue_id)
        async with self._line.turn():  # every batch asks this before it is accepted
            found = await within(self._accepting.call("HMGET", key, *names))
        return Queue(*(value.decode() if value is not None else None for value in found))

    async def set_queue(self, tenant: str, queue_id: str, queue: Queue, *, most: int) -> None:
        """Put defaults in the place of those that a queue had; its secret stays.

        Args:
            most: queues that its tenant may have.

        Raises:
            TooManyQueues: it would be one more.
        """
        args: list[Argument] = [keys.of_tenant(tenant, queue_id), queue_id, tenant, orjson.dumps(_given(queue))]
        args.append(most)
        for name in Queue.__slots__:
            args += [name, getattr(queue, name) or ""]
        if await within(self._link.run(scripts.QUEUE, (), args)) == b"full":
            raise TooManyQueues

    def __repr__(self) -> str:
        return f"<Batches over {self._link.name}>"


# --- values ------------------------------------------------------------------------------------


def webhook_id_of(batch_id: str) -> str:
    """Return the id of the webhook that tells of a batch: its job's, and what its receiver knows it by."""
    return f"msg_{batch_id}"


def order_again(job: Job, queue_id: str, told: Json) -> Order:
    """Return what repeats a message by hand: by itself, and with what its batch was asked for.

    Args:
        job: the message as a job, with `retry_of`.
        told: what history was told of its batch.
    """
    payload = job.payload
    turns = [turn["content"] for turn in payload.get("messages") or ()]
    prompt = turns[-1] if turns else payload.get("prompt") or payload["query"]
    return Order(
        tenant=job.tenant,
        queue_id=queue_id,
        messages=[Message(prompt, turns[0] if len(turns) > 1 else payload.get("system_prompt"))],
        single=True,
        model=payload.get("model"),
        retrieve=job.flow == MESSAGE_FLOWS[True],
        webhook_url=told.get("webhook_url"),
        webhook_event=told.get("webhook_event"),
        retry_of=job.retry_of,
    )


def result_of(text: bytes) -> Json:
    """Return a member's result, as the results of its batch show it, from the text of `message:<id>`."""
    body = orjson.loads(text)
    result: Json = {"message_id": body["id"], "status": body["status"]}
    answer = "result" if body["status"] == "completed" else "error"
    result[answer] = body[answer]
    return result | {name: body.get(name) for name in ("worker", "replica", "attempts", "timings_ms")}


def result_text(member: Member) -> bytes:
    """Return a member as it stands in the results of its batch (JSON)."""
    return orjson.dumps(member.result())


def results_text(batch_id: str, status: str, results: Iterable[bytes]) -> bytes:
    """Return the body of `GET /batch/{id}/results`; *results* are JSON texts, in order."""
    return b'{"batch_id":"%b","status":"%b","results":[%b]}' % (batch_id.encode(), status.encode(), b",".join(results))


_Row = tuple[Argument, Argument, Argument]
"""A member as scripts take it: id, tail of its envelope, and an array of its id and what history is told."""


class _Plan:
    """An order with ids and instants: what is sent, however often, is the same."""

    def __init__(self, order: Order, settings: Settings, now_ms: int) -> None:
        self.order = order
        self.batch_id = new_id()
        self.size = len(order.messages)
        self.ids = [new_id()]  # of those that were made so far
        self.created_ms = now_ms
        self.due_ms = max(now_ms, order.due_ms or 0)
        self._lifetime_s = settings.lifetimes.message_s
        self.deadline_ms = self.due_ms + int(self._lifetime_s * 1000)
        self.closes_ms = self.deadline_ms + GRACE_MS
        low = self.size > settings.messages.low_priority_from
        self.priority: Priority = "low" if low else "normal"
        self.flow = MESSAGE_FLOWS[order.retrieve]
        self.stream = keys.stream(flows.FLOWS[self.flow].route[0], self.priority)
        payload = flows.BatchPayload(
            batch_id=self.batch_id,
            queue=keys.of_tenant(order.tenant, order.queue_id),
            request_count=self.size,
            created_ms=now_ms,
            webhook_url=order.webhook_url,
            message_id=self.ids[0] if order.single else None,
        )
        self.job = flows.new_job(
            "batch",
            payload,
            job_id=self.batch_id,
            now_ms=self.closes_ms,
            lifetime_s=settings.lifetimes.batch_s,
            tenant=order.tenant,
        )

    def told(self) -> Json:
        """Return what history is told of the batch."""
        order = self.order
        told = {"queue_id": order.queue_id, "request_count": self.size, "created_ms": self.created_ms}
        more = {
            "webhook_url": order.webhook_url,
            "webhook_event": order.webhook_event,
            "retry_of": order.retry_of,  # of its only message; history knows that of the message itself
        }
        return told | {name: value for name, value in more.items() if value is not None}

    def members(self) -> Iterator[_Row]:
        """Yield the members one by one: a large batch is never in memory twice. Once more, they are the same."""
        for position, message in enumerate(self.order.messages):
            if position == len(self.ids):
                self.ids.append(new_id())
            message_id = self.ids[position]
            _, tail = self._job(message_id, message).launch()
            yield message_id, tail, orjson.dumps([message_id, self._told_of(position, message)])

    def _job(self, message_id: str, message: Message) -> Job:
        order = self.order
        payload: flows.Payload
        if order.retrieve:
            payload = flows.RetrievalPayload(
                query=message.prompt, system_prompt=message.system_prompt, model=order.model
            )
        elif message.system_prompt is not None:
            turns = [
                flows.ChatMessage(role="system", content=message.system_prompt),
                flows.ChatMessage(role="user", content=message.prompt),
            ]
            payload = flows.PromptPayload(messages=turns, model=order.model)
        else:
            payload = flows.PromptPayload(prompt=message.prompt, model=order.model)
        job = flows.new_job(
            self.flow,
            payload,
            job_id=message_id,
            now_ms=self.due_ms,
            lifetime_s=self._lifetime_s,
            tenant=order.tenant,
            priority=self.priority,
        )
        job.retry_of = order.retry_of
        return job

    def _told_of(self, position: int, message: Message) -> Json:
        order = self.order
        told = {
            "batch_id": self.batch_id,
            "queue_id": order.queue_id,
            "position": position,
            "prompt": message.prompt,
            "created_ms": self.created_ms,
        }
        more = {
            "system_prompt": message.system_prompt,
            "model": order.model,
            "retrieve": order.retrieve or None,
            "retry_of": order.retry_of,
            "schedule_at_ms": order.due_ms,
        }
        return told | {name: value for name, value in more.items() if value is not None}


def _portions(members: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Divide members into what one script takes at once, by number and by size."""
    portion: list[_Row] = []
    size = 0
    for member in members:
        portion.append(member)
        size += sum(len(part) for part in member if isinstance(part, (str, bytes)))
        if len(portion) == AT_ONCE or size >= AT_ONCE_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _given(queue: Queue) -> Json:
    return {name: value for name in Queue.__slots__ if (value := getattr(queue, name)) is not None}
