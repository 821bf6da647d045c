"""The bridge to RabbitMQ: nothing that was acknowledged is lost, nothing is answered twice, whatever goes away."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from struct import pack
from typing import Any

import aio_pika
import orjson
import pytest
import structlog
from aio_pika.exceptions import DeliveryError

from pipeline import group_reader, keys
from pipeline.bridge import Reply, Response, ResponseStream, put_request
from pipeline.connection import Link
from pipeline.errors import ConfigError
from pipeline.settings import Settings
from pipeline.stage import Loop
from stages import amqp
from stages.__main__ import build
from stages.amqp import RESPONSES, Amqp
from stages.report import Requests
from tests.amqp.backend import PATIENT, BackEnd, back_end
from tests.conftest import PATIENCE_S, short_settings, wait_until
from tests.rabbitmq import RabbitServer
from tests.rig import Mortal, changed, letters
from tests.servers import RedisServer

BAD = PATIENT | {"age": -3}
"""Inputs that are refused at once, so that a response comes without any worker of the route."""
SECONDS = 1_764_384_000


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is told to stop waits for its blocked read no longer than needed; what was left is found soon."""
    monkeypatch.setattr(group_reader, "BLOCK_MS", 50)
    monkeypatch.setattr(group_reader, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(amqp, "AGAIN_S", 0.2)


@pytest.fixture
async def backend(rabbitmq: RabbitServer) -> AsyncIterator[BackEnd]:
    async with back_end(rabbitmq.url) as one:
        yield one


@pytest.fixture
def settings(settings: Settings, rabbitmq: RabbitServer, backend: BackEnd) -> Settings:
    return towards(settings, rabbitmq, backend)


def towards(settings: Settings, rabbitmq: RabbitServer, backend: BackEnd) -> Settings:
    """Return settings of a bridge between this broker's queues and Redis."""
    queues = {"request_queue": backend.requests, "response_queue": backend.responses}
    return changed(settings, amqp={"url": rabbitmq.url, "connect_timeout_s": 30.0, **queues})


@asynccontextmanager
async def running(settings: Settings, *loops: Loop) -> AsyncIterator[list[Mortal]]:
    """Run loops, one process each; the bridge alone where none is named. At the end they drain."""
    consumers = [Mortal([], settings, loops=[loop]) for loop in loops or [Amqp(settings)]]
    async with asyncio.TaskGroup() as group:
        for consumer in consumers:
            consumer.task = group.create_task(consumer.run())
        await ready(consumers)
        try:
            yield consumers
        finally:
            for consumer in consumers:
                consumer.stop()


async def ready(consumers: Sequence[Mortal]) -> None:
    await wait_until(lambda: all(loop.not_ready is None for one in consumers for loop in one._loops))


async def heard(backend: BackEnd, number: int) -> None:
    await wait_until(lambda: len(backend.heard) >= number)


async def replies(link: Link) -> int:
    """How many responses Redis knows to be wanted somewhere."""
    return len(await link.call("KEYS", keys.REPORT_REPLY + "*"))


async def pending(link: Link, bridge: str = "amqp") -> int:
    """How many responses are in the hands of bridges."""
    return int((await link.call("XPENDING", keys.REPORT_RESPONSES, f"bridge:{bridge}"))[0])


async def taken(link: Link) -> int:
    return int(await link.call("XLEN", keys.REPORT_REQUESTS))


def counted(outcome: str) -> float:
    return float(RESPONSES.labels(outcome)._value.get())


# --- the way there and back --------------------------------------------------------------------


async def test_a_request_is_answered_where_it_came_from(link: Link, settings: Settings, backend: BackEnd) -> None:
    """As a lasting message with the id of the request; nothing stays anywhere."""
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        await backend.ask("r1", inputs=BAD, correlation_id="c1")
        await backend.ask("r2", inputs=BAD)
        await heard(backend, 2)
        found = backend.answers()
        assert found["r1"]["status"] == "error"
        assert found["r1"]["error_message"].startswith("invalid_field: inputs.age: ")
        [first, second] = sorted(backend.heard, key=lambda message: str(message.message_id))
        assert (first.correlation_id, second.correlation_id) == ("c1", None)
        assert first.content_type == "application/json"
        assert first.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
        await wait_until(lambda: _is_settled(link))
    assert await backend.waiting(backend.requests) == 0  # what is not acknowledged is there again


async def _is_settled(link: Link) -> bool:
    return await replies(link) == 0 and await pending(link) == 0


async def test_reply_to_is_honoured(link: Link, settings: Settings, backend: BackEnd) -> None:
    """The response goes there, and not where others are."""
    own = await backend.channel.declare_queue(exclusive=True)
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.ask("r1", inputs=BAD, reply_to=own.name, correlation_id="c1")
        await wait_until(lambda: _holds(backend, own.name, 1))
        found = await own.get()
        assert found is not None
        assert (found.message_id, found.correlation_id) == ("r1", "c1")
        assert await backend.waiting(backend.responses) == 0


async def _holds(backend: BackEnd, queue: str, number: int) -> bool:
    return await backend.waiting(queue) == number


async def test_direct_reply_to_is_honoured(link: Link, settings: Settings, backend: BackEnd) -> None:
    """RabbitMQ's own name for a connection that waits; whoever has gone misses the response, and holds up nobody."""
    async with running(settings, Amqp(settings), Requests(settings)):
        heard_directly: asyncio.Queue[Any] = asyncio.Queue()
        direct = await backend.channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
        tag = await direct.consume(heard_directly.put, no_ack=True)
        await backend.ask("r1", inputs=BAD, reply_to="amq.rabbitmq.reply-to")
        async with asyncio.timeout(PATIENCE_S):
            assert (await heard_directly.get()).message_id == "r1"
        await direct.cancel(tag)
        await wait_until(lambda: _is_settled(link))
        await backend.listen()
        await backend.ask("r2", inputs=BAD, reply_to="amq.rabbitmq.reply-to.nobody")
        await backend.ask("r3", inputs=BAD)
        await heard(backend, 1)
        await wait_until(lambda: _is_settled(link))
        assert list(backend.answers()) == ["r3"]


async def test_a_response_for_a_queue_that_is_gone_goes_where_others_go(
    link: Link, settings: Settings, backend: BackEnd
) -> None:
    """Better there than nowhere."""
    before = counted("rerouted")
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        await backend.ask("r1", inputs=BAD, reply_to=f"gone-{backend.responses}")
        await heard(backend, 1)
        assert list(backend.answers()) == ["r1"]
        await wait_until(lambda: counted("rerouted") == before + 1)  # the broker says so a little later


async def test_what_was_asked_elsewhere_is_not_published(link: Link, settings: Settings, backend: BackEnd) -> None:
    """It may be about people whom those behind this broker have nothing to do with."""
    other = changed(settings, amqp={"name": "other"})
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        body = {"request_id": "direct", "user_id": "ann", "inputs": BAD}
        await link.call("XADD", keys.REPORT_REQUESTS, "*", "data", orjson.dumps(body))
        theirs = Reply("other", backend.responses).encode()
        await link.call(
            "XADD", keys.REPORT_REQUESTS, "*", "data", orjson.dumps(body | {"request_id": "theirs"}), "reply", theirs
        )
        await link.call("XADD", keys.REPORT_RESPONSES, "*", "data", "no response at all")
        await backend.ask("mine", inputs=BAD)
        await heard(backend, 1)
        await wait_until(lambda: _has_passed(link, 4))
        assert list(backend.answers()) == ["mine"]
        async with running(other):
            await heard(backend, 2)  # the other bridge finds what is its own, however late it comes
            assert list(backend.answers()) == ["mine", "theirs"]


async def _has_passed(link: Link, number: int) -> bool:
    return await pending(link) == 0 and int(await link.call("XLEN", keys.REPORT_RESPONSES)) == number


async def test_a_repeated_request_is_answered_once(link: Link, settings: Settings, backend: BackEnd) -> None:
    """Before the response and after it, with another correlation id too."""
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        for _ in range(3):
            await backend.ask("r1", inputs=BAD)
        await heard(backend, 1)
        await wait_until(lambda: _is_settled(link))
        await backend.ask("r1", inputs=BAD, correlation_id="late")
        await backend.ask("r2", inputs=BAD)
        await heard(backend, 2)
        assert sorted(backend.answers()) == ["r1", "r2"]
        assert await link.call("HGET", keys.REPORT_COUNTS, "repeated") == b"3"
        await wait_until(lambda: _is_settled(link))


# --- what is wrong with a request ----------------------------------------------------------------


async def test_a_body_that_cannot_be_read_is_answered_where_its_id_can_be(
    link: Link, settings: Settings, backend: BackEnd
) -> None:
    """As on the stream: it is a dead letter in any case, and holds up nobody."""
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        for body in (b"", b"\xff\xfe", b"[]", b'{"user_id": "ann"}', b'{"request_id": "r1", "user_id": '):
            await backend.send(body)
        await backend.ask("r2", inputs=BAD)
        await heard(backend, 2)
        assert backend.answers()["r1"]["error_message"].startswith("not_json: ")
        await wait_until(lambda: _has_letters(link, 5))
        reasons = {letter["reason"] for letter in await letters(link)}
        assert reasons == {"not_json", "not_a_request", "bad_request_id"}
        await wait_until(lambda: _is_settled(link))


async def _has_letters(link: Link, number: int) -> bool:
    return len(await letters(link)) == number


async def test_a_huge_body_is_refused_and_not_kept(link: Link, settings: Settings, backend: BackEnd) -> None:
    """Redis gets no more of it than it takes to say so."""
    settings = changed(settings, reports={"max_request_bytes": 10_000})
    body = {"request_id": "r1", "user_id": "ann", "inputs": PATIENT | {"notes": "x" * 5_000_000}}
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        await backend.send(orjson.dumps(body))
        await heard(backend, 1)
        assert backend.answers()["r1"]["error_message"] == "too_large: a request has at most 10000 bytes"
        [letter] = await letters(link)
        assert (letter["reason"], len(letter["original"])) == ("too_large", 10_001)


async def test_properties_that_cannot_be_read_hold_up_nobody(link: Link, settings: Settings, backend: BackEnd) -> None:
    """No broker looks at them; what can be read of them counts."""
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        await _publish_oddly(backend, "r1", (b"plain", b"pl\xe4in"))
        await _publish_oddly(backend, "r2", (pack(">Q", SECONDS), pack(">Q", 1000 * SECONDS)))
        await backend.ask("r3", inputs=BAD)
        await heard(backend, 3)
        assert sorted(backend.answers()) == ["r1", "r2", "r3"]
        found = {message.message_id: message.correlation_id for message in backend.heard}
        assert found == {"r1": None, "r2": "plain", "r3": None}


# --- what may be away ----------------------------------------------------------------------------


async def test_what_redis_has_no_room_for_stays_in_rabbitmq(link: Link, settings: Settings, backend: BackEnd) -> None:
    """So many requests wait in Redis, and no more."""
    settings = changed(settings, amqp={"max_waiting": 2, "prefetch": 3})
    async with running(settings):
        await backend.listen()
        for number in range(10):
            await backend.ask(f"r{number}", inputs=BAD)
        await wait_until(lambda: _holds(backend, backend.requests, 5))  # 3 more are in hand
        assert await taken(link) == 2
        async with running(settings, Requests(settings)):
            await heard(backend, 10)
            assert len(backend.answers()) == 10


async def test_requests_wait_in_rabbitmq_while_redis_is_away(rabbitmq: RabbitServer, backend: BackEnd) -> None:
    """What was asked before and during the outage is answered after it, once."""
    with RedisServer(appendonly=True, appendfsync="always") as server:
        settings = towards(short_settings(server), rabbitmq, backend)
        bridge = Amqp(settings)
        async with running(settings, bridge, Requests(settings)) as consumers:
            await backend.listen()
            await backend.ask("before", inputs=BAD)
            await heard(backend, 1)
            server.kill()
            await backend.ask("during", inputs=BAD)
            await wait_until(lambda: "Redis" in str(bridge.not_ready))
            server.start()
            await backend.ask("after", inputs=BAD)
            await heard(backend, 3)
            assert sorted(backend.answers()) == ["after", "before", "during"]
            await ready(consumers)


@pytest.mark.parametrize("crash", [True, False], ids=["crash", "restart"])
async def test_responses_wait_in_redis_while_the_broker_is_away(
    rabbitmq: RabbitServer, link: Link, settings: Settings, backend: BackEnd, crash: bool
) -> None:
    """What the broker was told to keep is there when it is back, and what it missed comes then."""
    bridge = Amqp(settings)
    async with running(settings, bridge) as consumers:
        await backend.ask("taken", inputs=BAD)
        await wait_until(lambda: _has_taken(link, 1))
        if crash:
            rabbitmq.kill()
        else:
            rabbitmq.stop()
        await wait_until(lambda: "RabbitMQ" in str(bridge.not_ready))
        async with running(settings, Requests(settings)):
            await wait_until(lambda: _has_answered(link, 1))
            rabbitmq.launch()
            await wait_until(rabbitmq.answers, timeout_s=rabbitmq.start_timeout_s, every_s=0.1)
            async with back_end(rabbitmq.url, backend.requests, backend.responses) as again:
                await again.listen()
                await again.ask("new", inputs=BAD)
                await heard(again, 2)
                assert sorted(again.answers()) == ["new", "taken"]
                await wait_until(lambda: _is_settled(link))
                await ready(consumers)


async def _has_taken(link: Link, number: int) -> bool:
    return await taken(link) == number


async def _has_answered(link: Link, number: int) -> bool:
    return int(await link.call("XLEN", keys.REPORT_RESPONSES)) == number


async def test_a_broker_that_falls_silent_is_given_up(
    rabbitmq: RabbitServer, link: Link, settings: Settings, backend: BackEnd
) -> None:
    """It holds its connections and says nothing, in the middle of a response; heartbeats tell."""
    settings = changed(settings, amqp={"heartbeat_s": 1})
    bridge = Amqp(settings)
    async with running(settings, bridge) as consumers:
        await backend.ask("r1", inputs=BAD)
        await wait_until(lambda: _has_taken(link, 1))
        rabbitmq.pause()
        try:
            async with running(settings, Requests(settings)):
                await wait_until(lambda: _has_answered(link, 1))
                await wait_until(lambda: "RabbitMQ" in str(bridge.not_ready))
                assert await pending(link) == 1
        finally:
            rabbitmq.resume()
        await ready(consumers)
        await backend.listen()
        await wait_until(lambda: _is_settled(link))
        await heard(backend, 1)
    assert {message.message_id for message in backend.heard} == {"r1"}  # twice, where it had the first one after all


async def test_a_queue_that_was_deleted_is_made_again(link: Link, settings: Settings, backend: BackEnd) -> None:
    """Somebody who deletes it sends the bridge away, which comes back."""
    async with running(settings, Amqp(settings), Requests(settings)):
        await wait_until(lambda: _is_read(backend, backend.requests))
        await backend.channel.queue_delete(backend.requests)
        await wait_until(lambda: _is_there(backend, backend.requests))
        await backend.channel.queue_delete(backend.responses)
        await backend.ask("r1", inputs=BAD)
        await wait_until(lambda: _is_there(backend, backend.responses))
        await backend.listen()
        await heard(backend, 1)
        assert list(backend.answers()) == ["r1"]


async def _is_read(backend: BackEnd, queue: str) -> bool:
    found = await backend.channel.declare_queue(queue, passive=True)
    return found.declaration_result.consumer_count == 1


async def _is_there(backend: BackEnd, queue: str) -> bool:
    async with back_end_of(backend) as channel:
        try:
            await channel.declare_queue(queue, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return False
        return True


@asynccontextmanager
async def back_end_of(backend: BackEnd) -> AsyncIterator[Any]:
    """A channel that may be closed by what is tried on it."""
    connection: Any = backend.channel._connection  # type: ignore[attr-defined]  # its abstract class does not show it
    channel = await connection.channel()
    try:
        yield channel
    finally:
        if not channel.is_closed:
            await channel.close()


async def test_a_queue_of_somebody_else_is_used_as_it_is(link: Link, settings: Settings, backend: BackEnd) -> None:
    """Back ends that cannot change have made theirs in their own way."""
    await backend.channel.declare_queue(backend.requests, durable=True, arguments={"x-max-length": 1000})
    with structlog.testing.capture_logs() as lines:
        async with running(settings, Amqp(settings), Requests(settings)):
            await backend.listen()
            await backend.ask("r1", inputs=BAD)
            await heard(backend, 1)
    [line] = [line for line in lines if "not ours to declare" in line["event"]]
    assert line["queue"] == backend.requests
    assert "x-max-length" in line["reason"]


async def test_what_the_broker_refuses_stays_and_others_pass(link: Link, settings: Settings, backend: BackEnd) -> None:
    """A full queue says no: the response is tried again until there is room."""
    full = f"full-{backend.responses}"
    limit: dict[str, Any] = {"x-max-length": 1, "x-overflow": "reject-publish"}
    queue = await backend.channel.declare_queue(full, durable=True, arguments=limit)
    await backend.channel.default_exchange.publish(aio_pika.Message(b"in the way"), full)
    with pytest.raises(DeliveryError):
        await backend.channel.default_exchange.publish(aio_pika.Message(b"no room"), full)
    before = counted("refused")
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        await backend.ask("r1", inputs=BAD, reply_to=full)
        await wait_until(lambda: counted("refused") > before)
        await backend.ask("r2", inputs=BAD)
        await heard(backend, 1)
        assert list(backend.answers()) == ["r2"]
        in_the_way = await queue.get(no_ack=True)
        assert in_the_way is not None
        await wait_until(lambda: _holds(backend, full, 1))
        found = await queue.get(no_ack=True)
        assert found is not None
        assert found.message_id == "r1"
        await wait_until(lambda: _is_settled(link))


# --- crashes -------------------------------------------------------------------------------------


async def test_a_crash_before_the_acknowledgement_of_a_request_asks_nothing_twice(
    link: Link, settings: Settings, backend: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker gives the request to the next bridge; it is known."""
    put, reached = put_request, asyncio.Event()

    async def put_and_die(*args: Any) -> bool:
        await put(*args)
        reached.set()
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(amqp, "put_request", put_and_die)
    async with running(settings) as [doomed]:
        await backend.ask("r1", inputs=BAD)
        await reached.wait()
        await doomed.crash()
    monkeypatch.setattr(amqp, "put_request", put)
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        await backend.ask("r2", inputs=BAD)
        await heard(backend, 2)
        await wait_until(lambda: _has_repeated(link, 1))
        assert sorted(backend.answers()) == ["r1", "r2"]


async def _has_repeated(link: Link, number: int) -> bool:
    return int(await link.call("HGET", keys.REPORT_COUNTS, "repeated") or 0) == number


async def test_a_crash_after_the_confirm_is_seen_by_the_message_id(
    link: Link, settings: Settings, backend: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMQP knows no better: the heir publishes it again, under the same id, and receivers drop the second."""
    forget, reached = ResponseStream.forget, asyncio.Event()

    async def die(_stream: ResponseStream, _responses: Sequence[Response]) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(ResponseStream, "forget", die)
    await backend.channel.declare_queue(backend.responses, durable=True)
    async with running(settings, Amqp(settings), Requests(settings)) as [doomed, _]:
        await backend.ask("r1", inputs=BAD)
        async with asyncio.timeout(PATIENCE_S):
            await reached.wait()
        await doomed.crash()
    monkeypatch.setattr(ResponseStream, "forget", forget)
    await backend.listen()
    async with running(settings):
        await heard(backend, 2)
        await wait_until(lambda: _is_settled(link))
    assert [message.message_id for message in backend.heard] == ["r1", "r1"]
    assert backend.heard[0].body == backend.heard[1].body


async def test_two_bridges_share_the_work(link: Link, settings: Settings, backend: BackEnd) -> None:
    """Each response goes through one of them."""
    settings = changed(settings, amqp={"prefetch": 1})
    async with running(settings, Amqp(settings), Amqp(settings), Requests(settings)):
        await backend.listen()
        for number in range(40):
            await backend.ask(f"r{number}", inputs=BAD)
        await heard(backend, 40)
        await wait_until(lambda: _is_settled(link))
        assert len(backend.answers()) == 40


async def test_who_is_told_to_stop_gives_back_what_is_not_in_redis(
    link: Link, settings: Settings, backend: BackEnd
) -> None:
    """Nothing is left in its hands, and nothing is asked twice."""
    settings = changed(settings, amqp={"max_waiting": 1, "prefetch": 5})
    async with running(settings):
        for number in range(6):
            await backend.ask(f"r{number}", inputs=BAD)
        await wait_until(lambda: _has_taken(link, 1))
        await wait_until(lambda: _holds(backend, backend.requests, 0))
    await wait_until(lambda: _holds(backend, backend.requests, 5))
    assert await taken(link) == 1


async def test_a_response_that_was_deleted_meanwhile_holds_up_nobody(
    link: Link, settings: Settings, backend: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trimmed by its age, or with all of a person's data, while it was in the hands of a bridge that died."""
    reached = asyncio.Event()
    look = ResponseStream.responses

    async def die(_stream: ResponseStream, _entries: Any) -> list[Response]:
        reached.set()
        return await asyncio.Future()

    monkeypatch.setattr(ResponseStream, "responses", die)
    async with running(settings, Amqp(settings), Requests(settings)) as [doomed, _]:
        await backend.ask("r1", inputs=BAD)
        async with asyncio.timeout(PATIENCE_S):
            await reached.wait()
        await doomed.crash()
        assert await pending(link) == 1
        await link.call("XTRIM", keys.REPORT_RESPONSES, "MAXLEN", 0)
    monkeypatch.setattr(ResponseStream, "responses", look)
    async with running(settings, Amqp(settings), Requests(settings)):
        await backend.listen()
        await backend.ask("r2", inputs=BAD)
        await heard(backend, 1)
        await wait_until(lambda: _holds_nothing(link))
        assert list(backend.answers()) == ["r2"]
    assert await link.call("PTTL", keys.REPORT_REPLY + "r1") > 0  # it goes in its time


async def _holds_nothing(link: Link) -> bool:
    return await pending(link) == 0


# --- what an operator sees -----------------------------------------------------------------------


async def test_wrong_credentials_are_said_at_once(link: Link, settings: Settings, rabbitmq: RabbitServer) -> None:
    """And the password is not."""
    wrong = changed(settings, amqp={"url": rabbitmq.url.replace("guest:guest", "guest:swordfish")})
    with pytest.raises(ConfigError) as refused:
        await Mortal([], wrong, loops=[Amqp(wrong)]).run()
    assert "RABBITMQ_URL" in str(refused.value)
    assert "swordfish" not in str(refused.value)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that helps."""
    monkeypatch.setitem(sys.modules, "aio_pika", None)
    monkeypatch.delitem(sys.modules, "stages.amqp")
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[amqp\]'"):
        build("amqp", Settings())


def test_where_a_response_is_wanted_is_read_as_it_was_written() -> None:
    """And what somebody else has written there is nobody's."""
    for reply in (Reply("amqp", "responses"), Reply("other", "ä" * 127, "c1")):
        assert Reply.decode(reply.encode()) == reply
    strange = [
        b"{", b"[]", b"{}", b'{"bridge": "a", "to": 1}', b'{"bridge": "a", "to": ""}', b'{"bridge": "a"}',
        b'{"bridge": "a", "to": "b", "correlation_id": 3}', b'{"bridge": "a", "to": "b", "more": 3}',
        Reply("amqp", "x" * 256).encode(), Reply("amqp", "ä" * 128).encode(),
    ]  # fmt: skip
    for text in (None, b"", *strange):
        assert Reply.decode(text) is None


class _Odd:
    """Properties as a client may send them that thinks otherwise: an id in Latin-1, or milliseconds for seconds."""

    message_id = "m1"

    def __init__(self, *replace: tuple[bytes, bytes]) -> None:
        self._replace = replace

    def marshal(self) -> bytes:
        plain = aio_pika.Message(b"", message_id=self.message_id, correlation_id="plain", timestamp=SECONDS).properties
        said = plain.marshal()
        for old, new in self._replace:
            assert old in said
            said = said.replace(old, new)
        return said


async def _publish_oddly(backend: BackEnd, request_id: str, *replace: tuple[bytes, bytes]) -> None:
    underlay = await backend.channel.get_underlay_channel()
    properties: Any = _Odd(*replace)
    body = orjson.dumps({"request_id": request_id, "user_id": "ann", "inputs": BAD})
    await underlay.basic_publish(body, routing_key=backend.requests, properties=properties)
