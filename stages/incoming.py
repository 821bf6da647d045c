"""The incoming stage: carries on what providers bring from outside, messages that people have written to us.

The script that accepts such a message has told history what it says. What is left is to tell whoever wants to know: a
signed webhook, `message.received`, begins in the step that ends this job. The job itself carries the request as it
came, so that a program beside this one finds all of it on `webhook_queue`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from pipeline import keys
from pipeline.addresses import BadUrl, read_url
from pipeline.deliveries import told_of
from pipeline.errors import ConfigError, Reject
from pipeline.flows import IncomingPayload, WebhookPayload, describe, new_job
from pipeline.job import Done, Job, new_id
from pipeline.stage import Context, Stage

if TYPE_CHECKING:
    from pipeline.settings import Settings

QUEUE: Final = "incoming"
"""The queue whose secret signs these webhooks."""


def build(settings: Settings) -> Stage:
    """Return the stage.

    Raises:
        ConfigError: what is to be told of messages is no address that would be called.
    """
    url = settings.deliveries.incoming_url
    try:
        if url:
            read_url(url, allow_private=settings.webhook.allow_private)
    except BadUrl as error:
        raise ConfigError(f"PENSTOCK_DELIVERIES__INCOMING_URL: {error}") from error
    return Incoming(url, settings)


class Incoming(Stage):
    """Has messages from outside told."""

    name = keys.INCOMING_STAGE

    def __init__(self, url: str, settings: Settings) -> None:
        self.slots = settings.deliveries.incoming_concurrency
        self._url = url
        self._lifetime_s = settings.lifetimes.webhook_s
        self._context: Context

    async def start(self, context: Context) -> None:
        """Learn the time."""
        self._context = context

    async def handle(self, job: Job) -> Done:
        """Start the webhook, where anybody wants to know.

        Raises:
            Reject: the job does not carry a message.
        """
        try:
            payload = IncomingPayload.model_validate(job.payload)
        except ValidationError as error:
            raise Reject(describe(error), code="invalid_payload") from error
        if not self._url:
            return Done({"told": None})
        webhook = WebhookPayload(
            url=self._url,
            event="message.received",
            webhook_id=f"msg_{job.id}",
            queue=keys.of_tenant(job.tenant, QUEUE),
            message_id=job.id,
            at_ms=job.accepted_us // 1000,
            data=told_of(job.id, payload.message.model_dump() | {"provider": payload.provider}),
        )
        now_ms = self._context.clock.now_ms()
        new = new_job(
            "webhook", webhook, job_id=new_id(), now_ms=now_ms, lifetime_s=self._lifetime_s, tenant=job.tenant
        )
        return Done({"told": new.id}, start=(new,))
