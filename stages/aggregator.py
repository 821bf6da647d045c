"""The aggregator stage: the results of a batch, gathered in order, when all its members have ended.

The batch's own job arrives here when the last member has ended, when the batch is to be cancelled, or when its time is
over. Everything done here may be done again, by anybody: what a member's result is never changes, so the results
written twice are the same, and only the settle that ends the job closes the batch and starts its webhook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog
from prometheus_client import Counter

from pipeline import flows
from pipeline.batches import result_text, results_text, webhook_id_of
from pipeline.connection import OutOfMemory
from pipeline.errors import Reject, RetryLater
from pipeline.histogram import Histogram
from pipeline.job import Completion, Done, Job
from pipeline.stage import Context, Stage

if TYPE_CHECKING:
    from pipeline.settings import Settings

AT_ONCE: Final = 200
"""Members read by one script call."""
AGAIN_S: Final = 1.0
"""Members still run: the last one to end makes this job due at once, so this is for those that never will."""
CLOSED_AS: Final = ("completed", "completed_with_errors", "cancelled")

BATCHES = Counter("penstock_batches_closed_total", "Batches, by how they were closed", ["status"])
LOST = Counter("penstock_batch_members_lost_total", "Members of which neither a result nor a job was left")
TIME_S = Histogram(
    "penstock_batch_seconds",
    "From accepting a batch to having its results gathered",
    "status",
    (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3_600, 14_400, 43_200, 86_400),
)

log = structlog.get_logger(__name__)


class Aggregator(Stage):
    """Gathers results."""

    name = "aggregator"

    def __init__(self, settings: Settings) -> None:
        self.slots = settings.messages.aggregator_slots
        self._lifetime_s = settings.lifetimes.webhook_s
        self._context: Context
        for status in CLOSED_AS:  # a counter that begins at 1 shows no increase
            BATCHES.labels(status)

    async def start(self, context: Context) -> None:
        """Learn where batches are."""
        self._context = context

    async def handle(self, job: Job) -> Done:
        """Write the results of a batch, and say what it is to be closed as.

        Raises:
            Reject: there is no such batch (any more), or it was closed so long ago that results are no longer kept.
            RetryLater: members still run; nothing is charged.
        """
        payload = flows.BatchPayload.model_validate(job.payload)
        batches, batch_id = self._context.batches, payload.batch_id
        results: list[bytes] = []
        alive: list[str] = []
        verdict, is_cancelled = "", False
        for first in range(0, payload.request_count, AT_ONCE):
            portion = await batches.gather(batch_id, first, AT_ONCE, close=True)
            if portion is None:
                raise Reject(f"there is no batch {batch_id} any more", code="batch_gone")
            LOST.inc(portion.lost)
            if portion.lost:
                log.error("members of a batch are lost", job_id=job.id, stage=self.name, members=portion.lost)
            if any(member.is_remembered for member in portion.members):
                raise Reject("results of this batch are no longer kept", code="data_gone")
            verdict, is_cancelled = portion.verdict, portion.is_cancelled
            alive += [member.id for member in portion.members if member.is_alive]
            if not alive:
                results += map(result_text, portion.members)
        if is_cancelled:
            for message_id in alive:
                await batches.cancel_member(message_id, job.tenant)
        if alive:
            message = f"{len(alive)} messages of the batch have not ended yet"
            raise RetryLater(message, code="members_alive", after_s=AGAIN_S, charged=False)
        try:
            told = payload.webhook_url is not None
            await batches.keep_results(batch_id, results_text(batch_id, verdict, results), told=told)
        except OutOfMemory as error:
            raise RetryLater(str(error), code="out_of_memory", after_s=AGAIN_S, charged=False) from error
        now_ms = self._context.clock.now_ms()
        found = {
            "batch_id": batch_id,
            "batch_status": verdict,
            "request_count": payload.request_count,
            "response_count": len(results),
        }
        return Done(found, start=self._webhook(job, payload, now_ms))

    def ended(self, job: Job, completion: Completion) -> None:
        """Count a batch that is closed."""
        verdict = (completion.result or {}).get("batch_status")
        if verdict is not None:
            BATCHES.labels(verdict).inc()
            TIME_S.labels(verdict).observe(max(0, completion.finished_us // 1000 - job.payload["created_ms"]) / 1000)

    def _webhook(self, job: Job, batch: flows.BatchPayload, now_ms: int) -> tuple[Job, ...]:
        """Return the job that tells somebody outside, where somebody wants to know."""
        if batch.webhook_url is None:
            return ()
        webhook_id = webhook_id_of(batch.batch_id)  # whoever gathers this batch, and however often: one id
        payload = flows.WebhookPayload(
            url=batch.webhook_url,
            event="message.completed" if batch.message_id else "batch.completed",
            webhook_id=webhook_id,
            queue=batch.queue,
            batch_id=batch.batch_id,
            message_id=batch.message_id,
            at_ms=now_ms,
        )
        webhook = flows.new_job(
            "webhook", payload, job_id=webhook_id, now_ms=now_ms, lifetime_s=self._lifetime_s, tenant=job.tenant
        )
        return (webhook,)


def build(settings: Settings) -> Stage:
    """Return the stage."""
    return Aggregator(settings)
