"""A back end that asks for reports over RabbitMQ, and knows nothing of Redis."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import orjson
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

Json = dict[str, Any]

PATIENT: Json = {"age": 44, "sex": "female", "symptoms": ["headache", "blurred vision"]}


class BackEnd:
    """One connection, one pair of queues.

    Attributes:
        heard: the messages that came back, in order.
    """

    def __init__(self, channel: AbstractChannel, requests: str, responses: str) -> None:
        self.channel = channel
        self.requests, self.responses = requests, responses
        self.heard: list[AbstractIncomingMessage] = []

    async def ask(
        self, request_id: str, user_id: str = "ann", *, inputs: Json | None = None, **properties: Any
    ) -> None:
        """Ask for a report; *properties* are those of the message."""
        body = {"request_id": request_id, "user_id": user_id, "inputs": inputs or PATIENT}
        await self.send(orjson.dumps(body), **properties)

    async def send(self, body: bytes, **properties: Any) -> None:
        """Send anything, and wait until the broker has it."""
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT, **properties)
        await self.channel.default_exchange.publish(message, self.requests)

    async def listen(self, queue: str | None = None) -> None:
        """Take what comes back from now on, from *queue* or from where responses go."""
        found = await self.channel.declare_queue(queue or self.responses, durable=True)

        async def take(message: AbstractIncomingMessage) -> None:
            self.heard.append(message)
            await message.ack()

        await found.consume(take)

    def answers(self) -> dict[str, Json]:
        """Return what was answered, by request; fail where one was answered twice."""
        found = {str(message.message_id): orjson.loads(message.body) for message in self.heard}
        assert len(found) == len(self.heard), sorted(str(message.message_id) for message in self.heard)
        return found

    async def waiting(self, queue: str) -> int:
        """Return how many messages a queue holds that nobody has in hand."""
        found = await self.channel.declare_queue(queue, passive=True)
        count = found.declaration_result.message_count
        assert count is not None
        return count


@asynccontextmanager
async def back_end(url: str, requests: str = "", responses: str = "") -> AsyncIterator[BackEnd]:
    """Connect; without names the queues are called like nobody else's."""
    name = uuid.uuid4().hex
    connection = await aio_pika.connect(url)
    try:
        channel = await connection.channel()
        yield BackEnd(channel, requests or f"requests-{name}", responses or f"responses-{name}")
    finally:
        await connection.close()
