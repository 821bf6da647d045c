"""Chats under any order of what people do and what befalls processes: each message has one end, in order, from one run.

Hypothesis draws the steps: people speak, repeat themselves, type, clear, change the persona; strangers put things into
queues; three workers take runs, work, let go of them, crash, freeze and come back; locks, queues and runs lapse. The
stage is the real one, and so are the scripts; only the model is made up: it answers with what it was asked, so that a
reply tells which messages it read. After every step what must hold is looked at; at the end one living worker drains
what is left.

`TEST_MACHINE_EXAMPLES=2000` explores at random, for as long as that takes.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, TypeVar, cast

import orjson
import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from pipeline import connection, keys, scripts
from pipeline.chats import Chats, Message, Persona
from pipeline.clock import Clock, monotonic_us
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.job import Completion, Done, Job, decode, error_body
from pipeline.outcomes import completed
from pipeline.stage import Context
from pipeline.streams import Entry, Settlement
from stages.chat import STATE_PROMPT, Chat
from tests.conftest import short_settings, unbounded_keys
from tests.rig import Hand, assert_nothing_is_left, changed
from tests.servers import RedisServer

T = TypeVar("T")
Json = dict[str, Any]

EXAMPLES: Final = int(os.environ.get("TEST_MACHINE_EXAMPLES", "0"))
"""0: as many as a test run can wait for, the same ones every time."""
STEPS_EACH: Final = 40
CHATS: Final = ("a", "b")
STAGES: Final = ("chat", "llm")
WORKERS: Final = 3
FAR_MS: Final = 600_000
STRANGE: Final = (b"hello", b'{"message_id":"z","text":"z","at_ms":1}', b'{"message_id":"m1",broken,"at_ms":1}')
PATIENCE_S: Final = 60.0

PICTURE: Final = f"""
local chat, runs = ARGV[1], {{}}
for _, run in ipairs(redis.call('ZRANGE', '{keys.LIVE_INDEX}', 0, -1)) do
  if redis.call('HGET', '{keys.LIVE}' .. run, 'record') == 'chat ' .. chat then runs[#runs + 1] = run end
end
return {{
  redis.call('LRANGE', '{keys.CHAT_QUEUE}' .. chat, 0, -1), redis.call('HKEYS', '{keys.CHAT_OPEN}' .. chat),
  redis.call('XRANGE', '{keys.CHAT_EVENTS}' .. chat, '-', '+'), redis.call('GET', '{keys.CHAT_LOCK}' .. chat),
  redis.call('LRANGE', '{keys.CHAT_TURNS}' .. chat, 0, -1), redis.call('XRANGE', '{keys.EVENTS}', '-', '+'), runs,
}}
"""
"""All that is known of a chat, at one moment."""

some = strategies.data()


@dataclass(eq=False)
class Held:
    """An entry that a worker believes to hold, and what is to become of it once it was worked on."""

    entry: Entry
    settlement: Settlement | None = None


class Worker:
    """A process with both stages; `held` is what it believes."""

    def __init__(self, name: str, machine: Machine) -> None:
        self.name = name
        self.held: list[Held] = []
        self.hands = {stage: Hand(machine.settings, name, stage) for stage in STAGES}
        self.is_alive = True

    def __repr__(self) -> str:
        return self.name


@dataclass
class Talk:
    """What is known of one chat: messages in the order in which they were accepted, and how often it was cleared."""

    said: list[str] = field(default_factory=list)
    eras: dict[str, int] = field(default_factory=dict)
    era: int = 0


WEIGHTS: Final[dict[str, int]] = {}


def step(weight: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter a method among the steps; work comes more often than misfortune."""

    def enter(method: Callable[..., None]) -> Callable[..., None]:
        WEIGHTS[method.__name__] = weight
        return method

    return enter


class Machine(RuleBasedStateMachine):
    """Each step does the real thing; then every promise is looked at."""

    def __init__(self, server: RedisServer) -> None:
        super().__init__()
        self.settings = changed(
            short_settings(server),
            chats={"single_ms": 0, "quiet_ms": 0, "max_wait_ms": 0, "max_batch": 3},
            redis={"connect_timeout_s": PATIENCE_S, "reply_timeout_s": PATIENCE_S},
        )
        self.runner = asyncio.Runner()
        self.link = Link(self.settings.redis, "machine")
        self.clock = Clock()
        self.chats = Chats(Link(self.settings.redis, "chats"), self.settings, self.clock)
        self.front = Front(self.settings, "machine")  # never entered: it only cancels
        self.stage = Chat(self.settings)
        self.workers: list[Worker] = []
        self.gone: list[Worker] = []
        self.talks = {chat: Talk() for chat in CHATS}
        self.count = 0
        self.runs: dict[int, str] = {}  # those that live, numbered as they were seen
        self.numbers = 0
        self.is_sound = True

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    @initialize()
    def begin(self) -> None:
        """An empty Redis, three workers, a persona that is interrupted."""
        self.do(self._begin())

    async def _begin(self) -> None:
        await self.link.call("FLUSHALL")
        sent_us = monotonic_us()
        self.clock.observe(await self.link.time_us(), sent_us)
        await self.stage.start(cast("Context", SimpleNamespace(chats=self.chats, clock=self.clock)))
        await self.chats.set_persona("default", "hasty", Persona(policy="interrupt"))
        for _ in range(WORKERS):
            await self._hire()

    async def _hire(self) -> Worker:
        self.count += 1
        worker = Worker(f"worker-{self.count}", self)
        for hand in worker.hands.values():
            await hand.streams.ensure_groups()
        await worker.hands["chat"].live(FAR_MS)
        self.workers.append(worker)
        return worker

    @rule(data=some)
    def go_on(self, data: strategies.DataObject) -> None:
        """One step of any kind, and a look at everything."""
        names = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
        name = data.draw(strategies.sampled_from(names), "step")
        self.is_sound = False
        getattr(self, name)(data)
        self.do(self._look())
        self.is_sound = True

    # --- people ----------------------------------------------------------------------------------

    @step(8)
    def say(self, data: strategies.DataObject) -> None:
        """Somebody says something new, or the same again."""
        chat = data.draw(strategies.sampled_from(CHATS), "chat")
        talk = self.talks[chat]
        again = bool(talk.said) and data.draw(strategies.integers(0, 5), "again") == 0
        self.count += 1
        message_id = data.draw(strategies.sampled_from(talk.said), "which") if again else f"m{self.count}"
        said = self.do(self.chats.say("default", chat, Message(message_id, "ann", message_id)))
        assert said.is_new != again
        if said.is_new:
            talk.said.append(message_id)
            talk.eras[message_id] = talk.era

    @step(1)
    def typing(self, data: strategies.DataObject) -> None:
        """Somebody types."""
        self.do(self.chats.typing(data.draw(strategies.sampled_from(CHATS), "chat")))

    @step(1)
    def clear(self, data: strategies.DataObject) -> None:
        """The chat begins anew, perhaps with another persona."""
        chat = data.draw(strategies.sampled_from(CHATS), "chat")
        persona = data.draw(strategies.sampled_from([None, "hasty", ""]), "persona")
        self.do(self.chats.clear("default", chat, persona=persona))
        self.talks[chat].era += 1

    @step(1)
    def cancel(self, data: strategies.DataObject) -> None:
        """Somebody who knows a run's id cancels its job."""
        if self.runs:
            number = data.draw(strategies.sampled_from(sorted(self.runs)), "run")
            self.do(self.front.cancel(self.runs[number], "default"))

    @step(2)
    def stranger(self, data: strategies.DataObject) -> None:
        """Another program puts something that was not said into a queue, in front or behind."""
        chat = data.draw(strategies.sampled_from(CHATS), "chat")
        element = data.draw(strategies.sampled_from(STRANGE), "element")
        command = data.draw(strategies.sampled_from(["LPUSHX", "RPUSHX"]), "where")
        self.do(self.link.call(command, keys.CHAT_QUEUE + chat, element))

    # --- workers ---------------------------------------------------------------------------------

    @step(8)
    def take(self, data: strategies.DataObject) -> None:
        """A worker that lives takes the next entry of one of its stages."""
        alive = [worker for worker in self.workers if worker.is_alive]
        if alive:
            worker = data.draw(strategies.sampled_from(alive), "worker")
            hand = worker.hands[data.draw(strategies.sampled_from(STAGES), "stage")]
            worker.held += [Held(entry) for entry in self.do(hand.take(1))]

    @step(12)
    def work(self, data: strategies.DataObject) -> None:
        """A worker does its part for a job, whether the entry is still its own or not."""
        found = [(w, held) for w in self.workers for held in w.held if held.settlement is None]
        if found:
            _, held = data.draw(strategies.sampled_from(found), "entry")
            held.settlement = self.do(self._work(held.entry))

    @step(12)
    def settle(self, data: strategies.DataObject) -> None:
        """A worker lets go of an entry that it has worked on."""
        found = [(w, held) for w in self.workers for held in w.held if held.settlement is not None]
        if found:
            worker, held = data.draw(strategies.sampled_from(found), "entry")
            assert held.settlement is not None
            self.do(self._settle(worker, held, held.settlement))

    @step(1)
    def fail(self, data: strategies.DataObject) -> None:
        """A job fails for good in somebody's hands, whatever was done for it."""
        found = [(w, held) for w in self.workers for held in w.held]
        if found:
            worker, held = data.draw(strategies.sampled_from(found), "entry")
            self.do(self._settle(worker, held, burial(held.entry)))

    @step(1)
    def release(self, data: strategies.DataObject) -> None:
        """A worker gives an entry back as it came, as when it drains."""
        found = [(w, held) for w in self.workers for held in w.held]
        if found:
            worker, held = data.draw(strategies.sampled_from(found), "entry")
            entry = held.entry
            again = Settlement(entry, decode(entry.data or b"").id, "release", "", entry.data or b"", b"")
            self.do(self._settle(worker, held, again))

    @step(2)
    def crash(self, data: strategies.DataObject) -> None:
        """A worker dies; what it knew is forgotten, and another one starts."""
        worker = data.draw(strategies.sampled_from(self.workers), "worker")
        self.do(worker.hands["chat"].die())
        self.workers.remove(worker)
        self.gone.append(worker)
        self.do(self._hire())

    @step(2)
    def pause(self, data: strategies.DataObject) -> None:
        """A worker freezes: its lease lapses, and it believes to hold what it held."""
        worker = data.draw(strategies.sampled_from(self.workers), "worker")
        self.do(worker.hands["chat"].die())
        worker.is_alive = False

    @step(2)
    def resume(self, data: strategies.DataObject) -> None:
        """A frozen worker comes back, and finds out later what it has lost."""
        frozen = [worker for worker in self.workers if not worker.is_alive]
        if frozen:
            worker = data.draw(strategies.sampled_from(frozen), "worker")
            self.do(worker.hands["chat"].live(FAR_MS))
            worker.is_alive = True

    @step(4)
    def claim(self, data: strategies.DataObject) -> None:
        """A worker that lives takes over what those hold who have no lease."""
        alive = [worker for worker in self.workers if worker.is_alive]
        if alive:
            worker = data.draw(strategies.sampled_from(alive), "worker")
            self.do(self._claim(worker, data.draw(strategies.sampled_from(STAGES), "stage")))

    # --- time ------------------------------------------------------------------------------------

    @step(2)
    def lapse(self, data: strategies.DataObject) -> None:
        """A chat's lock lapses."""
        chat = data.draw(strategies.sampled_from(CHATS), "chat")
        self.do(self.link.call("DEL", keys.CHAT_LOCK + chat))

    @step(1)
    def drop(self, data: strategies.DataObject) -> None:
        """A chat's queue lapses."""
        chat = data.draw(strategies.sampled_from(CHATS), "chat")
        self.do(self.link.call("DEL", keys.CHAT_QUEUE + chat))

    @step(1)
    def expire(self, data: strategies.DataObject) -> None:
        """A run's time is over; it ends, unless it is in living hands."""
        if self.runs:
            run = self.runs[data.draw(strategies.sampled_from(sorted(self.runs)), "run")]
            self.do(self.link.call("ZADD", keys.LIVE_INDEX, "XX", 1, run))
            self.do(self.link.run(scripts.EXPIRE, (), (100, 60_000, 100, FAR_MS)))
            far_ms = self.clock.now_ms() + FAR_MS  # where it was put off: no other step may depend on the time
            self.do(self.link.call("ZADD", keys.LIVE_INDEX, "XX", far_ms, run))

    # --- how it is done --------------------------------------------------------------------------

    async def _work(self, entry: Entry) -> Settlement:
        job = decode(entry.data or b"")
        done = think(job) if entry.stream.startswith("job:llm_in") else await self.stage.handle(job)
        if not job.route:
            return Settlement(entry, job.id, "complete", completed(job, done, "worker").encode())
        target, *job.route = job.route
        job.state |= done.value
        return Settlement(entry, job.id, "forward", keys.stream(target, job.priority), job.encode(), b"")

    async def _settle(self, worker: Worker, held: Held, settlement: Settlement) -> None:
        stage = "llm" if held.entry.stream.startswith("job:llm_in") else "chat"
        (answer,) = await worker.hands[stage].settle(settlement)
        assert answer in {"settled", "cancelled", "lost"}, answer
        worker.held.remove(held)

    async def _claim(self, worker: Worker, stage: str) -> None:
        streams = worker.hands[stage].streams
        for stream, lapsed in await streams.lapsed():
            for suspects in (False, True):  # one that killed its holders twice is given away alone
                claimed = await streams.claim(stream, lapsed, 10, idle=suspects)
                worker.held += [Held(entry) for entry in claimed.entries]

    # --- what must hold --------------------------------------------------------------------------

    async def _look(self) -> None:
        runs: list[str] = []
        for chat, talk in self.talks.items():
            picture = await self.link.call("EVAL", PICTURE, 0, chat)
            self._judge(chat, talk, *picture)
            runs += [run.decode() for run in picture[-1]]
        self.runs = {number: run for number, run in self.runs.items() if run in runs}
        for run in runs:  # what is drawn must not depend on ids, which differ from run to run
            if run not in self.runs.values():
                self.numbers += 1
                self.runs[self.numbers] = run

    def _judge(
        self,
        chat: str,
        talk: Talk,
        queue: list[bytes],
        open_ids: list[bytes],
        events: list[Any],
        lock: bytes,
        kept: list[bytes],
        told: list[Any],
        live: list[bytes],
    ) -> None:
        waiting = [orjson.loads(one)["message_id"] for one in queue if one not in STRANGE]
        accepted = {name.decode() for name in open_ids}
        ends = [orjson.loads(fields[1]) for _, fields in events]
        ended = [message_id for event in ends for message_id in event["message_ids"]]
        assert max(Counter(ended).values(), default=1) == 1, "a message has one end"
        assert set(waiting) <= accepted
        assert accepted | set(ended) == set(talk.said), "a message waits, or has its end"
        assert not accepted & set(ended)
        place = {message_id: number for number, message_id in enumerate(talk.said)}
        assert waiting == sorted(waiting, key=lambda one: place[one]), "the queue keeps the order"
        replied = [message_id for event in ends if event["type"] == "reply" for message_id in event["message_ids"]]
        assert replied == sorted(replied, key=lambda one: place[one]), "replies keep the order"
        era = 0
        for event in ends:
            era += event["type"] == "cleared"
            if event["type"] == "reply":
                assert event["text"] == ",".join(event["message_ids"]), "a reply answers what was read for it"
                assert {talk.eras[one] for one in event["message_ids"]} == {era}, "nothing from before a clear"
                assert len(event["message_ids"]) <= 3
        assert era == talk.era
        assert [event["epoch"] for event in ends] == sorted(event["epoch"] for event in ends)

        runs = {run.decode() for run in live}
        if lock:
            assert lock.decode().rpartition(":")[0] in runs, "a lock belongs to a run that lives"
        if waiting:
            assert runs, "no message waits without a run"
        turns = [orjson.loads(one) for one in kept]
        now = [event["message_ids"] for event in ends_since_clear(ends) if event["type"] == "reply"]
        said = [turn["message_id"] for turn in turns if turn["role"] == "user"]
        assert said == [one for ids in now for one in ids][-len(said) :] if said else not now
        words = {"reply": "answered"}
        known = {one: words.get(event["type"], event["type"]) for event in ends for one in event["message_ids"]}
        assert recorded(chat, told) == known, "history knows the end of each"

    # --- the end ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        """One living worker does what is left: every message has its end, and nothing remains."""
        try:
            if self.is_sound and self.workers:
                self.do(self._drain())
        finally:
            self.do(self._close())
            self.runner.close()

    async def _drain(self) -> None:
        for worker in self.workers:
            await worker.hands["chat"].die()
        self.gone += self.workers
        self.workers = []
        heir = await self._hire()
        rounds = 0
        while await self.link.call("ZCARD", keys.LIVE_INDEX):
            rounds += 1
            assert rounds < 200, "nothing goes on"
            await self.link.run(scripts.EXPIRE, (), (100, 60_000, 100, FAR_MS))
            for stage, hand in heir.hands.items():
                await self._claim(heir, stage)
                heir.held += [Held(entry) for entry in await hand.take(100)]
            for held in list(heir.held):
                await self._settle(heir, held, await self._work(held.entry))
            await self._look()
        for chat in CHATS:  # what does not wait has had its end, as `_judge` has seen
            left = (keys.CHAT_LOCK + chat, keys.CHAT_QUEUE + chat, keys.CHAT_OPEN + chat)
            assert await self.link.call("EXISTS", *left) == 0
        await assert_nothing_is_left(self.link)
        assert await unbounded_keys(self.link) == []

    async def _close(self) -> None:
        for worker in [*self.workers, *self.gone]:
            for hand in worker.hands.values():
                await hand.streams.close()
        await self.link.call("FLUSHALL")
        await self.front.__aexit__(None, None, None)
        await self.chats.close()
        await self.link.close()


def recorded(chat: str, told: list[Any]) -> dict[str, str]:
    """Return what history is told of messages: how each of them ended."""
    rows = []
    for _, fields in told:
        event = dict(zip(fields[::2], fields[1::2], strict=True))
        if event[b"kind"] == b"chat" and event[b"id"] == chat.encode():
            rows += [row for _, row in orjson.loads(event[b"data"])["rows"] if row["role"] == "user"]
    found = {row["message_id"]: row["status"] for row in rows}
    assert len(found) == len(rows), "a message is recorded once"
    return found


def think(job: Job) -> Done:
    """Answer as a model: a state to the first brain, and to the second which new messages it was given."""
    messages = job.state["ask"]["messages"]
    if messages[0]["content"] == STATE_PROMPT:
        return Done({"answer": '{"mood":"fine"}'})
    new = messages[-len(job.state["messages"]) :]
    assert {one["role"] for one in new} == {"user"}
    return Done({"answer": ",".join(one["content"] for one in new), "model": "m", "usage": None})


def burial(entry: Entry) -> Settlement:
    """Return the end of a job that failed for good."""
    job = decode(entry.data or b"")
    failed = Completion(job.id, "failed", tenant=job.tenant, error=error_body("failed", "test", "it failed"))
    return Settlement(entry, job.id, "bury", failed.encode(), b'{"reason":"test"}')


def ends_since_clear(ends: list[Json]) -> list[Json]:
    """Return what was told after the last clear."""
    clears = [number for number, event in enumerate(ends) if event["type"] == "cleared"]
    return ends[clears[-1] + 1 :] if clears else ends


@pytest.mark.timeout(3_600 if EXAMPLES else 900)
def test_any_order_of_events_keeps_the_promises_of_chats(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every message answered once, in order, or told otherwise; no two runs; nothing from before a clear after it."""
    # A machine that stands still for a second is waited for.
    monkeypatch.setattr(connection, "ANSWER_WITHIN_S", PATIENCE_S)
    profile = settings(
        settings.get_profile("steady"),
        max_examples=EXAMPLES or 40,
        stateful_step_count=STEPS_EACH,
        derandomize=not EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    machine = partial(Machine, redis_server)
    run_state_machine_as_test(machine, settings=profile)  # type: ignore[arg-type]  # it takes what makes one, too
