"""The messages service over HTTP: what is accepted, what is refused with nothing created, what is told afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from pydantic import ValidationError

from gateway import operation
from gateway.app import create_app
from gateway.asked import EXAMPLE
from gateway.errors import Problem, invalid
from gateway.messages import MessageItem, fill_in
from gateway.operation import AT_ONCE, MOST_FIELDS
from pipeline import connection, keys, scripts
from pipeline.connection import Link
from pipeline.dead import DeadLetters
from pipeline.errors import BrokerUnavailable, HistoryUnavailable, Reject
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.records import Event, Records
from pipeline.settings import MessagesSettings, Settings
from stages.aggregator import Aggregator
from tests.conftest import wait_until
from tests.gateway.recorded import record
from tests.rig import Scripted, changed, working

Json = dict[str, Any]
HOOK = "https://example.com/hook"
TENANTS = {"gateway": {"api_keys": ("anna:key-a", "ben:key-b")}}
ANNA, BEN = {"authorization": "Bearer key-a"}, {"authorization": "Bearer key-b"}


async def answering(job: Job) -> Done:
    """Say what was asked, and refuse what is bad."""
    turns = job.payload.get("messages") or [{"content": job.payload.get("prompt") or job.payload["query"]}]
    text = " | ".join(turn["content"] for turn in turns)
    if "bad" in text:
        raise Reject("the model will not say", code="content_filtered")
    return Done({"answer": text, "model": job.payload.get("model", "m")})


@dataclass
class Service:
    """A gateway, its Redis, and its history, which is written when the test says so."""

    http: httpx.AsyncClient
    link: Link
    front: Front
    records: Records

    async def create(self, headers: dict[str, str] | None = None, /, **body: Any) -> httpx.Response:
        return await self.http.post("/message/create", json={"queue_id": "q"} | body, headers=headers or {})

    async def get(self, path: str, headers: dict[str, str] | None = None, /, **query: Any) -> Json:
        reply = await self.http.get(path, params=query, headers=headers or {})
        assert reply.status_code == 200, reply.text
        value: Json = reply.json()
        return value

    async def record(self) -> None:
        """Do the recorder's work."""
        await record(self.link, self.records)

    async def forget(self) -> None:
        """Let seven days pass: what Redis kept is gone."""
        for pattern in (keys.MESSAGE, keys.BATCH, keys.BATCH_RESULTS, keys.COMPLETION):
            for name in await self.link.call("KEYS", pattern + "*"):
                await self.link.call("DEL", name)

    async def ended(self, batch_id: str, headers: dict[str, str] | None = None, /) -> Json:
        """Wait until a batch is closed; return how it stands."""
        found: Json = {}

        async def is_closed() -> bool:
            nonlocal found
            found = await self.get(f"/batch/{batch_id}", headers)
            return found["closed_ms"] is not None

        await wait_until(is_closed)
        return found

    async def is_untouched(self) -> bool:
        """Say whether neither Redis nor history knows of anything."""
        names = [name for name in await self.link.call("KEYS", "*") if not name.startswith((b"reply:", b"worker"))]
        streams = [name for name in names if not name.startswith((b"job:", b"workers"))]
        live = await self.link.call("EXISTS", keys.LIVE_INDEX, keys.DELAYED, keys.EVENTS)
        rows, _ = await self.records.messages("default")
        return not streams and not live and not rows


@pytest.fixture
async def service(
    request: pytest.FixtureRequest, link: Link, settings: Settings, front: Front, records: Records
) -> AsyncIterator[Service]:
    """A gateway on a real Redis and a real history; `params` change its settings."""
    settings = changed(settings, **getattr(request, "param", {}))
    transport = httpx.ASGITransport(create_app(settings, front, records))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as http:
        yield Service(http, link, front, records)


@pytest.fixture
async def workers(link: Link, settings: Settings) -> AsyncIterator[None]:
    """Stages that work on messages."""
    stages = [Scripted("encoder", answering), Scripted("retriever", answering), Scripted("llm", answering)]
    async with working(settings, [*stages, Aggregator(settings)]):
        yield


def in_a_day(service: Service, days: float = 1) -> str:
    """An instant that is still to come whenever this runs."""
    return datetime.fromtimestamp(service.front.clock.now_ms() / 1000 + days * 86_400, UTC).isoformat()


guarded = pytest.mark.parametrize("service", [TENANTS], indirect=True)

# --- creating -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("workers")
async def test_single_message_has_a_batch_of_its_own(service: Service) -> None:
    """200, and the result is read under its id."""
    reply = await service.create(prompt="Hello.")
    assert reply.status_code == 200
    body = reply.json()
    assert (body["success"], body["message"]) == (True, "Message created successfully")
    assert body.keys() == {"success", "message", "batch_id", "message_id"}
    batch = await service.ended(body["batch_id"])
    assert (batch["request_count"], batch["response_count"], batch["status"], batch["progress"]) == (
        1, 1, "completed", 1.0,
    )  # fmt: skip
    found = await service.get(f"/message/{body['message_id']}")
    assert (found["status"], found["result"]["answer"], found["batch_id"], found["queue_id"]) == (
        "completed", "Hello.", body["batch_id"], "q",
    )  # fmt: skip


@pytest.mark.usefixtures("workers")
async def test_batch_answers_in_the_order_given(service: Service) -> None:
    """Ids in order, results in order, each with its outcome; the failed one among them."""
    prompts = ["one", "bad", "three"]
    reply = await service.create(messages=[{"prompt": prompt} for prompt in prompts])
    body = reply.json()
    assert (body["message"], body["message_count"]) == ("Batch created successfully", 3)
    batch = await service.ended(body["batch_id"])
    assert (batch["status"], batch["failed_count"]) == ("completed_with_errors", 1)
    found = await service.get(f"/batch/{body['batch_id']}/results")
    assert (found["batch_id"], found["status"]) == (body["batch_id"], "completed_with_errors")
    assert [row["message_id"] for row in found["results"]] == body["message_ids"]
    assert [row["status"] for row in found["results"]] == ["completed", "failed", "completed"]
    assert found["results"][0]["result"]["answer"] == "one"
    assert found["results"][1]["error"]["code"] == "content_filtered"


@pytest.mark.usefixtures("workers")
async def test_placeholders_are_filled_where_values_are_given(service: Service) -> None:
    """In prompt and system prompt, once; without `supportive_variable` the text is taken as it is."""
    values = {"name": "Ann {{x}}", "n": 3, "yes": True}
    first = {"prompt": "Hi {{name}}, {{ n }}", "system_prompt": "{{yes}}", "supportive_variable": values}
    reply = await service.create(messages=[first, {"prompt": "Hi {{name}}"}])
    await service.ended(reply.json()["batch_id"])
    found = await service.get(f"/batch/{reply.json()['batch_id']}/results")
    assert [row["result"]["answer"] for row in found["results"]] == ["true | Hi Ann {{x}}, 3", "Hi {{name}}"]


@pytest.mark.parametrize("service", [TENANTS | {"messages": {"max_queues": 2}}], indirect=True)
async def test_number_of_queues_is_bounded_for_each_tenant(service: Service) -> None:
    """What would make one more is refused, by whatever way, and nothing is created; those that are there go on."""
    for name in ("one", "two"):
        assert (await service.http.put(f"/queue/{name}", json={"model": name}, headers=ANNA)).status_code == 200
    before = sorted(await service.link.call("KEYS", "queue*"))
    hooked = {"queue_id": "three", "prompt": "a", "webhook_url": HOOK}
    for reply in (
        await service.http.put("/queue/three", json={"model": "m"}, headers=ANNA),
        await service.http.post("/queue/three/rotate", headers=ANNA),
        await service.http.post("/message/create", json=hooked, headers=ANNA),
    ):
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (409, "too_many_queues", "queue_id")
        assert "PENSTOCK_MESSAGES__MAX_QUEUES" in error["message"]
    assert sorted(await service.link.call("KEYS", "queue*")) == before
    assert await service.link.call("EXISTS", keys.LIVE_INDEX) == 0
    assert (await service.http.put("/queue/one", json={"model": "new"}, headers=ANNA)).status_code == 200
    assert (await service.create(ANNA, **hooked | {"queue_id": "two"})).status_code == 200
    assert (await service.create(ANNA, queue_id="three", prompt="a")).status_code == 200  # it leaves nothing for ever
    assert (await service.http.put("/queue/three", json={"model": "m"}, headers=BEN)).status_code == 200
    assert (await service.http.put("/queue/three", json={"model": "m"}, headers=BEN)).status_code == 200


@pytest.mark.usefixtures("workers")
async def test_queue_gives_what_a_message_does_not_name(service: Service) -> None:
    """Model, system prompt, webhook; what a message names itself wins. A queue that nobody set up has no defaults."""
    nobodys = await service.get("/queue/q")
    assert set(nobodys.values()) == {"q", None}
    assert await service.link.call("KEYS", "queue*") == []  # reading leaves nothing, whatever is read
    wanted = {"model": "big", "system_prompt": "Be brief.", "webhook_url": HOOK}
    reply = await service.http.put("/queue/q", json=wanted)
    assert reply.status_code == 200
    assert (reply.json() | wanted) == reply.json() == await service.get("/queue/q")
    assert reply.json()["webhook_secret"].startswith("whsec_")
    batch_id = (await service.create(messages=[{"prompt": "a"}, {"prompt": "b", "system_prompt": "c"}])).json()[
        "batch_id"
    ]
    await service.ended(batch_id)
    found = await service.get(f"/batch/{batch_id}/results")
    assert [row["result"] for row in found["results"]] == [
        {"answer": "Be brief. | a", "model": "big"}, {"answer": "c | b", "model": "big"},
    ]  # fmt: skip
    ((_, fields),) = await service.link.call("XRANGE", keys.stream("webhook"), "-", "+")
    assert orjson.loads(fields[1])["payload"]["url"] == HOOK
    assert (await service.create(prompt="a", webhook_event="on_complete")).status_code == 200  # the queue has the URL
    await service.http.put("/queue/q", json={})
    again = await service.get("/queue/q")
    assert (again["model"], again["webhook_url"]) == (None, None)
    assert again["webhook_secret"] == reply.json()["webhook_secret"]
    rotated = await service.http.post("/queue/q/rotate")
    assert rotated.json()["webhook_secret"] not in {None, again["webhook_secret"]}
    twice = await service.http.post("/queue/q/rotate")
    assert (twice.status_code, twice.json()["error"]["code"]) == (409, "rotated_lately")


async def test_batch_names_the_webhook_that_tells_of_it(service: Service, settings: Settings) -> None:
    """From its end on, wherever it is read from; and what it names is found while it waits to be sent."""
    body = (await service.create(messages=[FIRST], webhook_url=HOOK)).json()
    silent = (await service.create(prompt="a")).json()
    assert (await service.get(f"/batch/{body['batch_id']}"))["webhook_id"] is None
    async with working(settings, [Scripted("llm", answering), Aggregator(settings)]):
        assert (await service.ended(silent["batch_id"]))["webhook_id"] is None
        name = (await service.ended(body["batch_id"]))["webhook_id"]
    found = await service.get(f"/webhook/{name}")
    assert (found["status"], found["url"], found["batch_id"]) == ("pending", HOOK, body["batch_id"])
    assert (found["id"], found["webhook_id"]) == (name, name)
    await service.record()
    await service.forget()
    assert (await service.get(f"/batch/{body['batch_id']}"))["webhook_id"] == name
    assert (await service.get(f"/webhook/{name}"))["url"] == HOOK


@pytest.mark.usefixtures("workers")
async def test_retrieving_message_passes_encoder_and_retriever(service: Service) -> None:
    """The prompt is the question."""
    body = (await service.create(prompt="What is a lease?", retrieve=True)).json()
    await service.ended(body["batch_id"])
    timings = (await service.get(f"/message/{body['message_id']}"))["timings_ms"]
    assert {"encoder", "retriever", "llm"} <= timings.keys()


@pytest.mark.usefixtures("workers")
async def test_same_idempotency_key_repeats_the_answer(service: Service) -> None:
    """The same ids in the same order, said to be a repetition; another body is refused."""
    key = {"idempotency-key": "k1"}
    first = await service.create(key, messages=[{"prompt": "a"}, {"prompt": "b"}])
    again = await service.create(key, messages=[{"prompt": "a"}, {"prompt": "b"}])
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = await service.create(key, messages=[{"prompt": "a"}])
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("asked", [{"prompt": "a"}, {"messages": [{"prompt": "a"}, {"prompt": "b"}]}])
async def test_idempotency_key_outlives_what_redis_keeps_of_its_batch(service: Service, asked: Json) -> None:
    """The ids are read from history then; where that knows nothing either, the client hears so."""
    key = {"idempotency-key": "k1"}
    first = await service.create(key, **asked)
    await service.ended(first.json()["batch_id"])
    await service.forget()
    unknown = await service.create(key, **asked)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (409, "batch_gone")
    assert unknown.json()["job_id"] == first.json()["batch_id"]
    await service.record()
    again = await service.create(key, **asked)
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["idempotent-replayed"] == "true"


async def test_thousand_batches_at_once_are_all_accepted(service: Service) -> None:
    """Each with a webhook, so that its queue is asked for defaults and a secret, too."""
    bodies = [{"messages": [{"prompt": "a"}] * (1 + number % 50), "webhook_url": HOOK} for number in range(1_000)]
    replies = await asyncio.gather(*(service.create(**body) for body in bodies))
    assert [reply.status_code for reply in replies] == [200] * len(bodies)
    assert await service.link.call("ZCARD", keys.LIVE_INDEX) == sum(len(body["messages"]) + 1 for body in bodies)


async def test_batch_that_may_have_been_accepted_is_told_so(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to do, and that has the batch made once."""
    monkeypatch.setattr(connection, "ANSWER_WITHIN_S", 0.2)
    run = service.front.batches._accepting.run

    async def deaf(script: scripts.Script, *args: Any, **more: Any) -> Any:
        reply = await run(script, *args, **more)
        if script is scripts.BATCH:
            await asyncio.Event().wait()
        return reply

    monkeypatch.setattr(service.front.batches._accepting, "run", deaf)
    key, body = {"idempotency-key": "k"}, {"messages": [{"prompt": "a"}, {"prompt": "b"}]}
    error = (await service.create(key, **body)).json()["error"]
    assert error["code"] == "maybe_accepted"
    assert "same Idempotency-Key" in error["message"]
    monkeypatch.undo()
    again = await service.create(key, **body)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    assert await service.link.call("ZCARD", keys.LIVE_INDEX) == 3


FIRST = {"prompt": "a"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [FIRST]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [FIRST] * 4}, "messages"),
        ({"messages": [FIRST, FIRST, {"prompt": 7}]}, "messages[2].prompt"),
        ({"messages": [FIRST, {"prompt": ""}]}, "messages[1].prompt"),
        ({"messages": [FIRST, {}]}, "messages[1].prompt"),
        ({"messages": [FIRST, "a"]}, "messages[1]"),
        ({"messages": [FIRST, {"prompt": "a", "colour": "red"}]}, "messages[1].colour"),
        ({"messages": [FIRST, {"prompt": "{{b}}", "supportive_variable": {"a": 1}}]}, "messages[1].prompt"),
        (
            {"messages": [{"prompt": "a", "system_prompt": "{{b}}", "supportive_variable": {}}]},
            "messages[0].system_prompt",
        ),
        ({"messages": [{"prompt": "a", "supportive_variable": {"b": []}}]}, "messages[0].supportive_variable.b"),
        ({"messages": [FIRST], "system_prompt": "a"}, "system_prompt"),
        ({"prompt": "{{a}}", "supportive_variable": {"a": ""}}, "prompt"),
        ({"prompt": "a", "webhook_url": "ftp://example.com"}, "webhook_url"),
        ({"prompt": "a", "webhook_url": "http://127.0.0.1/"}, "webhook_url"),
        ({"prompt": "a", "webhook_event": "sometimes"}, "webhook_event"),
        ({"prompt": "a", "webhook_event": "on_complete"}, "webhook_event"),
        ({"prompt": "a", "schedule_at": "tomorrow"}, "schedule_at"),
        ({"prompt": "a", "schedule_at": "2027-01-31T08:00:00"}, "schedule_at"),
        ({"prompt": "a", "schedule_at": "9999-01-31T08:00:00Z"}, "schedule_at"),
        ({"prompt": " ", "retrieve": True}, "prompt"),
        ({"prompt": "a" * 16_001, "retrieve": True}, "prompt"),
        ({"prompt": "a", "queue_id": "a:b"}, "queue_id"),
        ({"messages": [FIRST, {"prompt": "a\0"}]}, "messages[1].prompt"),
        ({"messages": [FIRST, {"prompt": "a", "system_prompt": "\0"}]}, "messages[1].system_prompt"),
        ({"prompt": "{{a}}", "supportive_variable": {"a": "\0"}}, "supportive_variable.a"),
        ({"prompt": "a", "model": "\0"}, "model"),
        ({"prompt": "a", "queue_id": None}, "queue_id"),
        ({"prompt": "a", "model": ""}, "model"),
    ],
)
@pytest.mark.parametrize("service", [{"messages": {"max_batch": 3}}], indirect=True)
async def test_wrong_field_is_named_and_nothing_is_created(service: Service, body: Json, param: str) -> None:
    """422 with the exact path; neither Redis nor history knows of anything."""
    reply = await service.create(**body)
    assert reply.status_code == 422, reply.text
    assert reply.json()["error"]["param"] == param
    assert await service.is_untouched()


@pytest.mark.parametrize(
    ("number", "wrong", "field"),
    [
        (999, {}, ".prompt"),
        (1_000, {"prompt": 7}, ".prompt"),
        (1_001, "a", ""),
        (1_001, {"prompt": "{{b}}"}, ".prompt"),
    ],
)
async def test_wrong_field_is_named_by_its_place_in_a_long_list(
    service: Service, number: int, wrong: Json | str, field: str
) -> None:
    """A long list is checked portion by portion, and nobody can tell."""
    messages: list[Any] = [FIRST] * (AT_ONCE * 2 + 2)
    messages[number] = wrong | {"supportive_variable": {}} if isinstance(wrong, dict) else wrong
    reply = await service.create(messages=messages)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, f"messages[{number}]{field}")
    assert await service.is_untouched()


FLOOD: Json = {f"field {number}": [] for number in range(MOST_FIELDS + 1)}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [0] * 700_000}, "messages"),
        ({"messages": [FLOOD | FIRST] * 100}, "messages[0]"),
        ({"messages": [FIRST, FIRST | {"supportive_variable": FLOOD}]}, "messages[1].supportive_variable"),
        ({"prompt": "a", "supportive_variable": FLOOD}, "supportive_variable"),
        (FLOOD, None),
        ({"messages": [dict(islice(FLOOD.items(), MOST_FIELDS))] * 400}, "messages[0].prompt"),
        ({"messages": [0] * 10_000}, "messages[0]"),
    ],
)
async def test_flood_of_wrong_fields_is_not_described_one_by_one(
    service: Service, monkeypatch: pytest.MonkeyPatch, body: Json, param: str | None
) -> None:
    """A body of a megabyte would stop the gateway for many seconds; what is looked at is bounded."""
    described: list[int] = []

    def counting(error: ValidationError, *args: Any, **more: Any) -> Problem:
        described.append(error.error_count())
        return invalid(error, *args, **more)

    monkeypatch.setattr(operation, "invalid", counting)
    reply = await service.create(**body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)
    assert sum(described) <= 5 * MOST_FIELDS
    assert len(reply.content) < 4_000
    assert await service.is_untouched()


async def test_long_list_is_taken_in_the_order_given(service: Service) -> None:
    """All of it, across portions."""
    count = AT_ONCE + 2
    body = (await service.create(messages=[{"prompt": f"number {number}"} for number in range(count)])).json()
    assert len(set(body["message_ids"])) == count
    for number in (0, AT_ONCE - 1, AT_ONCE, count - 1):
        live = await service.link.call("HGET", keys.LIVE + body["message_ids"][number], "body")
        assert f'"number {number}"'.encode() in live


BOUNDS = {"messages": {"max_text_chars": 100, "max_batch_chars": 250}}
FILLED: Json = {"prompt": "{{a}}" * 10, "supportive_variable": {"a": "0123456789"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [FILLED, FILLED]}, None),
        ({"messages": [FIRST, FILLED | {"prompt": FILLED["prompt"] + "b"}]}, "messages[1].prompt"),
        ({"messages": [FIRST, FILLED | {"prompt": "a", "system_prompt": "{{a}}" * 11}]}, "messages[1].system_prompt"),
        ({"messages": [FILLED, FILLED, FILLED]}, "messages[2].prompt"),
        ({"prompt": "a" * 101}, "prompt"),
        ({"queue_id": "wordy", "messages": [FIRST, FIRST]}, None),
        ({"queue_id": "wordy", "messages": [FIRST, FIRST, FIRST]}, "messages[2].prompt"),
    ],
)
@pytest.mark.parametrize("service", [BOUNDS], indirect=True)
async def test_what_is_made_of_a_body_is_bounded(service: Service, body: Json, param: str | None) -> None:
    """Each text with its placeholders filled, and all of them together with what the queue adds."""
    assert (await service.http.put("/queue/wordy", json={"system_prompt": "b" * 99})).status_code == 200
    reply = await service.create(**body)
    if param is None:
        assert reply.status_code == 200
        return
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (422, param, "invalid_field")
    assert await service.link.call("EXISTS", keys.LIVE_INDEX) == 0


async def test_filling_stops_where_a_text_becomes_too_long() -> None:
    """Not afterwards: a hundred thousand times a hundred thousand characters are no text to hold in memory."""
    item = MessageItem(prompt="{{a}}" * 100_000, supportive_variable={"a": "b" * 100_000})
    with pytest.raises(Problem, match="at most"):
        await fill_in([("", item)], None, retrieve=False, bounds=MessagesSettings())


async def test_others_have_their_turn_while_a_long_list_is_filled_in() -> None:
    """Once for each portion after the first."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    items = [("", MessageItem(prompt="a"))] * (3 * AT_ONCE)
    assert len(await fill_in(items, None, retrieve=False, bounds=MessagesSettings())) == len(items)
    task.cancel()
    assert turns >= 2


async def test_missing_value_is_named(service: Service) -> None:
    """The placeholder, so that the sender knows what to give."""
    for name in ("last_name", "last name", "имя", "a:b"):
        reply = await service.create(prompt=f"Hi {{{{first}}}} {{{{ {name} }}}}", supportive_variable={"first": "Ann"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, "missing_variable")
        assert f"{{{{{name}}}}}" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("prompt", "values", "filled"),
    [
        ("{{имя}}, {{ first name }}!", {"имя": "Аня", "first name": "Ann"}, "Аня, Ann!"),
        ("{{a:b}} {{ c }}", {"a:b": 1, " c ": True}, "1 true"),
        ("{{{a}}} {{}} {{ }} {{if x:\n y}} {{a", {"a": "b"}, "{b} {{}} {{ }} {{if x:\n y}} {{a"),
    ],
)
async def test_placeholder_may_have_any_name(prompt: str, values: Json, filled: str) -> None:
    """In any script, with blanks in it; what is no name stays as it is."""
    item = MessageItem(prompt=prompt, supportive_variable=values)
    (message,) = await fill_in([("", item)], None, retrieve=False, bounds=MessagesSettings())
    assert message.prompt == filled


async def test_scheduled_message_waits(service: Service) -> None:
    """It is pending, and on no stream."""
    due_ms = service.front.clock.now_ms() + 3_600_000
    text = datetime.fromtimestamp(due_ms / 1000, UTC).isoformat()
    body = (await service.create(prompt="later", schedule_at=text)).json()
    assert await service.link.call("EXISTS", keys.stream("llm")) == 0
    assert (await service.get(f"/message/{body['message_id']}"))["status"] == "pending"
    assert (await service.get(f"/batch/{body['batch_id']}"))["status"] == "pending"
    assert abs(float(await service.link.call("ZSCORE", keys.DELAYED, body["message_id"])) - due_ms) <= 1


async def test_bound_of_a_schedule_is_told_in_days(service: Service) -> None:
    """And the example that the documents give can be sent, now and in any year."""
    reply = await service.create(prompt="a", schedule_at=in_a_day(service, 31))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (422, "schedule_at")
    assert "at most 30 days ahead" in error["message"]
    assert (await service.create(prompt="a", schedule_at=EXAMPLE)).status_code == 200
    assert EXAMPLE in (Path(__file__).parents[2] / "docs/MESSAGES.md").read_text()


@pytest.mark.parametrize(
    "service", [{"messages": {"max_body_bytes": 2 << 20}, "gateway": {"max_body_bytes": 1024}}], indirect=True
)
async def test_this_path_takes_larger_bodies_than_others(service: Service) -> None:
    """And has a bound of its own."""
    assert (await service.create(prompt="a" * (1 << 20))).status_code == 200
    assert (await service.create(prompt="a" * (2 << 20))).status_code == 413
    assert (await service.http.put("/queue/q", json={"system_prompt": "a" * 2_000})).status_code == 413


# --- reading and managing -------------------------------------------------------------------------


@pytest.mark.usefixtures("workers")
async def test_history_tells_the_same_when_redis_has_forgotten(service: Service) -> None:
    """One message, one batch, its members, its results: read from Redis, then from the database."""
    body = (await service.create(messages=[{"prompt": p} for p in ("one", "bad", "three")])).json()
    batch_id, message_id = body["batch_id"], body["message_ids"][1]
    paths = (
        f"/message/{message_id}",
        f"/batch/{batch_id}",
        f"/batch/{batch_id}/results",
        f"/batch/{batch_id}/messages",
    )
    await service.ended(batch_id)
    before = [await service.get(path) for path in paths]
    await service.record()
    await service.forget()
    after = [await service.get(path) for path in paths]
    for old, new in zip(before[:2], after[:2], strict=True):
        assert {name: new.get(name) for name in old} == old
    assert after[2] == before[2]
    shown = [
        [(row["message_id"], row["status"], row["position"]) for row in page["messages"]]
        for page in (before[3], after[3])
    ]
    assert shown[0] == shown[1]
    assert after[0]["prompt"] == "bad"


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("results", ["kept", "gone"])
async def test_member_whose_result_goes_before_its_batch_is_read_from_history(service: Service, results: str) -> None:
    """It ended earlier, so its result is not kept as long: it is not lost for that, whatever is asked."""
    body = (await service.create(messages=[{"prompt": p} for p in ("one", "bad", "three")])).json()
    batch_id = body["batch_id"]
    await service.ended(batch_id)
    paths = (f"/batch/{batch_id}/messages", f"/batch/{batch_id}/results", f"/message/{body['message_ids'][0]}")
    before = [await service.get(path) for path in paths]
    await service.record()
    await service.link.call("DEL", *(keys.MESSAGE + one for one in body["message_ids"][:2]))
    if results == "gone":
        await service.link.call("DEL", keys.BATCH_RESULTS + batch_id)
    after = [await service.get(path) for path in paths]
    assert after[:2] == before[:2]
    assert {name: after[2].get(name) for name in before[2]} == before[2]


@pytest.mark.usefixtures("workers")
async def test_member_that_only_history_knows_waits_for_it(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database is away nothing is said of it, rather than something wrong."""
    body = (await service.create(messages=[FIRST, FIRST])).json()
    await service.ended(body["batch_id"])
    await service.link.call("DEL", keys.MESSAGE + body["message_ids"][0])

    async def away(*_: object) -> None:
        raise HistoryUnavailable

    monkeypatch.setattr(service.records, "message", away)
    reply = await service.http.get(f"/batch/{body['batch_id']}/messages")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "history_unavailable")


async def test_what_was_in_flight_when_redis_was_emptied_is_lost(service: Service) -> None:
    """It is told so wherever it is asked for, as failed, and may be sent again; what had completed stays so."""
    body = (await service.create(messages=[FIRST, FIRST])).json()
    batch_id, (first, second) = body["batch_id"], body["message_ids"]
    await service.record()
    done = Event("message", first, "default", 10, 1, {"status": "completed", "result": {"answer": "a"}})
    await service.records.apply([done])
    await service.link.call("FLUSHALL")
    lost = await service.get(f"/message/{second}")
    assert (lost["status"], lost["error"]["code"]) == ("failed", "lost")
    for path, name in ((f"/batch/{batch_id}/messages", "messages"), (f"/batch/{batch_id}/results", "results")):
        rows = (await service.get(path))[name]
        assert [(row["message_id"], row["status"]) for row in rows] == [(first, "completed"), (second, "failed")]
        assert rows[1]["error"]["code"] == "lost"
    listed = (await service.get("/message"))["messages"]
    assert {row["message_id"]: row["status"] for row in listed} == {first: "completed", second: "failed"}
    batch = await service.get(f"/batch/{batch_id}")
    assert (batch["status"], batch["response_count"], batch["failed_count"], batch["progress"]) == (
        "completed_with_errors", 2, 1, 1.0,
    )  # fmt: skip
    assert (await service.get("/batch"))["batches"] == [batch]
    assert (await service.http.post(f"/batch/{batch_id}/cancel")).status_code == 409
    reply = await service.http.post(f"/message/{second}/retry")
    assert (reply.status_code, reply.json().get("retry_of")) == (200, second)


async def test_what_the_recorder_has_not_written_yet_is_not_lost(service: Service) -> None:
    """Where it is so far behind that Redis has let go of results, an outcome may still wait to be written."""
    body = (await service.create(prompt="a")).json()
    await service.record()
    await service.link.call("FLUSHALL")
    old = await service.link.call("XADD", keys.EVENTS, "1-1", "kind", "message")
    paths = (f"/message/{body['message_id']}", f"/batch/{body['batch_id']}", f"/batch/{body['batch_id']}/results")
    assert [(await service.get(path))["status"] for path in paths] == ["pending"] * 3
    await service.link.call("XDEL", keys.EVENTS, old)
    assert "pending" not in [(await service.get(path))["status"] for path in paths]


DEAD: Sequence[Json] = (
    {"messages": [{"prompt": "bad", "system_prompt": "Be brief."}, {"prompt": "two"}], "model": "large"},
    {"prompt": "bad", "system_prompt": "Be brief.", "model": "large"},
    {"prompt": "bad", "retrieve": True},
)


@pytest.mark.parametrize("asked", DEAD)
@pytest.mark.usefixtures("workers")
async def test_dead_message_is_retried_as_its_sender_would(service: Service, settings: Settings, asked: Json) -> None:
    """As a new message in a batch of its own, in the same queue, with the same webhook; the old batch stands."""
    body = (await service.create(queue_id="letters", webhook_url=HOOK, **asked)).json()
    old_batch, old_id = body["batch_id"], body.get("message_id") or body["message_ids"][0]
    await service.ended(old_batch)
    before = await service.get(f"/batch/{old_batch}/results")
    letters = DeadLetters(service.link, settings)
    (letter,) = await letters.list(10)
    now_ms = service.front.clock.now_ms()
    tries = await asyncio.gather(*(letters.retry(letter.id, now_ms) for _ in range(3)), return_exceptions=True)
    (new_id,) = [one for one in tries if isinstance(one, str)]
    assert sum(isinstance(one, Reject) for one in tries) == 2
    new_batch = (await service.get(f"/message/{new_id}"))["batch_id"]
    standing = await service.ended(new_batch)
    assert (standing["request_count"], standing["queue_id"], standing["failed_count"]) == (1, "letters", 1)
    assert await service.get(f"/batch/{old_batch}/results") == before
    assert await service.link.call("XLEN", keys.stream("webhook")) == 2
    await service.record()
    old, new = [(await service.records.message("default", one)) or {} for one in (old_id, new_id)]
    assert new["retry_of"] == old_id
    for name in ("prompt", "system_prompt", "model", "retrieve", "queue_id"):
        assert new[name] == old[name], name
    (again,) = await letters.list(10)  # it was bad once more
    assert again.job_id == new_id


async def test_retry_that_was_interrupted_sends_nothing_twice(
    service: Service, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between sending the message and taking the letter away: the next retry only does the latter."""
    async with working(settings, [Scripted("llm", answering), Aggregator(settings)]):
        await service.ended((await service.create(prompt="bad")).json()["batch_id"])
    letters = DeadLetters(service.link, settings)
    (letter,) = await letters.list(10)
    call = service.link.call

    async def dying(name: str, *args: Any, **more: Any) -> Any:
        if name == "XDEL":
            raise BrokerUnavailable("killed")
        return await call(name, *args, **more)

    monkeypatch.setattr(service.link, "call", dying)
    with pytest.raises(BrokerUnavailable, match="killed"):
        await letters.retry(letter.id, service.front.clock.now_ms())
    monkeypatch.undo()
    sent = await service.link.call("XRANGE", keys.stream("llm"), "-", "+")
    new_id = await letters.retry(letter.id, service.front.clock.now_ms())
    assert await service.link.call("XRANGE", keys.stream("llm"), "-", "+") == sent
    assert len(sent) == 1
    assert new_id.encode() in sent[0][1][1]
    assert await letters.count() == 0


@pytest.mark.usefixtures("workers")
async def test_dead_message_of_a_batch_that_is_forgotten_runs_again_by_itself(
    service: Service, settings: Settings
) -> None:
    """Nobody knows any more which queue it was in."""
    await service.ended((await service.create(prompt="bad")).json()["batch_id"])
    await service.forget()
    letters = DeadLetters(service.link, settings)
    (letter,) = await letters.list(10)
    new_id = await letters.retry(letter.id, service.front.clock.now_ms())
    await wait_until(lambda: service.link.call("EXISTS", keys.COMPLETION + new_id))
    assert await service.link.call("EXISTS", keys.MESSAGE + new_id) == 0


async def test_members_come_in_pages(service: Service) -> None:
    """In the order given, from Redis and from history."""
    body = (await service.create(messages=[{"prompt": str(number)} for number in range(5)])).json()
    path = f"/batch/{body['batch_id']}/messages"
    await service.record()

    async def pages() -> list[str]:
        ids: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = await service.get(path, limit=2, **after)
            ids += [row["message_id"] for row in page["messages"]]
            if page["next"] is None:
                return ids
            after = {"after": page["next"]}

    odd = ("\u00b2", "-1", "1" * 10, "x", "\0", "\u0661")

    async def refused(*given: str) -> bool:
        replies = [await service.http.get(path, params={"after": after}) for after in given]
        return [(r.status_code, r.json()["error"]["code"]) for r in replies] == [(422, "invalid_cursor")] * len(given)

    assert await pages() == body["message_ids"]
    assert await refused(*odd)
    await service.forget()
    assert await pages() == body["message_ids"]
    assert await refused(*odd, "2")


@pytest.mark.usefixtures("workers")
async def test_lists_are_filtered_and_up_to_date(service: Service) -> None:
    """By queue, status, batch and time; what ended since it was recorded is told as it stands now."""
    first = (await service.create(prompt="one")).json()
    await service.record()
    await service.ended(first["batch_id"])
    second = (await service.create(prompt="bad", queue_id="other")).json()
    await service.ended(second["batch_id"])
    await service.record()
    third = (await service.create(prompt="three", schedule_at=in_a_day(service))).json()
    await service.record()

    async def ids(**query: Any) -> list[str]:
        return [row["message_id"] for row in (await service.get("/message", **query))["messages"]]

    one, two, three = (body["message_id"] for body in (first, second, third))
    assert await ids() == [three, two, one]
    assert await ids(queue_id="other") == [two]
    assert await ids(status="completed") == [one]
    assert await ids(status="pending") == [three]
    assert await ids(status="processing") == []
    assert await ids(batch_id=second["batch_id"]) == [two]
    assert await ids(until="2020-01-01T00:00:00Z") == []
    assert await ids(since="2020-01-01T00:00:00Z", limit=2) == [three, two]
    batches = (await service.get("/batch", status="completed_with_errors"))["batches"]
    assert [(row["batch_id"], row["failed_count"]) for row in batches] == [(second["batch_id"], 1)]
    for query in (
        {"status": "done"},
        {"limit": "0"},
        {"limit": "many"},
        {"since": "monday"},
        {"colour": "red"},
        {"after": "x"},
        {"limit": "201"},
        {"limit": "0002009999"},
        {"queue_id": "\0"},
        {"queue_id": "a:b"},
        {"batch_id": "\0"},
        {"batch_id": "x"},
    ):
        reply = await service.http.get("/message", params=query)
        assert (reply.status_code, reply.json()["error"]["param"]) == (422, next(iter(query)))
        if "batch_id" not in query:
            reply = await service.http.get("/batch", params=query)
            assert (reply.status_code, reply.json()["error"]["param"]) == (422, next(iter(query)))


async def test_waiting_message_is_cancelled_at_once(service: Service) -> None:
    """Once; afterwards it has its outcome."""
    body = (await service.create(prompt="never")).json()
    path = f"/message/{body['message_id']}/cancel"
    reply = await service.http.post(path)
    assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
    assert (await service.http.post(path)).status_code == 409
    assert (await service.get(f"/message/{body['message_id']}"))["status"] == "cancelled"


async def test_batch_is_cancelled(service: Service, settings: Settings) -> None:
    """202, and then it is closed as cancelled; a closed one is 409."""
    body = (await service.create(messages=[FIRST] * 3)).json()
    path = f"/batch/{body['batch_id']}/cancel"
    assert (await service.http.post(path)).status_code == 202
    assert (await service.http.post(path)).status_code == 202
    async with working(settings, [Aggregator(settings)]):
        assert (await service.ended(body["batch_id"]))["status"] == "cancelled"
    assert (await service.http.post(path)).status_code == 409
    await service.record()
    await service.forget()
    assert (await service.http.post(path)).status_code == 409
    assert (await service.get(f"/batch/{body['batch_id']}"))["status"] == "cancelled"


@pytest.mark.usefixtures("workers")
async def test_retry_is_a_new_message_that_names_the_old_one(service: Service) -> None:
    """In a batch of its own, with what the old one asked for; a message that has not ended is 409."""
    waiting = (await service.create(prompt="later", schedule_at=in_a_day(service))).json()
    reply = await service.http.post(f"/message/{waiting['message_id']}/retry")
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "message_pending")
    old = (
        await service.create(prompt="bad {{x}}", supportive_variable={"x": "y"}, webhook_url=HOOK, model="m2")
    ).json()
    await service.ended(old["batch_id"])
    reply = await service.http.post(f"/message/{old['message_id']}/retry")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_recorded_yet")
    await service.record()
    reply = await service.http.post(f"/message/{old['message_id']}/retry", headers={"idempotency-key": "k"})
    assert reply.status_code == 200, reply.text
    new = reply.json()
    assert new["retry_of"] == old["message_id"]
    assert new["batch_id"] != old["batch_id"]
    assert (await service.get(f"/message/{new['message_id']}"))["retry_of"] == old["message_id"]
    again = await service.http.post(f"/message/{old['message_id']}/retry", headers={"idempotency-key": "k"})
    assert again.json() == new
    await service.ended(new["batch_id"])
    await service.record()
    row = await service.records.message("default", new["message_id"])
    assert row is not None
    assert (row["prompt"], row["model"], row["retry_of"]) == ("bad y", "m2", old["message_id"])
    assert await service.link.call("XLEN", keys.stream("webhook")) == 2


async def test_results_of_an_open_batch_tell_what_is_there(service: Service) -> None:
    """In order, pending where nothing has come."""
    body = (await service.create(messages=[FIRST] * 2)).json()
    found = await service.get(f"/batch/{body['batch_id']}/results")
    assert found["status"] == "pending"
    assert found["results"] == [{"message_id": one, "status": "pending"} for one in body["message_ids"]]


@guarded
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("remembered", [False, True], ids=["redis", "history"])
async def test_another_tenants_id_is_404_on_every_route(service: Service, remembered: bool) -> None:
    """As one that never was; lists hold one's own only, and queues of the same name are two."""
    body = (await service.create(ANNA, prompt="mine")).json()
    batch, message = body["batch_id"], body["message_id"]
    await service.ended(batch, ANNA)
    await service.http.put("/queue/q", json={"model": "annas"}, headers=ANNA)
    if remembered:
        await service.record()
        await service.forget()
    routes = [
        ("GET", f"/message/{message}"), ("POST", f"/message/{message}/cancel"), ("POST", f"/message/{message}/retry"),
        ("GET", f"/batch/{batch}"), ("GET", f"/batch/{batch}/messages"), ("GET", f"/batch/{batch}/results"),
        ("POST", f"/batch/{batch}/cancel"), ("GET", f"/jobs/{batch}"), ("POST", f"/jobs/{batch}/cancel"),
    ]  # fmt: skip
    for method, path in routes:
        assert (await service.http.request(method, path, headers=BEN)).status_code == 404, path
        never = path.replace(batch, "0" * 32).replace(message, "0" * 32)
        assert (await service.http.request(method, never, headers=ANNA)).status_code == 404, never
    await service.record()
    for path, name in (("/message", "messages"), ("/batch", "batches")):
        assert len((await service.get(path, ANNA))[name]) == 1
        assert (await service.get(path, BEN))[name] == []
    assert (await service.get("/queue/q", BEN))["model"] is None
    assert (await service.get("/queue/q", ANNA))["webhook_secret"] != (await service.get("/queue/q", BEN))[
        "webhook_secret"
    ]


@pytest.mark.parametrize("odd", ["members", "members:x", "done:" + "0" * 32, "0" * 31, "A" * 32, "%00", "x" * 200])
async def test_what_is_no_id_of_ours_is_404(service: Service, odd: str) -> None:
    """Whatever it would be as a part of a key."""
    body = (await service.create(prompt="a")).json()
    for given in (odd, f"members:{body['batch_id']}"):
        for path in (f"/message/{given}", f"/batch/{given}", f"/batch/{given}/results"):
            assert (await service.http.get(path)).status_code == 404


async def test_history_that_is_away_stops_lists_only(service: Service, records: Records, tmp_path: Path) -> None:
    """Messages are accepted and read from Redis; what needs history is 503."""
    await records.close()
    (tmp_path / "history.db").unlink()
    (tmp_path / "history.db").mkdir()
    body = (await service.create(prompt="a")).json()
    assert (await service.get(f"/message/{body['message_id']}"))["status"] == "pending"
    reply = await service.http.get("/message")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "history_unavailable")


@guarded
async def test_batch_counts_as_one_in_flight(service: Service, settings: Settings) -> None:
    """However many messages it has: what a key may have unfinished is counted in requests."""
    transport = httpx.ASGITransport(
        create_app(changed(settings, gateway=TENANTS["gateway"] | {"max_in_flight_per_key": 2}), service.front)
    )
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport))
        send = {"queue_id": "q", "messages": [FIRST] * 5}
        statuses = [(await http.post("/message/create", json=send, headers=ANNA)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
