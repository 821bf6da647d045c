"""Reports on Redis: one job and one response for each request, whatever crashes; caches; people who are forgotten."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from loadtest.schema import fill
from pipeline import group_reader, keys
from pipeline.accepting import Idempotency
from pipeline.clock import Clock
from pipeline.connection import CommandRefused, Link
from pipeline.dead import DeadLetters
from pipeline.errors import Reject, WrongField
from pipeline.front import Front
from pipeline.job import Completion, Done, Job, error_body
from pipeline.report_types import medical
from pipeline.reports import Reports, RequestStream
from pipeline.settings import Settings
from pipeline.stage import Loop, Outcome, Stage
from pipeline.streams import Entry, Settlement
from stages.report import Report, Requests
from tests.conftest import wait_until
from tests.rig import (
    FIRST,
    Gate,
    Hand,
    Mortal,
    Scripted,
    ScriptedBatch,
    assert_nothing_is_left,
    changed,
    everything,
    letters,
    outcome,
    query,
)

PATIENT: dict[str, Any] = {"age": 44, "sex": "female", "symptoms": ["headache", "blurred vision"]}
PASSAGES = [
    {"document": "headache.md", "title": "Headache", "chunk": 0, "score": 1.0, "text": "A sudden headache is urgent."}
]


def answer_to(job: Job) -> Done:
    """What a good model says."""
    schema = job.state["ask"]["response_format"]["json_schema"]["schema"]
    text = orjson.dumps(fill(schema, f"Said of {job.payload['user_id']}.")).decode()
    return Done({"answer": text, "model": "fake", "usage": None, "finish_reason": "stop"})


async def good(job: Job) -> Done:
    return answer_to(job)


async def passages(job: Job) -> Done:
    return Done({"sources": PASSAGES})


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is told to stop waits for its blocked read no longer than needed; what was left is found soon."""
    monkeypatch.setattr(group_reader, "BLOCK_MS", 50)
    monkeypatch.setattr(group_reader, "LOOK_EVERY_S", 0.05)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return changed(settings, llm={"urls": (FIRST,)})


@pytest.fixture
async def reports(settings: Settings, front: Front) -> AsyncIterator[Reports]:
    """Reports as a gateway sees them."""
    one = Reports(Link(settings.redis, "reports"), settings, front.clock)
    yield one
    await one.close()


@asynccontextmanager
async def requests_of(settings: Settings, consumer: str) -> AsyncIterator[RequestStream]:
    """The stream of requests in the hands of one consumer, who has no lease."""
    stream = RequestStream(settings, consumer, Clock())
    try:
        yield stream
    finally:
        await stream.close()


@asynccontextmanager
async def running(
    settings: Settings,
    llm: Stage | None = None,
    *,
    encoder: Stage | None = None,
    retriever: Scripted | None = None,
    loops: Sequence[Loop] = (),
) -> AsyncIterator[list[Mortal]]:
    """Workers of the whole route, and one loop that takes requests."""
    llm = llm or Scripted("llm", good, placed=True)

    async def through(job: Job) -> Done:
        return Done({})

    stages: list[Stage] = [encoder or Scripted("encoder", through), retriever or Scripted("retriever", passages), llm]
    consumers = [Mortal([stage], settings) for stage in stages]
    consumers.append(Mortal([Report(settings)], settings, loops=loops or [Requests(settings)]))
    async with asyncio.TaskGroup() as group:
        for consumer in consumers:
            consumer.task = group.create_task(consumer.run())
        await wait_until(lambda: all(w.not_ready is None for c in consumers for w in c.workers))
        try:
            yield consumers
        finally:
            for consumer in consumers:
                consumer.stop()


async def ask(link: Link, request_id: str, user: str = "ann", **fields: Any) -> bytes:
    """Put a request on the stream, as any program could."""
    body = {"request_id": request_id, "user_id": user, "inputs": PATIENT} | fields
    entry: bytes = await link.call("XADD", keys.REPORT_REQUESTS, "*", "data", orjson.dumps(body))
    return entry


async def responses(link: Link) -> list[dict[str, Any]]:
    rows = await link.call("XRANGE", keys.REPORT_RESPONSES, "-", "+")
    return [orjson.loads(fields[1]) for _, fields in rows]


async def answered(link: Link, number: int) -> list[dict[str, Any]]:
    """Wait for so many responses, and until nothing is left that could bring another."""

    async def all_there() -> bool:
        idle = not await link.call("XLEN", keys.REPORT_REQUESTS) and not await link.call("ZCARD", keys.LIVE_INDEX)
        return idle and len(await responses(link)) >= number

    await wait_until(all_there)
    return await responses(link)


async def all_there_is_to_read(link: Link) -> str:
    """Every key's name and what can be read of it: the bytes of a deleted stream entry stay for a while and cannot."""
    read: list[Any] = []
    for name in await link.call("KEYS", "*"):
        kind = (await link.call("TYPE", name)).decode()
        args = {
            "stream": ("XRANGE", name, "-", "+"),
            "hash": ("HGETALL", name),
            "zset": ("ZRANGE", name, 0, -1),
            "set": ("SMEMBERS", name),
            "string": ("GET", name),
        }[kind]
        read.append((name, await link.call(*args)))
    return repr(read)


# --- one response ---------------------------------------------------------------------------------


async def test_a_request_is_answered_with_a_report(link: Link, settings: Settings) -> None:
    """All fields of the response, and nothing is left of the work."""
    async with running(settings):
        await ask(link, "r1")
        [response] = await answered(link, 1)
        await assert_nothing_is_left(link)
    assert set(response) == {
        "request_id", "status", "report_id", "report", "cached", "error_message", "worker", "duration_ms",
    }  # fmt: skip
    assert (response["request_id"], response["status"], response["cached"]) == ("r1", "success", False)
    assert response["error_message"] is None
    assert response["worker"]
    assert response["duration_ms"] >= 0
    report = response["report"]
    assert report["content"]["summary"] == "Said of ann."
    assert report["sources"] == [{"number": 1, "title": "Headache", "document": "headache.md"}]
    assert report["machine_written"] is True
    assert "Written by a language model" in report["markdown"]
    assert "[1] Headache (headache.md)" in report["markdown"]


async def test_inputs_may_stand_beside_the_other_fields(link: Link, settings: Settings) -> None:
    """Without `inputs` what is left are the inputs."""
    async with running(settings):
        await link.call(
            "XADD", keys.REPORT_REQUESTS, "*", "data", orjson.dumps({"request_id": "r1", "user_id": "ann"} | PATIENT)
        )
        [response] = await answered(link, 1)
    assert response["status"] == "success"


async def test_a_repeated_request_is_counted_and_not_answered_again(link: Link, settings: Settings) -> None:
    """While the first is being worked on, and after it was answered; also where the first was refused."""
    gate = Gate(good)
    async with running(settings, Scripted("llm", gate, placed=True)):
        await ask(link, "r1")
        await wait_until(lambda: gate.waiting)
        await ask(link, "r1")
        await wait_until(lambda: _repeated(link, 1))
        gate.open()
        await answered(link, 1)
        await ask(link, "r1", user="ben")
        await ask(link, "r2", inputs=PATIENT | {"age": -3})
        await ask(link, "r2")
        await wait_until(lambda: _repeated(link, 3))
        found = await answered(link, 2)
    assert [response["request_id"] for response in found] == ["r1", "r2"]
    assert await link.call("PTTL", keys.REPORT_REQUEST + "r1") > 6 * 86_400_000


async def test_where_a_response_is_wanted_is_known_for_as_long_as_the_response(link: Link, settings: Settings) -> None:
    """Accepted or refused; a repeated request does not change it, and an endless text is not kept."""

    async def ask_by(reply: bytes, request_id: str, **fields: Any) -> None:
        body = {"request_id": request_id, "user_id": "ann", "inputs": PATIENT} | fields
        await link.call("XADD", keys.REPORT_REQUESTS, "*", "data", orjson.dumps(body), "reply", reply)

    gate = Gate(good)
    async with running(settings, Scripted("llm", gate, placed=True)):
        await ask_by(b"here", "r1")
        await wait_until(lambda: gate.waiting)
        known_ms = await link.call("PTTL", keys.REPORT_REPLY + "r1")
        assert known_ms > (settings.reports.keep_s + settings.lifetimes.report_s - 60) * 1000
        await ask_by(b"there", "r1")
        await wait_until(lambda: _repeated(link, 1))
        gate.open()
        await ask_by(b"here, too", "r2", inputs=PATIENT | {"age": -3})
        await ask_by(b"x" * 4097, "r3", inputs=PATIENT | {"age": -3})
        await answered(link, 3)
    assert await link.call("GET", keys.REPORT_REPLY + "r1") == b"here"
    assert await link.call("GET", keys.REPORT_REPLY + "r2") == b"here, too"
    assert await link.call("PTTL", keys.REPORT_REPLY + "r2") > (settings.reports.keep_s - 60) * 1000
    assert await link.call("EXISTS", keys.REPORT_REPLY + "r3") == 0


async def _repeated(link: Link, wanted: int) -> bool:
    return int(await link.call("HGET", keys.REPORT_COUNTS, "repeated") or 0) == wanted


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"inputs": PATIENT | {"age": -3}}, "inputs.age: "),
        ({"inputs": {"age": 3}}, "inputs.sex: "),
        ({"inputs": PATIENT | {"vitals": {"temperature_c": 400.0}}}, "inputs.vitals.temperature_c: "),
        ({"inputs": PATIENT | {"colour": "red"}}, "inputs.colour: there is no such field"),
        ({"report_type": "horoscope"}, "report_type: there is none of that name; known are medical"),
        ({"colour": "x"}, "colour: there is no such field"),
        ({"user_id": "a b"}, "user_id: "),
        ({"user_id": None}, "user_id: "),
        ({"language": "klingon please"}, "language: "),
        ({"force_refresh": "yes"}, "force_refresh: "),
    ],
)
async def test_a_wrong_field_is_named_in_the_response(
    link: Link, settings: Settings, fields: dict[str, Any], named: str
) -> None:
    """One error response, no dead letter, no job."""
    async with running(settings):
        await ask(link, "r1", **fields)
        [response] = await answered(link, 1)
    assert response["status"] == "error"
    assert response["error_message"].startswith(f"invalid_field: {named}")
    assert (response["report"], response["report_id"], response["cached"]) == (None, None, False)
    assert await letters(link) == []


@pytest.mark.parametrize(
    ("data", "reason", "answers"),
    [
        (b'{"request_id": "r1", "user_id": "ann", ', "not_json", ["r1"]),
        (b"what?", "not_json", []),
        (b"[1]", "not_a_request", []),
        (b'{"user_id": "ann"}', "bad_request_id", []),
        (b'{"request_id": "a b", "user_id": "ann"}', "bad_request_id", []),
        (b'{"request_id": "r1", "pad": "%b"}' % (b"x" * 3000), "too_large", ["r1"]),
    ],
)
async def test_what_is_no_request_is_buried_and_answered_where_its_id_can_be_read(
    link: Link, settings: Settings, data: bytes, reason: str, answers: list[str]
) -> None:
    """The letter keeps what was sent; others go on."""
    async with running(changed(settings, reports={"max_request_bytes": 2000})):
        await link.call("XADD", keys.REPORT_REQUESTS, "*", "data", data)
        await ask(link, "next")
        found = await answered(link, 1 + len(answers))
    assert [response["request_id"] for response in found] == [*answers, "next"]
    [letter] = await letters(link)
    assert (letter["reason"], letter["original"].encode()) == (reason, data)


async def test_an_entry_without_data_is_buried(link: Link, settings: Settings) -> None:
    """And its fields stand in nobody's way."""
    async with running(settings):
        await link.call("XADD", keys.REPORT_REQUESTS, "*", "body", "{}")
        await ask(link, "next")
        await answered(link, 1)
    assert [letter["reason"] for letter in await letters(link)] == ["no_data"]


async def test_a_taker_that_dies_leaves_its_requests_to_others(link: Link, settings: Settings) -> None:
    """Taken and not let go of: another takes it up when the lease is gone."""
    await ask(link, "r1")
    async with requests_of(settings, "dead") as dead:
        assert len(await dead.take()) == 1
    async with running(settings):
        [response] = await answered(link, 1)
    assert response["status"] == "success"


async def test_a_request_that_kills_who_takes_it_ends(link: Link, settings: Settings) -> None:
    """After three deaths it is buried unread, and its sender hears so."""
    await ask(link, "r1")
    for number in range(3):
        async with requests_of(settings, f"dead{number}") as dead:
            assert len(await dead.take()) == 1
    async with running(settings):
        [response] = await answered(link, 1)
    assert response["error_message"].startswith("poison: ")
    assert [letter["reason"] for letter in await letters(link)] == ["poison"]


async def test_accepting_is_done_once_and_by_the_owner(link: Link, settings: Settings, reports: Reports) -> None:
    """A stranger, and the same sending twice: refused, nothing written."""
    async with requests_of(settings, "owner") as owner, requests_of(settings, "stranger") as stranger:
        await ask(link, "r1")
        [entry] = await owner.take()
        job = await reports.job({"user_id": "ann", "inputs": PATIENT}, request_id="r1")
        before = await everything(link)
        assert await stranger.accept(entry, job) == "lost"
        assert await stranger.refuse(entry, "r1", "code", "message", "worker", bury=True) == "lost"
        assert await everything(link) == before
        assert await owner.accept(entry, job) == "accepted"
        before = await everything(link)
        assert await owner.accept(entry, job) == "lost"
        assert await everything(link) == before


async def test_too_much_unfinished_work_leaves_requests_waiting(
    link: Link, settings: Settings, reports: Reports
) -> None:
    """Neither accepted nor refused: the stream is where they wait."""
    full = changed(settings, admission={"max_jobs": 1})
    behind = changed(settings, history={"max_backlog": 1})
    async with (
        requests_of(settings, "owner") as owner,
        requests_of(full, "owner") as owner_when_full,
        requests_of(behind, "owner") as owner_when_behind,
    ):
        await ask(link, "r1")
        await ask(link, "r2")
        [entry] = await owner.take()
        job = await reports.job({"user_id": "ann", "inputs": PATIENT}, request_id="r1")
        assert await owner.accept(entry, job) == "accepted"
        [entry] = await owner.take()
        job = await reports.job({"user_id": "ann", "inputs": PATIENT}, request_id="r2")
        before = await everything(link)
        assert await owner_when_full.accept(entry, job) == "overloaded"
        assert await owner_when_behind.accept(entry, job) == "backlog"
        assert await everything(link) == before


def watch_accepting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the word for each try to accept a request."""
    words: list[str] = []

    async def watched(self: RequestStream, entry: Any, job: Job) -> str:
        words.append(await accept(self, entry, job))
        return words[-1]

    accept = RequestStream.accept
    monkeypatch.setattr(RequestStream, "accept", watched)
    return words


async def test_the_life_of_a_report_begins_when_it_is_accepted(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its request had to wait, in whose hands ever, until there was room for it."""
    monkeypatch.setattr("stages.report.FULL_AGAIN_S", 0.01)
    looked = watch_accepting(monkeypatch)
    full = changed(settings, admission={"max_jobs": 1})
    waiting = query(front, route=["nobody"])
    await front.submit(waiting, in_flight_limit=5, wait=False)
    gate = Gate(good)
    async with running(full, Scripted("llm", gate, placed=True)):
        await ask(link, "r1")
        await wait_until(lambda: looked)
        full_ms = await link.time_us() // 1000
        tries = len(looked)
        await wait_until(lambda: len(looked) > tries + 2)
        assert set(looked) == {"overloaded"}
        await front.cancel(waiting.id, "default")
        await wait_until(lambda: gate.waiting)
        [job_id] = await link.call("ZRANGE", keys.LIVE_INDEX, 0, -1)
        deadline_ms = int(await link.call("HGET", keys.LIVE + job_id.decode(), "deadline"))
        assert deadline_ms >= full_ms + settings.lifetimes.report_s * 1000
        gate.open()
        await answered(link, 1)


async def test_a_key_of_a_wrong_type_stops_a_script_before_its_first_write(
    link: Link, settings: Settings, reports: Reports
) -> None:
    """Whichever it is, the request stays, and goes on when the key is mended."""
    async with requests_of(settings, "owner") as owner:
        await ask(link, "r1")
        [entry] = await owner.take()
        job = await reports.job({"user_id": "ann", "inputs": PATIENT}, request_id="r1")
        for key in (keys.REPORT_RESPONSES, keys.REPORT_COUNTS, keys.EVENTS, keys.STAMP):
            await link.call("RPUSH", key, "wrong")
            before = await everything(link)
            with pytest.raises(CommandRefused, match="is a list"):
                await owner.accept(entry, job)
            assert await everything(link) == before
            await link.call("DEL", key)
        assert await owner.accept(entry, job) == "accepted"


async def test_a_request_that_redis_refuses_waits_and_others_pass(link: Link, settings: Settings) -> None:
    """A key of a wrong type is one person's trouble; when it is mended, they are answered, too."""
    await link.call("RPUSH", keys.USER + "ann", "wrong")
    async with running(settings):
        await ask(link, "r1")
        for number in range(3):
            await ask(link, f"b{number}", user="ben")
        await wait_until(lambda: _has_responses(link, 3))
        assert {response["request_id"] for response in await responses(link)} == {"b0", "b1", "b2"}
        await link.call("DEL", keys.USER + "ann")
        found = await answered(link, 4)
    assert found[3]["request_id"] == "r1"


async def _has_responses(link: Link, wanted: int) -> bool:
    return len(await responses(link)) == wanted


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"report_type": "medical", "inputs": 1}'])
async def test_a_last_input_that_is_none_counts_as_missing(link: Link, settings: Settings, text: str) -> None:
    """Its key is known to others."""
    await link.call("SET", keys.INPUT + "ann", text, "EX", 100)
    async with running(settings):
        await ask(link, "r1", reuse_last_input=True)
        [response] = await answered(link, 1)
    assert response["status"] == "success"


async def test_a_kind_that_breaks_refuses_its_request_and_others_pass(
    link: Link, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of its fault may quote somebody, so its name is told only."""

    def broken(inputs: Any) -> str:
        if inputs.age == 1:
            raise KeyError(inputs.notes)
        return "headache"

    kind = dataclasses.replace(medical.TYPE, query=broken)
    monkeypatch.setattr("pipeline.report_types.find", lambda _: kind)
    async with running(settings):
        await ask(link, "r1", inputs=PATIENT | {"age": 1, "notes": "secret"})
        await ask(link, "r2")
        found = await answered(link, 2)
    assert found[0]["error_message"] == "handler_error: the request could not be read: KeyError"
    assert found[1]["status"] == "success"
    assert [letter["reason"] for letter in await letters(link)] == ["handler_error"]


async def test_a_report_whose_worker_dies_is_answered_once(link: Link, settings: Settings) -> None:
    """Killed with the job in hand: its heir answers, and only the heir."""
    gate = Gate(good)
    doomed = Scripted("llm", gate, placed=True)
    async with running(settings, doomed) as consumers:
        await ask(link, "r1")
        await wait_until(lambda: gate.waiting)
        heir = Mortal([Scripted("llm", good, placed=True)], settings)
        async with asyncio.TaskGroup() as group:
            heir.task = group.create_task(heir.run())
            await consumers[2].crash()
            [response] = await answered(link, 1)
            heir.stop()
    assert response["status"] == "success"


async def test_a_report_that_waits_past_its_deadline_is_answered(link: Link, settings: Settings) -> None:
    """By the script that ends it, without a worker."""
    short = changed(settings, lifetimes={"report_s": 0.3})
    gate = Gate(good)
    async with running(short, retriever=Scripted("retriever", gate)):
        await ask(link, "r1")
        [response] = await answered(link, 1)
    assert response["error_message"].startswith("deadline_exceeded: ")
    assert response["report_id"]


async def test_a_cancelled_report_is_answered(link: Link, settings: Settings, front: Front) -> None:
    """By whoever ends it."""
    gate = Gate(good)
    async with running(settings, Scripted("llm", gate, placed=True)):
        await ask(link, "r1")
        await wait_until(lambda: gate.waiting)
        assert await front.cancel(gate.waiting[0], "default") == "cancelling"
        [response] = await answered(link, 1)
    assert response["error_message"] == "cancelled: the job was cancelled"


async def test_a_failure_is_told_with_quotes_and_braces_in_it(link: Link, settings: Settings) -> None:
    """The response is put together from texts; what looks like JSON inside one of them is no part of it."""
    nasty = 'it said "},"worker":"x","replica": {"result":{}},"error":null,"worker": \\ \n end'

    async def refuse(job: Job) -> Done:
        raise Reject(nasty, code="bad_request")

    async with running(settings, Scripted("llm", refuse, placed=True)):
        await ask(link, "r1")
        [response] = await answered(link, 1)
    assert response["error_message"] == f"bad_request: {nasty}"
    [letter] = await letters(link)
    assert letter["error"]["message"] == "withheld, since it may quote personal data"


async def test_a_report_may_say_what_looks_like_its_own_frame(link: Link, settings: Settings) -> None:
    """As above, for the good end."""
    nasty = '"},"error":null,"worker":"x","replica":null} \\" {"cached":true,"hash":"","report":{}}'

    async def say(job: Job) -> Done:
        schema = job.state["ask"]["response_format"]["json_schema"]["schema"]
        return Done({"answer": orjson.dumps(fill(schema, nasty)).decode(), "model": nasty})

    async with running(settings, Scripted("llm", say, placed=True)):
        await ask(link, "r1")
        await ask(link, "r2")
        found = await answered(link, 2)
    for response in found:
        assert response["report"]["content"]["summary"] == nasty
        assert response["report"]["model"] == nasty
    assert [response["cached"] for response in found] == [False, True]


async def test_old_responses_go_when_one_is_added(link: Link, settings: Settings) -> None:
    """By age, and by number, which is counted."""
    old = changed(settings, reports={"max_responses": 2})
    await link.call("XADD", keys.REPORT_RESPONSES, "1000-0", "data", "{}")
    async with running(old):
        for number in range(3):
            await ask(link, f"r{number}")
        await wait_until(lambda: link.call("EXISTS", keys.REPORT_REQUEST + "r2"))
        found = await answered(link, 2)
    assert {response["request_id"] for response in found} <= {"r0", "r1", "r2"}
    assert len(found) == 2
    assert await link.call("HGET", keys.REPORT_COUNTS, "dropped") == b"1"
    assert await link.call("XRANGE", keys.REPORT_RESPONSES, "-", "1000-0") == []


# --- what the model says --------------------------------------------------------------------------


async def test_an_answer_that_is_no_report_is_sent_back_once(link: Link, settings: Settings) -> None:
    """With what is wrong with it; the second one serves."""

    async def second_time(job: Job) -> Done:
        return (
            answer_to(job)
            if len(job.state["ask"]["messages"]) == 4
            else Done({"answer": '{"summary": 1}', "model": "fake"})
        )

    llm = Scripted("llm", second_time, placed=True)
    async with running(settings, llm):
        await ask(link, "r1")
        [response] = await answered(link, 1)
    assert response["status"] == "success"
    assert len(llm.seen) == 2
    again = llm.seen[1].state["ask"]["messages"]
    assert again[2] == {"role": "assistant", "content": '{"summary": 1}'}
    assert "findings: Field required" in again[3]["content"]


@pytest.mark.parametrize("text", ["", "Sorry.", "{}", '["a"]', '{"summary": "x"}'])
async def test_a_model_that_gives_no_report_fails_the_job_and_nothing_is_kept(
    link: Link, settings: Settings, text: str
) -> None:
    """After two calls."""

    async def never(job: Job) -> Done:
        return Done({"answer": text, "model": "fake"})

    llm = Scripted("llm", never, placed=True)
    async with running(settings, llm):
        await ask(link, "r1")
        [response] = await answered(link, 1)
    assert response["error_message"].startswith("invalid_output: the model gave no valid report")
    assert len(llm.seen) == 2
    assert await link.call("KEYS", keys.REPORT + "*") == []


async def test_a_source_that_there_is_not_is_no_report(link: Link, settings: Settings) -> None:
    """A citation that leads nowhere is worse than none."""

    async def inventive(job: Job) -> Done:
        body = orjson.loads(answer_to(job).value["answer"])
        body["findings"][0]["sources"] = [7]
        return Done({"answer": orjson.dumps(body).decode(), "model": "fake"})

    async with running(settings, Scripted("llm", inventive, placed=True)):
        await ask(link, "r1")
        [response] = await answered(link, 1)
    assert "findings[0].sources: there are sources 1 to 1" in response["error_message"]


# --- caches ---------------------------------------------------------------------------------------


async def test_the_same_inputs_are_written_about_once(link: Link, settings: Settings) -> None:
    """However they are spelled; another input, language or person's own wish for a fresh one is another matter."""
    llm = Scripted("llm", good, placed=True)
    async with running(settings, llm):
        await ask(link, "r1")
        await answered(link, 1)
        await ask(
            link,
            "r2",
            user="ben",
            inputs=dict(reversed(PATIENT.items())) | {"symptoms": ["headache ", "blurred vision"]},
        )
        await answered(link, 2)
        assert len(llm.seen) == 1
        await ask(link, "r3", language="de")
        await ask(link, "r4", inputs=PATIENT | {"age": 45})
        await answered(link, 4)
        assert len(llm.seen) == 3
        await ask(link, "r5", force_refresh=True)
        found = await answered(link, 5)
    assert len(llm.seen) == 4
    by_id = {response["request_id"]: response for response in found}
    assert [by_id[f"r{number}"]["cached"] for number in range(1, 6)] == [False, True, False, False, False]
    assert by_id["r2"]["report"] == by_id["r1"]["report"]


@pytest.mark.parametrize("change", [{"text": "New knowledge."}, {"title": "New title"}, {"document": "new.md"}])
async def test_knowledge_that_has_changed_makes_another_report(
    link: Link, settings: Settings, change: dict[str, str]
) -> None:
    """An old report is never served for new passages, nor for those of a document that has another name."""
    told = [PASSAGES, [PASSAGES[0] | change]]

    async def changing(job: Job) -> Done:
        return Done({"sources": told.pop(0)})

    llm = Scripted("llm", good, placed=True)
    async with running(settings, llm, retriever=Scripted("retriever", changing)):
        await ask(link, "r1")
        await answered(link, 1)
        await ask(link, "r2")
        found = await answered(link, 2)
    assert [response["cached"] for response in found] == [False, False]
    assert len(llm.seen) == 2
    assert all(part in orjson.dumps(llm.seen[1].state).decode() for part in change.values())


@pytest.mark.parametrize("text", ["no JSON", '{"a": 1}', "[]"])
async def test_what_is_no_report_in_the_cache_is_written_anew(link: Link, settings: Settings, text: str) -> None:
    """Somebody else's program has used the key."""
    llm = Scripted("llm", good, placed=True)
    async with running(settings, llm):
        await ask(link, "r1")
        await answered(link, 1)
        [cached] = await link.call("KEYS", keys.REPORT + "*")
        await link.call("SET", cached, text, "PX", 60_000)
        for request_id in ("r2", "r3"):
            await ask(link, request_id, user="ben")
            found = await answered(link, int(request_id[1]))
    assert [(one["status"], one["cached"]) for one in found[1:]] == [("success", False), ("success", True)]
    assert len(llm.seen) == 2


@pytest.mark.parametrize("alone", [True, False])
async def test_the_log_is_not_told_what_an_error_in_a_handler_quotes(
    link: Link, settings: Settings, reports: Reports, front: Front, capsys: pytest.CaptureFixture[str], alone: bool
) -> None:
    """Where it was raised is told; of a batch, too."""

    async def quote(job: Job) -> Done:
        raise ValueError(f"cannot do {job.payload['inputs']['symptoms']}")

    async def quote_all(jobs: Sequence[Job]) -> Sequence[Outcome]:
        return [await quote(job) for job in jobs]

    for number in range(4):
        asked = {"user_id": "ann", "inputs": PATIENT | {"symptoms": ["Zyxwquorn"]}}
        job = await reports.job(asked, request_id=f"r{number}")
        await front.submit(job, in_flight_limit=9, wait=False)
    encoder: Stage = Scripted("encoder", quote) if alone else ScriptedBatch("encoder", quote_all)
    async with running(changed(settings, retry={"max_retries": 0}), encoder=encoder):
        found = await answered(link, 4)
    assert {one["status"] for one in found} == {"error"}
    out = capsys.readouterr().out
    assert ("the handler failed" if alone else "a batch failed") in out
    assert "in quote" in out
    assert "ValueError: (withheld)" in out
    assert "Zyxwquorn" not in out


async def test_identical_requests_in_flight_share_one_report(link: Link, settings: Settings) -> None:
    """The others wait uncharged until the cache answers."""
    gate = Gate(good)
    llm = Scripted("llm", gate, placed=True)
    async with running(changed(settings, retry={"max_retries": 0}), llm):
        for number in range(4):
            await ask(link, f"r{number}", user=f"user{number}")
        await wait_until(lambda: gate.waiting)
        await wait_until(lambda: _delayed(link, 3))
        gate.open()
        found = await answered(link, 4)
    assert len(llm.seen) == 1
    assert sorted(response["cached"] for response in found) == [False, True, True, True]
    assert {response["status"] for response in found} == {"success"}


async def _delayed(link: Link, wanted: int) -> bool:
    return bool(await link.call("ZCARD", keys.DELAYED) == wanted)


async def test_when_the_writer_fails_the_next_one_writes(link: Link, settings: Settings) -> None:
    """Nobody waits for a report that will never be."""
    gate = Gate(good)

    async def first_fails(job: Job) -> Done:
        if job.payload["request_id"] == "r0":
            await gate(job)
            raise Reject("no", code="bad_request")
        return answer_to(job)

    async with running(settings, Scripted("llm", first_fails, placed=True)):
        await ask(link, "r0")
        await wait_until(lambda: gate.waiting)
        await ask(link, "r1")
        await wait_until(lambda: _delayed(link, 1))
        gate.open()
        found = await answered(link, 2)
    assert [(one["request_id"], one["status"]) for one in found] == [("r0", "error"), ("r1", "success")]


async def test_a_repeated_request_leaves_the_last_input_as_it_is(link: Link, settings: Settings) -> None:
    """Else what was asked long ago would fill the next report, because somebody was not sure that it had arrived."""
    async with running(settings):
        await ask(link, "r1")
        await answered(link, 1)
        await ask(link, "r2", inputs=PATIENT | {"age": 45})
        await answered(link, 2)
        await ask(link, "r1")
        await answered(link, 2)
        assert await link.call("HGET", keys.REPORT_COUNTS, "repeated") == b"1"
        await ask(link, "r3", inputs={}, reuse_last_input=True)
        found = await answered(link, 3)
    assert "| Age | 45 |" in found[-1]["report"]["markdown"]


async def test_a_repeated_idempotency_key_leaves_the_last_input_as_it_is(
    link: Link, reports: Reports, front: Front
) -> None:
    """The same over HTTP."""
    for age, key in ((44, "one"), (45, "two"), (44, "one")):
        job = await reports.job({"user_id": "ann", "inputs": PATIENT | {"age": age}})
        await front.submit(job, idempotency=Idempotency(key, "h"), in_flight_limit=5, wait=False)
    merged = await reports.job({"user_id": "ann", "reuse_last_input": True})
    assert merged.payload["inputs"]["age"] == 45


async def test_missing_inputs_are_filled_from_the_last_ones(link: Link, settings: Settings) -> None:
    """What is given wins; without the wish, or after an hour, they are missing."""
    llm = Scripted("llm", good, placed=True)
    async with running(settings, llm):
        await ask(link, "r1")
        await answered(link, 1)
        assert 3_500_000 < await link.call("PTTL", keys.INPUT + "ann") <= 3_600_000
        await ask(link, "r2", inputs={"age": 50}, reuse_last_input=True)
        await answered(link, 2)
        await ask(link, "r3", inputs={"age": 51})
        await answered(link, 3)
        await ask(link, "r4", user="ben", inputs={"age": 51}, reuse_last_input=True)
        found = await answered(link, 4)
    filled = llm.seen[1].payload["inputs"]
    assert {name: filled[name] for name in PATIENT} == PATIENT | {"age": 50}
    assert [response["status"] for response in found] == ["success", "success", "error", "error"]


# --- people who are forgotten ---------------------------------------------------------------------


async def test_what_is_kept_of_a_person_can_be_erased(link: Link, settings: Settings, reports: Reports) -> None:
    """Responses, caches, inputs, outcomes, letters; another's stay."""

    async def sometimes(job: Job) -> Done:
        if job.payload["inputs"]["age"] == 1:
            raise Reject("no", code="bad_request")
        return answer_to(job)

    async with running(settings, Scripted("llm", sometimes, placed=True)):
        await ask(link, "r1")
        await ask(link, "r2", inputs=PATIENT | {"age": 1})
        await ask(link, "r3", user="ben", inputs=PATIENT | {"age": 2})
        await ask(link, "r4", user="ben", inputs=PATIENT | {"age": 1})
        await ask(link, "r5", inputs=PATIENT | {"age": -3})
        await link.call("XADD", keys.REPORT_REQUESTS, "*", "data", '{"request_id": "r6", "user_id": "ann", broken')
        await answered(link, 6)
    await reports.erase("ann", "default")
    assert {response["request_id"] for response in await responses(link)} == {"r3", "r4", "r6"}
    assert [orjson.loads(letter["original"])["payload"]["user_id"] for letter in await letters(link)] == ["ben"]
    await link.call("DEL", keys.EVENTS)  # what history is told is the recorder's to forget
    assert "ann" not in await all_there_is_to_read(link)
    assert await link.call("EXISTS", keys.REPORT_REQUEST + "r1") == 1
    assert await link.call("EXISTS", keys.INPUT + "ben") == 1
    await reports.erase("ann", "default")


@pytest.mark.parametrize("in_hand", [False, True])
async def test_a_request_that_waits_when_its_person_is_erased_is_answered_and_goes(
    link: Link, settings: Settings, reports: Reports, in_hand: bool
) -> None:
    """Nobody has accepted it yet; who has it in hand loses it. Others' stay, and so do the person's later ones."""
    async with requests_of(settings, "owner") as stream:
        await ask(link, "r1")
        await ask(link, "r2", user="ben")
        await link.call("XADD", keys.REPORT_REQUESTS, "*", "data", '{"request_id": "r3", "user_id":"ann", "age":')
        await link.call("XADD", keys.REPORT_REQUESTS, "*", "data", '["ann"]')
        entries = [entry for _ in range(2 * in_hand) for entry in await stream.take()]
        job = await reports.job({"user_id": "ann", "inputs": PATIENT}, request_id="r1")
        await reports.erase("ann", "acme")  # somebody else's Ann
        assert await link.call("XLEN", keys.REPORT_REQUESTS) == 4
        await reports.erase("ann", "default")
        assert await link.call("XLEN", keys.REPORT_REQUESTS) == 2
        found = await responses(link)
        assert {one["request_id"]: one["error_message"].partition(":")[0] for one in found} == {
            "r1": "user_deleted",
            "r3": "user_deleted",
        }
        if in_hand:
            assert await stream.accept(entries[0], job) == "lost"
            assert await link.call("XPENDING", keys.REPORT_REQUESTS, "report", "-", "+", 9, "owner") != []
        await ask(link, "r1")
        await ask(link, "r4")
    async with running(settings):
        found = await answered(link, 4)
    assert [one["request_id"] for one in found if one["status"] == "success"] == ["r2", "r4"]
    assert await link.call("HGET", keys.REPORT_COUNTS, "repeated") == b"1"


async def test_a_request_that_is_withdrawn_while_there_is_no_room_makes_nobody_known(
    link: Link, settings: Settings, reports: Reports, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has it in hand, and goes on trying, would else make the erased person known anew."""
    monkeypatch.setattr("stages.report.FULL_AGAIN_S", 0.2)
    looked = watch_accepting(monkeypatch)
    waiting = query(front, route=["nobody"])
    await front.submit(waiting, in_flight_limit=5, wait=False)

    async def knows(user: str) -> bool:
        return bool(await link.call("EXISTS", keys.USER + user))

    async with running(changed(settings, admission={"max_jobs": 1})):
        await ask(link, "r1")
        await ask(link, "r2", user="ben")
        await wait_until(lambda: looked)
        assert await knows("ann")
        await reports.erase("ann", "default")
        await wait_until(lambda: knows("ben"))  # so the other one was let go of
        assert not await knows("ann")
        await front.cancel(waiting.id, "default")
        found = await answered(link, 2)
    assert [one["error_message"] for one in found] == [found[0]["error_message"], None]


async def test_people_of_different_tenants_are_never_the_same(reports: Reports, front: Front) -> None:
    """Also where the id of one looks like the other's name in keys."""
    ann = {"user_id": "ann", "inputs": PATIENT}
    await front.submit(await reports.job(ann, "acme"), in_flight_limit=5, wait=False)
    with pytest.raises(WrongField, match="age: Field required"):
        await reports.job({"user_id": "acme:ann", "reuse_last_input": True}, "default")
    await reports.erase("acme:ann", "default")
    merged = await reports.job({"user_id": "ann", "reuse_last_input": True}, "acme")
    assert merged.payload["inputs"]["age"] == PATIENT["age"]


async def test_a_person_whose_id_has_colons_has_reports(link: Link, settings: Settings, reports: Reports) -> None:
    """They are told to history, and erased, under the id that was sent."""
    for user in ("clinic:ann", "default:ann"):
        async with running(settings):
            await ask(link, user, user=user)
            await ask(link, f"{user}-wrong", user=user, inputs={})
            await answered(link, 2)
        rows = await link.call("XRANGE", keys.EVENTS, "-", "+")
        told = [orjson.loads(fields[fields.index(b"data") + 1]) for _, fields in rows]
        assert [event["user_id"] for event in told] == [user, user]
        assert orjson.loads(await link.call("GET", keys.INPUT + f"default:{user}"))["inputs"]["age"] == 44
        await reports.erase(user, "default")
        assert await responses(link) == []
        await link.call("DEL", keys.EVENTS)


async def test_a_report_being_written_for_an_erased_person_is_thrown_away(
    link: Link, settings: Settings, reports: Reports
) -> None:
    """At once: the call is broken off, nothing of it is kept, and the answer says why; so it is for one that waits."""
    gate = Gate(good)
    async with running(settings, Scripted("llm", gate, placed=True)):
        await ask(link, "r1")
        await ask(link, "r2")
        await wait_until(lambda: gate.waiting)
        await wait_until(lambda: _delayed(link, 1))
        await reports.erase("ann", "default")
        found = await answered(link, 2)
        assert gate.stopped
    assert [response["error_message"].partition(":")[0] for response in found] == ["user_deleted"] * 2
    assert [response["report"] for response in found] == [None, None]
    assert await link.call("KEYS", keys.REPORT + "*") == []
    assert await letters(link) == []


async def test_a_settle_that_comes_after_the_erasure_stores_nothing(
    link: Link, settings: Settings, reports: Reports
) -> None:
    """The person's epoch is looked at where the report would be stored: also that of one who has come back since."""
    async with requests_of(settings, "owner") as stream, Hand(settings, "hand", "report") as hand:
        for request_id, verb in (("r1", "complete"), ("r2", "bury")):
            await ask(link, request_id)
            [entry] = await stream.take()
            job = await reports.job({"user_id": "ann", "inputs": PATIENT}, request_id=request_id)
            job.route = ["report"]
            assert await stream.accept(entry, job) == "accepted"
            held = await hand.take_one()
            await reports.erase("ann", "default")
            await reports.job({"user_id": "ann", "inputs": PATIENT})
            assert await hand.settle(_settlement(held, job, verb)) == ["settled"]
            [response] = [one for one in await responses(link) if one["request_id"] == request_id]
            assert response["error_message"].startswith("user_deleted: ")
            ended = await outcome(link, job.id)
            assert ended is not None
            assert ended.error is not None
            assert (ended.status, ended.result, ended.error["code"]) == ("failed", None, "user_deleted")
            told = [_event(fields) for _, fields in await link.call("XRANGE", keys.EVENTS, "-", "+")]
            assert ("report", job.id, "10") not in told
            assert ("report", job.id, "0") in told
            assert await link.call("EXISTS", keys.USER_DATA + "ann") == 0
            assert await link.call("KEYS", keys.REPORT + "*") == []
            assert await letters(link) == []


def _event(fields: Sequence[bytes]) -> tuple[str, str, str]:
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    return values[b"kind"].decode(), values[b"id"].decode(), values[b"rank"].decode()


async def test_who_was_erased_while_their_request_was_read_is_kept_nowhere_and_sent_to_no_model(
    link: Link, settings: Settings, reports: Reports, front: Front
) -> None:
    """What begins with an epoch that is nobody's any more ends before the model is asked, also once they are back."""
    llm = Scripted("llm", good, placed=True)
    read = await reports.job({"user_id": "ann", "inputs": PATIENT}, request_id="r1")
    await reports.erase("ann", "default")
    await front.submit(read, in_flight_limit=5, wait=False)
    for name in (keys.INPUT, keys.USER, keys.USER_DATA):
        assert await link.call("EXISTS", name + "ann") == 0
    back = await reports.job({"user_id": "ann", "inputs": PATIENT | {"age": 1}})
    assert back.payload["epoch"] != read.payload["epoch"]
    async with running(settings, llm):
        [response] = await answered(link, 1)
    assert response["error_message"].startswith("user_deleted: ")
    ended = await outcome(link, read.id)
    assert ended is not None
    assert ended.error is not None
    assert ended.error["code"] == "user_deleted"
    assert llm.seen == []
    assert await letters(link) == []


@pytest.mark.parametrize("later", [{"age": 45}, {"age": -3}])
async def test_an_erasure_finds_what_outlives_the_responses(
    link: Link, settings: Settings, reports: Reports, front: Front, later: dict[str, Any]
) -> None:
    """Who keeps responses for less time has reports in the cache, and outcomes, that are there for longer."""
    job = await reports.job({"user_id": "ann", "inputs": PATIENT}, request_id="r1")
    job.payload["keep_ms"] = 1
    async with running(settings):
        await front.submit(job, in_flight_limit=5, wait=False)
        await answered(link, 1)
        await ask(link, "r2", inputs=PATIENT | later)  # what was to be kept of them is gone through
        await answered(link, 2)
    assert await link.call("EXISTS", keys.COMPLETION + job.id) == 1
    await reports.erase("ann", "default")
    assert await link.call("EXISTS", keys.COMPLETION + job.id) == 0
    assert await link.call("KEYS", keys.REPORT + "*") == []


async def test_asking_over_http_checks_the_types_of_a_persons_keys_first(
    link: Link, reports: Reports, front: Front
) -> None:
    """As for everything: a script that fails half-way would keep what it wrote."""
    job = await reports.job({"user_id": "ann", "inputs": PATIENT})
    await link.call("RPUSH", keys.USER_DATA + "ann", "wrong")
    before = await everything(link)
    with pytest.raises(CommandRefused, match="is a list"):
        await front.submit(job, idempotency=Idempotency("k", "h"), in_flight_limit=5, wait=False)
    assert await everything(link) == before
    await link.call("DEL", keys.USER_DATA + "ann")


def _settlement(entry: Entry, job: Job, verb: str) -> Settlement:
    result = {"cached": False, "hash": "0" * 64, "report": {"markdown": "secret"}}
    good_end = Completion(job.id, "completed", result=result, worker="hand")
    bad_end = Completion(job.id, "failed", error=error_body("failed", "test", "buried"), worker="hand")
    if verb == "complete":
        return Settlement(entry, job.id, "complete", good_end.encode())
    return Settlement(entry, job.id, "bury", bad_end.encode(), b'{"reason":"test"}')


async def test_a_dead_report_is_not_started_again(link: Link, settings: Settings, front: Front) -> None:
    """Its sender has an answer, and would get a second one."""

    async def refuse(job: Job) -> Done:
        raise Reject("no", code="bad_request")

    async with running(settings, Scripted("llm", refuse, placed=True)):
        await ask(link, "r1")
        await answered(link, 1)
    dead = DeadLetters(link, settings)
    [letter] = await dead.list(10)
    with pytest.raises(Reject, match="asked for again by a new request"):
        await dead.retry(letter.id, front.clock.now_ms())
