"""The provider `twilio` against a local Twilio: what arrives, and what each failure is taken for."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import pytest

from pipeline.errors import InDoubt, Reject, RetryLater
from pipeline.settings import TwilioSettings
from stages.http import Response
from stages.providers import Attachment, Outgoing, Sent
from stages.providers.twilio import CODES, Twilio, judge
from tests.deliveries import twilio as local
from tests.deliveries.certificates import Certificates
from tests.deliveries.letters import HIDDEN, PASSWORD, an_sms, assert_discreet
from tests.deliveries.twilio import ACCOUNT_SID, AUTH_TOKEN, MAGIC_FROM, MAGIC_TO, Options
from tests.receivers import receiving

KEY_SID = "SK" + "f" * 32


@asynccontextmanager
async def provider(url: str, **settings: Any) -> AsyncIterator[Twilio]:
    """Run the provider against the Twilio at *url*."""
    given = {"api_url": url, "account_sid": ACCOUNT_SID, "auth_token": AUTH_TOKEN, **settings}
    sender = Twilio(TwilioSettings.model_validate(given))
    await sender.start()
    try:
        yield sender
    finally:
        await sender.stop()


async def send(server: local.Twilio, message: Outgoing | None = None, **settings: Any) -> Sent:
    """Send one message."""
    async with provider(server.url, **settings) as sender:
        return await sender.send(message or an_sms())


def media(*urls: str) -> tuple[Attachment, ...]:
    return tuple(Attachment(f"{number}.png", "image/png", None, url) for number, url in enumerate(urls))


# --- What arrives --------------------------------------------------------------------------------


async def test_an_sms_arrives_with_all_that_twilio_needs() -> None:
    """As a form, by the account's token, and with the address where its fate is told."""
    message = an_sms(body="Grüße & 100% = 🙂", callback_url="https://us.example/api/v1/webhooks/twilio?delivery=1&x=2")
    async with local.twilio(Options(callbacks="none")) as server:
        sent = await send(server, message)
    [(_, form)] = server.requests
    assert form == {
        "To": [message.to],
        "From": [message.sender],
        "Body": [message.body],
        "StatusCallback": [message.callback_url],
    }
    [entry] = server.ledger.taken
    assert entry.provider_id == sent.provider_id
    assert sent.provider_id.startswith("SM")


async def test_an_mms_names_its_files_and_needs_no_text() -> None:
    """Twilio fetches them itself."""
    urls = ("https://files.example/a.png?x=1&y=2", "https://files.example/b.png")
    async with local.twilio() as server:
        sent = await send(server, an_sms(type="mms", body="", attachments=media(*urls)))
    [(_, form)] = server.requests
    assert form["MediaUrl"] == list(urls)
    assert "Body" not in form
    assert sent.provider_id.startswith("MM")


async def test_a_messaging_service_may_be_the_sender() -> None:
    """It is named otherwise in the form."""
    service = "MG" + "a" * 32
    async with local.twilio() as server:
        await send(server, an_sms(sender=service))
    assert server.requests[0][1]["MessagingServiceSid"] == [service]
    assert "From" not in server.requests[0][1]


async def test_an_api_key_takes_the_place_of_the_token() -> None:
    """It can be withdrawn without ending all others."""
    async with local.twilio(keys={KEY_SID: PASSWORD}) as server:
        await send(server, api_key_sid=KEY_SID, api_key_secret=PASSWORD)
    assert len(server.ledger.taken) == 1


async def test_a_certificate_is_looked_at(trust: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token goes to nobody but Twilio."""
    async with local.twilio(tls=trust.server) as server:
        with pytest.raises(RetryLater) as caught:
            await send(server)
        assert (caught.value.code, caught.value.charged) == ("unreachable", False)
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(trust.authority))
        await send(server)
    assert len(server.ledger.taken) == 1


# --- What failures are taken for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "number"),
    [
        ({"to": "+15005550001"}, "invalid_recipient", 21211),
        ({"to": "123"}, "invalid_recipient", 21211),
        ({"to": ""}, "invalid_recipient", 21604),
        ({"to": "+15005550002"}, "invalid_recipient", 21612),
        ({"to": "+15005550003"}, "region_not_allowed", 21408),
        ({"to": "+15005550004"}, "unsubscribed", 21610),
        ({"to": "+15005550009"}, "invalid_recipient", 21614),
        ({"sender": "+15005550001"}, "invalid_sender", 21212),
        ({"sender": "+15005550007"}, "invalid_sender", 21606),
        ({"sender": ""}, "invalid_sender", 21603),
        ({"body": ""}, "invalid_content", 21602),
        ({"body": "x" * 1601}, "too_large", 21617),
        ({"attachments": media("ftp://files.example/a.png")}, "invalid_attachment", 21620),
    ],
)
async def test_a_refusal_is_for_good_and_says_who_has_to_act(
    changes: dict[str, Any], code: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Twilio's words, which quote numbers, are kept; its code leads to its page."""
    caplog.set_level(logging.DEBUG)
    async with local.twilio() as server:
        with pytest.raises(Reject) as caught:
            await send(server, an_sms(**changes))
    assert (type(caught.value), caught.value.code) == (Reject, code)
    assert f"https://www.twilio.com/docs/errors/{number}" in str(caught.value)
    assert "+15005550" not in str(caught.value)
    assert server.ledger.taken == []
    assert_discreet(caught.value)
    assert not [word for word in (*HIDDEN, AUTH_TOKEN) if word in caplog.text]


async def test_a_wrong_token_is_for_good() -> None:
    """An account is named by 20003, and the token is not shown."""
    async with local.twilio() as server:
        with pytest.raises(Reject, match="20003") as caught:
            await send(server, auth_token=PASSWORD)
    assert caught.value.code == "unauthorized"
    assert_discreet(caught.value)


@pytest.mark.parametrize(
    "attachments",
    [media(*["https://files.example/a.png"] * 11), (Attachment("a.png", "image/png", b"1"),)],
)
async def test_attachments_that_twilio_cannot_fetch_are_refused_at_once(attachments: tuple[Attachment, ...]) -> None:
    """More than ten, or without an address."""
    async with local.twilio() as server:
        with pytest.raises(Reject) as caught:
            await send(server, an_sms(type="mms", attachments=attachments))
    assert caught.value.code == "invalid_attachment"
    assert server.requests == []


@pytest.mark.parametrize(
    ("fault", "code", "charged", "after_s"),
    [
        ("too_many", "rate_limited", False, 7.0),
        ("unavailable_for", "unavailable", False, 7.0),
        ("unavailable", "unavailable", True, None),
    ],
)
async def test_what_twilio_did_not_process_is_sent_again(
    fault: str, code: str, charged: bool, after_s: float | None
) -> None:
    """Where it asks for patience no attempt is charged."""
    async with local.twilio(Options(retry_after_s=7), script=[fault]) as server:
        with pytest.raises(RetryLater) as caught:
            await send(server)
    assert (caught.value.code, caught.value.charged, caught.value.after_s) == (code, charged, after_s)
    assert server.ledger.taken == []
    assert_discreet(caught.value)


async def test_a_full_queue_of_a_number_is_waited_for() -> None:
    """429 without a time: the next look is ours to choose, and charges nothing."""
    async with local.twilio() as server:
        with pytest.raises(RetryLater, match="21611") as caught:
            await send(server, an_sms(sender="+15005550008"))
    assert (caught.value.code, caught.value.charged, caught.value.after_s) == ("rate_limited", False, None)


@pytest.mark.parametrize(
    ("fault", "taken"),
    [
        ("internal", 0),
        ("internal_taken", 1),
        ("drop_read", 0),
        ("drop_taken", 1),
        ("drop_unread", 0),
        ("silent_taken", 1),
        ("garbled_taken", 1),
    ],
)
async def test_what_twilio_may_have_taken_is_a_doubt(fault: str, taken: int) -> None:
    """From here a message that was taken looks like one that was not: Twilio's own record tells them apart."""
    async with local.twilio(script=[fault]) as server:
        with pytest.raises(InDoubt) as caught:
            await send(server, timeout_s=0.3 if fault == "silent_taken" else 30, connect_timeout_s=2)
    assert len(server.ledger.taken) == taken
    assert caught.value.code == "outcome_unknown"
    assert_discreet(caught.value)


async def test_without_a_connection_no_attempt_is_charged() -> None:
    """Nothing was written, so nothing was taken."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        async with provider(f"http://127.0.0.1:{held.getsockname()[1]}") as sender:
            with pytest.raises(RetryLater) as caught:
                await sender.send(an_sms())
    assert (caught.value.code, caught.value.charged) == ("unreachable", False)
    assert_discreet(caught.value, sender)


@pytest.mark.parametrize(
    ("status", "body", "error", "code"),
    [
        (200, b'{"sid": "SM1"}', None, ""),
        (201, b"", InDoubt, "outcome_unknown"),
        (201, b"[]", InDoubt, "outcome_unknown"),
        (201, b'{"sid": null}', InDoubt, "outcome_unknown"),
        (302, b"", InDoubt, "outcome_unknown"),
        (400, b"no json", Reject, "refused"),
        (400, b'{"code": "21211"}', Reject, "refused"),
        (400, b'{"code": 99999}', Reject, "refused"),
        (401, b"", Reject, "unauthorized"),
        (403, b'{"code": 20403}', Reject, "unauthorized"),
        (404, b'{"code": 20404}', Reject, "refused"),
        (408, b"", RetryLater, "timeout"),
        (429, b"", RetryLater, "rate_limited"),
        (500, b'{"code": 20500}', InDoubt, "outcome_unknown"),
        (502, b"<html>", InDoubt, "outcome_unknown"),
        (503, b"<html>", RetryLater, "unavailable"),
        (504, b"<html>", InDoubt, "outcome_unknown"),
    ],
)
def test_every_answer_has_a_meaning(status: int, body: bytes, error: type[Reject] | None, code: str) -> None:
    """Also those that Twilio itself would not give, but something in between."""
    if error is None:
        assert judge(Response(status, {}, body)) == Sent("SM1")
        return
    with pytest.raises(error) as caught:
        judge(Response(status, {}, body))
    assert (type(caught.value), caught.value.code) == (error, code)


@pytest.mark.parametrize(
    ("value", "after_s"), [("5", 5.0), ("0", 0.0), ("86400", 3_600.0), ("soon", None), ("-1", None), ("", None)]
)
def test_a_wait_that_is_asked_for_is_bounded(value: str, after_s: float | None) -> None:
    """It holds the whole provider, so a slip must not do so for days."""
    with pytest.raises(RetryLater) as caught:
        judge(Response(429, {"retry-after": value}, b""))
    assert caught.value.after_s == after_s


def test_the_codes_of_the_test_credentials_are_known() -> None:
    """Each permanent one has a meaning of its own, not just `refused`."""
    given = [*MAGIC_TO.values(), *MAGIC_FROM.values()]
    assert [code for status, code, _ in given if status == 400 and code not in CODES] == []


async def test_who_is_cancelled_hangs_up() -> None:
    """At a deadline nothing stays open."""
    async with local.twilio(script=["silent_taken"]) as server:
        task = asyncio.create_task(send(server))
        await server.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.gone.wait()


# --- The local Twilio itself ---------------------------------------------------------------------


def test_the_local_twilio_signs_as_twilio_does() -> None:
    """The example of https://www.twilio.com/docs/usage/security, as Twilio's own library tests it."""
    fields = {
        "CallSid": "CA1234567890ABCDE",
        "Caller": "+14158675309",
        "Digits": "1234",
        "From": "+14158675309",
        "To": "+18005551212",
    }
    url = "https://mycompany.com/myapp.php?foo=1&bar=2"
    assert local.sign(url, fields, "12345") == "RSOYDt4T1cUTdK1PDd93/VVr8B8="


@pytest.mark.parametrize(
    ("way", "statuses"),
    [
        ("in_order", ["sent", "delivered"]),
        ("late", ["sent", "delivered"]),
        ("twice", ["sent", "sent", "delivered", "delivered"]),
        ("shuffled", ["delivered", "queued", "sending", "sent"]),
    ],
)
async def test_the_local_twilio_tells_what_became_of_a_message(way: str, statuses: list[str]) -> None:
    """To the address that the message named, signed over the address as it was named."""
    async with receiving() as receiver:
        named = "https://us.example/api/v1/webhooks/twilio?delivery=abc"
        base = receiver.url.removesuffix("/hook")
        async with local.twilio(Options(callbacks=way, callback_base=base, late_s=0.01)) as server:
            sent = await send(server, an_sms(callback_url=named))
            await server.settled()
    forms = [{name: value[0] for name, value in parse_qs(news.raw.decode()).items()} for news in receiver.got]
    got = [form["MessageStatus"] for form in forms]
    assert (sorted(got) if way == "shuffled" else got) == statuses
    assert {form["MessageSid"] for form in forms} == {sent.provider_id}
    assert {news.path for news in receiver.got} == {"/api/v1/webhooks/twilio?delivery=abc"}
    for news, form in zip(receiver.got, forms, strict=True):
        assert news.headers["x-twilio-signature"] == local.sign(named, form)
    assert [(told.status, told.answered) for told in server.told] == [(status, 204) for status in got]
