"""One cell of the matrix: a scenario run once, from a seed to a verdict.

The order is always the same: start the processes, index a few documents, send requests in open loop while the scenario
does its harm, then a quiet phase in which clients hear the rest, then everything is read and judged. What a scenario
demands beyond the promises that every cell checks, it says with `Cell.require`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.conftest import wait_until
from tests.faults.checkers import calls, fencing, leftovers, order, outcomes
from tests.faults.checkers.calls import Calls
from tests.faults.checkers.leftovers import Leftovers
from tests.faults.cluster import LEASE_S, Cluster, Layout
from tests.faults.history import Json, Told, Writer, piece_together, read
from tests.faults.load import EVERYBODY, Load, Mix
from tests.faults.nemesis import Nemesis

RECOVERY_S: Final = LEASE_S + 2.0
"""Work of a killed worker is in other hands within this time."""
HIT_SHARE: Final = 0.8
"""A cell counts only where so many of its faults met a process with work in hand."""
IDLE_WITHIN_S: Final = 15.0


@dataclass(slots=True)
class Verdict:
    """What one cell showed.

    Attributes:
        lost, unseen, duplicated, wrong, stale, out_of_order: requests, as the clients' files tell.
        load_left, endless_keys, work_left: keys, as Redis tells when all is quiet.
        faults: how many were injected; aimed: those of an instant (a kill, a freeze), which should meet work in hand;
            hits: those that did; kills: SIGKILLs. A fault that lasts (a bad network, a drain) meets whatever comes.
        recovered_p50_s, recovered_max_s: how long the work of killed or frozen workers lay there; None without any.
        refusals: settles refused as stale, as the processes count.
        figures: what else a scenario has measured.
        broken: what was promised and did not hold; empty when the cell is green.
    """

    number: int
    title: str
    seed: int
    jobs: int = 0
    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    unseen: int = 0
    duplicated: int = 0
    wrong: int = 0
    stale: int = 0
    out_of_order: int = 0
    load_left: int = 0
    endless_keys: int = 0
    work_left: int = 0
    faults: int = 0
    aimed: int = 0
    hits: int = 0
    kills: int = 0
    recovered_p50_s: float | None = None
    recovered_max_s: float | None = None
    refusals: int = 0
    calls_repeated: int = 0
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @property
    def is_green(self) -> bool:
        """Whether every promise held."""
        return not self.broken

    @property
    def hit_share(self) -> float:
        """Share of the aimed faults that met work in hand; 1 where none was injected."""
        return self.hits / self.aimed if self.aimed else 1.0

    def as_json(self) -> Json:
        """Return all of it."""
        return {**asdict(self), "green": self.is_green}


class Cell:
    """What a scenario works with.

    Attributes:
        jobs: how many requests the scenario is to send.
        rng: every choice of the scenario comes from it; the seed is printed.
        cluster, load, nemesis: as long as `running` lasts.
        recoveries_s: see `Nemesis`.
        clients, faults: the files of the history.
        may_lose: requests whose records a scenario has destroyed: what became of them is reported, not judged.
        may_end, may_refuse: outcomes other than completed, and refusals, that a scenario brings about.
        may_repeat: calls that may be answered more than once beyond what kills explain.
        may_be_unknown: requests whose clients may hear nothing; None for any number.
    """

    cluster: Cluster
    load: Load
    nemesis: Nemesis

    def __init__(self, number: int, title: str, seed: int, jobs: int, folder: Path) -> None:
        self.jobs = jobs
        self.rng = Random(f"{number}:{seed}")
        self.folder = folder
        self.may_lose: set[int] = set()
        self.may_end: set[str] = set()
        self.may_refuse: set[str] = set()
        self.may_repeat = 0
        self.may_be_unknown: int | None = None
        self.verdict = Verdict(number, title, seed)
        self._background: list[asyncio.Task[None]] = []
        self.recoveries_s: list[float] = []
        self._runs = 0
        self._sent = 0
        self._alive: frozenset[str] = frozenset()
        self.clients = folder / "clients.jsonl"
        self.faults = folder / "faults.jsonl"

    def require(self, claim: str, held: bool) -> None:
        """Note a promise of this scenario that does not hold."""
        if not held:
            self.verdict.broken.append(claim)

    def require_recovery(self, within_s: float) -> None:
        """Demand that the work of killed workers was in other hands in time."""
        slowest_s = max(self.recoveries_s, default=0.0)
        self.require(f"recovered within {within_s:g} s, not {slowest_s:.2f}", slowest_s <= within_s)

    def requests(self) -> list[Told]:
        """Return what the clients know so far."""
        return piece_together(self.clients)

    def statuses(self) -> Counter[str]:
        """Return how many requests ended how, as the clients first heard it."""
        return Counter(told.outcomes[0]["status"] for told in self.requests() if told.outcomes)

    def calls(self) -> Calls:
        """Return what the replicas have written down so far."""
        return calls.check(self.requests(), sorted(self.folder.glob("run-*/replica-*.jsonl")))

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the scenario, at most as long as it; await it before the scenario ends."""
        task = asyncio.create_task(work)
        self._background.append(task)
        return task

    @asynccontextmanager
    async def running(
        self, layout: Layout | None = None, mix: Mix = EVERYBODY, **load: Any
    ) -> AsyncIterator[tuple[Cluster, Load, Nemesis]]:
        """Have a cluster, its clients and its nemesis; on leaving all becomes quiet, and what is left is read.

        A scenario may do so again: another cluster, the same files of clients and faults, requests numbered on.
        """
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        folder.mkdir()
        with Writer(self.clients) as clients, Writer(self.faults) as faults:
            async with Cluster(folder, layout or Layout()) as self.cluster:
                self.load = Load(self.cluster, clients, self.rng, mix, first=self._sent, **load)
                self.nemesis = Nemesis(self.cluster, faults, self.recoveries_s)
                await self.load.prepare()
                looking = asyncio.create_task(self.load.look_forever(), name="look")
                try:
                    yield self.cluster, self.load, self.nemesis
                    await self.nemesis.until_recovered()
                    await self.load.quiet()
                    await self._read_redis()
                    self.verdict.refusals += round(await self.cluster.metric("penstock_stale_writes_refused_total"))
                finally:
                    self._sent = self.load.sent
                    for task in (looking, *self._background):
                        task.cancel()
                    await asyncio.gather(looking, *self._background, return_exceptions=True)
                    await self.load.close()

    async def _read_redis(self) -> None:
        left = Leftovers([], [], [])

        async def is_idle() -> bool:
            nonlocal left
            left = await leftovers.check(self.cluster.redis)
            return not left

        try:
            await wait_until(is_idle, timeout_s=IDLE_WITHIN_S, every_s=0.25)
        except TimeoutError:
            for claim, names in asdict(left).items():
                self.require(f"{claim} is left: {', '.join(names[:5])}", not names)
        self.verdict.load_left += len(left.load)
        self.verdict.endless_keys += len(left.endless)
        self.verdict.work_left += len(left.work)
        self._alive |= frozenset(
            [job_id for job_id in self.load.open if await self.cluster.redis.exists(f"live:{job_id}")]
        )

    def judge(self) -> Verdict:
        """Read the files and give the verdict."""
        verdict = self.verdict
        requests, called = self.requests(), self.calls()
        faults = [line for line in read(self.faults) if "held" in line]
        found = outcomes.check(requests, self._alive)
        verdict.jobs = len(requests)
        verdict.accepted, verdict.refused, verdict.unknown = found.accepted, found.refused, found.unknown
        verdict.by_status = dict(found.by_status)
        if self.may_lose:
            verdict.figures["destroyed"] = len(self.may_lose.intersection(found.lost))
            verdict.figures["done twice after that"] = len(self.may_lose.intersection(found.duplicated))
        broken: dict[str, list[Any]] = {
            "lost": [n for n in found.lost if n not in self.may_lose],
            "unseen": [n for n in found.unseen if n not in self.may_lose],
            "duplicated": [n for n in found.duplicated if n not in self.may_lose],
            "wrong": [*found.wrong, *called.crossed],
            "stale": fencing.check(requests, faults),
            "out_of_order": order.check(requests),
        }
        for name, numbers in broken.items():
            setattr(verdict, name, len(numbers))
            self.require(f"{name}: {len(numbers)}, among them requests {numbers[:5]}", not numbers)
        verdict.calls_repeated = called.repeated
        aimed = [line for line in faults if line["held"] is not None]
        verdict.faults, verdict.aimed, verdict.hits = len(faults), len(aimed), sum(line["held"] > 0 for line in aimed)
        verdict.kills = sum(line["fault"] == "kill" for line in faults)
        self.require(f"{verdict.hits} of {verdict.aimed} faults met work in hand", verdict.hit_share >= HIT_SHARE)
        if self.recoveries_s:
            verdict.recovered_p50_s = round(statistics.median(self.recoveries_s), 3)
            verdict.recovered_max_s = round(max(self.recoveries_s), 3)
        return verdict


async def run(number: int, title: str, scenario: Any, seed: int, jobs: int, folder: Path) -> Verdict:
    """Run one cell; whatever goes wrong in it is part of the verdict."""
    cell = Cell(number, title, seed, jobs, folder)
    began_s = time.monotonic()
    try:
        await scenario(cell)
    except Exception as error:  # noqa: BLE001 - the outermost edge of a scenario: the verdict tells
        cell.require(f"the scenario itself failed: {type(error).__name__}: {error}", False)
    verdict = cell.judge()
    verdict.seconds = round(time.monotonic() - began_s, 1)
    return verdict
