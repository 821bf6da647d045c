"""Whom `penstock verify` believes: news that its own receiver gets is Penstock's only with the right signature."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import httpx
import orjson
import pytest
from standardwebhooks import Webhook

from gateway import receiver
from gateway.checks import Site
from gateway.receiver import Receiver, receiving
from gateway.trials import _delivery, _receiver, _told, _unseen
from gateway.verify import Failed, Skipped
from pipeline.connection import Link
from pipeline.settings import Settings
from pipeline.webhooks import new_secret
from tests.ports import take_port

SECRET = new_secret()
BODY = orjson.dumps({"type": "message.completed", "data": {"message_id": "m1"}})


@dataclass
class Gateway:
    """Answers what the trial asks of a gateway."""

    webhook: dict[str, Any] = field(default_factory=lambda: {"id": "msg_b1", "status": "completed", "attempts": []})

    async def send_once(self, _method: str, path: str, *_: Any, **__: Any) -> httpx.Response:
        kind = path.split("/")[1]
        found = {"queue": {"webhook_secret": SECRET}, "batch": {"webhook_id": "msg_b1"}, "webhook": self.webhook}[kind]
        return httpx.Response(200, json=found)


class Redis:
    """Holds every key."""

    async def call(self, *_: Any) -> int:
        return 1


def site(gateway: Gateway, **deliveries: str) -> Site:
    settings = Settings.model_validate({"deliveries": deliveries})
    return Site(cast("Any", gateway), cast("Link", Redis()), settings, "redis")


async def tell(receiver: Receiver, *, secret: str = SECRET, body: bytes = BODY) -> int:
    """Tell the receiver what BODY says, signed with *secret*, and *body* in its place."""
    now = datetime.now(UTC)
    signature = Webhook(secret).sign("msg_b1", now, BODY.decode())
    headers = {
        "webhook-id": "msg_b1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature,
    }
    async with httpx.AsyncClient() as http:
        return (await http.post(receiver.url, content=body, headers=headers)).status_code


async def test_news_with_the_right_signature_is_believed() -> None:
    """And answered 204, so that it is not told again."""
    async with receiving() as receiver, asyncio.TaskGroup() as group:
        told = group.create_task(_told(site(Gateway()), receiver, "b1"))
        assert await tell(receiver) == 204
        assert (await told)["data"] == {"message_id": "m1"}


@pytest.mark.parametrize("wrong", [{"secret": new_secret()}, {"body": BODY + b" "}], ids=["secret", "body"])
async def test_news_with_a_wrong_signature_fails(wrong: dict[str, Any]) -> None:
    """Another's secret, or a body that was changed on its way."""
    async with receiving() as receiver:
        telling = asyncio.create_task(tell(receiver, **wrong))
        with pytest.raises(Failed, match="the signature is wrong") as failed:
            await _told(site(Gateway()), receiver, "b1")
        await telling
    assert failed.value.todo


@pytest.mark.parametrize(
    ("webhook", "why"),
    [
        ({"status": "failed", "attempts": [], "error": {"message": "127.0.0.1 is not a public address"}}, "public"),
        ({"status": "pending", "attempts": [{"at_ms": 1, "error": "unreachable"}], "error": None}, "unreachable"),
        ({"status": "pending", "attempts": [{"at_ms": 1, "status": 502}], "error": None}, "status 502"),
    ],
    ids=["refused", "unreachable", "proxy"],
)
async def test_an_attempt_that_never_came_here_is_told_with_its_reason(webhook: dict[str, Any], why: str) -> None:
    """The webhook worker does not call this machine, or does not reach it: waiting longer would not help."""
    async with receiving() as receiver:
        with pytest.raises(Failed, match=why) as failed:
            await _told(site(Gateway({"id": "msg_b1"} | webhook)), receiver, "b1")
    assert "ALLOW_PRIVATE" in failed.value.todo


@pytest.mark.parametrize("raw", [b"", b"POST / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n"])
async def test_what_is_no_webhook_is_not_heard(raw: bytes) -> None:
    """Somebody scans ports, say. It is no accident of ours either."""
    accidents: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: accidents.append(about))
    async with receiving() as receiver:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(receiver.url.split(":")[2].split("/")[0]))
        writer.write(raw)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert receiver.told.empty()
    assert accidents == []


async def test_a_receiver_listens_where_it_is_called_although_it_is_on_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run after the other; where somebody else listens for good, it is not tried, and the reason is told."""
    where = site(Gateway())
    where.trial_url = f"http://127.0.0.1:{take_port()}/secret"
    monkeypatch.setattr(receiver, "AGAIN_S", 0.01)
    first = _receiver(where)
    assert (await first.__aenter__()).url == where.trial_url
    second = asyncio.create_task(_receiver(where).__aenter__())
    await asyncio.sleep(0.05)
    assert not second.done()
    monkeypatch.setattr(receiver, "TAKEN_S", 0.0)
    with pytest.raises(Skipped, match="in use"):
        await _receiver(where).__aenter__()
    await first.__aexit__(None, None, None)
    assert (await second).url == where.trial_url


async def test_a_real_provider_that_nobody_may_be_sent_to_stays_unseen_and_that_is_said() -> None:
    """Neither a pass nor a skip says anything of it."""
    with pytest.raises(
        Skipped, match="sms by twilio, mms by twilio, email by smtp works stays unseen without --deliver-to"
    ):
        await _delivery(site(Gateway(), sms="twilio", mms="twilio", email="smtp"))
    assert "email by smtp" in _unseen(site(Gateway(), email="smtp"), {"sms", "mms"})
    assert _unseen(site(Gateway()), {"sms", "mms", "email"}) == ""
    assert _unseen(site(Gateway(), email="smtp"), {"email"}) == ""
