"""The life of one entry in hand: prepare, handle, decide, settle.

A handler never ends a job: it returns or raises, `outcomes.decide` says what follows, and one settle does it. A handler
is cancelled for four reasons only: its deadline, the job was cancelled, the entry is no longer ours, or the drain is
over. The first two write an outcome; for the third nothing can be written; the last gives the work back.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Container, Sequence
from random import Random
from typing import TYPE_CHECKING, Literal, TypeVar

import orjson
import structlog
from msgspec import Struct

from pipeline import flows, keys, metrics
from pipeline.clock import Clock
from pipeline.connection import Argument, Backoff, Outage
from pipeline.deadlines import Deadlines
from pipeline.errors import NOT_YET, BrokerUnavailable, DeadlineExceeded, MalformedEntry, PenstockError, RetryLater
from pipeline.job import OURS, Completion, Done, Job, Json, decode, decode_foreign, error_body
from pipeline.limit import Alarm
from pipeline.outcomes import Bury, Complete, Forward, Retry, decide, ended
from pipeline.replicas import Replicas
from pipeline.streams import Answer, Entry, Settlement, Streams, start_arguments

if TYPE_CHECKING:
    from pipeline.settings import Settings
    from pipeline.stage import Outcome, Stage

log = structlog.get_logger(__name__)

A = TypeVar("A")
Reason = Literal["lost", "cancelled", "drain", "deadline"]


class Held(Struct, eq=False):
    """One entry in hand.

    Attributes:
        read_us: when it was read, on Redis' clock.
        reason: why its handler is to stop; None while it may go on.
        settling: its outcome is on the way; nothing may stop it any more.
        is_settled: Redis has answered.
        alone: it is suspected of killing its holders and runs without neighbours.
    """

    entry: Entry
    read_us: int
    alone: bool = False
    job: Job | None = None
    task: asyncio.Task[None] | None = None
    reason: Reason | None = None
    settling: bool = False
    is_settled: bool = False

    def __repr__(self) -> str:
        return f"<Held {self.entry.stream} {self.entry.id.decode()} reason={self.reason} settling={self.settling}>"


class Parting(Struct, eq=False):
    """An entry that is let go of: what becomes of it, and the word that metrics have for it.

    Attributes:
        done: the outcome, where the handler's answer ends the job.
    """

    held: Held
    settlement: Settlement
    word: str
    done: Completion | None = None


class Handling:
    """What a worker does with the entries it holds.

    `by_job` is the worker's register of jobs in hand: a job is entered as soon as it is read. `heard` holds jobs that
    are to be cancelled, as heard before their entry was here.
    """

    def __init__(
        self,
        stage: Stage,
        streams: Streams,
        replicas: Replicas,
        by_job: dict[str, Held],
        heard: Container[str],
        settings: Settings,
        clock: Clock,
        rng: Random,
        name: str,
    ) -> None:
        self.stage = stage
        self.streams = streams
        self.replicas = replicas
        self.name = name
        self._by_job = by_job
        self._heard = heard
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._outage = Outage(f"{stage.name} handling")
        self._metrics = metrics.OfStage(stage.name)
        self._max_deliveries = settings.worker.max_deliveries
        self._deadlines: Alarm[Held] = Alarm(_overdue)
        self._batch_deadlines: Alarm[Deadlines] = Alarm(Deadlines.ring)
        self._wait = f"{stage.name}_wait"

    async def live(self, chunk: Sequence[Held]) -> None:
        """Take entries from being read to being settled: one, or a batch that is handled together."""
        jobs: list[tuple[Held, Job]] = []
        now_ms = self._clock.now_ms()
        for held in chunk:
            found = self._prepare(held, now_ms)
            if isinstance(found, Job):
                jobs.append((held, found))
                continue
            job = await found
            now_ms = self._clock.now_ms()  # that may have taken long, with Redis away
            if job is not None:
                jobs.append((held, job))
        if not jobs:
            return
        if self.stage.batch > 1:
            outcomes = await self._handle_batch(jobs)
        else:
            outcomes = [await self._handle(held, job) for held, job in jobs]
        now_us = self._clock.now_us()
        partings: list[Parting] = []
        for (held, job), outcome in zip(jobs, outcomes, strict=True):
            if not held.settling and (parting := self._part(held, job, outcome, now_us)) is not None:
                partings.append(parting)
        if partings:
            await self._settle(partings)

    def _prepare(self, held: Held, now_ms: int) -> Job | Awaitable[Job | None]:
        """Return the job to be handled; where something is in the way, what is to be awaited first.

        That brings the job after all, or None when its entry was settled (or lost) instead.
        """
        entry = held.entry
        try:
            job = _read(entry)
        except MalformedEntry as error:
            return self._bury_malformed(held, error)
        if job is None:
            return self._adopt(held)
        held.job = job
        self._by_job[job.id] = held
        if self.stage.placed:
            job.replica = entry.replica or None
        if job.at_us:
            wait_ms = max(0.0, (held.read_us - job.at_us) / 1000)
            job.timings_ms[self._wait] = round(job.timings_ms.get(self._wait, 0.0) + wait_ms, 3)
            self._metrics.wait_s.observe(wait_ms / 1000)
        if entry.deliveries > self._max_deliveries:
            return self._bury_poison(held, job)
        if job.deadline_ms <= now_ms:
            return self._let_go(held, job, DeadlineExceeded())
        if entry.resumed or job.id in self._heard:
            return self._unless_cancelled(held, job)
        return job

    async def _bury_poison(self, held: Held, job: Job) -> None:
        message = f"{held.entry.deliveries - 1} consumers died with this entry in hand"
        completion = ended(job, self.name, "failed", "poison", message)
        await self._settle([Parting(held, self._burial(held, completion, "poison"), "poison")])

    async def _unless_cancelled(self, held: Held, job: Job) -> Job | None:
        """Return the job, unless its live record says that it is to be cancelled: then let it go."""
        if not await self._until_answered(lambda: self.streams.is_cancelled(job.id)):
            return job
        held.reason = "cancelled"
        await self._let_go(held, job, Done({}))
        return None

    async def _adopt(self, held: Held) -> None:
        """Put a job of ours in the place of a foreign entry, or bury it where no job can be made of it."""
        try:
            await self._adopt_foreign(held)
        except MalformedEntry as error:
            await self._bury_malformed(held, error)

    async def _adopt_foreign(self, held: Held) -> None:
        entry = held.entry
        body = decode_foreign(entry.data or b"")
        if entry.extra or entry.vector is not None:
            names = ", ".join(name.decode(errors="replace") for name in entry.extra or (b"vector",))
            message = f"besides `data` the entry has fields that nobody would read: {names}"
            raise MalformedEntry(message, code="extra_field", job_id=body["id"])
        lifetimes = self._settings.lifetimes.model_dump()
        job = flows.adopt(self.stage.name, body, now_ms=self._clock.now_ms(), lifetimes=lifetimes)
        held.settling = True
        answer = await self._until_answered(lambda: self.streams.adopt(entry, job))
        if answer == "duplicate":
            held.settling = False
            raise MalformedEntry("a living job has this id already", code="duplicate_id", job_id=job.id)
        held.is_settled = True
        self._metrics.jobs(answer).inc()

    async def _handle(self, held: Held, job: Job) -> Outcome:
        """Run the handler to its end, its deadline, or the reason to stop it. Never raises, but when cancelled."""
        left_s = (job.deadline_ms - self._clock.now_ms()) / 1000
        self._deadlines.set(held, left_s)
        try:
            if self.stage.placed and not await self._has_place(job):
                return RetryLater("no replica has a free slot", code="no_replica", charged=False)
            return await self.stage.handle(job)
        except asyncio.CancelledError:
            if held.reason is None:
                return _own_cancellation()
            _swallow_cancellation()
            if held.reason == "deadline":
                if job.replica is not None and not job.avoid:  # else it had only a part of this time
                    self.replicas.overran(job.replica, left_s)
                return DeadlineExceeded()
            metrics.ABORTED.labels(self.stage.name, held.reason).inc()
            return PenstockError(held.reason)  # `_let_go` looks at the reason first
        except Exception as error:  # noqa: BLE001 - a handler's error is an outcome
            if not isinstance(error, PenstockError):
                self._log(held).warning("the handler failed", **_told(error, [job]))
            return error
        finally:
            self._deadlines.clear(held)

    async def _has_place(self, job: Job) -> bool:
        """Say whether the job has a place at a replica that has not failed it, taking another where there is one."""
        if job.replica is not None and job.replica not in job.avoid:
            return True
        if job.replica is not None and not self.replicas.has_other_than(job.avoid):
            job.avoid = []  # all have failed it: begin anew
            return True
        return await self.replicas.move(job) is not None

    async def _handle_batch(self, jobs: Sequence[tuple[Held, Job]]) -> Sequence[Outcome]:
        """Run the batch; a job whose deadline comes meanwhile is let go at once, and its mates go on."""
        if all(held.reason is not None or held.settling for held, _ in jobs):  # none is left, or wanted any more
            return [PenstockError("stopped") for _ in jobs]
        deadlines = Deadlines(jobs, self._clock, self._let_go, self._batch_deadlines)
        try:
            async with deadlines:
                return await self._call_batch([job for _, job in jobs])
        except asyncio.CancelledError:
            if any(held.reason is None and not held.settling for held, _ in jobs):
                error = _own_cancellation()
                return [error for _ in jobs]
            _swallow_cancellation()
            return [PenstockError("stopped") for _ in jobs]
        except Exception as error:  # noqa: BLE001 - each job is tried by itself, and says so
            if deadlines.are_over or len(jobs) == 1:
                return [error for _ in jobs]
            told = _told(error, [job for _, job in jobs])
            log.warning("a batch failed; handling its jobs one by one", stage=self.stage.name, **told)
            return [outcome for pair in jobs for outcome in await self._handle_batch([pair])]

    async def _call_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        outcomes = await self.stage.handle_batch(jobs)
        if len(outcomes) != len(jobs):
            raise ValueError(f"handle_batch gave {len(outcomes)} outcomes for {len(jobs)} jobs")
        return outcomes

    async def _let_go(self, held: Held, job: Job, outcome: Outcome) -> None:
        """Decide what follows, and settle it."""
        parting = self._part(held, job, outcome, self._clock.now_us())
        if parting is not None:
            await self._settle([parting])

    def _part(self, held: Held, job: Job, outcome: Outcome, now_us: int) -> Parting | None:
        """Decide what follows; None where the entry is another's."""
        held.settling = True
        if held.reason == "lost":
            self._metrics.jobs("lost").inc()
            return None
        self._stamp(held, job, now_us)
        if held.reason == "drain":
            return Parting(held, self._release(held, job), "released")
        if held.reason == "cancelled":
            completion = ended(job, self.name, "cancelled", "cancelled", "the job was cancelled")
            return Parting(held, self._end(held, completion), "cancelled")
        try:
            return self._decide(held, job, outcome)
        except (TypeError, ValueError) as error:
            # The handler's answer is no JSON object: a failed attempt of the job as it came, and its mates go on.
            self._log(held).warning("the handler's answer cannot be written", error=str(error))
            job = decode(held.entry.data or b"", held.entry.vector)
            self._stamp(held, job, now_us)
            return self._decide_as_it_came(held, job, error)

    def _decide_as_it_came(self, held: Held, job: Job, error: Exception) -> Parting:
        try:
            return self._decide(held, job, error)
        except (TypeError, ValueError) as own:  # a number or a depth that can be read and not written
            message = f"the job can be read, but not written again: {own}"
            completion = ended(job, self.name, "failed", "bad_envelope", message)
            return Parting(held, self._burial(held, completion, "bad_envelope"), "malformed")

    def _decide(self, held: Held, job: Job, outcome: Outcome) -> Parting:
        """Return what is to become of the entry."""
        decision = decide(job, outcome, worker=self.name, retry=self._settings.retry, rng=self._rng)
        match decision:
            case Forward(stage, done):
                job.route = list(job.route if done.route is None else done.route)[1:]
                job.state |= done.value
                job.attempt, job.avoid = 1, []
                target = keys.stream(stage, job.priority)
                vector = done.vector or b""
                start = [start_arguments(new) for new in done.start]
                forward = Settlement(held.entry, job.id, "forward", target, job.encode(), vector, start=start)
                return Parting(held, forward, "forwarded")
            case Complete(completion, done):
                start = [start_arguments(new) for new in done.start] if done else []
                return Parting(held, self._end(held, completion, start), completion.status, completion)
            case Retry(delay_s, attempt, error):
                # The message may quote what a replica said of a prompt: it stands in the outcome, not in the log.
                line = self._log(held)
                (line.debug if error["code"] == NOT_YET else line.info)(
                    "retrying", in_s=round(delay_s, 3), code=error["code"]
                )
                job.attempt = attempt
                job.replica = None
                vector = held.entry.vector or b""
                again = Settlement(held.entry, job.id, "retry", int(delay_s * 1000), job.encode(), vector)
                return Parting(held, again, "retried")
            case Bury(completion, reason):
                self._log(held).warning("burying", reason=reason, code=(completion.error or {}).get("code"))
                return Parting(held, self._burial(held, completion, reason), completion.status)

    # --- settling --------------------------------------------------------------------------------

    def _end(self, held: Held, completion: Completion, start: Sequence[Sequence[Argument]] = ()) -> Settlement:
        completion.finished_us = self._clock.now_us()
        text = completion.encode()
        return Settlement(held.entry, completion.id, "complete", text, start=start)

    def _release(self, held: Held, job: Job) -> Settlement:
        """Give the job back as it came, but for what is true whatever becomes of it: attempts, replicas, times."""
        again = decode(held.entry.data or b"")
        again.attempt, again.avoid = job.attempt, job.avoid
        again.timings_ms, again.at_us = job.timings_ms, job.at_us
        return Settlement(held.entry, job.id, "release", "", again.encode(), held.entry.vector or b"")

    def _burial(self, held: Held, completion: Completion, reason: str) -> Settlement:
        entry = held.entry
        letter = {
            "reason": reason,
            "job_id": completion.id or None,
            "error": _listed(completion.error, held.job),
            "attempts": completion.attempts,
            "deliveries": entry.deliveries,
            "stage": self.stage.name,
            "stream": entry.stream,
            "entry": entry.id.decode(),
            "worker": self.name,
            "at_ms": self._clock.now_ms(),
            "original": entry.data.decode(errors="replace") if entry.data is not None else None,
        }
        completion.finished_us = self._clock.now_us()
        text = completion.encode() if completion.id else b""
        return Settlement(entry, completion.id, "bury", text, orjson.dumps(letter), reason)

    async def _bury_malformed(self, held: Held, error: MalformedEntry) -> None:
        log.warning("burying a malformed entry", stage=self.stage.name, code=error.code, reason=str(error))
        body = error_body("failed", error.code, str(error))
        completion = Completion(error.job_id or "", "failed", error=body, worker=self.name)
        await self._settle([Parting(held, self._burial(held, completion, error.code), "malformed")])

    async def _settle(self, partings: Sequence[Parting]) -> None:
        """Send what becomes of entries; returns when Redis has answered for all of them."""
        for parting in partings:
            parting.held.settling = True
        answers = await self.streams.settle([parting.settlement for parting in partings])
        orphans: list[Parting] = []
        words: dict[str, int] = {}
        now_us = self._clock.now_us()
        for parting, answer in zip(partings, answers, strict=True):
            if answer == "orphan":
                orphans.append(self._orphaned(parting))
            else:
                word = self._note(parting, answer, now_us)
                words[word] = words.get(word, 0) + 1
        for word, count in words.items():
            self._metrics.jobs(word).inc(count)
        if self.streams.dropped_letters:
            metrics.DEAD_DROPPED.labels(self.stage.name).inc(self.streams.dropped_letters)
            self.streams.dropped_letters = 0
        if orphans:
            await self._settle(orphans)

    def _orphaned(self, parting: Parting) -> Parting:
        """Nobody waits for it and no record names it (Redis was flushed, or a stranger wrote it): its story is kept."""
        error = error_body("failed", "orphan", "no live record names this entry")
        completion = Completion(parting.settlement.job_id, "failed", error=error)
        return Parting(parting.held, self._burial(parting.held, completion, "orphan"), "orphan")

    def _note(self, parting: Parting, answer: Answer, now_us: int) -> str:
        """Note what became of an entry, and return the word that metrics have for it."""
        held = parting.held
        held.is_settled = True
        self._metrics.service_s.observe(max(0, now_us - held.read_us) / 1e6)
        if answer != "settled":
            if answer == "lost":
                metrics.STALE_WRITES.labels(self.stage.name).inc()
                self._log(held).warning("refused: the entry belongs to another delivery by now")
            return answer
        if parting.done is not None and held.job is not None:
            self.stage.ended(held.job, parting.done)
        if parting.settlement.verb == "bury":
            metrics.DEAD_LETTERS.labels(self.stage.name, parting.settlement.c).inc()
        return parting.word

    def _stamp(self, held: Held, job: Job, now_us: int) -> None:
        """Note how long this stage took; the next wait begins here."""
        span_ms = max(0.0, (now_us - held.read_us) / 1000)
        job.timings_ms[self.stage.name] = round(job.timings_ms.get(self.stage.name, 0.0) + span_ms, 3)
        job.at_us = now_us

    async def _until_answered(self, call: Callable[[], Awaitable[A]]) -> A:
        """Repeat a harmless call until Redis has answered."""
        backoff = Backoff(self._settings.redis.reconnect_cap_s, self._outage)
        while True:
            try:
                answer = await call()
            except BrokerUnavailable as error:
                await backoff.failed(error)
            else:
                backoff.succeeded()
                return answer

    def _log(self, held: Held) -> structlog.stdlib.BoundLogger:
        job = held.job
        bound: structlog.stdlib.BoundLogger = log.bind(
            job_id=job.id if job else None,
            stage=self.stage.name,
            worker=self.name,
            attempt=job.attempt if job else None,
        )
        return bound


def _read(entry: Entry) -> Job | None:
    """Return the job of an entry of ours; None where a stranger wrote it.

    Raises:
        MalformedEntry: it is neither one of ours nor anybody's.
    """
    if entry.data is None:
        raise MalformedEntry("the entry has no field `data`", code="no_data")
    if not entry.data.startswith(OURS):
        return None
    job = decode(entry.data, entry.vector)
    if job.flow not in flows.FLOWS:
        message = f"no flow is called {job.flow!r}: a newer version of Penstock may have made this job"
        raise MalformedEntry(message, code="unknown_flow", job_id=job.id)
    return job


def _is_private(job: Job) -> bool:
    return job.flow in flows.FLOWS and flows.FLOWS[job.flow].private


def _told(error: Exception, jobs: Sequence[Job]) -> Json:
    """Return what the log is told of a handler's error: of private jobs' its place, for the message may quote them."""
    if not any(map(_is_private, jobs)):
        return {"exc_info": error}
    return {"exception": "".join([*traceback.format_tb(error.__traceback__), f"{type(error).__name__}: (withheld)"])}


def _listed(error: Json | None, job: Job | None) -> Json | None:
    """Return an error as a dead letter shows it to whoever lists them; its message may quote what is private."""
    if error is None or job is None or not _is_private(job):
        return error
    return error | {"message": "withheld, since it may quote personal data"}


def _overdue(held: Held) -> None:
    """Stop a handler at its job's deadline."""
    if held.reason is None and held.task is not None:
        held.reason = "deadline"
        held.task.cancel()


def _own_cancellation() -> PenstockError:
    """Return a handler's own CancelledError (of something it waited for) as a failure; pass on one meant for us."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise asyncio.CancelledError
    return PenstockError("the handler waited for something that was cancelled")


def _swallow_cancellation() -> None:
    """Let the task go on after a cancellation that was meant for its handler; pass on one that came with it."""
    task = asyncio.current_task()
    if task is not None and task.uncancel():
        raise asyncio.CancelledError
