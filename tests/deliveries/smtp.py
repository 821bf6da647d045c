"""Mail servers on loopback: a real one (aiosmtpd), and one that follows a script to the letter.

The real one also runs as a process of its own: `python -m tests.deliveries.smtp '{"ledger": "FILE", ...}'` prints
`{"host", "port"}` when it listens, and goes at SIGTERM. Its options are the fields of `Options`.

Faults, each with its chance (`"faults": {"deferred": 0.05}`); only the last has the message delivered:
`deferred_rcpt`, `deferred` (451 to RCPT, to the whole message), `unavailable` (421 to MAIL), `refused` (550 to the
whole message), `drop_rcpt` (the connection ends at RCPT), `drop_read` (it ends after the message; not delivered),
`drop_taken` (the same; delivered).
"""

from __future__ import annotations

import asyncio
import email
import email.policy
import json
import random
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from pathlib import Path
from ssl import SSLContext
from typing import Any, cast

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from tests.deliveries.ledger import Entry, Faults, Ledger, until_told_to_stop

FAULTS = frozenset({"deferred_rcpt", "deferred", "unavailable", "refused", "drop_rcpt", "drop_read", "drop_taken"})


@dataclass
class Options:
    """How a server of its own process is to be.

    Attributes:
        ledger: the file it writes into.
        delay_ms: how long it takes with a message before it answers.
    """

    host: str = "127.0.0.1"
    port: int = 0
    ledger: str | None = None
    faults: Mapping[str, float] = field(default_factory=dict)
    seed: int = 1
    delay_ms: float = 0.0


@dataclass(frozen=True)
class Arrived:
    """A message as it came.

    Attributes:
        sender: of the envelope.
        login: who was logged in.
        tls: the connection was secret when it came.
        raw: as it came over the line.
    """

    sender: str
    to: str
    options: tuple[str, ...]
    raw: bytes
    tls: bool
    login: str | None

    @property
    def email(self) -> EmailMessage:
        """The message itself."""
        return email.message_from_bytes(self.raw, _class=EmailMessage, policy=email.policy.SMTPUTF8)


class MailServer:
    """A real mail server.

    Attributes:
        arrived: the messages that it took or refused as a whole, in order.
        logins: user names that it saw, good and bad.
    """

    def __init__(
        self,
        *,
        tls: SSLContext | None = None,
        implicit_tls: bool = False,
        login: tuple[str, str] | None = None,
        smtputf8: bool = True,
        max_bytes: int = 32 << 20,
        ledger: Ledger | None = None,
        faults: Faults | None = None,
        delay_ms: float = 0.0,
    ) -> None:
        self.ledger = ledger or Ledger()
        self.faults = faults or Faults()
        self.faults.check(FAULTS)
        self.arrived: list[Arrived] = []
        self.logins: list[str] = []
        self.host, self.port = "localhost", 0
        self._tls, self._implicit_tls, self._login = tls, implicit_tls, login
        self._smtputf8, self._max_bytes, self._delay_ms = smtputf8, max_bytes, delay_ms
        self._server: asyncio.Server | None = None
        self._open: set[_Session] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        tls = self._tls if self._implicit_tls else None
        self._server = await loop.create_server(lambda: _Session(self), host, port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End all connections."""
        assert self._server is not None
        self._server.close()
        for session in list(self._open):
            session.hang_up()
        tasks = [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__name__", "") == "_handle_client"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def session_options(self) -> dict[str, Any]:
        """Return what aiosmtpd is to be told for a connection."""
        wants_login = self._login is not None
        return {
            "hostname": "mail.test",
            "data_size_limit": self._max_bytes,
            "enable_SMTPUTF8": self._smtputf8,
            "tls_context": None if self._implicit_tls else self._tls,
            "require_starttls": self._tls is not None and not self._implicit_tls,
            "auth_require_tls": wants_login and not self._implicit_tls,
            "authenticator": self._authenticate if wants_login else None,
        }

    def _authenticate(self, server: SMTP, session: Session, envelope: Envelope, way: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        given = (data.login.decode(), data.password.decode())
        self.logins.append(given[0])
        return AuthResult(success=given == self._login, handled=False, auth_data=given[0])

    # What aiosmtpd asks at each step.

    async def handle_MAIL(  # noqa: N802 - named after the command
        self, server: _Session, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self._login is not None and not session.authenticated:
            return "530 5.7.0 Authentication required"
        server.fault = self.faults.draw()
        if server.fault == "unavailable":
            return "421 4.3.2 going down"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 Ok"

    async def handle_RCPT(  # noqa: N802 - named after the command
        self, server: _Session, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if server.fault == "drop_rcpt":
            server.hang_up()
            raise asyncio.CancelledError
        if server.fault == "deferred_rcpt":
            return f"451 4.7.1 <{address}>: greylisted"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, server: _Session, session: Session, envelope: Envelope) -> str:  # noqa: N802 - see above
        assert isinstance(envelope.original_content, bytes)
        came = Arrived(
            envelope.mail_from or "",
            envelope.rcpt_tos[0],
            tuple(envelope.mail_options),
            envelope.original_content,
            session.ssl is not None or self._implicit_tls,
            str(session.auth_data) if session.authenticated else None,
        )
        self.arrived.append(came)
        if self._delay_ms:
            await asyncio.sleep(self._delay_ms / 1000)
        answer = {"deferred": 451, "refused": 550, "drop_read": 0, "drop_taken": 0}.get(server.fault, 250)
        message = came.email
        delivery = str(message["Message-ID"]).partition("@")[0].strip("<")
        text = message.get_body(("plain", "html"))
        body = text.get_content().strip() if text is not None else ""
        taken = answer == 250 or server.fault == "drop_taken"
        self.ledger.note(Entry(delivery, came.sender, came.to, body, taken, answer, str(message["Message-ID"])))
        if answer == 0:
            server.hang_up()
            raise asyncio.CancelledError
        return {250: "250 2.0.0 Ok: queued as 4F1", 451: "451 4.3.0 try again", 550: "550 5.6.0 not like this"}[answer]


class _Session(SMTP):
    """One connection."""

    def __init__(self, owner: MailServer) -> None:
        super().__init__(owner, **owner.session_options())
        self.fault = ""
        self._owner = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._owner._open.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._owner._open.discard(self)
        super().connection_lost(error)

    def hang_up(self) -> None:
        """End the connection at once."""
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()


@asynccontextmanager
async def mail_server(**options: Any) -> AsyncIterator[MailServer]:
    """Run a real one."""
    server = MailServer(**options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


# --- One that follows a script -------------------------------------------------------------------

HANG_UP = "hang up"
SILENCE = "silence"
DEAFNESS = "deafness"

GOOD = {
    "": "220 mail.test ESMTP",
    "EHLO": "250-mail.test\r\n250 8BITMIME",
    "MAIL": "250 2.1.0 Ok",
    "RCPT": "250 2.1.5 Ok",
    "DATA": "354 go on",
    ".": "250 2.0.0 Ok: queued as 4F1",
    "QUIT": "221 2.0.0 Bye",
}


@dataclass
class Scripted:
    """A server that answers each command as it is told, text by text.

    Attributes:
        answers: by the command's first word; "" is the greeting, "." the end of the message, "text" comes when the
            first line of the message has come. `HANG_UP` ends the connection, `SILENCE` waits until the other end
            does, `DEAFNESS` reads nothing more until `released`.
        heard: commands, and "." for a whole message.
        reached: set when `SILENCE` or `DEAFNESS` begins.
        gone: set when a connection has ended.
    """

    answers: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 0
    heard: list[str] = field(default_factory=list)
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            going = await self._answer("", reader, writer)
            while going and (line := await reader.readline()):
                command = line.decode("latin-1").split()[0].upper()
                self.heard.append(command)
                going = await self._answer(command, reader, writer)
                if command == "DATA" and going and self._said(command).startswith("354"):
                    going = await self._read_text(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.gone.set()
            writer.close()

    async def _read_text(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await reader.readuntil(b"\r\n")
        if "text" in self.answers and not await self._answer("text", reader, writer):
            return False
        await reader.readuntil(b"\r\n.\r\n")
        self.heard.append(".")
        return await self._answer(".", reader, writer)

    def _said(self, command: str) -> str:
        return {**GOOD, **self.answers}.get(command, "502 5.5.2 what?")

    async def _answer(self, command: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        said = self._said(command)
        if said == HANG_UP:
            writer.transport.abort()
            return False
        if said == SILENCE:
            self.reached.set()
            while await reader.read(65_536):
                pass
            return False
        if said == DEAFNESS:
            cast("asyncio.ReadTransport", writer.transport).pause_reading()
            self.reached.set()
            await self.released.wait()
            writer.transport.abort()
            return False
        writer.write(said.encode() + b"\r\n")
        await writer.drain()
        return command != "QUIT"


@asynccontextmanager
async def scripted(answers: Mapping[str, str]) -> AsyncIterator[Scripted]:
    """Run one that follows a script."""
    script = Scripted(answers)
    server = await asyncio.start_server(script.serve, script.host, 0, limit=1 << 24)
    async with server:
        script.port = server.sockets[0].getsockname()[1]
        yield script


async def main(options: Options) -> None:
    """Run a real one until a signal comes."""
    ledger = Ledger(Path(options.ledger) if options.ledger else None)
    faults = Faults(options.faults, rng=random.Random(options.seed))
    server = MailServer(ledger=ledger, faults=faults, delay_ms=options.delay_ms)
    await server.start(options.host, options.port)
    print(json.dumps({"host": options.host, "port": server.port}), flush=True)
    await until_told_to_stop()
    await server.stop()


if __name__ == "__main__":
    asyncio.run(main(Options(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))))
