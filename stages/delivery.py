"""The delivery stages: sms, mms and email, each with its own queue; and in the same process what comes in from outside.

One handling is at most one hand-over to a provider. `begin` is the last question before it: from its `begun` on the
delivery is `sending`, and marked until somebody says how it went. After it nothing here may fail but the provider
itself, whose errors say whether the message was taken (`stages.providers`).

A doubt ends a delivery, unless the provider knows messages by their id: then it is given the message again, and the job
remembers (`untold`) that the end of one hand-over was never told. From then on only a success ends it well: what is
still not taken when attempts or time have ended may be out there, and is `unknown`. Such a retry leaves the mark of
`begin` where it is (settle.lua looks for `untold`), for the case that the job's time ends while it waits.

Nothing here logs or counts what a message says, or to whom.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal

from prometheus_client import Counter, Histogram

from pipeline.errors import NOT_YET, OUTCOME_UNKNOWN, ConfigError, InDoubt, PenstockError, Reject, RetryLater
from pipeline.job import Completion, Done, Job, Json
from pipeline.metrics import DELIVERY_SPANS_S
from pipeline.stage import Context, Stage
from stages import incoming
from stages.patience import Patience
from stages.providers import CODES, Attachment, HandOver, Outgoing, Provider, Sent, Type, callback_url, chosen

if TYPE_CHECKING:
    from pipeline.deliveries import Delivery
    from pipeline.settings import DeliveriesSettings, Settings

UNTOLD: Final = "untold"
"""In a job's state: a hand-over of it had no end that was told. settle.lua knows the word."""
_TAKEN: Final = frozenset({"sent", "undelivered", "failed", "delivered"})
"""Statuses of a delivery under way that only its provider can have told: it has the message."""
_SILENT: Final = frozenset({"timeout", "connection_lost"})
"""Codes of failures that say nothing of whether the provider takes anything."""
_SENT_AFTER_S: Final = "sent_after_s"
_LONGEST_ID: Final = 1_000

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
HOLDS = Counter("penstock_delivery_holds_total", "Times a provider took nothing and was left alone", ["provider"])


def build(settings: Settings) -> Sequence[Stage]:
    """Return the three stages, and `incoming`: they do little and belong together. Types of one provider share it.

    Raises:
        ConfigError: a provider does not exist, cannot work, does not carry what it is chosen for, or may take longer
            over a message than this process is given to end.
    """
    providers = chosen(settings)
    for provider in providers.values():
        _check_drain(provider, settings.deliveries.drain_s)
    shared = {id(provider): Shared(provider) for provider in providers.values()}
    couriers = [Courier(kind, shared[id(provider)], settings.deliveries) for kind, provider in providers.items()]
    return [*couriers, incoming.build(settings)]


def _check_drain(provider: Provider, drain_s: float) -> None:
    """Refuse what would make every restart a risk: a hand-over that is cut off may have gone out, and nobody knows.

    Where the receiver knows a message by its id the next process gives it again, and nothing is lost.
    """
    if provider.longest_s > drain_s and not provider.is_idempotent:
        raise ConfigError(
            f"PENSTOCK_DELIVERIES__DRAIN_S ({drain_s:g}) is below the {provider.longest_s:g} s that {provider.name} "
            "may take over one message: a restart would cut it off, and nobody would know whether it went out. Raise "
            f"it, and the patience of whoever stops this process; or make the time-outs of {provider.name} shorter"
        )


class Shared:
    """A provider that several stages use: opened for the first that starts, closed with the last that stops."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.patience = Patience(provider.name)
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
        self.drain_s = settings.drain_s
        self._kind = kind
        self._shared = shared
        self._provider = shared.provider
        self._patience = shared.patience
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

    def quiet(self) -> None:
        """Give back what has not begun, so that all of the time left is for what has."""
        self._patience.stop()

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
        sent = None
        if delivery.status not in _TAKEN:
            if delivery.doubt:  # whoever began before us never said how it went
                if not self._provider.is_idempotent:
                    raise _in_doubt()
                job.state[UNTOLD] = True
            sent = await self._hand_over(job, self._message(delivery))
        if sent is not None:
            job.state[_SENT_AFTER_S] = max(0, self._context.clock.now_ms() - delivery.due_ms) / 1000
        return Done({"provider": self._provider.name, "provider_id": sent and sent.provider_id})

    async def _hand_over(self, job: Job, message: Outgoing) -> Sent | None:
        """Hand it over when its turn has come; None where its provider has it already, as it has told."""
        ready: HandOver | None = None
        while True:
            async with self._patience.turn():
                ready = ready or await self._provider.prepare(message)
                match await self._begin(job):
                    case "begun":
                        return await self._send(job, ready)
                    case "taken":
                        return None

    async def _begin(self, job: Job) -> Literal["begun", "taken", "held"]:
        """Ask until it may be handed over, or the provider is to be left alone."""
        provider, turn_us = self._provider, None
        while True:
            begun = await self._context.deliveries.begin(
                job, provider.name, per_s=provider.per_s, turn_us=turn_us, again=provider.is_idempotent
            )
            match begun.word:
                case "begun" | "taken" as word:
                    return word
                case "wait":
                    turn_us = begun.turn_us
                    await self._patience.pause(begun.wait_s)
                case "held":
                    self._patience.held(begun.wait_s)
                    return "held"
                case "busy":
                    raise self._patience.not_yet(begun.wait_s)
                case "cancelled":  # its live record is marked, and so it ends as cancelled whatever is raised here
                    raise RetryLater("it was cancelled", code=NOT_YET, charged=False)
                case "gone":
                    raise _gone()
                case "doubt":
                    raise _in_doubt()
                case word:
                    raise ValueError(f"begin said {word!r}")

    async def _send(self, job: Job, ready: HandOver) -> Sent:
        seen = self._patience.failures
        outcome = await self._outcome(ready)
        if isinstance(outcome, RetryLater) and not outcome.charged:
            outcome = await self._put_off(outcome, seen)
        elif isinstance(outcome, Sent) or not (isinstance(outcome, InDoubt) or outcome.code in _SILENT):
            self._patience.answered(seen)
        if not isinstance(outcome, Sent):
            raise self._judged(job, outcome)
        return outcome if _is_id(outcome.provider_id) else Sent("")

    async def _outcome(self, ready: HandOver) -> Sent | Reject | RetryLater:
        """Hand it over, and return what the provider says of it: a doubt where that is nothing that it may say."""
        try:
            sent: object = await ready()
        except asyncio.CancelledError:
            if _is_cancelled():
                self._count("stopped")
                raise
            what = "it waited for something that was cancelled"
        except (Reject, RetryLater) as error:
            self._count(error.code if error.code in CODES else "other")
            return error
        except Exception as error:  # noqa: BLE001 - whatever it is, the message may have gone out
            what = type(error).__name__
        else:
            if isinstance(sent, Sent):
                return sent
            what = f"it returned {type(sent).__name__}"
        self._count("error")
        return InDoubt(f"the provider {self._provider.name} broke down over it: {what}")

    def _judged(self, job: Job, error: Reject | RetryLater) -> Reject | RetryLater:
        """Return what an error means for the delivery, with all that came before it."""
        if isinstance(error, InDoubt):
            job.state[UNTOLD] = True
        if UNTOLD not in job.state or not self._provider.is_idempotent:
            return error
        words = f"{error}; it may have gone out"
        if isinstance(error, RetryLater):
            return RetryLater(words, code=OUTCOME_UNKNOWN, after_s=error.after_s, charged=error.charged)
        return RetryLater(words, code=OUTCOME_UNKNOWN) if isinstance(error, InDoubt) else InDoubt(words)

    async def _put_off(self, error: RetryLater, seen: int) -> RetryLater:
        """Have all processes leave the provider alone for a while; return the error with that wait."""
        if self._patience.put_off(error, seen):
            HOLDS.labels(self._provider.name).inc()
            with suppress(PenstockError):  # the delivery waits in any case; others will find out by themselves
                await self._context.deliveries.hold(self._provider.name, self._patience.left_s)
        after_s = max(error.after_s or 0.0, self._patience.left_s)
        return RetryLater(str(error), code=error.code, after_s=after_s, charged=False)

    def ended(self, job: Job, completion: Completion) -> None:
        """Count what was handed over; not what the provider was found to have already."""
        after_s = job.state.get(_SENT_AFTER_S)
        if after_s is not None:
            self._sent.inc()
            self._sent_s.observe(after_s)

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


def _is_cancelled() -> bool:
    """Whether a CancelledError is meant for this handler, and not of something that its provider waited for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _is_id(given: object) -> bool:
    """Whether an id can be written anywhere: a message that went out must not be tried again because of it."""
    return isinstance(given, str) and given.isprintable() and len(given) <= _LONGEST_ID


def _in_doubt() -> InDoubt:
    return InDoubt("a process ended while it handed this delivery over: it may have gone out")


def _gone() -> Reject:
    return Reject("the record of this delivery is gone", code="gone")
