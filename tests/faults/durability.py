"""What an accepted job survives: how Redis keeps its data, by what happens to it. Measured, and printed as a table.

    python -m tests.faults --durability             measure and print
    python -m tests.faults --durability --write     also put the table into docs/OPERATIONS.md

Each field of the table is a run of its own: requests are sent for a few seconds to replicas so slow that nearly all of
them are unfinished, the fault comes in their midst, the replicas become fast, and when nothing is on its way any more
the clients' history tells how many of the accepted jobs have an outcome.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop
from redis.exceptions import RedisError

from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.checkers import leftovers, outcomes
from tests.faults.cluster import Cluster, Layout
from tests.faults.history import piece_together

PAGE: Final = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"
BEGIN: Final = "<!-- durability: begin -->"
END: Final = "<!-- durability: end -->"

RATE: Final = 100.0
BEFORE_S: Final = 2.0
AFTER_S: Final = 1.0
CUT_BYTES: Final = 40
TORN_TIMES: Final = 3
"""What a torn end does depends on what stood there: half of a transaction, or a command by itself."""
LIFE_S: Final = 20.0
"""Of a job: one whose entry Redis has lost is told lost when it is over."""
IDLE_WITHIN_S: Final = LIFE_S + 5.0

MODES: Final[Mapping[str, Mapping[str, str]]] = {
    "no persistence": {"appendonly": "no", "save": ""},
    "snapshots only, `save 1 1`": {"appendonly": "no", "save": "1 1"},
    "`appendfsync everysec`": {"appendfsync": "everysec"},
    "`appendfsync always`": {"appendfsync": "always"},
}


@dataclass(frozen=True, slots=True)
class Survival:
    """How many of the accepted jobs have an outcome."""

    survived: int
    accepted: int

    def __add__(self, other: Survival) -> Survival:
        return Survival(self.survived + other.survived, self.accepted + other.accepted)

    def __str__(self) -> str:
        if self.survived == self.accepted:
            return f"all {self.accepted}"
        return f"**{self.survived}** of {self.accepted}"


Fault = Callable[[Cell], Awaitable[None]]


async def kill_worker(cell: Cell) -> None:
    """A worker is killed (`kill -9`)."""
    await cell.nemesis.kill(cell.cluster["llm-1"])


async def kill_redis(cell: Cell) -> None:
    """Redis is killed (`kill -9`) and started again."""
    await cell.cluster.server.kill()
    await cell.cluster.server.start()


async def stop_redis(cell: Cell) -> None:
    """Redis is stopped (SIGTERM) and started again."""
    await cell.cluster.server.stop()
    await cell.cluster.server.start()


async def kill_redis_rewriting(cell: Cell) -> None:
    """Redis is killed during `BGREWRITEAOF`."""
    redis = cell.cluster.redis
    await redis.config_set("rdb-key-save-delay", 10_000)  # us per key: the rewrite takes seconds
    await redis.bgrewriteaof()

    async def rewrites() -> bool:
        return bool((await redis.info("persistence"))["aof_rewrite_in_progress"])

    await wait_until(rewrites, timeout_s=2)
    await asyncio.sleep(0.3)
    assert await rewrites(), "the rewrite was over too soon"
    await cell.cluster.server.kill()
    await cell.cluster.server.start()


async def tear_tail(cell: Cell) -> None:
    """The last bytes of the file are torn off, Redis is started, `BGREWRITEAOF`, killed and started again."""
    await _tear_tail(cell, rewrite=True)


async def tear_tail_without_rewriting(cell: Cell) -> None:
    """The same without `BGREWRITEAOF` in between."""
    await _tear_tail(cell, rewrite=False)


async def _tear_tail(cell: Cell, *, rewrite: bool) -> None:
    server = cell.cluster.server
    await server.kill()
    [last] = (cell.cluster.folder / "redis" / "appendonlydir").glob("*.incr.aof")
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size - CUT_BYTES)
    server.rewrites = rewrite
    await server.start()
    await cell.cluster.until_ready()
    await asyncio.sleep(AFTER_S)
    await server.kill()
    await server.start()


@dataclass(frozen=True, slots=True)
class Row:
    """One fault.

    Attributes:
        needs_file: it is about the append-only file.
        times: how often it is run for one field; the jobs of all runs are added up.
    """

    fault: Fault
    needs_file: bool = False
    times: int = 1

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return (self.fault.__doc__ or "").partition("\n")[0].rstrip(".")


ROWS: Final = (
    Row(kill_worker),
    Row(stop_redis),
    Row(kill_redis),
    Row(kill_redis_rewriting, needs_file=True),
    Row(tear_tail, needs_file=True, times=TORN_TIMES),
    Row(tear_tail_without_rewriting, needs_file=True, times=TORN_TIMES),
)


async def measure(fault: Fault, options: Mapping[str, str], seed: int, folder: Path) -> Survival:
    """Run one fault against one way to keep data."""
    cell = Cell(0, "durability", seed, round(RATE * (BEFORE_S + AFTER_S)), folder)
    mix = {"background": 2, "keyed": 2, "foreign": 1}
    fields = {"timeout_s": LIFE_S}
    async with cell.running(Layout(latency="3", redis=options), mix, again=0.0, fields=fields) as (cluster, load, _):
        sending = cell.background(load.run(cell.jobs, RATE))
        await asyncio.sleep(BEFORE_S)
        await fault(cell)
        await cluster.behave(latency="0.02")
        await sending
        with suppress(TimeoutError):  # half of a transaction may have put an entry where no group looks any more
            await _until_idle(cluster)
        await load.ask_after()
        load.forget()
    found = outcomes.check(piece_together(cell.clients), frozenset())
    return Survival(found.accepted - len(found.lost), found.accepted)


async def _until_idle(cluster: Cluster) -> None:
    async def is_idle() -> bool:
        try:
            return not (await leftovers.check(cluster.redis)).work
        except RedisError:
            return False

    await wait_until(is_idle, timeout_s=IDLE_WITHIN_S, every_s=0.1)


def _measure(fault: Fault, options: Mapping[str, str], seed: int) -> Survival:
    folder = Path(tempfile.mkdtemp(prefix="penstock-durability-", dir="/tmp"))  # short: it holds a unix socket
    survival = uvloop.run(measure(fault, options, seed, folder))
    shutil.rmtree(folder)
    return survival


def measure_all(seed: int) -> str:
    """Measure every field; return the table as Markdown."""
    lines = [
        f"| What happens | {' | '.join(MODES)} |",
        f"|---{'|---' * len(MODES)}|",
    ]
    for row in ROWS:
        fields = []
        for options in MODES.values():
            if row.needs_file and options.get("appendonly") == "no":
                fields.append("there is no file")
                continue
            fields.append(str(sum((_measure(row.fault, options, seed + i) for i in range(row.times)), Survival(0, 0))))
            print(f"{row.title}, {options}: {fields[-1]}", flush=True)
        lines.append(f"| {row.title} | {' | '.join(fields)} |")
    lines.append(f"| The machine loses power: not measured, reasoned | {' | '.join(POWER_CUT)} |")
    return "\n".join(lines)


POWER_CUT: Final = (
    "nothing survives",
    "what the last snapshot holds",
    "all but the last second, or two on a slow disk",
    "all, if the disk keeps what it has confirmed",
)


def write(table: str) -> None:
    """Put the table into the page for operators, between its two marks."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")
