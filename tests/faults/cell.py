"""One cell of the matrix: a scenario run once, from a seed to a verdict.

The order is always the same: start the processes, index a few documents, send requests in open loop while the scenario
does its harm, then a quiet phase in which clients hear the rest, then everything is read and judged. What a scenario
demands beyond the promises that every cell checks, it says with `Cell.require`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.conftest import wait_until
from tests.faults.checkers import accounts, calls, fencing, leftovers, order, outcomes
from tests.faults.checkers.calls import Calls
from tests.faults.checkers.leftovers import Leftovers
from tests.faults.checkers.outcomes import Outcomes
from tests.faults.cluster import LEASE_S, Cluster, Layout
from tests.faults.history import Json, Told, Writer, piece_together, read
from tests.faults.load import EVERYBODY, Load, Mix
from tests.faults.nemesis import Nemesis

RECOVERY_S: Final = LEASE_S + 2.0
"""Work of a killed worker is in other hands within this time."""
HIT_SHARE: Final = 0.8
"""A cell counts only where so many of its faults met a process with work in hand."""
IDLE_WITHIN_S: Final = 15.0
REFUSALS: Final = frozenset({"ClientConnectorError", "stopping"})
"""What clients of a gateway that restarts may hear: nobody listens, or it is about to end."""
LIMIT_S: Final = 300.0
LIMIT_PER_JOB_S: Final = 0.2  # four times what the slowest sender takes for one
LONGEST_S: Final = 3600.0
"""How long a cell may take: some minutes, more for many requests, an hour at most. What hangs is red, and ends."""
CALM_WITHIN_S: Final = 300.0
"""Longer than the quiet phase can take while Redis answers."""


SCENARIO_FAILED: Final = "the scenario itself failed"
"""So begins the claim of a cell whose scenario raised: it says nothing about Penstock."""


@dataclass(slots=True)
class Verdict:
    """What one cell showed.

    Attributes:
        lost, unseen, duplicated, wrong, stale, out_of_order: requests, as the clients' and replicas' files tell.
        endings: how requests ended that did not end well, by status and code.
        refusals_by_code: how often clients were refused; the sum may be more than `refused`, since some send again.
        load_left, endless_keys, work_left: keys, as Redis tells when all is quiet.
        faults: how many were injected; aimed: those of an instant (a kill, a freeze), which should meet work in hand;
            hits: those that did; kills: SIGKILLs. A fault that lasts (a bad network, a drain) meets whatever comes.
        recovered_p50_s, recovered_max_s: how long the work of killed or frozen workers lay there; None without any.
        refusals: settles refused as stale, as the processes count.
        calls_repeated: calls that were answered beyond the first for the same job.
        limit_s: how long the cell may take; server: what kept the data, with its version.
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
    endings: dict[str, int] = field(default_factory=dict)
    refusals_by_code: dict[str, int] = field(default_factory=dict)
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
    limit_s: float = 0.0
    server: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @property
    def is_green(self) -> bool:
        """Whether every promise held."""
        return not self.broken

    @property
    def hit_share(self) -> float | None:
        """Share of the aimed faults that met work in hand; None where none was injected."""
        return self.hits / self.aimed if self.aimed else None

    def as_json(self) -> Json:
        """Return all of it."""
        return {**asdict(self), "green": self.is_green}


class Cell:
    """What a scenario works with.

    Attributes:
        jobs: how many requests the scenario is to send.
        rng: every choice of the scenario comes from it; the seed is printed. What is sent, and when clients try again,
            comes from streams of their own (`Load`), so that one does not disturb the others.
        cluster, load, nemesis: as long as `running` lasts.
        recoveries_s: see `Nemesis`.
        clients, faults: the files of the history.
        may_lose: requests whose records a scenario has destroyed: what became of them is reported, not judged.
        may_end: how requests may end, other than completed: `failed/poison`, or a bare status for all its codes.
        may_refuse: codes with which clients may be refused.
        may_be_unknown: how many requests may be unknown to their clients. None: any number when a fault hit Redis or a
            gateway, otherwise none.
        may_repeat: how many calls may be answered once more beyond those that a fault's entries in hand excuse.
        limit: the time limit of the whole cell.
    """

    cluster: Cluster
    load: Load
    nemesis: Nemesis

    def __init__(self, number: int, title: str, seed: int, jobs: int, folder: Path) -> None:
        self.jobs = jobs
        self.rng = Random(f"{number}:{seed}:nemesis")
        self.folder = folder
        self.may_lose: set[int] = set()
        self.may_end: set[str] = set()
        self.may_refuse: set[str] = set(REFUSALS)
        self.may_be_unknown: int | None = None
        self.may_repeat = 0
        self.limit: asyncio.Timeout | None = None
        self.verdict = Verdict(number, title, seed)
        self._background: list[asyncio.Task[None]] = []
        self.recoveries_s: list[float] = []
        self._runs = 0
        self._sent = 0
        self._alive: frozenset[str] = frozenset()
        self.clients = folder / "clients.jsonl"
        self.faults = folder / "faults.jsonl"

    @property
    def is_over_time(self) -> bool:
        """Whether the time limit has cancelled the scenario."""
        return self.limit is not None and self.limit.expired()

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
                self.verdict.server = await self.cluster.server_version()
                seed = f"{self.verdict.number}:{self.verdict.seed}"
                streams = (Random(f"{seed}:load"), Random(f"{seed}:clients"))
                self.load = Load(self.cluster, clients, *streams, mix, first=self._sent, **load)
                self.nemesis = Nemesis(self.cluster, faults, self.recoveries_s)
                await self.load.prepare()
                looking = asyncio.create_task(self.load.look_forever(), name="look")
                try:
                    try:
                        yield self.cluster, self.load, self.nemesis
                    except (Exception, asyncio.CancelledError) as error:
                        if isinstance(error, asyncio.CancelledError) and not self.is_over_time:
                            raise  # somebody wants to go home
                        await self._calm_after_failure()
                        raise
                    await self._calm()
                finally:
                    self._sent = self.load.sent
                    self._require_alive(looking)
                    for task in (looking, *self._background):
                        task.cancel()
                    await asyncio.gather(looking, *self._background, return_exceptions=True)
                    self._background.clear()
                    await self.load.close()

    async def _calm(self) -> None:
        """Let all become quiet, and read what is left then."""
        await self.nemesis.until_recovered()
        await self.load.quiet()
        await self._read_redis()
        self.verdict.refusals += round(await self.cluster.metric("penstock_stale_writes_refused_total"))

    async def _calm_after_failure(self) -> None:
        """Do so after a scenario that failed half-way, so that what it left standing is not taken for lost."""
        if self.is_over_time and (task := asyncio.current_task()) is not None:
            task.uncancel()  # or no time limit within the quiet phase would be told from that of the cell
        elif self.limit is not None:
            self.limit.reschedule(None)  # or what failed would be told as a lack of time
        for work in self._background:
            work.cancel()
        try:
            async with asyncio.timeout(CALM_WITHIN_S):
                await self.cluster.mend()
                await self._calm()
        except Exception as error:  # noqa: BLE001 - the scenario's own failure is what is told first
            self.require(f"all becomes quiet after a failure: {_in_a_line(error)}", False)

    def _require_alive(self, looking: asyncio.Task[None]) -> None:
        """Note what went wrong beside the scenario and that nobody heard of."""
        for task in (looking, *self._background):
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                self.require(f"{task.get_name()} goes on, and does not end with {_in_a_line(error)}", False)

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
        duplicated = sorted({*found.duplicated, *called.doubled})
        verdict.jobs = len(requests)
        verdict.accepted, verdict.refused, verdict.unknown = found.accepted, found.refused, found.unknown
        verdict.by_status = dict(found.by_status)
        verdict.figures["consulted"] = order.told_of_a_page(requests)
        if self.may_lose:
            verdict.figures["destroyed"] = len(self.may_lose.intersection(found.lost))
            verdict.figures["done twice after that"] = len(self.may_lose.intersection(duplicated))
        broken: dict[str, list[Any]] = {
            "lost": [n for n in found.lost if n not in self.may_lose],
            "unseen": [n for n in found.unseen if n not in self.may_lose],
            "duplicated": [n for n in duplicated if n not in self.may_lose],
            "wrong": [*found.wrong, *called.crossed],
            "stale": fencing.check(requests, faults, called.answering),
            "out_of_order": order.check(requests),
        }
        for name, numbers in broken.items():
            setattr(verdict, name, len(numbers))
            self.require(f"{name}: {len(numbers)}, among them requests {numbers[:5]}", not numbers)
        self._judge_endings(found)
        self._judge_accounts(requests, called, faults)
        excused = sum(line["held"] or 0 for line in faults) + self.may_repeat
        verdict.calls_repeated = called.repeated
        self.require(f"at most {excused} calls are made again, not {called.repeated}", called.repeated <= excused)
        aimed = [line for line in faults if line["held"] is not None]
        verdict.faults, verdict.aimed, verdict.hits = len(faults), len(aimed), sum(line["held"] > 0 for line in aimed)
        verdict.kills = sum(line["fault"] == "kill" for line in faults)
        enough = verdict.hit_share is None or verdict.hit_share >= HIT_SHARE
        self.require(f"{verdict.hits} of {verdict.aimed} faults met work in hand", enough)
        if self.recoveries_s:
            verdict.recovered_p50_s = round(statistics.median(self.recoveries_s), 3)
            verdict.recovered_max_s = round(max(self.recoveries_s), 3)
        return verdict

    def _judge_endings(self, found: Outcomes) -> None:
        """Demand that what was accepted was completed, and that every outcome was read twice."""
        endings = {word: [n for n in numbers if n not in self.may_lose] for word, numbers in found.endings.items()}
        self.verdict.endings = {word: len(numbers) for word, numbers in found.endings.items()}
        ill = {
            word: len(numbers)
            for word, numbers in endings.items()
            if numbers and not self.may_end & {word, word.partition("/")[0]}
        }
        self.require(f"ended otherwise than well: {ill}", not ill)
        once = [n for n in found.once if n not in self.may_lose]
        self.require(f"read only once: {len(once)}, among them requests {once[:5]}", not once)

    def _judge_accounts(self, requests: Sequence[Told], called: Calls, faults: Sequence[Json]) -> None:
        """Demand that every client was told something, and something that may be told."""
        told = accounts.check(requests)
        self.verdict.refusals_by_code = dict(told.refusals)
        self.require(f"told nothing: {len(told.silent)}, among them requests {told.silent[:5]}", not told.silent)
        self.require(f"clients crashed: {len(told.crashed)}, among them {told.crashed[:3]}", not told.crashed)
        strange = {code: count for code, count in told.refusals.items() if code not in self.may_refuse}
        self.require(f"refused for no good reason: {strange}", not strange)
        unbidden = called.unbidden
        self.require(f"refused, and called for: {len(unbidden)}, among them requests {unbidden[:5]}", not unbidden)
        most, unknown = self.may_be_unknown, self.verdict.unknown
        if most is None and not any(_can_hide_an_answer(line) for line in faults):
            most = 0
        self.require(f"at most {most} requests are unknown, not {unknown}", most is None or unknown <= most)


def _can_hide_an_answer(fault: Json) -> bool:
    return str(fault["victim"]).startswith(("redis", "gateway"))


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


async def run(number: int, title: str, scenario: Any, seed: int, jobs: int, folder: Path) -> Verdict:
    """Run one cell; whatever goes wrong in it is part of the verdict."""
    cell = Cell(number, title, seed, jobs, folder)
    began_s = time.monotonic()
    cell.verdict.limit_s = min(LONGEST_S, LIMIT_S + jobs * LIMIT_PER_JOB_S)
    try:
        async with asyncio.timeout(cell.verdict.limit_s) as limit:
            cell.limit = limit
            await scenario(cell)
    except Exception as error:  # noqa: BLE001 - the outermost edge of a scenario: the verdict tells
        (folder / "scenario.txt").write_text(traceback.format_exc())
        told = f"it took more than {cell.verdict.limit_s:g} s" if cell.is_over_time else _in_a_line(error)
        cell.require(f"{SCENARIO_FAILED}: {told}", False)
    verdict = cell.judge()
    verdict.seconds = round(time.monotonic() - began_s, 1)
    return verdict
