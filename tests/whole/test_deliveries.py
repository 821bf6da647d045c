"""Deliveries through real processes: one queue, one message, whoever dies, at the time that was asked for."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp import web

from pipeline import keys
from tests.conftest import wait_until
from tests.ports import take_port
from tests.whole.system import END_S, SLACK_S, Json, Outside, System, outside, penstock

SMS: Json = {"from": "+15005550006", "to": "+15005550009", "type": "sms", "body": "Zyxwquorn is here."}
CANARY = "Zyxwquorn"
SOON_MS = SLACK_S * 1000


async def send(whole: Outside, body: Json | None = None, **more: Any) -> str:
    reply = await whole.send("POST", "/api/v1/messages/send", (body or SMS) | more)
    assert reply.status == 202, reply.body
    return str(reply.body["id"])


async def until(whole: Outside, delivery_id: str, *statuses: str) -> Json:
    """Wait until a delivery has come to one of these."""
    found: Json = {}

    async def has_come() -> bool:
        nonlocal found
        reply = await whole.send("GET", f"/api/v1/messages/{delivery_id}")
        found = reply.body
        return reply.status == 200 and found["status"] in statuses

    await wait_until(has_come, timeout_s=END_S, every_s=0.02)
    return found


def printed(system: System) -> Counter[str]:
    """How often each delivery was printed by the provider `console`."""
    return Counter(line["delivery"] for line in _lines(system) if "delivery" in line)


def _lines(system: System) -> Iterator[Json]:
    for line in system.log.read_bytes().splitlines():
        start = line.find(b'{"delivery":')
        if start >= 0:
            yield orjson.loads(line[start:])


async def redis_ms(whole: Outside) -> int:
    seconds, micros = await whole.redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


def at(instant_ms: int) -> str:
    return datetime.fromtimestamp(instant_ms / 1000, UTC).isoformat()


def instant(delivery: Json, status: str) -> int:
    return next(int(step["at_ms"]) for step in delivery["history"] if step["status"] == status)


async def test_a_message_goes_out_once_and_its_whole_story_is_told(whole: Outside) -> None:
    """By the console, the default; of each type; in Redis, in the list and in the history."""
    mail = {"from": "ann@example.com", "to": "ben@example.com", "type": "email", "subject": "Hi", "body": "Hello."}
    picture = {"attachments": [{"url": "https://example.com/cat.png"}]}
    ids = [await send(whole), await send(whole, SMS, **picture), await send(whole, mail)]
    found = [await until(whole, delivery_id, "sent") for delivery_id in ids]
    assert [one["type"] for one in found] == ["sms", "mms", "email"]
    for one in found:
        assert [step["status"] for step in one["history"]] == ["pending", "sending", "sent"]
    times = printed(whole.system)
    assert [times[delivery_id] for delivery_id in ids] == [1, 1, 1]

    async def are_recorded() -> bool:
        reply = await whole.send("GET", "/api/v1/messages?status=sent")  # 503 until the recorder has made the tables
        return reply.status == 200 and set(ids) <= {one["id"] for one in reply.body["messages"]}

    await wait_until(are_recorded, timeout_s=END_S, every_s=0.05)


async def test_a_scheduled_message_leaves_at_its_time(whole: Outside) -> None:
    """By Redis' clock, as its history has it; not before."""
    due_ms = await redis_ms(whole) + 1_500
    found = await until(whole, await send(whole, scheduled_at=at(due_ms)), "sent")
    assert found["scheduled_at_ms"] == due_ms
    assert [step["status"] for step in found["history"]] == ["scheduled", "pending", "sending", "sent"]
    assert due_ms <= instant(found, "pending") <= instant(found, "sending") <= due_ms + SOON_MS


async def test_a_scheduled_message_leaves_when_its_process_is_back(whole: Outside) -> None:
    """The process stood still at its time."""
    due_ms = await redis_ms(whole) + 1_500
    delivery_id = await send(whole, scheduled_at=at(due_ms))
    pid = whole.system.kill("delivery", signal.SIGSTOP)
    try:

        async def is_due() -> bool:
            return await redis_ms(whole) > due_ms + 200

        await wait_until(is_due, timeout_s=END_S, every_s=0.02)
        assert (await until(whole, delivery_id, "pending", "scheduled"))["history"][-1]["status"] != "sending"
    finally:
        back_ms = await redis_ms(whole)
        whole.system.kill("delivery", signal.SIGCONT)
    found = await until(whole, delivery_id, "sent")
    assert whole.system.pid_of("delivery") == pid
    assert back_ms <= instant(found, "sending") <= back_ms + SOON_MS
    assert printed(whole.system)[delivery_id] == 1


async def test_a_scheduled_message_leaves_although_everything_was_down_at_its_time() -> None:
    """And once; a request may also wait for the outcome of its delivery."""
    with System(SYNC_MESSAGE_PROCESSING="true") as own:
        async with outside(own) as whole:
            reply = await whole.send("POST", "/api/v1/messages/send", SMS)
            assert (reply.status, reply.body["status"]) == (200, "sent")
            due_ms = await redis_ms(whole) + 1_000
            delivery_id = await send(whole, scheduled_at=at(due_ms))
        await own.end(signal.SIGTERM)
        own.start()
        async with outside(own) as whole:
            found = await until(whole, delivery_id, "sent")
            back_ms = int(1000 * await _began_s(whole))
        assert instant(found, "pending") >= due_ms
        # From when the process that carries it was there, which takes a second to start its interpreter.
        assert instant(found, "sending") <= max(due_ms, back_ms) + SOON_MS
        assert printed(own) == {reply.body["id"]: 1, delivery_id: 1}


async def _began_s(whole: Outside) -> float:
    """When the delivery process took its lease, by Redis' clock, or a little later."""
    code, out, _ = await penstock("status", "--data-dir", str(whole.system.data_dir), "--json")
    assert code == 0
    (worker,) = (one for one in orjson.loads(out)["workers"] if "sms" in one["stages"])
    record = orjson.loads(await whole.redis.get(keys.WORKER + worker["consumer"]))
    return float(record["started_ms"]) / 1000


# --- a provider that holds its answers ----------------------------------------------------------


class Receiver:
    """Takes messages as Twilio does, and as one's own gateway would; answers when the test says so."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.port = take_port()
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    async def _take(self, request: web.Request) -> web.Response:
        form = await request.post() if "/2010-04-01/" in request.path else {}
        self.got.append(str(form.get("Body") or request.headers.get("idempotency-key")))
        await self._open.wait()
        return web.json_response({"sid": f"SM{len(self.got):032x}", "id": str(len(self.got))}, status=201)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._take)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            self._open.set()
            await runner.cleanup()


async def test_a_kill_between_sending_and_the_answer_is_unknown_or_repeated_as_the_provider_can_bear() -> None:
    """Twilio's message is never sent again by itself; one's own gateway knows the message by its id."""
    receiver = Receiver()
    async with receiver.listening() as url:
        providers = {
            "PENSTOCK_DELIVERIES__SMS": "twilio",
            "PENSTOCK_TWILIO__API_URL": url,
            "PENSTOCK_TWILIO__ACCOUNT_SID": "AC" + "0" * 32,
            "PENSTOCK_TWILIO__AUTH_TOKEN": "secret",
            "PENSTOCK_DELIVERIES__EMAIL": "http",
            "PENSTOCK_HTTP_PROVIDER__URL": url,
        }
        with System(**providers) as own:
            async with outside(own) as whole:
                sms = await send(whole)
                mail = await send(
                    whole, {"from": "ann@example.com", "to": "b@example.com", "type": "email", "body": "x"}
                )
                await wait_until(lambda: len(receiver.got) == 2, timeout_s=END_S)
                own.kill("delivery", signal.SIGKILL)
                receiver.open()
                unknown, repeated = await until(whole, sms, "unknown"), await until(whole, mail, "sent")
                assert Counter(receiver.got) == {SMS["body"]: 1, mail: 2}
                assert unknown["error"]["code"] == "outcome_unknown"
                assert [step["status"] for step in repeated["history"]] == ["pending", "sending", "sent"]
                code, out, _ = await penstock("dead", "list", "--data-dir", str(own.data_dir), "--json")
                assert code == 0
                (letter,) = orjson.loads(out)
                assert (letter["job_id"], letter["reason"]) == (sms, "outcome_unknown")
                code, out, _ = await penstock("dead", "retry", letter["id"], "--data-dir", str(own.data_dir))
                assert code == 0
                again = await until(whole, out.split()[-1], "sent")
                assert (again["retry_of"], again["provider"]) == (sms, "twilio")
                assert Counter(receiver.got) == {SMS["body"]: 2, mail: 2}
                assert (await until(whole, sms, "unknown"))["history"] == unknown["history"]
                await whole.until_idle()
            log = own.log.read_text()
        assert CANARY not in log
        assert "+1500" not in log


async def test_no_message_is_lost_or_sent_twice_while_delivery_processes_die(whole: Outside) -> None:
    """By what was printed: each reaches an end that is true, and whoever says `sent` was printed once."""
    ids: list[str] = []

    async def client() -> None:
        while len(ids) < 300:
            ids.append(await send(whole))

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(client())
        for least in (60, 120, 180):
            await wait_until(lambda least=least: len(ids) >= least, timeout_s=END_S)  # type: ignore[misc]
            pid = whole.system.kill("delivery", signal.SIGKILL)
            await wait_until(lambda pid=pid: whole.system.pid_of("delivery") not in {None, pid}, timeout_s=END_S)  # type: ignore[misc]
    ended = [await until(whole, delivery_id, "sent", "unknown", "failed") for delivery_id in ids]
    times = printed(whole.system)
    assert {one["status"] for one in ended} <= {"sent", "unknown"}
    assert all(times[one["id"]] == 1 for one in ended if one["status"] == "sent")
    assert all(times[one["id"]] <= 1 for one in ended)
    for one in ended:  # of these a kill fell between the two lines
        if one["status"] == "unknown":
            assert one["error"]["code"] == "outcome_unknown"
    code, out, _ = await penstock("dead", "discard", "--all", "--data-dir", str(whole.system.data_dir))
    assert code == 0, out
