"""The Telegram connector against a local server that speaks what it uses of the Bot API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from prometheus_client import REGISTRY
from pydantic import SecretStr

from gateway.telegram import CHANGED, CLEARED, FAILED, HELLO, SLOWER, TEXT_ONLY, UNKNOWN, serve, split
from pipeline import keys
from pipeline.chats import Chats, Persona
from pipeline.clock import Clock
from pipeline.connection import Link
from pipeline.errors import ConfigError, Reject
from pipeline.job import Done, Job
from pipeline.settings import Settings
from stages.chat import Chat
from tests.conftest import wait_until
from tests.rig import Gate, Scripted, changed, working

Json = dict[str, Any]
TOKEN = "123:secret"
CHAT = "tg.123.42"
COUNTED = (
    *(("penstock_telegram_updates_total", (("outcome", word),)) for word in ("command", "said", "unreadable")),
    *(
        ("penstock_telegram_calls_total", (("record", "texts"), ("outcome", word)))
        for word in ("done", "refused", "asked_to_wait")
    ),
    ("penstock_telegram_wait_seconds_total", ()),
)


async def answering(job: Job) -> Done:
    """Say what was asked last."""
    return Done({"answer": "heard: " + job.state["ask"]["messages"][-1]["content"]})


@dataclass
class BotServer:
    """Telegram, as far as the connector knows it.

    Attributes:
        updates: not confirmed yet.
        sent: what people got: chat and text, in order.
        photos: likewise: chat, type and content.
        refusals: status and body of the answers to the next sendings.
    """

    url: str = ""
    updates: list[Json] = field(default_factory=list)
    sent: list[tuple[int, str]] = field(default_factory=list)
    photos: list[tuple[int, str, bytes]] = field(default_factory=list)
    refusals: list[tuple[int, Json]] = field(default_factory=list)
    is_away: bool = False
    polls: int = 0
    count: int = 100
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def write(self, text: str | None, chat: int = 42, **more: Any) -> None:
        """Have a person write something."""
        self.count += 1
        message = {"message_id": self.count, "chat": {"id": chat}, "from": {"id": 7}} | more
        self.updates.append({"update_id": self.count, "message": message | ({"text": text} if text else {})})
        self._news.set()

    async def handle(self, request: web.Request) -> web.Response:
        if self.is_away:
            return web.Response(status=502, text="<html>bad gateway</html>")
        if request.match_info["token"] != TOKEN:
            return web.json_response({"ok": False, "error_code": 401, "description": "Unauthorized"}, status=401)
        body = {} if request.match_info["method"] == "sendPhoto" else await request.json()
        if request.match_info["method"] == "getUpdates":
            return await self._get_updates(body)
        if request.match_info["method"] == "sendPhoto":
            form = await request.post()
            photo = form["photo"]
            assert isinstance(photo, web.FileField)
            self.photos.append((int(str(form["chat_id"])), photo.content_type, photo.file.read()))
            return web.json_response({"ok": True, "result": {"message_id": 1}})
        assert request.match_info["method"] == "sendMessage"
        assert len(body["text"].encode("utf-16-le")) // 2 <= 4_096
        if self.refusals:
            status, refusal = self.refusals.pop(0)
            return web.json_response({"ok": False, "error_code": status} | refusal, status=status)
        self.sent.append((body["chat_id"], body["text"]))
        return web.json_response({"ok": True, "result": {"message_id": 1}})

    async def _get_updates(self, body: Json) -> web.Response:
        assert body["allowed_updates"] == ["message"]
        self.polls += 1
        self.updates = [update for update in self.updates if update["update_id"] >= body["offset"]]
        if not self.updates and body["timeout"]:
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(body["timeout"]):
                    await self._news.wait()
        return web.json_response({"ok": True, "result": self.updates})

    def texts(self, chat: int = 42) -> list[str]:
        return [text for number, text in self.sent if number == chat]


@pytest.fixture
async def bot() -> AsyncIterator[BotServer]:
    server = BotServer()
    app = web.Application()
    app.router.add_post("/bot{token}/{method}", server.handle)
    before = asyncio.all_tasks()
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()
    await wait_until(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})


@pytest.fixture
def settings(settings: Settings, bot: BotServer) -> Settings:
    return changed(
        settings,
        chats={"single_ms": 0, "quiet_ms": 0, "max_wait_ms": 0},
        telegram={"token": SecretStr(TOKEN), "api_url": bot.url, "poll_s": 1},
    )


class Connected:
    """A connector that runs; `crash` ends it as a kill would, between two steps."""

    def __init__(self, settings: Settings) -> None:
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(serve(settings, self.stop), name="telegram")

    async def __aenter__(self) -> Connected:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop.set()
        await asyncio.gather(self.task, return_exceptions=self.task.cancelled())

    async def crash(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_what_people_write_is_answered(link: Link, settings: Settings, bot: BotServer) -> None:
    """Several messages, one reply; another person's chat is another one."""
    for text in ("hello", "are you there?"):
        bot.write(text)
    bot.write("and me?", chat=-1001)
    async with Connected(settings):
        await wait_until(lambda: waits(link, "tg.123.-1001", 1))
        async with working(settings, [Chat(settings), Scripted("llm", answering)]):
            await wait_until(lambda: len(bot.sent) == 2)
    assert (bot.texts(), bot.texts(-1001)) == (["heard: are you there?"], ["heard: and me?"])
    first = await link.call("LINDEX", keys.CHAT_TURNS + CHAT, 0)
    assert b'"user_id":"7"' in first


async def test_chats_are_noted_by_redis_own_time(link: Link, settings: Settings, bot: BotServer) -> None:
    """The very first one, too: one that seems to lie in the future would be looked at for too long, or others not."""
    before_ms = await link.time_us() // 1000
    bot.write("hello")
    async with Connected(settings):
        await wait_until(lambda: waits(link, CHAT, 1))
    noted_ms = float(await link.call("ZSCORE", f"{keys.TELEGRAM}123", CHAT))
    assert before_ms <= noted_ms <= await link.time_us() // 1000


async def waits(link: Link, chat: str, count: int) -> bool:
    return int(await link.call("LLEN", keys.CHAT_QUEUE + chat)) == count


async def test_commands(link: Link, settings: Settings, bot: BotServer) -> None:
    """They are obeyed, with the bot's name behind them or not, and no model is asked."""
    chats = Chats(Link(settings.redis, "chats"), settings, Clock())
    await chats.set_persona("default", "poet", Persona("You rhyme."))
    await chats.set_persona("acme", "secret", Persona("You know what Acme does."))
    await chats.close()
    async with Connected(settings):
        for text in ("/start", "/persona nobody", "/persona acme:secret", "/persona poet", "/clear@penstock_bot"):
            bot.write(text)
        bot.write(None, photo=[])
        await wait_until(lambda: len(bot.sent) == 6)
        assert bot.texts() == [HELLO, UNKNOWN, UNKNOWN, CHANGED, CLEARED, TEXT_ONLY]
        assert await link.call("HGET", keys.CHAT + CHAT, "persona") == b"poet"
        bot.write("/persona -")
        await wait_until(lambda: len(bot.sent) == 7)
        assert await link.call("HGET", keys.CHAT + CHAT, "persona") is None


async def test_long_replies_are_divided_and_429_is_obeyed(link: Link, settings: Settings, bot: BotServer) -> None:
    """Each part comes once, in order, however often Telegram asks to wait."""

    async def long(job: Job) -> Done:
        return Done({"answer": "word " * 2_000})

    bot.refusals = [(429, {"parameters": {"retry_after": 0.01}}), (429, {"parameters": {"retry_after": 0.01}})]
    bot.write("tell me")
    async with Connected(settings), working(settings, [Chat(settings), Scripted("llm", long)]):
        await wait_until(lambda: len(bot.sent) == 3)
    assert " ".join(bot.texts()).split() == ["word"] * 2_000
    assert not bot.refusals


async def test_images_are_passed_on(link: Link, settings: Settings, bot: BotServer) -> None:
    """As photos, of the type they are."""
    bot.write("one")
    async with Connected(settings), working(settings, [Chat(settings), Scripted("llm", answering)]):
        await wait_until(lambda: bot.sent)
        chats = Chats(Link(settings.redis, "chats"), settings, Clock())
        epoch = int(await link.call("HGET", keys.CHAT + CHAT, "epoch"))
        await chats.keep_image(CHAT, epoch, "r1", b"\x89PNG\0", "image/png")
        await chats.close()
        await wait_until(lambda: bot.photos)
    assert bot.photos == [(42, "image/png", b"\x89PNG\0")]


async def test_a_failed_reply_is_told(link: Link, settings: Settings, bot: BotServer) -> None:
    """In words for people."""

    async def refuse(job: Job) -> Done:
        raise Reject("no", code="content_filtered")

    bot.write("hello")
    async with Connected(settings), working(settings, [Chat(settings), Scripted("llm", refuse)]):
        await wait_until(lambda: bot.sent)
    assert bot.texts() == [FAILED]


async def test_a_killed_connector_goes_on_where_it_was(link: Link, settings: Settings, bot: BotServer) -> None:
    """What was written meanwhile is said once, what was answered meanwhile is sent, and nothing is sent twice."""
    gate = Gate(answering)
    async with working(settings, [Chat(settings), Scripted("llm", gate)]):
        async with Connected(settings) as first:
            bot.write("one")
            await wait_until(lambda: gate.waiting)
            await first.crash()
        gate.open()
        await wait_until(lambda: is_free(link))
        bot.write("two")
        async with Connected(settings):
            await wait_until(lambda: len(bot.sent) == 2)
        async with Connected(settings):
            bot.write("/start")
            await wait_until(lambda: len(bot.sent) == 3)
    assert bot.texts() == ["heard: one", "heard: two", HELLO]


async def is_free(link: Link) -> bool:
    return not await link.call("EXISTS", keys.CHAT_LOCK + CHAT)


async def test_an_update_that_comes_twice_is_said_once(link: Link, settings: Settings, bot: BotServer) -> None:
    """Its confirmation was lost: the message has the same id."""
    bot.write("one")
    (update,) = bot.updates
    async with Connected(settings):
        await wait_until(lambda: waits(link, CHAT, 1))
        await wait_until(lambda: not bot.updates)
    await link.call("DEL", f"{keys.TELEGRAM_AT}123:updates")
    bot.updates = [update]
    async with Connected(settings):
        await wait_until(lambda: not bot.updates)
        assert await waits(link, CHAT, 1)


async def test_telegram_may_be_away(link: Link, settings: Settings, bot: BotServer) -> None:
    """Nothing is lost while it is, neither what was written nor what was answered."""
    gate = Gate(answering)
    async with Connected(settings), working(settings, [Chat(settings), Scripted("llm", gate)]):
        bot.write("one")
        await wait_until(lambda: gate.waiting)
        bot.is_away = True
        gate.open()
        await wait_until(lambda: is_free(link))
        bot.write("two")
        bot.is_away = False
        await wait_until(lambda: len(bot.sent) == 2)
    assert bot.texts() == ["heard: one", "heard: two"]


async def test_a_text_that_begins_with_a_slash_is_no_command_and_not_lost(
    link: Link, settings: Settings, bot: BotServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connector dies when it was about to say it; the next one says it."""
    reached = asyncio.Event()

    async def never(*_: object, **__: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    bot.write("/help me, please")
    with monkeypatch.context() as patched:
        patched.setattr(Chats, "say", never)
        async with Connected(settings) as first:
            await reached.wait()
            await first.crash()
    async with Connected(settings):
        await wait_until(lambda: waits(link, CHAT, 1))


async def test_a_chat_that_telegram_wants_to_wait_holds_up_no_other(
    link: Link, settings: Settings, bot: BotServer
) -> None:
    """An hour, for the answer to a command; what others write is said meanwhile."""
    bot.refusals = [(429, {"parameters": {"retry_after": 3_600}})]
    async with Connected(settings):
        bot.write("/start")
        await wait_until(lambda: not bot.refusals)
        bot.write("hello", chat=43)
        await wait_until(lambda: waits(link, "tg.123.43", 1))


async def test_metrics_tell_what_came_and_what_was_sent(link: Link, settings: Settings, bot: BotServer) -> None:
    """Prometheus finds the process where gateways are listed; nothing in it names a person, a chat or a bot."""
    bot.refusals = [(429, {"parameters": {"retry_after": 0.25}}), (403, {"description": "Forbidden"})]
    before = [REGISTRY.get_sample_value(name, dict(labels)) or 0 for name, labels in COUNTED]
    async with Connected(settings):
        for text in ("/start", "hello"):
            bot.write(text)
        bot.write(None, photo=[])
        await wait_until(lambda: len(bot.sent) == 1)
        await wait_until(lambda: waits(link, CHAT, 1))
        (record,) = await link.call("ZRANGE", keys.GATEWAYS, 0, -1)
        address = orjson.loads(record)["address"]
        async with aiohttp.ClientSession() as http, http.get(f"http://{address}/metrics") as answer:
            page = await answer.text()
    assert 'penstock_telegram_calls_total{outcome="asked_to_wait",record="texts"}' in page
    assert "123" not in "".join(line.partition(" ")[0] for line in page.splitlines() if "telegram" in line)
    after = [REGISTRY.get_sample_value(name, dict(labels)) or 0 for name, labels in COUNTED]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 1, 1, 1, 1, 0.25]
    assert await link.call("ZCARD", keys.GATEWAYS) == 0, "it signs off"


@pytest.mark.parametrize("status", [403, 413], ids=["blocked", "too large"])
async def test_people_who_block_the_bot_hold_up_nobody(
    link: Link, settings: Settings, bot: BotServer, status: int
) -> None:
    """What Telegram will never deliver is passed over."""
    bot.refusals = [(status, {"description": "Forbidden: bot was blocked by the user"})]
    async with Connected(settings), working(settings, [Chat(settings), Scripted("llm", answering)]):
        bot.write("one")
        await wait_until(lambda: not bot.refusals)
        bot.write("two")
        await wait_until(lambda: bot.sent)
    assert bot.texts() == ["heard: two"]


async def test_who_writes_faster_than_the_chat_holds_is_told(link: Link, settings: Settings, bot: BotServer) -> None:
    """And the bot goes on."""
    settings = changed(settings, chats={"max_waiting": 1})
    async with Connected(settings):
        bot.write("one")
        bot.write("two")
        await wait_until(lambda: bot.sent)
    assert bot.texts() == [SLOWER]


async def test_a_wrong_token_ends_the_process(link: Link, settings: Settings) -> None:
    """With a word to the operator that does not hold it."""
    with pytest.raises(ConfigError, match="does not know this bot"):
        await serve(changed(settings, telegram={"token": SecretStr("123:other")}))
    for token in (None, SecretStr("nonsense")):
        with pytest.raises(ConfigError, match="PENSTOCK_TELEGRAM__TOKEN"):
            await serve(changed(settings, telegram={"token": token}))


def test_long_texts_are_cut_where_people_would() -> None:
    """At a paragraph, a line, a blank; in the middle of a word only when there is none; never in a character."""
    assert list(split("short")) == ["short"]
    assert list(split("a" * 30 + "\n\n" + "b" * 20, 40)) == ["a" * 30, "b" * 20]
    assert list(split("a" * 30 + " c\n" + "b" * 20, 40)) == ["a" * 30 + " c", "b" * 20]
    assert list(split("x" * 100, 40)) == ["x" * 40, "x" * 40, "x" * 20]
    assert list(split("\U0001f600" * 5, 4)) == ["\U0001f600" * 2, "\U0001f600" * 2, "\U0001f600"]
    assert list(split("  \n ", 2)) == []
