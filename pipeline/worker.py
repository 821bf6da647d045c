"""A worker's hands: which entries it holds, takes, inherits, gives up.

One `Worker` is one stage in one process. It holds at most `stage.slots` entries; each is in `held` from the moment it
was read until Redis has said that it is settled. What this process may still settle is decided by Redis alone (the
fence: consumer and delivery count); `held` only says what must not be started twice. What happens to an entry in
between is `Handling`'s.

What is read counts as started. Work given back unstarted is added anew, so a claim always means a crash.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Final

import structlog

from pipeline import metrics
from pipeline.batches import Batches
from pipeline.chats import Chats
from pipeline.clock import Clock
from pipeline.connection import Backoff, GroupMissing, Link, Outage, OutOfMemory
from pipeline.deliveries import Deliveries
from pipeline.errors import BrokerUnavailable, NotReady, PenstockError
from pipeline.handling import Handling, Held, Reason
from pipeline.quarantine import Quarantine
from pipeline.replicas import Replicas
from pipeline.reports import Reports
from pipeline.streams import Entry, Streams
from pipeline.webhooks import Webhooks

if TYPE_CHECKING:
    from pipeline.settings import Settings
    from pipeline.stage import Stage

log = structlog.get_logger(__name__)

NOT_READY_RETRY_S: Final = 1.0
WAKE_POLL_S: Final = 0.5
"""How long a placed stage sleeps when no wake-up comes: hints may be lost, work may not."""
REMEMBERED: Final = 1_000
"""Of entries taken up whose delivery may still come, late, over an old connection; of jobs to be cancelled."""


class Worker:
    """One stage in one process.

    Attributes:
        held: entries in hand, by stream and id. Written here only; the consumer reads it.
        not_ready: why the stage cannot work yet; None when it can.
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
        self._by_job: dict[str, Held] = {}
        self._consumer = consumer
        self._settings = settings
        self._clock = clock
        self._quarantine = quarantine
        self._announce = announce  # tells others that readiness changed
        self._rng = Random()
        self._changed = asyncio.Event()  # a slot was freed, readiness or quarantine changed
        self._wake = asyncio.Event()  # the llm streams or slots changed, as heard on the wake channel
        self._quiet = False
        self._suspects: set[tuple[str, str]] = set()  # (stream, lapsed consumer) with entries that must run alone
        self._own_suspects: dict[tuple[str, bytes], Entry] = {}  # such entries that are ours already
        self._heritage: set[tuple[str, str]] = set()  # (stream, lapsed consumer) for whose entries no slot was free
        self._heard: OrderedDict[str, None] = OrderedDict()  # jobs to be cancelled whose entry may be on its way to us
        self._seen_unheld: dict[tuple[str, bytes], int] = {}
        self._taken_up: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._following_up: asyncio.Task[None] | None = None
        self._results: Link | None = None
        self._chats: Chats | None = None
        self._reports: Reports | None = None
        self._deliveries: Deliveries | None = None
        self._follow_up_outage = Outage(f"{stage.name} control")
        self.replicas = Replicas(self.streams, settings, clock, self._entry_of, self._rng)
        self.batches = Batches(Link(settings.redis, f"{stage.name}-batches"), settings, clock)
        self._handling = Handling(
            stage, self.streams, self.replicas, self._by_job, self._heard, settings, clock, self._rng, name
        )
        metrics.IN_HAND.labels(stage.name).set_function(lambda: len(self.held))
        metrics.READY.labels(stage.name).set_function(lambda: self.not_ready is None)

    @property
    def worker(self) -> str:
        """Name of this worker, as answers show it."""
        return self.name

    @property
    def clock(self) -> Clock:
        """Redis' time."""
        return self._clock

    @property
    def webhooks(self) -> Webhooks:
        """Results to be told and secrets; over a connection of their own, since results may be large."""
        if self._results is None:
            self._results = Link(self._settings.redis, f"{self.stage.name}-results")
        return Webhooks(self._results, self._clock)

    @property
    def chats(self) -> Chats:
        """The chats in Redis; over a connection of their own."""
        if self._chats is None:
            self._chats = Chats(Link(self._settings.redis, f"{self.stage.name}-chats"), self._settings, self._clock)
        return self._chats

    @property
    def reports(self) -> Reports:
        """Finished reports; over a connection of their own, since they are long."""
        if self._reports is None:
            self._reports = Reports(
                Link(self._settings.redis, f"{self.stage.name}-reports"), self._settings, self._clock
            )
        return self._reports

    @property
    def deliveries(self) -> Deliveries:
        """The deliveries in Redis; over a connection of their own, since they may be long."""
        if self._deliveries is None:
            link = Link(self._settings.redis, f"{self.stage.name}-deliveries")
            self._deliveries = Deliveries(
                link, self._settings, self._clock, consumer=self._consumer, entry_of=self._entry_of
            )
        return self._deliveries

    # --- feeding ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start the stage, then read and start entries until told to be quiet."""
        await self._start_stage()
        backoff = Backoff(self._settings.redis.reconnect_cap_s, Outage(f"{self.stage.name} read"))
        while not self._quiet:
            try:
                await self._feed()
            except GroupMissing:
                log.warning("a consumer group is gone; creating it again", stage=self.stage.name)
                await backoff.wait()
                with suppress(PenstockError):  # Redis is away, or a key is of a wrong type: tried again
                    await self.streams.ensure_groups()
            except PenstockError as error:
                await backoff.failed(error)
            else:
                backoff.succeeded()

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

    async def _feed(self) -> None:
        """Start what can be started next; may find nothing for a while."""
        if (self._suspects or self._own_suspects) and self._quarantine.is_due():
            await self._run_suspect()
        while self._heritage and self._free > 0:  # before new work, or a busy worker would never come to it
            await self.inherit(*self._heritage.pop())
        free = self._free
        if free <= 0 or self._quarantine.is_on:
            await wait_at_most(self._changed, WAKE_POLL_S)
            return
        with self._quarantine.bringing():
            if self.stage.placed:
                self._wake.clear()
                started = self.start(await self.replicas.take(free))
            else:
                started = self.start(await self.streams.read(free))
        if self.stage.placed and not (started and self.replicas.more_wait):
            await wait_at_most(self._wake, WAKE_POLL_S)
        elif started:
            await asyncio.sleep(0)  # what needs no time is on its way back after this, and the next read waits for it

    @property
    def _free(self) -> int:
        return self.stage.slots - len(self.held)

    async def _run_suspect(self) -> None:
        """Wait for empty hands, then take one suspected entry and start it alone."""
        if not await self._quarantine.begin():
            return
        started = False
        try:
            entry = None if self._quiet else await self._next_suspect()
            if entry is not None:
                log.warning("running an entry alone", stage=self.stage.name, holders_died=entry.deliveries - 1)
                started = self.start([entry], alone=True) > 0
        finally:
            if not started:
                self._quarantine.end()

    async def _next_suspect(self) -> Entry | None:
        if self._own_suspects:
            return self._own_suspects.popitem()[1]
        stream, lapsed = next(iter(self._suspects))
        claimed = await self.streams.claim(stream, lapsed, 1, idle=True)
        if not claimed.left:
            self._suspects.discard((stream, lapsed))
        metrics.CLAIMED.labels(self.stage.name).inc(len(claimed.entries))
        return claimed.entries[0] if claimed.entries else None

    def start(self, entries: Iterable[Entry], *, alone: bool = False) -> int:
        """Take *entries* into hand, start their handlers, and return how many were started.

        One that is in hand already, or was taken up before its read came back, is left: it runs.
        """
        now_us = self._clock.now_us()
        fresh: list[Held] = []
        for entry in entries:
            key = (entry.stream, entry.id)
            if key in self.held or (key in self._taken_up and not entry.resumed):
                continue
            held = Held(entry, now_us, alone)
            self.held[key] = held
            fresh.append(held)
        loop = asyncio.get_running_loop()
        for chunk in self._batches(fresh, 1 if alone else self.stage.batch):
            task = loop.create_task(self._work(chunk), name=self.stage.name)
            for held in chunk:
                held.task = task
        return len(fresh)

    @staticmethod
    def _batches(fresh: Sequence[Held], size: int) -> Iterator[list[Held]]:
        """Divide entries into those that are handled together, each batch of one priority.

        The outcomes of a batch come all at once: a question must not wait for the documents that were read with it.
        """
        by_stream: dict[str, list[Held]] = {}
        for held in fresh:
            by_stream.setdefault(held.entry.stream, []).append(held)
        for some in by_stream.values():
            for i in range(0, len(some), size):
                yield some[i : i + size]

    async def _work(self, chunk: Sequence[Held]) -> None:
        try:
            await self._handling.live(chunk)
        except asyncio.CancelledError:
            if all(held.reason is None for held in chunk):
                raise
        except Exception:
            # What is still in hand stays pending; reconciliation finds it and it runs again.
            log.exception("the worker failed between reading and settling", stage=self.stage.name)
        finally:
            for held in chunk:
                self._forget(held)
            self._changed.set()

    def _forget(self, held: Held) -> None:
        key = (held.entry.stream, held.entry.id)
        if self.held.get(key) is held:
            del self.held[key]
        if held.job is not None and self._by_job.get(held.job.id) is held:
            del self._by_job[held.job.id]
        if held.alone:
            self._quarantine.end()

    # --- what the consumer tells it --------------------------------------------------------------

    def wake(self) -> None:
        """Look at the streams again: an entry was added or a slot was freed."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Stop the handler of a job that is to be cancelled, where it is in hand, or as soon as it is."""
        held = self._by_job.get(job_id)
        if held is not None:
            self._abort(held, "cancelled")
            return
        self._heard[job_id] = None
        while len(self._heard) > REMEMBERED:
            self._heard.popitem(last=False)

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

    def follow_up(self, missing: Sequence[Entry]) -> None:
        """Do what a renewal gives occasion for: take up *missing*, and register the replicas.

        Beside the renewal, since it uses the control connection: the lease must not lapse because that one is slow.
        While an earlier follow-up is still under way nothing is begun; what is missing is found again.
        """
        if self._following_up is not None and not self._following_up.done():
            return
        if missing or self.stage.placed:
            self._following_up = asyncio.create_task(self._follow_up(missing), name=f"{self.stage.name} follow-up")

    async def _follow_up(self, missing: Sequence[Entry]) -> None:
        trouble: PenstockError | None = None
        try:
            await self.take_up(missing)
        except PenstockError as error:
            trouble = error
        try:
            if self.stage.placed:
                await self.replicas.register()
        except PenstockError as error:
            trouble = error
        if trouble is None:
            self._follow_up_outage.ends()
        else:
            self._follow_up_outage.begins(trouble)

    async def take_up(self, missing: Sequence[Entry]) -> None:
        """Start own pending entries that no read delivered; one that is suspected of killing its holders, alone."""
        with self._quarantine.bringing():
            for stub in missing:
                entry = await self.streams.fetch(stub.stream, stub.id, stub.deliveries)
                key = (stub.stream, stub.id)
                if entry is None or key in self.held or self._quiet:
                    continue
                if entry.deliveries > self.streams.suspect_from:
                    self._own_suspects[key] = entry
                    continue
                if self._quarantine.is_on:
                    continue  # found again at the next renewal
                self.start([entry])
                self._taken_up[key] = None
                while len(self._taken_up) > REMEMBERED:
                    self._taken_up.popitem(last=False)
                metrics.TAKEN_UP.labels(self.stage.name).inc()

    async def inherit(self, stream: str, lapsed: str) -> None:
        """Take over entries of a consumer presumed dead, as many as there are free slots; without any, as they come."""
        if self._quiet or self.not_ready is not None or self._quarantine.is_on:
            return
        if self._free <= 0:
            self._heritage.add((stream, lapsed))
            return
        with self._quarantine.bringing():
            claimed = await self.streams.claim(stream, lapsed, self._free, idle=False)
            if claimed.entries:
                metrics.CLAIMED.labels(self.stage.name).inc(len(claimed.entries))
                log.warning("claimed", stage=self.stage.name, entries=len(claimed.entries), lapsed=lapsed)
                self.start(claimed.entries)
            elif claimed.left:
                self._suspects.add((stream, lapsed))

    # --- stopping --------------------------------------------------------------------------------

    async def quiet(self) -> None:
        """Read no more."""
        self._quiet = True
        self.stage.quiet()
        self._changed.set()
        self._wake.set()
        with suppress(PenstockError):  # the read ends by itself a little later
            await self.streams.stop_waiting()

    async def drain(self, timeout_s: float) -> None:
        """Wait until everything in hand is settled; what is not by then is stopped and given back.

        A stage's own time is for its handlers. What is only to be settled has the common one: Redis may be away.
        """
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        while self.held:
            runs = any(not held.settling for held in self.held.values())
            limit_s = self.stage.drain_s if runs and self.stage.drain_s is not None else timeout_s
            if now_s() >= began_s + limit_s:
                break
            await wait_at_most(self._changed, min(0.1, limit_s))
        for held in list(self.held.values()):
            self._abort(held, "drain")
        tasks = {held.task for held in self.held.values() if held.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=2 * self._settings.redis.reply_timeout_s)

    async def close(self) -> None:
        """Stop the stage and close the connections."""
        tasks = {held.task for held in self.held.values() if held.task is not None}
        if self._following_up is not None:
            tasks.add(self._following_up)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.replicas.close()
        await self.stage.stop()
        await self.streams.close()
        await self.batches.close()
        if self._results is not None:
            await self._results.close()
        if self._chats is not None:
            await self._chats.close()
        if self._reports is not None:
            await self._reports.close()
        if self._deliveries is not None:
            await self._deliveries.close()

    def _abort(self, held: Held, reason: Reason) -> None:
        if held.settling or held.reason is not None:
            return
        held.reason = reason
        # A batch is stopped only when none of its jobs is wanted any more, and not while one of them is being settled.
        mates = [other for other in self.held.values() if other.task is held.task and not other.is_settled]
        if held.task is not None and all(mate.reason is not None and not mate.settling for mate in mates):
            held.task.cancel()

    def _entry_of(self, job_id: str) -> Entry | None:
        held = self._by_job.get(job_id)
        return held.entry if held else None

    def __repr__(self) -> str:
        return f"<Worker {self.stage.name} held={len(self.held)}/{self.stage.slots} quiet={self._quiet}>"


async def wait_at_most(event: asyncio.Event, at_most_s: float) -> None:
    """Wait for *event* and clear it, for a while at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(at_most_s):
            await event.wait()
    event.clear()
