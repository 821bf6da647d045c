"""Clients that ask the same thing many times at once, and clients that go away."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from pipeline import keys
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import STAGES, Cluster, Layout
from tests.faults.history import Json, read
from tests.faults.load import Load
from tests.faults.nemesis import Nemesis
from tests.faults.scenarios import scenario

RATE: Final = 20.0
VOICES: Final = 100
KEYS: Final = 4
"""Keys under which nothing is harmed; one more meets the end of a gateway, one the end of an llm worker."""
CHORUS_WITHIN_S: Final = 30.0
SAME: Final = ("job_id", "answer", "sources", "worker", "replica", "model", "usage")

CALL: Final = "call"
PLACES: Final = (*STAGES, CALL)
"""Where a job is when its client leaves: on a stage's stream, or at a replica."""
LEAVES: Final[tuple[dict[str, str], ...]] = ({}, {}, {}, {"on_disconnect": "continue"}, {"key": "leaves-{}"})
"""How clients ask that leave: most take their jobs with them."""
ABORTED_WITHIN_S: Final = 0.5
RETURNED_WITHIN_S: Final = 1.0
HEARD_WITHIN_S: Final = 2.0


# --- the same key ---------------------------------------------------------------------------------


@scenario(9, jobs=300)
async def same_key_at_once(cell: Cell) -> None:
    """The same Idempotency-Key 100 times at once.

    One job and 100 equal answers for each key, also while a gateway or an llm worker is killed in the middle; a replica
    is asked once per key, and once more only where the worker that asked was killed.
    """
    job_ids = []
    cell.may_be_unknown = 0
    async with cell.running(Layout(gateways=2, latency="1")) as (_, load, nemesis):
        sending = cell.background(load.run(cell.jobs, RATE))
        for turn in range(KEYS + 2):
            heard: list[Json] = []
            number = load.chorus(VOICES, f"chorus-{turn}", heard)
            if turn >= KEYS:
                await _harm(cell, nemesis, number, heard, kills_gateway=turn == KEYS)
            await wait_until(lambda heard=heard: len(heard) == VOICES, timeout_s=CHORUS_WITHIN_S)  # type: ignore[misc]
            kinds = {repr([answer.get(name) for name in SAME]) for answer in heard}
            cell.require(f"key {turn}: {VOICES} equal answers, not {len(kinds)} different ones", len(kinds) == 1)
            job_ids.append(heard[0]["job_id"])
        await sending
    asked = [len(_calls_for(cell.cluster.folder, job_id)) for job_id in job_ids]
    wanted = [1] * (KEYS + 1) + [2]
    cell.verdict.figures["asked"] = asked
    cell.require(f"the replicas were asked {wanted} times for the keys, not {asked}", asked == wanted)


async def _harm(cell: Cell, nemesis: Nemesis, number: int, heard: list[Json], *, kills_gateway: bool) -> None:
    """Kill a gateway, or the worker that asks a replica, while request *number* is at the replica."""
    cluster = cell.cluster
    job_id = (await _running_call(cluster, number))["request_id"]
    if kills_gateway:
        victim = cell.rng.choice(cluster.of("gateway"))
        undecided = sum(not (one.ids or one.refusals or one.is_unknown) for one in cell.requests())
        cell.may_be_unknown = undecided + math.ceil(RATE)  # and who comes before its connections are seen to be dead
        nemesis.note("kill", victim.worker, held=VOICES - len(heard))
        await victim.kill()
        await victim.start()
    else:
        stream, entry = await cluster.redis.hmget(keys.LIVE + job_id, "stream", "entry")
        owner = await cluster.owner(stream.decode(), entry)
        assert owner is not None, "the job has ended too early"
        await nemesis.kill(cluster[owner.rpartition(".")[0]])


async def _running_call(cluster: Cluster, number: int) -> Json:
    """Wait until a replica is at work for a request; return the call as its record has it."""
    call: Json | None = None

    async def is_running() -> bool:
        nonlocal call
        call = await cluster.call_of(number)
        return call is not None

    await wait_until(is_running)
    assert call is not None
    return call


def _calls_for(folder: Path, job_id: str) -> list[Json]:
    """Return what the replicas' own records say of a job."""
    return [
        line for path in sorted(folder.glob("replica-*.jsonl")) for line in read(path) if line["request_id"] == job_id
    ]


# --- going away -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Leaver:
    """One client that leaves.

    Attributes:
        stays: whether its job is to go on.
        left_s: when it left, by the wall clock, which the replicas' records use, too.
    """

    place: str
    number: int
    stays: bool
    job_id: str = ""
    left_s: float = 0.0


@scenario(16, jobs=80)
async def client_leaves(cell: Cell) -> None:
    """Clients disconnect while their job is at each stage.

    Their jobs are cancelled and no replica is asked; a running call is aborted within 500 ms, and its lease returned.
    With `on_disconnect: "continue"` or an Idempotency-Key the job goes on.
    """
    cell.may_end = {"cancelled/cancelled"}  # of those who leave; nobody else is here
    leavers: list[_Leaver] = []
    returned_s: list[float] = []
    async with cell.running(Layout(gateways=2, latency="1.5")) as (cluster, load, nemesis):
        for _ in range(max(1, cell.jobs // len(PLACES) // len(LEAVES))):
            for place in PLACES:
                for part in cluster.of(place):
                    part.signal(signal.SIGSTOP)
                some = [
                    _Leaver(place, load.send("ask", **_filled(fields, load.sent)), stays=bool(fields))
                    for fields in LEAVES
                ]
                leavers += some
                if place == CALL:
                    returned_s.append(await _leave_calls(cell, some))
                else:
                    await _leave_stream(cell, place, some)
                nemesis.note("disconnect", place, held=sum(bool(one.job_id) for one in some))
                await wait_until(lambda: _is_idle(load), timeout_s=30.0, every_s=0.02)
    _judge(cell, leavers, returned_s)


def _filled(fields: dict[str, str], number: int) -> dict[str, str]:
    return {name: value.format(number) for name, value in fields.items()}


async def _leave_stream(cell: Cell, stage: str, leavers: list[_Leaver]) -> None:
    """Have clients leave while their jobs lie at a frozen stage, and thaw it when that was heard."""
    cluster = cell.cluster
    try:
        await wait_until(lambda: _find(cluster, stage, leavers), timeout_s=2.0)
        for one in leavers:
            cell.load.leave(one.number, one.job_id)
        claim = f"the jobs at {stage} are cancelled or marked within {HEARD_WITHIN_S:g} s"
        await _require_soon(cell, claim, lambda: _was_heard(cluster, leavers))
    finally:
        for part in cluster.of(stage):
            part.signal(signal.SIGCONT)


async def _find(cluster: Cluster, stage: str, leavers: list[_Leaver]) -> bool:
    """Note the job ids of all questions that lie on a stage's stream; say whether these are all."""
    for _, fields in await cluster.redis.xrange(keys.stream(stage)):
        text = fields[b"data"].decode()
        for one in leavers:
            if f"Request {one.number}." in text:
                one.job_id = str(orjson.loads(text)["id"])
    return all(one.job_id for one in leavers)


async def _was_heard(cluster: Cluster, leavers: list[_Leaver]) -> bool:
    """Say whether every job whose client took it along has ended or is marked."""
    gone = [one for one in leavers if not one.stays]
    states: list[Any] = [await cluster.redis.hmget(keys.LIVE + one.job_id, "stream", "cancel") for one in gone]
    return all(stream is None or cancel for stream, cancel in states)


async def _leave_calls(cell: Cell, leavers: list[_Leaver]) -> float:
    """Have clients leave while replicas work for them; return how long their leases were kept, in seconds."""
    cluster = cell.cluster
    for one in leavers:
        one.job_id = (await _running_call(cluster, one.number))["request_id"]
    began_s = time.monotonic()
    for one in leavers:
        one.left_s = time.time()
        cell.load.leave(one.number, one.job_id)
    staying = sum(one.stays for one in leavers)
    claim = f"only the {staying} leases of jobs that go on are left within {HEARD_WITHIN_S:g} s"
    await _require_soon(cell, claim, lambda: _leases_are(cluster, staying))
    return time.monotonic() - began_s


async def _require_soon(cell: Cell, claim: str, condition: Callable[[], Awaitable[bool]]) -> None:
    try:
        await wait_until(condition, timeout_s=HEARD_WITHIN_S, every_s=0.005)
    except TimeoutError:
        cell.require(claim, False)


async def _leases_are(cluster: Cluster, count: int) -> bool:
    loads = await cluster.redis.mget([keys.LOAD + url for url in cluster.replica_urls])
    return sum(int(load or 0) for load in loads) == count


def _is_idle(load: Load) -> bool:
    return not load.open


def _judge(cell: Cell, leavers: list[_Leaver], returned_s: list[float]) -> None:
    """Demand what a leaver's job was to come to."""
    told = {one.n: one for one in cell.requests()}
    aborted_s = []
    for one in leavers:
        status = (told[one.number].outcomes or [{}])[0].get("status")
        calls = _calls_for(cell.cluster.folder, one.job_id)
        if one.stays:
            ends = [call["status"] for call in calls]
            went_on = status == "completed" and ends == ["completed"]
            cell.require(f"request {one.number} at {one.place}: goes on, not {status}, calls {ends}", went_on)
            continue
        cell.require(f"request {one.number} at {one.place}: cancelled, not {status}", status == "cancelled")
        if one.place != CALL:
            cell.require(f"request {one.number} at {one.place}: no call, not {len(calls)}", not calls)
            continue
        cell.require(f"request {one.number}: its call is aborted", [call["status"] for call in calls] == ["aborted"])
        aborted_s += [call["ended_s"] - one.left_s for call in calls]
    slowest_s, latest_s = max(aborted_s, default=0.0), max(returned_s, default=0.0)
    cell.verdict.figures |= {"aborted within": f"{slowest_s * 1000:.0f} ms", "returned": f"{latest_s * 1000:.0f} ms"}
    cell.expect(f"calls are aborted within {ABORTED_WITHIN_S:g} s", slowest_s <= ABORTED_WITHIN_S)
    cell.expect(f"leases are returned within {RETURNED_WITHIN_S:g} s", latest_s <= RETURNED_WITHIN_S)
