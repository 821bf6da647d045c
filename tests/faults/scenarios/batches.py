"""Batches of messages: many of them, while whoever works on them is killed and the database goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final

from pipeline import keys
from pipeline.batches import GRACE_MS
from tests.faults.batches import Senders, piece_together
from tests.faults.cell import RECOVERY_S, Cell
from tests.faults.cluster import AFTERWARDS, STAGES, Cluster, Layout
from tests.faults.nemesis import Nemesis
from tests.faults.receiver import Receiver
from tests.faults.scenarios import reach, scenario
from tests.postgres import PostgresServer

RATE: Final = 2.1  # batches per second, 64 messages: what two cores carry beside all these processes and their restarts
FAILS: Final = 0.2
"""Share of calls that one of the replicas answers with 500."""
LIFE_S: Final = 60.0
"""Of a message: a batch one of whose messages is gone closes so long after it was accepted, and a little later."""
CLOSES_WITHIN_S: Final = 10.0
"""After the deadline: the grace, a tick and the gathering."""
UNHURRIED_S: Final = 3_600.0
AWAY_S: Final = (0.5, 4.0)
LOST_SIZE: Final = 50

_DELETE: Final = """
local stream, entry = unpack(redis.call('HMGET', 'live:' .. ARGV[1], 'stream', 'entry'))
if not stream or entry == '' then return 0 end
local group = string.match(stream, '^job:(%a+)_in')
if #redis.call('XPENDING', stream, group, entry, entry, 1) > 0 then return 0 end
if ARGV[2] == 'all' then
  redis.call('DEL', 'live:' .. ARGV[1])
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return redis.call('XDEL', stream, entry)
"""
"""What somebody does by hand: delete the entry of a message that nobody has read, or all that there is of it."""


@asynccontextmanager
async def _sending(
    cell: Cell, *, slots: int, latency: str, life_s: float
) -> AsyncIterator[tuple[Cluster, Senders, Nemesis, PostgresServer]]:
    """Have a cluster with everything that batches need; on leaving all is read that anybody knows of them."""
    with PostgresServer() as database:
        environ = {
            "DATABASE_URL": database.url(),
            "PENSTOCK_HISTORY__AUTO_UPGRADE": "true",
            "PENSTOCK_WEBHOOK__ALLOW_PRIVATE": "true",
            "PENSTOCK_LLM__SLOTS": f"{slots}",
            "PENSTOCK_LIFETIMES__MESSAGE_S": f"{life_s:g}",
        }
        layout = Layout(aggregators=2, webhooks=2, recorders=2, latency=latency, environ=environ)
        rng = Random(f"{cell.verdict.number}:{cell.verdict.seed}:senders")
        async with (
            Receiver(cell.news, Random(f"{cell.verdict.seed}:receiver")) as receiver,
            cell.running(layout, {"background": 1}) as (cluster, _, nemesis),
        ):
            await cluster.behave("replica-1", fail_rate=FAILS)
            senders = Senders(cluster, receiver, cell.batches, rng)
            await senders.prepare()
            looking = cell.background(senders.look_forever())
            try:
                yield cluster, senders, nemesis, database
                await senders.quiet()
                await senders.read_redis()
                await senders.read_history(database.url())
            finally:
                looking.cancel()
                await asyncio.gather(looking, return_exceptions=True)
                await senders.close()


@scenario(22, jobs=200, least=80)
async def batches_amid_kills(cell: Cell) -> None:
    """Batches of 1 to 60 messages, while all stages, the recorder too, are killed at work, and PostgreSQL restarts.

    One of three replicas fails every fifth call. Each batch closes once, with all its results in order, and its
    receiver is told under one id, not again once an acknowledged delivery was settled. What history and Redis hold is
    what the clients saw and the replicas answered. Two batches have a message whose entry is deleted by hand, of one of
    them the live record too: they close at their deadline with that message `failed`, code `lost`. `--jobs` are
    batches.
    """
    async with _sending(cell, slots=8, latency="0.3", life_s=LIFE_S) as (cluster, senders, nemesis, database):
        lost = [await _delete_one(cell, cluster, senders, nemesis, how) for how in ("entry", "all")]
        sending = cell.background(senders.run(cell.jobs - senders.sent, RATE))
        due: list[str] = []
        while not sending.done():
            if not due:
                due = [*STAGES, *AFTERWARDS, "postgres"]
                cell.rng.shuffle(due)
            stage = due.pop()
            await nemesis.until_recovered("recorder" if stage == "postgres" else stage)  # its survivors are the heirs
            if stage == "postgres":
                await _restart(cell, nemesis, database)
                continue
            victim = cell.rng.choice(cluster.of(stage))
            if await nemesis.kill(victim, spare_idle=True):
                await cluster.until_works(victim)
            else:
                due.insert(0, stage)  # nothing was in its hands: later
        await sending
    _require_closing(cell, lost)
    killed = {str(line["victim"]).partition("-")[0] for line in cell.faults_done() if line["fault"] == "kill"}
    for stage in (*STAGES, *AFTERWARDS):
        cell.require(f"a worker of the stage {stage} is killed at work", stage in killed)
    cell.require("the database restarts", any(line["victim"] == "postgres" for line in cell.faults_done()))
    cell.require_recovery(RECOVERY_S)


@scenario(23, jobs=1_000, least=20)
async def batches_at_once(cell: Cell) -> None:
    """A thousand batches of 1 to 60 messages at once over three replicas, one of which fails every fifth call.

    As 22, with nobody killed: no call is made again, and no receiver told twice. `--jobs` are batches.
    """
    async with _sending(cell, slots=16, latency="0.05", life_s=UNHURRIED_S) as (_, senders, _, _):
        await senders.run(cell.jobs, None)


async def _restart(cell: Cell, nemesis: Nemesis, database: PostgresServer) -> None:
    """End PostgreSQL without letting it tidy up, and start it again after a while."""
    await asyncio.to_thread(database.crash)
    nemesis.note("database restarted", "postgres", held=None)
    await asyncio.sleep(cell.rng.uniform(*AWAY_S))
    await asyncio.to_thread(database.start)


async def _delete_one(cell: Cell, cluster: Cluster, senders: Senders, nemesis: Nemesis, how: str) -> str:
    """Send a batch and delete a message of it that nobody has begun; return that message's id."""
    number = senders.send(LOST_SIZE)
    gone = ""

    async def is_deleted() -> bool:
        nonlocal gone
        for message_id in reversed(_sent(cell, number)):
            if await cluster.redis.eval(_DELETE, 1, keys.LIVE_INDEX, message_id, how):
                gone = message_id
                return True
        return False

    await reach("a message of the batch waits", is_deleted, within_s=LIFE_S / 2, every_s=0.02)
    nemesis.note("entry deleted", f"message {number}", held=None, message=gone)
    return gone


def _sent(cell: Cell, number: int) -> list[str]:
    return [message_id for batch in piece_together(cell.batches) if batch.n == number for message_id in batch.ids]


def _require_closing(cell: Cell, lost: list[str]) -> None:
    """Demand that a batch with a lost message was closed at its deadline, and no other so late."""
    figures: dict[str, Any] = {}
    for batch in piece_together(cell.batches):
        gone = set(batch.ids) & set(lost)
        if not batch.seen or not gone:
            continue
        standing = batch.seen[0]["standing"]
        after_s = (standing["closed_ms"] - standing["created_ms"]) / 1000
        figures[f"batch {batch.n} closed after"] = f"{after_s:.1f} s"
        latest_s = LIFE_S + GRACE_MS / 1000 + CLOSES_WITHIN_S
        cell.require(
            f"batch {batch.n} closes at its deadline, not after {after_s:.1f} s", LIFE_S <= after_s <= latest_s
        )
    cell.verdict.figures |= figures
    cell.require(f"{len(lost)} batches have lost a message, not {len(figures)}", len(figures) == len(lost))
