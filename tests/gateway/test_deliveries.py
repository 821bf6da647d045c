"""The deliveries service over HTTP: what is accepted, what is refused with nothing created, what is told afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
import pytest

from gateway.app import create_app
from pipeline import keys
from pipeline.connection import Link, parse_info
from pipeline.errors import Reject
from pipeline.front import Front
from pipeline.records import Records
from pipeline.settings import Settings
from stages.delivery import Courier, Shared
from stages.providers import Sent
from tests.conftest import wait_until
from tests.gateway.recorded import record
from tests.redis.test_delivering import Scripted, courier
from tests.rig import changed, everything, working

Json = dict[str, Any]
NUMBER, OTHER = "+15005550006", "+15005550009"
SMS: Json = {"from": NUMBER, "to": OTHER, "type": "sms", "body": "Your parcel is here."}
MAIL: Json = {
    "from": "Ann Lee <ann@example.com>", "to": "ben@example.com", "type": "email", "subject": "Parcel",
    "body": "It is here.",
}  # fmt: skip
FILE = {"filename": "a.txt", "content_type": "text/plain", "content": "SGVsbG8="}
PICTURE = {"url": "https://example.com/cat.png"}
TENANTS = {"gateway": {"api_keys": ("anna:key-a", "ben:key-b")}}
ANNA, BEN = {"authorization": "Bearer key-a"}, {"authorization": "Bearer key-b"}


@dataclass
class Service:
    """A gateway, its Redis, and its history, which is written when the test says so."""

    http: httpx.AsyncClient
    link: Link
    front: Front
    records: Records

    async def send(self, body: Json, headers: dict[str, str] | None = None) -> httpx.Response:
        return await self.http.post("/api/v1/messages/send", json=body, headers=headers or {})

    async def sent(self, body: Json, headers: dict[str, str] | None = None) -> str:
        reply = await self.send(body, headers)
        assert reply.status_code == 202, reply.text
        await asyncio.sleep(0.002)  # each in a millisecond of its own: those of one are listed in any order
        return str(reply.json()["id"])

    async def get(self, path: str, headers: dict[str, str] | None = None, /, **query: Any) -> Json:
        reply = await self.http.get(f"/api/v1/messages{path}", params=query, headers=headers or {})
        assert reply.status_code == 200, reply.text
        value: Json = reply.json()
        return value

    async def cancel(self, delivery_id: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return await self.http.post(f"/api/v1/messages/{delivery_id}/cancel", headers=headers or {})

    async def record(self) -> None:
        """Do the recorder's work."""
        await record(self.link, self.records)

    async def forget(self) -> None:
        """Let a week pass: what Redis kept is gone."""
        for name in await self.link.call("KEYS", keys.DELIVERY + "*"):
            await self.link.call("DEL", name)


@pytest.fixture
async def service(
    request: pytest.FixtureRequest, link: Link, settings: Settings, front: Front, records: Records
) -> AsyncIterator[Service]:
    """A gateway on a real Redis and a real history; `params` change its settings."""
    settings = changed(settings, **getattr(request, "param", {}))
    transport = httpx.ASGITransport(create_app(settings, front, records))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as http:
        yield Service(http, link, front, records)


guarded = pytest.mark.parametrize("service", [TENANTS], indirect=True)


def in_a_day(service: Service, days: float = 1) -> str:
    return datetime.fromtimestamp(service.front.clock.now_ms() / 1000 + days * 86_400, UTC).isoformat()


# --- sending ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (SMS, "sms"),
        (SMS | {"attachments": []}, "sms"),
        (SMS | {"attachments": [PICTURE]}, "mms"),
        (SMS | {"type": "mms", "body": "", "attachments": [PICTURE]}, "mms"),
        (SMS | {"body": " ", "attachments": [PICTURE]}, "mms"),
        (SMS | {"type": "mms"}, "mms"),
        (SMS | {"from": "My Shop"}, "sms"),
        (SMS | {"from": "12345"}, "sms"),
        (SMS | {"from": "MG" + "0a" * 16}, "sms"),
        (SMS | {"from": "MG" + "0A" * 16}, "sms"),
        (SMS | {"metadata": {"": "", "order": 7, "paid": True, "note": None}}, "sms"),
        (SMS | {"metadata": {str(number).zfill(64): "x" * 1_000 for number in range(50)}}, "sms"),
        (MAIL, "email"),
        (MAIL | {"html": "<b>Hi</b>", "attachments": [FILE, {"content": ""}], "metadata": {"order": 7}}, "email"),
        (MAIL | {"body": ""}, "email"),
        (MAIL | {"body": "", "subject": "", "html": "<b>Hi</b>"}, "email"),
        (MAIL | {"body": "", "subject": "", "attachments": [FILE]}, "email"),
        (MAIL | {"from": "jürgen@münchen.example", "subject": ""}, "email"),
        (MAIL | {"from": '"Lee, Ann" <ann@example.com>', "to": "ben+tag@example.com"}, "email"),
    ],
)  # fmt: skip
async def test_a_message_is_accepted_at_once(service: Service, body: Json, kind: str) -> None:
    """202 with its id; stored, queued, and shown as it was given."""
    reply = await service.send(body)
    assert reply.status_code == 202, reply.text
    accepted = reply.json()
    assert accepted == {"id": accepted["id"], "status": "pending", "type": kind}
    ((_, fields),) = await service.link.call("XRANGE", f"message_queue:{kind}", "-", "+")
    assert orjson.loads(fields[1])["message_id"] == accepted["id"]
    found = await service.get(f"/{accepted['id']}")
    assert (found["type"], found["status"]) == (kind, "pending")
    for name in ("from", "to", "body", "subject", "html", "metadata"):
        assert found.get(name) == body.get(name)
    assert [step["status"] for step in found["history"]] == ["pending"]
    assert "content" not in repr(found.get("attachments", [])).replace("content_type", "")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"to": None}, "to"),
        ({"to": "15005550009"}, "to"),
        ({"to": "+0123456789"}, "to"),
        ({"to": "+15005550009\n"}, "to"),
        ({"to": [OTHER]}, "to"),
        ({"to": ""}, "to"),
        ({"from": ""}, "from"),
        ({"from": "A name of many letters"}, "from"),
        ({"from": "x" * 400}, "from"),
        ({"from": 5}, "from"),
        ({"sender": NUMBER}, "sender"),
        ({"type": "fax"}, "type"),
        ({"type": "SMS"}, "type"),
        ({"body": ""}, "body"),
        ({"body": " \n\u00a0"}, "body"),
        ({"type": "mms", "body": ""}, "body"),
        ({"type": "mms", "body": "\n", "attachments": []}, "body"),
        ({"body": "x" * 1_601}, "body"),
        ({"body": None}, "body"),
        ({"body": "a\0b"}, "body"),
        ({"subject": "Hello"}, "subject"),
        ({"html": "<b>Hello</b>"}, "html"),
        ({"attachments": PICTURE}, "attachments"),
        ({"attachments": [PICTURE, {"url": "http://example.com/cat.png"}]}, "attachments[1].url"),
        ({"attachments": [{"url": "https://"}]}, "attachments[0].url"),
        ({"attachments": [{"url": "https://example.com/a b"}]}, "attachments[0].url"),
        ({"attachments": [FILE]}, "attachments[0].content"),
        ({"attachments": [{"filename": "cat.png"}]}, "attachments[0].url"),
        ({"attachments": [PICTURE | {"size": 3}]}, "attachments[0].size"),
        ({"attachments": [PICTURE] * 11}, "attachments"),
        ({"scheduled_at": "tomorrow"}, "scheduled_at"),
        ({"scheduled_at": "2026-12-01T08:00:00"}, "scheduled_at"),
        ({"scheduled_at": "2099-12-01T08:00:00Z"}, "scheduled_at"),
        ({"scheduled_at": 1_764_576_000}, "scheduled_at"),
        ({"metadata": {"order": {"number": 7}}}, "metadata.order"),
        ({"metadata": {"order": "a\0b"}}, "metadata"),
        ({"metadata": {"a\0b": 7}}, "metadata"),
        ({"metadata": {str(number): 7 for number in range(51)}}, "metadata"),
        ({"metadata": {"x" * 65: 7}}, "metadata." + "x" * 65),
        ({"metadata": {"order": "x" * 1_001}}, "metadata.order"),
        ({"from": "mg" + "0a" * 16}, "from"),
        ({"priority": "high"}, "priority"),
    ],
)
async def test_a_wrong_field_of_an_sms_is_named_and_nothing_is_created(
    service: Service, change: Json, param: str
) -> None:
    """422 with the field's path."""
    await _is_refused(service, SMS | change, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"to": "ben"}, "to"),
        ({"to": "ben@"}, "to"),
        ({"to": "ben@example.com, eve@example.com"}, "to"),
        ({"to": "Ben <ben@example.com>"}, "to"),
        ({"to": "ben@example.com\r\nBcc: eve@example.com"}, "to"),
        ({"to": NUMBER}, "to"),
        ({"to": '"ben lee"@example.com'}, "to"),
        ({"to": "ben@exa mple.com"}, "to"),
        ({"to": "b..n@example.com"}, "to"),
        ({"to": "ben@☃.example"}, "to"),
        ({"to": "x" * 65 + "@example.com"}, "to"),
        ({"from": "Lee, Ann <ann@example.com>"}, "from"),
        ({"from": "ann@example.com, ben@example.com"}, "from"),
        ({"from": "Ann <ann@example.com> <eve@example.com>"}, "from"),
        ({"from": "Ann\r\nBcc: eve@example.com <ann@example.com>"}, "from"),
        ({"subject": "Hello\r\nBcc: eve@example.com"}, "subject"),
        ({"subject": "x" * 999}, "subject"),
        ({"html": ""}, "html"),
        ({"body": "", "subject": None}, "body"),
        ({"body": " \r\n", "subject": " ", "html": "\n", "attachments": []}, "body"),
        ({"attachments": [PICTURE]}, "attachments[0].url"),
        ({"attachments": [FILE | {"content": "no base64"}]}, "attachments[0].content"),
        ({"attachments": [FILE | {"filename": "../a"}]}, "attachments[0].filename"),
        ({"attachments": [FILE | {"content_type": "text"}]}, "attachments[0].content_type"),
        ({"attachments": [FILE | {"content_type": "message/rfc822"}]}, "attachments[0].content_type"),
        ({"attachments": [FILE | {"filename": "a\u2028b"}]}, "attachments[0].filename"),
        ({"attachments": [{"filename": "a.txt"}]}, "attachments[0].content"),
    ],
)
async def test_a_wrong_field_of_an_email_is_named_and_nothing_is_created(
    service: Service, change: Json, param: str
) -> None:
    """No header can be smuggled in by a line break, and one message has one recipient."""
    await _is_refused(service, MAIL | change, param)


@pytest.mark.parametrize(
    "service",
    [{"deliveries": {"max_attachment_bytes": 1_024, "max_text_chars": 100, "max_body_bytes": 10_000}}],
    indirect=True,
)
async def test_what_is_too_large_is_refused(service: Service) -> None:
    """Files together, one text, the request as a whole."""
    half = FILE | {"content": "QUJD" * 171}
    await _is_refused(service, MAIL | {"attachments": [half, half]}, "attachments")
    await _is_refused(service, MAIL | {"body": "x" * 101}, "body")
    await _is_refused(service, MAIL | {"html": "x" * 101}, "html")
    assert (await service.send(MAIL | {"body": "x" * 10_000})).status_code == 413
    assert (await service.send(MAIL | {"attachments": [half]})).status_code == 202


async def _is_refused(service: Service, body: Json, param: str) -> None:
    before = await everything(service.link)
    reply = await service.send({name: value for name, value in body.items() if value is not None})
    assert reply.status_code == 422, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)
    after = await everything(service.link)
    assert {name for name in after if not name.startswith(b"reply:")} == {
        name for name in before if not name.startswith(b"reply:")
    }


async def test_one_message_goes_out_for_one_key(service: Service) -> None:
    """The same answer again, from whatever was made of it since; another body is refused."""
    key = {"idempotency-key": "k1"}
    first = await service.send(SMS, key)
    again = await service.send(SMS, key)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    assert (await service.send(SMS | {"body": "Other."}, key)).status_code == 422
    assert await service.link.call("XLEN", "message_queue:sms") == 1


@pytest.mark.parametrize(
    "service", [{"gateway": {"api_keys": ("anna:key-a",), "max_in_flight_per_key": 1}}], indirect=True
)
async def test_scheduled_messages_do_not_count_as_unfinished_before_their_time(service: Service) -> None:
    """Who plans a week ahead can still send today."""
    for _ in range(3):
        await service.sent(SMS | {"scheduled_at": in_a_day(service)}, ANNA)
    await service.sent(SMS, ANNA)
    reply = await service.send(SMS, ANNA)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "too_many_in_flight")
    await service.sent(SMS | {"scheduled_at": in_a_day(service)}, ANNA)


async def test_a_scheduled_message_waits(service: Service) -> None:
    """Until its time; one whose time has passed goes out at once."""
    reply = await service.send(SMS | {"scheduled_at": in_a_day(service)})
    assert reply.json()["status"] == "scheduled"
    found = await service.get(f"/{reply.json()['id']}")
    assert found["scheduled_at_ms"] > found["created_ms"]
    assert await service.link.call("XLEN", "message_queue:sms") == 0
    reply = await service.send(SMS | {"scheduled_at": in_a_day(service, -1)})
    assert reply.json()["status"] == "pending"


# --- waiting for the outcome --------------------------------------------------------------------

waiting = pytest.mark.parametrize("service", [{"deliveries": {"sync": True}}], indirect=True)


@waiting
async def test_a_request_may_wait_for_the_outcome_of_the_queued_delivery(service: Service, settings: Settings) -> None:
    """200, as GET shows it, and one message went out; one that fails is told in the same way."""
    provider = Scripted()
    async with working(settings, [courier(settings, provider)]):
        reply = await service.send(SMS, {"idempotency-key": "k1"})
        assert reply.status_code == 200
        assert reply.json() == await service.get(f"/{reply.json()['id']}")
        assert [step["status"] for step in reply.json()["history"]] == ["pending", "sending", "sent"]
        again = await service.send(SMS, {"idempotency-key": "k1"})
        assert (again.status_code, again.json()) == (200, reply.json())
        assert len(provider.got) == 1
        provider._answers.append(Reject("no", code="refused"))
        assert (await service.send(SMS)).json()["status"] == "failed"
        later = await service.send(SMS | {"scheduled_at": in_a_day(service)})
        assert (later.status_code, later.json()["status"]) == (202, "scheduled")


@pytest.mark.parametrize("service", [{"deliveries": {"sync": True, "sync_wait_s": 0.05}}], indirect=True)
async def test_a_request_does_not_wait_for_ever(service: Service) -> None:
    """202 when nobody works on it; it stays queued."""
    reply = await service.send(SMS)
    assert (reply.status_code, reply.json()["status"]) == (202, "pending")
    assert await service.link.call("XLEN", "message_queue:sms") == 1


# --- looking ------------------------------------------------------------------------------------


async def test_a_delivery_is_shown_from_redis_and_then_from_history(service: Service, settings: Settings) -> None:
    """The same, but for what history does not keep."""
    body = MAIL | {"attachments": [FILE], "metadata": {"order": 7}, "html": "<b>x</b>"}
    async with working(settings, [courier(settings, Scripted(), "email")]):
        delivery_id = await service.sent(body)
        found: Json = {}

        async def is_sent() -> bool:
            found.update(await service.get(f"/{delivery_id}"))
            return bool(found["status"] == "sent")

        await wait_until(is_sent)
    assert (found["provider"], found["provider_id"], found["attempts"]) == ("console", "P1", 1)
    assert found["attachments"] == [{"filename": "a.txt", "content_type": "text/plain", "size_bytes": 5}]
    await service.record()
    await service.forget()
    assert await service.get(f"/{delivery_id}") == found


@guarded
async def test_another_tenants_message_is_not_there(service: Service) -> None:
    """Not to be read, listed or cancelled, in Redis or in history."""
    delivery_id = await service.sent(SMS, ANNA)
    await service.record()
    for _ in range(2):
        assert (await service.http.get(f"/api/v1/messages/{delivery_id}", headers=BEN)).status_code == 404
        assert (await service.cancel(delivery_id, BEN)).status_code == 404
        assert (await service.get("", BEN))["messages"] == []
        assert (await service.get(f"/{delivery_id}", ANNA))["id"] == delivery_id
        await service.forget()
    assert (await service.http.get(f"/api/v1/messages/{delivery_id}")).status_code == 401


@pytest.mark.parametrize("given", ["f" * 32, "x", "a:b", "%00", "F" * 32])
async def test_an_id_that_was_never_given_is_not_found(service: Service, given: str) -> None:
    """404 with the code."""
    for reply in (await service.http.get(f"/api/v1/messages/{given}"), await service.cancel(given)):
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "message_not_found")


async def test_messages_are_listed_by_what_they_are(service: Service) -> None:
    """The newest first, page by page, without their texts; as they stand now, also where history is behind."""
    ids = [await service.sent(SMS | {"to": to}) for to in (OTHER, NUMBER, OTHER)] + [await service.sent(MAIL)]
    await service.record()
    assert (await service.cancel(ids[0])).status_code == 200
    listed = (await service.get(""))["messages"]
    assert [one["id"] for one in listed] == ids[::-1]
    assert listed[-1]["status"] == "cancelled"
    assert all("body" not in one and "history" not in one for one in listed)

    async def found(**query: str) -> list[int]:
        return [ids.index(one["id"]) for one in (await service.get("", **query))["messages"]]

    assert await found(type="email") == [3]
    assert await found(to=OTHER) == [2, 0]
    assert await found(to=OTHER, type="email") == []
    assert await found(status="pending") == [3, 2, 1]  # history does not know of the cancelling yet
    assert await found(until=in_a_day(service, -1)) == []
    assert await found(since=in_a_day(service, -1)) == [3, 2, 1, 0]
    await service.record()
    assert await found(status="cancelled") == [0]
    first = await service.get("", limit=3)
    assert [one["id"] for one in first["messages"]] == ids[:0:-1]
    rest = await service.get("", limit=3, after=first["next"])
    assert ([one["id"] for one in rest["messages"]], rest["next"]) == (ids[:1], None)


@pytest.mark.parametrize(
    "query", ["type=fax", "status=done", "to=", "since=now", "limit=0", "after=x", "colour=red", "type=sms&type=mms"]
)
async def test_a_list_refuses_what_it_does_not_know(service: Service, query: str) -> None:
    """422 that names the parameter."""
    reply = await service.http.get(f"/api/v1/messages?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, query.partition("=")[0])


async def test_a_list_moves_no_attachments(service: Service) -> None:
    """Nor does the look at one: what they hold stays in Redis, and no more than how they stand is read for a list."""
    large = FILE | {"content": "QUJD" * 100_000}
    ids = [await service.sent(MAIL | {"body": "x" * 50_000, "attachments": [large]}) for _ in range(5)]
    await service.record()

    async def sent_bytes() -> int:
        about = parse_info(await service.link.call("INFO", "stats"))
        return int(about["total_net_output_bytes"])

    before = await sent_bytes()
    listed = (await service.get(""))["messages"]
    assert [one["id"] for one in listed] == ids[::-1]
    assert all(one["subject"] == MAIL["subject"] and one["to"] == MAIL["to"] for one in listed)
    after_list = await sent_bytes()
    assert after_list - before < 50_000
    assert (await service.get(f"/{ids[0]}"))["attachments"][0]["size_bytes"] == 300_000
    assert await sent_bytes() - after_list < 100_000


async def test_a_plus_in_a_query_may_stand_as_it_is(service: Service) -> None:
    """A blank is what a server reads in its place, and no number and no address holds one."""
    tagged = MAIL | {"to": "ben+tag@example.com"}
    number, address = await service.sent(SMS), await service.sent(tagged)
    await service.record()
    for to, wanted in ((OTHER, number), (tagged["to"], address)):
        for given in (to, to.replace("+", "%2B"), to.replace("+", "%20")):
            reply = await service.http.get(f"/api/v1/messages?to={given}")
            assert [one["id"] for one in reply.json()["messages"]] == [wanted]


async def test_what_redis_lost_on_its_way_is_unknown(service: Service) -> None:
    """History knows that it was asked for, and nobody what became of it."""
    delivery_id = await service.sent(SMS)
    await service.record()
    await service.link.call("FLUSHALL")
    found = await service.get(f"/{delivery_id}")
    assert (found["status"], found["error"]["code"]) == ("unknown", "lost")
    assert (await service.get(""))["messages"][0]["status"] == "unknown"


# --- cancelling ---------------------------------------------------------------------------------


async def test_a_message_is_cancelled_until_it_is_begun(service: Service, settings: Settings) -> None:
    """Then 409 says how it stands, also once only history knows."""
    scheduled = await service.sent(SMS | {"scheduled_at": in_a_day(service)})
    pending = await service.sent(SMS)
    for delivery_id in (scheduled, pending):
        reply = await service.cancel(delivery_id)
        assert (reply.status_code, reply.json()) == (200, {"id": delivery_id, "status": "cancelled"})
        assert (await service.cancel(delivery_id)).status_code == 409
    opened = asyncio.Event()

    async def wait(_: object) -> Sent:
        await opened.wait()
        return Sent("P")

    async with working(settings, [Courier("sms", Shared(Scripted(wait)), settings.deliveries)]):
        delivery_id = await service.sent(SMS)

        async def has_come(status: str) -> bool:
            return bool((await service.get(f"/{delivery_id}"))["status"] == status)

        await wait_until(lambda: has_come("sending"))
        reply = await service.cancel(delivery_id)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "not_cancellable")
        assert "sending" in reply.json()["error"]["message"]
        by_job = await service.http.post(f"/jobs/{delivery_id}/cancel")
        assert by_job.status_code == 409  # it is a job, too, and no way around
        opened.set()
        await wait_until(lambda: has_come("sent"))
    await service.record()
    await service.forget()
    assert "sent" in (await service.cancel(delivery_id)).json()["error"]["message"]
