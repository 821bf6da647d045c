"""The Telegram connector: chats of a Telegram bot are chats of ours. `penstock telegram` runs it, one per bot.

Two loops. One asks Telegram for what people write (`getUpdates`, long polling) and says it; a message is confirmed only
after that, and one that comes a second time, after a crash, has the same id and is said once. A command is noted as
done before it is done: a chat that is cleared twice could lose what was said between. The other loop hears of events
and sends them, one after another in each chat; how far each chat was told is noted in Redis after the sending. A
process that dies between sending and noting sends that event again: at least once.

The first loop sends nothing itself: one chat that Telegram wants to wait would make all people wait. What it answers,
to a command say, is sent by the task that tells this chat of its events, and is lost with the process.

The Bot API is spoken directly: three methods over HTTP. Chat 42 of the bot 123 is the chat `tg.123.42`.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson
import structlog
import uvloop
from prometheus_client import Counter, Gauge, start_http_server

from pipeline import keys, logs, scripts
from pipeline.chats import Chats, Message
from pipeline.clock import Clock, monotonic_us
from pipeline.connection import Backoff, Link, Outage
from pipeline.errors import ConfigError, Overloaded, PenstockError

if TYPE_CHECKING:
    from pipeline.settings import Settings

log = structlog.get_logger(__name__)

Json = dict[str, Any]

LONGEST_TEXT: Final = 4_096
"""Of one message, in UTF-16 code units, as the Bot API counts (`sendMessage`)."""
ANSWER_S: Final = 30.0
LOOK_EVERY_S: Final = 30.0
"""At all chats, in case a hint was lost."""
AGAIN_S: Final = 2.0
NOTED_S: Final = 86_400.0
"""How long an update's number counts: after a week without one Telegram may begin anew with any number."""

HELLO: Final = (
    "Hello! Write to me in as many messages as you like.\n/clear begins anew, /persona NAME changes who answers."
)
CLEARED: Final = "We begin anew."
FAILED: Final = "Sorry, I have no answer to that. Please write again."
TEXT_ONLY: Final = "I can read text only."
SLOWER: Final = "You are quicker than I am. Please wait for an answer."
WHICH: Final = "Which persona? /persona NAME, or /persona - for none."
UNKNOWN: Final = "I know no persona of that name."
CHANGED: Final = "Somebody else answers from here on."

_COMMAND: Final = re.compile(r"/(start|clear|persona)(?:@\w+)?(?:\s+(.*))?", re.DOTALL)
_PERSONA: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""As `PUT /persona/{name}` has it: with a colon it could name another tenant's."""
MOST_ANSWERS: Final = 10
"""That wait to be sent to one chat; older ones go. Nobody reads the tenth answer to a command."""

_METHODS: Final = {"getUpdates": "updates", "sendMessage": "texts", "sendPhoto": "photos"}
UPDATES: Final = Counter("penstock_telegram_updates_total", "What people wrote, by what became of it", ["outcome"])
CALLS: Final = Counter("penstock_telegram_calls_total", "Calls of the Bot API, by their ends", ["record", "outcome"])
WAITED_S: Final = Counter("penstock_telegram_wait_seconds_total", "Time that Telegram asked to wait (retry_after)")
BEHIND: Final = Gauge("penstock_telegram_chats_behind", "Chats to which something is being sent, or tried to")
for _outcome in ("said", "refused", "command", "unreadable"):  # a counter that begins at 1 shows no increase
    UPDATES.labels(_outcome)
for _record in _METHODS.values():
    for _outcome in ("done", "refused", "away", "asked_to_wait"):
        CALLS.labels(_record, _outcome)


class Refused(PenstockError):
    """Telegram will never do this: a person who blocked the bot, a chat that is gone."""


class Away(PenstockError):
    """Telegram cannot be reached, or does not work for now."""


class BotApi:
    """The methods of the Bot API that are used here."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token: str) -> None:
        self._session = session
        self._base = f"{url.rstrip('/')}/bot{token}"

    async def updates(self, offset: int, wait_s: float) -> list[Json]:
        """Return messages that came, waiting for some; those before *offset* are confirmed."""
        wish = {"offset": offset, "timeout": int(wait_s), "allowed_updates": ["message"]}
        found: list[Json] = await self._call("getUpdates", wish, wait_s + ANSWER_S)
        return found

    async def send(self, chat: int, text: str) -> None:
        """Send a text of any length, in as many messages as it takes.

        Raises:
            Refused, Away: see there.
        """
        for part in split(text):
            await self._call("sendMessage", {"chat_id": chat, "text": part}, ANSWER_S)

    async def send_photo(self, chat: int, data: bytes, content_type: str) -> None:
        """Send an image; errors as for `send`."""

        def form() -> aiohttp.FormData:
            parts = aiohttp.FormData()
            parts.add_field("chat_id", str(chat))
            parts.add_field("photo", data, filename="image", content_type=content_type)
            return parts

        await self._call("sendPhoto", form, ANSWER_S)

    async def _call(self, method: str, body: Json | Callable[[], aiohttp.FormData], timeout_s: float) -> Any:
        """Call a method; wait as long as Telegram says when it was called too often."""
        record = _METHODS[method]
        try:
            answer = await self._call_until_answered(method, record, body, timeout_s)
        except (Refused, ConfigError):
            CALLS.labels(record, "refused").inc()
            raise
        except Away:
            CALLS.labels(record, "away").inc()
            raise
        CALLS.labels(record, "done").inc()
        return answer

    async def _call_until_answered(
        self, method: str, record: str, body: Json | Callable[[], aiohttp.FormData], timeout_s: float
    ) -> Any:
        while True:
            sent: Json = {"json": body} if isinstance(body, dict) else {"data": body()}  # a form is sent once
            try:
                async with (
                    asyncio.timeout(timeout_s),
                    self._session.post(f"{self._base}/{method}", **sent) as answer,
                ):
                    status, text = answer.status, await answer.read()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise Away(f"{method}: {type(error).__name__}") from None  # the address in its text holds the token
            try:
                said = orjson.loads(text)
                if said["ok"]:
                    return said["result"]
                words, after_s = said.get("description", ""), (said.get("parameters") or {}).get("retry_after")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise Away(f"{method}: status {status}, and no answer of the Bot API") from None
            if status == 429 and after_s:
                log.info("telegram asks to wait", method=method, seconds=after_s)
                CALLS.labels(record, "asked_to_wait").inc()
                WAITED_S.inc(float(after_s))
                await asyncio.sleep(float(after_s))
                continue
            if status in {401, 404}:
                raise ConfigError(f"Telegram does not know this bot (PENSTOCK_TELEGRAM__TOKEN): {words}")
            if status in {400, 403, 413}:
                raise Refused(f"{method}: {words}")
            raise Away(f"{method}: {status} {words}")


class Connector:
    """One bot: what people write goes in, what becomes of it goes out."""

    def __init__(self, settings: Settings, api: BotApi, bot: str) -> None:
        self._settings = settings
        self._api = api
        self._bot = bot
        self._tenant = settings.telegram.tenant
        self._prefix = keys.of_tenant(self._tenant, f"tg.{bot}.")
        self._link = Link(settings.redis, "telegram")
        self._listener = Link(settings.redis, "telegram-listen")
        self._clock = Clock()
        self._chats = Chats(Link(settings.redis, "telegram-chats"), settings, self._clock)
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._more: set[str] = set()  # chats with something new since their task began
        self._answers: dict[str, deque[str]] = {}  # to commands, by chat: what was not sent yet
        self._keep_ms = int(settings.chats.keep_s * 1000)
        BEHIND.set_function(lambda: len(self._telling))

    async def run(self, stop: asyncio.Event, metrics_address: str) -> None:
        """Work until *stop*.

        Args:
            metrics_address: where this process serves its metrics; Prometheus learns it from any gateway.

        Raises:
            ConfigError: Telegram does not know the bot.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._hear_people(), name="telegram updates"),
                    group.create_task(self._hear_events(), name="telegram events"),
                    group.create_task(self._look_forever(), name="telegram look"),
                    group.create_task(self._enlist_forever(metrics_address), name="telegram enlist"),
                ]
                await stop.wait()
                for task in tasks:
                    task.cancel()
        except ExceptionGroup as problems:
            raise problems.exceptions[0] from None
        finally:
            for task in self._telling.values():
                task.cancel()
            await asyncio.gather(*self._telling.values(), return_exceptions=True)
            for link in (self._link, self._listener, self._chats):
                await link.close()

    async def _enlist_forever(self, address: str) -> None:
        about = {"name": f"telegram-{self._bot}", "address": address, "host": socket.gethostname(), "pid": os.getpid()}
        record, lease_s = orjson.dumps(about | {"kind": "telegram"}), self._settings.worker.lease_s
        try:
            while True:
                with suppress(PenstockError):  # Redis is away: the other loops tell of it
                    await self._link.run(scripts.ENLIST, (), (record, int(lease_s * 1000)))
                await asyncio.sleep(lease_s / 3)
        finally:
            with suppress(PenstockError):  # then the entry lapses
                await self._link.call("ZREM", keys.GATEWAYS, record)

    # --- what people write -----------------------------------------------------------------------

    async def _hear_people(self) -> None:
        backoff = Backoff(AGAIN_S, Outage("telegram updates", of="telegram"))
        while True:
            noted = await self._insist(lambda: self._link.call("GET", self._noted()))
            offset = int(noted) + 1 if noted else 0
            try:
                found = await self._api.updates(offset, self._settings.telegram.poll_s)
            except (Away, Refused) as error:
                await backoff.failed(error)
                continue
            backoff.succeeded()
            for update in found:
                message, update_id = update.get("message") or {}, int(update["update_id"])
                if _COMMAND.fullmatch(str(message.get("text", ""))):
                    await self._insist(lambda: self._note(update_id))  # noqa: B023 - used at once
                await self._insist(lambda: self._do(message))  # noqa: B023 - used at once
                await self._insist(lambda: self._note(update_id))  # noqa: B023 - used at once

    async def _insist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Do what is asked for, however long Redis or Telegram are away: what is not confirmed is not lost."""
        backoff = Backoff(AGAIN_S, Outage("telegram updates"))
        while True:
            try:
                answer = await call()
            except Refused as error:
                log.info("telegram refuses", reason=str(error))
                return None
            except ConfigError:
                raise
            except PenstockError as error:
                await backoff.failed(error)
            else:
                backoff.succeeded()
                return answer

    def _noted(self) -> str:
        return f"{keys.TELEGRAM_AT}{self._bot}:updates"

    async def _note(self, update_id: int) -> None:
        await self._link.call("SET", self._noted(), update_id, "PX", int(NOTED_S * 1000))

    async def _do(self, message: Json) -> None:
        number = (message.get("chat") or {}).get("id")
        if not isinstance(number, int):
            UPDATES.labels("unreadable").inc()
            return
        chat_id, text = f"tg.{self._bot}.{number}", message.get("text")
        if not isinstance(text, str) or not text:
            UPDATES.labels("unreadable").inc()
            self._answer(chat_id, TEXT_ONLY)
            return
        command = _COMMAND.fullmatch(text)
        if command is None:
            await self._say(chat_id, message, text)
            return
        match command[1]:
            case "start":
                answer = HELLO
            case "clear":
                await self._chats.clear(self._tenant, chat_id)
                answer = CLEARED
            case _:
                answer = await self._choose(chat_id, (command[2] or "").strip())
        UPDATES.labels("command").inc()
        self._answer(chat_id, answer)

    def _answer(self, chat_id: str, words: str) -> None:
        """Have something sent to a chat that is no event of it, after what is being sent there now."""
        chat = keys.of_tenant(self._tenant, chat_id)
        self._answers.setdefault(chat, deque(maxlen=MOST_ANSWERS)).append(words)
        self._tell(chat)

    async def _choose(self, chat_id: str, name: str) -> str:
        if not name:
            return WHICH
        is_known = name == "-" or (_PERSONA.fullmatch(name) and await self._chats.persona(self._tenant, name))
        if not is_known:
            return UNKNOWN
        await self._chats.clear(self._tenant, chat_id, persona="" if name == "-" else name)
        return CHANGED

    async def _say(self, chat_id: str, message: Json, text: str) -> None:
        chat = keys.of_tenant(self._tenant, chat_id)
        if not self._clock.is_set:
            sent_us = monotonic_us()
            self._clock.observe(await self._link.time_us(), sent_us)
        # What was told before anybody spoke here is nobody's; then the chat is one to look at.
        last = await self._chats.last_event(chat)
        await self._link.call("SET", self._cursor(chat), last, "NX", "PX", self._keep_ms)
        now_ms = self._clock.now_ms()
        await self._link.call("ZADD", keys.TELEGRAM + self._bot, now_ms, chat)
        await self._link.call("ZREMRANGEBYSCORE", keys.TELEGRAM + self._bot, "-inf", now_ms - self._keep_ms)
        await self._link.call("PEXPIRE", keys.TELEGRAM + self._bot, self._keep_ms)
        user = str((message.get("from") or {}).get("id", chat_id.rpartition(".")[2]))
        most = self._settings.chats.max_text_chars
        said = Message(f"tg{message.get('message_id')}", user, text[:most])
        try:
            await self._chats.say(self._tenant, chat_id, said)
        except Overloaded as error:
            if error.code != "too_many_waiting":
                raise
            UPDATES.labels("refused").inc()
            self._answer(chat_id, SLOWER)
        else:
            UPDATES.labels("said").inc()

    # --- what becomes of it ----------------------------------------------------------------------

    async def _hear_events(self) -> None:
        backoff = Backoff(self._settings.redis.reconnect_cap_s, Outage("telegram events"))
        while True:
            try:
                async with aclosing(self._listener.subscribe(keys.CHAT_CHANNEL)) as heard:
                    async for channel, chat in heard:
                        backoff.succeeded()
                        if not channel:
                            await self._look()
                        elif chat.decode().startswith(self._prefix):
                            self._tell(chat.decode())
            except PenstockError as error:
                await backoff.failed(error)

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with suppress(PenstockError):
                await self._look()

    async def _look(self) -> None:
        for chat in await self._link.call("ZRANGE", keys.TELEGRAM + self._bot, 0, -1):
            self._tell(chat.decode())

    def _tell(self, chat: str) -> None:
        """Have a chat's new events sent, by one task at a time."""
        self._more.add(chat)
        if chat not in self._telling:
            self._telling[chat] = asyncio.create_task(self._tell_all(chat), name=f"telegram {chat}")

    async def _tell_all(self, chat: str) -> None:
        backoff = Backoff(AGAIN_S, Outage("telegram sending", of="telegram"))
        try:
            while chat in self._more:
                self._more.discard(chat)
                try:
                    await self._tell_new(chat)
                    await self._send_answers(chat)
                except ConfigError:
                    log.exception("nothing can be sent")
                    return
                except PenstockError as error:
                    self._more.add(chat)
                    await backoff.failed(error)
                else:
                    backoff.succeeded()
        finally:
            del self._telling[chat]

    async def _send_answers(self, chat: str) -> None:
        while answers := self._answers.get(chat):
            words = answers[0]
            try:
                await self._api.send(int(chat.removeprefix(self._prefix)), words)
            except Refused as error:
                log.info("telegram refuses", reason=str(error))
            if answers and answers[0] is words:  # else it had to make room for another
                answers.popleft()
        self._answers.pop(chat, None)

    async def _tell_new(self, chat: str) -> None:
        after = await self._link.call("GET", self._cursor(chat))
        if after is None:  # nobody speaks there through this bot
            return
        number, at = int(chat.removeprefix(self._prefix)), after.decode()
        while found := await self._chats.events(chat, at):
            for event_id, text in found:
                try:
                    await self._pass_on(number, chat, orjson.loads(text))
                except Refused as error:
                    log.info("telegram refuses", reason=str(error))
                await self._link.call("SET", self._cursor(chat), event_id, "PX", self._keep_ms)
                at = event_id

    async def _pass_on(self, number: int, chat: str, event: Json) -> None:
        if event["type"] == "image":
            if image := await self._chats.image(chat, event["image_id"]):
                data, content_type = image
                await self._api.send_photo(number, data, content_type.decode())
        elif words := words_of(event):
            await self._api.send(number, words)

    def _cursor(self, chat: str) -> str:
        return f"{keys.TELEGRAM_AT}{self._bot}:{chat}"


def words_of(event: Json) -> str:
    """Return what a person is told of an event; nothing of a clear, which was their own wish."""
    match event["type"]:
        case "reply":
            return str(event["text"])
        case "failed" | "expired":
            return FAILED
    return ""


def split(text: str, most: int = LONGEST_TEXT) -> Iterator[str]:
    """Yield a long text in parts that Telegram takes: cut at a paragraph, a line, a blank, or where it must be."""
    while _units(text) > most:
        fits = _prefix(text, most)
        cut = next((at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, fits // 2, fits)) > 0), fits)
        if part := text[:cut].strip():
            yield part
        text = text[cut:].strip()
    if text.strip():
        yield text


def _units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _prefix(text: str, most: int) -> int:
    """Return how many characters from the start take *most* UTF-16 units at most."""
    fits, units = 0, 0
    for character in text:
        units += 2 if ord(character) > 0xFFFF else 1
        if units > most:
            break
        fits += 1
    return fits


async def serve(settings: Settings, stop: asyncio.Event | None = None) -> None:
    """Connect the bot until a signal comes.

    Raises:
        ConfigError: there is no token, or Telegram does not know it.
    """
    if settings.telegram.token is None:
        raise ConfigError("PENSTOCK_TELEGRAM__TOKEN is missing: @BotFather on Telegram gives one")
    token = settings.telegram.token.get_secret_value()
    bot, _, secret = token.partition(":")
    if not (bot.isascii() and bot.isdigit() and secret):
        raise ConfigError("PENSTOCK_TELEGRAM__TOKEN is none: a token looks like 123456:AbC...")
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    try:
        server, _ = start_http_server(settings.metrics.port, settings.metrics.host)
    except OSError as error:
        raise ConfigError(f"PENSTOCK_METRICS__PORT: cannot listen on {settings.metrics.port}: {error}") from error
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        async with aiohttp.ClientSession() as session:
            api = BotApi(session, settings.telegram.api_url, token)
            log.info("telegram.connected", bot=bot, metrics_port=server.server_port)
            await Connector(settings, api, bot).run(stop, f"{settings.metrics.host}:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        for number in signals:
            loop.remove_signal_handler(number)


def run(settings: Settings) -> int:
    """Run the connector; return the process's exit code: 0 after a signal. Raises `ConfigError`."""
    logs.configure(settings.log, "telegram")
    uvloop.run(serve(settings))
    return 0
