"""All settings: one frozen model per section, read once at start-up.

A setting is `PENSTOCK_<SECTION>__<NAME>` in the environment or `name` in table `[section]` of a TOML file
(`PENSTOCK_CONFIG`); the environment wins. Some names that people already have are honoured too (`ALIASES`).
Unknown names are refused, misspelt environment variables included, and every wrong field is named at once.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from pipeline.balancing import POLICIES
from pipeline.errors import ConfigError
from pipeline.keys import normalise_replica_url

PREFIX: Final = "PENSTOCK_"


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Urls = Annotated[tuple[str, ...], BeforeValidator(_split)]


def service_url(text: str) -> str:
    """Return the base address of an HTTP service; "" stands for none. An error does not quote what was given."""
    if not text:
        return text
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or any(character <= " " or character == "\x7f" for character in text):
        raise ValueError("no address like http://127.0.0.1:8000")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "an address must not hold a password, since it is shown in logs: there is a setting for the key"
        )
    if parts.query or parts.fragment:
        raise ValueError("nothing may follow the path of an address: no `?`, no `#`")
    return text


ServiceUrl = Annotated[str, AfterValidator(service_url)]


def _database_url(text: str) -> str:
    """Return the address of a database that the history may be kept in. An error does not quote what was given."""
    scheme, colon, rest = text.partition("://")
    kind = scheme.partition("+")[0]
    if not colon or kind not in {"sqlite", "postgres", "postgresql"} or scheme.partition("+")[2] not in _DRIVERS[kind]:
        raise ValueError("no address like sqlite:///history.db or postgresql://user:password@host/database")
    if kind == "sqlite" and (not rest.startswith("/") or rest in {"/", "/:memory:"} or "?" in rest):
        raise ValueError("SQLite needs a file that all processes share: sqlite:///relative.db, sqlite:////absolute.db")
    if kind != "sqlite":
        try:
            parts = urlsplit(text)
            _ = parts.port  # raises where it is no number
        except ValueError:
            raise ValueError("no address like postgresql://user:password@host:5432/database") from None
        if strange := sorted(set(parse_qs(parts.query, keep_blank_values=True)) - POSTGRES_OPTIONS):
            known = ", ".join(sorted(POSTGRES_OPTIONS))
            raise ValueError(f"unknown after the `?`: {', '.join(strange)}; known are {known}")
    return text


_DRIVERS: Final = {"sqlite": {"", "aiosqlite"}, "postgres": {""}, "postgresql": {"", "asyncpg"}}
POSTGRES_OPTIONS: Final = frozenset({"host", "port", "user", "sslmode", "application_name"})
"""What may follow the `?` of a PostgreSQL address, with libpq's names and meanings."""
DatabaseUrl = Annotated[str, AfterValidator(_database_url)]


def _amqp_url(text: str) -> str:
    """Return the address of a broker that speaks AMQP 0-9-1. An error does not quote what was given."""
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in {"amqp", "amqps"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or any(character <= " " or character == "\x7f" for character in text):
        raise ValueError("no address like amqp://user:password@host:5672/vhost, or amqps://")
    return text


AmqpUrl = Annotated[str, AfterValidator(_amqp_url)]


def _queue_name(text: str) -> str:
    """Return the name of a queue, as AMQP 0-9-1 allows one to be declared."""
    if not 0 < len(text.encode()) <= 255 or text.startswith("amq."):
        raise ValueError("the name of a queue has 1 to 255 bytes and does not begin with `amq.`")
    return text


QueueName = Annotated[str, AfterValidator(_queue_name)]


class Section(BaseModel):
    """One section: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RedisSettings(Section):
    """Where Redis is and how long to wait for it."""

    url: str = Field("redis://127.0.0.1:6379/0", description="redis://, rediss:// or unix:// address")
    connect_timeout_s: float = Field(1.0, gt=0, le=60)
    reply_timeout_s: float = Field(5.0, ge=0.1, le=60, description="a reply later than this is taken as lost")
    reconnect_cap_s: float = Field(0.5, gt=0, le=0.5, description="claims rely on a reconnect being tried this often")


class WorkerSettings(Section):
    """How a consumer lives."""

    name: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="empty: host name and stage")
    lease_s: float = Field(10.0, ge=0.5, le=600, description="silence after which a consumer is presumed dead")
    max_deliveries: int = Field(3, ge=1, le=100, description="deliveries before an entry counts as poison")
    drain_s: float = Field(20.0, ge=0, le=3600, description="how long SIGTERM lets running work finish")
    completion_ttl_s: float = Field(60.0, ge=1, le=86_400, description="life of job:completion:<id>")

    @property
    def renew_s(self) -> float:
        """Interval between renewals: three fit into a lease, and recovery fits into lease + 2 s."""
        return min(self.lease_s / 3, 0.9)


class RetrySettings(Section):
    """Back-off between attempts: full jitter below `min(cap_s, base_s * 2 ** n)`."""

    max_retries: int = Field(3, ge=0, le=100)
    base_s: float = Field(0.5, gt=0, le=60)
    cap_s: float = Field(30.0, gt=0, le=3600)

    @model_validator(mode="after")
    def _cap_above_base(self) -> Self:
        if self.cap_s < self.base_s:
            raise ValueError(f"cap_s ({self.cap_s}) must not be below base_s ({self.base_s})")
        return self


class AdmissionSettings(Section):
    """How much unfinished work is accepted."""

    max_jobs: int = Field(250_000, ge=1, description="jobs alive in Redis, over all flows")
    max_memory_share: float = Field(0.9, gt=0, le=1, description="of Redis' maxmemory, where one is set")


class DeadSettings(Section):
    """How long dead letters are kept."""

    max_letters: int = Field(10_000, ge=1)
    max_age_s: float = Field(14 * 86_400, ge=60)


class EncoderSettings(Section):
    """The encoder stage: chunks documents, encodes documents and questions."""

    slots: int = Field(64, ge=1, le=4096)
    batch: int = Field(32, ge=1, le=1024)
    chunk_tokens: int = Field(300, ge=16, le=8192)
    overlap_tokens: int = Field(20, ge=0)
    max_chunks: int = Field(5_000, ge=1, description="of one document; a longer one is refused")
    keywords: bool = Field(True, description="find by words (BM25)")
    language: str = Field("english", description="stemming and stop words of BM25")
    embeddings_url: ServiceUrl = Field("", description="find by meaning: base address of an OpenAI-compatible server")
    embeddings_model: str = Field("", max_length=100, description="sent to that server; it has to be named")
    embeddings_dimensions: int = Field(0, ge=0, le=65_536, description="asked for; 0: the model's own")
    embeddings_api_key: SecretStr | None = Field(None, description="sent to that server as bearer token")
    embeddings_timeout_s: float = Field(30.0, gt=0, le=600, description="for one call")
    embeddings_batch: int = Field(32, ge=1, le=2048, description="texts in one call")
    embeddings_calls: int = Field(4, ge=2, le=256, description="at once; one kept for questions, one for chunks")
    sentence_transformer: str = Field("", max_length=100, description="find by meaning: folder or name of a model")
    query_prefix: str = Field("", max_length=100, description="put before a question that becomes a dense vector")
    passage_prefix: str = Field("", max_length=100, description="put before a chunk that becomes a dense vector")

    @model_validator(mode="after")
    def _overlap_below_chunk(self) -> Self:
        if self.overlap_tokens >= self.chunk_tokens:
            raise ValueError(f"overlap_tokens ({self.overlap_tokens}) must be below chunk_tokens ({self.chunk_tokens})")
        return self

    @model_validator(mode="after")
    def _one_way_at_least(self) -> Self:
        if self.embeddings_url and self.sentence_transformer:
            raise ValueError("embeddings_url and sentence_transformer are both set: an index has one dense model")
        if self.embeddings_url and not self.embeddings_model:
            raise ValueError("embeddings_url is set, but not embeddings_model: the index records which model filled it")
        if not (self.keywords or self.embeddings_url or self.sentence_transformer):
            raise ValueError("keywords is off: then set embeddings_url or sentence_transformer")
        return self


class RetrieverSettings(Section):
    """The retriever stage: the index and the augmented prompt."""

    slots: int = Field(64, ge=1, le=4096)
    batch: int = Field(16, ge=1, le=1024)
    path: Path = Field(Path(".penstock/index"), description="directory of the embedded index")
    top_k: int = Field(5, ge=1, le=50, description="sources per question, unless the question says otherwise")
    prompt_tokens: int = Field(3000, ge=64, description="budget of the augmented prompt")
    lock_wait_s: float = Field(2.0, ge=0, le=60, description="patience with another retriever that has the index")
    tokenizer: str = Field("estimate", description="`estimate`, or the path of a Hugging Face tokenizer.json")
    qdrant_url: ServiceUrl = Field(
        "", description="a Qdrant server in place of the embedded index; then path is not used"
    )
    qdrant_api_key: SecretStr | None = None
    qdrant_collection: str = Field("penstock", pattern=r"^[A-Za-z0-9._-]{1,128}$", description="made when missing")
    qdrant_timeout_s: int = Field(10, ge=1, le=600, description="for one call to the server")


class LlmSettings(Section):
    """The llm stage and its replicas. Call time-outs by flow stand in `pipeline.flows`."""

    urls: Urls = Field((), description="base addresses of the replicas; ?slots=N sets one replica's slots")
    model: str = Field("default", min_length=1, description="sent to the replica unless the job names one")
    api_key: SecretStr | None = None
    slots: int = Field(16, ge=1, le=4096, description="calls running at once per replica")
    concurrency: int = Field(256, ge=1, le=4096, description="calls in hand of one llm process")
    max_tokens: int = Field(512, ge=1, le=131_072)
    temperature: float = Field(0.2, ge=0, le=2)
    connect_timeout_s: float = Field(2.0, gt=0, le=60)
    breaker_failures: int = Field(5, ge=1, le=1000, description="failures in a row that open a replica's breaker")
    breaker_open_s: float = Field(5.0, gt=0, le=600, description="then it stays open so long; one probe closes it")

    @model_validator(mode="after")
    def _urls_are_distinct(self) -> Self:
        urls = [normalise_replica_url(url)[0] for url in self.urls]
        twice = sorted({url for url in urls if urls.count(url) > 1})
        if twice:
            raise ValueError(f"the same replica is named twice: {', '.join(twice)}")
        return self


class WebhookSettings(Section):
    """The webhook stage: calls receivers outside. When it tries again stands in `pipeline.flows`."""

    concurrency: int = Field(32, ge=1, le=4096, description="calls in hand of one webhook process")
    per_receiver: int = Field(8, ge=1, le=4096, description="of these, calls to one host and port")
    timeout_s: float = Field(15.0, gt=0, le=120, description="for one call, from the name to the head of its answer")
    allow_private: bool = Field(False, description="call any address and port, for development only")
    trial_url: str = Field(
        "", max_length=2_048, description="a receiver that may be called wherever it is; `up` sets it"
    )

    def may_be_private(self, url: str) -> bool:
        """Say whether a receiver may be inside our own network."""
        return self.allow_private or (self.trial_url != "" and url == self.trial_url)


class BalancingSettings(Section):
    """Which replica takes the next job."""

    policy: Literal["expected-finish", "least-loaded", "round-robin", "random"] = "expected-finish"


assert set(POLICIES) == {"expected-finish", "least-loaded", "round-robin", "random"}


class GatewaySettings(Section):
    """The HTTP face."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    insecure: bool = Field(False, description="allow a public address without API keys")
    require_key: bool = Field(False, description="ask for an API key also where none was made yet")
    api_keys: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field((), description="name:key,...", repr=False)
    max_in_flight_per_key: int = Field(1_000, ge=1, description="unfinished jobs of one API key")
    max_body_bytes: int = Field(1 << 20, ge=1024)
    receive_timeout_s: float = Field(10.0, gt=0, le=600, description="for headers and body of one request")
    send_timeout_s: float = Field(60.0, gt=0, le=600, description="a client that reads nothing for so long is dropped")
    max_connections: int = Field(4096, ge=1)
    max_query_chars: int = Field(16_000, ge=1)


class HistorySettings(Section):
    """The database of what was done, and the recorder that writes it."""

    url: DatabaseUrl = Field(
        "sqlite:///.penstock/history.db", repr=False, description="sqlite:///FILE or postgresql://..."
    )
    batch: int = Field(500, ge=1, le=5_000, description="events written in one transaction")
    timeout_s: float = Field(10.0, gt=0, le=600, description="for one transaction, or one answer of the database")
    max_backlog: int = Field(250_000, ge=1, description="events not yet written; above it no recorded work is accepted")
    auto_upgrade: bool = Field(False, description="the recorder brings the tables up to date when it starts")


class MessagesSettings(Section):
    """Messages and batches."""

    max_batch: int = Field(10_000, ge=1, le=100_000, description="members of one batch")
    max_body_bytes: int = Field(32 << 20, ge=1024, description="of a request that creates messages")
    max_text_chars: int = Field(1 << 20, ge=1, description="of one prompt or system prompt, placeholders filled")
    max_batch_chars: int = Field(32 << 20, ge=1, description="of all texts of one request, placeholders filled")
    low_priority_from: int = Field(10, ge=0, description="batches above this size wait behind everything else")
    aggregator_slots: int = Field(4, ge=1, le=256, description="batches that one aggregator gathers at once")
    keep_s: float = Field(7 * 86_400, ge=60, le=366 * 86_400, description="results, once their batch has closed")
    max_queues: int = Field(1_000, ge=1, description="queues of one tenant that have defaults or a webhook secret")
    max_schedule_s: float = Field(30 * 86_400, gt=0, le=366 * 86_400, description="how far ahead schedule_at may be")


class ChatsSettings(Section):
    """Chats: when their messages are answered, and what is kept of them."""

    slots: int = Field(512, ge=1, le=4096, description="runs in hand of one chat process")
    max_batch: int = Field(20, ge=1, le=200, description="messages that one reply answers")
    max_waiting: int = Field(200, ge=1, le=10_000, description="messages that may wait in one chat")
    single_ms: int = Field(30, ge=0, le=1_000, description="a single message to an idle chat waits so long for company")
    quiet_ms: int = Field(1_200, ge=0, le=60_000, description="else a reply begins so long after the last message")
    max_wait_ms: int = Field(6_000, ge=0, le=60_000, description="and so long after the first one at the latest")
    idle_s: float = Field(30.0, ge=0, le=86_400, description="without a word for so long a chat is idle")
    interrupt_for_s: float = Field(30.0, ge=0, le=600, description="a message waits so long for replies interrupted")
    turns: int = Field(50, ge=2, le=500, description="the last turns, which the brains are told")
    prompt_chars: int = Field(24_000, ge=100, le=1_000_000, description="of the last turns and new messages together")
    queue_ttl_s: float = Field(1_800.0, ge=1_200, le=86_400, description="messages that wait longer expire")
    keep_s: float = Field(30 * 86_400, ge=3_600, le=366 * 86_400, description="a chat in Redis, after its last word")
    message_id_s: float = Field(86_400.0, ge=60, le=30 * 86_400, description="a message id counts once for so long")
    max_text_chars: int = Field(16_000, ge=1, le=1_000_000, description="of one message")
    max_personas: int = Field(1_000, ge=1, description="personas of one tenant")
    max_streams: int = Field(2_000, ge=1, description="streams of events that one gateway holds open")


class ReportsSettings(Section):
    """Reports, for other back ends: the streams, the caches, the model's answer."""

    prefetch: int = Field(1, ge=1, le=256, description="requests, and steps of reports, in one worker's hands at once")
    keep_s: float = Field(7 * 86_400, ge=60, le=366 * 86_400, description="responses, and the ids of their requests")
    max_responses: int = Field(100_000, ge=1, description="responses kept; the oldest go")
    input_ttl_s: float = Field(3_600.0, ge=1, le=31 * 86_400, description="a person's last input")
    cache_ttl_s: float = Field(86_400.0, ge=1, le=31 * 86_400, description="a finished report, for who asks the same")
    max_request_bytes: int = Field(1 << 20, ge=1024, description="a larger request is refused")
    max_tokens: int = Field(4096, ge=256, le=131_072, description="of the model's answer")


class AmqpSettings(Section):
    """The bridge to RabbitMQ: reports for back ends that speak AMQP."""

    url: AmqpUrl = Field("amqp://guest:guest@127.0.0.1:5672/", repr=False, description="amqp:// or amqps:// address")
    request_queue: QueueName = Field("report_generation_requests", description="requests are taken from it")
    response_queue: QueueName = Field("report_generation_responses", description="responses go there, or to reply_to")
    prefetch: int = Field(20, ge=1, le=65_535, description="requests that one bridge holds at once")
    max_waiting: int = Field(
        1_000, ge=1, description="requests in Redis that no worker has taken; others stay in RabbitMQ"
    )
    name: str = Field(
        "amqp", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="bridges to another RabbitMQ need another one"
    )
    connect_timeout_s: float = Field(5.0, gt=0, le=60)
    heartbeat_s: int = Field(10, ge=1, le=600, description="a connection silent for three of them is given up")

    @model_validator(mode="after")
    def _queues_are_two(self) -> Self:
        if self.request_queue == self.response_queue:
            raise ValueError("request_queue and response_queue are the same: responses would be taken for requests")
        return self


class ImagesSettings(Section):
    """Images after replies of chats, from a server that speaks OpenAI's `/v1/images/generations`."""

    url: ServiceUrl = Field("", description="base address of the server; without one no images are made")
    model: str = Field("", max_length=256, description="sent to the server; nothing is sent when empty")
    api_key: SecretStr | None = Field(None, description="sent to the server as bearer token")
    size: str = Field("512x512", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="sent to the server")
    slots: int = Field(2, ge=1, le=256, description="images that one process has made at once")
    timeout_s: float = Field(120.0, gt=0, le=600, description="for one image")
    connect_timeout_s: float = Field(2.0, gt=0, le=60)
    max_bytes: int = Field(8 << 20, ge=1024, le=64 << 20, description="of one image")
    keep_s: float = Field(86_400.0, ge=60, le=30 * 86_400, description="how long an image can be fetched")


class TelegramSettings(Section):
    """The Telegram connector."""

    token: SecretStr | None = Field(None, description="of the bot, from @BotFather")
    api_url: ServiceUrl = Field("https://api.telegram.org", description="the Bot API, or a local server of it")
    tenant: str = Field("default", pattern=r"^[A-Za-z0-9._-]{1,128}$", description="whose chats and personas these are")
    poll_s: float = Field(25.0, ge=0, le=50, description="how long one call waits for messages")


class DeliveriesSettings(Section):
    """Deliveries: who carries which type, how many at once, what is kept of them, and what comes in from outside."""

    sms: str = Field("console", pattern=r"^[a-z][a-z0-9_]{0,31}$", description="provider: console, twilio, http")
    mms: str = Field("console", pattern=r"^[a-z][a-z0-9_]{0,31}$", description="provider: console, twilio, http")
    email: str = Field("console", pattern=r"^[a-z][a-z0-9_]{0,31}$", description="provider: console, smtp, http")
    sms_concurrency: int = Field(16, ge=1, le=1024, description="sms in hand of one delivery process")
    mms_concurrency: int = Field(16, ge=1, le=1024, description="mms in hand of one delivery process")
    email_concurrency: int = Field(16, ge=1, le=1024, description="emails in hand of one delivery process")
    turn_wait_s: float = Field(
        20.0, ge=0, le=600, description="in hand until its turn where a provider has a rate; later ones come again"
    )
    drain_s: float = Field(
        300.0,
        ge=0,
        le=3600,
        description="how long SIGTERM lets hand-overs finish, in place of worker.drain_s",
    )
    public_url: ServiceUrl = Field("", description="where providers reach the gateway, for what they tell of a message")
    sync: bool = Field(False, description="a request waits for the outcome of its delivery, for debugging")
    sync_wait_s: float = Field(30.0, gt=0, le=600, description="and for so long at the most")
    keep_s: float = Field(7 * 86_400, ge=60, le=366 * 86_400, description="a delivery in Redis, once it has ended")
    event_id_s: float = Field(2 * 86_400, ge=60, le=31 * 86_400, description="an event of a provider counts once")
    max_schedule_s: float = Field(30 * 86_400, gt=0, le=366 * 86_400, description="how far ahead scheduled_at may be")
    max_body_bytes: int = Field(16 << 20, ge=1024, description="of a request that sends a message")
    max_text_chars: int = Field(1 << 20, ge=1, description="of the body of an email, and of its HTML")
    max_attachments: int = Field(10, ge=0, le=100, description="of one message")
    max_attachment_bytes: int = Field(
        8 << 20, ge=1024, le=64 << 20, description="of one message's attachments together"
    )
    incoming_concurrency: int = Field(16, ge=1, le=1024, description="messages from outside in hand of one process")
    incoming_tenant: str = Field(
        "default", pattern=r"^[A-Za-z0-9._-]{1,128}$", description="whose the messages from outside are"
    )
    incoming_url: str = Field("", max_length=2_048, description="told of each message from outside, by a webhook")
    sendgrid_public_keys: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (), description="verification keys of SendGrid's webhooks"
    )
    signature_age_s: float = Field(3_600.0, ge=1, le=15 * 86_400, description="a signature that tells its time counts")

    @model_validator(mode="after")
    def _events_are_known_for_longer_than_they_count(self) -> Self:
        if self.event_id_s < 2 * self.signature_age_s:  # who signs may have a clock that is ahead by as much
            raise ValueError(
                f"event_id_s ({self.event_id_s}) must be at least twice signature_age_s ({self.signature_age_s}): "
                "an event that is forgotten while its signature still counts could be told again by anybody"
            )
        return self


class SmtpSettings(Section):
    """The mail server that the provider `smtp` hands emails to."""

    host: str = Field("", pattern=r"^[A-Za-z0-9._:-]{0,253}$", description="name or address of the server")
    port: int = Field(0, ge=0, le=65_535, description="0: 465 for tls, else 587")
    tls: Literal["starttls", "tls", "none"] = Field(
        "starttls", description="one of the first two is always used, or no"
    )
    username: str = Field("", max_length=256)
    password: SecretStr | None = None
    message_id_host: str = Field(
        "", pattern=r"^[A-Za-z0-9.-]{0,253}$", description="behind the @ of a Message-ID; empty: the sender's domain"
    )
    connect_timeout_s: float = Field(10.0, gt=0, le=600, description="until the connection stands, and until TLS does")
    timeout_s: float = Field(30.0, gt=0, le=600, description="for one answer before the message was given over")
    give_timeout_s: float = Field(
        120.0, gt=0, le=3600, description="from the call to the last of the message given over, all answers together"
    )
    accept_timeout_s: float = Field(120.0, gt=0, le=600, description="for the answer to a whole message")
    deferred_s: float = Field(
        300.0, ge=0, le=86_400, description="before a server that said 4xx is asked again, at least: greylisting"
    )
    per_s: float = Field(0.0, ge=0, le=100_000, description="emails a second of all processes together; 0: no limit")

    @model_validator(mode="after")
    def _who_does_not_answer_is_given_up_by_the_right_limit(self) -> Self:
        if self.connect_timeout_s >= self.give_timeout_s:
            raise ValueError(
                f"connect_timeout_s ({self.connect_timeout_s}) must be below give_timeout_s ({self.give_timeout_s}): "
                "no attempt is charged where no connection came about"
            )
        return self

    @model_validator(mode="after")
    def _password_is_complete_and_stays_secret(self) -> Self:
        if bool(self.username) != (self.password is not None):
            raise ValueError("username and password belong together: one of them is set without the other")
        if self.password is not None and self.tls == "none" and not _is_here(self.host):
            raise ValueError(
                f"tls is none, but {self.host} is not this machine: the password would be there to be read"
            )
        return self


class TwilioSettings(Section):
    """The Twilio account that the provider `twilio` sends sms and mms by."""

    account_sid: str = Field("", pattern=r"^(AC[0-9a-fA-F]{32})?$", description="of the account, from the console")
    auth_token: SecretStr | None = Field(None, description="of the account; it also signs what Twilio tells us")
    second_auth_token: SecretStr | None = Field(None, description="the account's secondary one, while it is changed")
    api_key_sid: str = Field("", pattern=r"^(SK[0-9a-fA-F]{32})?$", description="of an API key, used to send if set")
    api_key_secret: SecretStr | None = None
    api_url: ServiceUrl = Field("https://api.twilio.com", description="or that of another region, or of a test")
    connect_timeout_s: float = Field(5.0, gt=0, le=60)
    timeout_s: float = Field(30.0, gt=0, le=600, description="for the answer, once the connection stands")
    per_s: float = Field(0.0, ge=0, le=100_000, description="messages a second of all processes together; 0: no limit")

    @model_validator(mode="after")
    def _secrets_are_complete_and_stay_secret(self) -> Self:
        if bool(self.api_key_sid) != (self.api_key_secret is not None):
            raise ValueError("api_key_sid and api_key_secret belong together: one of them is set without the other")
        if (self.auth_token or self.api_key_secret) and not self.account_sid:
            raise ValueError("account_sid is missing: it names the account also where an API key is used")
        if not self.api_url:
            raise ValueError("api_url is empty: leave it out for Twilio's own")
        _stays_secret("api_url", self.api_url, self.auth_token or self.api_key_secret)
        return self


class HttpProviderSettings(Section):
    """A gateway of one's own that the provider `http` posts deliveries to, as JSON, each under its Idempotency-Key."""

    url: ServiceUrl = Field("", description="address that is posted to")
    api_key: SecretStr | None = Field(None, description="sent as bearer token")
    connect_timeout_s: float = Field(5.0, gt=0, le=60)
    timeout_s: float = Field(30.0, gt=0, le=600, description="for the answer, once the connection stands")
    per_s: float = Field(
        0.0, ge=0, le=100_000, description="deliveries a second of all processes together; 0: no limit"
    )

    @model_validator(mode="after")
    def _key_stays_secret(self) -> Self:
        _stays_secret("url", self.url, self.api_key)
        return self


def _is_here(host: str) -> bool:
    return host in {"localhost", "::1"} or re.fullmatch(r"127\.[0-9.]+", host) is not None


def _stays_secret(name: str, url: str, secret: SecretStr | None) -> None:
    parts = urlsplit(url)
    if secret is not None and parts.scheme == "http" and not _is_here(parts.hostname or ""):
        raise ValueError(
            f"{name} is no https address, and not this machine's: what is secret would be there to be read"
        )


class LogSettings(Section):
    """Log lines on standard output."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else JSON")


class MetricsSettings(Section):
    """The `/metrics` port of a stage process; the gateway serves its own."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65_535, description="0: any free port; `penstock status` shows it")


class Lifetimes(Section):
    """Life of a job by flow, counted from its due time, when the sender sets no deadline."""

    query_s: float = Field(60.0, gt=0, le=600)
    document_s: float = Field(600.0, gt=0, le=86_400)
    message_s: float = Field(86_400.0, gt=0)
    webhook_s: float = Field(345_600.0, gt=0)
    batch_s: float = Field(86_400.0, gt=0)
    image_s: float = Field(600.0, gt=0, le=86_400)
    chat_s: float = Field(540.0, gt=0, le=1_200, description="one run of a chat; its lock lasts a minute longer")
    report_s: float = Field(3_600.0, gt=0, le=86_400)
    delivery_s: float = Field(3 * 86_400.0, gt=0, le=31 * 86_400)
    incoming_s: float = Field(86_400.0, gt=0, le=31 * 86_400)


class Settings(Section):
    """Everything."""

    redis: RedisSettings = RedisSettings()
    worker: WorkerSettings = WorkerSettings()
    retry: RetrySettings = RetrySettings()
    admission: AdmissionSettings = AdmissionSettings()
    dead: DeadSettings = DeadSettings()
    encoder: EncoderSettings = EncoderSettings()
    retriever: RetrieverSettings = RetrieverSettings()
    llm: LlmSettings = LlmSettings()
    webhook: WebhookSettings = WebhookSettings()
    balancing: BalancingSettings = BalancingSettings()
    gateway: GatewaySettings = GatewaySettings()
    history: HistorySettings = HistorySettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    lifetimes: Lifetimes = Lifetimes()
    messages: MessagesSettings = MessagesSettings()
    chats: ChatsSettings = ChatsSettings()
    reports: ReportsSettings = ReportsSettings()
    amqp: AmqpSettings = AmqpSettings()
    images: ImagesSettings = ImagesSettings()
    telegram: TelegramSettings = TelegramSettings()
    deliveries: DeliveriesSettings = DeliveriesSettings()
    smtp: SmtpSettings = SmtpSettings()
    twilio: TwilioSettings = TwilioSettings()
    http_provider: HttpProviderSettings = HttpProviderSettings()

    @property
    def renew_timeout_s(self) -> float:
        """How long a renewal's reply is waited for: time is left to notice a dead connection and to replace it."""
        return min(self.redis.reply_timeout_s, self.worker.lease_s / 3)

    @model_validator(mode="after")
    def _owners_are_back_first(self) -> Self:
        lease_s, cap_s = self.worker.lease_s, self.redis.reconnect_cap_s
        if lease_s < 2 * cap_s:
            raise ValueError(
                f"{PREFIX}WORKER__LEASE_S ({lease_s}) must be at least twice {PREFIX}REDIS__RECONNECT_CAP_S ({cap_s}): "
                "after an outage others would take over the jobs of workers that are about to be back"
            )
        return self


ALIASES: Final[dict[str, tuple[str, str]]] = {
    "REDIS_URL": ("redis", "url"),
    "OLLAMA_URL": ("llm", "urls"),
    "LLM_URLS": ("llm", "urls"),
    "LLM_MODEL": ("llm", "model"),
    "LLM_SLOTS": ("llm", "slots"),
    "OPENAI_API_KEY": ("llm", "api_key"),
    "QDRANT_URL": ("retriever", "qdrant_url"),
    "QDRANT_API_KEY": ("retriever", "qdrant_api_key"),
    "WORKER_NAME": ("worker", "name"),
    "MAX_RETRIES": ("retry", "max_retries"),
    "DATABASE_URL": ("history", "url"),
    "SYNC_MESSAGE_PROCESSING": ("deliveries", "sync"),
    "REDIS_CACHE_TTL": ("reports", "input_ttl_s"),
    "RABBITMQ_URL": ("amqp", "url"),
    "RABBITMQ_REQUEST_QUEUE": ("amqp", "request_queue"),
    "RABBITMQ_RESPONSE_QUEUE": ("amqp", "response_queue"),
    "RABBITMQ_PREFETCH_COUNT": ("amqp", "prefetch"),
    "PENSTOCK_API_KEYS": ("gateway", "api_keys"),
    "TELEGRAM_BOT_TOKEN": ("telegram", "token"),
}
"""Names from elsewhere; a later row wins over an earlier one, and `PENSTOCK_<SECTION>__<NAME>` over all."""

_NOT_SETTINGS: Final = frozenset({"PENSTOCK_CONFIG", *ALIASES})


def load(environ: Mapping[str, str], overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    """Read the settings from a TOML file (if any), the environment, and *overrides* of the command line.

    Raises:
        ConfigError: names every wrong field at once.
    """
    values: dict[str, dict[str, Any]] = _read_file(environ.get("PENSTOCK_CONFIG"))
    wrong: list[str] = []
    for name, (section, field) in ALIASES.items():
        if environ.get(name):
            values.setdefault(section, {})[field] = environ[name]
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in _NOT_SETTINGS:
            continue
        section, _, field = name.removeprefix(PREFIX).lower().partition("__")
        model = Settings.model_fields.get(section)
        if model is None or field not in model.annotation.model_fields:  # type: ignore[union-attr]  # always a Section
            wrong.append(f"{name}: no such setting{_did_you_mean(name)}")
            continue
        values.setdefault(section, {})[field] = environ[name]
    for section, fields in (overrides or {}).items():
        values.setdefault(section, {}).update({name: value for name, value in fields.items() if value is not None})
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        wrong += [f"{_name(item['loc'])}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()]
    if wrong:
        raise ConfigError("wrong settings:\n" + "\n".join(f"  {line}" for line in wrong))
    return settings


def names() -> list[str]:
    """Return every setting's environment name, in order."""
    return [
        f"{PREFIX}{section.upper()}__{field.upper()}"
        for section, model in Settings.model_fields.items()
        for field in model.annotation.model_fields  # type: ignore[union-attr]  # always a Section
    ]


def _read_file(path: str | None) -> dict[str, dict[str, Any]]:
    if not path:
        return {}
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not TOML
        raise ConfigError(f"PENSTOCK_CONFIG names {path}, which cannot be read: {error}") from error
    if loose := [name for name, value in values.items() if not isinstance(value, dict)]:
        raise ConfigError(
            f"PENSTOCK_CONFIG names {path}: settings stand in tables, but these do not: {', '.join(loose)}"
        )
    return values


def _name(location: tuple[int | str, ...]) -> str:
    if not location:
        return "settings that contradict each other"
    section, *field = [str(part) for part in location]
    return PREFIX + section.upper() + ("__" + field[0].upper() if field else "")


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, [*names(), *_NOT_SETTINGS], n=1)
    return f"; did you mean {close[0]}?" if close else ""
