"""Webhooks as the sender of a batch sees them: how telling the receiver went, attempt by attempt, and telling it anew.

A webhook's id is its job's. What is known of it stands in one of three places, looked at in this order: the job while
it lives, its completion for a minute, history after that. Another tenant's id is 404, like one that never was.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, Field, ValidationError

from gateway.errors import BrokenKey, Problem
from gateway.jobs import JobError
from gateway.operation import Answer, Call, Operation, Parameter, answer
from pipeline.addresses import BadUrl, read_url
from pipeline.connection import CommandRefused
from pipeline.deliveries import told_of
from pipeline.errors import MalformedEntry
from pipeline.flows import Name, WebhookPayload
from pipeline.front import Standing
from pipeline.job import Completion, Json, is_valid_id

FLOW: Final = "webhook"
LOST: Final = {"type": "failed", "code": "lost", "message": "nothing is known of this webhook any more; replay it"}
"""The error of a webhook that Redis has lost while it was on its way."""


class Attempt(BaseModel):
    """One attempt: what the receiver answered, or why it did not."""

    at_ms: int = Field(description="when it began")
    duration_ms: float
    status: int | None = Field(None, description="the HTTP status of the answer")
    error: str | None = Field(None, description="where there was no answer: timeout, unreachable, tls, ...")


class WebhookStatus(BaseModel):
    """How a webhook stands.

    `url`, `event` and the like are null where the job ended before anybody worked on it and history does not know it.
    """

    id: str
    status: Literal["pending", "processing", "completed", "failed", "expired", "cancelled"]
    webhook_id: str | None = Field(None, description="the header `webhook-id`, the same in every attempt and replay")
    url: str | None = None
    event: Literal["batch.completed", "message.completed", "message.received"] | None = None
    batch_id: str | None = None
    message_id: str | None = None
    attempts: list[Attempt]
    next_attempt_at: datetime | None = Field(None, description="while it waits for its next attempt")
    error: JobError | None = None
    retry_of: str | None = Field(None, description="the webhook that this one repeats")


class WebhookReplayed(BaseModel):
    """The receiver will be told again."""

    id: str
    retry_of: str


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a webhook, wherever it was found."""

    status: str
    told: Json = field(default_factory=dict)
    error: Json | None = None
    due_ms: int | None = None
    retry_of: str | None = None

    @classmethod
    def alive(cls, standing: Standing) -> Self:
        """It is on its way."""
        job = standing.job
        status = "processing" if standing.where == "running" else "pending"
        return cls(status, job.payload | job.state, due_ms=standing.due_ms, retry_of=job.retry_of)

    @classmethod
    def ended(cls, completion: Completion) -> Self:
        """It has its outcome."""
        told = completion.result or {}
        return cls(completion.status, told, completion.error, retry_of=told.get("retry_of"))

    @classmethod
    def remembered(cls, row: Json) -> Self:
        """History knows it: what was asked for stands beside how it ended."""
        asked = {name: row.get(name) for name in ("webhook_id", "url", "event", "batch_id", "message_id", "queue")}
        happened = {"at_ms": row["created_ms"]} if row.get("created_ms") is not None else {}
        told = {name: value for name, value in asked.items() if value is not None} | happened
        told |= row.get("result") or {}
        return cls(row.get("status") or "pending", told, row.get("error"), retry_of=row.get("retry_of"))


async def look(call: Call) -> Answer:
    """Tell how a webhook stands: every attempt, and when the next one is due."""
    webhook_id = call.path_id("webhook_id")
    found = await _find(call, webhook_id)
    due = None if found.due_ms is None else datetime.fromtimestamp(found.due_ms / 1000, UTC)
    shown: dict[str, Any] = {
        name: found.told.get(name) for name in ("webhook_id", "url", "event", "batch_id", "message_id")
    }
    return answer(
        {
            "id": webhook_id,
            "status": found.status,
            **shown,
            "attempts": found.told.get("attempts", []),
            "next_attempt_at": due.isoformat().replace("+00:00", "Z") if due else None,
            "error": found.error,
            "retry_of": found.retry_of,
        }
    )


async def replay(call: Call) -> Answer:
    """Tell the receiver again, under the same `webhook-id`.

    For a webhook that has ended, well or not. The news is what it was: a receiver that has had it knows it by its id.
    """
    webhook_id = call.path_id("webhook_id")
    found = await _find(call, webhook_id)
    if found.status in {"pending", "processing"}:
        message = "it is still on its way; `POST /jobs/{id}/cancel` ends it, then it can be replayed"
        raise Problem(409, "webhook_pending", message, job_id=webhook_id)
    try:
        told = {name: found.told[name] for name in WebhookPayload.model_fields if name in found.told}
        payload = WebhookPayload.model_validate(told | await _received(call, found))
    except ValidationError:
        raise _not_found(webhook_id) from None  # it ended before it was begun, and history has not heard of it yet
    check_url(call, payload.url, param="url")
    job = call.job(FLOW, payload, call.gateway.settings.lifetimes.webhook_s)
    job.retry_of = webhook_id
    accepted = await call.submit(job, wait=False)
    return answer({"id": accepted.job_id, "retry_of": webhook_id}, 202)


async def _received(call: Call, found: Found) -> Json:
    """Return what a webhook about a message from outside tells, which history has; nothing of any other webhook."""
    if found.told.get("event") != "message.received":
        return {}
    row = await call.history.incoming(call.tenant, found.told["message_id"])
    return {} if row is None else {"data": told_of(row["incoming_id"], row)}


def check_url(call: Call, text: str, *, param: str) -> None:
    """Refuse a URL that we would not call; what its host's name leads to is looked at when it is called.

    Args:
        param: the path of the field that holds it.

    Raises:
        Problem: 422, with the reason.
    """
    try:
        read_url(text, allow_private=call.gateway.settings.webhook.may_be_private(text))
    except BadUrl as error:
        raise Problem(422, "invalid_field", f"{param}: {error}", param=param) from None


async def _find(call: Call, webhook_id: str) -> Found:
    """Return what is known of a webhook.

    Raises:
        Problem: 404, nothing is, or it is another tenant's.
    """
    if not is_valid_id(webhook_id):
        raise _not_found(webhook_id)
    try:
        standing = await call.front.standing(webhook_id, call.tenant)
        if standing is not None and standing.job.flow == FLOW:
            return Found.alive(standing)
        completion = await call.front.look(webhook_id, call.tenant) if standing is None else None
    except (ValueError, CommandRefused, MalformedEntry) as error:
        raise BrokenKey(str(error), webhook_id) from error
    if isinstance(completion, Completion) and call.owns(completion, webhook_id) and _is_webhook(completion):
        return Found.ended(completion)
    if call.gateway.records is None:
        raise _not_found(webhook_id)
    kept_ms = int(call.gateway.settings.worker.completion_ttl_s * 1000)
    is_recorded = await call.front.recorded_until_ms() > call.front.clock.now_ms() - kept_ms
    row = await call.gateway.records.webhook(call.tenant, webhook_id)
    if row is None:
        raise _not_found(webhook_id)
    found = Found.remembered(row)
    # Had it ended, history would have heard of it: Redis was emptied.
    return replace(found, status="failed", error=LOST) if found.status == "pending" and is_recorded else found


def _is_webhook(completion: Completion) -> bool:
    """Say whether this is a webhook's outcome: one that somebody worked on tells its `webhook_id`."""
    return "webhook_id" in (completion.result or {})


def _not_found(webhook_id: str) -> Problem:
    return Problem(404, "webhook_not_found", f"there is no webhook {webhook_id[:128]!r}, or it is no longer known")


_ID: Final = Parameter("webhook_id", "the id of the webhook's job", required=True, type=Name)

OPERATIONS: Final = (
    Operation("GET", "/webhook/{webhook_id}", look, answers={200: WebhookStatus}, errors=(404,), parameters=(_ID,)),
    Operation(
        "POST",
        "/webhook/{webhook_id}/replay",
        replay,
        answers={202: WebhookReplayed},
        errors=(404, 409, 422, 429),
        parameters=(_ID,),
        idempotent=True,
    ),
)
