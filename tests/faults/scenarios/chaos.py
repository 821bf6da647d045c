"""Faults of every kind, several at a time, drawn from a printed seed; and the long run."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from redis.exceptions import RedisError

from pipeline import keys, scripts
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import LEASE_S, READY_S, STAGES, Cluster, Layout, Part
from tests.faults.history import read
from tests.faults.load import Load
from tests.faults.nemesis import Nemesis
from tests.faults.scenarios import scenario

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
FORGETFUL: Final = (scripts.SUBMIT, scripts.SETTLE, scripts.CLAIM, scripts.RENEW, scripts.TAKE, scripts.PLACE)
"""Scripts whose replies a forgetful network loses."""


class Chaos:
    """Draws faults. No process suffers two at a time: what is frozen cannot be asked what it holds.

    Nor does a connection, which may be bad while its process suffers something else: whoever heals a proxy heals all.
    """

    def __init__(self, cell: Cell, cluster: Cluster, nemesis: Nemesis) -> None:
        self.done: Counter[str] = Counter()
        self._cell = cell
        self._cluster = cluster
        self._nemesis = nemesis
        self._busy: set[str] = set()
        self._bad: set[str] = set()  # proxies with a fault

    async def rage(self, until: Callable[[], bool]) -> None:
        """Begin one fault after another, a few at the same time, until told to stop; then let the last ones end."""
        harms: dict[Callable[[], Awaitable[None]], int] = {
            self.kill_worker: 6, self.kill_gateway: 1, self.zombie: 2, self.restart_redis: 1, self.stall_redis: 1,
            self.bad_network: 4, self.sick_replica: 2, self.kill_replica: 1, self.drain_worker: 1,
        }  # fmt: skip
        rng = self._cell.rng
        raging: set[asyncio.Task[None]] = set()
        while not until():
            if len(raging) < AT_ONCE:
                harm = rng.choices(list(harms), list(harms.values()))[0]
                raging.add(asyncio.ensure_future(harm()))
            await asyncio.sleep(rng.uniform(*PAUSE_S))
            for task in [task for task in raging if task.done()]:
                raging.discard(task)
                task.result()
        await asyncio.gather(*raging)

    @asynccontextmanager
    async def _one_of(self, *stages: str) -> AsyncIterator[Part | None]:
        """Have a process of some stages to oneself; None when all of them suffer already, or Redis does."""
        free = [part for part in self._cluster.of(*stages) if part.name not in self._busy and part.lives]
        part = self._cell.rng.choice(free) if free and "redis" not in self._busy else None
        if part is None:
            yield None
            return
        self._busy.add(part.name)
        try:
            yield part
        finally:
            self._busy.discard(part.name)

    async def kill_worker(self) -> None:
        """SIGKILL with work in hand, and a new life."""
        async with self._one_of("encoder", "retriever", "llm") as part:
            if part is not None:
                await self._nemesis.kill(part)
                await self._cluster.until_works(part)
                self.done["kill"] += 1

    async def kill_gateway(self) -> None:
        """SIGKILL, and a new life."""
        async with self._one_of("gateway") as part:
            if part is not None:
                held = len(self._cell.load.open)
                await part.kill()
                self._nemesis.note("kill", part.worker, held=held)
                await part.start()
                await asyncio.sleep(2.0)
                self.done["kill"] += 1

    async def zombie(self) -> None:
        """Frozen until others have taken over."""
        async with self._one_of("llm", "encoder") as part:
            if part is not None:
                lost = await self._nemesis.make_zombie(part, 2 * LEASE_S)
                self._cell.may_repeat += lost  # a call goes on while its worker is frozen, and the heir makes it again
                self.done["zombie"] += 1

    async def drain_worker(self) -> None:
        """SIGTERM under load, and a new life."""
        async with self._one_of("encoder", "retriever", "llm") as part:
            if part is not None:
                code = await part.stop()
                self._cell.require(f"{part.name} drains with exit code 0, not {code}", code == 0)
                self._nemesis.note("drain", part.worker, held=None)
                await part.start()
                await self._cluster.until_works(part)
                self.done["drain"] += 1

    async def restart_redis(self) -> None:
        """SIGKILL, and a new life on the same files."""
        if self._busy:
            return  # one that is frozen or starting cannot be looked after without Redis
        self._busy.add("redis")
        try:
            held = await self._cluster.live_jobs()
            await self._cluster.server.kill()
            self._nemesis.note("redis killed", "redis", held=held)
            await asyncio.sleep(self._cell.rng.uniform(0.0, 2.0))
            await self._cluster.server.start()
            self.done["redis restart"] += 1
        finally:
            self._busy.discard("redis")

    async def stall_redis(self) -> None:
        """Frozen for a while, sometimes for longer than a lease."""
        if self._busy:
            return
        self._busy.add("redis")
        try:
            held = await self._cluster.live_jobs()
            self._cluster.server.signal(signal.SIGSTOP)
            await asyncio.sleep(self._cell.rng.uniform(0.1, 1.3 * LEASE_S))
            self._cluster.server.signal(signal.SIGCONT)
            self._nemesis.note("redis stalled", "redis", held=held)
            self.done["redis stall"] += 1
        finally:
            self._busy.discard("redis")

    async def bad_network(self) -> None:
        """A slow, dripping, broken, half-open or forgetful connection to Redis or to a replica for a while."""
        rng = self._cell.rng
        free = sorted(self._cluster.proxies.keys() - self._bad)
        if not free or "redis" in self._busy:
            return
        name = rng.choice(free)
        part, proxy = self._cluster[name], self._cluster.proxies[name]
        kinds = NETWORK if part.stage != "replica" else NETWORK_OF_REPLICAS
        kind = rng.choice(kinds)
        self._bad.add(name)
        try:
            self._cell.may_repeat += await self._may_repeat(part, kind)
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
            self._nemesis.note(f"network: {kind}", part.worker, held=None)
            await asyncio.sleep(rng.uniform(0.5, 1.5 * LEASE_S))
        finally:
            proxy.heal()
            self._bad.discard(name)
        self.done["network"] += 1

    async def _may_repeat(self, part: Part, kind: str) -> int:
        """Return how many calls may be made again for a bad connection: their worker, or their answer, is lost."""
        with suppress(RedisError):  # killed at this moment
            if part.stage == "replica" and kind == "cut":
                return int(await self._cluster.redis.zcard(keys.RUNNING + self._cluster.url_of(part)))
            if part.stage == "llm" and kind in {"drip", "freeze", "half-open"}:
                return len(await self._cluster.in_hand(part))
        return 0

    def _one_is_well(self) -> bool:
        """Say whether a replica is left that can answer: without any, jobs rightly fail after their last attempt."""
        return any(part.name not in self._busy | self._bad for part in self._cluster.of("replica"))

    async def sick_replica(self) -> None:
        """A replica that hangs, refuses or answers nonsense for a while; one at least is well meanwhile."""
        async with self._one_of("replica") as part:
            if part is not None and self._one_is_well():
                await self._cluster.behave(part.name, **self._cell.rng.choice(SICK))
                self._nemesis.note("sick replica", part.name, held=None)
                await asyncio.sleep(self._cell.rng.uniform(0.5, 4.0))
                await self._cluster.behave(part.name, mode="normal", status=None, fail_rate=0.0)
                self.done["sick replica"] += 1

    async def kill_replica(self) -> None:
        """SIGKILL with calls in hand, and a new life; one at least is well meanwhile."""
        async with self._one_of("replica") as part:
            if part is not None and self._one_is_well():
                held = await self._cluster.redis.zcard(keys.RUNNING + self._cluster.url_of(part))
                await part.kill()
                self._nemesis.note("replica killed", part.name, held=held)
                await asyncio.sleep(self._cell.rng.uniform(0.0, 2.0))
                await part.start()
                await wait_until(lambda: self._cluster.listens(part), timeout_s=READY_S)
                self.done["replica"] += 1


@scenario(20, jobs=3_000, in_slice=1_400)
async def everything_at_once(cell: Cell) -> None:
    """Random combinations of all faults.

    Up to three at a time, with `appendfsync always`.
    """
    cell.may_end = {"failed/poison"}  # kills are drawn at random: one entry may see three of its holders die
    cell.may_refuse = {"ClientConnectorError"}  # both gateways may be dead at the same time
    cell.may_be_unknown = None  # Redis and gateways are away at any time
    layout = Layout(latency="lognormal:0.2,0.7", gateways=2, fsync="always", proxied=PROXIED)
    async with cell.running(layout, fields={"timeout_s": LIFE_S}) as (cluster, load, nemesis):
        sending = cell.background(load.run(cell.jobs, 60.0))
        chaos = Chaos(cell, cluster, nemesis)
        await chaos.rage(sending.done)
        await sending
        await cluster.until_ready()
    cell.verdict.figures["faults"] = dict(chaos.done)


LONG_RATE: Final = 260.0  # requests per second: what two cores carry beside the clients, the replicas and the restarts
CALM_SHARE: Final = 0.15
"""Of each half of the long run: its end, without faults, in which memory is measured."""
OUTCOMES_LIVE_S: Final = 20
LETTERS: Final = 100
"""Redis keeps outcomes for a while and dead letters up to a count. Both bounds are low here, so that both halves reach
them: then what still grows grows for ever."""

LONG_JOBS: Final = 206_000
LONG_FAULTS: Final = {"kill": 200, "zombie": 20, "redis restart": 5}
LONG_ACCEPTED: Final = 200_000
"""Of so many requests, so many faults and acceptances at least; of fewer requests, in proportion."""


@scenario(21, jobs=LONG_JOBS, is_long=True)
async def long_run(cell: Cell) -> None:
    """The long run: two equal halves.

    At least 200,000 of its requests are accepted, amid 200 SIGKILLs over all stages, 20 zombies and 5 restarts of Redis
    with `appendfsync always`. Memory of Redis and of every process at the end of each half differs by at most 2 %.
    """
    cell.may_be_unknown = None  # as many as fall into Redis' absences: how many are accepted is demanded below
    environ = {
        "PENSTOCK_LLM__SLOTS": "64",
        "PENSTOCK_WORKER__COMPLETION_TTL_S": f"{OUTCOMES_LIVE_S}",
        "PENSTOCK_DEAD__MAX_LETTERS": f"{LETTERS}",
    }
    layout = Layout(latency="lognormal:0.05,0.5", fsync="always", environ=environ)
    mix = {"ask": 3, "background": 3, "foreign": 3, "prompt": 1, "edit": 0.05, "consult": 0.1}
    halves: list[dict[str, float]] = []
    async with cell.running(layout, mix, again=0.02) as (cluster, load, nemesis):
        chaos = Chaos(cell, cluster, nemesis)
        for half in (1, 2):
            sending = cell.background(load.run(cell.jobs // 2, LONG_RATE))
            ends = int(cell.jobs * (half / 2 - CALM_SHARE / 2))
            await _harm_evenly(cell, chaos, load, half, ends)
            halves.append(await _memory(cluster, sending))
    growth = {name: round(halves[1][name] / halves[0][name] - 1, 4) for name in halves[0]}
    cell.verdict.figures |= {
        "faults": dict(chaos.done),
        "memory_mib": [_in_mib(half) for half in halves],
        "growth": growth,
    }
    cell.require(f"memory grows by at most 2 %: {growth}", max(growth.values()) <= 0.02)
    _require_counts(cell, chaos)


def _require_counts(cell: Cell, chaos: Chaos) -> None:
    """Demand as many acceptances, and as many faults of each kind, as the number of requests calls for."""
    least = LONG_ACCEPTED * cell.jobs // LONG_JOBS
    accepted = sum(one.is_accepted for one in cell.requests())
    cell.require(f"at least {least} are accepted, not {accepted}", accepted >= least)
    for fault, count in LONG_FAULTS.items():
        least = count * cell.jobs // LONG_JOBS
        cell.require(f"at least {least} times {fault}, not {chaos.done[fault]}", chaos.done[fault] >= least)
    victims = Counter(line["victim"].partition("-")[0] for line in read(cell.faults) if line.get("fault") == "kill")
    cell.verdict.figures["kills by stage"] = dict(victims)
    cell.require(f"workers of every stage are killed, not {dict(victims)}", all(victims[stage] for stage in STAGES))


async def _harm_evenly(cell: Cell, chaos: Chaos, load: Load, half: int, until: int) -> None:
    """Spread this half's share of the faults evenly over its requests."""
    plan = [
        *[chaos.kill_worker] * (cell.jobs // 2_000 + 1),
        *[chaos.zombie] * (cell.jobs // 20_000 + 1),
        *[chaos.restart_redis] * (cell.jobs // 80_000 + 1),
    ]
    cell.rng.shuffle(plan)
    first = load.sent
    for number, harm in enumerate(plan):
        due = first + (until - first) * number // len(plan)
        while load.sent < due:
            await asyncio.sleep(0.05)
        await harm()
    await cell.nemesis.until_recovered()
    while load.sent < until:
        await asyncio.sleep(0.05)


async def _memory(cluster: Cluster, sending: asyncio.Task[None]) -> dict[str, float]:
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
        await asyncio.sleep(0.5)
    await sending
    return {name: total / samples for name, total in sums.items()}


def _in_mib(sizes: dict[str, float]) -> dict[str, float]:
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}
