"""The chats service: what people say, the events by which replies reach them, what was said, and who answers.

A message is answered together with others of its chat, later; so it is accepted (202), and the reply comes as an event
(`GET /chat/{chat_id}/events`, server-sent events) that any gateway can tell, from any point on. Every tenant has chats
and personas of its own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from gateway.asked import (
    LIMIT,
    Asked,
    ClientName,
    Model,
    Text,
    client_name,
    from_redis,
    not_found,
    own_id,
    storable,
    wrong,
)
from gateway.errors import RETRY_SOON_S, Problem
from gateway.idempotency import read_key
from gateway.metrics import CHAT_CLEARED, CHAT_MESSAGES
from gateway.operation import Answer, Call, Operation, Parameter, answer
from pipeline import keys
from pipeline.chats import LOOK_EVERY_S, Message, Persona, Policy
from pipeline.errors import HistoryUnavailable, PenstockError
from pipeline.flows import Name, Payload
from pipeline.job import Json, Priority, new_id

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=32_000), AfterValidator(storable)]

PING_S: Final = 15.0
"""Proxies close a connection on which nothing is said for a while, a minute usually."""
EVENT_STREAM: Final = b"text/event-stream"

_EVENT_ID: Final = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")

# --- What is asked and answered ----------------------------------------------------------------


class ChatMessageRequest(Payload):
    """One message of a person."""

    user_id: Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(storable)]
    text: Text
    message_id: Name | None = Field(None, description="counts once in its chat; made here when absent")
    priority: Priority = Field("normal", description="chats of `high` go first")


class ChatMessageAccepted(BaseModel):
    """It will be answered, or its sender told why not."""

    chat_id: str
    message_id: str
    queue_length: int = Field(description="messages that wait in this chat, this one included")
    processing: bool = Field(description="whether a run was there already when the message came")


class ChatTyping(BaseModel):
    """Who types is waited for."""

    chat_id: str
    queue_length: int


class ChatCleared(BaseModel):
    """The chat begins anew."""

    chat_id: str
    epoch: int = Field(description="events of a lower one are from before")
    cleared: int = Field(description="messages that waited and never will be answered")
    reply_dropped: bool = Field(description="whether a reply was being made")


class ChatPersonaRequest(Payload):
    """Who is to answer in a chat."""

    persona: ClientName | None = Field(description="name of a persona that was set up; null: the service's own words")


class ChatPersonaSet(ChatCleared):
    """The chat begins anew, with this persona."""

    persona: str | None


class ChatTurn(BaseModel):
    """One thing that was said."""

    role: Literal["user", "assistant"]
    text: str
    message_id: str
    at: str = Field(description="RFC 3339")
    status: Literal["answered", "sent", "failed", "expired", "cleared"]
    user_id: str | None = None


class ChatHistory(BaseModel):
    """What was said in a chat, oldest first."""

    messages: list[ChatTurn]
    next: str | None = Field(description="`after` for the next page; null after the last one")


class PersonaRequest(Payload):
    """Who answers; where a field is absent the service's own words or settings are used."""

    system_prompt: Prompt | None = Field(None, description="who it is, and how it speaks")
    state_prompt: Prompt | None = Field(None, description="what to remember of a chat: asks for one JSON object")
    model: Model | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    image_prompt: Prompt | None = Field(None, description="an image is made of it and each reply, after the reply")
    policy: Policy = Field("merge", description="a new message waits for the next reply, or interrupts this one")


class PersonaShown(BaseModel):
    """A persona."""

    name: str
    system_prompt: str | None
    state_prompt: str | None
    model: str | None
    temperature: float | None
    image_prompt: str | None
    policy: Policy


# --- Speaking ----------------------------------------------------------------------------------


async def say(call: Call) -> Answer:
    """Say something in a chat.

    It is answered together with what else is said there in the next moments; the reply comes as an event.
    """
    request = await call.read(ChatMessageRequest)
    chat_id = _chat_id(call)
    most = call.gateway.settings.chats.max_text_chars
    if len(request.text) > most:
        raise wrong("text", f"at most {most} characters")
    message = Message(request.message_id or new_id(), request.user_id, request.text, request.priority)
    key = read_key(call.headers, call.tenant, call.path, call.body)
    said = await from_redis(
        call.front.say(call.tenant, chat_id, message, idempotency=key, in_flight_limit=call.in_flight_limit)
    )
    CHAT_MESSAGES.labels(said.what if said.is_new else "duplicate").inc()
    body = {
        "chat_id": chat_id,
        "message_id": said.message_id,
        "queue_length": said.waiting,
        "processing": said.what not in {"", "started"},
    }
    return answer(body, 202, [] if said.is_new else [(b"idempotent-replayed", b"true")])


async def typing(call: Call) -> Answer:
    """Say that somebody is typing: what waits in the chat is answered a little later."""
    chat_id = _chat_id(call)
    waiting = await from_redis(call.front.chats.typing(keys.of_tenant(call.tenant, chat_id)))
    return answer({"chat_id": chat_id, "queue_length": waiting}, 202)


async def clear(call: Call) -> Answer:
    """Begin a chat anew: what waits, and what was said, is forgotten.

    No reply to anything said before is sent from now on. History keeps what it has.
    """
    return answer(await _clear(call, _chat_id(call), None))


async def set_chat_persona(call: Call) -> Answer:
    """Choose who answers in a chat, which begins anew with that."""
    request = await call.read(ChatPersonaRequest)
    chat_id = _chat_id(call)
    name = request.persona
    if name is not None and await _persona(call, name) is None:
        raise wrong("persona", "nobody has set up a persona of this name: PUT /persona/{name}", "unknown_persona")
    return answer(await _clear(call, chat_id, name or "") | {"persona": name})


async def _clear(call: Call, chat_id: str, persona: str | None) -> Json:
    epoch, cleared, dropped = await from_redis(call.front.chats.clear(call.tenant, chat_id, persona=persona))
    CHAT_CLEARED.labels("messages").inc(cleared)
    CHAT_CLEARED.labels("replies").inc(dropped)
    return {"chat_id": chat_id, "epoch": epoch, "cleared": cleared, "reply_dropped": dropped}


# --- Hearing -----------------------------------------------------------------------------------


async def events(call: Call) -> Answer:
    """Hear what happens in a chat, as server-sent events.

    `reply`, `image`, `failed`, `expired` and `cleared` come with the chat's id and epoch and the ids of the messages
    they are about. Each has an id; a client that names the last one it saw (`Last-Event-ID`, or `after`) misses
    nothing that is kept, about a thousand events; one that names none hears what comes from now on.
    """
    chat = keys.of_tenant(call.tenant, _chat_id(call))
    given = Asked(call, {"after"})
    sent = call.headers.get(b"last-event-id")
    after = sent.decode("latin-1") if sent is not None else given.text("after")
    if after is None:
        after = await from_redis(call.front.chats.last_event(chat))
    elif _EVENT_ID.fullmatch(after) is None:
        param = "Last-Event-ID" if sent is not None else "after"
        raise wrong(param, "the id of an event, as it came with it", "invalid_cursor")
    most = call.gateway.settings.chats.max_streams
    if call.front.chat_watch.count >= most:
        raise Problem(503, "too_many_streams", f"{most} streams of events are open here", retry_after_s=RETRY_SOON_S)
    headers = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
    return Answer(200, b": welcome\n\n", headers, EVENT_STREAM, stream=_events(call, chat, after))


async def _events(call: Call, chat: str, after: str) -> AsyncGenerator[bytes, None]:
    """Yield events as they come, and a word now and then, until the gateway stops or the client leaves."""
    loop = asyncio.get_running_loop()
    stop = asyncio.create_task(call.gateway.stop.wait(), name="chat events: stop")
    silent_since_s = loop.time()
    try:
        async with call.front.chat_watch.of(chat) as news:
            while not stop.done():
                news.clear()
                found = []
                with suppress(PenstockError):  # Redis is away: the client keeps its connection, and its place
                    found = await call.front.chats.events(chat, after)
                for event_id, text in found:
                    kind = orjson.loads(text)["type"]
                    yield f"id: {event_id}\nevent: {kind}\ndata: ".encode() + text + b"\n\n"
                    after, silent_since_s = event_id, loop.time()
                if found:
                    continue
                if loop.time() - silent_since_s >= PING_S:
                    yield b": still here\n\n"
                    silent_since_s = loop.time()
                await _wait(stop, news)
    finally:
        stop.cancel()


async def _wait(stop: asyncio.Task[Any], news: asyncio.Event) -> None:
    """Wait for news, or the end, or until it is time to look all the same."""
    heard = asyncio.create_task(news.wait(), name="chat events: news")
    try:
        await asyncio.wait({stop, heard}, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        heard.cancel()


async def image(call: Call) -> Answer:
    """Fetch an image that followed a reply; kept for a day."""
    chat, image_id = keys.of_tenant(call.tenant, _chat_id(call)), own_id(call, "image_id", "image")
    found = await from_redis(call.front.chats.image(chat, image_id))
    if found is None:
        raise not_found("image", image_id)
    data, content_type = found
    headers = [(b"cache-control", b"private, max-age=86400, immutable"), (b"x-content-type-options", b"nosniff")]
    return Answer(200, data, headers, content_type)


async def history(call: Call) -> Answer:
    """Tell what was said in a chat, oldest first.

    What history does not have yet, and Redis has, is told on the last page.
    """
    chat_id = _chat_id(call)
    asked = Asked(call, {"after", "limit"})
    after, limit = asked.number("after", 0, most=10**18), asked.limit()
    rows, following = await call.history.chat_turns(call.tenant, chat_id, after=after, limit=limit)
    shown = [_turn(row) for row in rows]
    if following is None:
        last = rows[-1]["seq"] if rows else after
        turns = await from_redis(call.front.chats.turns(keys.of_tenant(call.tenant, chat_id)))
        later, room = [turn for turn in turns if turn["seq"] > last], limit - len(rows)
        shown += [_turn(turn) for turn in later[:room]]
        if len(later) > room:
            following = later[room - 1]["seq"] if room else last
    return answer({"messages": shown, "next": None if following is None else str(following)})


def _turn(row: Json) -> Json:
    at = datetime.fromtimestamp(row["at_ms"] / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    status = row.get("status") or ("sent" if row["role"] == "assistant" else "answered")
    shown = {"role": row["role"], "text": row["text"], "message_id": row["message_id"], "at": at, "status": status}
    return shown | ({"user_id": row["user_id"]} if row.get("user_id") else {})


# --- Personas ----------------------------------------------------------------------------------


async def look_at_persona(call: Call) -> Answer:
    """Tell how a persona is set up."""
    name = _chat_id(call, "name")
    persona = await _persona(call, name)
    if persona is None:
        raise not_found("persona", name)
    return answer(_shown_persona(name, persona))


async def set_persona(call: Call) -> Answer:
    """Set a persona up, all of it: what is not named is the service's own.

    Chats that have it follow at their next reply. A tenant has so many personas at most (409).
    """
    request = await call.read(PersonaRequest)
    name = _chat_id(call, "name")
    persona = Persona(
        request.system_prompt, request.state_prompt, request.model, request.temperature, request.image_prompt,
        request.policy,
    )  # fmt: skip
    await from_redis(call.front.chats.set_persona(call.tenant, name, persona))
    return answer(_shown_persona(name, persona))


async def _persona(call: Call, name: str) -> Persona | None:
    """Return a persona; one that Redis has lost, and history has, is put back."""
    found = await from_redis(call.front.chats.persona(call.tenant, name))
    if found is not None:
        return found
    try:
        kept = await call.history.persona(call.tenant, name)
    except HistoryUnavailable:
        return None
    if kept is None:
        return None
    persona = Persona(**{field: kept[field] for field in Persona.__slots__ if field in kept})
    await from_redis(call.front.chats.set_persona(call.tenant, name, persona))
    return persona


def _shown_persona(name: str, persona: Persona) -> Json:
    return {"name": name} | {field: getattr(persona, field) for field in Persona.__slots__}


# --- Small parts -------------------------------------------------------------------------------


def _chat_id(call: Call, name: str = "chat_id") -> str:
    return client_name(call.path_id(name), name)


_IN_PATH: Final = Parameter("chat_id", "the chat, as clients name it", required=True, type=ClientName)
_NAME: Final = Parameter("name", "the persona's name", required=True, type=ClientName)

OPERATIONS: Final = (
    Operation(
        "POST",
        "/chat/{chat_id}/messages",
        say,
        body=ChatMessageRequest,
        answers={202: ChatMessageAccepted},
        parameters=(_IN_PATH,),
        idempotent=True,
        example={"user_id": "ann", "text": "Hello!"},
    ),
    Operation(
        "POST",
        "/chat/{chat_id}/typing",
        typing,
        answers={202: ChatTyping},
        errors=(422,),
        parameters=(_IN_PATH,),
    ),
    Operation(
        "POST",
        "/chat/{chat_id}/clear",
        clear,
        answers={200: ChatCleared},
        errors=(422,),
        parameters=(_IN_PATH,),
    ),
    Operation(
        "PUT",
        "/chat/{chat_id}/persona",
        set_chat_persona,
        body=ChatPersonaRequest,
        answers={200: ChatPersonaSet},
        parameters=(_IN_PATH,),
        example={"persona": "poet"},
    ),
    Operation(
        "GET",
        "/chat/{chat_id}/events",
        events,
        answers={200: None},
        errors=(422,),
        parameters=(_IN_PATH, Parameter("after", "the id of the last event seen, where no `Last-Event-ID` is sent")),
        streams=True,
        media="text/event-stream",
    ),
    Operation(
        "GET",
        "/chat/{chat_id}/images/{image_id}",
        image,
        answers={200: None},
        errors=(404, 422),
        parameters=(_IN_PATH, Parameter("image_id", "as its event names it", required=True, type=Name)),
        media="image/*",
    ),
    Operation(
        "GET",
        "/chat/{chat_id}/history",
        history,
        answers={200: ChatHistory},
        errors=(422,),
        parameters=(
            _IN_PATH,
            Parameter("after", "`next` of the page before", type=Annotated[int, Field(ge=0, le=10**18)]),
            LIMIT,
        ),
    ),
    Operation(
        "GET", "/persona/{name}", look_at_persona, answers={200: PersonaShown}, errors=(404, 422), parameters=(_NAME,)
    ),
    Operation(
        "PUT",
        "/persona/{name}",
        set_persona,
        body=PersonaRequest,
        answers={200: PersonaShown},
        errors=(409,),
        parameters=(_NAME,),
        example={"system_prompt": "You are a ship's cook, and speak like one.", "policy": "merge"},
    ),
)
