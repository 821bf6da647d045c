"""Chats in Redis: what people say, the run that answers it, what was said last, and what those who watch are told.

One run at a time holds a chat's lock (`processing_lock:<chat>`); it answers what waits in the chat's queue
(`msg_queue:<chat>`), at most a batch, in one reply. A run is a job (flow `chat`): the message that finds no run starts
one, in the same script; the script that ends a run starts the next one where messages wait. docs/CHATS.md tells how a
run lives, and what it may lose.

Everywhere here *chat* is a chat as it stands in keys: its id, behind its tenant for all tenants but the default one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson
import structlog

from pipeline import flows, keys, scripts
from pipeline.accepting import Idempotency, key_arguments, limit_arguments, refusal
from pipeline.clock import Clock
from pipeline.connection import Argument, Backoff, Link, insist, run_in_hand, within
from pipeline.errors import (
    BrokerUnavailable,
    MaybeAccepted,
    Overloaded,
    PenstockError,
    TooManyPersonas,
)
from pipeline.job import Json, Priority, new_id

if TYPE_CHECKING:
    from pipeline.settings import Settings

log = structlog.get_logger(__name__)

MAYBE_SAID: Final = (
    "Redis did not say whether it took this message: say it again with the same message_id, or under the same "
    "Idempotency-Key, then it counts once"
)
EVENTS_AT_ONCE: Final = 20
"""Whoever does not read holds so many in our memory, each as long as a reply."""
LOOK_EVERY_S: Final = 5.0
"""For new events, when no hint comes: hints may be lost, events may not."""

Policy = Literal["merge", "interrupt"]
Saved = Literal["saved", "already", "lost", "gone"]
Kept = Literal["kept", "already", "lost"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a person.

    Attributes:
        id: counts once in its chat.
        user_id: as the sender names people.
    """

    id: str
    user_id: str
    text: str
    priority: Priority = "normal"


@dataclass(frozen=True, slots=True)
class Said:
    """A message was accepted, now or before.

    Attributes:
        message_id: its own, or that of the message which was said before under the same Idempotency-Key.
        waiting: messages in the chat's queue, this one included.
        what: `started` a run, `joined` the one that has not begun with the messages yet, `merged` (waits for the next
            run), `interrupted` the reply that was being made; "" for one that was known already.
    """

    message_id: str
    waiting: int
    what: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class Persona:
    """Who answers; where a field is None the service's own words or settings are used.

    Attributes:
        image_prompt: what stands before a reply that an image is made of; None: no images.
    """

    system_prompt: str | None = None
    state_prompt: str | None = None
    model: str | None = None
    temperature: float | None = None
    image_prompt: str | None = None
    policy: Policy = "merge"


@dataclass(frozen=True, slots=True)
class Taken:
    """What a run is to work with.

    Attributes:
        word: `lost` (the lock is not this run's), `empty` (nobody waits), `wait` (it is not time yet), `taken`.
        wait_ms: until it may be time.
        first_ms: when the first message came.
        dropped: elements that a stranger had put into the queue, and that are gone now.
        state: as the first brain left it, JSON; "" before there was one.
        turns: the last ones, oldest first: `role`, `text`, `message_id`, `at_ms`, `seq`, and `user_id` of a person's.
        messages: to be answered: `message_id`, `user_id`, `text`, `at_ms`.
    """

    word: Literal["lost", "empty", "wait", "taken"]
    wait_ms: int
    first_ms: int
    dropped: int
    persona: Persona
    state: str
    turns: list[Json]
    messages: list[Json]


class Chats:
    """The chats in Redis, over one connection."""

    def __init__(self, link: Link, settings: Settings, clock: Clock) -> None:
        self.clock = clock
        self._link = link
        self._settings = settings

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()

    # --- what people do --------------------------------------------------------------------------

    async def say(
        self,
        tenant: str,
        chat_id: str,
        message: Message,
        *,
        idempotency: Idempotency | None = None,
        in_flight_limit: int | None = None,
    ) -> Said:
        """Accept a message: when this returns, it waits in its chat, and a run is there to answer it.

        Args:
            in_flight_limit: unfinished jobs its tenant may have; a chat's run is one.

        Raises:
            Overloaded: too much unfinished work, of all, of this tenant (`too_many_in_flight`), of this chat
                (`too_many_waiting`), or of the recorder.
            IdempotencyMismatch: the key was used with another body.
            MaybeAccepted: no answer within a second, and it may have been accepted all the same.
            BrokerUnavailable: no answer within a second.
        """
        self.clock.require()
        settings = self._settings.chats
        chat = keys.of_tenant(tenant, chat_id)
        job = flows.new_job(
            "chat", flows.ChatPayload(chat=chat), job_id=new_id(), now_ms=0, lifetime_s=0, tenant=tenant,
            priority=message.priority,
        )  # fmt: skip
        stage, tail = job.launch()
        element = {"message_id": message.id, "user_id": message.user_id, "priority": message.priority}
        args = (
            chat, chat_id, tenant, message.id, orjson.dumps(element | {"text": message.text}), job.id, tail,
            keys.stream(stage, job.priority), int(self._settings.lifetimes.chat_s * 1000),
            int(settings.queue_ttl_s * 1000), int(settings.keep_s * 1000), settings.max_waiting,
            int(settings.message_id_s * 1000), self._settings.admission.max_jobs,
            self._settings.history.max_backlog, *limit_arguments(tenant, in_flight_limit),
            int(settings.idle_s * 1000), int(settings.interrupt_for_s * 1000), self._completion_ttl_ms,
            *key_arguments(idempotency),
        )  # fmt: skip
        try:
            reply = await self._insist(scripts.SAY, args)
        except BrokerUnavailable as error:
            if error.unknown:
                raise MaybeAccepted(MAYBE_SAID) from error
            raise
        word, waiting, what = reply[1].decode(), int(reply[2]), reply[3].decode()
        match word:
            case "full":
                text = f"{waiting} messages wait in this chat, as many as may"
                raise Overloaded(text, code="too_many_waiting")
            case "mismatch" | "in_flight" | "backlog" | "overloaded":
                raise refusal(word, in_flight_limit)
        return Said(reply[4].decode(), waiting, what, is_new=word == "accepted")

    async def typing(self, chat: str) -> int:
        """Note that somebody is typing; return how many messages wait."""
        return int((await self._insist(scripts.CHAT_TYPING, (chat,)))[1])

    async def clear(self, tenant: str, chat_id: str, *, persona: str | None = None) -> tuple[int, int, bool]:
        """Begin a chat anew, with another persona where one is named ("": the service's own).

        Returns:
            The epoch from here on; messages that waited and never will be answered; whether a reply was being made,
            which nobody will see.
        """
        chosen = ("", "") if persona is None else ("persona", keys.of_tenant(tenant, persona) if persona else "")
        keep_ms = int(self._settings.chats.keep_s * 1000)
        args = (keys.of_tenant(tenant, chat_id), chat_id, tenant, keep_ms, self._completion_ttl_ms, *chosen)
        reply = await self._insist(scripts.CHAT_CLEAR, args)
        return int(reply[1]), int(reply[2]), reply[3] == b"dropped"

    # --- what a run does -------------------------------------------------------------------------

    async def take(self, chat: str, run: str, *, begin: bool) -> Taken:
        """Return what run *run* is to work with; with *begin* also its messages, once it is time for them."""
        settings = self._settings.chats
        args = (
            chat, run, "begin" if begin else "go on", settings.max_batch, settings.single_ms, settings.quiet_ms,
            settings.max_wait_ms, settings.prompt_chars,
        )  # fmt: skip
        reply = await self._run(scripts.CHAT_TAKE, args)
        _, word, wait_ms, first_ms, dropped, _, fields, state, turns, messages = reply
        return Taken(
            word.decode(),
            int(wait_ms),
            int(first_ms),
            int(dropped),
            _persona(fields),
            state.decode(),
            [orjson.loads(turn) for turn in turns],
            [orjson.loads(message) for message in messages],
        )

    async def save(
        self, chat: str, run: str, message_ids: Sequence[str], *, text: str, state: str, about: Json
    ) -> tuple[Saved, int]:
        """Make a run's reply known: keep it, send it, tell history, and take what it answers out of the queue.

        Args:
            state: JSON, for the first brain of the next run.
            about: what else history is to know of the reply.

        Returns:
            The word, and how many messages were answered. `already`: this run did so before; `lost`: the lock is not
            this run's any more, and nothing was changed; `gone`: no message waits any more.
        """
        args: list[Argument] = [chat, run, state, orjson.dumps(text), self._settings.chats.turns, orjson.dumps(about)]
        args += message_ids
        reply = await self._run(scripts.CHAT_SAVE, args)
        word: Saved = reply[1].decode()
        return word, int(reply[2])

    async def keep_image(
        self, chat: str, epoch: int, image_id: str, data: bytes, content_type: str, message_ids: Sequence[str] = ()
    ) -> Kept:
        """Keep an image and tell of it, unless the chat has begun anew since (`lost`).

        Args:
            message_ids: of the messages that its reply answers.
        """
        args: list[Argument] = [chat, epoch, image_id, data, content_type, int(self._settings.images.keep_s * 1000)]
        args += message_ids
        word: Kept = (await self._run(scripts.CHAT_IMAGE, args))[1].decode()
        return word

    async def _run(self, script: scripts.Script, args: Sequence[Argument]) -> Any:
        return await run_in_hand(self._link, script, args, self.clock)

    # --- reading ---------------------------------------------------------------------------------

    async def last_event(self, chat: str) -> str:
        """Return the id of a chat's newest event, `0-0` where there is none."""
        found = await within(self._link.call("XREVRANGE", keys.CHAT_EVENTS + chat, "+", "-", "COUNT", 1))
        return found[0][0].decode() if found else "0-0"

    async def events(self, chat: str, after: str) -> list[tuple[str, bytes]]:
        """Return the next events (id and JSON) after one of this id."""
        stream = keys.CHAT_EVENTS + chat
        found = await within(self._link.call("XRANGE", stream, f"({after}", "+", "COUNT", EVENTS_AT_ONCE))
        return [(event.decode(), fields[1]) for event, fields in found]

    async def turns(self, chat: str) -> list[Json]:
        """Return the last turns of a chat, oldest first."""
        found = await within(self._link.call("LRANGE", keys.CHAT_TURNS + chat, 0, -1))
        return [orjson.loads(turn) for turn in found]

    async def image(self, chat: str, image_id: str) -> tuple[bytes, bytes] | None:
        """Return an image and its type, None where there is none (any more)."""
        key = f"{keys.CHAT_IMAGE}{chat}:{image_id}"
        data, content_type = await within(self._link.call("HMGET", key, "data", "type"))
        return None if data is None or content_type is None else (data, content_type)

    async def persona(self, tenant: str, name: str) -> Persona | None:
        """Return a persona; None where nobody has set it up."""
        fields = await within(self._link.call("HGETALL", keys.PERSONA + keys.of_tenant(tenant, name)))
        return _persona(fields) if fields else None

    async def set_persona(self, tenant: str, name: str, persona: Persona) -> None:
        """Put a persona in the place of what was there under this name; history is told.

        Raises:
            TooManyPersonas: it would be one more than its tenant may have.
        """
        given = {field: value for field in Persona.__slots__ if (value := getattr(persona, field)) is not None}
        args: list[Argument] = [keys.of_tenant(tenant, name), name, tenant, orjson.dumps(given)]
        args.append(self._settings.chats.max_personas)
        for field in Persona.__slots__:
            args += [field, str(given.get(field, ""))]
        if await within(self._link.run(scripts.PERSONA, (), args)) == b"full":
            raise TooManyPersonas

    @property
    def _completion_ttl_ms(self) -> int:
        return int(self._settings.worker.completion_ttl_s * 1000)

    async def _insist(self, script: scripts.Script, args: Sequence[Argument]) -> Any:
        cap_s = self._settings.redis.reconnect_cap_s
        return await insist(self._link, script, args, self.clock, cap_s)


class ChatWatch:
    """Tells who watches chats of new events: one subscription for all who do so here, open while anybody does."""

    def __init__(self, link: Link, reconnect_cap_s: float) -> None:
        self._link = link
        self._cap_s = reconnect_cap_s
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def of(self, chat: str) -> AsyncIterator[asyncio.Event]:
        """Yield an event that is set whenever the chat may have something new."""
        news = asyncio.Event()
        self._watchers.setdefault(chat, set()).add(news)
        if self._task is None:
            self._task = asyncio.create_task(self._listen(), name="chat watch")
        try:
            yield news
        finally:
            here = self._watchers[chat]
            here.discard(news)
            if not here:
                del self._watchers[chat]
            if not self._watchers:
                await self.close()

    @property
    def count(self) -> int:
        """How many watch now."""
        return sum(len(here) for here in self._watchers.values())

    async def close(self) -> None:
        """Stop listening."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _listen(self) -> None:
        backoff = Backoff(self._cap_s)
        while True:
            try:
                async with aclosing(self._link.subscribe(keys.CHAT_CHANNEL)) as heard:
                    async for channel, chat in heard:
                        backoff.succeeded()
                        # What was told before the subscription held is found by looking.
                        found = self._watchers.get(chat.decode(), set()) if channel else self._all()
                        for news in found:
                            news.set()
            except PenstockError as error:
                await backoff.failed(error)

    def _all(self) -> set[asyncio.Event]:
        return {news for here in self._watchers.values() for news in here}


def _persona(fields: Sequence[bytes]) -> Persona:
    """Read a persona's flat list of names and values; what cannot be read counts as not given."""
    found = {name.decode(): value.decode() for name, value in zip(fields[::2], fields[1::2], strict=True)}
    policy: Policy = "interrupt" if found.get("policy") == "interrupt" else "merge"
    try:
        temperature = float(found["temperature"])
    except (KeyError, ValueError):
        temperature = None
    texts = {name: found.get(name) or None for name in ("system_prompt", "state_prompt", "model", "image_prompt")}
    return Persona(**texts, temperature=temperature, policy=policy)
