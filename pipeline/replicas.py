"""The LLM replicas as one llm worker sees them: who stands how, who is next, how calls went.

Leases, running places, recent speed and breakers live in Redis, so all llm processes act on one picture. A replica this
worker was not configured with is none of its business: it might not reach it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

import orjson
import structlog
from msgspec import Struct

from pipeline import keys, metrics, scripts
from pipeline.balancing import POLICIES, Replica, Snapshot, plan
from pipeline.batching import MOST
from pipeline.clock import Clock, monotonic_us
from pipeline.errors import LeaseLost, PenstockError
from pipeline.streams import Entry, Placed, Standing, Streams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.job import Job
    from pipeline.settings import Settings

log = structlog.get_logger(__name__)

SPARE_ORDERS: Final = 2
"""Orders of preference made beyond the jobs that waited at the last look: making one costs more than taking its job."""
GATHER_S: Final = 0.02
"""How long news of calls that went well is gathered: a script call costs more than the news in it, and an average of
the last ten calls may be that old. A failure is told at once, with all that was gathered."""
STALE_AFTER_S: Final = 30.0
"""A replica unheard of for so long may be faster than it was: one job tries it, and its measure replaces the old."""
HANGS: Final = 3.0
"""A call that has taken so many times the usual when its job's deadline comes counts as a failure of its replica."""
FORGET_AFTER_S: Final = 60.0
"""A replica that no worker has registered for so long leaves the registry once it holds no lease."""


class _Call(Struct, frozen=True):
    url: str
    word: str
    duration_us: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Registered:
    """What the registry says of one replica: its slots, and when a worker last said so."""

    slots: int
    seen_ms: int


def read_registry(rows: Sequence[bytes]) -> dict[str, Registered]:
    """Return the replicas in `llm:replicas` (HGETALL's answer) by URL; what a stranger wrote there is left out."""
    known = {}
    for url, record in zip(rows[::2], rows[1::2], strict=True):
        try:
            body = orjson.loads(record)
            known[url.decode()] = Registered(int(body["slots"]), int(body["seen_ms"]))
        except (ValueError, TypeError, KeyError):
            continue
    return known


class Replicas:
    """The configured replicas and what is known of them.

    `held` finds the entry of a job in this worker's hands; only its owner may move its lease.

    Attributes:
        more_wait: whether the last taking may have left jobs behind.
    """

    def __init__(
        self, streams: Streams, settings: Settings, clock: Clock, held: Callable[[str], Entry | None], rng: Random
    ) -> None:
        self._streams = streams
        self._settings = settings
        self._clock = clock
        self._held = held
        self._rng = rng
        self._policy = POLICIES[settings.balancing.policy]
        self._slots: dict[str, int] = {}
        for text in settings.llm.urls:
            url, slots = keys.normalise_replica_url(text)
            self._slots[url] = slots or settings.llm.slots
        self._standings = dict.fromkeys(self._slots, Standing(0, 0, None, None, 0, 0))
        self._waiting = 0
        self.more_wait = True
        self._turn = 0
        self._observed: list[_Call] = []
        self._sharing: asyncio.Task[None] | None = None
        self._is_urgent = asyncio.Event()

    # --- placing -------------------------------------------------------------------------------

    async def take(self, most: int) -> list[Entry]:
        """Return up to *most* entries, each placed at a replica with a free slot."""
        placed = await self._place(most)
        if not placed.entries and placed.waiting:
            placed = await self._place(most)  # the first look was stale; this one is not
        return placed.entries

    async def _place(self, most: int) -> Placed:
        snapshot = self._snapshot()
        orders = plan(self._policy, snapshot, min(most, self._waiting + SPARE_ORDERS), self._rng)
        placed = await self._streams.place(snapshot.replicas, orders)
        for (url, before), after in zip(self._standings.items(), placed.standings, strict=True):
            if after.running < 0 <= before.running:
                log.error("a replica gets no jobs: its places or leases are a key of a wrong type", replica=url)
        self._standings = dict(zip(self._slots, placed.standings, strict=True))
        self._waiting = max(0, placed.waiting)
        self._turn += len(placed.entries)
        self.more_wait = placed.waiting > 0 or len(placed.entries) == len(orders)
        return placed

    async def move(self, job: Job) -> str | None:
        """Give up *job*'s place and take one at another replica, outside `job.avoid`.

        Returns:
            The new replica's URL, also noted in `job.replica`; None where no other has a free slot (the job then has
            no place: raise `RetryLater`).

        Raises:
            LeaseLost: the entry belongs to another consumer now.
            BrokerUnavailable: Redis is away.
        """
        entry = self._held(job.id)
        if entry is None:
            raise LeaseLost
        snapshot = self._snapshot()
        known = {replica.url: replica for replica in snapshot.replicas}
        others = tuple(replica for replica in snapshot.replicas if replica.url not in job.avoid)
        order = self._policy(Snapshot(others, 0, snapshot.turn), self._rng)
        answer = await self._streams.move(entry, job.id, [known[url] for url in order])
        if answer == "lost":
            raise LeaseLost
        job.replica = None if answer == "none" else answer
        return job.replica

    def has_other_than(self, avoid: Container[str]) -> bool:
        """Say whether a replica outside *avoid* could be asked: its breaker lets callers through."""
        return any(not replica.is_open and replica.url not in avoid for replica in self._replicas())

    def _replicas(self) -> list[Replica]:
        return [self._replica(url, standing) for url, standing in self._standings.items()]

    def _replica(self, url: str, standing: Standing) -> Replica:
        known = standing.us_per_token is not None and standing.tokens is not None
        half_open = 0 < standing.open_until_ms <= self._clock.now_ms()
        return Replica(
            url,
            slots=1 if half_open else self._slots[url],
            running=standing.running,
            leases=standing.leases,
            service_s=standing.us_per_token * standing.tokens / 1e6 if known else None,  # type: ignore[operator]
            is_stale=self._clock.now_ms() - standing.seen_ms > STALE_AFTER_S * 1000,
            is_open=standing.running < 0 or standing.open_until_ms > self._clock.now_ms(),
        )

    def _snapshot(self) -> Snapshot:
        return Snapshot(tuple(self._replicas()), max(0, self._waiting - 1), self._turn)

    # --- learning ------------------------------------------------------------------------------

    def observe(self, url: str, *, ok: bool, duration_s: float = 0.0, tokens: int = 0, refused: bool = False) -> None:
        """Note how one call went; shared with all processes soon after.

        Args:
            ok: whether the replica answered well; a row of failures opens its breaker.
            duration_s: from sending the request to the last byte of the answer; 0 where the replica did its part but
                gave no answer to measure (it refused the request, say): that must not make it look fast.
            tokens: completion tokens of a good answer, 0 where the replica did not say.
            refused: the connection was refused: opens the breaker at once.
        """
        word = "ok" if ok else "refused" if refused else "failed"
        self._observed.append(_Call(url, word, int(duration_s * 1e6), tokens))
        if not ok:
            self._is_urgent.set()
        if self._sharing is None:
            self._sharing = asyncio.create_task(self._share(), name="observe")

    def overran(self, url: str, span_s: float) -> None:
        """Note that a job met its deadline at this replica, *span_s* after it began there.

        A replica that had much longer than usual is taken to hang; one that was merely asked too late is not to blame.
        """
        standing = self._standings.get(url)
        if standing is None:  # claimed from a worker that knows other replicas
            return
        usual_s = self._replica(url, standing).service_s
        if usual_s is None or span_s > HANGS * usual_s:
            self.observe(url, ok=False)

    async def _share(self) -> None:
        """Share what was observed, until there is nothing more."""
        try:
            while self._observed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_S):
                        await self._is_urgent.wait()
                self._is_urgent.clear()
                calls, self._observed = self._observed[:MOST], self._observed[MOST:]
                with suppress(PenstockError):  # estimates: what is lost in an outage, the next calls make up for
                    for call, change in zip(calls, await self._send(calls), strict=True):
                        _note(call.url, change)
        finally:
            self._sharing = None

    async def _send(self, calls: Sequence[_Call]) -> list[str]:
        llm = self._settings.llm
        args: list[str | int] = [llm.breaker_failures, int(llm.breaker_open_s * 1000), int(STALE_AFTER_S * 1000)]
        for call in calls:
            args += [call.url, call.word, call.duration_us, call.tokens]
        sent_us = monotonic_us()
        reply = await self._streams.control.run(scripts.OBSERVE, (), args)
        self._clock.observe(int(reply[0]), sent_us)
        return [word.decode() for word in reply[1:]]

    async def register(self) -> None:
        """Tell the gateways which replicas there are, and forget those that nobody registers any more."""
        now_ms = self._clock.now_ms()
        link = self._streams.control
        if self._slots:
            rows = [(url, orjson.dumps({"slots": slots, "seen_ms": now_ms})) for url, slots in self._slots.items()]
            await link.call("HSET", keys.REPLICAS, *[part for row in rows for part in row])
        rows = await link.call("HGETALL", keys.REPLICAS)
        known = read_registry(rows)
        for url in (field.decode(errors="replace") for field in rows[::2]):
            if url not in known:
                log.warning("dropping a replica whose record cannot be read", replica=url)
            if url not in known or now_ms - known[url].seen_ms > FORGET_AFTER_S * 1000:
                await link.run(scripts.FORGET, (), (url,))

    async def close(self) -> None:
        """Stop sharing."""
        if self._sharing is not None:
            self._sharing.cancel()
            with suppress(asyncio.CancelledError):
                await self._sharing

    def __repr__(self) -> str:
        return f"<Replicas {self._standings} waiting={self._waiting}>"


def _note(url: str, change: str) -> None:
    """Tell of a breaker that opened, or closed again."""
    if change in {"opened", "closed_again"}:
        state = "open" if change == "opened" else "closed"
        metrics.BREAKER.labels(url, state).inc()
        log.warning("circuit breaker", replica=url, state=state)
