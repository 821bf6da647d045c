"""Every operation in any order, by any hand, against a model: what is accepted ends once, and only its owner ends it.

Hypothesis draws the steps: jobs and batches are submitted, read, settled, taken over; batches are gathered and closed,
early or at their deadline; consumers crash, are paused and come back, replies are lost, strangers write and delete
entries, Redis is emptied. After every step the model and Redis are compared key by key (`model.py`), and what must hold
whatever the model says is looked at by itself. At the end all is drained by one living consumer per stage.

Redis' clock is real: deadlines and due times are far away or past, and time passes where a rule puts a score into
the past. `TEST_MACHINE_EXAMPLES=5000` explores at random, for as long as that takes.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import orjson
import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from pipeline import batches, flows, keys, scripts
from pipeline.accepting import Idempotency
from pipeline.balancing import Replica
from pipeline.batches import Message, Order
from pipeline.connection import Argument, GroupMissing, Link
from pipeline.front import Front
from pipeline.job import OURS, PRIORITIES, Completion, Job, decode, error_body
from pipeline.settings import Settings
from pipeline.streams import Entry, Settlement, start_arguments
from tests.conftest import short_settings
from tests.faults.model import (
    MOST_LETTERS,
    PAST,
    REPLY,
    SLOTS,
    STAGES,
    STREAMS,
    Batch,
    BatchSubmission,
    GroupGone,
    Live,
    Model,
    Submission,
)
from tests.faults.picture import Picture, take_picture
from tests.rig import Hand, assert_nothing_is_left, changed
from tests.servers import RedisServer

T = TypeVar("T")

EXAMPLES = int(os.environ.get("TEST_MACHINE_EXAMPLES", "0"))
"""0: as many as a test run can wait for, the same ones every time."""
FAR_MS = 3_600_000
LONG_MS = 600_000
"""Leases that last longer than any run of the machine: they lapse when a rule lets them."""
PATIENCE_S = 60.0
"""No step is about a Redis that does not answer: a machine that stands still for a second is waited for."""
MOST_HANDS = 3
WORKERS = ("encoder", "llm")
"""Stages that any job may pass; the third one gathers batches."""
REMEMBERED = 6
"""Entries that a consumer let go of and may try to settle once more."""

some = strategies.data()
booleans = strategies.booleans()
seldom = strategies.sampled_from([False, False, False, True])


@dataclass(frozen=True)
class Step:
    """One of the machine's steps: how often it is drawn, when there is a point in it, and what is drawn for it."""

    take: Callable[..., None]
    weight: int
    when: Callable[[Any], object]
    draws: dict[str, strategies.SearchStrategy[Any]]


STEPS: dict[str, Step] = {}


def step(
    weight: int, when: Callable[[Any], object] = lambda _: True, /, **draws: strategies.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter a method among the steps.

    Hypothesis would draw its rules evenly, and leave some out in each run; but the life of a job needs nearly all of
    them, and reading and settling more often than misfortune.
    """

    def enter(method: Callable[..., None]) -> Callable[..., None]:
        STEPS[method.__name__] = Step(method, weight, when, draws)
        return method

    return enter


class Player:
    """A consumer of the machine: its hands, what it believes to hold, and what it has let go of."""

    def __init__(self, hand: Hand, stage: str) -> None:
        self.hand = hand
        self.stage = stage
        self.held: list[Entry] = []
        self.spent: list[Entry] = []

    @property
    def name(self) -> str:
        return self.hand.name

    def let_go(self, entry: Entry) -> None:
        if entry in self.held:
            self.held.remove(entry)
        if entry not in self.spent:
            self.spent = [*self.spent, entry][-REMEMBERED:]

    def __repr__(self) -> str:
        return self.name


class Machine(RuleBasedStateMachine):
    """Each step calls the real thing, tells the model, and has both compared."""

    def __init__(self, server: RedisServer) -> None:
        super().__init__()
        self.settings: Settings = changed(
            short_settings(server),
            worker={"completion_ttl_s": 3_600.0},
            dead={"max_letters": MOST_LETTERS},
            redis={"connect_timeout_s": PATIENCE_S, "reply_timeout_s": PATIENCE_S},
        )
        self.runner = asyncio.Runner()
        self.link = Link(self.settings.redis, "machine")
        self.front = Front(self.settings, "machine")  # never entered: it only cancels and looks
        self.model = Model()
        self.picture = Picture()
        self.players: list[Player] = []
        self.gone: list[Player] = []
        self.ids: list[str] = []
        self.count = 0
        self.is_sound = True  # the last step ended well: what is left can be drained

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    # --- comparing -------------------------------------------------------------------------------

    def look(self, *, unchanged: bool = False) -> None:
        """Compare model and Redis; with *unchanged*, Redis with itself before the last call, to the byte."""
        before, self.picture = self.picture, self.do(take_picture(self.link))
        if unchanged:
            assert self.picture.exact == before.exact, "a refused call has changed something"
        self.model.agree(self.picture)
        self.is_sound = True

    @invariant()
    def each_job_is_in_one_place(self) -> None:
        """Live: on the one stream entry that its record names, delayed or entering; ended: its outcome, no record."""
        records = self.picture.under(keys.LIVE, self.picture.hashes)
        outcomes = self.picture.under(keys.COMPLETION, self.picture.strings)
        delayed = self.picture.zsets.get(keys.DELAYED, {})
        assert not records.keys() & outcomes.keys()
        assert self.model.accepted <= records.keys() | outcomes.keys()
        assert delayed.keys() <= records.keys()
        for job_id, record in records.items():
            stream, entry = record["stream"].decode(), record["entry"]
            on_stream = entry in [found for found, _ in self.picture.streams.get(stream, [])]
            job = self.model.jobs[job_id]
            deleted = job.item is not None and job.item.deleted
            assert on_stream + (job_id in delayed) + job.enters + deleted == 1, job_id
            assert (entry == b"") == (job_id in delayed or job.enters), job_id

    @invariant()
    def loads_are_true_and_slots_are_kept(self) -> None:
        """The load is the number of leases; no replica runs more than it may; nobody is leased without living."""
        records = self.picture.under(keys.LIVE, self.picture.hashes)
        for url, slots in SLOTS.items():
            leased = self.picture.zsets.get(keys.LEASES + url, {}).keys()
            running = self.picture.zsets.get(keys.RUNNING + url, {}).keys()
            assert int(self.picture.strings.get(keys.LOAD + url, b"0")) == len(leased)
            assert len(running) <= slots
            assert running <= leased <= records.keys()

    @invariant()
    def nothing_is_endless(self) -> None:
        """Every key has a TTL or a reason to have none; the index of live jobs is the live jobs."""
        endless = [name for name, ttl_ms in self.picture.ttls.items() if ttl_ms == -1]
        assert [n for n in endless if not any(fnmatch.fnmatchcase(n, pattern) for pattern in keys.BOUNDED)] == []
        live = self.picture.under(keys.LIVE, self.picture.hashes)
        assert self.picture.zsets.get(keys.LIVE_INDEX, {}).keys() == live.keys()
        assert len(self.picture.streams.get(keys.DEAD, [])) <= MOST_LETTERS

    @rule(data=some)
    def go_on(self, data: strategies.DataObject) -> None:
        """One step of any kind."""
        names = [name for name, one in STEPS.items() if one.when(self) for _ in range(one.weight)]
        chosen = STEPS[data.draw(strategies.sampled_from(names), "step")]
        chosen.take(self, data, **{name: data.draw(strategy, name) for name, strategy in chosen.draws.items()})

    # --- hands -----------------------------------------------------------------------------------

    @initialize(data=some)
    def begin(self, data: strategies.DataObject) -> None:
        """An empty Redis, a gateway that listens, two consumers per stage (one that gathers), and some work."""
        self.do(self.link.call("FLUSHALL"))
        self._open_gateway()
        for stage in (*WORKERS, *STAGES):
            self._hire(stage)
        self.look()
        self._submit([self._submission(data) for _ in range(data.draw(strategies.integers(2, 8), "jobs"))])

    def _open_gateway(self) -> None:
        async def open_stream() -> None:
            await self.link.call("XADD", REPLY, "*", "id", "")
            await self.link.call("PEXPIRE", REPLY, LONG_MS)

        self.do(open_stream())
        self.model.replies = []

    def _hire(self, stage: str) -> Player:
        self.count += 1
        player = Player(Hand(self.settings, f"{stage}-{self.count}", stage, placed=stage == "llm"), stage)
        self.do(player.hand.streams.ensure_groups())
        self.do(player.hand.live(LONG_MS))
        self.model.groups.add(stage)
        self.model.alive.add(player.name)
        self.players.append(player)
        return player

    def _lapse(self, player: Player) -> None:
        self.do(player.hand.die())
        self.model.alive.discard(player.name)

    def _replace(self, player: Player) -> None:
        self.players.remove(player)
        self.gone.append(player)
        if not any(one.stage == player.stage for one in self.players):
            self._hire(player.stage)

    def _player(self, data: strategies.DataObject, stage: str | None = None, *, holding: bool = False) -> Player:
        found = [p for p in self.players if stage in {None, p.stage} and (p.held or not holding)]
        return data.draw(strategies.sampled_from(found), "player")

    def _holds(self, stage: str | None = None) -> bool:
        return any(player.held for player in self.players if stage in {None, player.stage})

    @step(1, lambda self: len(self.players) < len(STAGES) * MOST_HANDS, stage=strategies.sampled_from(STAGES))
    def hire(self, data: strategies.DataObject, stage: str) -> None:
        """A new process, where there is room for one."""
        if sum(player.stage == stage for player in self.players) < MOST_HANDS:
            self._hire(stage)
            self.look()

    @step(2, well=booleans)
    def end(self, data: strategies.DataObject, well: bool) -> None:
        """A process crashes: its lease lapses, and what it knew is forgotten; its replacement has another name.

        One that ends *well* also leaves the groups where it holds nothing.
        """
        player = self._player(data, holding=self._holds())
        self._lapse(player)
        for stream in STREAMS[player.stage]:
            if well and player.stage in self.model.groups:
                args = (player.stage, player.name, player.name, 0, "", 1)  # a claim of nothing
                self.do(self.link.run(scripts.CLAIM, (stream,), args))
        self._replace(player)
        self.look()

    @step(2, lambda self: self._holds())
    def pause(self, data: strategies.DataObject) -> None:
        """A process freezes, or is cut off: its lease lapses, yet it believes to hold what it held."""
        self._lapse(self._player(data, holding=True))
        self.look()

    @step(2, lambda self: any(player.name not in self.model.alive for player in self.players) or self._is_missing())
    def renew(self, data: strategies.DataObject) -> None:
        """A process renews its lease, or takes it again, and hears what it holds: missing entries are taken up."""
        asleep = [p for p in self.players if p.name not in self.model.alive or self._missing(p)]
        player = data.draw(strategies.sampled_from(asleep or self.players), "player")
        had_lease = self._renew(player)
        if had_lease:
            for stream, entry, count in self._missing(player):
                self._take_up(player, stream, entry, count)

    def _missing(self, player: Player) -> list[tuple[str, bytes, int]]:
        """Return what is a player's own and no read brought it."""
        known = {(entry.stream, entry.id, entry.deliveries) for entry in player.held}
        pending = [(s, *row) for s in STREAMS[player.stage] for row in self.model.in_hand(player.name, s).items()]
        return [row for row in pending if row not in known]

    def _is_missing(self) -> bool:
        return any(self._missing(player) for player in self.players)

    def _renew(self, player: Player) -> bool:
        args: list[Argument] = [player.name, LONG_MS, "{}", ""]
        for stream in STREAMS[player.stage]:
            args += [stream, player.stage]
        _, word, listed, *rows = self.do(self.link.run(scripts.RENEW, (), args))
        assert listed == b"listed"
        had_lease = player.name in self.model.alive
        assert word == (b"renewed" if had_lease else b"taken")
        for stream, found in zip(STREAMS[player.stage], rows, strict=True):
            if player.stage in self.model.groups:
                assert dict(found) == self.model.in_hand(player.name, stream)
            else:
                assert found == b"gone"
        self.model.alive.add(player.name)
        self.look()
        return had_lease

    def _take_up(self, player: Player, stream: str, entry_id: bytes, count: int) -> None:
        entry = self.do(player.hand.streams.fetch(stream, entry_id, count))
        item = self.model.find(stream, entry_id)
        assert item is not None
        assert (entry is None) == item.deleted
        if entry is None:
            self.model.remove(stream, item)
        else:
            player.held.append(entry)
        self.look()

    # --- accepting -------------------------------------------------------------------------------

    def _job(self, data: strategies.DataObject, *, known: bool = False) -> Job:
        """A new job; with *known*, under an id that was used before."""
        if known and self.ids:
            job_id = data.draw(strategies.sampled_from(self.ids), "id")
        else:
            self.count += 1
            job_id = data.draw(strategies.sampled_from(["", "", "acme:"]), "tenant") + f"j{self.count}"
            self.ids = [*self.ids, job_id][-8:]
        flow = data.draw(strategies.sampled_from(["query", "message"]), "flow")
        payload = flows.QueryPayload(query="?") if flow == "query" else flows.PromptPayload(prompt="?")
        job = flows.new_job(
            flow, payload, job_id=job_id, now_ms=_now_ms(),
            lifetime_s=-1 if data.draw(seldom, "over") else FAR_MS / 1000,
            tenant="acme" if job_id.startswith("acme") else "default",
            priority=data.draw(strategies.sampled_from(PRIORITIES), "priority"),
        )  # fmt: skip
        job.route = job.route if flow == "message" else ["encoder", "llm"]
        return job

    def _submission(self, data: strategies.DataObject) -> Submission:
        job = self._job(data, known=data.draw(seldom, "again"))
        idem = data.draw(strategies.sampled_from(["", "", "one", "two"]), "key")
        return Submission(
            job,
            leases=job.flow == "query",
            due_ms=_now_ms() + FAR_MS if data.draw(seldom, "later") else 0,
            reply=data.draw(strategies.sampled_from([REPLY, ""]), "reply"),
            limit=data.draw(strategies.sampled_from([None, 2]), "limit"),
            idem=idem,
            body_hash=data.draw(strategies.sampled_from(["a", "a", "b"]), "body") if idem else "",
        )

    def _submit(self, batch: Sequence[Submission], candidates: Sequence[str] = tuple(SLOTS), most: int = 1_000) -> None:
        args: list[Argument] = [most, len(candidates), *candidates]
        for new in batch:
            stage, tail = new.job.launch()
            limited = new.limit is not None
            idem = keys.IDEMPOTENCY + new.idem if new.idem else ""
            args += [
                new.job.id, tail, keys.stream(stage, new.job.priority), new.job.tenant, new.job.deadline_ms, new.due_ms,
                new.reply, keys.IN_FLIGHT + new.job.tenant if limited else "", new.limit or 0,
                idem, new.body_hash, LONG_MS if idem else 0, "lease" if new.leases else "", "",
            ]  # fmt: skip
        before = len(self.model.accepted)
        words = self.model.submit(batch, candidates, most)
        self.is_sound = False
        reply = [value.decode() for value in self.do(self.link.run(scripts.SUBMIT, (), args))]
        _same(list(zip(reply[1::2], reply[2::2], strict=True)), words)
        self.look(unchanged=len(self.model.accepted) == before)

    @step(3, size=strategies.integers(1, 3), most=strategies.sampled_from([1_000, 1_000, 1_000, 4]), twice=seldom)
    def submit(self, data: strategies.DataObject, size: int, most: int, twice: bool) -> None:
        """Jobs are submitted together; *twice*: the reply was lost, and they are sent again."""
        batch = [self._submission(data) for _ in range(size)]
        candidates = data.draw(strategies.permutations(list(SLOTS)), "candidates")
        for _ in range(1 + twice):
            self._submit(batch, candidates, most)

    @step(
        2,
        size=strategies.integers(1, 4),
        most=strategies.sampled_from([1_000, 1_000, 4]),
        key=strategies.sampled_from(["", "", "one", "two"]),
        twice=seldom,
        portion=strategies.sampled_from([0, 0, 1, 2]),
    )
    def submit_batch(
        self, data: strategies.DataObject, size: int, most: int, key: str, twice: bool, portion: int
    ) -> None:
        """A batch is accepted as a whole or not at all; *twice*: replies were lost, and all is sent again.

        With a *portion* it is a large one: staged before, so many at a time; seldom to be taken away again instead.
        """
        due_ms = _now_ms() + FAR_MS if data.draw(seldom, "later") else None
        order = Order("default", "q", [Message(f"{number}?") for number in range(size)], due_ms=due_ms)
        plan = batches._Plan(order, self.settings, _now_ms())
        limit = data.draw(strategies.sampled_from([None, 2]), "limit")
        body_hash = data.draw(strategies.sampled_from(["a", "a", "b"]), "body") if key else ""
        idempotency = Idempotency(key, body_hash, LONG_MS / 1000) if key else None
        rows = list(plan.members())
        args = [*self.front.batches._commit_arguments(plan, idempotency, limit), "staged" if portion else "here"]
        args += [size] if portion else [part for row in rows for part in row]
        args[5] = most
        if portion:
            self._stage(plan, rows, portion, twice=twice)
            if data.draw(seldom, "dies"):
                self._unstage(plan)
                return
        keep_ms = int(self.settings.messages.keep_s * 1000)
        batch = Batch(
            plan.batch_id, "default", "q", orjson.dumps(plan.told()), [_bytes(row[2]) for row in rows], plan.ids,
            plan.created_ms, plan.closes_ms, plan.job.deadline_ms, keep_ms,
        )  # fmt: skip
        jobs = [plan._job(*pair) for pair in zip(plan.ids, order.messages, strict=True)]
        new = BatchSubmission(batch, jobs, plan.job, due_ms or 0, limit, key, body_hash, bool(portion))
        for _ in range(1 + twice):
            before = len(self.model.accepted)
            word, answering = self.model.submit_batch(new, most)
            self.is_sound = False
            reply = self.do(self.link.run(scripts.BATCH, (), args))
            _same((reply[1].decode(), reply[2].decode()), (word, answering))
            if word != "accepted" and portion:
                self._unstage(plan)
                break
            self.look(unchanged=len(self.model.accepted) == before)
        if batch.id in self.model.batches:
            self.ids = [*self.ids, batch.id, plan.ids[0]][-8:]

    def _stage(self, plan: batches._Plan, rows: Sequence[batches._Row], portion: int, *, twice: bool) -> None:
        self.is_sound = False
        for first in range(0, len(rows), portion):
            for _ in range(1 + twice):
                word = self.do(self.front.batches._stage(plan, first, rows[first : first + portion]))
                assert word == b"staged"

    def _unstage(self, plan: batches._Plan) -> None:
        """A minute later: what was staged is gone, and only the stamp shows that it was there."""
        self.do(self.link.call("ZADD", keys.STAGED, "XX", PAST, plan.batch_id))
        while self.do(self.link.run(scripts.UNSTAGE, (), (2, 60_000)))[1]:
            pass
        self.model.last_stamp = int(self.do(self.link.call("GET", keys.STAMP)))
        self.look()

    @step(2, stage=strategies.sampled_from(WORKERS), kind=strategies.sampled_from(["job", "copy", "id", "broken"]))
    def write_by_hand(self, data: strategies.DataObject, stage: str, kind: str) -> None:
        """A stranger adds an entry: a job of its own, a copy of one of ours, a living id once more, or nonsense."""
        stream = data.draw(strategies.sampled_from(STREAMS[stage]), "stream")
        job_id = ""
        if kind == "copy":
            originals = [item for items in self.model.streams.values() for item in items if item.job_id]
            if not originals:
                return
            original = data.draw(strategies.sampled_from(originals), "original")
            text, job_id = original.text.known or b"", original.job_id
        elif kind == "broken":
            text = b"no JSON"
        else:
            job = self._job(data, known=kind == "id")
            text = orjson.dumps({"id": job.id, "query" if stage == "encoder" else "prompt": "?"})
        self.is_sound = False
        self.do(self.link.call("XADD", stream, "*", "data", text))
        self.model.write(stream, text, job_id)
        self.look()

    # --- reading ---------------------------------------------------------------------------------

    @step(4, lambda self: self._waiting("encoder"), most=strategies.integers(1, 5), is_lost=seldom)
    def take(self, data: strategies.DataObject, most: int, is_lost: bool) -> None:
        """A consumer reads by the shares of the priorities; *is_lost*: the reply went over a dead connection."""
        self._take(self._player(data, "encoder"), most, is_lost=is_lost)

    @step(3, lambda self: self._waiting("aggregator"), is_lost=seldom)
    def take_batches(self, data: strategies.DataObject, is_lost: bool) -> None:
        """So does one that gathers: batches that are full, to be cancelled, or over."""
        self._take(self._player(data, "aggregator"), 2, is_lost=is_lost)

    def _waiting(self, stage: str) -> bool:
        return any(not item.owner for stream in STREAMS[stage] for item in self.model.streams[stream])

    def _take(self, player: Player, most: int, *, is_lost: bool = False) -> None:
        owed = player.hand.streams._shares.owed(most)
        self.is_sound = False
        try:
            wanted = self.model.take(player.stage, player.name, most, owed)
        except GroupGone:
            self._find_the_group_gone(player, player.hand.take(most))
            return
        entries = self.do(player.hand.take(most))
        assert [(e.stream, e.id) for e in entries] == [(stream, item.id) for stream, item in wanted]
        if not is_lost:
            player.held += entries
        self.look()

    def _find_the_group_gone(self, player: Player, call: Coroutine[Any, Any, object]) -> None:
        """After Redis was emptied a read finds no group, and makes a new one."""
        with pytest.raises(GroupMissing):
            self.do(call)
        self.look(unchanged=True)
        self.do(player.hand.streams.ensure_groups())
        self.model.groups.add(player.stage)
        self.look()

    @step(6, lambda self: self._waiting("llm"), most=strategies.integers(1, 4), is_lost=seldom)
    def place(self, data: strategies.DataObject, most: int, is_lost: bool) -> None:
        """An llm consumer takes entries with places, in an order of replicas; some breakers may be open."""
        orders = [data.draw(strategies.permutations(list(SLOTS)), "order") for _ in range(most)]
        is_open = data.draw(strategies.sampled_from([None, None, *SLOTS]), "open")
        self._place(self._player(data, "llm"), orders, is_open, is_lost=is_lost)

    def _place(
        self, player: Player, orders: Sequence[Sequence[str]], is_open: str | None = None, *, is_lost: bool = False
    ) -> None:
        replicas = [Replica(url, slots, is_open=url == is_open) for url, slots in SLOTS.items()]
        slots = {replica.url: 0 if replica.is_open else replica.slots for replica in replicas}
        owed = player.hand.streams._shares.ahead(len(orders))
        self.is_sound = False
        try:
            wanted = self.model.place(player.name, slots, orders, owed)
        except GroupGone:
            self._find_the_group_gone(player, player.hand.streams.place(replicas, orders))
            return
        placed = self.do(player.hand.streams.place(replicas, orders))
        found = [(entry.stream, entry.id, entry.replica) for entry in placed.entries]
        assert found == [(stream, item.id, url) for stream, item, url in wanted]
        standings = [(standing.running, standing.leases) for standing in placed.standings]
        assert standings == [(len(self.model.running(url)), len(self.model.leases(url))) for url in SLOTS]
        if not is_lost:
            player.held += placed.entries
        self.look()

    @step(4, lambda self: self._holds("llm"), spent=seldom)
    def move(self, data: strategies.DataObject, spent: bool) -> None:
        """A consumer asks another replica for a job in hand, or for one that it has let go of."""
        player = self._player(data, "llm", holding=True)
        entry = data.draw(strategies.sampled_from(player.spent if spent and player.spent else player.held), "entry")
        order = data.draw(strategies.lists(strategies.sampled_from(list(SLOTS)), unique=True), "order")
        self._move(player, entry, order)

    def _move(self, player: Player, entry: Entry, order: Sequence[str]) -> None:
        job_id = _job_id(entry)
        pairs = [(url, SLOTS[url]) for url in order]
        self.is_sound = False
        word = self.model.move(entry.stream, entry.id, entry.deliveries, player.name, job_id, pairs)
        _same(self.do(player.hand.streams.move(entry, job_id, [Replica(*pair) for pair in pairs])), word)
        self.look(unchanged=word == "lost")

    # --- taking over -----------------------------------------------------------------------------

    @step(
        4,
        lambda self: any(self.model.lapsed(stage) for stage in self.model.groups),
        most=strategies.integers(1, 4),
        idle=booleans,
    )
    def claim(self, data: strategies.DataObject, most: int, idle: bool) -> None:
        """A consumer takes over from one that has no lease."""
        stage = data.draw(strategies.sampled_from([s for s in STAGES if self.model.lapsed(s)]), "stage")
        heir = self._player(data, stage)
        lapsed = self.model.lapsed(stage)
        told = set(self.do(heir.hand.streams.lapsed()))
        assert lapsed <= told
        assert not {name for _, name in told} & self.model.alive
        stream, name = data.draw(strategies.sampled_from(sorted(lapsed)), "lapsed")
        self._claim(heir, stream, name, most, idle=idle)

    @step(1, lambda self: any(player.held for player in self.players if player.name in self.model.alive), idle=booleans)
    def claim_from_the_living(self, data: strategies.DataObject, idle: bool) -> None:
        """A consumer with a lease is left alone."""
        living = [player for player in self.players if player.held and player.name in self.model.alive]
        owner = data.draw(strategies.sampled_from(living), "owner")
        entry = data.draw(strategies.sampled_from(owner.held), "entry")
        self._claim(self._player(data, owner.stage), entry.stream, owner.name, 100, idle=idle)

    def _claim(self, heir: Player, stream: str, lapsed: str, most: int, *, idle: bool) -> list[Entry]:
        call = heir.hand.streams.claim(stream, lapsed, most, idle=idle)
        self.is_sound = False
        try:
            wanted, left = self.model.claim(heir.stage, stream, lapsed, heir.name, most, idle=idle)
        except GroupGone:
            self._find_the_group_gone(heir, call)
            return []
        claimed = self.do(call)
        assert [(entry.id, entry.deliveries) for entry in claimed.entries] == [(item.id, item.count) for item in wanted]
        assert claimed.left == left
        leases = [self.model.jobs[item.job_id].lease if item.job_id in self.model.jobs else "" for item in wanted]
        assert [entry.replica for entry in claimed.entries] == leases
        heir.held += claimed.entries
        self.look(unchanged=lapsed in self.model.alive)
        return claimed.entries

    @step(3, lambda self: self._holds(), times=strategies.integers(1, 3))
    def change_hands(self, data: strategies.DataObject, times: int) -> None:
        """An entry is claimed, and claimed back; each earlier holder, in each delivery, tries to settle it.

        The first owner may own it again, in another delivery.
        """
        owner = self._player(data, holding=True)
        entry = data.draw(strategies.sampled_from(owner.held), "entry")
        others = [player for player in self.players if player.stage == owner.stage and player is not owner]
        other = data.draw(strategies.sampled_from(others), "other") if others else self._hire(owner.stage)
        holders = [owner, other, owner, other]
        late: list[tuple[Player, Entry]] = []
        for holder, heir in pairwise(holders[: times + 1]):
            late += [(holder, one) for one in holder.held if (one.stream, one.id) == (entry.stream, entry.id)]
            self._lapse(holder)
            self.look()
            self._renew(heir)
            self._claim(
                heir, entry.stream, holder.name, data.draw(strategies.sampled_from([1, 100]), "most"), idle=True
            )
        for holder, one in late:
            if holder.stage == "llm":
                self._move(holder, one, list(SLOTS))
            self._settle(data, holder, [one])

    # --- letting go ------------------------------------------------------------------------------

    @step(7, lambda self: self._holds(), size=strategies.integers(1, 4), twice=seldom)
    def settle(self, data: strategies.DataObject, size: int, twice: bool) -> None:
        """A consumer settles what it believes to hold; *twice*: the reply was lost, and the batch is sent again."""
        player = self._player(data, holding=True)
        chosen = data.draw(strategies.permutations(player.held), "entries")[:size]
        self._settle(data, player, chosen, twice=twice)

    @step(
        3,
        lambda self: any(player.held or player.spent for player in [*self.players, *self.gone[-3:]]),
        size=strategies.integers(1, 2),
        own=booleans,
    )
    def settle_what_is_not_ones_own(self, data: strategies.DataObject, size: int, own: bool) -> None:
        """Entries of others, of the dead, or let go of before; alone, or together with one of one's *own*."""
        player = self._player(data)
        everybody = [one for one in [*self.players, *self.gone[-3:]] if one.stage == player.stage]
        known = [entry for one in everybody for entry in [*one.spent, *(one.held if one is not player else [])]]
        if known:
            wrong = strategies.lists(strategies.sampled_from(known), min_size=1, max_size=size, unique_by=id)
            chosen = data.draw(wrong, "wrong")
            there = {(entry.stream, entry.id) for entry in chosen}
            mates = [entry for entry in player.held if (entry.stream, entry.id) not in there]
            self._settle(data, player, chosen + mates[:1] * own)

    def _settle(
        self, data: strategies.DataObject, player: Player, entries: Sequence[Entry], *, twice: bool = False
    ) -> None:
        batch, start = [], []
        for entry in entries:
            settlement, jobs = self._settlement(data, entry)
            batch.append(settlement)
            start.append(jobs)
        for _ in range(1 + twice):
            self._send(player, batch, start)

    def _send(self, player: Player, batch: Sequence[Settlement], start: Sequence[Sequence[Job]]) -> list[str]:
        self.is_sound = False
        words = self.model.settle(player.stage, player.name, batch, start)
        player.hand.streams.dropped_letters = 0
        _same(list(self.do(player.hand.settle(*batch))), words)
        assert player.hand.streams.dropped_letters == self.model.dropped
        self.look(unchanged={*words} <= {"lost", "orphan"})
        for settlement, word in zip(batch, words, strict=True):
            if word != "orphan":
                player.let_go(settlement.entry)
        return words

    def _settlement(self, data: strategies.DataObject, entry: Entry) -> tuple[Settlement, list[Job]]:
        """Draw what is to become of an entry, and the jobs that begin with it."""
        text, vector = entry.data or b"", entry.vector or b""
        if not text.startswith(OURS):
            job_id = _job_id(entry) if data.draw(booleans, "with its id") else ""
            verb = data.draw(strategies.sampled_from(["bury", "release"]), "verb")
            if verb == "release":
                return Settlement(entry, job_id, "release", "", text, vector), []
            return _burial(entry, job_id, "default"), []
        job = decode(text)
        verbs = ["forward", "forward", "complete", "retry", "release", "bury"]
        if (
            job.flow == "batch"
        ):  # as its stage does: closed when nobody lives any more, or with its own job's violent end
            known = job.id in self.model.batches
            verbs = [*(["retry"] if known and self.model.has_living(job.id) else ["complete"]) * 4, "release", "bury"]
        verb = data.draw(strategies.sampled_from(verbs), "verb")
        start: list[Job] = []
        if verb in {"forward", "complete"}:
            count = data.draw(strategies.sampled_from([0, 0, 1, 2]), "start")
            start = [self._job(data, known=data.draw(seldom, "again")) for _ in range(count)]
        rows = [start_arguments(new) for new in start]
        match verb:
            case "forward":
                target = keys.stream(data.draw(strategies.sampled_from(WORKERS), "to"), job.priority)
                job.state["hops"] = job.state.get("hops", 0) + 1
                vector = data.draw(strategies.sampled_from([b"", b"\x00\xff\r\n"]), "vector")
                return Settlement(entry, job.id, "forward", target, job.encode(), vector, start=rows), start
            case "complete":
                return _completed(entry, job, rows), start
            case "retry":
                job.attempt += 1
                delay_ms = data.draw(strategies.sampled_from([0, FAR_MS]), "delay")
                return Settlement(entry, job.id, "retry", delay_ms, job.encode(), vector), start
            case "release":
                return Settlement(entry, job.id, "release", "", text, vector), start
        return _burial(entry, job.id, job.tenant), start

    @step(3, lambda self: any(_is_foreign(entry) for player in self.players for entry in player.held), twice=seldom)
    def adopt(self, data: strategies.DataObject, twice: bool) -> None:
        """Whoever holds a foreign entry puts a job of ours in its place; others try to, and some try too late."""
        pairs = [(one, entry) for one in self.players for entry in [*one.held, *one.spent] if _is_foreign(entry)]
        owner, entry = data.draw(strategies.sampled_from(pairs), "entry")
        player = self._player(data, owner.stage) if data.draw(seldom, "by another") else owner
        for _ in range(1 + twice):
            self._adopt(player, entry)

    def _adopt(self, player: Player, entry: Entry) -> str:
        body = orjson.loads(entry.data or b"")
        lifetimes = self.settings.lifetimes.model_dump()
        job = flows.adopt(player.stage, body | {"timeout_s": LONG_MS / 1000}, now_ms=_now_ms(), lifetimes=lifetimes)
        self.is_sound = False
        word = self.model.adopt(entry.stream, entry.id, entry.deliveries, player.name, job)
        _same(self.do(player.hand.streams.adopt(entry, job)), word)
        self.look(unchanged=word != "adopted")
        if word != "duplicate":
            player.let_go(entry)
        return word

    # --- time, people, misfortune ----------------------------------------------------------------

    @step(3, lambda self: self.ids, tenant=strategies.sampled_from([None, None, None, "default", "acme"]))
    def cancel(self, data: strategies.DataObject, tenant: str | None) -> None:
        """A client cancels a job, its own or another tenant's, at any time of its life; then it looks."""
        running = [job.id for job in self.model.jobs.values() if job.item is not None and job.item.owner]
        job_id = data.draw(strategies.sampled_from([*running * 2, *self.model.jobs, *self.ids]), "job")
        tenant = tenant or ("acme" if job_id.startswith("acme") else "default")
        self.is_sound = False
        word = self.model.cancel(job_id, tenant)
        _same(self.do(self.front.cancel(job_id, tenant)), word)
        self.look(unchanged=word in {"finished", "unknown"})
        found = self.do(self.front.look(job_id, tenant))
        if job_id in self.model.batches and job_id in self.model.jobs:
            return  # a batch that goes on, or is full and about to be closed
        match word:
            case "unknown":
                assert found is None
            case "cancelling":
                assert found == "running"
            case _:
                assert isinstance(found, Completion)

    @step(
        2,
        lambda self: any(job.item is None for job in self.model.jobs.values()),
        passes=booleans,
        most=strategies.sampled_from([100, 1, 2]),
    )
    def promote(self, data: strategies.DataObject, passes: bool, most: int) -> None:
        """What is due, or enters, goes onto its stream; with *passes*, time passes for one delayed job first."""
        delayed = [job.id for job in self.model.jobs.values() if job.is_delayed]
        if passes and delayed:
            self._let_pass(data.draw(strategies.sampled_from(delayed), "job"))
        self._promote(most)

    def _let_pass(self, job_id: str) -> None:
        """Time passes: a delayed job becomes due."""
        self.do(self.link.call("ZADD", keys.DELAYED, "XX", PAST, job_id))
        self.model.jobs[job_id].due = PAST
        self.look()

    def _promote(self, most: int = 100) -> None:
        self.is_sound = False
        entering = self.do(self.link.call("ZRANGE", keys.ENTERING, 0, 0))
        moved = self.model.promote(most, entering[0].decode() if entering else None)
        _, *found, more = self.do(self.link.run(scripts.PROMOTE, (), (most, "one", LONG_MS)))
        assert found == [moved, 0]
        self.do(self.link.call("DEL", keys.PROMOTING))
        self.look(unchanged=not moved and not more)

    @step(2, lambda self: self.model.jobs, passes=booleans)
    def expire(self, data: strategies.DataObject, passes: bool) -> None:
        """What is over and in nobody's living hands ends; with *passes*, time passes for one job first."""
        if passes:
            self._let_end(data.draw(strategies.sampled_from(list(self.model.jobs)), "job"))
        self._expire()

    def _let_end(self, job_id: str) -> None:
        """Time passes: a job's deadline lies in the past."""
        self.do(self.link.call("ZADD", keys.LIVE_INDEX, "XX", PAST, job_id))
        self.model.jobs[job_id].expires = PAST
        self.look()

    def _expire(self) -> None:
        self.is_sound = False
        ended = self.model.expire()
        ttl_ms = int(self.settings.worker.completion_ttl_s * 1000)
        args = (100, ttl_ms, MOST_LETTERS, int(self.settings.dead.max_age_s * 1000))
        assert tuple(self.do(self.link.run(scripts.EXPIRE, (), args))[1:]) == ended
        put_off = [job.id for job in self.model.jobs.values() if job.expires is None]
        self.look(unchanged=not put_off and not any(ended))
        for job_id in put_off:
            expires = self.model.jobs[job_id].expires
            assert expires is not None
            assert expires > _now_ms(), "looked at again later"
            self._let_end(job_id)

    @step(4, lambda self: self.model.batches)
    def gather(self, data: strategies.DataObject) -> None:
        """Somebody looks how the messages of a batch stand, and ends those that are lost."""
        self._gather(data.draw(strategies.sampled_from(list(self.model.batches)), "batch"))

    def _gather(self, batch_id: str) -> None:
        self.is_sound = False
        wanted = self.model.gather(batch_id)
        found = self.do(self.front.batches.gather(batch_id, 0, 100, close=True))
        assert wanted is not None
        assert found is not None
        verdict, is_cancelled, lost, states = wanted
        _same((found.verdict, found.is_cancelled, found.lost), (verdict, is_cancelled, lost))
        self.model.agree_on_members(found.members, states)
        self.look(unchanged=not lost)

    @step(1, lambda self: self._forgettable())
    def forget_by_hand(self, data: strategies.DataObject) -> None:
        """A stranger deletes the record of a message: nobody can end it any more but the batch."""
        job = data.draw(strategies.sampled_from(self._forgettable()), "message")
        self.do(self.link.call("DEL", keys.LIVE + job.id))
        self.do(self.link.call("ZREM", keys.LIVE_INDEX, job.id))
        self.model.forget(job)
        self.look()

    def _forgettable(self) -> list[Live]:
        return [job for job in self.model.jobs.values() if job.is_message and job.item is not None and not job.lease]

    @step(1, lambda self: any(self.model.streams.values()))
    def delete_by_hand(self, data: strategies.DataObject) -> None:
        """A stranger deletes an entry: its job ends by whoever holds it, or as lost."""
        found = [(s, item) for s, items in self.model.streams.items() for item in items if not item.deleted]
        if found:
            stream, item = found[data.draw(strategies.integers(0, len(found) - 1), "entry")]
            self.do(self.link.call("XDEL", stream, item.id))
            self.model.vanish(stream, item)
            self.look()

    @step(1, returns=booleans)
    def flush(self, data: strategies.DataObject, returns: bool) -> None:
        """Redis is emptied under everybody's hands: what they try afterwards is refused, and creates nothing."""
        if not data.draw(seldom, "really"):
            return
        self.do(self.link.call("FLUSHALL"))
        self.do(asyncio.sleep(0.002))  # entry ids are times: none may come a second time
        self.model = Model()
        self.look()
        for player in self.players:
            for entry in player.held[:1]:
                settlement, start = self._settlement(data, entry)
                assert self._send(player, [settlement], [start]) == ["lost"]
                if _is_foreign(entry):
                    assert self._adopt(player, entry) == "lost"
                if player.stage == "llm":
                    self._move(player, entry, list(SLOTS))
        assert not self.picture.exact
        if returns:
            self._open_gateway()
            for player in self.players:
                self._renew(player)

    # --- the end ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Drain what is left with one living hand per stage: every accepted job has one outcome, nothing is left."""
        try:
            if self.is_sound and self.players:
                self._drain()
        finally:
            for player in [*self.players, *self.gone]:
                self.do(player.hand.streams.close())
            self.do(self.link.call("FLUSHALL"))
            self.do(self.front.__aexit__(None, None, None))
            self.do(self.link.close())
            self.runner.close()

    def _drain(self) -> None:
        for player in self.players:
            self._lapse(player)
        self.gone += self.players
        self.players = []
        self.look()
        heirs = [self._hire(stage) for stage in STAGES]
        self.look()
        rounds = 0
        while self.model.jobs or any(self.model.streams.values()):
            rounds += 1
            assert rounds < 100, "nothing goes on"
            for job_id in [job.id for job in self.model.jobs.values() if job.is_delayed]:
                self._let_pass(job_id)
            self._promote()
            for heir in heirs:
                for stream, lapsed in sorted(self.model.lapsed(heir.stage)):
                    self._claim(heir, stream, lapsed, 100, idle=True)
                if heir.stage == "llm":
                    self._place(heir, [list(SLOTS)] * 4)
                else:
                    self._take(heir, 100)
                self._finish_all(heir)
            for job_id in [job.id for job in self.model.jobs.values() if job.item is not None and job.item.deleted]:
                self._let_end(job_id)
            self._expire()
        assert self.model.accepted <= self.model.outcomes.keys()
        for batch in self.model.batches.values():
            assert batch.status, "a batch was not closed"
            left = set(batch.members) - self.model.kept.keys()
            assert not left & self.model.accepted, "a message has no result"
        self.do(assert_nothing_is_left(self.link))

    def _finish_all(self, heir: Player) -> None:
        for entry in list(heir.held):
            if _is_foreign(entry) and self._adopt(heir, entry) != "duplicate":
                continue
            if (entry.data or b"").startswith(OURS):
                if heir.stage == "aggregator" and (batch_id := _job_id(entry)) in self.model.batches:
                    self._gather(batch_id)
                    if self.model.has_living(batch_id) and batch_id in self.model.jobs:
                        again = Settlement(entry, batch_id, "retry", 0, entry.data or b"", entry.vector or b"")
                        if self._send(heir, [again], [[]]) != ["orphan"]:
                            continue
                words = self._send(heir, [_completed(entry, decode(entry.data or b""))], [[]])
                if words != ["orphan"]:
                    continue
            assert self._send(heir, [_burial(entry, _job_id(entry), "default")], [[]]) == ["settled"]


def _same(found: object, wanted: object) -> None:
    assert found == wanted, f"Redis says {found}, the model {wanted}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _is_foreign(entry: Entry) -> bool:
    return (entry.data or b"").startswith(b'{"id"')


def _job_id(entry: Entry) -> str:
    text = entry.data or b""
    return str(orjson.loads(text)["id"]) if text.startswith(b"{") else ""


def _bytes(value: Argument) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _completed(entry: Entry, job: Job, rows: Sequence[Sequence[Argument]] = ()) -> Settlement:
    completion = Completion(job.id, "completed", tenant=job.tenant, result={"at": entry.id.decode()}, worker="hand")
    return Settlement(entry, job.id, "complete", completion.encode(), start=rows)


def _burial(entry: Entry, job_id: str, tenant: str) -> Settlement:
    letter = orjson.dumps({"reason": "test", "entry": entry.id.decode()})
    error = error_body("failed", "test", entry.id.decode())
    completion = Completion(job_id, "failed", tenant=tenant, error=error).encode() if job_id else b""
    return Settlement(entry, job_id, "bury", completion, letter)


@pytest.mark.timeout(3_600 if EXAMPLES else 900)
def test_any_order_of_operations_keeps_the_promises(redis_server: RedisServer) -> None:
    """Model and Redis agree after every step of every run, and every run can be drained."""
    profile = settings(
        settings.get_profile("steady"),
        max_examples=EXAMPLES or 70,
        stateful_step_count=50,
        derandomize=not EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    machine = partial(Machine, redis_server)
    run_state_machine_as_test(machine, settings=profile)  # type: ignore[arg-type]  # it takes what makes one, too
