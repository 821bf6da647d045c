"""Chats through real processes: several messages, one reply, whoever dies, freezes or goes away meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any, Final

import orjson

from pipeline import keys
from tests.conftest import wait_until
from tests.faults.chats import Bursts, piece_together
from tests.faults.checkers.chats import check
from tests.whole.system import END_S, Json, Outside, System, outside

HELD_S: Final = 5.0
"""A call that the test does something beside: long enough for a machine that stands still for a moment."""
FOR_EVER_S: Final = 600.0
"""A call that is broken off."""
AT_ONCE: Final[dict[str, str]] = {f"PENSTOCK_CHATS__{name}": "0" for name in ("SINGLE_MS", "QUIET_MS", "MAX_WAIT_MS")}


async def say(whole: Outside, chat: str, text: str, **more: Any) -> Json:
    """Say something; a gateway that cannot reach Redis is asked again, as clients do."""
    body = {"user_id": "ann", "text": text, "message_id": text.replace(" ", "_")} | more
    found: Json = {}

    async def is_accepted() -> bool:
        nonlocal found
        reply = await whole.send("POST", f"/chat/{chat}/messages", body)
        assert reply.status in {0, 202, 503}, reply.body
        found = reply.body
        return reply.status == 202

    await wait_until(is_accepted, timeout_s=END_S, every_s=0.05)
    return found


async def events(whole: Outside, chat: str, count: int) -> list[Json]:
    """Return the first events of a chat, as its stream tells them."""
    found: list[Json] = []
    async with asyncio.timeout(END_S):
        async with whole.http.stream("GET", f"{whole.system.url}/chat/{chat}/events?after=0-0") as reply:
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    found.append(orjson.loads(line.removeprefix("data: ")))
                    if len(found) == count:
                        return found
    raise EOFError


async def replies(whole: Outside, chat: str, count: int) -> list[list[str]]:
    """Return which messages the first events, all of them replies, answer."""
    found = await events(whole, chat, count)
    assert [event["type"] for event in found] == ["reply"] * count
    return [event["message_ids"] for event in found]


async def is_asked(whole: Outside) -> bool:
    """Say whether a replica is working on something."""
    return any(record["status"] == "running" for record in await whole.records())


async def test_three_quick_messages_get_one_reply(whole: Outside) -> None:
    """The replicas were asked twice: what to remember, and for the reply, with the three turns in order."""
    texts = ["hello", "are you there", "what is a lease"]
    for text in texts:
        await say(whole, "quick", text)
    assert await replies(whole, "quick", 1) == [[text.replace(" ", "_") for text in texts]]
    state, reply = sorted(await whole.records(), key=lambda record: float(record["arrived_s"]))
    assert "\n".join(f"user: {text}" for text in texts) in state["messages"][-1]["content"]
    turns = [turn["content"] for turn in reply["messages"] if turn["role"] == "user"]
    assert turns == texts


async def test_messages_that_come_while_a_reply_is_made_get_the_next_one(whole: Outside) -> None:
    """Together, and after it."""
    await whole.behave(latency=HELD_S)
    await say(whole, "during", "one")
    await wait_until(lambda: is_asked(whole), timeout_s=END_S)
    assert (await say(whole, "during", "two"))["processing"] is True
    await say(whole, "during", "three")
    await whole.behave(latency=0)
    assert await replies(whole, "during", 2) == [["one"], ["two", "three"]]
    assert len(await whole.records()) == 4


async def test_a_killed_run_goes_on_when_the_lease_is_over_not_the_lock(whole: Outside) -> None:
    """Whoever dies with it in hand: one reply, from the same run, long before the lock's ten minutes are over."""
    await whole.behave(latency=FOR_EVER_S)
    await say(whole, "killed", "one")
    await wait_until(lambda: whole.has_in_hand("llm", 1), timeout_s=END_S)
    (run,) = await whole.pending("llm")
    whole.system.kill("llm", signal.SIGKILL)
    await whole.behave(latency=0)
    (event,) = await events(whole, "killed", 1)
    assert (event["type"], event["message_ids"], event["message_id"]) == ("reply", ["one"], run)


async def test_a_run_that_was_frozen_beyond_its_lock_sends_nothing(whole: Outside) -> None:
    """Its messages are answered by the run that has the lock, once."""
    await whole.behave(latency=HELD_S)
    await say(whole, "frozen", "one")
    await wait_until(lambda: is_asked(whole), timeout_s=END_S)
    pid = whole.system.kill("chat", signal.SIGSTOP)
    try:
        (old,) = await whole.pending("llm")
        await whole.redis.delete(keys.CHAT_LOCK + "frozen")
        await say(whole, "frozen", "two")
        await whole.behave(latency=0)
    finally:
        os.kill(pid, signal.SIGCONT)
    (event,) = await events(whole, "frozen", 1)
    assert (event["type"], event["message_ids"]) == ("reply", ["one", "two"])
    assert event["message_id"] != old
    await whole.until_idle()
    assert await whole.redis.xlen(keys.CHAT_EVENTS + "frozen") == 1


async def test_messages_outlive_redis_going_away_in_the_middle(whole: Outside) -> None:
    """It is killed while a model thinks, and comes back with what it had."""
    await whole.behave(latency=HELD_S)
    await say(whole, "away", "one")
    await wait_until(lambda: is_asked(whole), timeout_s=END_S)
    await say(whole, "away", "two")
    killed = whole.system.kill("redis", signal.SIGKILL)
    await wait_until(lambda: whole.system.pid_of("redis") not in {None, killed}, timeout_s=END_S)
    await whole.behave(latency=0)
    await say(whole, "away", "three")
    answered = [event["message_ids"] for event in await events(whole, "away", 2)]
    assert answered == [["one"], ["two", "three"]]


async def test_nothing_from_before_a_clear_is_sent_after_it(whole: Outside) -> None:
    """The reply was being made; nobody sees it."""
    await whole.behave(latency=FOR_EVER_S)
    await say(whole, "cleared", "one")
    await wait_until(lambda: is_asked(whole), timeout_s=END_S)
    assert (await whole.send("POST", "/chat/cleared/clear")).body["reply_dropped"] is True
    await whole.behave(latency=0)
    await say(whole, "cleared", "two")
    first, second = await events(whole, "cleared", 2)
    assert [(one["type"], one["message_ids"]) for one in (first, second)] == [("cleared", ["one"]), ("reply", ["two"])]


async def test_bursts_of_many_chats_survive_the_death_of_whoever_works_on_them(whole: Outside, tmp_path: Path) -> None:
    """Five hundred chats at once: no message is lost, none is answered twice, none before an earlier one."""

    async def post(path: str, body: Json) -> tuple[int, Json]:
        reply = await whole.send("POST", path, body)
        return reply.status, reply.body if reply.status else {"error": {"code": "no_answer"}}

    async def kill(name: str) -> None:
        killed = whole.system.kill(name, signal.SIGKILL)
        await wait_until(lambda: whole.system.pid_of(name) not in {None, killed}, timeout_s=END_S)
        await wait_until(lambda: whole.works(whole.system.pid_of(name)), timeout_s=END_S)

    bursts = Bursts(post, whole.redis, tmp_path / "chats.jsonl")
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(bursts.run(500))
        for name in ("chat", "llm", "chat", "llm"):
            await kill(name)
        await sending
    await kill("chat")
    await wait_until(bursts.are_told, timeout_s=END_S, every_s=0.2)
    await whole.until_idle()
    await bursts.note_what_was_told()
    found = check(piece_together(bursts.path), await whole.records())
    assert (found.chats, found.messages) == (500, 1_500)
    assert {name: those for name, those in found.broken().items() if those} == {}


async def test_an_image_follows_the_reply(whole: Outside) -> None:
    """As an event of its own, from the replica that makes images; it is a PNG, and can be fetched."""
    await whole.send("PUT", "/persona/painter", {"image_prompt": "In oil:"})
    await whole.send("PUT", "/chat/image/persona", {"persona": "painter"})
    await say(whole, "image", "one")
    _, reply, image = await events(whole, "image", 3)
    assert (reply["type"], image["type"], image["message_id"]) == ("reply", "image", reply["message_id"])
    found = await whole.http.get(f"{whole.system.url}/chat/image/images/{image['image_id']}")
    assert found.headers["content-type"] == "image/png"
    assert found.content.startswith(b"\x89PNG\r\n\x1a\n")


async def test_history_is_whole_after_everything_was_restarted() -> None:
    """All turns, in order, from before and after."""
    with System(**AT_ONCE) as system:
        for half in range(2):
            async with outside(system) as whole:
                for number in range(3):
                    await say(whole, "long", f"text {3 * half + number}")
                    await events(whole, "long", 3 * half + number + 1)
            if not half:
                assert await system.end(signal.SIGTERM) == 0
                system.start()
        async with outside(system) as whole:
            await wait_until(lambda: has_history(whole), timeout_s=END_S, every_s=0.1)  # the recorder makes its tables
            turns = (await whole.send("GET", "/chat/long/history")).body["messages"]
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * 6
            assert [turn["text"] for turn in turns[::2]] == [f"text {number}" for number in range(6)]
            await whole.until_idle()


async def has_history(whole: Outside) -> bool:
    """Say whether history can be read."""
    return (await whole.send("GET", "/chat/long/history")).status == 200
