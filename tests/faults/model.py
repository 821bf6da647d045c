"""What the scripts are meant to do, said a second time, without Redis: one method per script, one step each.

The model decides for itself what every call must answer and what must stand in Redis afterwards. It learns from Redis
only what nobody can know beforehand: entry ids, stamps, and instants that a script wrote; each of them once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson

from pipeline import keys
from pipeline.batches import Member
from pipeline.job import PRIORITIES, Job
from pipeline.streams import Settlement
from tests.faults.picture import Picture
from tests.rig import FIRST, SECOND, THIRD

STAGES: Final = ("encoder", "llm", "aggregator")
STREAMS: Final = {stage: [keys.stream(stage, priority) for priority in PRIORITIES] for stage in STAGES}
SLOTS: Final = {FIRST: 1, SECOND: 1, THIRD: 2}
REPLY: Final = keys.REPLY + "machine"
MOST_LETTERS: Final = 4
SUSPECT_FROM: Final = 2
PAST: Final = 1.0
"""A score in the past: so the machine says that time passes."""

_HEAD = re.compile(rb'\{"v":1,"id":"([^"]+)","accepted_us":(\d+),')


@dataclass(eq=False, slots=True)
class Text:
    """An envelope; of one that was just accepted only the tail is known, until it has been seen."""

    known: bytes | None
    job_id: str = ""
    tail: bytes = b""

    def learn(self, found: bytes) -> None:
        if self.known is None:
            head = _HEAD.match(found)
            assert head, found
            assert (head[1].decode(), found[head.end() :]) == (self.job_id, self.tail)
            self.known = found
        assert found == self.known

    @property
    def stamp(self) -> int:
        head = _HEAD.match(self.known or b"")
        assert head
        return int(head[2])


@dataclass(frozen=True, slots=True)
class LateLetter:
    """The dead letter of a batch whose own job was over before anybody gathered it: a script writes it."""

    job_id: str
    reason: str

    def seen_in(self, found: bytes) -> bytes:
        """Return the letter as it was *found*, once it is sure that it is this one."""
        letter = orjson.loads(found)
        assert (letter["job_id"], letter["reason"]) == (self.job_id, self.reason)
        return found


@dataclass(eq=False, slots=True)
class Item:
    """An entry on a stream. `owner` is "" until it is delivered; one that a stranger deleted stays in hand."""

    text: Text
    job_id: str
    """As scripts read it: "" when the entry does not begin as ours do."""
    vector: bytes = b""
    id: bytes = b""
    owner: str = ""
    count: int = 0
    deleted: bool = False


@dataclass(eq=False, slots=True)
class Live:
    """A job that was accepted and has no outcome yet. `item` is its one entry; None while it is delayed or `enters`."""

    id: str
    tenant: str
    stream: str
    item: Item | None
    deadline_ms: int
    expires: float | None
    """Its score in `job:live`; None: a second from now, to be learned."""
    body: Text | None = None
    vector: bytes = b""
    due: float | None = None
    """Its score in `job:delayed`; None: to be learned."""
    lease: str = ""
    is_running: bool = False
    is_cancelled: bool = False
    attempts: int | None = None
    reply: str = ""
    in_flight: str = ""
    idem: str = ""
    is_hurried: bool = False
    """Its due time was set to now."""
    batch: str = ""
    """The batch that it is a message of, or that it is the job of."""
    is_message: bool = False
    enters: bool = False
    """It was committed with its batch, and is neither on its stream nor among the delayed yet."""

    @property
    def is_delayed(self) -> bool:
        return self.item is None and not self.enters


@dataclass(eq=False, slots=True)
class Batch:
    """A batch that was accepted; `status` says how it was closed, "" while it is open.

    Attributes:
        asked: what history was told of it; rows: what history is told of its messages.
        ended: messages that were counted.
        entered: how many of its messages have entered; None: all of them.
        due_ms: of those that have not.
    """

    id: str
    tenant: str
    queue: str
    asked: bytes
    rows: list[bytes]
    members: list[str]
    created_ms: int
    closes_ms: int
    deadline_ms: int
    keep_ms: int
    ended: set[str] = field(default_factory=set)
    failed: int = 0
    cancelled: int = 0
    is_cancelled: bool = False
    status: str = ""
    closed_ms: bytes = b""
    entered: int | None = None
    due_ms: int = 0

    @property
    def verdict(self) -> str:
        if self.cancelled and (self.is_cancelled or self.cancelled == len(self.members)):
            return "cancelled"
        return "completed" if not self.failed and len(self.ended) == len(self.members) else "completed_with_errors"

    def fields(self) -> dict[str, bytes]:
        numbers = {
            "req.count": len(self.members), "res.count": len(self.ended), "failed.count": self.failed,
            "cancelled.count": self.cancelled, "created_ms": self.created_ms, "closes_ms": self.closes_ms,
            "keep_ms": self.keep_ms, "deadline_ms": self.deadline_ms,
        }  # fmt: skip
        if self.entered is not None:
            numbers |= {"entered": self.entered, "due_ms": self.due_ms}
        texts = {"status": self.status or "pending", "tenant": self.tenant, "queue": self.queue}
        texts |= {"cancel": "1"} if self.is_cancelled else {}
        found = {name: str(value).encode() for name, value in (numbers | texts).items()} | {"asked": self.asked}
        return found | ({"closed_ms": self.closed_ms} if self.status else {})


@dataclass(eq=False, slots=True)
class Kept:
    """The result of a message: its outcome and its batch. That of a lost one has no other place, and is learned."""

    batch: str
    outcome: Outcome

    def learn(self, job_id: str, found: bytes) -> None:
        outcome, _, batch = found.rpartition(b',"batch_id":')
        assert batch == b'"%b"}' % self.batch.encode()
        self.outcome.learn(job_id, outcome + b"}")


@dataclass(eq=False, slots=True)
class Outcome:
    """How a job ended; of one that a script ended the text is learned."""

    status: str
    tenant: str
    code: str | None = None
    attempts: int = 0
    text: bytes | None = None

    def learn(self, job_id: str, found: bytes) -> None:
        body = orjson.loads(found)
        code = (body["error"] or {}).get("code")
        assert (body["id"], body["status"], body["tenant"], code) == (job_id, self.status, self.tenant, self.code)
        if self.text is None:
            assert (body["result"], body["worker"], body["attempts"]) == (None, None, self.attempts)
            self.text = found
        assert found == self.text, "an outcome has changed"


@dataclass(eq=False, slots=True)
class Promise:
    """What an idempotency key stands for."""

    body_hash: str
    job_id: str
    outcome: Outcome | None = None

    def fields(self) -> dict[str, bytes]:
        found = {"hash": self.body_hash.encode(), "job": self.job_id.encode()}
        if self.outcome is not None:
            found["outcome"] = self.outcome.text or b""
        return found


@dataclass(frozen=True, slots=True)
class BatchSubmission:
    """One batch as its script takes it: its record, and the jobs that begin with it."""

    batch: Batch
    members: Sequence[Job]
    job: Job
    due_ms: int = 0
    limit: int | None = None
    idem: str = ""
    body_hash: str = ""
    is_large: bool = False


@dataclass(frozen=True, slots=True)
class Submission:
    """One job as the submit script takes it; `due_ms` 0: now, `limit` None: the tenant may have any number."""

    job: Job
    leases: bool = False
    due_ms: int = 0
    reply: str = REPLY
    limit: int | None = None
    idem: str = ""
    body_hash: str = ""


class GroupGone(Exception):
    """The scripts that read need their group."""


@dataclass
class Model:
    """Redis as it should be."""

    streams: dict[str, list[Item]] = field(default_factory=lambda: {s: [] for names in STREAMS.values() for s in names})
    groups: set[str] = field(default_factory=set)
    jobs: dict[str, Live] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    letters: list[bytes | LateLetter] = field(default_factory=list)
    promises: dict[str, Promise] = field(default_factory=dict)
    replies: list[str] | None = None
    """Ids of ended jobs that the gateway was told; None: the gateway is gone."""
    alive: set[str] = field(default_factory=set)
    """Consumers that have a lease."""
    newborn: list[Text] = field(default_factory=list)
    last_stamp: int = 0
    batches: dict[str, Batch] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    events: list[tuple[str, str, str, int]] = field(default_factory=list)
    """What history was told: kind, id, tenant, rank."""
    dropped: int = 0
    """Dead letters that the last settle had to drop."""

    # --- small words ---------------------------------------------------------------------------

    def find(self, stream: str, entry: bytes) -> Item | None:
        return next((item for item in self.streams[stream] if item.id == entry), None)

    def pending(self, stream: str, entry: bytes) -> tuple[str, int] | None:
        item = self.find(stream, entry)
        return (item.owner, item.count) if item and item.owner else None

    def leases(self, url: str) -> set[str]:
        return {job.id for job in self.jobs.values() if job.lease == url}

    def running(self, url: str) -> set[str]:
        return {job.id for job in self.jobs.values() if job.lease == url and job.is_running}

    def is_taken(self, job_id: str) -> bool:
        """An id is alive while its live record or its completion exists."""
        return job_id in self.jobs or job_id in self.outcomes

    def in_hand(self, consumer: str, stream: str) -> dict[bytes, int]:
        return {item.id: item.count for item in self.streams[stream] if item.owner == consumer}

    def add(self, stream: str, text: Text, job_id: str, vector: bytes = b"") -> Item:
        item = Item(text, job_id, vector)
        self.streams[stream].append(item)
        return item

    def remove(self, stream: str, item: Item) -> None:
        self.streams[stream].remove(item)
        item.owner = ""

    def unlease(self, job: Live) -> None:
        job.lease, job.is_running = "", False

    def accept(self, job: Job, due_ms: float = 0, *, enters: bool = False) -> Live:
        assert not self.is_taken(job.id), "an id was accepted twice"
        stage, tail = job.launch()
        text = Text(None, job.id, tail)
        self.newborn.append(text)
        stream = keys.stream(stage, job.priority)
        live = Live(job.id, job.tenant, stream, None, job.deadline_ms, job.deadline_ms)
        if enters:
            live.body, live.enters = text, True
        elif due_ms:
            live.body, live.due = text, due_ms
        else:
            live.item = self.add(stream, text, job.id)
        self.jobs[job.id] = live
        self.accepted.add(job.id)
        return live

    def finish(self, job: Live, outcome: Outcome) -> None:
        assert job.id not in self.outcomes, "a second outcome"
        self.outcomes[job.id] = outcome
        del self.jobs[job.id]
        if job.idem:
            self.promises[job.idem].outcome = outcome
        if job.reply and self.replies is not None:
            self.replies.append(job.id)
        if job.is_message:
            self.count_member(job.id, job.batch, outcome)
            self.events.append(("message", job.id, job.tenant, 10))
        elif job.batch:
            self.close_batch(self.batches[job.batch])

    def count_member(self, job_id: str, batch_id: str, outcome: Outcome) -> None:
        """Keep a result and count it once; the last one makes the batch's own job due."""
        batch = self.batches[batch_id]
        self.kept[job_id] = Kept(batch_id, outcome)
        if batch.status or job_id in batch.ended:
            return
        batch.ended.add(job_id)
        batch.failed += outcome.status != "completed"
        batch.cancelled += outcome.status == "cancelled"
        if len(batch.ended) == len(batch.members):
            self.hurry(batch_id)

    def hurry(self, batch_id: str) -> None:
        job = self.jobs.get(batch_id)
        if job is not None and job.item is None:
            job.due, job.is_hurried = None, True  # now, to be learned

    def close_batch(self, batch: Batch) -> None:
        assert not batch.status, "a batch was closed twice"
        batch.status = batch.verdict
        self.events.append(("batch", batch.id, batch.tenant, 10))

    def end_waiting(self, job: Live, status: str, code: str) -> None:
        """End a job by script: its entry goes, the script writes the outcome."""
        if job.item is not None and not job.item.deleted:
            self.remove(job.stream, job.item)
        self.finish(job, Outcome(status, job.tenant, code, job.attempts or 0))

    # --- accepting -----------------------------------------------------------------------------

    def submit(self, batch: Sequence[Submission], candidates: Sequence[str], most: int) -> list[tuple[str, str]]:
        return [self._submit(submission, candidates, most) for submission in batch]

    def _submit(self, new: Submission, candidates: Sequence[str], most: int) -> tuple[str, str]:
        job = new.job
        promise = self.promises.get(new.idem)
        if promise is not None:
            if promise.body_hash != new.body_hash:
                return "mismatch", promise.job_id
            return "accepted" if promise.job_id == job.id else "repeated", promise.job_id
        if self.is_taken(job.id):
            return "accepted", job.id
        if len(self.jobs) >= most:
            return "overloaded", job.id
        in_flight = keys.IN_FLIGHT + job.tenant if new.limit is not None else ""
        if new.limit is not None and sum(one.in_flight == in_flight for one in self.jobs.values()) >= new.limit:
            return "in_flight", job.id
        url = min(candidates, key=lambda url: len(self.leases(url)), default="") if new.leases else ""
        live = self.accept(job, new.due_ms)
        live.reply, live.in_flight, live.idem, live.lease = new.reply, in_flight, new.idem, url
        if new.idem:
            self.promises[new.idem] = Promise(new.body_hash, job.id)
        return "accepted", job.id

    def submit_batch(self, new: BatchSubmission, most: int) -> tuple[str, str]:
        batch = new.batch
        if batch.id in self.batches:
            return "accepted", batch.id
        promise = self.promises.get(new.idem)
        if promise is not None:
            return "repeated" if promise.body_hash == new.body_hash else "mismatch", promise.job_id
        if len(self.jobs) + len(batch.members) + 1 > most:
            return "overloaded", batch.id
        in_flight = keys.IN_FLIGHT + batch.tenant if new.limit is not None else ""
        if new.limit is not None and sum(one.in_flight == in_flight for one in self.jobs.values()) >= new.limit:
            return "in_flight", batch.id
        for place, job in enumerate(new.members):  # one thousandth of a millisecond apart: they begin in this order
            due_ms = round(new.due_ms + place / 1000, 3) if new.due_ms else 0
            live = self.accept(job, due_ms, enters=new.is_large)
            live.batch, live.is_message = batch.id, True
        own = self.accept(new.job, batch.closes_ms)
        own.in_flight, own.idem, own.batch = in_flight, new.idem, batch.id
        if new.idem:
            self.promises[new.idem] = Promise(new.body_hash, batch.id)
        self.batches[batch.id] = batch
        if new.is_large:
            batch.entered, batch.due_ms = 0, new.due_ms
        self.events.append(("batch", batch.id, batch.tenant, 0))
        return "accepted", batch.id

    def gather(self, batch_id: str) -> tuple[str, bool, int, list[tuple[str, str]]] | None:
        """Return how a batch would be closed, whether it is to be cancelled, how many are lost, and all states."""
        batch, lost = self.batches.get(batch_id), 0
        if batch is None:
            return None
        states = []
        for member in batch.members:
            state = self.state_of(member)
            if state == "lost":
                lost += 1
                outcome = Outcome("failed", batch.tenant, "lost")
                self.count_member(member, batch_id, outcome)
                self.events.append(("message", member, batch.tenant, 10))
            states.append((member, state))
        return batch.verdict, batch.is_cancelled, lost, states

    def state_of(self, member: str) -> str:
        job = self.jobs.get(member)
        if member in self.kept:
            return "ended"
        if job is None:
            return "lost"
        return "running" if job.item is not None and job.item.owner else "queued"

    def has_living(self, batch_id: str) -> bool:
        """Say whether a message of the batch may still end."""
        return any(self.state_of(member) in {"queued", "running"} for member in self.batches[batch_id].members)

    def agree_on_members(self, members: Sequence[Member], states: Sequence[tuple[str, str]]) -> None:
        """Compare what `gather` answered."""
        assert [(member.id, member.state) for member in members] == list(states)
        for member in members:
            kept = self.kept.get(member.id)
            assert bool(member.text) == (kept is not None)
            if kept is not None:
                kept.learn(member.id, member.text)

    def forget(self, job: Live) -> None:
        """A stranger deletes all that there is of a message but its entry."""
        del self.jobs[job.id]
        self.accepted.discard(job.id)

    def adopt(self, stream: str, entry: bytes, deliveries: int, consumer: str, job: Job) -> str:
        item = self.find(stream, entry)
        if item is None or (item.owner, item.count) != (consumer, deliveries):
            return "lost"
        if self.is_taken(job.id):
            return "duplicate"
        self.remove(stream, item)
        self.accept(job)
        return "adopted"

    # --- reading -------------------------------------------------------------------------------

    def read(self, stream: str, most: int, consumer: str) -> list[tuple[str, Item]]:
        found = [item for item in self.streams[stream] if not item.owner][: max(0, most)]
        for item in found:
            item.owner, item.count = consumer, 1
        return [(stream, item) for item in found]

    def take(self, stage: str, consumer: str, most: int, owed: Sequence[int]) -> list[tuple[str, Item]]:
        if stage not in self.groups:
            raise GroupGone
        found: list[tuple[str, Item]] = []
        for shares in (owed, [most] * 3):
            for stream, share in zip(STREAMS[stage], shares, strict=True):
                found += self.read(stream, min(share, most - len(found)), consumer)
        return found

    def place(
        self, consumer: str, slots: dict[str, int], orders: Sequence[Sequence[str]], owed: Sequence[int]
    ) -> list[tuple[str, Item, str]]:
        """Read one entry per order, each with its replica: the first of the order that has a free slot."""
        if "llm" not in self.groups and orders:
            raise GroupGone
        free = {url: most - len(self.running(url)) for url, most in slots.items()}
        found = []
        for order, number in zip(orders, owed, strict=True):
            url = next((url for url in order if free[url] > 0), "")
            names = STREAMS["llm"]
            first = [names[number - 1], *names]
            entry = next((read[0] for name in first if (read := self.read(name, 1, consumer))), None) if url else None
            if entry is None:
                break
            stream, item = entry
            job = self.jobs.get(item.job_id)
            if job is not None and job.item is item:
                job.lease, job.is_running = url, True
                free[url] -= 1
                found.append((stream, item, url))
            else:
                found.append((stream, item, ""))
        return found

    # --- taking over ---------------------------------------------------------------------------

    def claim(
        self, stage: str, stream: str, lapsed: str, heir: str, most: int, *, idle: bool
    ) -> tuple[list[Item], int]:
        """Give entries of a consumer without lease to its heir; returns them, and how many it leaves behind."""
        if lapsed in self.alive:
            return [], 0
        if stage not in self.groups:
            raise GroupGone
        held = [item for item in self.streams[stream] if item.owner == lapsed]
        innocent = [item for item in held if item.count < SUSPECT_FROM]
        chosen = innocent[:most] or ([] if innocent or not idle else held[:1])
        found = []
        for item in chosen:
            if item.deleted:
                self.remove(stream, item)  # Redis notices, and forgets that it was pending
            else:
                item.owner, item.count = heir, item.count + 1
                found.append(item)
        return found, len(held) - len(chosen)

    def lapsed(self, stage: str) -> set[tuple[str, str]]:
        """Return those without a lease who hold something: nobody else has to be found."""
        return {
            (stream, item.owner)
            for stream in STREAMS[stage]
            for item in self.streams[stream]
            if item.owner and item.owner not in self.alive
        }

    # --- letting go ----------------------------------------------------------------------------

    def settle(
        self, stage: str, consumer: str, batch: Sequence[Settlement], start: Sequence[Sequence[Job]]
    ) -> list[str]:
        """Let go of entries. Who may is decided for all of them before the first one is."""
        self.dropped = 0
        checked = []
        for one in batch:
            item = self.find(one.entry.stream, one.entry.id)
            owned = item is not None and (item.owner, item.count) == (consumer, one.entry.deliveries)
            job = self.jobs.get(one.job_id)
            checked.append((item if owned else None, job if job is not None and job.item is item else None))
        return [
            self._settle(stage, one, item, job, jobs) if item is not None else "lost"
            for one, (item, job), jobs in zip(batch, checked, start, strict=True)
        ]

    def _settle(self, stage: str, one: Settlement, item: Item, job: Live | None, start: Sequence[Job]) -> str:
        stream = one.entry.stream
        if one.verb == "bury":
            self.remove(stream, item)
            self.letters.append(_bytes(one.b))
            self.dropped += max(0, len(self.letters) - MOST_LETTERS)
            del self.letters[:-MOST_LETTERS]
            told = Outcome("failed", _tenant(_bytes(one.a)), "test", text=_bytes(one.a)) if one.a else None
            if job is not None and told is not None:
                self.finish(job, told)
            elif told is not None and not self.is_taken(one.job_id):
                self.outcomes[one.job_id] = told
            return "settled"
        if job is None:
            return "orphan"
        self.remove(stream, item)
        if job.is_cancelled and one.verb != "complete":
            self.finish(job, Outcome("cancelled", job.tenant, "cancelled", job.attempts or 0))
            return "cancelled"
        match one.verb:
            case "forward":
                if stage == "llm":
                    self.unlease(job)
                job.attempts = None
                job.stream = str(one.a)
                job.item = self.add(job.stream, Text(_bytes(one.b)), job.id, _bytes(one.c))
            case "complete":
                self.finish(job, Outcome("completed", job.tenant, text=_bytes(one.a)))
            case "retry":
                self.unlease(job)
                job.attempts = int(orjson.loads(_bytes(one.b))["attempt"]) - 1
                job.stream, job.item, job.body, job.vector = stream, None, Text(_bytes(one.b)), _bytes(one.c)
                job.due = None
            case "release":
                self.unlease(job)
                job.attempts = int(orjson.loads(_bytes(one.b))["attempt"]) - 1
                job.item = self.add(stream, Text(_bytes(one.b)), job.id, _bytes(one.c))
        for new in start:
            if not self.is_taken(new.id):
                self.accept(new)
        return "settled"

    def move(
        self, stream: str, entry: bytes, deliveries: int, consumer: str, job_id: str, order: Iterable[tuple[str, int]]
    ) -> str:
        job = self.jobs.get(job_id)
        if job is None or job.item is None or job.item.id != entry:
            return "lost"
        if self.pending(stream, entry) != (consumer, deliveries):
            return "lost"
        self.unlease(job)
        for url, slots in order:
            if len(self.running(url)) < slots:
                job.lease, job.is_running = url, True
                return url
        return "none"

    # --- time and people -----------------------------------------------------------------------

    def cancel(self, job_id: str, tenant: str) -> str:
        job, outcome = self.jobs.get(job_id), self.outcomes.get(job_id)
        if job is None:
            return "finished" if outcome is not None and outcome.tenant == tenant else "unknown"
        if job.tenant != tenant:
            return "unknown"
        if job.batch and not job.is_message:
            batch = self.batches[job.batch]
            if len(batch.ended) >= len(batch.members):
                return "finished"
            batch.is_cancelled = True
            self.hurry(batch.id)
            return "cancelling"
        if job.item is not None and job.item.owner:
            job.is_cancelled = True
            return "cancelling"
        self.end_waiting(job, "cancelled", "cancelled")
        return "cancelled"

    def promote(self, most: int, batch_id: str | None) -> int:
        """What is due goes onto its stream, then messages of the batch that enters; returns how many did."""
        delayed = [job for job in self.jobs.values() if job.is_delayed]
        due = sorted((job.due or 0.0, job.id) for job in delayed if _is_past(job.due))[:most]
        for _, job_id in due:
            self._onto_stream(self.jobs[job_id])
        if batch_id is None or len(due) == most:
            return len(due)
        return len(due) + self._enter(self.batches[batch_id], most - len(due))

    def _onto_stream(self, job: Live) -> None:
        assert job.body is not None
        job.item = self.add(job.stream, job.body, job.id, job.vector)
        job.body, job.vector, job.due, job.enters = None, b"", None, False

    def _enter(self, batch: Batch, most: int) -> int:
        assert batch.entered is not None
        first, moved = batch.entered, 0
        some = batch.members[first : first + most]
        for place, member in enumerate(some, first):
            job = self.jobs.get(member)
            if job is None or not job.enters:
                continue
            if batch.due_ms:
                job.enters, job.due = False, round(batch.due_ms + place / 1000, 3)
            else:
                self._onto_stream(job)
                moved += 1
        batch.entered = first + most if len(some) == most else None
        return moved

    def expire(self) -> tuple[int, int]:
        """End what is over and in nobody's living hands; returns how many expired, how many were lost."""
        words = {"expired": 0, "lost": 0}
        for _, job_id in sorted((job.expires or 0.0, job.id) for job in self.jobs.values() if _is_past(job.expires)):
            job = self.jobs[job_id]
            if job.item is not None and job.item.owner in self.alive:
                job.expires = None  # looked at again in a second
            elif job.item is not None and job.item.deleted:
                self.bury_late(job, "lost")
                self.end_waiting(job, "failed", "lost")
                words["lost"] += 1
            else:
                self.bury_late(job, "deadline_exceeded")
                self.end_waiting(job, "expired", "deadline_exceeded")
                words["expired"] += 1
        return words["expired"], words["lost"]

    def bury_late(self, job: Live, reason: str) -> None:
        """A batch that nobody gathered in its time is a dead letter, too: its webhook was to follow."""
        if job.batch and not job.is_message:
            self.letters = [*self.letters, LateLetter(job.id, reason)][-MOST_LETTERS:]

    def write(self, stream: str, text: bytes, job_id: str) -> None:
        """A stranger adds an entry."""
        self.add(stream, Text(text), job_id)

    def vanish(self, stream: str, item: Item) -> None:
        """A stranger deletes an entry; the group still counts it where it was delivered."""
        item.deleted = True
        if not item.owner:
            self.remove(stream, item)

    # --- comparing -----------------------------------------------------------------------------

    def agree(self, picture: Picture) -> None:
        """Compare with what stands in Redis, and learn what could not be known.

        Raises:
            AssertionError: they differ.
        """
        self._agree_on_streams(picture)
        self._agree_on_jobs(picture)
        found = picture.under(keys.COMPLETION, picture.strings)
        assert set(found) == set(self.outcomes)
        for job_id, outcome in self.outcomes.items():
            outcome.learn(job_id, found[job_id])
        self._agree_on_batches(picture)
        self._agree_on_replicas(picture)
        for text in self.newborn:
            assert text.stamp > self.last_stamp, "stamps must rise in the order of acceptance"
            self.last_stamp = text.stamp
        self.newborn.clear()
        assert int(picture.strings.get(keys.STAMP, b"0")) == self.last_stamp
        promises = picture.under(keys.IDEMPOTENCY, picture.hashes)
        assert promises == {name: promise.fields() for name, promise in self.promises.items()}
        assert set(picture.under(keys.WORKER, picture.strings)) == self.alive
        self._agree_on_strangers(picture)

    def _agree_on_streams(self, picture: Picture) -> None:
        for name, items in self.streams.items():
            found = picture.streams.get(name, [])
            there = [item for item in items if not item.deleted]
            assert len(found) == len(there), f"{name} should hold {len(there)} entries and holds {found}"
            for item, (entry, fields) in zip(there, found, strict=True):
                item.id = item.id or entry
                assert item.id == entry
                item.text.learn(fields["data"])
                assert fields.get("vector", b"") == item.vector
                assert fields.keys() <= {"data", "vector"}
            held = {item.id: (item.owner, item.count) for item in items if item.owner}
            assert picture.pending.get(name, {}) == held
        letters = [fields["data"] for _, fields in picture.streams.get(keys.DEAD, [])]
        for letter, text in zip(self.letters, letters, strict=True):
            assert (letter if isinstance(letter, bytes) else letter.seen_in(text)) == text
        self.letters = [*letters]
        told = [job_id.decode() for job_id in picture.names.get(REPLY, [])[1:]]  # the first one opened the stream
        assert told == (self.replies or []), "every ended job is told once"
        assert (REPLY in picture.streams) == (self.replies is not None), "a dead gateway's stream is not revived"

    def _agree_on_jobs(self, picture: Picture) -> None:
        records = picture.under(keys.LIVE, picture.hashes)
        assert set(records) == set(self.jobs)
        for job in self.jobs.values():
            record = records[job.id]
            if job.body is not None:
                job.body.learn(record["body"])
            assert record == _fields(job)
        expires = picture.zsets.get(keys.LIVE_INDEX, {})
        assert set(expires) == set(self.jobs)
        due = picture.zsets.get(keys.DELAYED, {})
        assert set(due) == {job.id for job in self.jobs.values() if job.is_delayed}
        for job in self.jobs.values():
            job.expires = expires[job.id] if job.expires is None else job.expires
            assert expires[job.id] == job.expires
            if job.is_delayed:
                job.due = due[job.id] if job.due is None else job.due
                assert due[job.id] == job.due
                assert not job.is_hurried or _is_past(job.due), "due now, and not only some day"
                job.is_hurried = False

    def _agree_on_replicas(self, picture: Picture) -> None:
        for url in SLOTS:
            assert set(picture.zsets.get(keys.LEASES + url, {})) == self.leases(url)
            assert set(picture.zsets.get(keys.RUNNING + url, {})) == self.running(url)
            assert int(picture.strings.get(keys.LOAD + url, b"0")) == len(self.leases(url))
        members: dict[str, set[str]] = {}
        for job in self.jobs.values():
            if job.in_flight:
                members.setdefault(job.in_flight, set()).add(job.id)
        found = {name: value for name, value in picture.sets.items() if not name.startswith(keys.BATCH_DONE)}
        assert found == members

    def _agree_on_batches(self, picture: Picture) -> None:
        """Records, members, counts, results and what history is told; a life only for what is closed."""
        hashes = {name: value for name, value in picture.under(keys.BATCH, picture.hashes).items() if ":" not in name}
        assert set(hashes) == set(self.batches)
        for batch in self.batches.values():
            found = hashes[batch.id]
            if batch.status and not batch.closed_ms:
                batch.closed_ms = found["closed_ms"]
            assert found == batch.fields()
            assert picture.lists[keys.BATCH_MEMBERS + batch.id] == [member.encode() for member in batch.members]
            assert picture.lists[keys.ROWS + batch.id] == batch.rows
            assert picture.sets.get(keys.BATCH_DONE + batch.id, set()) == batch.ended
            for prefix in (keys.BATCH, keys.BATCH_MEMBERS, keys.BATCH_DONE):
                name = prefix + batch.id
                assert name not in picture.ttls or (picture.ttls[name] > 0) == bool(batch.status), name
        entering = {batch.id for batch in self.batches.values() if batch.entered is not None}
        assert set(picture.zsets.get(keys.ENTERING, {})) == entering
        kept = picture.under(keys.MESSAGE, picture.strings)
        assert set(kept) == set(self.kept)
        for message_id, result in self.kept.items():
            result.learn(message_id, kept[message_id])
            assert picture.ttls[keys.MESSAGE + message_id] > 0
        told = [
            (fields["kind"].decode(), fields["id"].decode(), fields["tenant"].decode(), int(fields["rank"]))
            for _, fields in picture.streams.get(keys.EVENTS, [])
        ]
        assert told == self.events, "history is told of everything once, in order"

    def _agree_on_strangers(self, picture: Picture) -> None:
        """No key but those that were compared."""
        families: tuple[str, ...] = (keys.COMPLETION, keys.LIVE, keys.IDEMPOTENCY, keys.WORKER, keys.IN_FLIGHT)
        families += (keys.BATCH, keys.MESSAGE, keys.ROWS)
        single = {keys.EVENTS, keys.DEAD, keys.DELAYED, keys.LIVE_INDEX, keys.STAMP, keys.WORKERS, REPLY, *self.streams}
        single.add(keys.ENTERING)
        single |= {family + url for family in (keys.LOAD, keys.LEASES, keys.RUNNING) for url in SLOTS}
        assert {name for name in picture.exact if not name.startswith(families)} <= single


def _fields(job: Live) -> dict[str, bytes]:
    """Return the live record as it should stand."""
    wanted = {
        "stream": job.stream.encode(),
        "entry": job.item.id if job.item else b"",
        "tenant": job.tenant.encode(),
        "deadline": str(job.deadline_ms).encode(),
    }
    if job.body is not None:
        wanted |= {"body": job.body.known or b"", "vector": job.vector}
    if job.attempts is not None:
        wanted["attempts"] = str(job.attempts).encode()
    if job.is_cancelled:
        wanted["cancel"] = b"1"
    optional = {
        "lease": job.lease,
        "reply": job.reply,
        "in_flight": job.in_flight,
        "idem": keys.IDEMPOTENCY + job.idem if job.idem else "",
        "record": f"message {job.batch}" if job.is_message else "batch" if job.batch else "",
    }
    return wanted | {name: value.encode() for name, value in optional.items() if value}


def _is_past(score: float | None) -> bool:
    return score is not None and score <= time.time() * 1000


def _tenant(completion: bytes) -> str:
    return str(orjson.loads(completion)["tenant"])


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
