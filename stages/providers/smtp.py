"""The provider that hands emails to a mail server, by SMTP.

**When a message is taken.** A server takes a message when it answers 250 to the dot that ends it, and not before
(RFC 5321, 4.2.5). So the text is sent first, the dot alone after it. Whatever goes wrong until the dot is given to the
connection, the message was certainly not taken. Whatever answer the dot gets says what became of it. Only when the dot
has gone and no answer can be read, nobody knows, and that is `InDoubt`.

    no connection, none in time                     unreachable            tried again, no attempt is charged
    hung up, no answer in time, no SMTP             connection_lost, timeout, bad_answer        tried again
    no STARTTLS, no AUTH, a certificate not trusted tls, unauthorized                           tried again
    4xx                                             deferred                   tried again after some minutes
    5xx to AUTH; 530                                unauthorized           for good, as all below
    5.7.x (policy: relaying, spam)                  refused
    552, 5.3.4; at RCPT 552, 5.2.2                  too_large; mailbox_full
    5xx to MAIL; to RCPT; else                      invalid_sender; invalid_recipient; refused
    after the dot: 2xx                              sent; any other answer as above
    after the dot: hung up, none in time, no SMTP   outcome_unknown        in doubt

The texts of a server are not passed on: they repeat addresses. Its numbers are (`550 5.1.1`).

One connection carries one message: kept ones would save little beside what mail servers do with a message, and most
servers end them after some messages or seconds.

Addresses are read as the gateway read them (`pipeline.contacts`): a domain outside ASCII is sent in its ASCII form; a
local part outside ASCII needs a server with SMTPUTF8.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from email.header import Header
from email.message import EmailMessage
from email.policy import SMTP as POLICY
from email.policy import EmailPolicy
from email.utils import localtime
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar, cast

import aiosmtplib
import httpx

from pipeline.contacts import BadContact, Mailbox, read_mailbox
from pipeline.errors import ConfigError, InDoubt, PenstockError, Reject, RetryLater
from stages.providers import HandOver, Outgoing, Provider, Sent, Type

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aiosmtplib.protocol import SMTPProtocol

    from pipeline.settings import Settings, SmtpSettings

_T = TypeVar("_T")

START_INPUT: Final = 354

TOO_LARGE: Final = "too_large"
NO_RECIPIENT: Final = "invalid_recipient"
_BAD: Final = "invalid_attachment"

PIECE_BYTES: Final = 256 * 1024
"""Of a text, for which the time of one answer is given: a slow line may carry a large email."""
ASIDE_BYTES: Final = 64 * 1024
"""A longer email is put together by a thread: a megabyte takes the loop about 20 ms."""
COMPOSERS: Final = 2
"""Such threads at most: more of them would only take turns, and each turn is one that the loop waits for."""

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\u2028\u2029]")
_CONTENT_TYPE: Final = re.compile(
    r"(?!multipart/|message/)(?P<main>[a-z]+)/(?P<sub>[a-z0-9][a-z0-9.+_-]*)", re.IGNORECASE
)
_WORD: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_PLAIN: Final = re.compile(rf"{_WORD}(?: {_WORD})*")
"""A name that needs no quotes (RFC 5322, 3.2.3)."""
_WORD_CHARS: Final = 75
"""Of an encoded word (RFC 2047, 2)."""
_LINE_END: Final = re.compile(rb"\r\n|\n|\r(?!\n)")
_DOT: Final = re.compile(rb"^\.", re.MULTILINE)
_ENHANCED: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}(?=\s|$)")

_SAFE: Final = POLICY.clone(cte_type="7bit")
"""Every server takes seven bits."""
_UTF8: Final = EmailPolicy(linesep="\r\n", cte_type="7bit", utf8=True)


def build(settings: Settings) -> Provider:
    """Return the provider.

    Raises:
        ConfigError: no server is named.
    """
    if not settings.smtp.host:
        raise ConfigError("provider smtp: PENSTOCK_SMTP__HOST is empty; it names the mail server")
    return Smtp(settings.smtp)


@dataclass(frozen=True, slots=True)
class Mail:
    """An email ready to be sent.

    Attributes:
        utf8: an address needs SMTPUTF8.
    """

    message_id: str
    sender: str
    to: str
    content: bytes
    utf8: bool


class Smtp(Provider):
    """Hands emails to a mail server."""

    name = "smtp"
    types: ClassVar[frozenset[Type]] = frozenset({"email"})

    def __init__(self, settings: SmtpSettings, *, tls: ssl.SSLContext | None = None) -> None:
        """Open nothing yet.

        Args:
            tls: whom to trust; None: whom everybody trusts.
        """
        self.per_s = settings.per_s
        self._settings = settings
        self._tls = tls
        self._hello = "localhost"
        self._composers: ThreadPoolExecutor | None = None
        self.longest_s = settings.give_timeout_s + settings.accept_timeout_s

    async def start(self) -> None:
        """Learn how this machine is called, and whom to trust."""
        self._hello = await asyncio.to_thread(socket.getfqdn)
        if self._tls is None:
            self._tls = await asyncio.to_thread(httpx.create_ssl_context)
        self._composers = ThreadPoolExecutor(COMPOSERS, "smtp compose")

    async def stop(self) -> None:
        """Let the threads go; what they still put together nobody waits for."""
        if self._composers is not None:
            self._composers.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, message: Outgoing) -> HandOver:
        """Put the email together: what cannot be one fails here."""
        size = len(message.body) + len(message.html or "") + sum(len(one.content or b"") for one in message.attachments)
        host = self._settings.message_id_host
        if size > ASIDE_BYTES:
            mail = await asyncio.get_running_loop().run_in_executor(self._composers, compose, message, host)
        else:
            mail = compose(message, host)
        return partial(self._hand_over, mail)

    async def send(self, message: Outgoing) -> Sent:
        """Hand the email over."""
        return await (await self.prepare(message))()

    async def _hand_over(self, mail: Mail) -> Sent:
        client = self._client()
        try:
            async with asyncio.timeout(self._settings.give_timeout_s):
                await self._begin(client, mail)
                protocol = client.protocol
                if protocol is None:
                    raise aiosmtplib.SMTPServerDisconnected("")
                await self._give(protocol, mail.content)
            return Sent(await self._finish(protocol, mail.message_id))
        except (aiosmtplib.SMTPException, OSError) as error:
            raise read_error(error, self._settings.deferred_s) from None
        finally:
            _leave(client)

    def _client(self) -> aiosmtplib.SMTP:
        settings = self._settings
        return aiosmtplib.SMTP(
            hostname=settings.host,
            port=settings.port or (465 if settings.tls == "tls" else 587),
            local_hostname=self._hello,
            timeout=None,  # see `_within`
            use_tls=settings.tls == "tls",
            start_tls=False,
            tls_context=self._tls,
        )

    async def _begin(self, client: aiosmtplib.SMTP, mail: Mail) -> None:
        """Come as far as 354: the server waits for the text."""
        settings, patience = self._settings, self._settings.timeout_s
        try:
            await _within(settings.connect_timeout_s, client.connect())
        except aiosmtplib.SMTPException:
            raise
        except TimeoutError:
            raise aiosmtplib.SMTPConnectTimeoutError("") from None
        await _within(patience, client.ehlo())
        if settings.tls == "starttls":
            if not client.supports_extension("starttls"):
                raise RetryLater("the mail server offers no STARTTLS, and PENSTOCK_SMTP__TLS demands it", code="tls")
            await _within(settings.connect_timeout_s, client.starttls())
            await _within(patience, client.ehlo())
        if settings.password is not None:
            if not client.supported_auth_methods:
                raise RetryLater("the mail server offers no way to log in that we know", code="unauthorized")
            await _within(patience, client.login(settings.username, settings.password.get_secret_value()))
        options = _options(client, mail)
        encoding = "utf-8" if mail.utf8 else "ascii"
        await _within(patience, client.mail(mail.sender, options=options, encoding=encoding))
        await _within(patience, client.rcpt(mail.to, encoding=encoding))
        answer = await _within(patience, client.execute_command(b"DATA"))
        if answer.code != START_INPUT:
            raise aiosmtplib.SMTPDataError(answer.code, answer.message)

    async def _give(self, protocol: SMTPProtocol, content: bytes) -> None:
        """Give the text to the connection, all but the dot; return when it has gone."""
        transport = cast("asyncio.WriteTransport", protocol.transport)  # uvloop's is none by descent
        transport.set_write_buffer_limits(high=1, low=0)  # with 0, asyncio's TLS pauses what is empty, for ever
        for at in range(0, len(content), PIECE_BYTES):
            protocol.write(content[at : at + PIECE_BYTES])
            drained = protocol._drain_helper()  # noqa: SLF001 - by this name asyncio's own StreamWriter calls it
            await _within(self._settings.timeout_s, drained)

    async def _finish(self, protocol: SMTPProtocol, message_id: str) -> str:
        """End the text, and hear whether the message was taken."""
        protocol.write(b".\r\n")  # raises where the connection has gone, and then nothing was ended
        limit_s = self._settings.accept_timeout_s
        try:
            answer = await _within(limit_s, protocol.read_response())
        except TimeoutError:
            raise InDoubt(f"the mail server had the whole email and did not answer within {limit_s:g} s") from None
        except (aiosmtplib.SMTPException, OSError):
            raise InDoubt("the mail server had the whole email, and no answer of it can be read") from None
        if 200 <= answer.code < 300:
            return message_id
        if 400 <= answer.code < 600:
            raise aiosmtplib.SMTPDataError(answer.code, answer.message)
        raise InDoubt(f"the mail server had the whole email and answered {answer.code}, which says nothing")

    def __repr__(self) -> str:
        return f"<Smtp host={self._settings.host} tls={self._settings.tls} per_s={self.per_s:g}>"


async def _within(limit_s: float, step: Awaitable[_T]) -> _T:
    """Await *step* for so long at most.

    The library could do it, by `asyncio.wait_for`. But that swallows a cancellation which comes at the moment when the
    step ends, until Python 3.12 (python/cpython#86296), and who is cancelled would go on.

    Raises:
        TimeoutError: it took longer.
    """
    async with asyncio.timeout(limit_s):
        return await step


def _leave(client: aiosmtplib.SMTP) -> None:
    """End the connection, at once where something is on its way still; nobody waits for an answer to QUIT."""
    transport = cast("asyncio.WriteTransport | None", client.transport)
    if transport is not None and transport.get_write_buffer_size():
        transport.abort()
    elif client.protocol is not None:
        with suppress(aiosmtplib.SMTPException):
            client.protocol.write(b"QUIT\r\n")
    client.close()


# --- What is sent --------------------------------------------------------------------------------


def compose(message: Outgoing, message_id_host: str = "") -> Mail:
    """Return the email.

    Args:
        message_id_host: what stands behind the `@` of its Message-ID; empty: the sender's domain.

    Raises:
        Reject: an address, the subject or an attachment cannot be sent.
    """
    sender = _mailbox(message.sender, "from", "invalid_sender")
    to = _mailbox(message.to, "to", NO_RECIPIENT)
    if message.subject is not None and _CONTROL.search(message.subject):
        raise Reject("the subject holds a line break or another control character", code="invalid_subject")
    utf8 = not (sender.local.isascii() and to.local.isascii())
    email = EmailMessage(policy=_UTF8 if utf8 else _SAFE)
    message_id = f"<{message.id}@{message_id_host or sender.domain}>"
    email["Subject"] = message.subject or ""
    email["Date"] = localtime()
    email["Message-ID"] = message_id
    if message.html is None:
        email.set_content(message.body)
    elif message.body:
        email.set_content(message.body)
        email.add_alternative(message.html, subtype="html")
    else:
        email.set_content(message.html, subtype="html")
    for number, one in enumerate(message.attachments, 1):
        kind = _CONTENT_TYPE.fullmatch(one.content_type)
        if one.content is None:
            raise Reject(f"attachment {number} has no content: an email carries it, an address will not do", code=_BAD)
        if kind is None:
            raise Reject(f"attachment {number} is of no type like application/pdf", code=_BAD)
        if not one.filename or _CONTROL.search(one.filename):
            raise Reject(f"attachment {number} has no name, or one with a control character", code=_BAD)
        email.add_attachment(one.content, maintype=kind["main"], subtype=kind["sub"], filename=one.filename)
    content = _header("From", sender) + _header("To", to) + email.as_bytes()
    return Mail(message_id, sender.address, to.address, quote(content), utf8)


def quote(content: bytes) -> bytes:
    """Return *content* as it goes over the line: all lines end with CR LF, none is a lone dot (RFC 5321, 4.5.2)."""
    lines = _LINE_END.sub(b"\r\n", content)
    return _DOT.sub(b"..", lines if lines.endswith(b"\r\n") else lines + b"\r\n")


def _mailbox(text: str, field: str, code: str) -> Mailbox:
    try:
        return read_mailbox(text)
    except BadContact as error:
        raise Reject(f"`{field}`: {error}", code=code) from None


def _header(field: str, box: Mailbox) -> bytes:
    """Return the line that names a mailbox, folded before the address.

    `EmailMessage` would fold a long name inside its quotes, and lose them: a comma of the name then parts addresses.
    """
    if not box.name:
        return f"{field}: {box.address}\r\n".encode()
    if not box.name.isascii():
        name = Header(box.name, "utf-8", _WORD_CHARS, field).encode(linesep="\r\n")
    elif _PLAIN.fullmatch(box.name):
        name = box.name
    else:
        name = '"' + re.sub(r'(["\\])', r"\\\1", box.name) + '"'
    return f"{field}: {name}\r\n <{box.address}>\r\n".encode()


def _options(client: aiosmtplib.SMTP, mail: Mail) -> list[str]:
    """Return what MAIL says of the email, as far as the server knows of it.

    Raises:
        Reject: the server has said that it takes no such email.
    """
    size, options = len(mail.content), []
    if client.supports_extension("size"):
        limit = client.esmtp_extensions["size"]
        if limit.isdecimal() and 0 < int(limit) < size:
            raise Reject(f"the mail server takes no email above {limit} bytes, and this one has {size}", code=TOO_LARGE)
        options.append(f"SIZE={size}")
    if mail.utf8:
        if not client.supports_extension("smtputf8"):
            raise Reject("the mail server takes no address with letters outside ASCII before the @", code=NO_RECIPIENT)
        options.append("SMTPUTF8")
    return options


# --- What went wrong -----------------------------------------------------------------------------


def read_error(error: Exception, deferred_s: float) -> PenstockError:
    """Return what an error means that came before the dot, or an answer to it; *deferred_s*: the patience after 4xx."""
    match error:
        case ssl.SSLError() | aiosmtplib.SMTPConnectError(__cause__=ssl.SSLError()):
            return RetryLater("no trusted connection to the mail server: its certificate, or its TLS", code="tls")
        case aiosmtplib.SMTPResponseException():
            return _read_answer(error, deferred_s)
        case aiosmtplib.SMTPConnectError():
            return RetryLater("the mail server takes no connection", code="unreachable", charged=False)
        case TimeoutError():
            return RetryLater("the mail server did not answer in time", code="timeout")
    return RetryLater("the mail server hung up before it had the whole email", code="connection_lost")


def _read_answer(error: aiosmtplib.SMTPResponseException, deferred_s: float) -> PenstockError:
    """Judge an answer by its number, its RFC 3463 code where it has one, and what it answers."""
    found = _ENHANCED.match(error.message)
    enhanced = found[0] if found else ""
    words = "the mail server answered " + f"{error.code} {enhanced}".strip()
    if 400 <= error.code < 500:
        return RetryLater(words, code="deferred", after_s=deferred_s)
    if not 500 <= error.code < 600:
        return RetryLater("what the mail server answered is not SMTP", code="bad_answer")
    is_recipient = isinstance(error, aiosmtplib.SMTPRecipientRefused)
    if isinstance(error, aiosmtplib.SMTPAuthenticationError) or error.code == 530:
        return Reject(f"{words}: it wants another user name or password", code="unauthorized")
    if enhanced.startswith("5.7."):
        return Reject(f"{words}: its policy is against it", code="refused")
    if is_recipient and (error.code == 552 or enhanced == "5.2.2"):
        return Reject(f"{words}: the mailbox is full", code="mailbox_full")
    if error.code == 552 or enhanced == "5.3.4":
        return Reject(f"{words}: the email is too large", code=TOO_LARGE)
    if is_recipient:
        return Reject(f"{words} to the recipient", code=NO_RECIPIENT)
    if isinstance(error, aiosmtplib.SMTPSenderRefused):
        return Reject(f"{words} to the sender", code="invalid_sender")
    return Reject(words, code="refused")
