"""Who does the harm: kills and freezes processes, preferably with work in hand, and writes down what was hit.

A process is frozen for the instant in which Redis is asked what it holds, and only then killed: so it is known whether
a fault met work, and which. Every fault is one line in the history; so is each recovery.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from redis.exceptions import RedisError

from pipeline.settings import RedisSettings, WorkerSettings
from tests.faults.cluster import DELIVERY, Cluster, Holding, Part
from tests.faults.history import Writer, piece_together, read

TRY_FOR_S: Final = 3.0
"""How long a moment with work in hand is waited for; then the fault is injected all the same, and counts as a miss,
unless the caller would rather harm somebody else."""
WATCH_EVERY_S: Final = 0.02
WATCH_FOR_S: Final = 60.0

LAST_CHANCE: Final = WorkerSettings().max_deliveries
"""Deliveries of an entry after which the next death of a holder buries it as poison, rightly: never harm that one."""

HEARD_AFTER_S: Final = RedisSettings().reply_timeout_s + 1.0
"""So long after a silence a client may still be told that nothing is known: a lost reply is waited for."""


def unknown_in_silence(clients: Path, faults: Path) -> int:
    """Return how many requests stayed unknown to their clients, each told so during a silence or shortly after it."""
    silences = [(line["from_s"], line["to_s"] + HEARD_AFTER_S) for line in read(faults) if line["event"] == "silence"]
    told_s: dict[int, list[float]] = {}
    for line in read(clients):
        if line["event"] == "unknown":
            told_s.setdefault(line["n"], []).append(line["at_s"])
    doubtful = [one.n for one in piece_together(clients) if one.is_doubtful]
    return sum(
        n in told_s and all(any(from_s <= at_s <= to_s for from_s, to_s in silences) for at_s in told_s[n])
        for n in doubtful
    )


@contextmanager
def _thawed_on_error(part: Part) -> Iterator[None]:
    """Leave nobody frozen because something else went wrong."""
    try:
        yield
    except BaseException:
        if part.lives:
            part.signal(signal.SIGCONT)
        raise


class Nemesis:
    """Injects faults into one cluster.

    Attributes:
        recoveries_s: for every entry in the hands of a killed worker, or of one that was frozen for long enough, how
            long until it was in other hands, or done; without those whose holder before had died, too.
    """

    def __init__(self, cluster: Cluster, writer: Writer, recoveries_s: list[float]) -> None:
        self.recoveries_s = recoveries_s
        self._cluster = cluster
        self._writer = writer
        self._watchers: set[asyncio.Task[None]] = set()

    def note(self, fault: str, victim: str, *, held: int | None, repeats: int = 0, **more: object) -> None:
        """Write down a fault.

        Args:
            held: how much work it met; None for one that lasts and meets whatever comes.
            repeats: how many calls may be made again because of it: those whose llm worker died or was without its
                lease, and those whose connection to the replica was cut.
        """
        self._writer.write("fault", fault=fault, victim=victim, held=held, repeats=repeats, **more)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Note a time in which clients may hear nothing: Redis or a gateway is away, or badly connected."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._writer.write("silence", from_s=began_s, to_s=time.monotonic())

    async def freeze_at_work(self, part: Part, least: int = 1) -> list[Holding]:
        """Freeze a worker (SIGSTOP) when it has at least so many entries in hand; return them. It stays frozen.

        None of them is on its last chance: what is taken for poison after that would be so for no fault of its own.
        """
        give_up_s = time.monotonic() + TRY_FOR_S
        while True:
            part.signal(signal.SIGSTOP)
            with _thawed_on_error(part):
                held = await self._cluster.in_hand(part)
            enough = len(held) >= least or time.monotonic() > give_up_s
            if enough and all(one.deliveries < LAST_CHANCE for one in held):
                return held
            part.signal(signal.SIGCONT)
            await asyncio.sleep(0.003)

    async def kill(
        self, part: Part, *, least: int = 1, again_after_s: float | None = 0.1, spare_idle: bool = False
    ) -> bool:
        """Kill a worker with work in hand (SIGKILL), watch what becomes of that, and start it again after a while.

        Args:
            least: entries that it should have in hand.
            again_after_s: None leaves it dead.
            spare_idle: let it live when nothing came into its hands; then the answer is False.
        """
        held = await self.freeze_at_work(part, least)
        if spare_idle and not held:
            part.signal(signal.SIGCONT)
            return False
        with _thawed_on_error(part):
            begun = await self._begun(part, held)
        dead = part.worker
        await part.kill()
        self.note("kill", dead, held=len(held), repeats=len(held) if part.stage == "llm" else 0, **begun)
        self.watch(held, dead)
        if again_after_s is not None:
            await asyncio.sleep(again_after_s)
            await part.start()
        return True

    async def make_zombie(self, part: Part, for_s: float, least: int = 1, *, spare_idle: bool = False) -> int:
        """Freeze a worker at work for *for_s*, let others take over, thaw it; return how many entries it had lost.

        Args:
            spare_idle: leave it in peace when nothing came into its hands.
        """
        held = await self.freeze_at_work(part, least)
        if spare_idle and not held:
            part.signal(signal.SIGCONT)
            return 0
        with _thawed_on_error(part):
            frozen_s = time.monotonic()
            id_of = await self._cluster.job_ids(held)  # now: before its heir can have settled it
            begun = await self._begun(part, held)
            watching = self.watch(held, part.worker)
            await asyncio.sleep(for_s)
            watching.cancel()  # what nobody took is its own again, and may take as long as the work does
            lost = await self._cluster.lost(held, part)
            looked_s = time.time()  # by the wall clock, as the replicas' records are
        part.signal(signal.SIGCONT)
        self.note(
            "zombie",
            part.worker,
            held=len(held),
            lost=len(lost),
            repeats=len(lost) if part.stage == "llm" else 0,  # its calls go on, and its heir makes them again
            ids=[id_of[one] for one in lost if one in id_of],
            looked_s=looked_s,
            frozen_s=round(time.monotonic() - frozen_s, 3),
            **begun,
        )
        return len(lost)

    async def _begun(self, part: Part, held: Sequence[Holding]) -> dict[str, list[str]]:
        """Return what a fault of a delivery worker tells besides: which of its messages are on their way."""
        return {"begun": await self._cluster.begun(held)} if part.stage == DELIVERY else {}

    def watch(self, held: Sequence[Holding], dead: str) -> asyncio.Task[None]:
        """Measure from now on how long these entries stay in the hands of *dead*; cancel it when that one lives on."""
        task = asyncio.create_task(self._watch(held, dead), name=dead)
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)
        return task

    async def _watch(self, held: Sequence[Holding], dead: str) -> None:
        began_s = time.monotonic()
        left = [one for one in held if one.deliveries == 1]  # others are suspects: one at a time, they take their time
        if len(left) < len(held):
            self._writer.write("suspects", victim=dead, entries=len(held) - len(left))
        while left:
            try:
                still = [one for one in left if await self._cluster.owner(one.stream, one.entry_id) == dead]
            except RedisError:  # away at the same time: this is no longer about one worker
                return
            since_s = time.monotonic() - began_s
            given_up = since_s > WATCH_FOR_S
            recovered = len(left) - (0 if given_up else len(still))
            if recovered:
                self.recoveries_s += [since_s] * recovered
                self._writer.write("recovered", victim=dead, entries=recovered, after_s=round(since_s, 3))
            if given_up:
                return
            left = still
            await asyncio.sleep(WATCH_EVERY_S)

    async def until_recovered(self, stage: str = "") -> None:
        """Wait until nothing lies in the hands of killed workers of a stage, or of any, any more."""
        if watchers := [watcher for watcher in self._watchers if watcher.get_name().startswith(stage)]:
            await asyncio.wait(watchers)
