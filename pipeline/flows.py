"""The flows: what each kind of job is asked with, which stages it passes, what it answers.

A service adds a row here, a file in `gateway/`, and a stage where it needs one. Nothing else knows a route.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline import keys
from pipeline.errors import MalformedEntry
from pipeline.job import Job, Json, Priority
from pipeline.keys import DELIVERY_STAGES, INCOMING_STAGE

MAX_QUERY_CHARS: Final = 16_000
MAX_NAME_CHARS: Final = 128
MAX_LOOKUP: Final = 100  # ids of 128 characters that a request's head has room for
Name = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Metadata = dict[Annotated[str, StringConstraints(max_length=128)], str | int | float | bool | None]


def _stripped(text: str) -> str:
    """Return *text* without blanks around it; its length was bounded with them, as the description says."""
    text = text.strip()
    if not text:
        raise ValueError("there is only white space in it")
    return text


class Payload(BaseModel):
    """What a sender asks for: unknown fields are refused, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class QueryPayload(Payload):
    """A question to be answered from the indexed documents."""

    query: Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUERY_CHARS), AfterValidator(_stripped)]
    top_k: int | None = Field(None, ge=1, le=50, description="sources to use; the retriever's setting when absent")
    model: ModelName | None = Field(None, description="model name sent to the replica; the llm setting when absent")
    metadata: Metadata | None = Field(None, description="returned with the answer, unread", max_length=64)


Collection = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
"""A part of the index by itself, which is searched by who names it: a report's knowledge base. None: what questions are
answered from."""


class DocumentPayload(Payload):
    """A document to be indexed; the same id replaces what was there."""

    document_id: Name
    title: Annotated[str, StringConstraints(max_length=1_000)] = ""
    text: Annotated[str, StringConstraints(min_length=1)]
    digest: Annotated[str, StringConstraints(max_length=128)] | None = Field(
        None, description="the sender's own name for this version, a hash say; `GET /documents` tells it"
    )
    metadata: Metadata = Field(default_factory=dict, max_length=64)
    collection: Collection | None = Field(None, description="a knowledge base, say of reports; questions do not see it")


class DocumentDeletion(Payload):
    """A document to be taken out of the index."""

    document_id: Name
    collection: Collection | None = None


class DocumentLookup(Payload):
    """Documents of which the index is to say whether it holds them."""

    collection: Collection | None = None

    document_ids: Annotated[list[Name], Field(min_length=1, max_length=MAX_LOOKUP)]


class ChatMessage(Payload):
    """One turn, as OpenAI's chat-completions protocol spells it."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, StringConstraints(min_length=1)]


class PromptPayload(Payload):
    """A prompt, or a list of turns, straight to a replica."""

    prompt: Annotated[str, StringConstraints(min_length=1)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1_000)] | None = None
    model: ModelName | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`, and only one of them")
        return self


class RetrievalPayload(Payload):
    """A prompt to be answered from the indexed documents."""

    query: Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUERY_CHARS)]
    system_prompt: Annotated[str, StringConstraints(min_length=1)] | None = None
    model: ModelName | None = None


class BatchPayload(Payload):
    """A batch whose members are to be gathered once all of them have ended.

    Attributes:
        queue: what follows `queue:` in the key of its queue.
        message_id: the one member of a batch that a single message makes.
    """

    batch_id: Name
    queue: Annotated[str, StringConstraints(min_length=1, max_length=300)]
    request_count: int = Field(ge=1)
    created_ms: int = Field(ge=0)
    webhook_url: str | None = None
    message_id: Name | None = None


class WebhookPayload(Payload):
    """News for a receiver outside; what there is to tell of a batch is read when it is sent."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=2_048)]
    event: Literal["batch.completed", "message.completed", "message.received"]
    webhook_id: Name = Field(description="by which the receiver knows a repetition: the same in retries and replays")
    queue: Annotated[str, StringConstraints(min_length=1, max_length=300)] = Field(
        description="what follows `queue:` in the key of the queue whose secret signs"
    )
    batch_id: Name | None = Field(None, description="whose results are told")
    message_id: Name | None = Field(
        None, description="the one message that `message.completed` or `.received` tells of"
    )
    at_ms: int | None = Field(None, ge=0, description="when it happened; this job's own beginning when absent")
    data: Json | None = Field(None, description="what `message.received` tells; there is no batch then")

    @model_validator(mode="after")
    def _tells_something(self) -> Self:
        if (self.event == "message.received") != (self.data is not None) or (self.batch_id is None) != bool(self.data):
            raise ValueError("message.received has `data`, the other events a `batch_id`")
        return self


class ChatPayload(Payload):
    """One run of a chat: the messages that wait there are answered together.

    Attributes:
        chat: as it stands in keys.
        epoch: filled in by the script that starts the run.
    """

    chat: Annotated[str, StringConstraints(min_length=1, max_length=300)]
    epoch: int = Field(0, ge=0)


class ReportPayload(Payload):
    """A report to be written, its inputs checked by the report's type.

    Attributes:
        epoch: of the person it is about; nothing is stored under one that is theirs no more.
        query: what the knowledge base is searched for.
        collection: the part of the index that is searched; None: the type has no knowledge base.
        request_id: of the request that waits on the stream of responses.
        is_fresh: to be written even where a finished one would serve.
        keep_ms: how long its response is kept, and then `keep_most`, how many there may be, `cache_ms`, how long the
            report may serve who asks the same, and `input_ms`, how long the inputs are the person's last ones.
    """

    report_type: Name
    user_id: Name
    epoch: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    inputs: Json
    language: str
    query: Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUERY_CHARS)]
    collection: Collection | None = None
    top_k: int | None = Field(None, ge=1, le=50)
    request_id: Name | None = None
    is_fresh: bool = False
    keep_ms: int = Field(ge=1)
    keep_most: int = Field(ge=1)
    cache_ms: int = Field(ge=1)
    input_ms: int = Field(ge=1)


class ImagePayload(Payload):
    """An image that follows a chat's reply.

    Attributes:
        chat: as it stands in keys.
        epoch: of the reply.
        message_id: of the reply; the image bears it, too.
        message_ids: of the messages that the reply answers.
    """

    chat: Annotated[str, StringConstraints(min_length=1, max_length=300)]
    epoch: int = Field(ge=0)
    message_id: Name
    message_ids: list[Name] = Field(default_factory=list)
    prompt: Annotated[str, StringConstraints(min_length=1)]


class DeliveryPayload(Payload):
    """A message to be delivered; what it says stands in `delivery:<id>`, not on the stream.

    Attributes:
        scheduled_at: as its sender wrote it; it was accepted before that time.
    """

    scheduled_at: str | None = None


class ReceivedMessage(Payload):
    """What somebody wrote to us.

    Attributes:
        provider_id: the provider's name for it.
        media: addresses of what came with it.
    """

    type: Literal["sms", "mms", "email"]
    provider_id: str
    sender: str
    recipient: str
    subject: str | None = None
    body: str = ""
    media: list[str] = Field(default_factory=list)


class IncomingPayload(Payload):
    """A message that a provider brought from outside.

    Attributes:
        headers: of its request, those that tell of the message.
        body: of its request, as it came.
        message: what it says.
    """

    provider: Name
    headers: dict[str, str]
    body: str
    message: ReceivedMessage


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of job.

    Attributes:
        route: the stages it passes, in order.
        lifetime: the setting in section `lifetimes` that bounds its life.
        result: the parts of the final state that its result shows.
        story: the parts of its state that its result shows also when it did not complete.
        retries_s: how long to wait before each retry, at least; None: back-off, as the section `retry` says.
        call_timeout_s: bound of one LLM call.
        longest_s: the longest life that a sender may ask for.
        leases: whether a replica is picked when the job is accepted, not only when it is placed.
        record: the kind of record that history has of such a job by itself, from its acceptance on; "": none. Of
            messages and batches history is told by the scripts that accept and end batches.
        recorded: whether the history is to know of it; then none is accepted while too much waits to be recorded.
        buried_late: whether it goes to the dead letters also when its time was over: what was to follow from it is not
            dropped without a word.
        private: whether what it says of people is for its sender only: logs and listings of dead letters leave out what
            an error quotes.
    """

    name: str
    route: tuple[str, ...]
    payload: type[Payload]
    lifetime: str
    result: tuple[str, ...]
    story: tuple[str, ...] = ()
    retries_s: tuple[float, ...] | None = None
    call_timeout_s: float = 30.0
    longest_s: float = 86_400.0
    leases: bool = False
    record: str = ""
    recorded: bool = False
    buried_late: bool = False
    private: bool = False


_TOLD = ("url", "event", "webhook_id", "batch_id", "message_id", "queue", "at_ms", "retry_of", "attempts")
_MINUTE, _HOUR = 60.0, 3_600.0

FLOWS: Final[dict[str, Flow]] = {
    flow.name: flow
    for flow in (
        Flow(
            "query",
            route=("encoder", "retriever", "llm"),
            payload=QueryPayload,
            lifetime="query_s",
            result=("answer", "sources", "model", "usage"),
            longest_s=600.0,
            leases=True,
        ),
        Flow(
            "document",
            route=("encoder", "retriever"),
            payload=DocumentPayload,
            lifetime="document_s",
            result=("document_id", "chunks"),
        ),
        Flow(
            "document_deletion",
            route=("retriever",),
            payload=DocumentDeletion,
            lifetime="document_s",
            result=("document_id", "deleted"),
        ),
        Flow(
            "document_lookup",
            route=("retriever",),
            payload=DocumentLookup,
            lifetime="query_s",
            result=("documents",),
        ),
        Flow(
            "message",
            route=("llm",),
            payload=PromptPayload,
            lifetime="message_s",
            result=("answer", "model", "usage"),
            call_timeout_s=120.0,
            recorded=True,
        ),
        Flow(
            "message_retrieve",
            route=("encoder", "retriever", "llm"),
            payload=RetrievalPayload,
            lifetime="message_s",
            result=("answer", "sources", "model", "usage"),
            call_timeout_s=120.0,
        ),
        Flow(
            "batch",
            route=("aggregator",),
            payload=BatchPayload,
            lifetime="batch_s",
            result=("batch_id", "batch_status", "request_count", "response_count"),
            buried_late=True,
        ),
        Flow(
            "chat",
            route=("chat", "llm", "chat", "llm", "chat"),
            payload=ChatPayload,
            lifetime="chat_s",
            result=("ended", "message_ids", "text"),
            recorded=True,
        ),
        Flow(
            "report",
            route=("encoder", "retriever", "report", "llm", "report"),
            payload=ReportPayload,
            lifetime="report_s",
            result=("cached", "hash", "report"),  # in this order: the script that ends the job takes them apart
            call_timeout_s=900.0,
            record="report",
            recorded=True,
            private=True,
        ),
        *(
            Flow(
                f"delivery_{kind}",
                route=(kind,),
                payload=DeliveryPayload,
                lifetime="delivery_s",
                result=("provider", "provider_id"),
                longest_s=31 * 86_400.0,
                recorded=True,
                buried_late=True,
                private=True,
            )
            for kind in DELIVERY_STAGES
        ),
        Flow(
            "incoming",
            route=(INCOMING_STAGE,),
            payload=IncomingPayload,
            lifetime="incoming_s",
            result=("told",),
            record="incoming",
            recorded=True,
            private=True,
        ),
        Flow(
            "image",
            route=("image",),
            payload=ImagePayload,
            lifetime="image_s",
            result=("image_id", "ended", "bytes"),
        ),
        Flow(
            "webhook",
            route=("webhook",),
            payload=WebhookPayload,
            lifetime="webhook_s",
            result=_TOLD,
            story=_TOLD,
            record="webhook",
            # As Standard Webhooks 1.0.0 proposes: three days in all, for somebody has to come back from a weekend.
            retries_s=(
                5,
                5 * _MINUTE,
                30 * _MINUTE,
                2 * _HOUR,
                5 * _HOUR,
                10 * _HOUR,
                14 * _HOUR,
                20 * _HOUR,
                24 * _HOUR,
            ),
        ),
    )
}

FOREIGN: Final[dict[str, str]] = {"encoder": "query", "llm": "message"}
"""The flow of an entry without an envelope, by the stage whose stream it was put on."""


class _Wish(Payload):
    """What any foreign entry may say besides its payload."""

    id: str
    priority: Priority = "normal"
    timeout_s: float | None = Field(None, gt=0)


def new_job(
    flow_name: str,
    payload: Payload,
    *,
    job_id: str,
    now_ms: int,
    lifetime_s: float,
    tenant: str = "default",
    priority: Priority = "normal",
) -> Job:
    """Return a job at the start of its flow's route.

    Args:
        now_ms: its due time, on Redis' clock; the deadline counts from here.
        lifetime_s: what the sender asked for, or the flow's default.
    """
    flow = FLOWS[flow_name]
    return Job(
        id=job_id,
        flow=flow.name,
        payload=payload.model_dump(exclude_none=True),
        route=list(flow.route),
        deadline_ms=now_ms + int(lifetime_s * 1000),
        tenant=tenant,
        priority=priority,
        at_us=now_ms * 1000,
    )


def record_of(job: Job) -> bytes:
    """Return what history is told of a job that begins: its kind and what was asked for; nothing of most.

    Of a report, what its live record says stands in between; see `read_report` in the scripts' prelude. Of a message
    from outside history is told what it says, and not the request that brought it.
    """
    kind, payload = FLOWS[job.flow].record, job.payload
    if not kind:
        return b""
    if kind == "incoming":
        asked = payload["message"] | {"provider": payload["provider"]}
        return b"incoming %b" % orjson.dumps(asked)
    if kind != "report":
        again = {} if job.retry_of is None else {"retry_of": job.retry_of}
        return b"%b %b" % (kind.encode(), orjson.dumps(payload | again))
    created_ms = job.at_us // 1000
    owner = keys.of_tenant(job.tenant, payload["user_id"])
    terms = [payload[name] for name in ("keep_ms", "keep_most", "cache_ms", "input_ms", "epoch")]
    head = " ".join(map(str, (kind, created_ms, *terms, owner, payload.get("request_id", "-"))))
    told = ("user_id", "epoch", "report_type", "inputs", "language", "request_id")
    asked = {name: payload[name] for name in told if name in payload} | {"created_ms": created_ms}
    return b"%b %b" % (head.encode(), orjson.dumps(asked))


def adopt(stage: str, body: Json, *, now_ms: int, lifetimes: Mapping[str, float]) -> Job:
    """Turn a foreign entry's object into a job at the start of its stream's default flow.

    Raises:
        MalformedEntry: the stream has no default flow, or the object does not fit it.
    """
    job_id = str(body["id"])
    if stage not in FOREIGN:
        message = f"job:{stage}_in takes envelopes only: put the job on the stream where its route begins"
        raise MalformedEntry(message, code="no_default_route", job_id=job_id)
    flow = FLOWS[FOREIGN[stage]]
    try:
        wish = _Wish.model_validate({name: body[name] for name in _Wish.model_fields if name in body})
        payload = flow.payload.model_validate({k: v for k, v in body.items() if k not in _Wish.model_fields})
    except ValidationError as error:
        raise MalformedEntry(describe(error), code="invalid_payload", job_id=job_id) from error
    if wish.timeout_s is not None and wish.timeout_s > flow.longest_s:
        message = f"timeout_s: at most {flow.longest_s:g} for a {flow.name}"
        raise MalformedEntry(message, code="invalid_payload", job_id=job_id)
    return new_job(
        flow.name,
        payload,
        job_id=job_id,
        now_ms=now_ms,
        lifetime_s=wish.timeout_s or lifetimes[flow.lifetime],
        priority=wish.priority,
    )


def describe(error: ValidationError) -> str:
    """Return one line that names every wrong field."""
    return "; ".join(
        f"{field_path(item['loc']) or 'body'}: {plain_message(item['type'], item['msg'])}" for item in error.errors()
    )


def field_path(location: tuple[int | str, ...]) -> str:
    """Return a field's place as people write it, e.g. `messages[17].prompt`; a sender may have made up long names."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:MAX_NAME_CHARS]}" if path else part[:MAX_NAME_CHARS]
    return path


def plain_message(kind: str, message: str) -> str:
    """Return what is wrong with one field; *kind* and *message* are pydantic's."""
    if kind == "extra_forbidden":
        return "there is no such field"
    return message.removeprefix("Value error, ")
