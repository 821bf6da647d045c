"""One process of ours as Redis sees it: a consumer with a lease, and everything that happens at intervals.

The lease (`worker:<consumer>`) says that the process lives. It is renewed at a third of its length or sooner; at every
renewal Redis also tells what this consumer holds, and each worker compares that with what is in hand. Renewing has a
connection of its own and waits for nothing else: what follows from it is done beside it. Others claim the
entries of a consumer whose lease they missed in two looks, one renewal apart, over a connection that has held for a
while: after an outage of Redis all leases have lapsed at once, and owners re-take theirs first.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Final

import orjson
import structlog

from pipeline import keys, metrics, scripts
from pipeline.batches import STAGED_FOR_MS
from pipeline.clock import Clock, monotonic_us
from pipeline.connection import Argument, Backoff, CommandRefused, Link, Outage, parse_info
from pipeline.errors import ConfigError, PenstockError
from pipeline.quarantine import Quarantine
from pipeline.worker import Worker, wait_at_most

if TYPE_CHECKING:
    from pipeline.settings import Settings
    from pipeline.stage import Loop, Stage

log = structlog.get_logger(__name__)

STEADY_S: Final = 2.0
"""A claimer's connection must have held so long: owners reconnect within half a second and re-take their leases."""
PROMOTE_EVERY_S: Final = 0.1
EXPIRE_EVERY_S: Final = 0.5
OLDEST_REDIS: Final = 7  # scripts with flags, and XREADGROUP inside a script
AT_ONCE: Final = 50
"""Jobs promoted or expired by one script: about 1 ms during which Redis serves nobody else."""
PACE_S: Final = 0.005
"""Between two such scripts while there is more to do."""
TURN_MS: Final = 100
"""One process promotes while there is much to do; another one when it has been silent for so long."""


class Consumer:
    """A process that works on stages, one or several, and runs loops beside them.

    Its name is the worker's name and a nonce: a process that starts again is another consumer.
    """

    def __init__(
        self, stages: Sequence[Stage], settings: Settings, *, loops: Sequence[Loop] = (), metrics_address: str = ""
    ) -> None:
        self._settings = settings
        self.clock = Clock()
        names = "+".join([*(stage.name for stage in stages), *(loop.name for loop in loops)])
        self.worker_name = settings.worker.name or f"{socket.gethostname().split('.')[0]}-{names}"
        self.name = f"{self.worker_name}:{secrets.token_hex(4)}"
        self._quarantine = Quarantine(settings.worker.lease_s)
        self._renew_now = asyncio.Event()
        self.workers = [
            Worker(stage, self.name, settings, self.clock, self._quarantine, self.worker_name, self._renew_now.set)
            for stage in stages
        ]
        self._loops = loops
        self._quarantine.holders += self.workers
        self._link = Link(settings.redis, "lease")
        self._ticker = Link(settings.redis, "tick")
        self._listener = Link(settings.redis, "listen")
        self._metrics_address = metrics_address
        self._started_ms = time.time_ns() // 1_000_000
        self._record = b""
        self._missing: dict[tuple[str, str], int] = {}  # lapsed (stream, consumer): when it was first missed
        self._stop = asyncio.Event()

    # --- the life of the process -----------------------------------------------------------------

    async def run(self) -> None:
        """Work until told to stop, then drain and leave nothing behind.

        Raises:
            ConfigError: a stage cannot ever work with these settings.
        """
        background: list[asyncio.Task[None]] = []
        feeding: list[asyncio.Task[None]] = []
        try:
            async with asyncio.TaskGroup() as group:
                background += [
                    group.create_task(self._renew_forever(), name="renew"),
                    group.create_task(self._every(PROMOTE_EVERY_S, self._promote), name="promote"),
                    group.create_task(self._every(EXPIRE_EVERY_S, self._expire), name="expire"),
                    group.create_task(self._every(EXPIRE_EVERY_S, self._unstage), name="unstage"),
                    group.create_task(self._listen_forever(), name="listen"),
                    group.create_task(self._watch_loop_lag(), name="loop lag"),
                    group.create_task(self._inspect_redis(), name="inspect redis"),
                ]
                feeding += [group.create_task(w.run(), name=f"feed {w.stage.name}") for w in self.workers]
                feeding += [
                    group.create_task(self._claim_forever(w), name=f"claim {w.stage.name}") for w in self.workers
                ]
                feeding += [
                    group.create_task(loop.run(self.name, self.clock, self._stop), name=loop.name)
                    for loop in self._loops
                ]
                await self._stop.wait()
                log.info("draining", worker=self.worker_name, in_hand=sum(len(w.held) for w in self.workers))
                for worker in self.workers:
                    await worker.quiet()
                await asyncio.wait(feeding, timeout=2 * self._settings.redis.reply_timeout_s)
                await asyncio.gather(*(w.drain(self._settings.worker.drain_s) for w in self.workers))
                for task in [*background, *feeding]:
                    task.cancel()
        except ExceptionGroup as problems:
            raise problems.exceptions[0] from None
        finally:
            await self._leave()

    def stop(self) -> None:
        """Begin to drain."""
        self._stop.set()

    def stop_on_signals(self) -> None:
        """Drain at the first SIGTERM or SIGINT, exit at once at the second."""
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if self._stop.is_set():
                os._exit(130)
            self.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)

    async def _leave(self) -> None:
        for worker in self.workers:
            await worker.close()
        try:
            async with asyncio.timeout(1.0):
                await self._link.call("DEL", keys.WORKER + self.name)
                await self._link.call("ZREM", keys.WORKERS, self.name)
                for worker in self.workers:
                    await self._leave_groups(worker)
        except (PenstockError, TimeoutError) as error:
            log.warning("could not sign off; the lease will lapse", error=str(error))
        for link in (self._link, self._ticker, self._listener):
            await link.close()

    async def _leave_groups(self, worker: Worker) -> None:
        """Leave the groups where this consumer holds nothing; what it still holds is for others to claim.

        Looking and leaving are one script, a claim of nothing: DELCONSUMER forgets what is pending.
        """
        for stream in worker.streams.names:
            await self._link.run(scripts.CLAIM, (stream,), (worker.stage.name, self.name, self.name, 0, "", 1))

    # --- the lease -------------------------------------------------------------------------------

    async def _renew_forever(self) -> None:
        backoff = Backoff(self._settings.redis.reconnect_cap_s, Outage("lease"))
        while True:
            try:
                await self.renew()
            except PenstockError as error:
                await backoff.failed(error)
            else:
                backoff.succeeded()
                await wait_at_most(self._renew_now, self._settings.worker.renew_s)

    async def renew(self) -> None:
        """Renew the lease, and compare what is in hand with what Redis says; what follows is done beside it."""
        pairs = [(worker, stream) for worker in self.workers for stream in worker.streams.names]
        before = {worker: frozenset(worker.held) for worker in self.workers}
        record = self._describe()
        args: list[Argument] = [self.name, int(self._settings.worker.lease_s * 1000), record]
        args.append("changed" if record != self._record else "")
        for worker, stream in pairs:
            args += [stream, worker.stage.name]
        sent_us = monotonic_us()
        reply = await self._link.run(scripts.RENEW, (), args, timeout_s=self._settings.renew_timeout_s)
        self.clock.observe(int(reply[0]), sent_us)
        if reply[1] == b"taken" and self._record:
            metrics.LEASES_LOST.inc()
            log.warning("the lease had lapsed; taken again", worker=self.worker_name)
        self._record = record
        if reply[2] == b"unlisted":
            log.error("this worker is not listed: the key is of a wrong type", key=keys.WORKERS)
        pending: dict[Worker, dict[tuple[str, bytes], int]] = {worker: {} for worker in self.workers}
        for (worker, stream), rows in zip(pairs, reply[3:], strict=True):
            if rows != b"gone":
                pending[worker] |= {(stream, entry_id): int(count) for entry_id, count in rows}
        for worker in self.workers:
            worker.follow_up(worker.reconcile(before[worker], pending[worker]))

    def _describe(self) -> bytes:
        return orjson.dumps(
            {
                "worker": self.worker_name,
                "stages": {worker.stage.name: worker.not_ready for worker in self.workers},
                "loops": {loop.name: loop.not_ready for loop in self._loops},
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started_ms": self._started_ms,
                "metrics": self._metrics_address,
            }
        )

    # --- the work of the dead --------------------------------------------------------------------

    async def _claim_forever(self, worker: Worker) -> None:
        while not self._stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._next_look_s(worker)):
                    await self._stop.wait()
                    return
            with suppress(PenstockError):  # Redis is away, or the group is: their owners see to it
                await self._claim_once(worker)

    def _next_look_s(self, worker: Worker) -> float:
        """Return the wait before the next look: half a renewal, or less where a second look is due before."""
        renew_s = self._settings.worker.renew_s
        now_us = monotonic_us()
        ages_s = [(now_us - at) / 1e6 for (stream, _), at in self._missing.items() if stream in worker.streams.names]
        return min([renew_s / 2, *(renew_s - age_s for age_s in ages_s if age_s < renew_s)])

    async def _claim_once(self, worker: Worker) -> None:
        """Note who has no lease; take over from those who had none one renewal ago already."""
        lapsed = await worker.streams.lapsed()
        now_us = monotonic_us()
        names = {pair for pair in lapsed if pair[1] != self.name}
        mine = set(worker.streams.names)
        self._missing = {p: at for p, at in self._missing.items() if p in names or p[0] not in mine}
        for pair in names:
            first_us = self._missing.setdefault(pair, now_us)
            seen_twice = now_us - first_us >= self._settings.worker.renew_s * 1e6
            if seen_twice and worker.streams.control.held_for_s() >= min(STEADY_S, self._settings.worker.lease_s):
                await worker.inherit(*pair)

    # --- time ------------------------------------------------------------------------------------

    async def _every(self, interval_s: float, once: Callable[[], Awaitable[bool]]) -> None:
        """Repeat *once* at intervals, and sooner while it says that there is more."""
        while True:
            try:
                more = await once()
            except CommandRefused as error:  # a key of the wrong type, say: an operator must act
                log.error("redis refuses", script=once.__name__, error=str(error))  # noqa: TRY400 - no stack is needed
                more = False
            except PenstockError:
                more = False  # the lease's renewal reports the outage
            await asyncio.sleep(PACE_S if more else interval_s)

    async def _promote(self) -> bool:
        _, moved, _, more = await self._run_tick(scripts.PROMOTE, (AT_ONCE, self.name, TURN_MS))
        metrics.PROMOTED.inc(moved)
        return bool(more)

    async def _expire(self) -> bool:
        ttl_ms = int(self._settings.worker.completion_ttl_s * 1000)
        dead = self._settings.dead
        args = (AT_ONCE, ttl_ms, dead.max_letters, int(dead.max_age_s * 1000))
        _, expired, lost = await self._run_tick(scripts.EXPIRE, args)
        metrics.EXPIRED.inc(expired)
        metrics.LOST.inc(lost)
        if lost:
            log.error("jobs are lost: their stream entries had vanished", jobs=lost)
        return bool(expired + lost >= AT_ONCE)

    async def _unstage(self) -> bool:
        await self._run_tick(scripts.UNSTAGE, (AT_ONCE, STAGED_FOR_MS))
        return False  # nobody waits for it

    async def _run_tick(self, script: scripts.Script, args: Sequence[Argument]) -> list[int]:
        sent_us = monotonic_us()
        reply: list[int] = await self._ticker.run(script, (), args)
        self.clock.observe(int(reply[0]), sent_us)
        return reply

    async def _watch_loop_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.5
            await asyncio.sleep(0.5)
            metrics.LOOP_LAG_S.observe(max(0.0, loop.time() - due))

    async def _inspect_redis(self) -> None:
        """Refuse a Redis that is too old; warn of one that may forget or evict what was accepted."""
        while True:
            try:
                text = await self._ticker.call("INFO", "everything")
                break
            except PenstockError:
                await asyncio.sleep(1.0)
        about = parse_info(text)
        version = about.get("redis_version", "0")
        if int(version.split(".")[0]) < OLDEST_REDIS:
            raise ConfigError(f"Redis {version} is too old: {OLDEST_REDIS}.0 or newer, or Valkey, is needed")
        if about.get("maxmemory_policy") != "noeviction":
            log.warning("redis may evict work: set maxmemory-policy noeviction", policy=about.get("maxmemory_policy"))
        if about.get("aof_enabled") != "1":
            log.warning("redis forgets accepted work when it restarts: set appendonly yes")

    # --- hints -----------------------------------------------------------------------------------

    async def _listen_forever(self) -> None:
        backoff = Backoff(self._settings.redis.reconnect_cap_s)  # the lease's renewal reports the outage
        channels = [keys.CANCEL_CHANNEL]
        if any(worker.stage.placed for worker in self.workers):
            channels.append(keys.WAKE_CHANNEL)  # said for each question: nobody else is to be woken for it
        while True:
            try:
                async with aclosing(self._listener.subscribe(*channels)) as heard:
                    async for channel, message in heard:
                        backoff.succeeded()
                        for worker in self.workers:
                            if not channel:
                                await worker.catch_up()
                            elif channel == keys.CANCEL_CHANNEL:
                                worker.cancel(message.decode())
                            else:
                                worker.wake()
            except PenstockError as error:
                await backoff.failed(error)

    def __repr__(self) -> str:
        return f"<Consumer {self.name} {self.workers}>"
