"""Queues: what messages of a queue get where they name nothing themselves, and the secret that signs its webhooks."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, Field

from gateway.asked import ClientName, Model, Text, client_name, from_redis
from gateway.operation import Answer, Call, Operation, Parameter, answer
from gateway.webhooks import check_url
from pipeline import keys
from pipeline.batches import Queue
from pipeline.flows import Payload
from pipeline.webhooks import Secrets

Event = Literal["on_complete"]


class QueueDefaults(Payload):
    """What messages of a queue get where they name nothing themselves."""

    model: Model | None = None
    system_prompt: Text | None = None
    webhook_url: str | None = None
    webhook_event: Event | None = None


class QueueShown(BaseModel):
    """A queue; one that nobody has set up has no defaults."""

    queue_id: str
    model: str | None
    system_prompt: str | None
    webhook_url: str | None
    webhook_event: str | None
    webhook_secret: str | None = Field(
        description="signs the webhooks of this queue; null until the queue is set up or has its first webhook"
    )


async def look_at_queue(call: Call) -> Answer:
    """Tell a queue's defaults, and the secret that signs its webhooks."""
    queue_id = client_name(call.path_id("queue_id"), "queue_id")
    return await _shown_queue(call, queue_id)


async def set_queue(call: Call) -> Answer:
    """Set a queue's defaults, all of them: what is not named is taken away. Its secret stays."""
    asked = await call.read(QueueDefaults)
    queue_id = client_name(call.path_id("queue_id"), "queue_id")
    if asked.webhook_url is not None:
        check_url(call, asked.webhook_url, param="webhook_url")
    queue = Queue(asked.model, asked.system_prompt, asked.webhook_url, asked.webhook_event)
    most = call.gateway.settings.messages.max_queues
    await from_redis(call.front.batches.set_queue(call.tenant, queue_id, queue, most=most))
    await from_redis(secrets(call, queue_id))
    return await _shown_queue(call, queue_id)


async def rotate_secret(call: Call) -> Answer:
    """Give a queue another secret; the one before it signs too for a day, and until then there is no further one."""
    queue_id = client_name(call.path_id("queue_id"), "queue_id")
    most = call.gateway.settings.messages.max_queues
    await from_redis(call.front.rotate_secret(keys.of_tenant(call.tenant, queue_id), most=most))
    return await _shown_queue(call, queue_id)


async def _shown_queue(call: Call, queue_id: str) -> Answer:
    queue = await from_redis(call.front.batches.queue(call.tenant, queue_id))
    secret = await from_redis(call.front.secret(keys.of_tenant(call.tenant, queue_id)))
    defaults = {name: getattr(queue, name) for name in Queue.__slots__}
    return answer({"queue_id": queue_id, "webhook_secret": secret} | defaults)


async def secrets(call: Call, queue_id: str) -> Secrets:
    """Return the secrets of a queue, made now where there were none; what may be wrong is told to the caller."""
    most = call.gateway.settings.messages.max_queues
    return await call.front.secrets(keys.of_tenant(call.tenant, queue_id), most=most)


_IN_PATH: Final = Parameter("queue_id", "the queue, as clients name it", required=True, type=ClientName)

OPERATIONS: Final = (
    Operation(
        "GET", "/queue/{queue_id}", look_at_queue, answers={200: QueueShown}, errors=(422,), parameters=(_IN_PATH,)
    ),
    Operation(
        "PUT",
        "/queue/{queue_id}",
        set_queue,
        body=QueueDefaults,
        answers={200: QueueShown},
        errors=(409,),
        parameters=(_IN_PATH,),
        example={"system_prompt": "Answer in one sentence.", "webhook_url": "https://example.com/hook"},
    ),
    Operation(
        "POST",
        "/queue/{queue_id}/rotate",
        rotate_secret,
        answers={200: QueueShown},
        errors=(409, 422),
        parameters=(_IN_PATH,),
    ),
)
