"""The pipeline as a gateway sees it: submit, wait, look, cancel.

One `Front` serves a whole gateway process. Submits that come at the same time travel in one script call. One reader
serves all waiters: a reply stream of this gateway's own wakes them, with outcomes that are short, and a sweep over all
waiting ids stands behind it, so that an answer is found even where the wake-up was lost. The completion key is the
truth; the reply stream is a hint.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import orjson
import structlog
from msgspec import Struct

from pipeline import flows, keys, scripts
from pipeline.accepting import Idempotency, key_arguments, limit_arguments, refusal
from pipeline.api_keys import KeyRing
from pipeline.batches import AcceptedBatch, Batches, Order
from pipeline.batching import Batcher
from pipeline.chats import Chats, ChatWatch, Message, Said
from pipeline.clock import Clock, monotonic_us
from pipeline.connection import ANSWER_WITHIN_S, Argument, Backoff, Line, Link, Outage, OutOfMemory, parse_info, within
from pipeline.deliveries import AcceptedDelivery, Deliveries
from pipeline.deliveries import Order as DeliveryOrder
from pipeline.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    JobLost,
    Overloaded,
    PenstockError,
)
from pipeline.job import Completion, Job, Json, decode, new_id
from pipeline.limit import Patience
from pipeline.overview import Overview, look
from pipeline.replicas import read_registry
from pipeline.reports import Reports
from pipeline.streams import number
from pipeline.webhooks import Secrets, Webhooks

if TYPE_CHECKING:
    from types import TracebackType

    from pipeline.settings import Settings

log = structlog.get_logger(__name__)

RESENDINGS: Final = 3
"""Of one batch of submits while Redis is away: about 0.15 s, for a restart of a connection, not of Redis."""
SWEEP_EVERY_S: Final = 1.0
SWEEP_AT_ONCE: Final = 500
BLOCK_MS: Final = 1_000
REPLY_STREAM_TTL_MS: Final = 60_000
GRACE_S: Final = 3.0
"""How long after its deadline an outcome is waited for: whoever holds the job, or the next tick, writes it."""
OVERVIEW_FOR_S: Final = 1.0
"""Whoever asks within this time sees the same picture: however many ask, Redis is looked at once a second."""
LOOK_WITHIN_S: Final = 4.0  # Prometheus gives up after five, as deploy/prometheus says
REGISTERED_FOR_S: Final = 30.0
"""A replica that no llm worker has registered for so long is not leased to."""


class Accepted(Struct, frozen=True):
    """A job was accepted, now or earlier under the same Idempotency-Key (`repeated`)."""

    job_id: str
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """A live job on its way.

    Attributes:
        due_ms: when it is due, on Redis' clock; None when it is due already.
    """

    job: Job
    where: Literal["queued", "running"]
    due_ms: int | None


@dataclass(frozen=True, slots=True)
class Health:
    """What the pipeline needs, and why it lacks it; None means fine."""

    redis: str | None
    stages: dict[str, str | None]

    def is_ready(self) -> bool:
        """Say whether queries can be answered."""
        return self.redis is None and not any(self.stages.values())


class _Waiting(Struct, eq=False):
    """A job whose outcome is of interest here, from before it is submitted: no wake-up may come too early."""

    futures: list[asyncio.Future[Completion]] = []
    completion: Completion | None = None
    gone: int = 0  # sweeps in a row that found neither completion nor live record


class _Submission(Struct, eq=False):
    """A job to be accepted, as long as its caller is there (`is_wanted`)."""

    job: Job
    leases: bool
    reply: str
    in_flight_limit: int | None
    idempotency: Idempotency | None
    is_wanted: bool = True


class Front:
    """Submits jobs and waits for their outcomes; an async context manager."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.clock = Clock()
        self._settings = settings
        self._reply_stream = f"{keys.REPLY}{name}:{secrets.token_hex(4)}"
        self._submitter = Link(settings.redis, "submit")
        self._link = Link(settings.redis, "front")
        self._webhooks = Webhooks(self._link, self.clock)
        self._secrets_line = Line()
        self._sweeper = Link(settings.redis, "sweep")
        self._reader = Link(settings.redis, "replies")
        # A look is some forty commands, so it may take its time; each of them is given up as any other.
        within_s = min(settings.redis.reply_timeout_s, ANSWER_WITHIN_S)
        self._looker = Link(settings.redis.model_copy(update={"reply_timeout_s": within_s}), "overview")
        accepting = Link(settings.redis, "accept")
        self.batches = Batches(Link(settings.redis, "batches"), settings, self.clock, accepting=accepting)
        self.chats = Chats(Link(settings.redis, "chats"), settings, self.clock)
        self.chat_watch = ChatWatch(Link(settings.redis, "chat-watch"), settings.redis.reconnect_cap_s)
        self._reports = Reports(Link(settings.redis, "reports"), settings, self.clock)
        self.deliveries = Deliveries(Link(settings.redis, "deliveries"), settings, self.clock)
        self._key_link = Link(settings.redis, "keys")
        self._overview: tuple[int, Overview] | None = None  # when it was made, on the monotonic clock
        self._looking = asyncio.Lock()
        self._outbox: Batcher[_Submission, tuple[str, str]] = Batcher(self._send)
        self._waiting: dict[str, _Waiting] = {}
        self._patience = Patience()
        self._replicas: list[str] = []
        self._memory_is_short = False
        self._records_are_behind = False
        self._key_questions: Batcher[str, bytes | None] = Batcher(self._send_key_questions)
        self.knows_api_keys: bool | None = None  # whether any were made; None while nobody has looked
        self._last_reply = b"0"
        self._rng = Random()
        self._tasks: list[asyncio.Task[None]] = []
        self._submit_outage = Outage("gateway submit")

    @classmethod
    def create(cls, settings: Settings, name: str) -> Self:
        """Return a front for the gateway called *name*."""
        return cls(settings, name)

    async def __aenter__(self) -> Self:
        with suppress(BrokerUnavailable):  # then nothing is accepted until Redis was reached
            await within(self._observe_clock())
        self._tasks = [
            asyncio.create_task(self._read_replies(), name="replies"),
            asyncio.create_task(self._sweep_forever(), name="sweep"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(PenstockError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._link.call("DEL", self._reply_stream)
        await self._outbox.close()
        await self._key_questions.close()
        for link in (self._submitter, self._link, self._sweeper, self._reader, self._looker, self._key_link):
            await link.close()
        await self.batches.close()
        await self.chat_watch.close()
        await self.chats.close()
        await self._reports.close()
        await self.deliveries.close()

    # --- submitting ------------------------------------------------------------------------------

    async def submit(
        self,
        job: Job,
        *,
        idempotency: Idempotency | None = None,
        in_flight_limit: int | None = None,
        wait: bool = True,
    ) -> Accepted:
        """Accept *job*: when this returns, the job is in Redis and will reach exactly one outcome.

        Args:
            in_flight_limit: unfinished jobs its tenant may have; None sets no limit.
            wait: whether this gateway is going to `wait` for it.

        Raises:
            Overloaded: too much unfinished work, of all or (`too_many_in_flight`) of this tenant; or too much waits to
                be recorded, where this would be, too.
            IdempotencyMismatch: the key was used with another body.
            BrokerUnavailable: no answer within a second; with `unknown` the job may have been accepted all the same.
        """
        self.clock.require()  # the job's deadline was counted from it
        self._refuse_overload(job.flow)
        reply = self._reply_stream if wait else ""
        submission = _Submission(job, flows.FLOWS[job.flow].leases, reply, in_flight_limit, idempotency)
        if wait:
            self._waiting[job.id] = _Waiting()
        word = answering_id = ""
        try:
            word, answering_id = await self._outbox.add(submission, within_s=ANSWER_WITHIN_S)
        except TimeoutError as error:
            raise BrokerUnavailable("Redis does not answer", unknown=True) from error
        except OutOfMemory as error:
            raise Overloaded("Redis is out of memory; try again later") from error
        finally:
            submission.is_wanted = False
            if word != "accepted":
                self._waiting.pop(job.id, None)
        if word not in {"accepted", "repeated"}:
            raise refusal(word, in_flight_limit)
        return Accepted(answering_id, repeated=word == "repeated")

    async def submit_batch(
        self, order: Order, *, idempotency: Idempotency | None = None, in_flight_limit: int | None = None
    ) -> AcceptedBatch:
        """Accept a batch of messages, all or nothing; arguments and errors as for `submit`."""
        self._refuse_overload("message")
        return await self.batches.accept(order, idempotency=idempotency, in_flight_limit=in_flight_limit)

    async def say(
        self,
        tenant: str,
        chat_id: str,
        message: Message,
        *,
        idempotency: Idempotency | None = None,
        in_flight_limit: int | None = None,
    ) -> Said:
        """Accept a message of a chat; arguments and errors as for `submit`, and see `Chats.say`."""
        self._refuse_overload("chat")
        return await self.chats.say(tenant, chat_id, message, idempotency=idempotency, in_flight_limit=in_flight_limit)

    async def deliver(
        self,
        order: DeliveryOrder,
        *,
        idempotency: Idempotency | None = None,
        in_flight_limit: int | None = None,
        wait: bool = False,
    ) -> AcceptedDelivery:
        """Accept a delivery; arguments and errors as for `submit`, and see `Deliveries.accept`."""
        self._refuse_overload(f"delivery_{order.type}")
        delivery_id = new_id()
        if wait:
            self._waiting[delivery_id] = _Waiting()
        answering = ""
        try:
            accepted = await self.deliveries.accept(
                order, delivery_id=delivery_id, idempotency=idempotency, in_flight_limit=in_flight_limit,
                reply=self._reply_stream if wait else "",
            )  # fmt: skip
            answering = accepted.id
        finally:
            if answering != delivery_id:
                self._waiting.pop(delivery_id, None)
        return accepted

    def _refuse_overload(self, flow: str) -> None:
        """Refuse work of this flow while what it needs is nearly used up, as the last sweep saw it.

        Raises:
            Overloaded: Redis' memory is short, or the history is too far behind to be told of more.
        """
        if self._memory_is_short:
            raise Overloaded("Redis is nearly out of memory; try again later")
        if self._records_are_behind and flows.FLOWS[flow].recorded:
            raise Overloaded("too much waits to be recorded; try again later")

    async def _send(self, batch: Sequence[_Submission]) -> list[tuple[str, str]]:
        """Send one batch; send it again after an unknown reply: the script knows a job's id.

        What is sent, again or after a wait for a connection, is only what somebody still waits for: a caller that has
        heard 503 asks again with another job, and this one would run for nobody.
        """
        backoff = Backoff(self._settings.redis.reconnect_cap_s, self._submit_outage)
        while True:
            try:
                await self._submitter.open(ANSWER_WITHIN_S)
                sent = [submission for submission in batch if submission.is_wanted]
                if not sent:
                    return [("", "")] * len(batch)
                sent_us = monotonic_us()
                args = self._submit_arguments(sent)
                reply = await self._submitter.run(scripts.SUBMIT, (), args, timeout_s=ANSWER_WITHIN_S)
            except BrokerUnavailable as error:
                if backoff.failures >= RESENDINGS:
                    raise
                await backoff.failed(error)
                continue
            backoff.succeeded()
            self.clock.observe(int(reply[0]), sent_us)
            answers = ((word.decode(), job_id.decode()) for word, job_id in zip(reply[1::2], reply[2::2], strict=True))
            answer_to = dict(zip(map(id, sent), answers, strict=True))
            return [answer_to.get(id(submission), ("", "")) for submission in batch]

    def _submit_arguments(self, batch: Sequence[_Submission]) -> list[Argument]:
        candidates = list(self._replicas)
        self._rng.shuffle(candidates)  # ties between equal loads fall at random
        args: list[Argument] = [self._settings.admission.max_jobs, len(candidates), *candidates]
        for submission in batch:
            job = submission.job
            stage, tail = job.launch()
            args += [job.id, tail, keys.stream(stage, job.priority), job.tenant, job.deadline_ms, 0, submission.reply]
            args += limit_arguments(job.tenant, submission.in_flight_limit)
            args += key_arguments(submission.idempotency)
            args += ["lease" if submission.leases else "", flows.record_of(job)]
        return args

    # --- waiting ---------------------------------------------------------------------------------

    async def wait(self, job_id: str, tenant: str, deadline_ms: int) -> Completion:
        """Return the outcome of a job, however long its deadline lets it take.

        Raises:
            DeadlineExceeded: no outcome came until the deadline and a grace (no worker lives to write it).
            JobLost: Redis knows nothing of the job any more.
        """
        waiting = self._waiting.get(job_id)
        known = waiting is not None
        if waiting is None:
            waiting = self._waiting[job_id] = _Waiting()
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        waiting.futures.append(future)
        left_s = max(GRACE_S, (deadline_ms - self.clock.now_ms()) / 1000 + GRACE_S)
        try:
            if not known:  # it may have ended before anybody here was interested
                with suppress(PenstockError):
                    async with asyncio.timeout(left_s):
                        await self._find([job_id])
            completion = waiting.completion
            if completion is None:
                completion = await self._patience.wait(future, left_s)
        except TimeoutError as error:
            raise DeadlineExceeded from error
        finally:
            waiting.futures.remove(future)
            if not waiting.futures and self._waiting.get(job_id) is waiting:
                del self._waiting[job_id]
        if completion.id != job_id or completion.tenant != tenant:
            raise JobLost
        return completion

    def waiters(self, job_id: str) -> int:
        """Return how many callers of this gateway wait for the job now."""
        waiting = self._waiting.get(job_id)
        return len(waiting.futures) if waiting else 0

    async def _find(self, job_ids: Sequence[str]) -> None:
        """Wake the waiters of those jobs that have ended."""
        values = await self._sweeper.call("MGET", *[keys.COMPLETION + job_id for job_id in job_ids])
        for job_id, value in zip(job_ids, values, strict=True):
            if value is not None:
                self._resolve(job_id, value)

    def _resolve(self, job_id: str, value: bytes) -> None:
        waiting = self._waiting.get(job_id)
        if waiting is None:
            return
        try:
            completion = waiting.completion = Completion.decode(value)
        except ValueError as error:
            log.error("an outcome that cannot be read", job_id=job_id, error=str(error))  # noqa: TRY400 - one line will do
            return
        for future in waiting.futures:
            if not future.done():
                future.set_result(completion)

    async def _read_replies(self) -> None:
        backoff = Backoff(self._settings.redis.reconnect_cap_s, Outage("gateway replies"))
        while True:
            try:
                await self._open_reply_stream()
                while True:
                    reply = await self._reader.call(
                        "XREAD", "COUNT", 1000, "BLOCK", BLOCK_MS, "STREAMS", self._reply_stream, self._last_reply,
                        timeout_s=self._settings.redis.reply_timeout_s + BLOCK_MS / 1000,
                    )  # fmt: skip
                    backoff.succeeded()
                    if reply:
                        entries = reply[0][1]
                        self._last_reply = entries[-1][0]
                        if unsaid := self._hear([fields for _, fields in entries]):
                            await self._find(unsaid)
            except PenstockError as error:
                await backoff.failed(error)

    def _hear(self, replies: Sequence[Sequence[bytes]]) -> list[str]:
        """Wake the waiters of jobs that have ended; return those whose outcome was too long to be told with it."""
        unsaid = []
        for fields in replies:
            for name, value in zip(fields[::2], fields[1::2], strict=True):
                job_id = name.decode()
                if value:
                    self._resolve(job_id, value)
                elif job_id in self._waiting:
                    unsaid.append(job_id)
        return unsaid

    async def _open_reply_stream(self) -> None:
        """Create the reply stream; settles add to it only while it exists, so a dead gateway's is not revived."""
        opened = await self._reader.call("XADD", self._reply_stream, "MAXLEN", "~", 10_000, "*", "id", "")
        await self._reader.call("PEXPIRE", self._reply_stream, REPLY_STREAM_TTL_MS)
        if self._last_reply == b"0":
            self._last_reply = opened

    async def _sweep_forever(self) -> None:
        outage = Outage("gateway sweep")
        while True:
            away: PenstockError | None = None
            # Each by itself: one that is refused must not stop the others.
            for once in (self._sweep, self._refresh, self.look_for_api_keys):
                try:
                    await once()
                except PenstockError as error:
                    away = error
            if away is None:
                outage.ends()
            else:
                outage.begins(away)
            await asyncio.sleep(SWEEP_EVERY_S)

    async def _sweep(self) -> None:
        """Look for every outcome waited for: the poll behind the wake-ups."""
        job_ids = list(self._waiting)
        for i in range(0, len(job_ids), SWEEP_AT_ONCE):
            some = job_ids[i : i + SWEEP_AT_ONCE]
            reply = await self._sweeper.run(scripts.SWEEP, (), some)
            for job_id, value in zip(some, reply, strict=True):
                waiting = self._waiting.get(job_id)
                if waiting is None:
                    continue
                if value not in {b"alive", b"gone"}:
                    self._resolve(job_id, value)
                    continue
                waiting.gone = waiting.gone + 1 if value == b"gone" else 0
                if waiting.gone >= 2:
                    if not waiting.futures:  # submitted here, but nobody came to wait
                        del self._waiting[job_id]
                    for future in waiting.futures:
                        if not future.done():
                            future.set_exception(JobLost())

    async def _refresh(self) -> None:
        """Keep the reply stream, without what was read; learn of replicas, of Redis' memory, and of what waits."""
        if not await self._link.call("PEXPIRE", self._reply_stream, REPLY_STREAM_TTL_MS):
            await self._link.call("XADD", self._reply_stream, "MAXLEN", "~", 10_000, "*", "id", "")
            await self._link.call("PEXPIRE", self._reply_stream, REPLY_STREAM_TTL_MS)
        await self._observe_clock()
        self._replicas = await self._healthy_replicas()
        memory = parse_info(await self._link.call("INFO", "memory"))
        limit = int(memory.get("maxmemory", "0"))
        share = int(memory.get("used_memory", "0")) / limit if limit else 0.0
        self._memory_is_short = share > self._settings.admission.max_memory_share
        backlog = int(await self._link.call("XLEN", keys.EVENTS))
        self._records_are_behind = backlog > self._settings.history.max_backlog
        await self._link.call("XTRIM", self._reply_stream, "MINID", self._last_reply)

    async def _observe_clock(self) -> None:
        sent_us = monotonic_us()
        self.clock.observe(await self._link.time_us(), sent_us)

    async def _healthy_replicas(self) -> list[str]:
        known = read_registry(await self._link.call("HGETALL", keys.REPLICAS))
        now_ms = self.clock.now_ms()
        urls = [url for url, replica in known.items() if now_ms - replica.seen_ms < REGISTERED_FOR_S * 1000]
        closed = []
        for url in urls:
            open_until_ms = number(await self._link.call("HGET", keys.HEALTH + url, "open_until_ms"))
            if open_until_ms is None or open_until_ms <= now_ms:
                closed.append(url)
        return closed or urls

    # --- looking ---------------------------------------------------------------------------------

    async def look(self, job_id: str, tenant: str) -> Completion | Literal["queued", "running"] | None:
        """Return a job's outcome, or where it is; None when it is not known to this tenant.

        Raises:
            BrokerUnavailable: Redis does not answer within a second, or so slowly that a look takes LOOK_WITHIN_S.
        """
        reply = await self._ask(scripts.LOOK, (job_id,))
        match reply[0]:
            case b"finished":
                completion = Completion.decode(reply[1])
                return completion if completion.tenant == tenant and completion.id == job_id else None
            case b"queued" | b"running" if reply[1].decode() == tenant:
                return "queued" if reply[0] == b"queued" else "running"
        return None

    async def cancel(self, job_id: str, tenant: str) -> Literal["cancelled", "cancelling", "finished", "unknown"]:
        """Cancel a job: at once while it waits, by its worker while it runs.

        Raises:
            BrokerUnavailable: Redis does not answer within a second.
        """
        ttl_ms = int(self._settings.worker.completion_ttl_s * 1000)
        reply: bytes = await self._ask(scripts.CANCEL, (job_id, tenant, ttl_ms))
        word: Literal["cancelled", "cancelling", "finished", "unknown"] = reply.decode()  # type: ignore[assignment]
        return word

    async def standing(self, job_id: str, tenant: str) -> Standing | None:
        """Return a live job as it stands on its way; None when it has ended, or is not known to this tenant.

        Raises:
            BrokerUnavailable: Redis does not answer within a second.
            MalformedEntry: its entry is no envelope of ours.
        """
        reply = await self._ask(scripts.ENVELOPE, (job_id,))
        if not reply or reply[1].decode() != tenant or not reply[2]:
            return None
        where: Literal["queued", "running"] = reply[0].decode()
        return Standing(decode(reply[2]), where, int(float(reply[3])) if reply[3] else None)

    async def recorded_until_ms(self) -> int:
        """Return until when history has heard of all that happened, on Redis' clock.

        Raises:
            BrokerUnavailable: Redis does not answer within a second.
        """
        oldest = await within(self._link.call("XRANGE", keys.EVENTS, "-", "+", "COUNT", 1))
        return int(oldest[0][0].split(b"-")[0]) if oldest else self.clock.now_ms()

    async def secret(self, queue: str) -> str | None:
        """Return a queue's present secret; None where none was made yet, and none is made for this.

        Args:
            queue: what follows `queue:` in its key.
        """
        found: str | None = await within(self._webhooks.secret(queue))
        return found

    async def secrets(self, queue: str, *, most: int | None = None) -> Secrets:
        """Return the secrets that sign a queue's webhooks; the first to ask makes one.

        Args:
            queue: what follows `queue:` in its key.
            most: queues that its tenant may have.

        Raises:
            TooManyQueues: it would be one more.
        """
        async with self._secrets_line.turn():  # every batch with a webhook asks this before it is accepted
            found: Secrets = await within(self._webhooks.secrets(queue, most=most))
        return found

    async def rotate_secret(self, queue: str, *, most: int | None = None) -> Secrets:
        """Give a queue another secret; the present one signs too for a day. Not to be sent again blindly.

        Arguments and errors as for `secrets`.

        Raises:
            RotatedLately: the one before the present one still signs, and would end at once.
        """
        found: Secrets = await within(self._webhooks.rotate(queue, most=most))
        return found

    async def report_job(self, body: Json, tenant: str) -> Job:
        """Return the job that writes the report asked for with *body*; it is still to be submitted.

        Raises:
            WrongField: of the request, or of its inputs.
            BrokerUnavailable: Redis does not answer within a second.
        """
        self.clock.require()
        job: Job = await within(self._reports.job(body, tenant))
        return job

    async def erase(self, user_id: str, tenant: str) -> str:
        """Forget a person in Redis, and have the history forget them: return the name under which it will have done so.

        May be sent again.
        """
        return await self._reports.erase(user_id, tenant)

    async def idempotent_outcome(self, key: str) -> Completion | None:
        """Return the outcome kept with an Idempotency-Key, after the completion's own life has ended."""
        text = await within(self._link.call("HGET", keys.IDEMPOTENCY + key, "outcome"))
        return Completion.decode(text) if text else None

    async def health(self) -> Health:
        """Return what is missing: Redis, or a ready worker of a stage that queries need."""
        needed = flows.FLOWS["query"].route
        try:
            records = [record for _, record in await self.workers()]
        except BrokerUnavailable as error:
            return Health(str(error), dict.fromkeys(needed, "unknown while Redis is away"))
        reasons: dict[str, str | None] = {}
        for stage in needed:
            states = [record["stages"][stage] for record in records if stage in record["stages"]]
            reasons[stage] = None if None in states else "; ".join(sorted(set(states))) or "no worker is running"
        return Health(None, reasons)

    async def workers(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the live consumers and what they say of themselves."""
        names = [name.decode() for name in await within(self._link.call("ZRANGE", keys.WORKERS, 0, -1))]
        if not names:
            return []
        values = await within(self._link.call("MGET", *[keys.WORKER + name for name in names]))
        return [(name, orjson.loads(value)) for name, value in zip(names, values, strict=True) if value]

    async def overview(self) -> Overview:
        """Return what runs and how deep each queue is; at most a second old.

        Raises:
            BrokerUnavailable: Redis does not answer within a second.
            CommandRefused, ValueError, TypeError, LookupError: a key is not what it should be.
        """
        async with self._looking:  # whoever waits here takes what the one before has brought
            if self._overview is None or monotonic_us() - self._overview[0] > OVERVIEW_FOR_S * 1e6:
                self._overview = None
                try:
                    async with asyncio.timeout(LOOK_WITHIN_S):
                        found = await look(self._looker, thorough=False)
                except TimeoutError as error:
                    raise BrokerUnavailable(f"Redis is slow: a look took more than {LOOK_WITHIN_S:g} s") from error
                self._overview = (monotonic_us(), found)
            return self._overview[1]

    # --- API keys --------------------------------------------------------------------------------

    async def api_key(self, digest: str) -> bytes | None:
        """Return the record of the API key with this digest, None where there is none.

        Raises:
            BrokerUnavailable: Redis does not answer within a second.
        """
        try:
            return await self._key_questions.add(digest, within_s=ANSWER_WITHIN_S)
        except TimeoutError as error:
            raise BrokerUnavailable("Redis does not answer") from error

    async def _send_key_questions(self, digests: Sequence[str]) -> list[bytes | None]:
        records: list[bytes | None] = await self._key_link.call("HMGET", keys.API_KEYS, *digests)
        return records

    async def look_for_api_keys(self) -> bool:
        """Return whether Redis holds API keys now; that there were some is never forgotten, should Redis lose them.

        Raises:
            BrokerUnavailable: Redis does not answer within a second.
        """
        found = bool(await within(self._key_link.call("EXISTS", keys.API_KEYS)))
        self.knows_api_keys = found or bool(self.knows_api_keys)
        return found

    async def revive_api_keys(self, rows: Sequence[Json]) -> None:
        """Write API keys to Redis again, as history knows them (`Records.api_keys`); what stands there is left alone.

        Raises:
            BrokerUnavailable: Redis does not answer.
        """
        if rows:
            self.knows_api_keys = True
            await KeyRing(self._key_link).revive(rows)

    async def enlist(self, record: bytes, ttl_s: float) -> None:
        """Say that the gateway of this record lives, for a while."""
        await self._ask(scripts.ENLIST, (record, int(ttl_s * 1000)))

    async def sign_off(self, record: bytes) -> None:
        """Say that the gateway of this record ends."""
        await within(self._link.call("ZREM", keys.GATEWAYS, record))

    async def replica_loads(self) -> dict[str, int]:
        """Return the live leases of every registered replica."""
        urls = list(read_registry(await within(self._link.call("HGETALL", keys.REPLICAS))))
        if not urls:
            return {}
        values = await within(self._link.call("MGET", *[keys.LOAD + url for url in urls]))
        return {url: int(number(value) or 0) for url, value in zip(urls, values, strict=True)}

    async def _ask(self, script: scripts.Script, args: Sequence[Argument]) -> Any:
        return await within(self._link.run(script, (), args))

    def __repr__(self) -> str:
        return f"<Front {self._reply_stream} waiting={len(self._waiting)} memory_is_short={self._memory_is_short}>"
