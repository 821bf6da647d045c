"""The deliveries service: what is to go out as sms, mms or email, how it stands, and how it is stopped.

Accepted is accepted: the delivery and its place in the queue are written in one step, and its status says from then on
how it stands, up to the provider's word that it arrived. Single deliveries are read from Redis first and then from
history; lists come from history, and what has changed since is looked up in Redis.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from gateway.asked import AFTER, EXAMPLE, LIMIT, Asked, Text, due_ms_of, from_redis, not_found, own_id, storable, wrong
from gateway.errors import Problem
from gateway.idempotency import read_key
from gateway.jobs import JobError
from gateway.operation import Answer, Call, Operation, Parameter, answer
from pipeline.contacts import MAX_CHARS, BadContact, read_mailbox, read_number, read_sender
from pipeline.deliveries import AcceptedDelivery, Delivery, Order, Status
from pipeline.errors import DeadlineExceeded
from pipeline.flows import Payload
from pipeline.job import Json
from pipeline.settings import DeliveriesSettings

MAX_SMS_CHARS: Final = 1_600
"""What carriers take as one message, in up to ten parts."""

Type = Literal["sms", "mms", "email"]

_FILE_TYPE: Final = re.compile(r"(?!multipart/|message/)[a-z]+/[a-z0-9][a-z0-9.+_-]*", re.IGNORECASE)


def _file_name(text: str) -> str:
    if not text.isprintable() or set('/\\"').intersection(text):
        raise ValueError('a file name holds no / \\ " and no control character')
    return text


def _file_type(text: str) -> str:
    if not _FILE_TYPE.fullmatch(text):
        raise ValueError("a type like application/pdf; one that consists of parts or messages cannot be attached")
    return text


# --- What is asked and answered ----------------------------------------------------------------


class DeliveryAttachment(Payload):
    """A file that goes along: an email carries its `content`, an mms names a `url` from which it is fetched."""

    filename: Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_file_name)] = "attachment"
    content_type: Annotated[str, StringConstraints(max_length=127), AfterValidator(_file_type)] = (
        "application/octet-stream"
    )
    content: str | None = Field(None, description="base64; of an email")
    url: Annotated[str, StringConstraints(max_length=2_048)] | None = Field(None, description="https; of an mms")


Metadata = dict[
    Annotated[str, StringConstraints(max_length=64)],
    Annotated[str, StringConstraints(max_length=1_000)] | int | float | bool | None,
]


def _storable(metadata: Metadata) -> Metadata:
    for text in (*metadata, *metadata.values()):
        storable(str(text))
    return metadata


class DeliveryRequest(Payload):
    """A message to one recipient."""

    sender: Text = Field(alias="from", max_length=MAX_CHARS, description="a number, or an email address")
    to: Text = Field(max_length=MAX_CHARS, description="one number (+15005550006), or one email address")
    type: Type = Field(description="an `sms` with attachments becomes an `mms`")
    subject: Annotated[str, StringConstraints(max_length=998), AfterValidator(storable)] | None = Field(
        None, description="of an email"
    )
    body: Annotated[str, AfterValidator(storable)]
    html: Text | None = Field(None, description="of an email, beside its plain body")
    attachments: list[DeliveryAttachment] = Field(default_factory=list, max_length=100)
    scheduled_at: Annotated[str, StringConstraints(max_length=100)] | None = Field(
        None, description=f"send it then: RFC 3339 with its offset, `{EXAMPLE}`"
    )
    metadata: Annotated[Metadata, AfterValidator(_storable)] | None = Field(
        None, description="kept with it, and given to a gateway of one's own", max_length=50
    )


class DeliveryAccepted(BaseModel):
    """It will go out; `GET /api/v1/messages/{id}` tells how it stands."""

    id: str
    status: Literal["scheduled", "pending"]
    type: Type


class DeliveryStep(BaseModel):
    """A status that a delivery has had, and since when."""

    status: Status
    at_ms: int


class DeliveryListed(BaseModel):
    """How a delivery stands."""

    id: str
    type: Type
    status: Status
    sender: str = Field(alias="from")
    to: str
    subject: str | None = None
    created_ms: int
    scheduled_at_ms: int | None = Field(None, description="when it was, or is, to go out")
    provider: str | None = Field(None, description="who carries it; absent before it was handed over")
    provider_id: str | None = Field(None, description="how its provider knows it")
    error: JobError | None = None
    attempts: int | None = None
    retry_of: str | None = Field(None, description="the delivery that this one repeats")


class AttachmentShown(BaseModel):
    """An attachment without its content."""

    filename: str | None = None
    content_type: str | None = None
    size_bytes: int | None = Field(None, description="of its content")
    url: str | None = None


class DeliveryShown(DeliveryListed):
    """How a delivery stands, what it says, and each status it has had."""

    body: str
    html: str | None = None
    attachments: list[AttachmentShown] | None = None
    metadata: dict[str, Any] | None = None
    history: list[DeliveryStep]


class DeliveryPage(BaseModel):
    """Some deliveries."""

    messages: list[DeliveryListed]
    next: str | None = Field(description="`after` for the next page; null after the last one")


class DeliveryCancelled(BaseModel):
    """It will not go out."""

    id: str
    status: Literal["cancelled"]


# --- Sending -----------------------------------------------------------------------------------


async def send(call: Call) -> Answer:
    """Send an sms, an mms or an email.

    202: it is stored and queued, and goes out at once, or at `scheduled_at`. Where `SYNC_MESSAGE_PROCESSING` is set the
    answer waits for the outcome and is 200, as `GET /api/v1/messages/{id}` shows it.
    """
    settings = call.gateway.settings.deliveries
    request = await call.read(DeliveryRequest, settings.max_body_bytes)
    order = _order(call, request, settings)
    waits = settings.sync and order.due_ms is None
    accepted = await call.front.deliver(
        order,
        idempotency=read_key(call.headers, call.tenant, call.path, call.body),
        in_flight_limit=call.in_flight_limit,
        wait=waits,
    )
    call.job_id = accepted.id
    headers = [(b"idempotent-replayed", b"true")] if accepted.repeated else []
    if waits and await _has_ended(call, accepted, settings.sync_wait_s):
        return answer(await _find(call, accepted.id), 200, headers)
    return answer({"id": accepted.id, "status": accepted.status, "type": order.type}, 202, headers)


async def _has_ended(call: Call, accepted: AcceptedDelivery, within_s: float) -> bool:
    """Wait for the outcome of the queued delivery; False when there is none in time."""
    try:
        async with asyncio.timeout(within_s):
            await call.outcome(accepted.id, accepted.deadline_ms)
    except (TimeoutError, DeadlineExceeded):
        return False
    return True


def _order(call: Call, request: DeliveryRequest, settings: DeliveriesSettings) -> Order:
    """Return what is to be delivered.

    Raises:
        Problem: 422, a field does not fit the type.
    """
    kind: Type = "mms" if request.type == "sms" and request.attachments else request.type
    _check("from", request.sender, read_mailbox if kind == "email" else read_sender)
    _check("to", request.to, partial(read_mailbox, may_be_named=False) if kind == "email" else read_number)
    _check_texts(kind, request, settings)
    _check_attachments(kind, request.attachments, settings)
    due_ms = due_ms_of(call, request.scheduled_at, "scheduled_at", settings.max_schedule_s)
    given = request.model_dump(exclude_none=True, exclude={"sender", "type", "scheduled_at"})
    if not request.attachments:
        del given["attachments"]
    return Order(
        kind,
        call.tenant,
        {"from": request.sender} | given,
        scheduled_at=request.scheduled_at if due_ms else None,
        due_ms=due_ms,
    )


def _check(name: str, text: str, read: Callable[[str], object]) -> None:
    try:
        read(text)
    except BadContact as error:
        raise wrong(name, str(error)) from None


def _check_texts(kind: Type, request: DeliveryRequest, settings: DeliveriesSettings) -> None:
    if kind != "email":
        for name in ("subject", "html"):
            if getattr(request, name) is not None:
                raise wrong(name, f"an {kind} has none; only an email has")
        if len(request.body) > MAX_SMS_CHARS:
            raise wrong("body", f"at most {MAX_SMS_CHARS} characters in an {kind}")
        if not request.body.strip() and not request.attachments:
            raise wrong("body", f"an {kind} without attachments says something")
        return
    if not (request.attachments or any((text or "").strip() for text in (request.body, request.html, request.subject))):
        raise wrong("body", "an email without subject, html and attachments says something")
    if request.subject is not None and not (request.subject.isprintable() or not request.subject):
        raise wrong("subject", "one line, without control characters")
    for name, text in (("body", request.body), ("html", request.html or "")):
        if len(text) > settings.max_text_chars:
            raise wrong(name, f"at most {settings.max_text_chars} characters")


def _check_attachments(kind: Type, attachments: list[DeliveryAttachment], settings: DeliveriesSettings) -> None:
    if len(attachments) > settings.max_attachments:
        raise wrong("attachments", f"at most {settings.max_attachments}")
    size = 0
    for number, one in enumerate(attachments):
        path = f"attachments[{number}]"
        if kind == "email":
            size += _size_of(one, path)
        elif one.content is not None:
            raise wrong(f"{path}.content", "an mms names a `url`, from which the provider fetches it")
        elif one.url is None or not _is_https(one.url):
            raise wrong(f"{path}.url", "an address that begins with https://")
    if size > settings.max_attachment_bytes:
        raise wrong("attachments", f"at most {settings.max_attachment_bytes} bytes together")


def _size_of(attachment: DeliveryAttachment, path: str) -> int:
    if attachment.url is not None:
        raise wrong(f"{path}.url", "an email carries its attachments: give `content`, in base64")
    if attachment.content is None:
        raise wrong(f"{path}.content", "an email carries its attachments: give it, in base64")
    try:
        return len(base64.b64decode(attachment.content, validate=True))
    except (binascii.Error, ValueError):
        raise wrong(f"{path}.content", "base64, without line breaks") from None


def _is_https(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    is_address = parts.scheme == "https" and bool(parts.hostname)
    return is_address and text.isascii() and text.isprintable() and " " not in text


# --- Looking -----------------------------------------------------------------------------------


async def look(call: Call) -> Answer:
    """Tell how a delivery stands, and each status it has had."""
    return answer(await _find(call, own_id(call, "message_id", "message")))


async def list_deliveries(call: Call) -> Answer:
    """List deliveries, the newest first.

    A page may hold fewer than `limit` where a status is asked for: what has changed since is left out.
    """
    asked = Asked(call, {"type", "status", "to", "since", "until", "after", "limit"})
    status = asked.one_of("status", Status)
    rows, after = await call.history.deliveries(
        call.tenant,
        type=asked.one_of("type", Type),
        status=status,
        recipient=_recipient(asked),
        since_ms=asked.instant_ms("since"),
        until_ms=asked.instant_ms("until"),
        after=asked.text("after"),
        limit=asked.limit(),
    )
    found = await from_redis(call.front.deliveries.standing([row["delivery_id"] for row in rows]))
    shown = []
    for row, delivery in zip(rows, found, strict=True):
        now = _of_row(row) | _standing(delivery) if delivery is not None else _of_row(await _up_to_date(call, row))
        shown.append(_shown(now, DeliveryListed))
    return answer({"messages": [one for one in shown if status in {None, one["status"]}], "next": after})


async def cancel(call: Call) -> Answer:
    """Cancel a delivery that has not been handed to its provider yet: one that is scheduled or pending."""
    delivery_id = own_id(call, "message_id", "message")
    found = await _find(call, delivery_id)
    done = "finished"
    if found["status"] in {"scheduled", "pending"}:
        done = await call.front.cancel(delivery_id, call.tenant)
    if done not in {"cancelled", "cancelling"}:  # in hand or not, it goes out to nobody
        status = (await _find(call, delivery_id))["status"]
        raise Problem(409, "not_cancellable", f"the message is {status} by now", job_id=delivery_id)
    return answer({"id": delivery_id, "status": "cancelled"})


async def _find(call: Call, delivery_id: str) -> Json:
    (delivery,) = await from_redis(call.front.deliveries.find([delivery_id]))
    if delivery is not None:
        if delivery.tenant != call.tenant:
            raise not_found("message", delivery_id)
        return _shown(_of_redis(delivery), DeliveryShown)
    row = await call.history.delivery(call.tenant, delivery_id)
    if row is None or row["type"] is None:  # nothing, or only what came later: what was asked for is still on its way
        raise not_found("message", delivery_id)
    return _shown(_of_row(await _up_to_date(call, row)), DeliveryShown)


LOST: Final = {"type": "failed", "code": "lost", "message": "nothing is known of this message any more"}
"""The error of a delivery that Redis has lost while it was on its way: it may have gone out, or not."""


async def _up_to_date(call: Call, row: Json) -> Json:
    """Return a row of history as it stands now that Redis knows nothing of it (any more): one that was open is lost."""
    if row["status"] not in {"scheduled", "pending", "sending"}:
        return row
    kept_ms = int(call.gateway.settings.deliveries.keep_s * 1000)
    is_recorded = await from_redis(call.front.recorded_until_ms()) > call.front.clock.now_ms() - kept_ms
    return row | {"status": "unknown", "error": LOST} if is_recorded else row


def _of_redis(delivery: Delivery) -> Json:
    content = delivery.content
    files = content.get("attachments", ())
    attachments = [{name: one[name] for name in AttachmentShown.model_fields if name in one} for one in files]
    return content | {"attachments": attachments or None} | _standing(delivery)


def _standing(delivery: Delivery) -> Json:
    return {
        "id": delivery.id,
        "type": delivery.type,
        "status": delivery.status,
        "created_ms": delivery.created_ms,
        "scheduled_at_ms": delivery.due_ms if delivery.due_ms > delivery.created_ms else None,
        "provider": delivery.provider,
        "provider_id": delivery.provider_id,
        "error": delivery.error,
        "attempts": delivery.attempts or None,
        "retry_of": delivery.retry_of,
        "history": delivery.history,
    }


def _of_row(row: Json) -> Json:
    return row | {
        "id": row["delivery_id"],
        "from": row["sender"],
        "to": row["recipient"],
        "scheduled_at_ms": row["scheduled_ms"],
        "attempts": row["attempts"] or None,
    }


def _shown(found: Json, model: type[BaseModel]) -> Json:
    """Return what *model* shows of a delivery; what there is none of is left out."""
    names = (field.alias or name for name, field in model.model_fields.items())
    shown = {name: found[name] for name in names if found.get(name) is not None}
    if "history" in shown:
        shown["history"] = [{"status": status, "at_ms": at_ms} for status, at_ms in shown["history"]]
    return shown


def _recipient(asked: Asked) -> str | None:
    """Return to whom: a `+` that was not escaped has become a blank, and no number and no address holds one."""
    text = asked.text("to")
    if text is not None and ("\0" in text or not text):
        raise wrong("to", "a number, or an email address")
    return text and text.replace(" ", "+")


_ID: Final = Parameter(
    "message_id", "the id, as it was answered", required=True, type=Annotated[str, Field(min_length=1)]
)

OPERATIONS: Final = (
    Operation(
        "POST",
        "/api/v1/messages/send",
        send,
        body=DeliveryRequest,
        answers={202: DeliveryAccepted, 200: DeliveryShown},
        idempotent=True,
        example={"from": "+15005550006", "to": "+15005550009", "type": "sms", "body": "Your parcel is here."},
    ),
    Operation(
        "GET",
        "/api/v1/messages/{message_id}",
        look,
        answers={200: DeliveryShown},
        errors=(404,),
        parameters=(_ID,),
    ),
    Operation(
        "GET",
        "/api/v1/messages",
        list_deliveries,
        answers={200: DeliveryPage},
        errors=(422,),
        parameters=(
            Parameter("type", "of this type only", type=Type),
            Parameter("status", "as it stands now", type=Status),
            Parameter(
                "to",
                "to this recipient only; a `+` may stand as it is, or as `%2B`",
                type=Annotated[str, Field(min_length=1)],
            ),
            Parameter("since", "created then or later (RFC 3339)"),
            Parameter("until", "created before (RFC 3339)"),
            AFTER,
            LIMIT,
        ),
    ),
    Operation(
        "POST",
        "/api/v1/messages/{message_id}/cancel",
        cancel,
        answers={200: DeliveryCancelled},
        errors=(404, 409),
        parameters=(_ID,),
    ),
)
