"""The provider `http` against a gateway of one's own: what arrives, and what each answer is taken for."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from pipeline.errors import ConfigError, InDoubt, Reject, RetryLater
from pipeline.settings import HttpProviderSettings
from stages.providers import Attachment, Sent
from stages.providers.http import Http
from tests.deliveries.letters import PASSWORD, an_email, an_sms, assert_discreet
from tests.receivers import Behaviour, Receiver, answer, receiving, say, stay_silent


@asynccontextmanager
async def provider(url: str, **settings: Any) -> AsyncIterator[Http]:
    """Run the provider against the gateway at *url*."""
    http = Http(HttpProviderSettings.model_validate({"url": url, **settings}))
    await http.start()
    try:
        yield http
    finally:
        await http.stop()


async def send(receiver: Receiver, **settings: Any) -> Sent:
    """Send one message."""
    async with provider(receiver.url, **settings) as http:
        return await http.send(an_sms())


async def test_a_delivery_arrives_whole_and_under_its_id() -> None:
    """The gateway can tell a repetition by it."""
    files = (Attachment("Grüße.bin", "application/octet-stream", bytes(range(256))), Attachment("b", "a/b", None, "u"))
    message = an_email(html="<p>hello</p>", attachments=files, metadata={"order": [1, None]})
    async with receiving([answer(200, body=b'{"id": "gw-1"}')]) as receiver, provider(receiver.url) as http:
        sent = await http.send(message)
    [news] = receiver.got
    assert news.headers["idempotency-key"] == news.headers["x-request-id"] == message.id
    body = json.loads(news.raw)
    content = base64.b64encode(bytes(range(256))).decode()
    assert body == {
        "id": message.id,
        "type": "email",
        "from": message.sender,
        "to": message.to,
        "subject": message.subject,
        "body": message.body,
        "html": message.html,
        "attachments": [
            {"filename": "Grüße.bin", "content_type": "application/octet-stream", "content": content, "url": None},
            {"filename": "b", "content_type": "a/b", "content": None, "url": "u"},
        ],
        "metadata": {"order": [1, None]},
    }
    assert sent == Sent("gw-1")


async def test_the_key_goes_along() -> None:
    """As a bearer token."""
    async with receiving() as receiver:
        assert await send(receiver, api_key=PASSWORD) == Sent("")
    assert receiver.got[0].headers["authorization"] == f"Bearer {PASSWORD}"


def test_a_key_that_no_header_can_carry_is_told_at_start() -> None:
    """And is not shown."""
    with pytest.raises(ConfigError, match="PENSTOCK_HTTP_PROVIDER__API_KEY") as caught:
        Http(HttpProviderSettings.model_validate({"url": "https://gw.example", "api_key": PASSWORD + "\n"}))
    assert_discreet(caught.value)


@pytest.mark.parametrize(
    ("behaviour", "error", "code", "charged", "after_s"),
    [
        (answer(400), Reject, "refused", None, None),
        (answer(422, body=b'{"error": {"code": "invalid_recipient"}}'), Reject, "invalid_recipient", None, None),
        (answer(422, body=b'{"error": {"code": "To +14155550101!"}}'), Reject, "refused", None, None),
        (answer(422, body=b'{"error": "no"}'), Reject, "refused", None, None),
        (answer(422, body=b'{"error": {"code": "reason_4812"}}'), Reject, "refused", None, None),
        (answer(422, body=b'{"error": {"code": "outcome_unknown"}}'), Reject, "refused", None, None),
        (answer(401), Reject, "unauthorized", None, None),
        (answer(403), Reject, "unauthorized", None, None),
        (answer(404), Reject, "refused", None, None),
        (answer(413), Reject, "too_large", None, None),
        (answer(307, "location: /x"), Reject, "refused", None, None),
        (answer(408), RetryLater, "gateway_error", True, None),
        (answer(425), RetryLater, "gateway_error", True, None),
        (answer(429), RetryLater, "rate_limited", False, None),
        (answer(429, "retry-after: 9"), RetryLater, "rate_limited", False, 9.0),
        (answer(503, "retry-after: 9"), RetryLater, "unavailable", False, 9.0),
        (answer(503), RetryLater, "unavailable", True, None),
        (answer(500), RetryLater, "gateway_error", True, None),
        (answer(409), InDoubt, "outcome_unknown", None, None),
        (answer(502), InDoubt, "outcome_unknown", None, None),
        (answer(504), InDoubt, "outcome_unknown", None, None),
        (say(b""), InDoubt, "outcome_unknown", None, None),
        (say(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"), InDoubt, "outcome_unknown", None, None),
        (say(b"220 mail.test ESMTP\r\n"), InDoubt, "outcome_unknown", None, None),
        (stay_silent, InDoubt, "outcome_unknown", None, None),
    ],
)
async def test_an_answer_is_taken_for_what_it_says(
    behaviour: Behaviour, error: type[Reject | RetryLater], code: str, charged: bool | None, after_s: float | None
) -> None:
    """And no answer for a doubt, which is asked again, since the gateway knows a message that comes again."""
    silent = behaviour is stay_silent
    async with receiving([behaviour]) as receiver:
        with pytest.raises(error) as caught:
            await send(receiver, timeout_s=0.2 if silent else 30, connect_timeout_s=2 if silent else 5)
    assert isinstance(caught.value, Reject | RetryLater)
    assert (type(caught.value), caught.value.code) == (error, code)
    if isinstance(caught.value, RetryLater):
        assert (caught.value.charged, caught.value.after_s) == (charged, after_s)
    assert_discreet(caught.value)


async def test_without_a_connection_no_attempt_is_charged() -> None:
    """Nothing was written."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        async with provider(f"http://127.0.0.1:{held.getsockname()[1]}") as http:
            with pytest.raises(RetryLater) as caught:
                await http.send(an_sms())
    assert (caught.value.code, caught.value.charged) == ("unreachable", False)


@pytest.mark.parametrize("then", ["nobody listens", "429", "200"])
async def test_a_kept_connection_that_ends_may_have_carried_the_request(then: str) -> None:
    """It is posted again at once; where that does not say how it stands, the first time is not forgotten."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split()[0])
                requests.append(await reader.readexactly(length))
                if len(requests) == 2:  # over the kept connection: read, and never answered
                    if then == "nobody listens":
                        server.close()
                    break
                status = b"429" if len(requests) == 3 and then == "429" else b"200"
                writer.write(b"HTTP/1.1 " + status + b" X\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, provider(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as http:
        await http.send(an_sms())
        if then == "200":
            assert await http.send(an_sms()) == Sent("")
        else:
            with pytest.raises(InDoubt):
                await http.send(an_sms())
    assert len(requests) == (2 if then == "nobody listens" else 3)


async def test_who_is_cancelled_hangs_up() -> None:
    """At a deadline nothing stays open."""
    async with receiving([stay_silent]) as receiver:
        task = asyncio.create_task(send(receiver))
        await receiver.told.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await receiver.gone.wait()
