"""The delivery stages: sms, mms and email, each with its own queue; and in the same process what comes in from outside.

One handling is at most one hand-over to a provider. `begin` is the last question before it: from its `begun` on the
delivery is `sending`, and marked until somebody says how it went. After it nothing here may fail but the provider
itself, whose errors say whether the message was taken (`stages.providers`).

Nothing here logs or counts what a message says, or to whom.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog
from prometheus_client import Counter, Histogram

from pipeline.errors import NOT_YET, InDoubt, PenstockError, Reject, RetryLater
from pipeline.job import Completion, Done, Job, Json
from pipeline.metrics import DELIVERY_SPANS_S
from pipeline.stage import Context, Stage
from stages import incoming
from stages.providers import Attachment, Outgoing, Provider, Sent, Type, callback_url, chosen

if TYPE_CHECKING:
    from pipeline.deliveries import Delivery
    from pipeline.settings import DeliveriesSettings, Settings

LONGEST_HOLD_S: Final = 3_600.0
"""A slip of a provider must not stop all that goes out by it for days; the delivery itself obeys what was asked."""

SENT = Counter("penstock_delivery_sent_total", "Deliveries that their provider has taken", ["stage", "provider"])
FAILED = Counter(
    "penstock_delivery_attempts_failed_total",
    "Hand-overs to a provider that failed, by why",
    ["stage", "provider", "reason"],
)
SENT_S = Histogram(
    "penstock_delivery_sent_seconds",
    "From the time when a delivery was due to its provider having taken it",
    ["stage", "provider"],
    buckets=DELIVERY_SPANS_S,
)
HOLDS = Counter("penstock_delivery_holds_total", "Times a provider asked to be left alone", ["provider"])

log = structlog.get_logger(__name__)


def build(settings: Settings) -> Sequence[Stage]:
    """Return the three stages, and `incoming`: they do little and belong together. Types of one provider share it.

    Raises:
        ConfigError: a provider does not exist, cannot work, or does not carry what it is chosen for.
    """
    providers = chosen(settings)
    shared = {id(provider): Shared(provider) for provider in providers.values()}
    couriers = [Courier(kind, shared[id(provider)], settings.deliveries) for kind, provider in providers.items()]
    return [*couriers, incoming.build(settings)]


class Shared:
    """A provider that several stages use: opened for the first that starts, closed with the last that stops."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._users = 0
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        """Start the provider, unless it is."""
        async with self._turn:
            if not self._users:
                await self.provider.start()
            self._users += 1

    async def close(self) -> None:
        """Stop the provider, unless another stage still uses it."""
        async with self._turn:
            self._users -= 1
            if not self._users:
                await self.provider.stop()


class Courier(Stage):
    """Hands deliveries of one type to their provider."""

    def __init__(self, kind: Type, shared: Shared, settings: DeliveriesSettings) -> None:
        self.name = kind
        self.slots = getattr(settings, f"{kind}_concurrency")
        self._kind = kind
        self._shared = shared
        self._provider = shared.provider
        self._settings = settings
        self._context: Context
        self._is_open = False
        labels = (kind, self._provider.name)
        self._sent, self._sent_s = SENT.labels(*labels), SENT_S.labels(*labels)
        HOLDS.labels(self._provider.name)  # a counter that begins at 1 shows no increase

    async def start(self, context: Context) -> None:
        """Open the provider."""
        self._context = context
        await self._shared.open()
        self._is_open = True

    async def stop(self) -> None:
        """Let go of the provider."""
        if self._is_open:
            self._is_open = False
            await self._shared.close()

    async def handle(self, job: Job) -> Done:
        """Hand a delivery over, once.

        Raises:
            Reject: it was not taken and never will be.
            InDoubt: it may have been taken.
            RetryLater: it was not taken; or it is not its turn yet, and nothing is charged.
        """
        delivery = await self._context.deliveries.read(job.id)
        if delivery is None:
            raise _gone()
        message = self._message(delivery)
        job.state["due_ms"] = delivery.due_ms
        sent = await self._send(message) if await self._begin(job) else None
        return Done({"provider": self._provider.name, "provider_id": sent and sent.provider_id})

    async def _begin(self, job: Job) -> bool:
        """Return once it may be handed over; False where its provider has it already."""
        provider, turn_us = self._provider, None
        while True:
            begun = await self._context.deliveries.begin(
                job, provider.name, per_s=provider.per_s, turn_us=turn_us, again=provider.is_idempotent
            )
            match begun.word:
                case "begun":
                    return True
                case "taken":
                    return False
                case "wait":
                    turn_us = begun.turn_us
                    await asyncio.sleep(begun.wait_s)
                case "busy" | "held":
                    message = f"the provider {provider.name} takes no more for now"
                    raise RetryLater(message, code=NOT_YET, after_s=begun.wait_s, charged=False)
                case "cancelled":  # its live record is marked, and so it ends as cancelled whatever is raised here
                    raise RetryLater("it was cancelled", code=NOT_YET, charged=False)
                case "gone":
                    raise _gone()
                case "doubt":
                    raise InDoubt("a process ended while it handed this delivery over: it may have gone out")
                case word:
                    raise ValueError(f"begin said {word!r}")

    async def _send(self, message: Outgoing) -> Sent:
        provider = self._provider
        try:
            return await provider.send(message)
        except asyncio.CancelledError:
            self._count("stopped")
            raise
        except Exception as error:
            self._count(error.code if isinstance(error, (Reject, RetryLater)) else "error")
            if isinstance(error, RetryLater) and not error.charged and error.after_s is not None:
                await self._hold(error.after_s)
            raise

    async def _hold(self, after_s: float) -> None:
        HOLDS.labels(self._provider.name).inc()
        with suppress(PenstockError):  # the delivery waits in any case; others will be told the same
            held_s = await self._context.deliveries.hold(self._provider.name, min(after_s, LONGEST_HOLD_S))
            log.info("a provider asked to be left alone", provider=self._provider.name, for_s=round(held_s, 1))

    def ended(self, job: Job, completion: Completion) -> None:
        """Count what was handed over."""
        self._sent.inc()
        self._sent_s.observe(max(0, self._context.clock.now_ms() - job.state["due_ms"]) / 1000)

    def _count(self, reason: str) -> None:
        FAILED.labels(self._kind, self._provider.name, reason).inc()

    def _message(self, delivery: Delivery) -> Outgoing:
        content = delivery.content
        return Outgoing(
            delivery.id,
            self._kind,
            content["from"],
            content["to"],
            subject=content.get("subject"),
            body=content.get("body", ""),
            html=content.get("html"),
            attachments=tuple(map(_attachment, content.get("attachments", ()))),
            callback_url=callback_url(self._provider, delivery.id, self._settings.public_url),
            metadata=content.get("metadata"),
        )

    def __repr__(self) -> str:
        return f"<Courier {self._kind} by {self._provider.name} slots={self.slots}>"


def _attachment(given: Json) -> Attachment:
    text = given.get("content")
    try:
        content = None if text is None else base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Reject("an attachment is no base64", code="bad_attachment") from None
    kind = given.get("content_type") or "application/octet-stream"
    return Attachment(given.get("filename") or "attachment", kind, content, given.get("url"))


def _gone() -> Reject:
    return Reject("the record of this delivery is gone", code="gone")
