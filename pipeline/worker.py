"""The life of an entry in the hands of a worker: read, prepare, handle, decide, settle.

One `Worker` is one stage in one process. It holds at most `stage.slots` entries; each is in `held` from the moment it
was read until Redis has said that it is settled. What this process may still settle is decided by Redis alone (the
fence: consumer and delivery count); `held` only says what must not be started twice.

Rules that keep the promise:
- What is read counts as started. Work given back unstarted is added anew, so a claim always means a crash.
- A handler never ends a job; it returns or raises, and one settle does the rest.
- A handler is cancelled for four reasons only: its deadline, the job was cancelled, the entry is no longer ours, or the
  drain is over. Only the first two write an outcome; the last gives the work back.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import orjson
import structlog

from pipeline import flows, keys, metrics
from pipeline.clock import Clock, monotonic_us
from pipeline.connection import GroupMissing, Outage, OutOfMemory, reconnect_delay_s
from pipeline.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    MalformedEntry,
    NotReady,
    PenstockError,
    RetryLater,
)
from pipeline.job import OURS, Completion, Done, Job, decode, decode_foreign, error_body
from pipeline.outcomes import Bury, Complete, Forward, Retry, decide, ended
from pipeline.replicas import Replicas
from pipeline.streams import Entry, Settlement, Streams

if TYPE_CHECKING:
    from pipeline.settings import Settings
    from pipeline.stage import Outcome, Stage

log = structlog.get_logger(__name__)

A = TypeVar("A")
Reason = Literal["lost", "cancelled", "drain"]

NOT_READY_RETRY_S: Final = 1.0
WAKE_POLL_S: Final = 0.5
"""How long a placed stage sleeps when no wake-up comes: hints may be lost, work may not."""
REMEMBERED: Final = 1_000
"""Entries taken up by reconciliation whose delivery may still come, late, over an old connection."""


class Held:
    """One entry in hand.

    Attributes:
        reason: why its handler is to stop; None while it may go on.
        settling: its outcome is on the way; nothing may stop it any more.
        alone: it is suspected of killing its holders and runs without neighbours.
    """

    __slots__ = ("alone", "entry", "job", "read_us", "reason", "settling", "task")

    def __init__(self, entry: Entry, read_us: int, *, alone: bool = False) -> None:
        self.entry = entry
        self.read_us = read_us
        self.alone = alone
        self.job: Job | None = None
        self.task: asyncio.Task[None] | None = None
        self.reason: Reason | None = None
        self.settling = False

    def __repr__(self) -> str:
        return f"<Held {self.entry.stream} {self.entry.id.decode()} reason={self.reason} settling={self.settling}>"


class Quarantine:
    """Lets one worker of a process empty the hands of all, so that a suspected entry runs alone.

    Attributes:
        owner: the worker that has, or waits for, empty hands; while there is one, nobody reads.
        workers: all workers of the process.
    """

    def __init__(self) -> None:
        self.owner: Worker | None = None
        self.workers: list[Worker] = []

    def is_empty(self) -> bool:
        """Say whether no worker but the owner reads, and none holds anything."""
        return not any(worker.held or (worker.reading and worker is not self.owner) for worker in self.workers)


class Worker:
    """One stage in one process.

    Attributes:
        held: entries in hand, by stream and id. Written here only; the consumer reads it.
        not_ready: why the stage cannot work yet; None when it can.
        reading: a read is under way and may bring entries.
    """

    def __init__(
        self,
        stage: Stage,
        consumer: str,
        settings: Settings,
        clock: Clock,
        quarantine: Quarantine,
        name: str,
        announce: Callable[[], None],
    ) -> None:
        self.stage = stage
        self.name = name
        self.streams = Streams(stage.name, consumer, settings, clock, placed=stage.placed)
        self.held: dict[tuple[str, bytes], Held] = {}
        self.not_ready: str | None = "starting"
        self.reading = False
        self._by_job: dict[str, Held] = {}
        self._settings = settings
        self._clock = clock
        self._quarantine = quarantine
        self._announce = announce  # tells others that readiness changed
        self._rng = Random()
        self._changed = asyncio.Event()  # a slot was freed, readiness or quarantine changed
        self._wake = asyncio.Event()  # the llm streams or slots changed, as heard on the wake channel
        self._quiet = False
        self._suspects: set[tuple[str, str]] = set()  # (stream, lapsed consumer) with entries that must run alone
        self._suspects_from_us = 0  # not before: neighbours must not starve for a suspect
        self._seen_unheld: dict[tuple[str, bytes], int] = {}
        self._taken_up: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._outage = Outage(f"{stage.name} read")
        self.replicas = Replicas(self.streams, settings, clock, self._entry_of, self._rng)
        metrics.IN_HAND.labels(stage.name).set_function(lambda: len(self.held))
        metrics.READY.labels(stage.name).set_function(lambda: self.not_ready is None)

    @property
    def worker(self) -> str:
        """Name of this worker, as answers show it."""
        return self.name

    # --- feeding ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start the stage, then read and start entries until told to be quiet."""
        await self._start_stage()
        failures = 0
        while not self._quiet:
            try:
                entries = await self._next_entries()
            except GroupMissing:
                log.warning("a consumer group is gone; creating it again", stage=self.stage.name)
                failures += 1
                await asyncio.sleep(reconnect_delay_s(failures, self._settings.redis.reconnect_cap_s))
                with suppress(PenstockError):  # refused when memory is full, or Redis away: tried again
                    await self.streams.ensure_groups()
                continue
            except PenstockError as error:
                self._outage.begins(error)
                await asyncio.sleep(reconnect_delay_s(failures, self._settings.redis.reconnect_cap_s))
                failures += 1
                continue
            self._outage.ends()
            failures = 0
            self.start(entries)

    async def _start_stage(self) -> None:
        while not self._quiet:
            try:
                await self.streams.ensure_groups()
                await self.stage.start(self)
            except (NotReady, BrokerUnavailable, OutOfMemory) as error:
                if self.not_ready != str(error):
                    log.warning("the stage is not ready", stage=self.stage.name, reason=str(error))
                self.not_ready = str(error)
                self._announce()
                await asyncio.sleep(NOT_READY_RETRY_S)
            else:
                self.not_ready = None
                self._announce()
                return

    async def _next_entries(self) -> list[Entry]:
        """Return what to start next; may return nothing after a while."""
        if self._suspects and monotonic_us() >= self._suspects_from_us and self._quarantine.owner is None:
            await self._run_suspect()
        free = self.stage.slots - len(self.held)
        if free <= 0 or self._quarantine.owner is not None:
            await wait_at_most(self._changed, WAKE_POLL_S)
            return []
        self.reading = True
        try:
            if not self.stage.placed:
                return await self.streams.take(free) or await self.streams.wait()
            self._wake.clear()
            entries = await self.replicas.take(free)
        finally:
            self.reading = False
        if not entries:
            await wait_at_most(self._wake, WAKE_POLL_S)
        return entries

    async def _run_suspect(self) -> None:
        """Empty the hands of this process, then take one suspected entry and start it alone.

        Reading stops meanwhile, so it is tried for one lease at most, and then not again for as long.
        """
        stream, lapsed = self._suspects.pop()
        self._quarantine.owner = self
        started = False
        try:
            async with asyncio.timeout(self._settings.worker.lease_s):
                while not self._quarantine.is_empty():
                    await wait_at_most(self._changed, 0.05)
            claimed = await self.streams.claim(stream, lapsed, 1, idle=True)
            if claimed.left:
                self._suspects.add((stream, lapsed))
            if claimed.entries:
                (entry,) = claimed.entries
                log.warning(
                    "running an entry alone: its holders died", stage=self.stage.name, times=entry.deliveries - 1
                )
                metrics.CLAIMED.labels(self.stage.name).inc()
                self.start([entry], alone=True)
                started = True
        except TimeoutError:
            self._suspects.add((stream, lapsed))
            self._suspects_from_us = monotonic_us() + int(self._settings.worker.lease_s * 1e6)
        finally:
            if not started:
                self._quarantine.owner = None

    def start(self, entries: Iterable[Entry], *, alone: bool = False) -> None:
        """Take *entries* into hand and start their handlers; one already in hand, or taken up before, is left."""
        now_us = self._clock.now_us()
        fresh: list[Held] = []
        for entry in entries:
            key = (entry.stream, entry.id)
            if key in self.held or (key in self._taken_up and not entry.resumed):
                continue
            held = Held(entry, now_us, alone=alone)
            self.held[key] = held
            fresh.append(held)
        size = 1 if alone else self.stage.batch
        for i in range(0, len(fresh), size):
            chunk = fresh[i : i + size]
            task = asyncio.create_task(self._work(chunk), name=f"{self.stage.name} {chunk[0].entry.id.decode()}")
            for held in chunk:
                held.task = task

    # --- one entry's life ------------------------------------------------------------------------

    async def _work(self, chunk: Sequence[Held]) -> None:
        try:
            jobs = [(held, job) for held in chunk if (job := await self._prepare(held)) is not None]
            if self.stage.batch > 1:
                outcomes = await self._handle_batch(jobs)
            else:
                outcomes = [await self._handle(held, job) for held, job in jobs]
            for held, _ in jobs:
                held.settling = True
            pairs = zip(jobs, outcomes, strict=True)
            await asyncio.gather(*(self._let_go(held, job, outcome) for (held, job), outcome in pairs))
        except asyncio.CancelledError:
            if all(held.reason is None for held in chunk):
                raise
        except Exception:
            # What is still in hand stays pending; reconciliation finds it and it runs again.
            log.exception("the worker failed between reading and settling", stage=self.stage.name)
        finally:
            for held in chunk:
                self._forget(held)

    async def _prepare(self, held: Held) -> Job | None:
        """Return the job to be handled; None when the entry was settled (or lost) instead."""
        entry = held.entry
        try:
            job = await self._read(held)
        except MalformedEntry as error:
            await self._bury_malformed(held, error)
            return None
        if job is None:
            return None
        held.job = job
        self._by_job[job.id] = held
        if self.stage.placed:
            job.replica = entry.replica or None
        if job.at_us:
            wait_ms = max(0.0, (held.read_us - job.at_us) / 1000)
            name = f"{self.stage.name}_wait"
            job.timings_ms[name] = round(job.timings_ms.get(name, 0.0) + wait_ms, 3)
            metrics.WAIT_S.labels(self.stage.name).observe(wait_ms / 1000)
        if entry.deliveries > self._settings.worker.max_deliveries:
            message = f"{entry.deliveries - 1} consumers died with this entry in hand"
            completion = ended(job, self.name, "failed", "poison", message)
            await self._settle(held, self._burial(held, completion, "poison"), "poison")
            return None
        if job.deadline_ms <= self._clock.now_ms():
            await self._let_go(held, job, DeadlineExceeded())
            return None
        if entry.resumed and await self._until_answered(lambda: self.streams.is_cancelled(job.id)):
            held.reason = "cancelled"
            await self._let_go(held, job, Done({}))
            return None
        return job

    async def _read(self, held: Held) -> Job | None:
        entry = held.entry
        if entry.data is None:
            raise MalformedEntry("the entry has no field `data`", code="no_data")
        if entry.data.startswith(OURS):
            job = decode(entry.data, entry.vector)
            if job.flow not in flows.FLOWS:
                message = f"no flow is called {job.flow!r}: a newer version of Penstock may have made this job"
                raise MalformedEntry(message, code="unknown_flow", job_id=job.id)
            return job
        body = decode_foreign(entry.data)
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
        metrics.JOBS.labels(self.stage.name, answer).inc()
        return None

    async def _handle(self, held: Held, job: Job) -> Outcome:
        """Run the handler to its end, its deadline, or the reason to stop it. Never raises, but when cancelled."""
        left_s = (job.deadline_ms - self._clock.now_ms()) / 1000
        try:
            async with asyncio.timeout(left_s) as bound:
                if self.stage.placed and job.replica is None and await self.replicas.move(job) is None:
                    return RetryLater("no replica has a free slot", code="no_replica", charged=False)
                return await self.stage.handle(job)
        except TimeoutError as error:
            if not bound.expired():
                return error
            if job.replica is not None:
                self.replicas.overran(job.replica, left_s)
            return DeadlineExceeded()
        except asyncio.CancelledError:
            if held.reason is None:
                raise
            _swallow_cancellation()
            metrics.ABORTED.labels(self.stage.name, held.reason).inc()
            return PenstockError(held.reason)  # `_let_go` looks at the reason first
        except Exception as error:  # noqa: BLE001 - a handler's error is an outcome
            if not isinstance(error, PenstockError):
                self._log(held).warning("the handler failed", exc_info=True)
            return error

    async def _handle_batch(self, jobs: Sequence[tuple[Held, Job]]) -> Sequence[Outcome]:
        if all(held.reason is not None for held, _ in jobs):  # none is left, or all were stopped before their turn
            return [PenstockError("stopped") for _ in jobs]
        latest_ms = max(job.deadline_ms for _, job in jobs)
        try:
            async with asyncio.timeout((latest_ms - self._clock.now_ms()) / 1000) as bound:
                return await self._call_batch([job for _, job in jobs])
        except TimeoutError as error:
            return [DeadlineExceeded() if bound.expired() else error for _ in jobs]
        except asyncio.CancelledError:
            if any(held.reason is None for held, _ in jobs):
                raise
            _swallow_cancellation()
            return [PenstockError("stopped") for _ in jobs]
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            log.warning("a batch failed; handling its jobs one by one", stage=self.stage.name, exc_info=True)
            return [outcome for pair in jobs for outcome in await self._handle_batch([pair])]

    async def _call_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        outcomes = await self.stage.handle_batch(jobs)
        if len(outcomes) != len(jobs):
            raise ValueError(f"handle_batch gave {len(outcomes)} outcomes for {len(jobs)} jobs")
        return outcomes

    async def _let_go(self, held: Held, job: Job, outcome: Outcome) -> None:
        """Decide what follows, and settle it."""
        if held.reason == "lost":
            metrics.JOBS.labels(self.stage.name, "lost").inc()
            return
        if held.reason == "drain":
            await self._settle(held, self._release(held), "released")
            return
        self._stamp(held, job)
        if held.reason == "cancelled":
            completion = ended(job, self.name, "cancelled", "cancelled", "the job was cancelled")
            await self._settle(held, self._end(held, completion), "cancelled")
            return
        try:
            settlement, word = self._decide(held, job, outcome)
        except orjson.JSONEncodeError as error:
            # The handler's answer is no JSON: a failed attempt of the job as it came.
            self._log(held).warning("the handler's answer cannot be written", error=str(error))
            job = decode(held.entry.data or b"", held.entry.vector)
            self._stamp(held, job)
            settlement, word = self._decide(held, job, error)
        await self._settle(held, settlement, word)

    def _decide(self, held: Held, job: Job, outcome: Outcome) -> tuple[Settlement, str]:
        """Return what is to become of the entry, and the word that metrics have for it."""
        decision = decide(job, outcome, worker=self.name, retry=self._settings.retry, rng=self._rng)
        match decision:
            case Forward(stage, done):
                job.route = job.route[1:]
                job.state |= done.value
                job.attempt, job.avoid = 1, []
                target = keys.stream(stage, job.priority)
                vector = done.vector or b""
                forward = Settlement(held.entry, job.id, "forward", target, job.encode(), vector, start=done.start)
                return forward, "forwarded"
            case Complete(completion, done):
                start = done.start if done else ()
                return self._end(held, completion, start), completion.status
            case Retry(delay_s, attempt, error):
                # The message may quote what a replica said of a prompt: it stands in the outcome, not in the log.
                self._log(held).info("retrying", in_s=round(delay_s, 3), code=error["code"])
                job.attempt = attempt
                job.replica = None
                vector = held.entry.vector or b""
                return Settlement(held.entry, job.id, "retry", int(delay_s * 1000), job.encode(), vector), "retried"
            case Bury(completion, reason):
                self._log(held).warning("burying", reason=reason, code=(completion.error or {}).get("code"))
                return self._burial(held, completion, reason), "failed"

    # --- settling --------------------------------------------------------------------------------

    def _end(self, held: Held, completion: Completion, start: Sequence[Job] = ()) -> Settlement:
        text = replace(completion, finished_us=self._clock.now_us()).encode()
        return Settlement(held.entry, completion.id, "complete", text, start=start)

    def _release(self, held: Held) -> Settlement:
        job_id = held.job.id if held.job else ""
        return Settlement(held.entry, job_id, "release", "", held.entry.data or b"", held.entry.vector or b"")

    def _burial(self, held: Held, completion: Completion, reason: str) -> Settlement:
        entry = held.entry
        metrics.DEAD_LETTERS.labels(self.stage.name, reason).inc()
        letter = {
            "reason": reason,
            "job_id": completion.id or None,
            "error": completion.error,
            "attempts": completion.attempts,
            "deliveries": entry.deliveries,
            "stage": self.stage.name,
            "stream": entry.stream,
            "entry": entry.id.decode(),
            "worker": self.name,
            "at_ms": self._clock.now_ms(),
            "original": entry.data.decode(errors="replace") if entry.data is not None else None,
        }
        text = replace(completion, finished_us=self._clock.now_us()).encode() if completion.id else b""
        return Settlement(entry, completion.id, "bury", text, orjson.dumps(letter))

    async def _bury_malformed(self, held: Held, error: MalformedEntry) -> None:
        log.warning("burying a malformed entry", stage=self.stage.name, code=error.code, reason=str(error))
        body = error_body("failed", error.code, str(error))
        completion = Completion(error.job_id or "", "failed", error=body, worker=self.name)
        await self._settle(held, self._burial(held, completion, error.code), "malformed")

    async def _settle(self, held: Held, settlement: Settlement, outcome: str) -> None:
        held.settling = True
        answer = await self.streams.settle(settlement)
        if answer == "orphan":
            # Nobody waits for it and no record names it (Redis was flushed, or a stranger wrote it): its story is kept.
            job_id = settlement.job_id
            completion = Completion(
                job_id, "failed", error=error_body("failed", "orphan", "no live record names this entry")
            )
            answer = await self.streams.settle(self._burial(held, completion, "orphan"))
            outcome = "orphan"
        if answer == "lost":
            metrics.STALE_WRITES.labels(self.stage.name).inc()
            self._log(held).warning("refused: the entry belongs to another delivery by now")
        word = answer if answer != "settled" else outcome
        metrics.JOBS.labels(self.stage.name, word).inc()
        metrics.SERVICE_S.labels(self.stage.name).observe(max(0, self._clock.now_us() - held.read_us) / 1e6)
        if self.streams.dropped_letters:
            metrics.DEAD_DROPPED.labels(self.stage.name).inc(self.streams.dropped_letters)
            self.streams.dropped_letters = 0

    def _stamp(self, held: Held, job: Job) -> None:
        """Note how long this stage took; the next wait begins here."""
        now_us = self._clock.now_us()
        span_ms = max(0.0, (now_us - held.read_us) / 1000)
        job.timings_ms[self.stage.name] = round(job.timings_ms.get(self.stage.name, 0.0) + span_ms, 3)
        job.at_us = now_us

    async def _until_answered(self, call: Callable[[], Awaitable[A]]) -> A:
        """Repeat a harmless call until Redis has answered."""
        failures = 0
        while True:
            try:
                return await call()
            except BrokerUnavailable as error:
                self._outage.begins(error)
                await asyncio.sleep(reconnect_delay_s(failures, self._settings.redis.reconnect_cap_s))
                failures += 1

    def _forget(self, held: Held) -> None:
        key = (held.entry.stream, held.entry.id)
        if self.held.get(key) is held:
            del self.held[key]
        if held.job is not None and self._by_job.get(held.job.id) is held:
            del self._by_job[held.job.id]
        if held.alone and self._quarantine.owner is self:
            self._quarantine.owner = None
        self._changed.set()

    # --- what the consumer tells it --------------------------------------------------------------

    def wake(self) -> None:
        """Look at the streams again: an entry was added or a slot was freed."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Stop the handler of a job that is to be cancelled, where it is in hand."""
        held = self._by_job.get(job_id)
        if held is not None:
            self._abort(held, "cancelled")

    async def catch_up(self) -> None:
        """Do what the channel asked for while nobody listened: the mark in the live record is the truth."""
        self.wake()
        for job_id in list(self._by_job):
            if await self.streams.is_cancelled(job_id):
                self.cancel(job_id)

    def reconcile(self, before: frozenset[tuple[str, bytes]], pending: dict[tuple[str, bytes], int]) -> list[Entry]:
        """Compare what is in hand with what Redis says is ours; return own entries that no read delivered.

        Args:
            before: what was in hand when Redis was asked.
            pending: what Redis says this consumer holds, with delivery counts.

        An entry in hand that Redis gave to another is aborted. One that Redis says we hold, missing here in two looks,
        was served to a connection that died, and is to be taken up.
        """
        for key in before:
            held = self.held.get(key)
            if held is not None and not held.settling and pending.get(key) != held.entry.deliveries:
                log.warning(
                    "aborting: the entry is no longer ours", stage=self.stage.name, entry=held.entry.id.decode()
                )
                self._abort(held, "lost")
        unheld = {key: count for key, count in pending.items() if key not in self.held and key not in before}
        found = [Entry(key[0], key[1], n, None) for key, n in unheld.items() if self._seen_unheld.get(key) == n]
        self._seen_unheld = unheld
        return found

    async def take_up(self, missing: Sequence[Entry]) -> None:
        """Start own pending entries that no read delivered."""
        for stub in missing:
            entry = await self.streams.fetch(stub.stream, stub.id, stub.deliveries)
            key = (stub.stream, stub.id)
            if entry is None or key in self.held or self._quiet:
                continue
            self.start([entry])
            self._taken_up[key] = None
            while len(self._taken_up) > REMEMBERED:
                self._taken_up.popitem(last=False)
            metrics.TAKEN_UP.labels(self.stage.name).inc()

    async def inherit(self, stream: str, lapsed: str) -> bool:
        """Take over entries of a consumer presumed dead, as many as there are free slots; True when some are left."""
        free = self.stage.slots - len(self.held)
        if self._quiet or self.not_ready is not None or free <= 0 or self._quarantine.owner is not None:
            return True
        claimed = await self.streams.claim(stream, lapsed, free, idle=False)
        if claimed.entries:
            metrics.CLAIMED.labels(self.stage.name).inc(len(claimed.entries))
            log.warning("claimed", stage=self.stage.name, entries=len(claimed.entries), lapsed=lapsed)
            self.start(claimed.entries)
        elif claimed.left:
            self._suspects.add((stream, lapsed))
        return claimed.left > 0

    # --- stopping --------------------------------------------------------------------------------

    async def quiet(self) -> None:
        """Read no more."""
        self._quiet = True
        self._changed.set()
        self._wake.set()
        with suppress(PenstockError):  # the read ends by itself a little later
            await self.streams.stop_waiting()

    async def drain(self, timeout_s: float) -> None:
        """Wait until everything in hand is settled; what is not by then is stopped and given back."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.held and asyncio.get_running_loop().time() < deadline:
            await wait_at_most(self._changed, min(0.1, timeout_s))
        for held in list(self.held.values()):
            self._abort(held, "drain")
        tasks = {held.task for held in self.held.values() if held.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=2 * self._settings.redis.reply_timeout_s)

    async def close(self) -> None:
        """Stop the stage and close the connections."""
        tasks = {held.task for held in self.held.values() if held.task is not None}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.replicas.close()
        await self.stage.stop()
        await self.streams.close()

    def _abort(self, held: Held, reason: Reason) -> None:
        if held.settling or held.reason is not None:
            return
        held.reason = reason
        # A batch is stopped only when none of its jobs is wanted any more; what is settled needs it no longer.
        mates = [other for other in self.held.values() if other.task is held.task]
        if held.task is not None and all(mate.reason is not None or mate.settling for mate in mates):
            held.task.cancel()

    def _entry_of(self, job_id: str) -> Entry | None:
        held = self._by_job.get(job_id)
        return held.entry if held else None

    def _log(self, held: Held) -> structlog.stdlib.BoundLogger:
        job = held.job
        bound: structlog.stdlib.BoundLogger = log.bind(
            job_id=job.id if job else None,
            stage=self.stage.name,
            worker=self.name,
            attempt=job.attempt if job else None,
        )
        return bound

    def __repr__(self) -> str:
        return f"<Worker {self.stage.name} held={len(self.held)}/{self.stage.slots} quiet={self._quiet}>"


async def wait_at_most(event: asyncio.Event, at_most_s: float) -> None:
    """Wait for *event* and clear it, for a while at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(at_most_s):
            await event.wait()
    event.clear()


def _swallow_cancellation() -> None:
    """Let the task go on after a cancellation that was meant for its handler."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
