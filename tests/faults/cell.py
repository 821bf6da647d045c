"""One cell of the matrix: a scenario run once, from a seed to a verdict.

The order is always the same: start the processes, index a few documents, send requests in open loop while the scenario
does its harm, then a quiet phase in which clients hear the rest, then everything is read and judged. What a scenario
demands beyond the promises that every cell checks, it says with `Cell.require`.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.conftest import PATIENCE_S, wait_until
from tests.faults.checkers import leftovers
from tests.faults.checkers.leftovers import Leftovers
from tests.faults.cluster import LEASE_S, Cluster, Layout
from tests.faults.history import Writer
from tests.faults.judge import Case
from tests.faults.load import EVERYBODY, Load, Mix
from tests.faults.nemesis import Nemesis
from tests.faults.verdict import Verdict

RECOVERY_S: Final = LEASE_S + 2.0
"""Work of a killed worker is in other hands within this time."""
IDLE_WITHIN_S: Final = PATIENCE_S
LIMIT_S: Final = 300.0
LIMIT_PER_JOB_S: Final = 0.2  # four times what the slowest sender takes for one
LONGEST_S: Final = 3600.0
"""How long a cell may take: some minutes, more for many requests, an hour at most. What hangs is red, and ends."""
CALM_WITHIN_S: Final = 300.0
"""Longer than the quiet phase can take while Redis answers."""


SCENARIO_FAILED: Final = "the scenario itself failed"
"""So begins the claim of a cell whose scenario raised: it says nothing about Penstock."""

Sizes = dict[tuple[str, int], int]
"""Bytes of memory, by name and generation of their holder."""


class Cell(Case):
    """What a scenario works with: a case in the making.

    Attributes:
        jobs: how many requests the scenario is to send.
        rng: every choice of the scenario comes from it; the seed is printed. What is sent, and when clients try again,
            comes from streams of their own (`Load`), so that one does not disturb the others.
        cluster, load, nemesis: as long as `running` lasts.
        limit: the time limit of the whole cell.
    """

    cluster: Cluster
    load: Load
    nemesis: Nemesis

    def __init__(
        self, number: int, title: str, seed: int, jobs: int, folder: Path, *, any_machine: bool = False
    ) -> None:
        super().__init__(Verdict(number, title, seed, asked=jobs), folder)
        self.any_machine = any_machine
        self.jobs = jobs
        self.rng = Random(f"{number}:{seed}:nemesis")
        self.limit: asyncio.Timeout | None = None
        self._background: list[asyncio.Task[None]] = []
        self._runs = 0
        self._sent = 0

    @property
    def is_over_time(self) -> bool:
        """Whether the time limit has cancelled the scenario."""
        return self.limit is not None and self.limit.expired()

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
                before = await _sizes(self.cluster)
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
                    self._note_growth(before, await _sizes(self.cluster))
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
        fallen = self.cluster.fallen()
        self.require(f"no process ends by itself, but {', '.join(fallen)}", not fallen)
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

    def _note_growth(self, before: Sizes, after: Sizes) -> None:
        """Note by how much each has grown that is still the same, the most of all runs."""
        grown = self.verdict.grown_mib
        for holder in before.keys() & after.keys():
            mib = round((after[holder] - before[holder]) / 2**20, 1)
            grown[holder[0]] = max(mib, grown.get(holder[0], mib))

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


async def _sizes(cluster: Cluster) -> Sizes:
    """Return how much memory Redis' data takes, and every living process of ours."""
    parts = [part for part in (*cluster.workers, *cluster.of("gateway")) if part.lives]
    sizes = {(part.name, part.generation): part.resident_bytes() for part in parts}
    about = await cluster.redis.info("memory")
    buffers = about["mem_clients_normal"] + about["mem_aof_buffer"]  # of connections and the log: of this instant
    return sizes | {("redis", 0): about["used_memory"] - buffers}


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


async def run(
    number: int, title: str, scenario: Any, seed: int, jobs: int, folder: Path, *, any_machine: bool = False
) -> Verdict:
    """Run one cell; whatever goes wrong in it is part of the verdict."""
    cell = Cell(number, title, seed, jobs, folder, any_machine=any_machine)
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
