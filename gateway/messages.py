"""The messages service: prompts that are worked on without anybody waiting, one by one or many in a batch.

Accepting is all or nothing. What is asked for is checked as a whole first, so that a batch with one wrong field creates
nothing. Single records are read from Redis first and then from history; lists come from history, and what these say of
messages that have not ended is looked up in Redis.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import AfterValidator, BaseModel, Field

from gateway.asked import (
    AFTER,
    EXAMPLE,
    LIMIT,
    Asked,
    ClientName,
    Model,
    Text,
    client_name,
    due_ms_of,
    from_redis,
    not_found,
    own_id,
    storable,
    wrong,
)
from gateway.errors import RETRY_SOON_S, Problem
from gateway.idempotency import read_key
from gateway.jobs import JobError
from gateway.operation import AT_ONCE, Answer, Call, Operation, Parameter, answer
from gateway.queues import Event, secrets
from gateway.webhooks import check_url
from pipeline.batches import LOST, AcceptedBatch, Member, Message, Order, Standing, results_text, webhook_id_of
from pipeline.flows import MAX_QUERY_CHARS, Payload
from pipeline.job import Json
from pipeline.settings import MessagesSettings

Value = Annotated[str, AfterValidator(storable)] | int | float | bool
MessageState = Literal["pending", "processing", "completed", "failed", "expired", "cancelled"]
BatchState = Literal["pending", "processing", "completed", "completed_with_errors", "cancelled"]

MOST_REMEMBERED: Final = 1_000
"""Members read from history at once."""
PORTION: Final = 200
"""Members read from Redis by one call."""

_PLACE: Final = re.compile(r"[0-9]{1,9}")
_PLACEHOLDER: Final = re.compile(r"\{\{([^{}]++)\}\}")

# --- What is asked and answered ----------------------------------------------------------------


class MessageItem(Payload):
    """One message of a batch."""

    prompt: Text
    system_prompt: Text | None = Field(None, description="the queue's when absent")
    supportive_variable: dict[str, Value] | None = Field(
        None, description="fills `{{name}}` in prompt and system prompt; without it both are taken as they are"
    )


class MessageRequest(Payload):
    """One message (`prompt`) or a batch of them (`messages`)."""

    queue_id: ClientName
    prompt: Text | None = None
    messages: Annotated[list[MessageItem], Field(min_length=1, fail_fast=True)] | None = None
    system_prompt: Text | None = Field(None, description="of a single message; the queue's when absent")
    supportive_variable: dict[str, Value] | None = Field(None, description="of a single message")
    retrieve: bool = Field(False, description="answer from the indexed documents")
    model: Model | None = Field(None, description="the queue's when absent")
    webhook_url: str | None = Field(None, description="told when all has ended; the queue's when absent")
    webhook_event: Event | None = Field(None, description="when to tell: `on_complete`, the default")
    schedule_at: str | None = Field(None, description=f"begin then: RFC 3339 with a time zone, `{EXAMPLE}`")


class MessageCreated(BaseModel):
    """It was accepted as a whole; `message_id` for a single message, `message_count` and `message_ids` for a batch."""

    success: Literal[True]
    message: str
    batch_id: str
    message_id: str | None = None
    message_count: int | None = None
    message_ids: list[str] | None = None
    retry_of: str | None = None


class MessageShown(BaseModel):
    """How a message stands; what it asked for is there where it was read from history."""

    message_id: str
    status: MessageState
    batch_id: str | None = None
    queue_id: str | None = None
    result: dict[str, Any] | None = None
    error: JobError | None = None
    worker: str | None = None
    replica: str | None = None
    attempts: int | None = None
    timings_ms: dict[str, float] | None = None
    created_ms: int | None = None
    finished_ms: int | None = None
    position: int | None = None
    prompt: str | None = None
    system_prompt: str | None = None
    model: str | None = None
    retrieve: bool | None = None
    retry_of: str | None = None
    schedule_at_ms: int | None = None


class MessagePage(BaseModel):
    """Some messages."""

    messages: list[MessageShown]
    next: str | None = Field(description="`after` for the next page; null after the last one")


class BatchShown(BaseModel):
    """How a batch stands."""

    batch_id: str
    queue_id: str | None
    status: BatchState
    request_count: int
    response_count: int
    failed_count: int
    progress: float = Field(description="ended messages, from 0 to 1")
    created_ms: int | None = None
    closed_ms: int | None = None
    webhook_id: str | None = Field(
        description="of the webhook that tells of it, for `GET /webhook/{id}`; null before the batch is closed, and "
        "where nobody is to be told"
    )


class BatchPage(BaseModel):
    """Some batches."""

    batches: list[BatchShown]
    next: str | None = Field(description="`after` for the next page; null after the last one")


class BatchResults(BaseModel):
    """What became of each message of a batch, in the order given."""

    batch_id: str
    status: BatchState
    results: list[MessageShown]


class Cancelled(BaseModel):
    """What cancelling did."""

    status: Literal["cancelled", "cancelling"]
    message_id: str | None = None
    batch_id: str | None = None


# --- Creating ----------------------------------------------------------------------------------


async def create(call: Call) -> Answer:
    """Create a message, or a batch of messages.

    All of it is accepted, or nothing. Results are read at `/message/{id}` and `/batch/{id}/results`; with a
    `webhook_url` somebody is told when all has ended.
    """
    settings = call.gateway.settings
    bounds = settings.messages
    request = await call.read(MessageRequest, bounds.max_body_bytes, long="messages", most=bounds.max_batch)
    items = _items(request)
    due_ms = due_ms_of(call, request.schedule_at, "schedule_at", settings.messages.max_schedule_s)
    if request.webhook_url is not None:
        check_url(call, request.webhook_url, param="webhook_url")
    queue = await from_redis(call.front.batches.queue(call.tenant, request.queue_id))
    webhook_url = request.webhook_url or queue.webhook_url
    if webhook_url is None and request.webhook_event is not None:
        raise wrong("webhook_event", "there is no webhook_url to tell, neither here nor in the queue's defaults")
    if webhook_url is not None:  # its queue signs; one that the tenant may not have is refused now
        await from_redis(secrets(call, request.queue_id))
    order = Order(
        tenant=call.tenant,
        queue_id=request.queue_id,
        messages=await fill_in(items, queue.system_prompt, retrieve=request.retrieve, bounds=bounds),
        single=request.messages is None,
        model=request.model or queue.model,
        retrieve=request.retrieve,
        webhook_url=webhook_url,
        webhook_event=(request.webhook_event or queue.webhook_event or "on_complete") if webhook_url else None,
        due_ms=due_ms,
    )
    return _created(await _accept(call, order), single=order.single)


async def _accept(call: Call, order: Order) -> AcceptedBatch:
    key = read_key(call.headers, call.tenant, call.path, call.body)
    accepted = await call.front.submit_batch(order, idempotency=key, in_flight_limit=call.in_flight_limit)
    call.job_id = accepted.batch_id
    return accepted if accepted.message_ids else await _said_before(call, accepted)


async def _said_before(call: Call, accepted: AcceptedBatch) -> AcceptedBatch:
    """Return what was answered to the first request of an Idempotency-Key, where Redis has let go of its batch.

    Raises:
        Problem: 409, history does not know the batch either.
    """
    ids: list[str] = []
    after: str | None = None
    while True:
        rows, after = await call.history.messages(
            call.tenant, batch_id=accepted.batch_id, after=after, limit=MOST_REMEMBERED
        )
        ids += [row["message_id"] for row in rows]
        if after is None:
            break
    if not ids:
        message = "the batch that was created under this Idempotency-Key is no longer known; use another key"
        raise Problem(409, "batch_gone", message, param="Idempotency-Key", job_id=accepted.batch_id)
    return replace(accepted, message_ids=ids)


def _created(accepted: AcceptedBatch, *, single: bool, retry_of: str | None = None) -> Answer:
    said = "Message created successfully" if single else "Batch created successfully"
    body: Json = {"success": True, "message": said, "batch_id": accepted.batch_id}
    ids = list(accepted.message_ids)
    body |= {"message_id": ids[0]} if single else {"message_count": len(ids), "message_ids": ids}
    if retry_of is not None:
        body["retry_of"] = retry_of
    return answer(body, 200, [(b"idempotent-replayed", b"true")] if accepted.repeated else [])


def _items(request: MessageRequest) -> list[tuple[str, MessageItem]]:
    """Return the messages asked for, each with the beginning of its fields' paths."""
    if request.messages is None:
        if request.prompt is None:
            raise wrong("prompt", "give either `prompt` (one message) or `messages` (a batch)")
        item = MessageItem(
            prompt=request.prompt,
            system_prompt=request.system_prompt,
            supportive_variable=request.supportive_variable,
        )
        return [("", item)]
    if request.prompt is not None:
        raise wrong("messages", "give either `prompt` or `messages`, and only one of them")
    for name in ("system_prompt", "supportive_variable"):
        if getattr(request, name) is not None:
            raise wrong(name, "in a batch it stands in each of `messages`, or in the queue's defaults")
    return [(f"messages[{number}].", item) for number, item in enumerate(request.messages)]


async def fill_in(
    items: Sequence[tuple[str, MessageItem]], system_default: str | None, *, retrieve: bool, bounds: MessagesSettings
) -> list[Message]:
    """Return the messages as they go to the model; of a long list portion by portion: others have their turn.

    A short body may hold a long value for a placeholder that stands there often, and a queue's system prompt comes with
    each of its messages; so what is made of the body is bounded, too.
    """
    found: list[Message] = []
    chars = 0
    for number, (path, item) in enumerate(items):
        if number and number % AT_ONCE == 0:
            await asyncio.sleep(0)
        message = _message(item, path, system_default, retrieve=retrieve, most=bounds.max_text_chars)
        chars += len(message.prompt) + len(message.system_prompt or "")
        if chars > bounds.max_batch_chars:
            said = f"with this text the request has more than {bounds.max_batch_chars} characters, placeholders filled"
            raise wrong(f"{path}prompt", said)
        found.append(message)
    return found


def _message(item: MessageItem, path: str, system_default: str | None, *, retrieve: bool, most: int) -> Message:
    prompt, system_prompt = item.prompt, item.system_prompt or system_default
    if item.supportive_variable is not None:
        values = {name.strip(): _text_of(value) for name, value in item.supportive_variable.items()}
        prompt = _fill(prompt, values, f"{path}prompt", most)
        if system_prompt is not None:
            system_prompt = _fill(system_prompt, values, f"{path}system_prompt", most) or None
    for name, text in (("prompt", prompt), ("system_prompt", system_prompt)):
        if text is not None and len(text) > most:
            raise wrong(path + name, f"at most {most} characters, placeholders filled")
    if not prompt:
        raise wrong(f"{path}prompt", "holds nothing once its placeholders are filled")
    if retrieve and not prompt.strip():
        raise wrong(f"{path}prompt", "holds nothing but white space, for which no document can be found")
    if retrieve and len(prompt) > MAX_QUERY_CHARS:
        raise wrong(f"{path}prompt", f"with `retrieve` at most {MAX_QUERY_CHARS} characters")
    return Message(prompt, system_prompt)


def _fill(text: str, values: Mapping[str, str], path: str, most: int) -> str:
    filled = 0

    def value_of(found: re.Match[str]) -> str:
        nonlocal filled
        name = found[1].strip()
        if not name or "\n" in name:  # a piece of a program, say
            return found[0]
        value = values.get(name)
        if value is None:
            message = f"{{{{{name[:128]}}}}} has no value: name it in `supportive_variable`"
            raise wrong(path, message, code="missing_variable")
        filled += len(value)
        if filled > most:  # before all of it is in memory
            raise wrong(path, f"at most {most} characters, placeholders filled")
        return value

    return _PLACEHOLDER.sub(value_of, text)


def _text_of(value: Value) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


# --- Messages ----------------------------------------------------------------------------------


async def look(call: Call) -> Answer:
    """Tell how a message stands."""
    return answer(await _find_message(call, own_id(call, "message_id", "message")))


async def list_messages(call: Call) -> Answer:
    """List messages, the newest first.

    A page may hold fewer than `limit` where a status is asked for: what has changed since is left out.
    """
    asked = Asked(call, {"queue_id", "status", "batch_id", "since", "until", "after", "limit"})
    status = asked.one_of("status", MessageState)
    rows, after = await call.history.messages(
        call.tenant,
        queue=_queue_of(asked),
        status="pending" if status == "processing" else status,
        batch_id=asked.own_id("batch_id", "batch"),
        since_ms=asked.instant_ms("since"),
        until_ms=asked.instant_ms("until"),
        after=asked.text("after"),
        limit=asked.limit(),
    )
    shown = [await _up_to_date(call, _of_row(row)) for row in rows]
    return answer({"messages": [row for row in shown if status in {None, row["status"]}], "next": after})


async def cancel(call: Call) -> Answer:
    """Cancel a message.

    200: it had not begun, and never will. 202: a worker holds it and has been told.
    """
    message_id = own_id(call, "message_id", "message")
    found = await _find_message(call, message_id)
    done = "finished"
    if found["status"] in _OPEN:
        done = await call.front.cancel(message_id, call.tenant)
    if done in {"finished", "unknown"}:
        raise Problem(409, "message_finished", "the message has ended already", job_id=message_id)
    return answer({"message_id": message_id, "status": done}, 200 if done == "cancelled" else 202)


async def retry(call: Call) -> Answer:
    """Send a message that has ended again, as a new one in a batch of its own.

    The old outcome stands; the new message names the old one in `retry_of`.
    """
    message_id = own_id(call, "message_id", "message")
    found = await _find_message(call, message_id)
    if found["status"] in _OPEN:
        raise Problem(409, "message_pending", "the message has not ended yet", job_id=message_id)
    row = await call.history.message(call.tenant, message_id)
    if row is None or row.get("prompt") is None or row.get("queue_id") is None:
        said = "history does not know yet what this message asked for"
        raise Problem(503, "not_recorded_yet", said, retry_after_s=RETRY_SOON_S)
    batch = await call.history.batch(call.tenant, row["batch_id"]) if row.get("batch_id") else None
    webhook_url = (batch or {}).get("webhook_url")
    order = Order(
        tenant=call.tenant,
        queue_id=row["queue_id"],
        messages=[Message(row["prompt"], row.get("system_prompt"))],
        single=True,
        model=row.get("model"),
        retrieve=bool(row.get("retrieve")),
        webhook_url=webhook_url,
        webhook_event=(batch or {}).get("webhook_event") if webhook_url else None,
        retry_of=message_id,
    )
    return _created(await _accept(call, order), single=True, retry_of=message_id)


_OPEN: Final = frozenset({"pending", "processing"})


async def _find_message(call: Call, message_id: str) -> Json:
    found = await from_redis(call.front.batches.message(message_id, call.tenant))
    if found is not None:
        return found
    row = await call.history.message(call.tenant, message_id)
    if row is None:
        raise not_found("message", message_id)
    return await _up_to_date(call, _of_row(row))


async def _up_to_date(call: Call, row: Json) -> Json:
    """Return a row of history with what has happened since it was written; of which Redis knows nothing, it is lost."""
    if row["status"] not in _OPEN:
        return row
    found = await from_redis(call.front.batches.message(row["message_id"], call.tenant))
    if found is None:
        return row | _LOST if await _is_recorded(call) else row
    return row | {name: value for name, value in found.items() if value is not None}


_LOST: Final = {"status": "failed", "error": LOST}


async def _is_recorded(call: Call) -> bool:
    """Say whether history has heard of all outcomes that Redis has let go of: what has none there then, has none."""
    kept_ms = int(call.gateway.settings.messages.keep_s * 1000)
    return await from_redis(call.front.recorded_until_ms()) > call.front.clock.now_ms() - kept_ms


def _of_row(row: Json) -> Json:
    shown = {name: row.get(name) for name in MessageShown.model_fields}
    return {name: value for name, value in shown.items() if value is not None} | {"status": row["status"] or "pending"}


# --- Batches -----------------------------------------------------------------------------------


async def look_at_batch(call: Call) -> Answer:
    """Tell how a batch stands."""
    return answer(await _find_batch(call, own_id(call, "batch_id", "batch")))


async def list_batches(call: Call) -> Answer:
    """List batches, the newest first.

    A page may hold fewer than `limit` where a status is asked for: what has changed since is left out.
    """
    asked = Asked(call, {"queue_id", "status", "since", "until", "after", "limit"})
    status = asked.one_of("status", BatchState)
    rows, after = await call.history.batches(
        call.tenant,
        queue=_queue_of(asked),
        status="pending" if status == "processing" else status,
        since_ms=asked.instant_ms("since"),
        until_ms=asked.instant_ms("until"),
        after=asked.text("after"),
        limit=asked.limit(),
    )
    shown = [await _batch_up_to_date(call, row) for row in rows]
    return answer({"batches": [row for row in shown if status in {None, row["status"]}], "next": after})


async def list_members(call: Call) -> Answer:
    """List the messages of a batch, in the order given."""
    batch_id = own_id(call, "batch_id", "batch")
    asked = Asked(call, {"after", "limit"})
    after, limit = asked.text("after"), asked.limit()
    standing = await _standing(call, batch_id)
    if standing is None:
        row = await call.history.batch(call.tenant, batch_id)
        if row is None:
            raise not_found("batch", batch_id)
        if after is not None and _PLACE.fullmatch(after):
            raise wrong("after", "this list is read from history by now: begin anew", code="invalid_cursor")
        rows, following = await call.history.messages(call.tenant, batch_id=batch_id, after=after, limit=limit)
        about_open = _LOST if (await _batch_up_to_date(call, row))["status"] not in _OPEN else {}
        shown = [_of_row(row) | (about_open if row["status"] in _OPEN else {}) for row in rows]
        return answer({"messages": shown, "next": following})
    if after is not None and not _PLACE.fullmatch(after):
        raise wrong("after", "this is no `next` of this list", code="invalid_cursor")
    first = int(after or 0)
    members = await from_redis(call.front.batches.members(batch_id, first, limit)) or []
    about = {"batch_id": batch_id, "queue_id": standing.queue_id, "created_ms": standing.created_ms}
    shown = [
        await _result(call, member) | about | {"position": first + number} for number, member in enumerate(members)
    ]
    more = first + len(members) < standing.request_count and bool(members)
    return answer({"messages": shown, "next": str(first + len(members)) if more else None})


async def results(call: Call) -> Answer:
    """Tell what became of each message of a batch, in the order given.

    Of a batch that has not been closed, those that have not ended are pending or processing.
    """
    batch_id = own_id(call, "batch_id", "batch")
    standing = await _standing(call, batch_id)
    if standing is None:
        return Answer(200, await _remembered_results(call, batch_id))
    if standing.is_closed:
        text = await from_redis(call.front.batches.results(batch_id))
        if text is not None:
            return Answer(200, text)
    found: list[bytes] = []
    for first in range(0, standing.request_count, PORTION):
        members = await from_redis(call.front.batches.members(batch_id, first, PORTION)) or []
        found += [orjson.dumps(await _result(call, member)) for member in members]
    return Answer(200, results_text(batch_id, standing.status, found))


async def _result(call: Call, member: Member) -> Json:
    """Return what became of a member: what Redis keeps of it, or what history does."""
    if not member.is_remembered:
        return member.result()
    row = await call.history.message(call.tenant, member.id)
    return member.result() if row is None else _result_of_row(row)


async def _remembered_results(call: Call, batch_id: str) -> bytes:
    row = await call.history.batch(call.tenant, batch_id)
    if row is None:
        raise not_found("batch", batch_id)
    batch = await _batch_up_to_date(call, row)
    about_open = _LOST if batch["status"] not in _OPEN else {}
    found: list[bytes] = []
    after: str | None = None
    while True:
        rows, after = await call.history.messages(call.tenant, batch_id=batch_id, after=after, limit=PORTION)
        members = [member | (about_open if member["status"] in _OPEN else {}) for member in rows]
        found += [orjson.dumps(_result_of_row(member)) for member in members]
        if after is None:
            return results_text(batch_id, batch["status"], found)


def _result_of_row(row: Json) -> Json:
    if row["status"] in _OPEN:
        return {"message_id": row["message_id"], "status": row["status"]}
    part = "result" if row["status"] == "completed" else "error"
    names = ("message_id", "status", part, "worker", "replica", "attempts", "timings_ms")
    return {name: row.get(name) for name in names}


async def cancel_batch(call: Call) -> Answer:
    """Cancel a batch.

    202: the messages that have not begun never will, and those that run are stopped; then the batch is closed.
    """
    batch_id = own_id(call, "batch_id", "batch")
    found = await _find_batch(call, batch_id)
    done = "finished"
    if found["status"] in _OPEN:
        done = await call.front.cancel(batch_id, call.tenant)
    if done in {"finished", "unknown"}:
        raise Problem(409, "batch_finished", "all messages of the batch have ended already", job_id=batch_id)
    return answer({"batch_id": batch_id, "status": "cancelling"}, 202)


async def _find_batch(call: Call, batch_id: str) -> Json:
    standing = await _standing(call, batch_id)
    if standing is not None:
        return _of_standing(standing)
    row = await call.history.batch(call.tenant, batch_id)
    if row is None:
        raise not_found("batch", batch_id)
    return await _batch_up_to_date(call, row)


async def _batch_up_to_date(call: Call, row: Json) -> Json:
    """Return a batch of history as it stands now; of one that Redis knows nothing of, what had not ended is lost."""
    found = _of_batch_row(row)
    if found["status"] not in _OPEN:
        return found
    standing = await _standing(call, row["batch_id"])
    if standing is not None:
        return _of_standing(standing)
    if not await _is_recorded(call):
        return found
    wanted, completed = found["request_count"], await call.history.completed(call.tenant, row["batch_id"])
    counts = {"response_count": wanted, "failed_count": wanted - completed, "progress": 1.0}
    return found | {"status": "completed_with_errors"} | counts


async def _standing(call: Call, batch_id: str) -> Standing | None:
    return await from_redis(call.front.batches.standing(batch_id, call.tenant))


def _of_standing(standing: Standing) -> Json:
    return {
        "batch_id": standing.batch_id,
        "queue_id": standing.queue_id,
        "status": standing.status,
        "request_count": standing.request_count,
        "response_count": standing.response_count,
        "failed_count": standing.failed_count,
        "progress": _progress(standing.response_count, standing.request_count),
        "created_ms": standing.created_ms,
        "closed_ms": standing.closed_ms,
        "webhook_id": _webhook_id(standing.batch_id, standing.webhook_url, standing.closed_ms),
    }


def _of_batch_row(row: Json) -> Json:
    wanted, ended = row.get("request_count") or 0, row.get("response_count") or 0
    return {
        "batch_id": row["batch_id"],
        "queue_id": row.get("queue_id"),
        "status": row.get("status") or "pending",
        "request_count": wanted,
        "response_count": ended,
        "failed_count": row.get("failed_count") or 0,
        "progress": _progress(ended, wanted),
        "created_ms": row.get("created_ms"),
        "closed_ms": row.get("closed_ms"),
        "webhook_id": _webhook_id(row["batch_id"], row.get("webhook_url"), row.get("closed_ms")),
    }


def _webhook_id(batch_id: str, url: str | None, closed_ms: int | None) -> str | None:
    return None if url is None or closed_ms is None else webhook_id_of(batch_id)


def _progress(ended: int, wanted: int) -> float:
    return round(ended / wanted, 4) if wanted else 1.0


def _queue_of(asked: Asked) -> str | None:
    """Return the queue of which something is wanted."""
    value = asked.text("queue_id")
    return None if value is None else client_name(value, "queue_id")


def _id(name: str) -> Parameter:
    return Parameter(name, "the id, as it was answered", required=True, type=Annotated[str, Field(min_length=1)])


_QUEUE: Final = Parameter("queue_id", "of this queue only", type=ClientName)
_SINCE: Final = Parameter("since", "created then or later (RFC 3339)")
_UNTIL: Final = Parameter("until", "created before (RFC 3339)")

OPERATIONS: Final = (
    Operation(
        "POST",
        "/message/create",
        create,
        body=MessageRequest,
        answers={200: MessageCreated},
        errors=(409,),
        idempotent=True,
        example={"queue_id": "letters", "prompt": "Write a line to {{name}}.", "supportive_variable": {"name": "Ann"}},
    ),
    Operation(
        "GET",
        "/message/{message_id}",
        look,
        answers={200: MessageShown},
        errors=(404,),
        parameters=(_id("message_id"),),
    ),
    Operation(
        "GET",
        "/message",
        list_messages,
        answers={200: MessagePage},
        errors=(422,),
        parameters=(
            _QUEUE,
            Parameter("status", "as it stands now", type=MessageState),
            Parameter("batch_id", "of this batch only"),
            _SINCE,
            _UNTIL,
            AFTER,
            LIMIT,
        ),
    ),
    Operation(
        "POST",
        "/message/{message_id}/cancel",
        cancel,
        answers={200: Cancelled, 202: Cancelled},
        errors=(404, 409),
        parameters=(_id("message_id"),),
    ),
    Operation(
        "POST",
        "/message/{message_id}/retry",
        retry,
        answers={200: MessageCreated},
        errors=(404, 409, 422),
        parameters=(_id("message_id"),),
        idempotent=True,
    ),
    Operation(
        "GET",
        "/batch/{batch_id}",
        look_at_batch,
        answers={200: BatchShown},
        errors=(404,),
        parameters=(_id("batch_id"),),
    ),
    Operation(
        "GET",
        "/batch/{batch_id}/messages",
        list_members,
        answers={200: MessagePage},
        errors=(404, 422),
        parameters=(_id("batch_id"), AFTER, LIMIT),
    ),
    Operation(
        "GET",
        "/batch/{batch_id}/results",
        results,
        answers={200: BatchResults},
        errors=(404,),
        parameters=(_id("batch_id"),),
    ),
    Operation(
        "GET",
        "/batch",
        list_batches,
        answers={200: BatchPage},
        errors=(422,),
        parameters=(_QUEUE, Parameter("status", "as it stands now", type=BatchState), _SINCE, _UNTIL, AFTER, LIMIT),
    ),
    Operation(
        "POST",
        "/batch/{batch_id}/cancel",
        cancel_batch,
        answers={202: Cancelled},
        errors=(404, 409),
        parameters=(_id("batch_id"),),
    ),
)
