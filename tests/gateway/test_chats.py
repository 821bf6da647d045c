"""The chats service over HTTP: what is accepted, how replies reach people, what is remembered, and whose it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from gateway.app import create_app
from gateway.server import Server, listen
from pipeline import connection, keys, scripts
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.records import Records
from pipeline.settings import Settings
from stages.chat import Chat
from tests.conftest import PATIENCE_S, wait_until
from tests.gateway.recorded import record
from tests.rig import Gate, Scripted, assert_nothing_is_left, changed, working

Json = dict[str, Any]
ANNA, BEN = {"authorization": "Bearer key-a"}, {"authorization": "Bearer key-b"}


async def answering(job: Job) -> Done:
    """Say what was asked last."""
    return Done({"answer": "heard: " + job.state["ask"]["messages"][-1]["content"], "model": "m", "usage": None})


@dataclass
class Service:
    """A gateway on a socket, its Redis, and its history, which is written when the test says so."""

    http: httpx.AsyncClient
    link: Link
    front: Front
    records: Records
    stop: asyncio.Event

    async def say(self, text: str, chat: str = "c", headers: Json | None = None, **more: Any) -> httpx.Response:
        body = {"user_id": "ann", "text": text} | more
        return await self.http.post(f"/chat/{chat}/messages", json=body, headers=headers)

    async def history(self, chat: str = "c", headers: Json | None = None, **query: Any) -> Json:
        reply = await self.http.get(f"/chat/{chat}/history", params=query, headers=headers)
        assert reply.status_code == 200, reply.text
        value: Json = reply.json()
        return value

    @asynccontextmanager
    async def listening(self, chat: str = "c", headers: Json | None = None, **query: Any) -> AsyncIterator[Ear]:
        async with self.http.stream("GET", f"/chat/{chat}/events", params=query, headers=headers) as reply:
            assert reply.status_code == 200
            assert reply.headers["content-type"] == "text/event-stream"
            ear = Ear(reply)
            await ear.welcome()
            yield ear

    async def record(self) -> None:
        """Do the recorder's work."""
        await record(self.link, self.records)


class Ear:
    """Reads server-sent events."""

    def __init__(self, reply: httpx.Response) -> None:
        self._lines = reply.aiter_lines()

    async def welcome(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            assert (await anext(self._lines)).startswith(":")

    async def next(self) -> tuple[str, str, Json]:
        """Return the next event: its id, its name, its data."""
        found: dict[str, str] = {}
        async with asyncio.timeout(PATIENCE_S):
            async for line in self._lines:
                if not line and found:
                    return found["id"], found["event"], orjson.loads(found["data"])
                if line and not line.startswith(":"):
                    name, _, value = line.partition(": ")
                    found[name] = value
        raise EOFError

    async def ended(self) -> bool:
        async with asyncio.timeout(PATIENCE_S):
            return [line async for line in self._lines if line and not line.startswith(":")] == []


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return changed(settings, chats={"single_ms": 0, "quiet_ms": 0, "max_wait_ms": 0}, gateway={"port": 0})


@pytest.fixture
async def services(link: Link, front: Front, tmp_path: Path) -> AsyncIterator[Any]:
    """Make gateways with the settings a test wants."""
    async with AsyncExitStack() as stack:

        async def start(settings: Settings) -> Service:
            records = Records.open(f"sqlite:///{tmp_path}/history.db")
            stack.push_async_callback(records.close)
            await records.upgrade()
            stop = asyncio.Event()
            listener = stack.enter_context(listen(settings.gateway))
            server = Server(settings, create_app(settings, front, records, stop), stop)
            serving = asyncio.create_task(server.serve(sockets=[listener]), name="gateway")
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, trust_env=False))

            async def end() -> None:
                await http.aclose()
                stop.set()
                await serving

            stack.push_async_callback(end)
            return Service(http, link, front, records, stop)

        yield start


@pytest.fixture
async def service(services: Any, settings: Settings) -> Service:
    one: Service = await services(settings)
    return one


async def test_a_message_is_accepted_and_answered_by_an_event(service: Service, settings: Settings) -> None:
    """202 with its id and the length of the queue; the reply names the messages that it answers."""
    async with service.listening() as ear:
        first = await service.say("hello", message_id="a")
        assert first.status_code == 202
        assert first.json() == {"chat_id": "c", "message_id": "a", "queue_length": 1, "processing": False}
        second = (await service.say("how are you?")).json()
        assert (second["queue_length"], second["processing"]) == (2, True)
        async with working(settings, [Chat(settings), Scripted("llm", answering)]):
            _, name, event = await ear.next()
        assert name == event["type"] == "reply"
        assert (event["chat_id"], event["message_ids"]) == ("c", ["a", second["message_id"]])
        assert event["text"] == "heard: how are you?"
        assert event["epoch"] > 0
    await assert_nothing_is_left(service.link)


async def test_events_go_on_from_the_one_that_was_seen_last(service: Service, settings: Settings) -> None:
    """By header or parameter; without either only what is new is told."""
    async with service.listening() as ear:
        for _ in range(3):
            await service.http.post("/chat/c/clear")
        ids = [(await ear.next())[0] for _ in range(3)]
    async with service.listening(headers={"last-event-id": ids[0]}) as ear:
        assert [(await ear.next())[0] for _ in range(2)] == ids[1:]
    async with service.listening(after=ids[1]) as ear:
        assert (await ear.next())[0] == ids[2]
    async with service.listening() as ear:
        await service.http.post("/chat/c/clear")
        assert (await ear.next())[0] not in ids
    refused = await service.http.get("/chat/c/events", headers={"last-event-id": "yesterday"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "Last-Event-ID")


async def test_streams_end_when_the_gateway_stops(service: Service) -> None:
    """At once, not when the time to drain is over; and a client that leaves leaves nothing behind."""
    async with service.listening() as ear:
        service.stop.set()
        assert await ear.ended()


async def test_so_many_streams_are_open_at_once(services: Any, settings: Settings) -> None:
    """One more is refused, and there is room again when one has ended."""
    service = await services(changed(settings, chats={"max_streams": 1}))
    async with service.listening():
        refused = await service.http.get("/chat/d/events")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_streams")
        assert refused.headers["retry-after"] == "1"
    await wait_until(lambda: service.front.chat_watch.count == 0)
    async with service.listening("d"):
        pass


async def test_a_message_that_redis_may_have_taken_is_told_as_such(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was; said again under its id it counts once."""
    monkeypatch.setattr(connection, "ANSWER_WITHIN_S", 0.2)
    link = service.front.chats._link
    run = link.run

    async def deaf(script: scripts.Script, *args: Any, **more: Any) -> Any:
        await run(script, *args, **more)
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(link, "run", deaf)
        refused = await service.say("one", message_id="m")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "maybe_accepted")
    assert "message_id" in refused.json()["error"]["message"]
    monkeypatch.undo()
    assert (await service.say("one", message_id="m")).json()["queue_length"] == 1


async def test_head_of_a_stream_has_an_end(service: Service) -> None:
    """Whoever asks for the headers only does not wait for events."""
    reply = await service.http.head("/chat/c/events")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream")


async def test_clear_and_persona_begin_the_chat_anew(service: Service, settings: Settings) -> None:
    """The messages that waited are told as cleared; the next reply is the other persona's."""
    unknown = await service.http.put("/chat/c/persona", json={"persona": "poet"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (422, "unknown_persona")
    assert (await service.http.get("/persona/poet")).status_code == 404
    poet = {"system_prompt": "You rhyme.", "temperature": 0.5, "policy": "interrupt"}
    assert (await service.http.put("/persona/poet", json=poet)).json()["temperature"] == 0.5
    shown = (await service.http.get("/persona/poet")).json()
    assert shown == {"name": "poet", "state_prompt": None, "model": None, "image_prompt": None} | poet
    async with service.listening() as ear:
        await service.say("one", message_id="a")
        changed_to = (await service.http.put("/chat/c/persona", json={"persona": "poet"})).json()
        assert (changed_to["persona"], changed_to["cleared"], changed_to["reply_dropped"]) == ("poet", 1, False)
        _, name, event = await ear.next()
        assert (name, event["message_ids"], event["epoch"]) == ("cleared", ["a"], changed_to["epoch"])
        await service.say("two")
        llm = Scripted("llm", answering)
        async with working(settings, [Chat(settings), llm]):
            await ear.next()
        assert llm.seen[-1].state["ask"]["messages"][0]["content"].startswith("You rhyme.")
        assert llm.seen[-1].state["ask"]["temperature"] == 0.5
    again = (await service.http.put("/chat/c/persona", json={"persona": None})).json()
    assert again["epoch"] > changed_to["epoch"]
    assert await service.link.call("HGET", keys.CHAT + "c", "persona") is None


async def test_a_persona_that_redis_has_lost_comes_back_from_history(service: Service) -> None:
    """When somebody looks at it, or chooses it; one that was never set up does not."""
    given = {"system_prompt": "You rhyme.", "temperature": 0.5, "policy": "interrupt"}
    shown = (await service.http.put("/persona/poet", json=given)).json()
    await service.record()
    for path, body in (("/chat/c/persona", {"persona": "poet"}), ("/chat/c/persona", {"persona": "nobody"})):
        for name in await service.link.call("KEYS", "persona*"):
            await service.link.call("DEL", name)
        status = (await service.http.put(path, json=body)).status_code
        assert status == (200 if body["persona"] == "poet" else 422)
    assert (await service.http.get("/persona/poet")).json() == shown
    assert await service.link.call("HGET", keys.PERSONA + "poet", "policy") == b"interrupt"


async def test_a_clear_drops_the_reply_that_was_being_made(service: Service, settings: Settings) -> None:
    """And says so."""
    gate = Gate(answering)
    async with working(settings, [Chat(settings), Scripted("llm", gate)]):
        await service.say("one")
        await wait_until(lambda: gate.waiting)
        cleared = (await service.http.post("/chat/c/clear")).json()
        assert (cleared["cleared"], cleared["reply_dropped"]) == (1, True)
        await wait_until(lambda: gate.stopped)


async def test_an_image_is_fetched_by_the_id_that_its_event_told(service: Service) -> None:
    """As bytes of its own type; another id, and another chat's, is 404."""
    epoch = (await service.http.post("/chat/c/clear")).json()["epoch"]
    image_id = "a" * 32
    await service.front.chats.keep_image("c", epoch, image_id, b"\x89PNG\r\n\x1a\n", "image/png")
    found = await service.http.get(f"/chat/c/images/{image_id}")
    assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
    assert found.content == b"\x89PNG\r\n\x1a\n"
    for path in (f"/chat/c/images/{'b' * 32}", f"/chat/d/images/{image_id}", "/chat/c/images/a%20b"):
        assert (await service.http.get(path)).status_code == 404


async def test_an_image_of_another_tenant_has_no_name_here(service: Service) -> None:
    """Its key, `anna:c:<id>`, could be read as one of the chat `anna`."""
    epoch, _, _ = await service.front.chats.clear("anna", "c")
    await service.front.chats.keep_image("anna:c", epoch, "a" * 32, b"x", "image/png")
    assert (await service.http.get(f"/chat/anna/images/c:{'a' * 32}")).status_code == 404


async def test_history_shows_all_turns_in_order(service: Service, settings: Settings) -> None:
    """From the database, page by page, and what it does not have yet from Redis."""
    async with service.listening() as ear, working(settings, [Chat(settings), Scripted("llm", answering)]):
        for number in range(4):
            await service.say(f"text {number}", message_id=f"m{number}")
            await ear.next()
            if number < 3:
                await service.record()
    wanted = [text for n in range(4) for text in (f"text {n}", f"heard: text {n}")]
    whole = await service.history()
    assert [turn["text"] for turn in whole["messages"]] == wanted
    assert [turn["role"] for turn in whole["messages"]] == ["user", "assistant"] * 4
    assert whole["messages"][0]["user_id"] == "ann"
    assert whole["next"] is None
    found: list[str] = []
    after: str | None = "0"
    while after is not None:
        page = await service.history(after=after, limit=2)
        found += [turn["text"] for turn in page["messages"]]
        after = page["next"]
    assert found == wanted
    await service.record()
    for name in await service.link.call("KEYS", "chat*"):
        await service.link.call("DEL", name)
    assert [turn["text"] for turn in (await service.history())["messages"]] == wanted, "a month later"


async def test_a_page_of_history_is_no_longer_than_asked_for(service: Service, settings: Settings) -> None:
    """Also while all of it stands in Redis, since the recorder is behind."""
    async with service.listening() as ear, working(settings, [Chat(settings), Scripted("llm", answering)]):
        for number in range(2):
            await service.say(f"text {number}")
            await ear.next()
    first = await service.history(limit=3)
    assert [turn["text"] for turn in first["messages"]] == ["text 0", "heard: text 0", "text 1"]
    second = await service.history(limit=3, after=first["next"])
    assert [turn["text"] for turn in second["messages"]] == ["heard: text 1"]
    assert second["next"] is None


async def test_history_tells_of_messages_that_were_not_answered(service: Service) -> None:
    """A clear forgets them in Redis, and history keeps them."""
    await service.say("one")
    await service.http.post("/chat/c/clear")
    await service.record()
    (turn,) = (await service.history())["messages"]
    assert (turn["text"], turn["status"]) == ("one", "cleared")


async def test_an_idempotency_key_says_a_message_once(service: Service) -> None:
    """The second answer names the first message; another body is refused."""
    key = {"idempotency-key": "k"}
    first = await service.say("one", headers=key)
    again = await service.say("one", headers=key)
    assert again.json()["message_id"] == first.json()["message_id"]
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["queue_length"] == 1
    assert (await service.say("two", headers=key)).status_code == 422


async def test_wrong_fields_are_named(service: Service) -> None:
    """And nothing is created."""
    for body, param in (
        ({"user_id": "ann"}, "text"),
        ({"user_id": "ann", "text": ""}, "text"),
        ({"user_id": "ann", "text": "x" * 16_001}, "text"),
        ({"user_id": "ann", "text": "no\0database takes it"}, "text"),
        ({"user_id": "\0", "text": "x"}, "user_id"),
        ({"user_id": "ann", "text": "x", "message_id": "a b"}, "message_id"),
        ({"user_id": "ann", "text": "x", "priority": "urgent"}, "priority"),
        ({"user_id": "ann", "text": "x", "chat": "y"}, "chat"),
    ):
        refused = await service.http.post("/chat/c/messages", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)
    for method, path in (("POST", "/chat/a:b/clear"), ("GET", "/persona/a%20b"), ("GET", "/chat/c/history?after=x")):
        refused = await service.http.request(method, path)
        assert refused.status_code == 422, path
    assert await service.link.call("KEYS", "chat*") == []


async def test_a_full_chat_refuses_with_429(services: Any, settings: Settings) -> None:
    """The caller's own limit: it comes with Retry-After."""
    service = await services(changed(settings, chats={"max_waiting": 200}))
    for number in range(200):
        await service.link.call("RPUSH", keys.CHAT_QUEUE + "c", f'{{"message_id":"m{number}","at_ms":1}}')
    await service.link.call("PEXPIRE", keys.CHAT_QUEUE + "c", 60_000)
    refused = await service.say("one more")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_waiting")
    assert refused.headers["retry-after"] == "1"


async def test_each_tenant_has_chats_of_its_own(services: Any, settings: Settings) -> None:
    """Same names, different chats, personas, events and history."""
    service = await services(changed(settings, gateway={"api_keys": ("anna:key-a", "ben:key-b")}))
    assert (await service.say("x")).status_code == 401
    async with service.listening(headers=BEN) as ear:
        await service.http.put("/persona/p", json={"system_prompt": "Anna's."}, headers=ANNA)
        assert (await service.http.get("/persona/p", headers=BEN)).status_code == 404
        assert (await service.http.put("/chat/c/persona", json={"persona": "p"}, headers=BEN)).status_code == 422
        assert (await service.say("of anna", headers=ANNA)).json()["queue_length"] == 1
        assert (await service.say("of ben", headers=BEN)).json()["queue_length"] == 1
        assert await service.link.call("LLEN", keys.CHAT_QUEUE + "anna:c") == 1
        async with working(settings, [Chat(settings), Scripted("llm", answering)]):
            _, _, event = await ear.next()
            assert (event["text"], event["chat_id"]) == ("heard: of ben", "c")
            await wait_until(lambda: is_quiet(service.link))
    await service.record()
    assert [turn["text"] for turn in (await service.history(headers=BEN))["messages"]] == ["of ben", "heard: of ben"]
    assert [turn["text"] for turn in (await service.history(headers=ANNA))["messages"]] == ["of anna", "heard: of anna"]
    assert (await service.history("other", headers=ANNA))["messages"] == []


async def is_quiet(link: Link) -> bool:
    return not await link.call("ZCARD", keys.LIVE_INDEX)


async def test_typing_is_waited_for(service: Service) -> None:
    """202, whether anything waits or not; a chat where nobody has spoken does not come into being."""
    assert (await service.http.post("/chat/c/typing")).json() == {"chat_id": "c", "queue_length": 0}
    assert await service.link.call("EXISTS", keys.CHAT + "c") == 0
    await service.say("one")
    assert (await service.http.post("/chat/c/typing")).json()["queue_length"] == 1
    assert await service.link.call("HEXISTS", keys.CHAT + "c", "typing_ms") == 1
