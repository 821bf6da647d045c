"""The bridge to RabbitMQ, for back ends that ask for reports over AMQP 0-9-1 and cannot change. `penstock bridge amqp`.

Two directions, each with a connection of its own, since a broker that is short of memory stops reading from those that
publish. A request is acknowledged to the broker when Redis has it; what is not acknowledged comes again, and is known
by its `request_id`. A response is acknowledged to Redis when the broker has confirmed it; what is not acknowledged is
published again, as the message of the same id, which is the `request_id`.

Whatever fails ends the connection, and a new one begins with what is not acknowledged. The client's own way of
restoring connections is not used: whoever publishes during it waits for it, and learns too late what was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

import structlog
from prometheus_client import Counter, Gauge

from pipeline import metrics
from pipeline.bridge import Reply, Response, ResponseStream, put_request
from pipeline.clock import monotonic_us
from pipeline.connection import Backoff, Link, Outage
from pipeline.errors import ConfigError, PenstockError
from pipeline.stage import Loop, Stopped, unless

try:
    import aio_pika
    from aio_pika import exceptions as broker_errors
    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
    from aiormq import exceptions as wire_errors
    from aiormq.abc import DeliveredMessage
    from pamqp.header import ContentHeader
    from yarl import URL
except ModuleNotFoundError as error:
    raise ConfigError("the bridge to RabbitMQ needs an optional package: pip install 'penstock[amqp]'") from error

if TYPE_CHECKING:
    from collections.abc import Generator

    from pipeline.clock import Clock
    from pipeline.group_reader import Entry
    from pipeline.settings import Settings

A = TypeVar("A")

AGAIN_S: Final = 2.0
"""The longest wait between two tries to reach the broker."""
STEADY_S: Final = 5.0
"""A connection that held for so long was a good one: the next try comes soon."""
FULL_AGAIN_S: Final = 0.2
"""Between tries to put a request into a Redis where enough wait."""
CLOSE_S: Final = 2.0
DIRECT: Final = "amq.rabbitmq.reply-to."
"""Names of what is no queue but a connection that waits ("direct reply-to"); it is there or not, and nobody says so."""

REQUESTS = Counter("penstock_bridge_requests_total", "Requests taken from RabbitMQ: whole, or cut", ["outcome"])
RESPONSES = Counter("penstock_bridge_responses_total", "Responses, by what the bridge made of them", ["outcome"])
CONNECTED = Gauge("penstock_bridge_connected", "1 while the bridge is connected to RabbitMQ", ["direction"])
for _outcome in ("whole", "cut"):
    REQUESTS.labels(_outcome)  # a counter that begins at 1 shows no increase
for _outcome in ("published", "rerouted", "refused", "not_ours", "gone"):
    RESPONSES.labels(_outcome)

log = structlog.get_logger(__name__)


def build(settings: Settings) -> Amqp:
    """Return the bridge."""
    for name in ("aio_pika", "aiormq"):  # they quote messages; what matters of their troubles is told here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return Amqp(settings)


_strict: Final = ContentHeader.unmarshal


def _leniently(header: ContentHeader, data: bytes) -> None:
    """Read the properties of a message as far as they can be read; the rest counts as not given.

    A timestamp in milliseconds, say, or a text that is no UTF-8: no broker looks at them. The client would give up the
    connection, and the broker send the message again over the next one, for ever.
    """
    with suppress(Exception):
        _strict(header, data)


ContentHeader.unmarshal = _leniently  # type: ignore[assignment, method-assign]  # nobody else here reads AMQP


class Away(PenstockError):
    """RabbitMQ cannot be reached, or does not work for now."""


@dataclass(slots=True)
class _Session:
    """A connection that works, its channel, and the queue of this direction.

    Attributes:
        lost: set when the channel is closed, or its consumer was sent away.
    """

    channel: AbstractChannel
    queue: AbstractQueue
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Amqp(Loop):
    """Any number may run: the broker shares out requests, Redis responses."""

    name = "amqp"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._amqp = settings.amqp
        self._why: dict[str, str] = {}  # what does not work now
        self._was_let_in = False
        self._refused: set[bytes] = set()  # responses that the broker would not take, told of once
        self._redis = {
            side: Backoff(settings.redis.reconnect_cap_s, Outage(f"amqp {side}")) for side in ("requests", "responses")
        }
        self._ready = metrics.READY.labels(self.name)

    async def run(self, consumer: str, clock: Clock, stop: asyncio.Event) -> None:
        """Carry requests and responses until *stop*.

        Raises:
            ConfigError: RabbitMQ refuses the credentials in its address.
        """
        self._consumer, self._stop = consumer, stop
        self._link = Link(self._settings.redis, "bridge")
        self._stream = ResponseStream(self._settings.redis, self._amqp.name, consumer)
        sides = {
            "requests": (self._amqp.request_queue, self._carry_requests),
            "responses": (self._amqp.response_queue, self._carry_responses),
        }
        self._why = dict.fromkeys(sides, "connecting to RabbitMQ")
        self._say("requests", self._why["requests"])
        try:
            async with asyncio.TaskGroup() as group:
                for side, (queue, carry) in sides.items():
                    group.create_task(self._keep_up(side, queue, carry), name=f"amqp {side}")
        except ExceptionGroup as problems:
            raise problems.exceptions[0] from None
        finally:
            self._ready.set(0)
            await self._link.close()
            await self._stream.close()

    # --- requests --------------------------------------------------------------------------------

    async def _carry_requests(self, session: _Session) -> None:
        arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        with _of_broker():
            await session.channel.set_qos(prefetch_count=self._amqp.prefetch)
            await session.queue.consume(arrived.put)
        while True:
            message = await unless(arrived.get(), self._stop, session.lost)
            await self._take(message, session)

    async def _take(self, message: AbstractIncomingMessage, session: _Session) -> None:
        """Put a request into Redis, where whatever is wrong with it is found; then acknowledge it."""
        most = self._settings.reports.max_request_bytes
        # What is too long is put there as far as it takes to be refused for it, with its id where that stands in front.
        data = message.body if len(message.body) <= most else message.body[: most + 1]
        reply = Reply(self._amqp.name, message.reply_to or self._amqp.response_queue, message.correlation_id or None)

        async def put() -> bool:
            return await put_request(self._link, data, reply, self._amqp.max_waiting)

        while not await self._insist("requests", put, self._stop, session.lost):
            await unless(asyncio.sleep(FULL_AGAIN_S), self._stop, session.lost)
        REQUESTS.labels("whole" if data is message.body else "cut").inc()
        with _of_broker():
            await message.ack()

    # --- responses -------------------------------------------------------------------------------

    async def _carry_responses(self, session: _Session) -> None:
        events = (self._stop, session.lost)
        self._stream.look_again()
        while True:
            if entries := await unless(self._insist("responses", self._stream.take, *events), *events):
                await self._pass_on(entries, session)

    async def _pass_on(self, entries: Sequence[Entry], session: _Session) -> None:
        """Publish what is wanted on this side; forget that and what is not. What the broker refuses stays."""

        async def look() -> list[Response]:
            return await self._stream.responses(entries)

        done: list[Response] = []
        wanted: list[Response] = []
        for response in await self._insist("responses", look, self._stop, session.lost):
            if response.reply is not None:
                wanted.append(response)
            else:
                RESPONSES.labels("not_ours" if response.data else "gone").inc()
                self._refused.discard(response.entry)
                done.append(response)
        found = await asyncio.gather(*(self._publish(one, session) for one in wanted), return_exceptions=True)
        for response, outcome in zip(wanted, found, strict=True):
            if isinstance(outcome, str):
                RESPONSES.labels(outcome).inc()
                if outcome != "refused":
                    done.append(response)
                    self._refused.discard(response.entry)
        await self._insist("responses", lambda: self._stream.forget(done), self._stop)
        for problem in found:
            if isinstance(problem, BaseException):
                raise problem

    async def _publish(self, response: Response, session: _Session) -> str:
        """Publish a response and wait until the broker has it; return what became of it.

        Raises:
            Away: it may have it, or not.
        """
        assert response.reply is not None
        to, usual = response.reply.to, self._amqp.response_queue
        message = aio_pika.Message(
            response.data,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=response.request_id,
            correlation_id=response.reply.correlation_id,
            app_id="penstock",
        )
        try:
            if await _send(session, message, to):
                return "published"
            if to != usual:
                log.warning(
                    "nobody has the queue for a response any more", request_id=response.request_id, goes_to=usual
                )
                if await _send(session, message, usual):
                    return "rerouted"
        except broker_errors.DeliveryError:
            if response.entry not in self._refused:
                self._refused.add(response.entry)
                log.warning("rabbitmq refuses a response; it is tried again", request_id=response.request_id)
            return "refused"
        raise Away(f"the queue {usual} is gone")

    # --- what may be away ------------------------------------------------------------------------

    async def _keep_up(self, side: str, queue: str, carry: Callable[[_Session], Awaitable[None]]) -> None:
        """Carry one direction, over one connection after another, until told to stop."""
        outage, backoff, connected = Outage(f"amqp {side}", of="rabbitmq"), Backoff(AGAIN_S), CONNECTED.labels(side)
        while not self._stop.is_set():
            since_us: int | None = None
            try:
                async with self._connect(side, queue) as session:
                    since_us = monotonic_us()
                    outage.ends()
                    connected.set(1)
                    self._say(side, None)
                    try:
                        await carry(session)
                    except Stopped:
                        if not self._stop.is_set():
                            raise Away("the connection was closed") from None
            except Stopped:
                return
            except Away as error:
                outage.begins(error)
                self._say(side, f"RabbitMQ is away: {error}")
                if since_us is not None and monotonic_us() - since_us > STEADY_S * 1e6:
                    backoff.succeeded()
                with suppress(Stopped):
                    await unless(backoff.wait(), self._stop)
            finally:
                connected.set(0)

    @asynccontextmanager
    async def _connect(self, side: str, name: str) -> AsyncGenerator[_Session, None]:
        url = URL(self._amqp.url)
        ours = {"heartbeat": str(self._amqp.heartbeat_s), "name": f"penstock {self._consumer} {side}"}
        url = url.update_query({key: value for key, value in ours.items() if key not in url.query})
        try:
            with _of_broker():
                connection = await unless(aio_pika.connect(url, timeout=self._amqp.connect_timeout_s), self._stop)
        except ConfigError as error:
            if not self._was_let_in:
                raise
            raise Away(str(error)) from error  # it knew us before, so it may again
        self._was_let_in = True
        try:
            with _of_broker():
                session = await self._open(connection, name)
            yield session
        finally:
            with suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await connection.close()

    async def _open(self, connection: aio_pika.abc.AbstractConnection, name: str) -> _Session:
        channel = await connection.channel()
        try:
            queue = await channel.declare_queue(name, durable=True)
        except (broker_errors.ChannelPreconditionFailed, wire_errors.ChannelAccessRefused) as error:
            log.warning("the queue is not ours to declare; it is used as it is", queue=name, reason=str(error))
            channel = await connection.channel()
            queue = await channel.declare_queue(name, passive=True)
        session = _Session(channel, queue)
        channel.close_callbacks.add(lambda *_: session.lost.set())
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(lambda _: session.lost.set())
        return session

    async def _insist(self, side: str, call: Callable[[], Awaitable[A]], *events: asyncio.Event) -> A:
        """Return what Redis says, however long that takes; give up between two tries at one of *events*."""
        what, backoff = f"redis for {side}", self._redis[side]
        while True:
            try:
                answer = await call()
            except PenstockError as error:  # a key of a wrong type, too: an operator must act, and all waits
                self._say(what, str(error))
                await unless(backoff.failed(error), *events)
            else:
                backoff.succeeded()
                self._say(what, None)
                return answer

    def _say(self, what: str, not_ready: str | None) -> None:
        if not_ready is None:
            self._why.pop(what, None)
        else:
            self._why[what] = not_ready
        self.not_ready = "; ".join(sorted(set(self._why.values()))) or None
        self._ready.set(self.not_ready is None)


async def _send(session: _Session, message: aio_pika.Message, queue: str) -> bool:
    """Publish a message to a queue and wait for the confirm; False when there is no such queue.

    Raises:
        Away, DeliveryError: it may have it, or not; it would not take it.
    """
    with _of_broker():
        answer = await session.channel.default_exchange.publish(message, queue, mandatory=not queue.startswith(DIRECT))
    return not isinstance(answer, DeliveredMessage)


@contextmanager
def _of_broker() -> Generator[None, None, None]:
    """Translate what the client raises, a cancellation included that nobody of ours has asked for."""
    task = asyncio.current_task()
    assert task is not None
    asked = task.cancelling()
    try:
        yield
    except asyncio.CancelledError:
        if task.cancelling() > asked:
            raise
        raise Away("the connection was closed") from None
    except broker_errors.DeliveryError:
        raise
    except (broker_errors.AuthenticationError, broker_errors.ProbableAuthenticationError) as error:
        raise ConfigError(f"RabbitMQ refuses the credentials in RABBITMQ_URL: {error}") from error
    except (*broker_errors.CONNECTION_EXCEPTIONS, TimeoutError) as error:
        raise Away(str(error) or type(error).__name__) from error
