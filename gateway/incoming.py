"""What vendors call: status callbacks of deliveries, and messages that people write to us.

There is no API key: a vendor's signature is its key (`gateway/vendors/`), and the tenant is the delivery's; that of a
message from outside is a setting. A request is judged, read and answered at once, with one call of Redis for all that
it tells (64 events at a time, where it tells of more). What takes longer is a job on `webhook_queue`.

The answer is 200 for all that is understood, also when it changes nothing: an event told before, or too late, or of a
message that is none of ours, stays so when it is told again. 403 is for what nobody has signed. While Redis is away it
is 503, and the vendor tells it again. Everything is counted, by what became of it; no text and no number is logged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import BaseModel, Field

from gateway.errors import Problem
from gateway.metrics import INCOMING
from gateway.operation import Answer, Call, Operation, Parameter, answer
from gateway.vendors import Failure, Notice, Reason, Received, Refused, Skipped, Told, Vendor
from gateway.vendors.sendgrid import SendGrid
from gateway.vendors.twilio import Twilio
from pipeline.deliveries import Event
from pipeline.errors import BrokerUnavailable, Overloaded
from pipeline.flows import ReceivedMessage
from pipeline.job import Json, error_body
from pipeline.settings import Settings

TWILIO: Final = "/api/v1/webhooks/twilio"
SENDGRID: Final = "/api/v1/webhooks/sendgrid"

NOTHING_TO_SAY: Final = b'<?xml version="1.0" encoding="UTF-8"?><Response/>'
"""In TwiML, which Twilio expects when somebody writes to a number: send nothing back."""

TELLING_HEADERS: Final = (b"content-type", b"i-twilio-idempotency-token", b"x-twilio-email-event-webhook-timestamp")
"""Headers that are kept with a message from outside. Signatures are not: they are of no use later."""

_WHY: Final[Mapping[Reason, str]] = {
    "no_key": "this gateway does not know how {name} signs: {settings}",
    "unsigned": "there is no signature of {name}'s",
    "bad_signature": "the signature is not {name}'s for this request; what is signed depends on {settings}",
    "stale": "this was signed too long ago, or a clock is wrong",
}
_SETTINGS: Final[Mapping[str, str]] = {
    "twilio": "PENSTOCK_TWILIO__AUTH_TOKEN and PENSTOCK_DELIVERIES__PUBLIC_URL",
    "sendgrid": "PENSTOCK_DELIVERIES__SENDGRID_PUBLIC_KEYS",
}


class Heard(BaseModel):
    """What became of the events of a request."""

    events: dict[str, int] = Field(
        description="how many were `applied`; `duplicate`, `late`, `unknown_delivery`, `ignored` or `unreadable`, "
        "which changes nothing; `accepted`, messages from outside"
    )


def vendors(settings: Settings) -> Mapping[str, Vendor]:
    """Return those who may tell us something, by name.

    Raises:
        ConfigError: a key is none.
    """
    told, account = settings.deliveries, settings.twilio
    tokens = [token.get_secret_value() for token in (account.auth_token, account.second_auth_token) if token]
    address = told.public_url.rstrip("/") + TWILIO if told.public_url else ""
    known: tuple[Vendor, ...] = (
        Twilio(tokens, address),
        SendGrid(told.sendgrid_public_keys, told.signature_age_s),
    )
    return {vendor.name: vendor for vendor in known}


async def twilio(call: Call) -> Answer:
    """Hear from Twilio what became of a message, or what somebody wrote to a number.

    Only Twilio can call this: `X-Twilio-Signature` is its key.
    """
    await _hear(call, "twilio")
    return Answer(200, NOTHING_TO_SAY, content_type=b"text/xml")


async def sendgrid(call: Call) -> Answer:
    """Hear from SendGrid what became of emails, or what somebody wrote to an address.

    Only SendGrid can call this: `X-Twilio-Email-Event-Webhook-Signature` is its key.
    """
    return answer({"events": dict(await _hear(call, "sendgrid"))})


async def _hear(call: Call, name: str) -> Counter[str]:
    """Judge a request, read it, note what it tells; return how much of it met which end.

    Raises:
        Problem: 400, nothing in it has a sense; 403, the vendor did not send it; 413.
        Overloaded, BrokerUnavailable: it is to be told again.
    """
    vendor = call.gateway.vendors[name]
    notice = Notice(call.headers, call.query_string.encode("latin-1"), await call.read_raw(vendor.max_bytes))
    try:
        call.front.clock.require()  # by one that is hours off, what is fresh would be refused
        vendor.verify(notice, call.front.clock.now_ms())
        words = await _note(call, name, vendor.read(notice), notice)
    except Refused as refused:
        INCOMING.labels(name, refused.reason).inc()
        message = _WHY[refused.reason].format(name=name, settings=_SETTINGS[name])
        raise Problem(403, f"webhook_{refused.reason}", message) from None
    except (BrokerUnavailable, Overloaded):
        INCOMING.labels(name, "unavailable").inc()
        raise
    counted = Counter(words)
    for word, count in counted.items():
        INCOMING.labels(name, word).inc(count)
    if counted.keys() == {"unreadable"}:
        raise Problem(400, "unreadable", f"this is signed by {name}, and nothing that {name} is known to send")
    return counted


async def _note(call: Call, name: str, told: Sequence[Told | Received | Skipped], notice: Notice) -> list[str]:
    """Write down what was told; return what became of each."""
    deliveries = call.front.deliveries
    words: list[str] = [one for one in told if isinstance(one, str)]
    words += await deliveries.told(name, [_event(one) for one in told if isinstance(one, Told)])
    for one in told:
        if isinstance(one, Received):
            headers = {key.decode("latin-1"): notice.headers[key].decode("latin-1") for key in _kept(notice)}
            words.append(
                await deliveries.received(name, one.event_id, _message(one), headers=headers, body=_text(notice.body))
            )
    return words


def _kept(notice: Notice) -> list[bytes]:
    return [name for name in TELLING_HEADERS if name in notice.headers]


def _event(told: Told) -> Event:
    return Event(told.event_id, told.delivery_id, told.status, _error(told.failure) if told.failure else None)


def _error(failure: Failure) -> Json:
    return error_body("failed", failure.code, failure.message)


def _message(received: Received) -> ReceivedMessage:
    return ReceivedMessage(
        type=received.type,
        provider_id=received.provider_id,
        sender=received.sender,
        recipient=received.recipient,
        subject=received.subject,
        body=received.body,
        media=list(received.media),
    )


def _text(body: bytes) -> str:
    """Return a body as JSON can carry it: what is not UTF-8 is taken byte by byte, so that nothing is lost."""
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body.decode("latin-1")


OPERATIONS: Final = (
    Operation(
        "POST",
        TWILIO,
        twilio,
        answers={200: None},
        errors=(403, 413),
        parameters=(Parameter("delivery", "the delivery that a status callback is about; it is signed with the rest"),),
        guarded=False,
        media="text/xml",
    ),
    Operation("POST", SENDGRID, sendgrid, answers={200: Heard}, errors=(403, 413), guarded=False),
)
