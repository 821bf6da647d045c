"""Who does the harm: kills and freezes processes, preferably with work in hand, and writes down what was hit.

A process is frozen for the instant in which Redis is asked what it holds, and only then killed: so it is known whether
a fault met work, and which. Every fault is one line in the history; so is each recovery.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from redis.exceptions import RedisError

from tests.faults.cluster import Cluster, Part
from tests.faults.history import Writer

TRY_FOR_S: Final = 3.0
"""How long a moment with work in hand is waited for; then the fault is injected all the same, and counts as a miss."""
WATCH_EVERY_S: Final = 0.02
WATCH_FOR_S: Final = 60.0

Held = list[tuple[str, bytes]]


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
        recoveries_s: for every entry in the hands of a killed worker, unless its holder before had died, too: how long
            until it was in other hands, or done.
    """

    def __init__(self, cluster: Cluster, writer: Writer, recoveries_s: list[float]) -> None:
        self.recoveries_s = recoveries_s
        self._cluster = cluster
        self._writer = writer
        self._watchers: set[asyncio.Task[None]] = set()

    def note(self, fault: str, victim: str, *, held: int | None, **more: object) -> None:
        """Write down a fault; *held* is how much work it met, None for one that lasts and meets whatever comes."""
        self._writer.write("fault", fault=fault, victim=victim, held=held, **more)

    async def freeze_at_work(self, part: Part, least: int = 1) -> Held:
        """Freeze a worker (SIGSTOP) when it has at least so many entries in hand; return them. It stays frozen."""
        give_up_s = time.monotonic() + TRY_FOR_S
        while True:
            part.signal(signal.SIGSTOP)
            with _thawed_on_error(part):
                held = await self._cluster.in_hand(part)
            if len(held) >= least or time.monotonic() > give_up_s:
                return held
            part.signal(signal.SIGCONT)
            await asyncio.sleep(0.003)

    async def kill(self, part: Part, *, least: int = 1, again_after_s: float | None = 0.1) -> None:
        """Kill a worker with work in hand (SIGKILL), watch what becomes of that, and start it again after a while.

        Args:
            least: entries that it should have in hand.
            again_after_s: None leaves it dead.
        """
        held = await self.freeze_at_work(part, least)
        dead = part.worker
        await part.kill()
        self.note("kill", dead, held=len(held))
        self.watch(held, dead)
        if again_after_s is not None:
            await asyncio.sleep(again_after_s)
            await part.start()

    async def make_zombie(self, part: Part, for_s: float, least: int = 1) -> int:
        """Freeze a worker at work for *for_s*, let others take over, thaw it; return how many entries it had lost."""
        held = await self.freeze_at_work(part, least)
        with _thawed_on_error(part):
            frozen_s = time.monotonic()
            id_of = await self._ids(held)  # now: an entry that another has settled meanwhile tells nothing any more
            self.watch(held, part.worker)
            await asyncio.sleep(for_s)
            lost = [entry for entry in held if await self._cluster.owner(*entry) != part.worker]
            ids = [id_of[entry] for entry in lost if entry in id_of]
        part.signal(signal.SIGCONT)
        self.note(
            "zombie",
            part.worker,
            held=len(held),
            lost=len(lost),
            ids=ids,
            frozen_s=round(time.monotonic() - frozen_s, 3),
        )
        return len(lost)

    async def _ids(self, held: Held) -> dict[tuple[str, bytes], str]:
        """Return the job ids in some entries; one that is gone already has none."""
        found = [(entry, await self._cluster.job_ids([entry])) for entry in held]
        return {entry: ids[0] for entry, ids in found if ids}

    def watch(self, held: Held, dead: str) -> None:
        """Measure from now on how long these entries stay in the hands of *dead*."""
        task = asyncio.create_task(self._watch(held, dead), name=dead)
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    async def _watch(self, held: Held, dead: str) -> None:
        began_s = time.monotonic()
        left = [entry for entry in held if not await self._is_suspect(entry)]
        if len(left) < len(held):
            self._writer.write("suspects", victim=dead, entries=len(held) - len(left))
        while left:
            try:
                still = [entry for entry in left if await self._cluster.owner(*entry) == dead]
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

    async def _is_suspect(self, entry: tuple[str, bytes]) -> bool:
        """Say whether an entry's holders died twice: such entries run alone, one after another, and take their time."""
        try:
            return await self._cluster.deliveries(*entry) > 1
        except RedisError:
            return True

    async def until_recovered(self, stage: str = "") -> None:
        """Wait until nothing lies in the hands of killed workers of a stage, or of any, any more."""
        if watchers := [watcher for watcher in self._watchers if watcher.get_name().startswith(stage)]:
            await asyncio.wait(watchers)
