"""The provider `smtp` against real mail servers: what arrives, and what each failure is taken for."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from pipeline.errors import InDoubt, Reject, RetryLater
from pipeline.settings import SmtpSettings
from stages.providers import Attachment, Outgoing, Sent
from stages.providers import smtp as provider_smtp
from stages.providers.smtp import ASIDE_BYTES, COMPOSERS, PIECE_BYTES, Mail, Smtp, _within, compose
from tests.conftest import wait_until
from tests.deliveries.certificates import Certificates
from tests.deliveries.letters import HIDDEN, PASSWORD, an_email, assert_discreet
from tests.deliveries.smtp import DEAFNESS, HANG_UP, SILENCE, MailServer, Scripted, mail_server, scripted

LOGIN = ("ann", PASSWORD)


@asynccontextmanager
async def provider(
    server: MailServer | Scripted, trust: Certificates | None = None, **settings: Any
) -> AsyncIterator[Smtp]:
    """Run the provider against *server*; without *trust* in the clear."""
    given = {"host": server.host, "port": server.port, "tls": "starttls" if trust else "none", **settings}
    smtp = Smtp(SmtpSettings.model_validate(given), tls=trust.client if trust else None)
    await smtp.start()
    try:
        yield smtp
    finally:
        await smtp.stop()


async def send(server: MailServer | Scripted, message: Outgoing | None = None, **settings: Any) -> Sent:
    """Send one email in the clear."""
    async with provider(server, **settings) as smtp:
        return await smtp.send(message or an_email())


# --- What arrives --------------------------------------------------------------------------------


async def test_an_email_arrives_over_starttls_by_who_has_logged_in(trust: Certificates) -> None:
    """All that was said is said again, and nothing was said in the clear."""
    message = an_email(html="<p>Order <b>4711</b> is on its way.</p>")
    async with (
        mail_server(tls=trust.server, login=LOGIN) as server,
        provider(server, trust, username="ann", password=PASSWORD) as smtp,
    ):
        sent = await smtp.send(message)
    [came] = server.arrived
    assert (came.tls, came.login, came.sender, came.to) == (True, "ann", "ann@shop.example", "bob@home.example")
    assert came.email["From"] == "Shop <ann@shop.example>"
    assert came.email["To"] == "bob@home.example"
    assert came.email["Subject"] == "Your order"
    assert came.email["Message-ID"] == sent.provider_id == f"<{message.id}@shop.example>"
    assert came.email["Date"].datetime.tzinfo is not None
    plain, html = came.email.get_body(("plain",)), came.email.get_body(("html",))
    assert plain is not None
    assert plain.get_content().strip() == message.body
    assert html is not None
    assert html.get_content().strip() == message.html


async def test_an_email_arrives_over_tls_from_the_first_byte(trust: Certificates) -> None:
    """`tls` is for port 465, where nothing is ever in the clear."""
    async with (
        mail_server(tls=trust.server, implicit_tls=True, login=LOGIN) as server,
        provider(server, trust, tls="tls", username="ann", password=PASSWORD) as smtp,
    ):
        await smtp.send(an_email())
    assert [(came.tls, came.login) for came in server.arrived] == [(True, "ann")]


async def test_attachments_arrive_byte_by_byte() -> None:
    """Whatever the bytes are, and whatever the file is called."""
    blob = random.Random(5).randbytes(3 * ASIDE_BYTES)
    files = (
        Attachment("invoice.pdf", "application/pdf", blob),
        Attachment("Grüße aus Köln.txt", "text/plain", "Grüße\r\n.\n..\rende".encode()),
        Attachment("empty.csv", "text/csv", b""),
        Attachment("dots.bin", "application/octet-stream", b"\r\n.\r\n" * 1_000),
    )
    async with mail_server() as server:
        await send(server, an_email(attachments=files))
    [came] = server.arrived
    arrived = [
        (part.get_filename(), part.get_content_type(), part.get_payload(decode=True))
        for part in came.email.iter_attachments()
    ]
    assert arrived == [(one.filename, one.content_type, one.content) for one in files]


@pytest.mark.parametrize(
    "body",
    [
        ".\r\nQUIT\r\n",
        "..\n.\n...\n",
        "a\rb\nc\r\nd",
        "x" * 5_000,
        "Grüße, 你好, 🙂\n" * 50,
        "",
        "\n\n",
        "last line without an end",
        "From here\nFrom there",
    ],
)
async def test_a_text_arrives_as_it_was_written(body: str) -> None:
    """Lone dots end nothing, long lines and other alphabets come through; line ends are the only thing made equal."""
    async with mail_server() as server:
        await send(server, an_email(body=body))
    [came] = server.arrived
    text = came.email.get_body(("plain",))
    assert text is not None
    assert text.get_content().splitlines() == (body.splitlines() or [""])
    assert max(map(len, came.raw.split(b"\r\n"))) <= 998
    assert came.raw.replace(b"\r\n", b"").count(b"\n") == came.raw.replace(b"\r\n", b"").count(b"\r") == 0


async def test_html_alone_is_sent_alone() -> None:
    """A reader without HTML is not shown an empty text instead."""
    async with mail_server() as server:
        await send(server, an_email(body="", html="<p>hello</p>"))
    assert server.arrived[0].email.get_content_type() == "text/html"


async def test_subjects_and_names_of_any_alphabet_arrive() -> None:
    """They travel as ASCII, so that every server takes them."""
    message = an_email(sender='"Köln, Shop" <ann@shop.example>', subject="Grüße 🙂 " * 20, to="Bøb <bob@home.example>")
    async with mail_server(smtputf8=False) as server:
        await send(server, message)
    [came] = server.arrived
    assert came.raw.isascii()
    assert came.email["Subject"] == message.subject
    assert came.email["From"].addresses[0].display_name == "Köln, Shop"
    assert came.email["To"].addresses[0].display_name == "Bøb"


async def test_a_domain_of_any_alphabet_is_sent_in_its_ascii_form() -> None:
    """No server has to know more than DNS does."""
    async with mail_server(smtputf8=False) as server:
        await send(server, an_email(to="bob@köln.example", sender="ann@bücher.example"))
    [came] = server.arrived
    assert (came.sender, came.to) == ("ann@xn--bcher-kva.example", "bob@xn--kln-sna.example")


async def test_a_local_part_of_any_alphabet_needs_a_server_that_knows_of_it() -> None:
    """SMTPUTF8 is asked for where it is needed, and its lack is said before anything is sent."""
    message = an_email(to="jürgen@home.example")
    async with mail_server(smtputf8=True) as server:
        await send(server, message)
    assert server.arrived[0].to == "jürgen@home.example"
    assert "SMTPUTF8" in server.arrived[0].options
    assert "\r\nTo: jürgen@home.example\r\n".encode() in server.arrived[0].raw
    async with mail_server(smtputf8=False) as server:
        with pytest.raises(Reject) as caught:
            await send(server, message)
    assert caught.value.code == "invalid_recipient"
    assert server.arrived == []


async def test_the_message_id_can_name_a_host_of_ours() -> None:
    """Where senders have many domains, one name makes ids that are ours."""
    async with mail_server() as server:
        sent = await send(server, an_email(), message_id_host="out.example")
    assert sent.provider_id == "<0123456789abcdef0123456789abcdef@out.example>"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_an_email_of_many_pieces_goes_through_tls(
    run: Callable[[Coroutine[Any, Any, None]], None], trust: Certificates
) -> None:
    """Processes run on uvloop, whose transports are others than asyncio's."""
    blob = random.Random(6).randbytes(4 * PIECE_BYTES)

    async def scenario() -> None:
        async with (
            mail_server(tls=trust.server, login=LOGIN) as server,
            provider(server, trust, username="ann", password=PASSWORD) as smtp,
        ):
            await smtp.send(an_email(attachments=(Attachment("a.bin", "application/octet-stream", blob),)))
        [part] = server.arrived[0].email.iter_attachments()
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        assert hashlib.sha256(content).digest() == hashlib.sha256(blob).digest()

    run(scenario())


# --- Who is trusted ------------------------------------------------------------------------------


async def test_a_certificate_that_is_not_good_ends_the_call_before_anything_is_said(trust: Certificates) -> None:
    """Neither the password nor the email goes to a stranger: wrong name, or an authority that nobody knows."""
    for way in ("starttls", "tls"):
        for context, client in ((trust.wrong_name, trust.client), (trust.server, None)):
            async with mail_server(tls=context, implicit_tls=way == "tls", login=LOGIN) as server:
                given = {"host": "localhost", "port": server.port, "tls": way, "username": "ann", "password": PASSWORD}
                smtp = Smtp(SmtpSettings.model_validate(given), tls=client)
                await smtp.start()
                with pytest.raises(RetryLater) as caught:
                    await smtp.send(an_email())
            assert caught.value.code == "tls"
            assert (server.logins, server.arrived) == ([], [])
            assert_discreet(caught.value, smtp)


async def test_a_server_without_starttls_gets_nothing(trust: Certificates) -> None:
    """Who takes it away in between must not learn the password."""
    async with scripted({}) as server:
        with pytest.raises(RetryLater) as caught:
            await send(server, trust=trust, username="ann", password=PASSWORD)
    assert caught.value.code == "tls"
    assert set(server.heard) <= {"EHLO", "QUIT"}


async def test_a_wrong_password_is_for_good(trust: Certificates) -> None:
    """Trying it again and again would lock the account."""
    async with (
        mail_server(tls=trust.server, login=("ann", "another")) as server,
        provider(server, trust, username="ann", password=PASSWORD) as smtp,
    ):
        with pytest.raises(Reject) as caught:
            await smtp.send(an_email())
    assert caught.value.code == "unauthorized"
    assert server.arrived == []
    assert_discreet(caught.value, smtp)


# --- What failures are taken for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "answer", "code"),
    [
        ("", "554 5.7.1 go away", "refused"),
        ("EHLO", "550 no", "refused"),
        ("MAIL", "530 5.7.0 authentication required", "unauthorized"),
        ("MAIL", "550 5.1.8 <ann@shop.example>: no such sender", "invalid_sender"),
        ("MAIL", "553 5.1.7 <ann@shop.example>: bad sender", "invalid_sender"),
        ("MAIL", "552 5.3.4 too large", "too_large"),
        ("MAIL", "554 5.7.1 <ann@shop.example>: spam", "refused"),
        ("RCPT", "550 5.1.1 <bob@home.example>: no such user", "invalid_recipient"),
        ("RCPT", "550 <bob@home.example> unknown", "invalid_recipient"),
        ("RCPT", "551 <bob@home.example> not local", "invalid_recipient"),
        ("RCPT", "552 5.2.2 <bob@home.example>: full", "mailbox_full"),
        ("RCPT", "552 <bob@home.example>: full", "mailbox_full"),
        ("RCPT", "554 5.7.1 <bob@home.example>: relay access denied", "refused"),
        ("DATA", "554 5.5.1 no valid recipients", "refused"),
        (".", "550 5.7.1 spam: Your order", "refused"),
        (".", "552 5.3.4 too large", "too_large"),
        (".", "554 5.6.0 Your order: malformed", "refused"),
    ],
)
async def test_an_answer_5xx_is_for_good(step: str, answer: str, code: str, caplog: pytest.LogCaptureFixture) -> None:
    """The code says who has to do something about it; the server's words, which quote addresses, are kept."""
    caplog.set_level(logging.DEBUG)
    async with scripted({step: answer}) as server:
        with pytest.raises(Reject) as caught:
            await send(server)
    assert (type(caught.value), caught.value.code) == (Reject, code)
    assert answer[:3] in str(caught.value)
    assert_discreet(caught.value)
    assert not [word for word in HIDDEN if word in caplog.text]


@pytest.mark.parametrize(
    ("step", "answer", "code"),
    [
        ("", "421 4.3.2 too busy", "deferred"),
        ("", "hello", "bad_answer"),
        ("EHLO", HANG_UP, "connection_lost"),
        ("EHLO", SILENCE, "timeout"),
        ("MAIL", "451 4.3.0 <ann@shop.example>: later", "deferred"),
        ("MAIL", "421 4.7.0 closing", "deferred"),
        ("MAIL", HANG_UP, "connection_lost"),
        ("MAIL", SILENCE, "timeout"),
        ("MAIL", "what?", "bad_answer"),
        ("RCPT", "450 4.2.0 <bob@home.example>: greylisted", "deferred"),
        ("RCPT", "452 4.2.2 <bob@home.example>: full for now", "deferred"),
        ("RCPT", HANG_UP, "connection_lost"),
        ("RCPT", SILENCE, "timeout"),
        ("DATA", "451 4.3.0 later", "deferred"),
        ("DATA", "250 that is not what you say here", "bad_answer"),
        ("DATA", HANG_UP, "connection_lost"),
        ("DATA", SILENCE, "timeout"),
        (".", "451 4.3.0 Your order: later", "deferred"),
        (".", "421 4.3.2 going down", "deferred"),
        (".", "452 4.3.1 out of space", "deferred"),
    ],
)
async def test_what_comes_before_the_dot_or_answers_it_is_no_doubt(
    step: str, answer: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The server has not taken the email, and may later: it is sent again, and an attempt is charged."""
    caplog.set_level(logging.DEBUG)
    async with scripted({step: answer}) as server:
        with pytest.raises(RetryLater) as caught:
            await send(server, timeout_s=1.0 if answer == SILENCE else 30)
        assert server.reached.is_set() is (answer == SILENCE)
    after_s = SmtpSettings().deferred_s if code == "deferred" else None  # who greylists knows us some minutes later
    assert (caught.value.code, caught.value.charged, caught.value.after_s) == (code, True, after_s)
    assert_discreet(caught.value)
    assert not [word for word in HIDDEN if word in caplog.text]


@pytest.mark.parametrize("step", ["greeting lost", "silent greeting", "nobody listens"])
async def test_without_a_connection_no_attempt_is_charged(step: str) -> None:
    """No work was done; the email waits until somebody listens."""
    async with scripted({"": HANG_UP if step == "greeting lost" else SILENCE}) as server:
        if step == "nobody listens":
            with socket.socket() as held:
                held.bind(("127.0.0.1", 0))
                server.port = held.getsockname()[1]
                with pytest.raises(RetryLater) as caught:
                    await send(server)
        else:
            with pytest.raises(RetryLater) as caught:
                await send(server, connect_timeout_s=0.2)
    assert (caught.value.code, caught.value.charged) == ("unreachable", False)
    assert_discreet(caught.value)


LARGE = (Attachment("large.bin", "application/octet-stream", random.Random(7).randbytes(6 << 20)),)


@pytest.mark.parametrize(("fault", "code"), [(HANG_UP, "connection_lost"), (DEAFNESS, "timeout")])
async def test_a_text_that_broke_off_was_not_taken(fault: str, code: str) -> None:
    """The dot was never given to the connection, however much of the text had gone."""
    async with scripted({"text": fault}) as server:
        with pytest.raises(RetryLater) as caught:
            await send(server, an_email(attachments=LARGE), timeout_s=3.0 if fault == DEAFNESS else 30)
        assert server.heard[-1] == "DATA"
        assert (type(caught.value), caught.value.code, caught.value.charged) == (RetryLater, code, True)
        server.released.set()
        await server.gone.wait()


@pytest.mark.parametrize("answer", [HANG_UP, SILENCE, "ok, thanks", "354 go on", "999 what"])
async def test_a_dot_without_an_answer_is_a_doubt(answer: str) -> None:
    """The server may deliver it or not: it is not sent again by itself."""
    async with scripted({".": answer}) as server:
        with pytest.raises(InDoubt) as caught:
            await send(server, timeout_s=600, accept_timeout_s=0.2)
    assert server.heard[-1] == "."
    assert caught.value.code == "outcome_unknown"
    assert_discreet(caught.value)


@pytest.mark.parametrize("answer", ["250 ok", "251 forwarded", "250-2.0.0 many\r\n250 2.0.0 lines"])
async def test_a_good_answer_is_an_answer_whatever_follows(answer: str) -> None:
    """The connection may break at once, as servers do it that are told to go."""
    async with scripted({".": answer, "QUIT": HANG_UP}) as server:
        assert (await send(server)).provider_id.startswith("<0123456789abcdef")


async def test_an_email_above_the_servers_limit_is_not_even_begun() -> None:
    """The server has said its limit; the megabytes stay here."""
    async with scripted({"EHLO": "250-mail.test\r\n250 SIZE 1000"}) as server:
        with pytest.raises(Reject) as caught:
            await send(server, an_email(body="x" * 2_000))
    assert caught.value.code == "too_large"
    assert "MAIL" not in server.heard


@pytest.mark.parametrize("step", ["", "EHLO", "MAIL", "RCPT", "DATA", "."])
async def test_who_is_cancelled_hangs_up(step: str) -> None:
    """At a deadline nothing stays open, and the cancellation is not taken for a failure."""
    async with scripted({step: SILENCE}) as server:
        task = asyncio.create_task(send(server))
        await server.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.gone.wait()


async def test_who_is_cancelled_when_a_step_ends_does_not_go_on() -> None:
    """`asyncio.wait_for` would hand over the result of the step, and the cancellation would be lost."""
    step: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(_within(60, step))
    await asyncio.sleep(0)  # it waits now
    step.set_result(None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("part", ["body", "html", "attachments"])
async def test_a_long_email_is_put_together_by_few_threads(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever makes it long, the loop goes on meanwhile, and the threads are not as many as the emails."""
    loop_thread, threads, freed = threading.get_ident(), set[int](), threading.Event()

    def compose_slowly(message: Outgoing, host: str) -> Mail:
        threads.add(threading.get_ident())
        if threading.get_ident() != loop_thread:
            freed.wait(60)
        return compose(message, host)

    monkeypatch.setattr(provider_smtp, "compose", compose_slowly)
    blob = "x" * (ASIDE_BYTES + 1)
    long: dict[str, Any] = {part: blob if part != "attachments" else (Attachment("a", "a/b", blob.encode()),)}
    smtp = Smtp(SmtpSettings(host="localhost"))
    await smtp.start()
    tasks = [asyncio.create_task(smtp.prepare(an_email(**long))) for _ in range(5 * COMPOSERS)]
    await wait_until(lambda: len(threads) == COMPOSERS)
    freed.set()
    await asyncio.gather(*tasks)
    assert len(threads) == COMPOSERS
    assert loop_thread not in threads
    await smtp.stop()


async def test_all_that_comes_before_the_dot_has_one_limit_together() -> None:
    """A server that is slow in each answer must not keep an email for longer than a process is given to end."""
    async with scripted({"RCPT": SILENCE}) as server:
        with pytest.raises(RetryLater) as caught:
            await send(server, timeout_s=600, connect_timeout_s=0.9, give_timeout_s=1.0)
    assert (caught.value.code, caught.value.charged) == ("timeout", True)


async def test_many_at_once_arrive_once_each() -> None:
    """One connection carries one email."""
    async with mail_server() as server, provider(server) as smtp:
        await asyncio.gather(*(smtp.send(an_email(id=f"{number:032x}")) for number in range(40)))
    assert sorted(entry.delivery for entry in server.ledger.taken) == [f"{number:032x}" for number in range(40)]


# --- What is refused before anybody is called ----------------------------------------------------

INJECTIONS = ("\r\nBcc: eve@evil.example", "\nBcc: eve@evil.example", "\r x", "\x00", "\x0b", "\x85", "\u2028", "\x7f")


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize(
    ("field", "code"), [("sender", "invalid_sender"), ("to", "invalid_recipient"), ("subject", "invalid_subject")]
)
def test_a_control_character_in_a_header_is_refused(field: str, code: str, text: str) -> None:
    """A second header, or a second recipient, is nothing that a field may bring along."""
    for value in (
        f"bob@home.example{text}",
        f"Bob{text} <bob@home.example>",
        f'"Bob{text}" <bob@home.example>',
        f"bob{text}@home.example",
        f"{text}bob@home.example",
    ):
        with pytest.raises(Reject) as caught:
            compose(an_email(**{field: value}))
        assert caught.value.code == code
        assert "evil" not in str(caught.value)
        assert_discreet(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "bob", "@home.example", "bob@", "bob@home.example, eve@evil.example", "bob@home.example;eve@evil.example",
        "<bob@home.example", "bob@home.example>", "bob@@home.example", "bob@home@evil.example", "a b@home.example",
        "Bob <bob@home.example> <eve@evil.example>", "<bob@home.example> SIZE=1", "bob@home.example SIZE=1",
        "Eve <eve@evil.example>, Bob <bob@home.example>", '"Bob" <>', "bob@home..example", "x" * 65 + "@home.example",
        "bob@" + "x" * 64 + ".example",
    ],
)  # fmt: skip
def test_what_is_not_one_address_is_refused(text: str) -> None:
    """One delivery has one recipient, so that one status can be true of it."""
    for field, code in (("sender", "invalid_sender"), ("to", "invalid_recipient")):
        with pytest.raises(Reject) as caught:
            compose(an_email(**{field: text}))
        assert caught.value.code == code


@pytest.mark.parametrize(
    "attachment",
    [
        Attachment("a.pdf", "application/pdf", None, "https://files.example/a.pdf"),
        Attachment("a.pdf\r\nX-Evil: 1", "application/pdf", b"1"),
        Attachment("", "application/pdf", b"1"),
        Attachment("a.pdf", "application/pdf\r\nX-Evil: 1", b"1"),
        Attachment("a.pdf", "application/pdf; name=x", b"1"),
        Attachment("a.pdf", "pdf", b"1"),
        Attachment("a.eml", "message/rfc822", b"1"),
        Attachment("a", "multipart/mixed", b"1"),
    ],
)
def test_an_attachment_that_cannot_be_sent_is_refused(attachment: Attachment) -> None:
    """Its number is told, its name is not."""
    fine = Attachment("b.pdf", "application/pdf", b"1")
    with pytest.raises(Reject, match="attachment 2") as caught:
        compose(an_email(attachments=(fine, attachment)))
    assert caught.value.code == "invalid_attachment"


def test_what_is_shown_of_a_message_hides_what_it_says() -> None:
    """Logs and errors show messages by `repr()`."""
    message = an_email(attachments=(Attachment("4711.pdf", "application/pdf", b"4711"),), metadata={"order": "4711"})
    settings = SmtpSettings(host="localhost", username="ann", password=PASSWORD)
    assert_discreet(message, message.attachments[0], settings, Smtp(settings))
