"""The webhook stage: tells a receiver outside what became of a batch, or what came in, by Standard Webhooks 1.0.0.

One job is one piece of news, one handling is one attempt. An attempt is good when the head of the answer says 2xx; what
follows the head is read a little, out of politeness, and changes nothing. 410 ends the job: the receiver wants no more.
Everything else, a redirect too, is tried again by the flow's schedule; each attempt is noted in the job's state, where
it travels with the job and stands in the outcome at last, whatever that is.

**At least once.** The receiver's answer and our note of it cannot be one step. A process that dies between them leaves
the job to another, which tells the receiver again under the same `webhook-id`. Once an outcome is settled, never again.

**Shares.** A receiver that takes its time must not have all slots of a process. One that has its share in hand already
is told no more for now: the job gives its slot back and comes again when the others may be done, and is charged
nothing.

**Memory.** Results are read when they are sent. Those of a large batch may take megabytes, so only a few of these are
under way at once, however many slots there are.
"""

from __future__ import annotations

import asyncio
import io
import ssl
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from random import Random
from typing import TYPE_CHECKING, Final

import aiohttp
import httpx
import orjson
import structlog
import yarl
from prometheus_client import Counter, Histogram
from pydantic import ValidationError
from standardwebhooks import Webhook as Signer

from pipeline.addresses import BadUrl, read_url
from pipeline.clock import monotonic_us
from pipeline.errors import Reject, RetryLater
from pipeline.flows import WebhookPayload, describe
from pipeline.job import Done, Job, Json
from pipeline.stage import Context, Stage
from pipeline.webhooks import Secrets
from stages.addresses import NotPublic, System, open_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiohttp.abc import AbstractResolver

    from pipeline.settings import Settings, WebhookSettings

LARGE_BYTES: Final = 1 << 20
LARGE_AT_ONCE: Final = 4
"""A body exists three times for a moment (as read, as text to be signed, as sent): four of 10,000 answers fit."""
SKIM_BYTES: Final = 16 * 1024
SKIM_S: Final = 1.0
"""How much of an answer's body is read, and for how long: a server that still writes takes our closing for an error."""
LONGEST_AFTER_S: Final = 86_400.0
"""Retry-After is obeyed up to the longest wait of the schedule: a slip of a receiver must not end a delivery."""
AGAIN_S: Final = (1.0, 60.0)
"""The shortest and the longest wait of a job whose receiver has its share."""
ATTEMPTS_KEPT: Final = 50
"""Above what a schedule holds; jobs whose process dies, again and again, may come to more."""

ATTEMPTS = Counter(
    "penstock_webhook_attempts", "Attempts to tell a receiver: delivered, cancelled, or the failure's code", ["outcome"]
)
DELIVERED_S = Histogram(
    "penstock_webhook_delivered_seconds",
    "From there being something to tell to the receiver's 2xx",
    buckets=(0.05, 0.1, 0.5, 1, 5, 10, 60, 360, 3_600, 3 * 3_600, 12 * 3_600, 86_400, 2 * 86_400, 4 * 86_400),
)
for _outcome in ("delivered", "bad_status", "unreachable", "timeout"):
    ATTEMPTS.labels(_outcome)

log = structlog.get_logger(__name__)


def build(settings: Settings) -> Stage:
    """Return the stage."""
    return Webhook(settings.webhook)


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that failed.

    Attributes:
        status: what the receiver answered, where it did.
        after_s: how long it asked to be left alone.
    """

    code: str
    message: str
    status: int | None = None
    after_s: float | None = None


@dataclass(slots=True)
class _Busy:
    """One receiver: calls in hand, jobs that were sent away meanwhile, and how long its last call took."""

    calls: int = 0
    waiting: int = 0
    took_s: float = 0.0


class Shares:
    """How many calls each receiver has in hand: *share* of them at most."""

    def __init__(self, share: int, rng: Random) -> None:
        self._share = share
        self._rng = rng
        self._busy: dict[str, _Busy] = {}

    @contextmanager
    def one_of(self, receiver: str) -> Iterator[None]:
        """Have one place of a receiver's share.

        Raises:
            RetryLater: all are taken. The wait is long enough for those who were sent away before: otherwise a backlog
                for one receiver would be read again and again.
        """
        busy = self._busy.setdefault(receiver, _Busy())
        if busy.calls >= self._share:
            busy.waiting += 1
            least_s, most_s = AGAIN_S
            after_s = min(max(least_s, busy.waiting * busy.took_s / self._share), most_s) * self._rng.uniform(0.5, 1.0)
            message = f"{busy.calls} calls of this receiver are under way, its share of this process"
            raise RetryLater(message, code="receiver_busy", after_s=after_s, charged=False)
        busy.calls += 1
        began_us = monotonic_us()
        try:
            yield
        finally:
            busy.took_s = (monotonic_us() - began_us) / 1e6
            busy.calls -= 1
            busy.waiting = max(0, busy.waiting - 1)
            if not busy.calls:
                del self._busy[receiver]

    def __repr__(self) -> str:
        return f"<Shares {self._share} { ({name: busy.calls for name, busy in self._busy.items()}) }>"


class Webhook(Stage):
    """Tells receivers."""

    name = "webhook"

    def __init__(
        self, settings: WebhookSettings, *, tls: ssl.SSLContext | None = None, resolver: AbstractResolver | None = None
    ) -> None:
        """Open nothing yet.

        Args:
            tls: whom to trust; None: whom everybody trusts.
            resolver: who is asked what a name means; None: the system.
        """
        self.slots = settings.concurrency
        self._settings = settings
        self._tls = tls
        self._resolver = resolver or System(settings.concurrency)
        self._shares = Shares(settings.per_receiver, Random())
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._context: Context
        self._session: aiohttp.ClientSession | None = None

    async def start(self, context: Context) -> None:
        """Open the session; connections come with the calls and go with them."""
        self._context = context
        tls = self._tls or httpx.create_ssl_context()
        self._session = open_session(allow_private=self._settings.allow_private, tls=tls, resolver=self._resolver)

    async def stop(self) -> None:
        """Close the session."""
        if self._session is not None:
            await self._session.close()
        await self._resolver.close()

    async def handle(self, job: Job) -> Done:
        """Tell the receiver once.

        Raises:
            Reject: there is no use in telling it again, or nothing to tell any more.
            RetryLater: this attempt failed; or none was made, since the receiver has its share (nothing is charged).
        """
        payload = _payload(job)
        happened_ms = payload.at_ms or job.accepted_us // 1000
        told = payload.model_dump(exclude_none=True, exclude={"data"}) | {"at_ms": happened_ms}
        if job.retry_of is not None:
            told["retry_of"] = job.retry_of
        job.state = told | {"attempts": job.state.get("attempts", [])}
        try:
            url = read_url(payload.url, allow_private=self._settings.may_be_private(payload.url))
        except BadUrl as error:
            raise Reject(str(error), code="bad_url") from error
        webhooks, target = self._context.webhooks, yarl.URL(url.text, encoded=True)
        async with AsyncExitStack() as stack:
            stack.enter_context(self._shares.one_of(f"{target.host}:{target.port}"))
            if payload.data is None:
                batch_id = payload.batch_id or ""
                if await webhooks.size(batch_id) > LARGE_BYTES:
                    await stack.enter_async_context(self._large)
                results = await webhooks.results(batch_id)
                if results is None:
                    raise Reject("the results to be told are no longer kept", code="data_gone")
                body = encode_body(payload, results, happened_ms)
            else:
                body = _encode(payload.event, happened_ms, payload.data)
            secrets = await webhooks.secrets(payload.queue)
            return await self._attempt(job, payload, target, body, secrets)

    async def _attempt(self, job: Job, payload: WebhookPayload, url: yarl.URL, body: bytes, secrets: Secrets) -> Done:
        """Make one attempt and note how it went."""
        clock = self._context.webhooks.clock
        at_ms, began_us = clock.now_ms(), monotonic_us()
        headers = signed_headers(payload.webhook_id, at_ms // 1000, body, secrets)
        try:
            found = await self._post(url, headers, body)
        except asyncio.CancelledError:
            ATTEMPTS.labels("cancelled").inc()
            raise
        duration_ms = round((monotonic_us() - began_us) / 1000, 1)
        outcome = {"status": found} if isinstance(found, int) else _noted(found)
        attempt = {"at_ms": at_ms, **outcome, "duration_ms": duration_ms}
        job.state["attempts"] = [*job.state["attempts"], attempt][-ATTEMPTS_KEPT:]
        if isinstance(found, int):
            ATTEMPTS.labels("delivered").inc()
            DELIVERED_S.observe(max(0, clock.now_us() - job.accepted_us) / 1e6)
            return Done({})
        ATTEMPTS.labels(found.code).inc()
        line = log.bind(job_id=job.id, stage=self.name, worker=self._context.worker, attempt=job.attempt)
        line.info("webhook failed", webhook_id=payload.webhook_id, code=found.code, status=found.status)
        if found.code == "gone":
            raise Reject(found.message, code=found.code)
        raise RetryLater(found.message, code=found.code, after_s=found.after_s)

    async def _post(self, url: yarl.URL, headers: Mapping[str, str], body: bytes) -> int | Failure:
        """Return the status of a good answer, or what went wrong."""
        assert self._session is not None
        limit_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                response = await self._session.post(url, data=io.BytesIO(body), headers=headers, allow_redirects=False)
        except TimeoutError:
            return Failure("timeout", f"no answer within {limit_s:g} s")
        except (aiohttp.ClientError, NotPublic, OSError, ValueError) as error:
            return read_error(error)
        with suppress(TimeoutError, EOFError, aiohttp.ClientError):
            async with response, asyncio.timeout(SKIM_S):
                await response.content.readexactly(SKIM_BYTES)
        return judge(response.status, response.headers.get("retry-after"), datetime.now(UTC))

    def __repr__(self) -> str:
        return f"<Webhook slots={self.slots} allow_private={self._settings.allow_private}>"


def encode_body(payload: WebhookPayload, results: bytes, at_ms: int) -> bytes:
    """Return the body to be sent: what happened, when, and the results; the same in every attempt.

    Args:
        results: the body of `GET /batch/{id}/results`.
        at_ms: when it happened.

    Raises:
        Reject: the message that it tells of is not among the results.
    """
    data: Json | orjson.Fragment = orjson.Fragment(results)
    if payload.event == "message.completed":
        found = [one for one in orjson.loads(results)["results"] if one["message_id"] == payload.message_id]
        if not found:
            raise Reject(f"the results do not tell of message {payload.message_id}", code="data_gone")
        data = found[0]
    return _encode(payload.event, at_ms, data)


def _encode(event: str, at_ms: int, data: Json | orjson.Fragment) -> bytes:
    happened = datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return orjson.dumps({"type": event, "timestamp": happened.replace("+00:00", "Z"), "data": data})


def signed_headers(webhook_id: str, at_s: int, body: bytes, secrets: Secrets) -> dict[str, str]:
    """Return the headers of one attempt, signed with each secret that is good now."""
    text, at = body.decode(), datetime.fromtimestamp(at_s, UTC)
    both = [secrets.current, *([secrets.before] if secrets.before else [])]
    return {
        "content-type": "application/json",
        "accept": "*/*",
        "accept-encoding": "identity",
        "user-agent": "penstock",
        "webhook-id": webhook_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": " ".join(Signer(secret).sign(webhook_id, at, text) for secret in both),
    }


def judge(status: int, retry_after: str | None, now: datetime) -> int | Failure:
    """Return *status* where it is good, else what it means."""
    if 200 <= status < 300:
        return status
    if status == 410:
        return Failure("gone", "the receiver wants no more webhooks (410)", status)
    if 300 <= status < 400:
        return Failure("redirected", f"the receiver redirects ({status}); redirects are not followed", status)
    after_s = read_retry_after(retry_after, now) if status in {429, 503} else None
    return Failure("bad_status", f"the receiver answered {status}", status, after_s)


def read_retry_after(text: str | None, now: datetime) -> float | None:
    """Return the wait that a Retry-After header asks for, in seconds or as a date; None where it asks for none."""
    if text is None:
        return None
    try:
        wait = timedelta(seconds=int(text)) if text.strip().isdigit() else parsedate_to_datetime(text) - now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, wait.total_seconds()), LONGEST_AFTER_S)


def read_error(error: Exception) -> Failure:
    """Judge an attempt that brought no answer."""
    match error:
        case NotPublic():
            return Failure("address_refused", str(error))
        case aiohttp.ClientConnectorDNSError():
            return Failure("name_unknown", f"the receiver's name leads nowhere: {error.os_error}")
        case aiohttp.ClientSSLError():
            return Failure("tls", f"no trusted connection: {error}")
        case aiohttp.ClientConnectorError():
            return Failure("unreachable", f"no connection: {error.os_error}")
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError():
            return Failure("connection_lost", "the receiver closed the connection before it answered")
        case aiohttp.ClientResponseError() | aiohttp.ClientPayloadError():
            return Failure("bad_answer", "what the receiver answered is not HTTP")
    return Failure("unreachable", f"the receiver cannot be called: {error}")


def _noted(failure: Failure) -> Json:
    return {"status": failure.status} if failure.status is not None else {"error": failure.code}


def _payload(job: Job) -> WebhookPayload:
    try:
        return WebhookPayload.model_validate(job.payload)
    except ValidationError as error:
        raise Reject(describe(error), code="invalid_payload") from error
