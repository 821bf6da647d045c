"""What vendors call, through a whole gateway on a real Redis: status callbacks, and messages from outside."""

from __future__ import annotations

import asyncio
import itertools
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import urlencode

import httpx
import orjson
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client import REGISTRY
from pydantic import SecretStr

from gateway.app import create_app
from gateway.incoming import NOTHING_TO_SAY, SENDGRID, TWILIO
from gateway.server import Server, listen
from gateway.vendors.twilio import MOST_BYTES, sign
from pipeline import keys
from pipeline.connection import Link
from pipeline.deliveries import Delivery, Order
from pipeline.errors import ConfigError
from pipeline.front import Front
from pipeline.job import decode
from pipeline.settings import Settings, load
from tests.conftest import PATIENCE_S, short_settings
from tests.rig import changed
from tests.servers import RedisServer

Json = dict[str, Any]
SIGNATURE = "x-twilio-email-event-webhook-signature"
FORM = "application/x-www-form-urlencoded"
PUBLIC = "https://hooks.example.com:8443/penstock"
TOKEN = "0123456789abcdef0123456789abcdef"
KEY = ec.derive_private_key(20_261_129, ec.SECP256R1())
PUBLIC_KEY = b64encode(KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
NOBODY = "f" * 32
TEXT = {"from": "+15005550006", "to": "+15005550009", "body": "Your parcel is here."}
SID = "SM0123456789abcdef0123456789abcdef"
CONFIGURED: dict[str, Json] = {
    "gateway": {"port": 0},
    "deliveries": {"public_url": PUBLIC, "sendgrid_public_keys": (PUBLIC_KEY,), "incoming_tenant": "anna"},
    "twilio": {"account_sid": "AC" + "0" * 32, "auth_token": SecretStr(TOKEN)},
}


@dataclass
class Service:
    """A gateway that serves on a socket, and its Redis."""

    http: httpx.AsyncClient
    front: Front

    async def delivery(self, tenant: str = "default", kind: str = "sms") -> str:
        """Return the id of a new one."""
        return (await self.front.deliveries.accept(Order(kind, tenant, TEXT))).id

    async def read(self, delivery_id: str) -> Delivery:
        found = await self.front.deliveries.read(delivery_id)
        assert found is not None
        return found

    async def status(self, delivery_id: str) -> str:
        return (await self.read(delivery_id)).status

    async def twilio(self, delivery_id: str | None, status: str, **fields: str) -> httpx.Response:
        """Call as Twilio does when a message has changed its status."""
        query = f"delivery={delivery_id}" if delivery_id else ""
        sid = {"MessageSid": SID, "MessageStatus": status, "SmsStatus": status, "To": TEXT["to"]}
        return await self.form(sid | fields, query)

    async def form(self, fields: Json, query: str = "", *, address: str = PUBLIC) -> httpx.Response:
        signed = f"{address}{TWILIO}" + (f"?{query}" if query else "")
        signed += "".join(name + value for name, value in sorted(fields.items()))
        return await self.post(
            TWILIO + (f"?{query}" if query else ""),
            urlencode(fields).encode(),
            {"content-type": FORM, "x-twilio-signature": sign(TOKEN.encode(), signed.encode()).decode()},
        )

    async def sendgrid(self, *events: Any, age_s: float = 0, signature: str = "") -> httpx.Response:
        """Call as SendGrid does."""
        return await self.signed(orjson.dumps(events) + b"\r\n", age_s=age_s, signature=signature)

    async def signed(
        self, body: bytes, media: str = "application/json", *, age_s: float = 0, signature: str = ""
    ) -> httpx.Response:
        time = str(int(self.front.clock.now_ms() / 1000 - age_s))
        right = b64encode(KEY.sign(time.encode() + body, ec.ECDSA(SHA256()))).decode()
        headers = {"content-type": media, SIGNATURE: signature or right, "x-twilio-email-event-webhook-timestamp": time}
        return await self.post(SENDGRID, body, headers)

    async def post(self, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        return await self.http.post(path, content=body, headers=headers)


Serving = Callable[..., Awaitable[Service]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Know both vendors, by an account and a key of this file's own."""
    return changed(settings, **CONFIGURED)


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    """Start gateways over a front."""
    async with AsyncExitStack() as stack:

        async def start(front: Front, settings: Settings, **more: Json) -> Service:
            whole = changed(settings, **more)
            listener = stack.enter_context(listen(whole.gateway))
            stop = asyncio.Event()
            server = Server(whole, create_app(whole, front), stop)
            task = asyncio.create_task(server.serve(sockets=[listener]), name="gateway")
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            client = httpx.AsyncClient(base_url=url, transport=httpx.AsyncHTTPTransport(), timeout=PATIENCE_S)

            async def end() -> None:
                await client.aclose()
                stop.set()
                await task

            stack.push_async_callback(end)
            return Service(client, front)

        yield start


@pytest.fixture
async def service(front: Front, settings: Settings, serving: Serving) -> Service:
    return await serving(front, settings)


class Counting:
    """How much each outcome was counted in a block."""

    def __init__(self, provider: str, **expected: int) -> None:
        self.provider, self.expected = provider, expected

    def _all(self) -> dict[str, float]:
        return {
            sample.labels["outcome"]: sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name == "penstock_incoming_total" and sample.labels["provider"] == self.provider
        }

    def __enter__(self) -> None:
        self._before = self._all()

    def __exit__(self, kind: object, *problem: object) -> None:
        if kind is None:
            after = {name: value - self._before.get(name, 0) for name, value in self._all().items()}
            assert {name: value for name, value in after.items() if value} == self.expected


def event(delivery_id: str, name: str = "delivered", number: object = 1, **more: Any) -> Json:
    """Return an event of SendGrid's."""
    own = {"event": name, "sg_event_id": f"event-{number}", "smtp-id": f"<{delivery_id}@mail.example.com>"}
    return {"email": "bob@example.com", "timestamp": 1_513_299_569} | own | more


# --- status callbacks ----------------------------------------------------------------------------


async def test_a_callback_of_twilio_is_applied(service: Service) -> None:
    """At the public address, behind a proxy that takes its path away; what is answered is TwiML."""
    delivery_id = await service.delivery()
    with Counting("twilio", applied=2, ignored=1):
        for status in ("queued", "sent", "delivered"):
            reply = await service.twilio(delivery_id, status)
            assert (reply.status_code, reply.content) == (200, NOTHING_TO_SAY)
            assert reply.headers["content-type"] == "text/xml"
    delivery = await service.read(delivery_id)
    assert [status for status, _ in delivery.history] == ["pending", "sent", "delivered"]


async def test_a_callback_tells_why_it_failed(service: Service) -> None:
    """As other errors do: a class, a code, words."""
    delivery_id = await service.delivery()
    await service.twilio(delivery_id, "undelivered", ErrorCode="30003")
    delivery = await service.read(delivery_id)
    assert (delivery.status, delivery.error) == (
        "undelivered",
        {
            "type": "failed",
            "code": "twilio_30003",
            "message": "Twilio says undelivered: https://www.twilio.com/docs/api/errors/30003",
        },
    )


async def test_a_callback_with_a_json_body_is_applied(service: Service) -> None:
    """Its hash stands in the address."""
    delivery_id = await service.delivery()
    body = orjson.dumps({"MessageSid": SID, "MessageStatus": "sent"})
    path = f"{TWILIO}?delivery={delivery_id}&bodySHA256={sha256(body).hexdigest()}"
    signature = sign(TOKEN.encode(), (PUBLIC + path).encode()).decode()
    reply = await service.post(path, body, {"content-type": "application/json", "x-twilio-signature": signature})
    assert reply.status_code == 200
    assert await service.status(delivery_id) == "sent"


async def test_what_is_told_again_or_late_or_of_nobody_changes_nothing(service: Service) -> None:
    """It is answered with 200, since it would be no different the next time."""
    delivery_id = await service.delivery()
    with Counting("twilio", applied=1, duplicate=2, late=1, unknown_delivery=2):
        for _ in range(3):
            assert (await service.twilio(delivery_id, "delivered")).status_code == 200
        assert (await service.twilio(delivery_id, "sent")).status_code == 200
        assert (await service.twilio(NOBODY, "sent", MessageSid="SM" + "2" * 32)).status_code == 200
        assert (await service.twilio(None, "sent", MessageSid="MM" + "3" * 32)).status_code == 200
    assert [status for status, _ in (await service.read(delivery_id)).history] == ["pending", "delivered"]


async def test_all_orders_and_repetitions_of_callbacks_end_in_the_same_status(service: Service) -> None:
    """Twilio promises no order."""
    for order in itertools.permutations(("queued", "sent", "undelivered", "delivered")):
        delivery_id = await service.delivery()
        for status in (*order, *order):
            await service.twilio(delivery_id, status, MessageSid=f"SM{delivery_id}")
        assert await service.status(delivery_id) == "delivered", order


async def test_the_tenant_is_the_deliverys(front: Front, settings: Settings, serving: Serving) -> None:
    """Vendors have no API key, also where everybody else needs one."""
    service = await serving(front, settings, gateway={"api_keys": ("anna:key-a", "ben:key-b")})
    of_ben = await service.delivery("ben")
    assert (await service.http.get("/queue/x")).status_code == 401
    assert (await service.twilio(of_ben, "sent")).status_code == 200
    assert (await service.sendgrid(event(of_ben))).json() == {"events": {"applied": 1}}
    delivery = await service.read(of_ben)
    assert (delivery.tenant, delivery.status) == ("ben", "delivered")


async def test_events_of_sendgrid_are_applied_together(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request, many deliveries; 64 events are one call of Redis."""
    calls: list[int] = []
    run = Link.run

    async def counting(link: Link, script: Any, keys_: Any, args: Any, **more: Any) -> Any:
        if link.name == "deliveries":
            calls.append(len(args))
        return await run(link, script, keys_, args, **more)

    ids = [await service.delivery(kind="email") for _ in range(6)]
    monkeypatch.setattr(Link, "run", counting)
    events = [
        event(ids[0]),
        event(ids[1], "bounce", 2, type="bounce", reason="550 no such user"),
        event(ids[2], "dropped", 3, reason="Bounced Address"),
        event(ids[3], "deferred", 4),
        event(NOBODY, "delivered", 5),
        event("not one of ours", "delivered", 6),
        event(ids[0], "delivered", 1),
        event(ids[0], "bounce", 7),
        {"email": "bob@example.com"},
    ]
    words = {"applied": 3, "duplicate": 1, "late": 1, "unknown_delivery": 2, "ignored": 1, "unreadable": 1}
    with Counting("sendgrid", **words):
        assert (await service.sendgrid(*events)).json() == {"events": words}
    assert len(calls) == 1
    monkeypatch.undo()
    assert [await service.status(one) for one in ids] == [
        "delivered", "undelivered", "failed", "pending", "pending", "pending",
    ]  # fmt: skip
    error = (await service.read(ids[1])).error
    assert error is not None
    assert (error["code"], error["message"]) == ("bounced", "the recipient's server refused it: 550 no such user")


async def test_a_long_request_of_sendgrid_is_taken_in_pieces(service: Service) -> None:
    """None is lost between two of them, and none is counted twice."""
    delivery_id = await service.delivery(kind="email")
    events = [event(NOBODY, "delivered", number) for number in range(199)] + [event(delivery_id)]
    assert (await service.sendgrid(*events)).json() == {"events": {"unknown_delivery": 199, "applied": 1}}


async def test_engagement_alone_needs_no_redis(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Openings and clicks are by far the most that SendGrid tells."""

    async def never(*args: object, **more: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Link, "run", never)
    reply = await service.sendgrid(event(NOBODY, "open"), event(NOBODY, "click"))
    assert reply.json() == {"events": {"ignored": 2}}


# --- what is refused -----------------------------------------------------------------------------


async def test_a_signature_that_is_wrong_is_refused_and_counted(service: Service, link: Link) -> None:
    """Nothing is written; the answer says which settings a right one depends on, and none of what was sent."""
    delivery_id = await service.delivery()
    before = await link.call("HGETALL", keys.DELIVERY + delivery_id)
    body = urlencode({"MessageSid": SID, "MessageStatus": "sent"}).encode()
    path = f"{TWILIO}?delivery={delivery_id}"
    right = sign(TOKEN.encode(), (PUBLIC + path + f"MessageSid{SID}MessageStatussent").encode()).decode()
    headers = {"content-type": FORM, "x-twilio-signature": right}
    with Counting("twilio", bad_signature=5, unsigned=1):
        replies = [
            await service.post(path, body.replace(b"sent", b"failed"), headers),
            await service.post(f"{TWILIO}?delivery={NOBODY}", body, headers),
            await service.post(path, body, headers | {"x-twilio-signature": right[:-3] + "x" + right[-2:]}),
            await service.post(path, body, headers | {"content-type": "text/plain"}),
            await service.form({"MessageSid": SID, "MessageStatus": "sent"}, address="https://elsewhere.example"),
            await service.post(path, body, {"content-type": FORM}),
        ]
    assert [reply.status_code for reply in replies] == [403] * 6
    errors = [reply.json()["error"] for reply in replies]
    assert [error["code"] for error in errors] == ["webhook_bad_signature"] * 5 + ["webhook_unsigned"]
    assert "PENSTOCK_DELIVERIES__PUBLIC_URL" in errors[0]["message"]
    assert not any(SID in reply.text or TOKEN in reply.text for reply in replies)
    assert await link.call("HGETALL", keys.DELIVERY + delivery_id) == before
    assert not await link.call("KEYS", keys.TOLD + "*")
    assert (await service.post(path, body, headers)).status_code == 200


async def test_an_old_signature_is_refused_and_a_fresh_one_counts_once(service: Service) -> None:
    """Replayed within its time an event is a duplicate, after it the signature is too old."""
    delivery_id = await service.delivery(kind="email")
    with Counting("sendgrid", stale=2, applied=1, duplicate=1):
        for age_s in (3_660, -3_660):
            reply = await service.sendgrid(event(delivery_id), age_s=age_s)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "webhook_stale")
        assert await service.status(delivery_id) == "pending"
        assert (await service.sendgrid(event(delivery_id), age_s=3_540)).json() == {"events": {"applied": 1}}
        assert (await service.sendgrid(event(delivery_id), age_s=60)).json() == {"events": {"duplicate": 1}}
    assert [status for status, _ in (await service.read(delivery_id)).history] == ["pending", "delivered"]


async def test_a_signature_of_sendgrid_that_is_wrong_is_refused_and_counted(service: Service) -> None:
    """Of another body, or none."""
    other = (await service.sendgrid(event(NOBODY))).request.headers[SIGNATURE]
    with Counting("sendgrid", bad_signature=2, unsigned=1):
        assert (await service.sendgrid(event(NOBODY, "bounce"), signature=other)).status_code == 403
        assert (await service.sendgrid(event(NOBODY), signature="!")).status_code == 403
        assert (await service.post(SENDGRID, b"[]", {"content-type": "application/json"})).status_code == 403


async def test_without_keys_everything_is_refused(front: Front, settings: Settings, serving: Serving) -> None:
    """And whoever looks after the gateway reads what is missing."""
    nothing = {"public_url": "", "sendgrid_public_keys": ()}
    service = await serving(front, settings, deliveries=nothing, twilio={"auth_token": None})
    with Counting("twilio", no_key=1), Counting("sendgrid", no_key=1):
        replies = [await service.twilio(NOBODY, "sent"), await service.sendgrid(event(NOBODY))]
    assert [reply.status_code for reply in replies] == [403, 403]
    assert [reply.json()["error"]["code"] for reply in replies] == ["webhook_no_key"] * 2
    assert "PENSTOCK_TWILIO__AUTH_TOKEN and PENSTOCK_DELIVERIES__PUBLIC_URL" in replies[0].text
    assert "PENSTOCK_DELIVERIES__SENDGRID_PUBLIC_KEYS" in replies[1].text


async def test_either_token_of_the_account_counts(front: Front, settings: Settings, serving: Serving) -> None:
    """While it is changed."""
    tokens = {"auth_token": SecretStr("new"), "second_auth_token": SecretStr(TOKEN)}
    service = await serving(front, settings, twilio=tokens)
    assert (await service.twilio(NOBODY, "sent")).status_code == 200


@pytest.mark.parametrize(("path", "most"), [(TWILIO, MOST_BYTES), (SENDGRID, 1 << 20)])
async def test_a_huge_body_is_refused_before_it_is_judged(service: Service, path: str, most: int) -> None:
    """Twilio's are small, and to judge a form costs more than to judge bytes."""
    headers = {"content-type": FORM, "x-twilio-signature": "x"}
    reply = await service.post(path, b"x" * (most + 1), headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert (await service.post(path, b"x" * most, headers)).status_code == 403


async def test_what_is_signed_and_has_no_sense_is_a_bad_request(service: Service) -> None:
    """Whatever its type says it is."""
    with Counting("sendgrid", unreadable=5), Counting("twilio", unreadable=1):
        for body, media in (
            (b"no json", "application/json"),
            (b"{}", "application/json"),
            (b"a=b", FORM),
            (b"--x--", "multipart/form-data; boundary=x"),
            (b"[{}]", "application/json"),
        ):
            reply = await service.signed(body, media)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unreadable")
        assert (await service.form({"Hello": "there"})).status_code == 400


async def test_other_methods_are_none_of_theirs(service: Service) -> None:
    """A vendor that is set to GET reads what is wrong."""
    reply = await service.http.get(TWILIO)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


async def test_nothing_of_a_request_is_logged(service: Service) -> None:
    """Neither of a good one nor of a bad one."""
    with structlog.testing.capture_logs() as lines:
        await service.form({"MessageSid": SID, "SmsStatus": "received", "From": "+1555", "To": "+1666", "Body": "x"})
        await service.post(TWILIO, b"Body=secret", {"content-type": FORM, "x-twilio-signature": "x"})
        await service.signed(b"secret")
    assert lines == []


# --- messages from outside -----------------------------------------------------------------------


async def test_an_sms_from_outside_is_a_job_once(service: Service, link: Link) -> None:
    """On `webhook_queue`, as it came, for whoever the settings say; its signature is not kept."""
    fields = {"MessageSid": SID, "SmsStatus": "received", "From": "+1555", "To": "+1666", "Body": "hello é"}
    with Counting("twilio", accepted=1, duplicate=1):
        for _ in range(2):
            reply = await service.form(fields)
            assert (reply.status_code, reply.content) == (200, NOTHING_TO_SAY)
    ((_, entry),) = await link.call("XRANGE", "webhook_queue", "-", "+")
    body = orjson.loads(entry[1])
    assert (body["provider"], body["headers"]) == ("twilio", {"content-type": FORM})
    assert body["body"] == urlencode(fields)
    job = decode(entry[1])
    assert job.tenant == "anna"
    assert {name: job.payload["message"][name] for name in ("type", "provider_id", "sender", "recipient", "body")} == {
        "type": "sms", "provider_id": SID, "sender": "+1555", "recipient": "+1666", "body": "hello é",
    }  # fmt: skip


async def test_an_email_from_outside_is_a_job_once(service: Service, link: Link) -> None:
    """Its bytes are kept, whatever they are."""
    parts = {"from": b"ann@example.org", "to": b"us@example.com", "subject": b"Gr\xfc\xdfe", "text": b"\xff\x00"}
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), text)
        for name, text in parts.items()
    )
    with Counting("sendgrid", accepted=1, duplicate=1):
        for word in ("accepted", "duplicate"):
            reply = await service.signed(body + b"--x--\r\n", "multipart/form-data; boundary=x")
            assert reply.json() == {"events": {word: 1}}
    ((_, entry),) = await link.call("XRANGE", "webhook_queue", "-", "+")
    job = decode(entry[1])
    assert job.payload["body"].encode("latin-1") == body + b"--x--\r\n"
    assert job.payload["message"]["type"] == "email"
    assert SIGNATURE not in job.payload["headers"]


async def test_a_message_from_outside_is_refused_under_overload_and_told_again(
    link: Link, front: Front, settings: Settings, serving: Serving
) -> None:
    """What tells of deliveries is taken all the same: it makes no work."""
    service = await serving(front, settings)
    delivery_id = await service.delivery()
    full = changed(settings, admission={"max_jobs": 1})
    async with Front(full, "full") as crowded:
        busy = await serving(crowded, full)
        fields = {"MessageSid": SID, "SmsStatus": "received", "From": "+1555", "To": "+1666", "Body": "hello"}
        with Counting("twilio", unavailable=1, applied=1):
            reply = await busy.form(fields)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
            assert int(reply.headers["retry-after"]) >= 1
            assert (await busy.twilio(delivery_id, "sent")).status_code == 200
        assert await link.call("XLEN", "webhook_queue") == 0
        assert (await service.form(fields)).status_code == 200
        assert await link.call("XLEN", "webhook_queue") == 1


# --- outages, settings ---------------------------------------------------------------------------


async def test_while_redis_is_away_a_vendor_is_asked_to_tell_it_again(
    redis_server: RedisServer, serving: Serving
) -> None:
    """503 within a second or so; what is told again afterwards is applied."""
    with RedisServer(redis_server.binary, appendonly=True, appendfsync="always") as server:
        settings = changed(short_settings(server), **CONFIGURED)
        async with Front(settings, "test") as front:
            service = await serving(front, settings)
            delivery_id = await service.delivery()
            server.kill()
            with Counting("twilio", unavailable=1, bad_signature=1), Counting("sendgrid", unavailable=1):
                for reply in (await service.twilio(delivery_id, "sent"), await service.sendgrid(event(delivery_id))):
                    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "redis_unavailable")
                    assert reply.headers["retry-after"] == "1"
                assert (await service.form({"a": "b"}, address="https://elsewhere.example")).status_code == 403
            server.start()
            while (await service.twilio(delivery_id, "sent")).status_code == 503:
                pass
            assert await service.status(delivery_id) == "sent"


async def test_before_redis_was_ever_reached_nobody_is_judged(serving: Serving, settings: Settings) -> None:
    """By a clock that may be hours off a fresh signature is an old one."""
    away = changed(settings, redis={"url": "redis://127.0.0.1:1/0"})
    front = Front(away, "test")
    service = await serving(front, away)
    with Counting("sendgrid", unavailable=1):
        assert (await service.sendgrid(event(NOBODY), age_s=86_400)).status_code == 503


def test_a_key_that_is_none_is_said_at_the_start(settings: Settings) -> None:
    """And not when the first event comes."""
    wrong = changed(settings, deliveries={"sendgrid_public_keys": ("no key",)})
    with pytest.raises(ConfigError, match="PENSTOCK_DELIVERIES__SENDGRID_PUBLIC_KEYS: key 1"):
        create_app(wrong, Front(wrong, "test"))


def test_an_event_is_known_for_longer_than_its_signature_counts() -> None:
    """Else it could be told a second time by whoever has kept it."""
    with pytest.raises(ConfigError, match="must be at least twice signature_age_s"):
        load({"PENSTOCK_DELIVERIES__EVENT_ID_S": "3600", "PENSTOCK_DELIVERIES__SIGNATURE_AGE_S": "1801"})
    load({"PENSTOCK_DELIVERIES__EVENT_ID_S": "3600", "PENSTOCK_DELIVERIES__SIGNATURE_AGE_S": "1800"})
    two = load({"PENSTOCK_DELIVERIES__SENDGRID_PUBLIC_KEYS": f"{PUBLIC_KEY}, {PUBLIC_KEY}"})
    assert two.deliveries.sendgrid_public_keys == (PUBLIC_KEY, PUBLIC_KEY)
