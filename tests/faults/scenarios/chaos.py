"""Faults of every kind, several at a time, drawn from a printed seed; and the long run."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Final

from redis.exceptions import RedisError

from pipeline import keys, scripts
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import LEASE_S, READY_S, STAGES, Cluster, Holding, Layout, Part
from tests.faults.history import read
from tests.faults.load import EVERYBODY, Load, Mix
from tests.faults.nemesis import LAST_CHANCE, TRY_FOR_S, Nemesis, unknown_in_silence
from tests.faults.proxy import Proxy
from tests.faults.scenarios import scenario

Harm = Callable[[], Awaitable[bool]]

AT_ONCE: Final = 3
PAUSE_S: Final = (0.2, 1.5)
PROXIED: Final = frozenset({"gateway-1", "encoder-1", "retriever-1", "llm-1", "replica-1"})
NETWORK: Final = ("slow", "drip", "cut", "freeze", "half-open", "lost replies")
NETWORK_OF_REPLICAS: Final = ("slow", "drip", "cut", "freeze")
"""Without what makes a call be made again: that its answer is lost is no harm done by Penstock."""
DRIP_BYTES_PER_S: Final = 4_000.0
SICK: Final = ({"mode": "garbage"}, {"mode": "hang"}, {"mode": "truncated"}, {"status": 503}, {"fail_rate": 0.5})

LIFE_S: Final = 80.0
"""Of a question: two of its calls may hang (30 s each), and a third one still answers in time."""
QUESTIONS: Final[Mix] = {kind: share for kind, share in EVERYBODY.items() if kind != "prompt"}
"""Everybody but those whose calls may hang for longer than that (120 s)."""
FORGETFUL: Final = (scripts.SUBMIT, scripts.SETTLE, scripts.CLAIM, scripts.RENEW, scripts.TAKE, scripts.PLACE)
"""Scripts whose replies a forgetful network loses."""


class Chaos:
    """Draws faults. No process suffers two at a time: what is frozen cannot be asked what it holds.

    Nor does a connection, which may be bad while its process suffers something else: whoever heals a proxy heals all.
    But a process that is frozen keeps its good connection: its entries would account for calls made again twice.
    A fault's method says whether the fault was one: nothing may have been free for it, or nothing was lost by it.
    Whoever has nothing in hand is left in peace, and somebody else is looked for: a short run draws so few faults that
    none may be wasted on the idle.

    Attributes:
        done: faults by their kind.
        spared: names of processes that are never killed.
    """

    def __init__(self, cell: Cell, cluster: Cluster, nemesis: Nemesis, spared: Iterable[str] = ()) -> None:
        self.done: Counter[str] = Counter()
        self.spared = set(spared)
        self._cell = cell
        self._cluster = cluster
        self._nemesis = nemesis
        self._busy: set[str] = set()
        self._frozen: set[str] = set()
        self._bad: set[str] = set()  # proxies with a fault

    async def rage(self, until: Callable[[], bool]) -> None:
        """Begin one fault after another, a few at the same time, until told to stop; then let the last ones end.

        First comes one of each kind, in any order.
        """
        harms: dict[Harm, int] = {
            self.kill_worker: 6, self.kill_gateway: 1, self.zombie: 2, self.restart_redis: 1, self.stall_redis: 1,
            self.bad_network: 4, self.sick_replica: 2, self.kill_replica: 1, self.drain_worker: 1,
        }  # fmt: skip
        rng = self._cell.rng
        first = list(harms)
        first.remove(rng.choice([self.restart_redis, self.stall_redis]))  # one of them is enough
        rng.shuffle(first)
        raging: dict[asyncio.Task[bool], Harm | None] = {}
        while not until():
            if len(raging) < AT_ONCE and "redis" not in self._busy:
                due = first.pop() if first else None
                harm = due or rng.choices(list(harms), list(harms.values()))[0]
                raging[asyncio.ensure_future(harm())] = due
            await asyncio.sleep(rng.uniform(*PAUSE_S))
            for task in [task for task in raging if task.done()]:
                due = raging.pop(task)
                if not task.result() and due is not None:
                    first.insert(0, due)
        await asyncio.gather(*raging)

    @asynccontextmanager
    async def _one_of(self, *stages: str, without: Container[str] = ()) -> AsyncIterator[Part | None]:
        """Have a process of some stages to oneself; None when all of them suffer already, or Redis does."""
        parts = [part for part in self._cluster.of(*stages) if part.name not in without]
        free = [part for part in parts if part.name not in self._busy and part.lives]
        part = self._cell.rng.choice(free) if free and "redis" not in self._busy else None
        if part is None:
            yield None
            return
        self._busy.add(part.name)
        try:
            yield part
        finally:
            self._busy.discard(part.name)

    @asynccontextmanager
    async def _redis(self) -> AsyncIterator[int]:
        """Have Redis to oneself, at work where possible; yield how many entries workers have in hand.

        Nothing else begins, and what suffers now is waited for: one that is frozen or starting cannot be looked after
        without Redis.
        """
        self._busy.add("redis")
        try:
            while self._busy != {"redis"}:
                await asyncio.sleep(0.02)
            with suppress(TimeoutError):
                await wait_until(self._cluster.held_by_workers, timeout_s=TRY_FOR_S)
            held = await self._cluster.held_by_workers()
            with self._nemesis.silence() if held else nullcontext():
                yield held
        finally:
            self._busy.discard("redis")

    async def kill_worker(self) -> bool:
        """SIGKILL with work in hand, and a new life."""
        async with self._one_of("encoder", "retriever", "llm", without=self.spared) as part:
            if part is None:
                return False
            if not await self._nemesis.kill(part, spare_idle=True):
                return False
            await self._cluster.until_works(part)
            self.done["kill"] += 1
            return True

    async def kill_gateway(self) -> bool:
        """SIGKILL while clients wait for it, and a new life."""
        async with self._one_of("gateway", without=self.spared) as part:
            if part is None:
                return False
            waiting, url = self._cell.load.waiting, self._cluster.url_of(part)
            with suppress(TimeoutError):
                await wait_until(lambda: waiting[url], timeout_s=TRY_FOR_S)
            held = waiting[url]
            if not held:
                return False
            with self._nemesis.silence():
                await part.kill()
                self._nemesis.note("kill", part.worker, held=held)
                await part.start()
            await wait_until(lambda: self._cluster.listens(part), timeout_s=READY_S)
            self.done["gateway"] += 1
            return True

    async def zombie(self) -> bool:
        """Frozen until others have taken over; one that has lost nothing is none."""
        async with self._one_of("llm", "encoder", without=self._bad) as part:
            if part is None:
                return False
            self._frozen.add(part.name)
            try:
                lost = await self._nemesis.make_zombie(part, 2 * LEASE_S, spare_idle=True)
            finally:
                self._frozen.discard(part.name)
            self.done["zombie"] += lost > 0
            return lost > 0

    async def drain_worker(self) -> bool:
        """SIGTERM under load, and a new life."""
        async with self._one_of("encoder", "retriever", "llm", without=self.spared) as part:
            if part is None:
                return False
            code = await part.stop()
            self._cell.require(f"{part.name} drains with exit code 0, not {code}", code == 0)
            self._nemesis.note("drain", part.worker, held=None)
            await part.start()
            await self._cluster.until_works(part)
            self.done["drain"] += 1
            return True

    async def restart_redis(self) -> bool:
        """SIGKILL, and a new life on the same files."""
        if "redis" in self._busy:
            return False
        async with self._redis() as held:
            if not held:
                return False
            await self._cluster.server.kill()
            self._nemesis.note("redis killed", "redis", held=held)
            await asyncio.sleep(self._cell.rng.uniform(0.0, 2.0))
            await self._cluster.server.start()
        self.done["redis restart"] += 1
        return True

    async def stall_redis(self) -> bool:
        """Frozen for a while, sometimes for longer than a lease."""
        if "redis" in self._busy:
            return False
        async with self._redis() as held:
            if not held:
                return False
            self._cluster.server.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(self._cell.rng.uniform(0.1, 1.3 * LEASE_S))
            finally:
                self._cluster.server.signal(signal.SIGCONT)
            self._nemesis.note("redis stalled", "redis", held=held)
        self.done["redis stall"] += 1
        return True

    async def bad_network(self) -> bool:
        """A slow, dripping, broken, half-open or forgetful connection to Redis or to a replica for a while."""
        rng = self._cell.rng
        free = sorted(self._cluster.proxies.keys() - self._bad - self._frozen)
        if not free or "redis" in self._busy:
            return False
        name = rng.choice(free)
        part, proxy = self._cluster[name], self._cluster.proxies[name]
        kind = rng.choice(NETWORK if part.stage != "replica" else NETWORK_OF_REPLICAS)
        self._bad.add(name)
        victim, repeats = part.worker, 0
        try:
            with self._nemesis.silence() if part.stage == "gateway" else nullcontext():
                if part.stage == "replica" and kind == "cut":
                    repeats = await self._calls_at(part)
                _spoil(proxy, kind)
                repeats += await self._endure(part, victim, rng.uniform(0.5, 1.5 * LEASE_S), proxy)
        finally:
            proxy.heal()
            self._bad.discard(name)
            self._nemesis.note(f"network: {kind}", victim, held=None, repeats=repeats)
        self.done["network"] += 1
        return True

    async def _calls_at(self, replica: Part) -> int:
        with suppress(RedisError):  # killed at this moment
            return int(await self._cluster.redis.zcard(keys.RUNNING + self._cluster.url_of(replica)))
        return 0

    async def _endure(self, part: Part, worker: str, for_s: float, proxy: Proxy) -> int:
        """Let a bad connection last, then heal it; return how many calls its llm worker had in hand without a lease.

        Others may take these over. None of them may be on its last chance, as in `Nemesis.freeze_at_work`: with such
        an entry in hand the connection is healed at once.
        """
        if part.stage not in STAGES:
            await asyncio.sleep(for_s)
            return 0
        in_doubt: set[Holding] = set()
        now_s = time.monotonic
        heals_s, is_bad, has_lease = now_s() + for_s, True, False
        while is_bad or (not has_lease and now_s() < heals_s + LEASE_S):
            with suppress(RedisError):  # killed or stalled at the same time
                held, has_lease = await self._cluster.in_hand(part), await self._cluster.has_lease(part)
                if part.worker != worker or not part.lives:  # killed, or drained, at the same time
                    break
                if not has_lease:
                    in_doubt.update(held)
                if any(one.deliveries >= LAST_CHANCE for one in held):
                    heals_s = min(heals_s, now_s())
            if is_bad and now_s() >= heals_s:
                proxy.heal()
                is_bad = False
            await asyncio.sleep(0.1)
        await asyncio.sleep(max(0.0, heals_s - now_s()))
        return len(in_doubt) if part.stage == "llm" else 0

    def _one_is_well(self) -> bool:
        """Say whether a replica is left that can answer: without any, jobs rightly fail after their last attempt."""
        return any(part.name not in self._busy | self._bad for part in self._cluster.of("replica"))

    async def sick_replica(self) -> bool:
        """A replica that hangs, refuses or answers nonsense for a while; one at least is well meanwhile."""
        async with self._one_of("replica") as part:
            if part is None or not self._one_is_well():
                return False
            await self._cluster.behave(part.name, **self._cell.rng.choice(SICK))
            self._nemesis.note("sick replica", part.worker, held=None)
            await asyncio.sleep(self._cell.rng.uniform(0.5, 4.0))
            await self._cluster.behave(part.name, mode="normal", status=None, fail_rate=0.0)
            self.done["sick replica"] += 1
            return True

    async def kill_replica(self) -> bool:
        """SIGKILL with calls in hand, and a new life; one at least is well meanwhile."""
        async with self._one_of("replica") as part:
            if part is None or not self._one_is_well():
                return False
            with suppress(TimeoutError):
                await wait_until(lambda: self._calls_at(part), timeout_s=TRY_FOR_S)
            held = await self._calls_at(part)
            if not held:
                return False
            await part.kill()
            # What it had answered and written down may not have arrived.
            self._nemesis.note("replica killed", part.worker, held=held, repeats=held)
            await asyncio.sleep(self._cell.rng.uniform(0.0, 2.0))
            await part.start()
            await wait_until(lambda: self._cluster.listens(part), timeout_s=READY_S)
            self.done["replica"] += 1
            return True


def _spoil(proxy: Proxy, kind: str) -> None:
    """Make a connection bad in one of the ways of `NETWORK`."""
    match kind:
        case "slow":
            proxy.slow(0.05, 0.05)
        case "drip":
            proxy.drip(DRIP_BYTES_PER_S)
        case "cut":
            proxy.cut()
        case "freeze":
            proxy.freeze()
        case "half-open":
            proxy.half_open()
        case "lost replies":
            for script in FORGETFUL:
                proxy.lose_replies(script.sha.encode(), times=2)
        case _:
            raise ValueError(f"no connection is bad in this way: {kind}")


EACH_KIND: Final = (
    ("kill",), ("gateway",), ("zombie",), ("redis restart", "redis stall"), ("network",), ("sick replica",),
    ("replica",), ("drain",),
)  # fmt: skip
"""Faults that every run of scenario 20 has at least once; of those in one bracket, one."""
ACCEPTED_AT_LEAST: Final = 0.7


@scenario(20, jobs=3_000, least=1_400, in_slice=1_400)
async def everything_at_once(cell: Cell) -> None:
    """Random combinations of all faults.

    Up to three at a time, with `appendfsync always`, each kind at least once. Clients may hear nothing while Redis or a
    gateway is away, or a gateway's connection is bad, and a few seconds longer; all in all 70 % are accepted.
    """
    cell.may_refuse = {"ClientConnectorError"}  # both gateways may be dead at the same time
    cell.least_accepted = ACCEPTED_AT_LEAST
    layout = Layout(latency="lognormal:0.2,0.7", gateways=2, fsync="always", proxied=PROXIED)
    async with cell.running(layout, QUESTIONS, fields={"timeout_s": LIFE_S}) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs, 60.0))
        chaos = Chaos(cell, cluster, nemesis)
        await chaos.rage(sending.done)
        await sending
        await cluster.until_ready()
    cell.verdict.figures["faults"] = dict(chaos.done)
    for kinds in EACH_KIND:
        cell.require(f"there is a fault of the kind {' or '.join(kinds)}", any(chaos.done[kind] for kind in kinds))
    cell.may_be_unknown = unknown_in_silence(cell.clients, cell.faults)


LONG_RATE: Final = 260.0  # requests per second: what two cores carry beside the clients, the replicas and the restarts
OUTCOMES_LIVE_S: Final = 20
LETTERS: Final = 100
"""Redis keeps outcomes for a while and dead letters up to a count. Both bounds are low here, so that both halves reach
them: then what still grows grows for ever."""

MEASURED_S: Final = 25
LEAST_SAMPLES: Final = 15
SAMPLE_EVERY_S: Final = 0.5
CALM: Final = round((2 * OUTCOMES_LIVE_S + MEASURED_S) * LONG_RATE)
"""Requests at the end of each half of the long run, without faults: until what the last fault has piled up is
forgotten, and for as long as memory is measured."""
GROWS_AT_MOST: Final = 0.02
SPARED: Final = ("encoder-1", "llm-1", "gateway-1")
ALONE: Final = "retriever-1"
ALONE_UNTIL: Final = 0.2
"""Workers that are never killed, and the one that cannot be spared: there is one retriever. It is killed only in this
first share of the requests. So of every stage there is one whose memory is that of one life, from then to the end."""
LONG_JOBS: Final = 206_000
LONG_FAULTS: Final = {"kill": 200, "zombie": 20, "redis restart": 5}
LONG_ACCEPTED: Final = 200_000
"""Of so many requests, so many faults and acceptances at least; of fewer requests, in proportion."""


@scenario(21, jobs=LONG_JOBS, least=3 * CALM, is_long=True)
async def long_run(cell: Cell) -> None:
    """The long run: two equal halves.

    At least 200,000 of its requests are accepted, amid 200 SIGKILLs over all stages, 20 zombies and 5 restarts of Redis
    with `appendfsync always`. Memory of Redis and of every process that lived through both halves differs by at most
    2 % at their ends; of those that were killed in between, whose lives are others, it is at most 2 % more. One encoder
    and one llm worker are never killed, the retriever not after the first fifth.
    """
    environ = {
        "PENSTOCK_LLM__SLOTS": "64",
        "PENSTOCK_WORKER__COMPLETION_TTL_S": f"{OUTCOMES_LIVE_S}",
        "PENSTOCK_DEAD__MAX_LETTERS": f"{LETTERS}",
    }
    layout = Layout(latency="lognormal:0.05,0.5", fsync="always", environ=environ)
    # An edit's Idempotency-Key is kept for a day, 800 bytes that no half sees the end of: few edits, so that memory
    # tells of what should not be kept.
    mix = {"ask": 3, "background": 3, "foreign": 3, "prompt": 1, "edit": 0.005, "consult": 0.1}
    halves: list[dict[str, float]] = []
    lives: list[dict[str, str]] = []
    # again=0: outcomes are kept so briefly here that a sender that repeats itself may rightly get a second job
    async with cell.running(layout, mix, again=0.0) as (cluster, load, nemesis):
        chaos = Chaos(cell, cluster, nemesis, SPARED)
        for half in (1, 2):
            sending = cell.background(load.run(cell.jobs // 2, LONG_RATE))
            await _harm_evenly(cell, chaos, load, half * cell.jobs // 2 - CALM)
            halves.append(await _memory(cell, cluster, sending))
            lives.append({part.name: part.worker for part in cluster.parts.values()})
    growth = {name: round(halves[1][name] / halves[0][name] - 1, 4) for name in halves[0]}
    cell.verdict.figures |= {
        "faults": dict(chaos.done),
        "memory_mib": [_in_mib(half) for half in halves],
        "growth": growth,
    }
    same = {name for name in growth if name == "redis" or lives[0][name] == lives[1][name]}
    cell.verdict.figures["lived through both halves"] = sorted(same)
    cell.require(f"{', '.join((*SPARED, ALONE))} live through both halves", same >= {*SPARED, ALONE})
    strange = {name: by for name, by in growth.items() if by > GROWS_AT_MOST or (name in same and -by > GROWS_AT_MOST)}
    cell.require(f"memory differs by at most {GROWS_AT_MOST:.0%}, but {strange}", not strange)
    _require_counts(cell, chaos)
    cell.may_be_unknown = unknown_in_silence(cell.clients, cell.faults)


def _require_counts(cell: Cell, chaos: Chaos) -> None:
    """Demand as many acceptances, and as many faults of each kind, as the number of requests calls for."""
    share = _harmed_share(cell)
    least = LONG_ACCEPTED * cell.jobs // LONG_JOBS
    accepted = sum(one.is_accepted for one in cell.requests())
    cell.require(f"at least {least} are accepted, not {accepted}", accepted >= least)
    for fault, count in LONG_FAULTS.items():
        least = int(count * share)
        cell.require(f"at least {least} times {fault}, not {chaos.done[fault]}", chaos.done[fault] >= least)
    victims = Counter(line["victim"].partition("-")[0] for line in read(cell.faults) if line.get("fault") == "kill")
    cell.verdict.figures["kills by stage"] = dict(victims)
    cell.require(f"workers of every stage are killed, not {dict(victims)}", all(victims[stage] for stage in STAGES))


def _harmed_share(cell: Cell) -> float:
    """Return how many requests are sent amid faults, of as many as the long run has of these."""
    return (cell.jobs - 2 * CALM) / (LONG_JOBS - 2 * CALM)


async def _harm_evenly(cell: Cell, chaos: Chaos, load: Load, until: int) -> None:
    """Spread one half's share of the faults evenly over its requests; one that was none is tried again."""
    harms = {"kill": chaos.kill_worker, "zombie": chaos.zombie, "redis restart": chaos.restart_redis}
    halves = {fault: math.ceil(count * _harmed_share(cell) / 2) for fault, count in LONG_FAULTS.items()}
    plan = [harm for fault, harm in harms.items() for _ in range(halves[fault])]
    cell.rng.shuffle(plan)
    first = load.sent
    for number, harm in enumerate(plan):
        due = first + (until - first) * number // len(plan)
        while load.sent < due:
            await asyncio.sleep(0.05)
        if load.sent > cell.jobs * ALONE_UNTIL:
            chaos.spared.add(ALONE)
        while not await harm() and load.sent < until:
            await asyncio.sleep(0.05)
    await cell.nemesis.until_recovered()
    while load.sent < until:
        await asyncio.sleep(0.05)


async def _memory(cell: Cell, cluster: Cluster, sending: asyncio.Task[None]) -> dict[str, float]:
    """Return how much memory everybody holds, the mean over the rest of the sending, in bytes.

    Not before what the last fault has piled up is forgotten.
    """
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(sending), 2 * OUTCOMES_LIVE_S)
    sums: Counter[str] = Counter()
    samples = 0
    while not sending.done() or not samples:
        for part in [*cluster.workers, *cluster.of("gateway")]:
            sums[part.name] += part.resident_bytes()
        about = await cluster.redis.info("memory")
        buffers = about["mem_clients_normal"] + about["mem_aof_buffer"]  # of connections and the log: of this instant
        sums["redis"] += about["used_memory"] - buffers
        samples += 1
        await asyncio.sleep(SAMPLE_EVERY_S)
    await sending
    cell.require(f"memory is the mean of at least {LEAST_SAMPLES} looks, not {samples}", samples >= LEAST_SAMPLES)
    return {name: total / samples for name, total in sums.items()}


def _in_mib(sizes: dict[str, float]) -> dict[str, float]:
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}
