"""Twilio on loopback: one account's `Messages.json`.

It follows https://www.twilio.com/docs/messaging/api/message-resource and https://www.twilio.com/docs/api/errors.

It checks what Twilio checks and answers as Twilio does: 201 with a Message, or an error body `{"code", "message",
"more_info", "status"}`. The numbers of Twilio's test credentials (+15005550001 and so on) mean what they mean there.
Where a message names a `StatusCallback`, it tells what became of it, signed as Twilio signs
(https://www.twilio.com/docs/usage/security), in order, shuffled, twice or late.

It runs as a process of its own, too: `python -m tests.deliveries.twilio '{"ledger": "FILE", ...}'` prints
`{"url", "account_sid", "auth_token"}` when it listens, and goes at SIGTERM. Its options are the fields of `Options`.

Faults, each with its chance (`"faults": {"unavailable": 0.05}`). Not taken, and said so: `too_many` (429 with
Retry-After), `unavailable` (503), `unavailable_for` (503 with Retry-After), `internal` (500). Not taken: `drop_unread`
(the connection ends before the request is read), `drop_read` (after). Taken: `internal_taken` (500), `drop_taken` (the
connection ends without an answer), `silent_taken` (it stays open without one), `garbled_taken` (201 with half a body).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import random
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from ssl import SSLContext
from typing import Any, Final
from urllib.parse import parse_qs, parse_qsl, urlsplit

import aiohttp

from tests.deliveries.ledger import Entry, Faults, Ledger, until_told_to_stop

ACCOUNT_SID: Final = "AC" + "0123456789abcdef" * 2
AUTH_TOKEN: Final = "the-token-of-the-account"
FAULTS: Final = frozenset(
    {
        "too_many", "unavailable", "unavailable_for", "internal", "drop_unread", "drop_read",
        "internal_taken", "drop_taken", "silent_taken", "garbled_taken",
    }
)  # fmt: skip

MAGIC_TO: Final = {
    "+15005550001": (400, 21211, "The 'To' number +15005550001 is not a valid phone number."),
    "+15005550002": (400, 21612, "The 'To' phone number: +15005550002, is not currently reachable via SMS."),
    "+15005550003": (400, 21408, "Permission to send an SMS has not been enabled for the region: +15005550003."),
    "+15005550004": (400, 21610, "Attempt to send to unsubscribed recipient"),
    "+15005550009": (400, 21614, "To number: +15005550009, is not a mobile number"),
}
MAGIC_FROM: Final = {
    "+15005550001": (400, 21212, "The 'From' number +15005550001 is not a valid phone number or shortcode."),
    "+15005550007": (400, 21606, "The From phone number +15005550007 is not a valid, SMS-capable number."),
    "+15005550008": (429, 21611, "SMS queue is full."),
}

_PATH: Final = re.compile(r"/2010-04-01/Accounts/(AC[0-9a-f]{32})/Messages\.json")
_E164: Final = re.compile(r"\+[1-9][0-9]{6,14}")
_SENDER: Final = re.compile(r"\+[1-9][0-9]{6,14}|[0-9]{3,6}|MG[0-9a-fA-F]{32}|(?=.*[A-Za-z])[A-Za-z0-9 ]{1,11}")

Form = dict[str, list[str]]


@dataclass
class Options:
    """How a server of its own process is to be.

    Attributes:
        ledger: the file it writes into.
        retry_after_s: what it asks for with `too_many` and `unavailable_for`.
        delay_ms: how long it takes with a message before it answers.
        callbacks: in_order, shuffled, twice, late, or none.
        callback_base: where status callbacks go instead of the origin they name; they are signed as they are named.
        undelivered: the share of messages that end so; the others are delivered.
    """

    host: str = "127.0.0.1"
    port: int = 0
    ledger: str | None = None
    faults: Mapping[str, float] = field(default_factory=dict)
    seed: int = 1
    retry_after_s: float = 1.0
    delay_ms: float = 0.0
    callbacks: str = "in_order"
    callback_base: str = ""
    undelivered: float = 0.0
    late_s: float = 1.0


@dataclass(frozen=True)
class Told:
    """A status callback that was made, and what it was answered (0: not at all)."""

    url: str
    sid: str
    status: str
    answered: int


class Twilio:
    """Twilio's servers.

    Attributes:
        requests: all forms that came, with their headers.
        told: the status callbacks made.
        idle: set while no callback is under way.
    """

    def __init__(
        self,
        options: Options | None = None,
        *,
        tls: SSLContext | None = None,
        script: list[str] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        self.options = options or Options()
        if self.options.callbacks not in {"in_order", "shuffled", "twice", "late", "none"}:
            raise ValueError(f"callbacks can be in_order, shuffled, twice, late or none, not {self.options.callbacks}")
        self.rng = random.Random(self.options.seed)
        self.ledger = Ledger(Path(self.options.ledger) if self.options.ledger else None)
        self.faults = Faults(self.options.faults, script or [], self.rng)
        self.faults.check(FAULTS)
        self.logins = {ACCOUNT_SID: AUTH_TOKEN, **(keys or {})}
        self.requests: list[tuple[dict[str, str], Form]] = []
        self.told: list[Told] = []
        self.reached = asyncio.Event()
        self.gone = asyncio.Event()
        self.url = ""
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._session: aiohttp.ClientSession | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        self._session = aiohttp.ClientSession()
        self._server = await asyncio.start_server(self._serve, self.options.host, self.options.port, ssl=self._tls)
        port = self._server.sockets[0].getsockname()[1]
        host = "localhost" if self._tls else self.options.host
        self.url = f"http{'s' if self._tls else ''}://{host}:{port}"

    async def settled(self) -> None:
        """Wait until all callbacks are made."""
        while self._telling:
            await asyncio.gather(*self._telling)

    async def stop(self) -> None:
        """Take nothing more; make the callbacks that are left."""
        assert self._server is not None
        assert self._session is not None
        self._server.close()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self.settled()
        await self._session.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._serve_one(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the other end has gone, or this server goes
        finally:
            self._serving.discard(task)
            self.gone.set()
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, with one request."""
        fault = self.faults.draw()
        if fault == "drop_unread":
            writer.transport.abort()
            return
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        form = parse_qs((await reader.readexactly(int(headers["content-length"]))).decode(), keep_blank_values=True)
        self.requests.append((headers, form))
        if self.options.delay_ms:
            await asyncio.sleep(self.options.delay_ms / 1000)
        method, path, _ = head[0].split()
        status, body = self._judge(method, path, headers, form)
        taken = status == 201
        if taken:
            status, body, taken = self._harm(fault, status, body)
        sid = str(body.get("sid", ""))
        self.ledger.note(_entry(headers, form, taken=taken, answered=status, sid=sid))
        if taken and self.options.callbacks != "none" and "StatusCallback" in form:
            self._begin_telling(sid, form)
        if status == 0 and fault == "silent_taken":
            self.reached.set()
            await reader.read()
        elif status == 0:
            writer.transport.abort()
        else:
            await self._answer(writer, status, body, fault)

    async def _answer(self, writer: asyncio.StreamWriter, status: int, body: Mapping[str, Any], fault: str) -> None:
        text = json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(text)}"]
        if fault in {"too_many", "unavailable_for"} and status in {429, 503}:
            lines.append(f"Retry-After: {self.options.retry_after_s:g}")
        shown = text[: len(text) // 2] if fault == "garbled_taken" else text
        writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode() + shown)
        await writer.drain()

    def _harm(self, fault: str, status: int, body: dict[str, Any]) -> tuple[int, dict[str, Any], bool]:
        """Return what is answered to a message that could be taken, and whether it was."""
        match fault:
            case "too_many":
                return 429, _error(429, 20429, "Too Many Requests"), False
            case "unavailable" | "unavailable_for":
                return 503, _error(503, 20503, "Service unavailable"), False
            case "internal" | "internal_taken":
                error = _error(500, 20500, "An internal server error has occurred")
                return 500, {**error, "sid": body["sid"]} if fault == "internal_taken" else error, fault != "internal"
            case "drop_read":
                return 0, body, False
            case "drop_taken" | "silent_taken":
                return 0, body, True
        return status, body, True

    def _judge(self, method: str, path: str, headers: dict[str, str], form: Form) -> tuple[int, dict[str, Any]]:
        """Return what Twilio would answer."""
        found = _PATH.fullmatch(path)
        if method != "POST" or found is None:
            return 404, _error(404, 20404, f"The requested resource {path} was not found")
        user, _, password = _login(headers.get("authorization", ""))
        if self.logins.get(user) != password or found[1] != ACCOUNT_SID:
            return 401, _error(401, 20003, "Authenticate")
        to, sender = _one(form, "To"), _one(form, "From") or _one(form, "MessagingServiceSid")
        body, media = _one(form, "Body"), form.get("MediaUrl", [])
        complaint: tuple[int, int, str] | None = MAGIC_TO.get(to) or MAGIC_FROM.get(sender)
        if not to:
            complaint = (400, 21604, "A 'To' phone number is required.")
        elif not sender:
            complaint = (400, 21603, "A 'From' phone number is required.")
        elif not _E164.fullmatch(to):
            complaint = (400, 21211, f"The 'To' number {to} is not a valid phone number.")
        elif not _SENDER.fullmatch(sender):
            complaint = (400, 21212, f"The 'From' number {sender} is not a valid phone number or shortcode.")
        elif not body and not media:
            complaint = (400, 21602, "Message body is required.")
        elif len(body) > 1600:
            complaint = (400, 21617, "The concatenated message body exceeds the 1600 character limit.")
        elif len(media) > 10:
            complaint = (400, 21623, "Number of media files exceeds allowed limit.")
        elif any(urlsplit(url).scheme not in {"http", "https"} for url in media):
            complaint = (400, 21620, "Invalid media URL(s)")
        if complaint is not None:
            return complaint[0], _error(*complaint)
        return 201, self._message(to, sender, body, media)

    def _message(self, to: str, sender: str, body: str, media: list[str]) -> dict[str, Any]:
        """Return a Message as Twilio shows it."""
        sid = ("MM" if media else "SM") + f"{self.rng.getrandbits(128):032x}"
        now = format_datetime(datetime.now(UTC))
        service = sender if sender.startswith("MG") else None
        uri = f"/2010-04-01/Accounts/{ACCOUNT_SID}/Messages/{sid}"
        return {
            "account_sid": ACCOUNT_SID,
            "api_version": "2010-04-01",
            "body": body,
            "date_created": now,
            "date_sent": None,
            "date_updated": now,
            "direction": "outbound-api",
            "error_code": None,
            "error_message": None,
            "from": None if service else sender,
            "messaging_service_sid": service,
            "num_media": str(len(media)),
            "num_segments": "0" if service else "1",
            "price": None,
            "price_unit": "USD",
            "sid": sid,
            "status": "accepted" if service else "queued",
            "subresource_uris": {"media": f"{uri}/Media.json"},
            "to": to,
            "uri": f"{uri}.json",
        }

    # --- Status callbacks ------------------------------------------------------------------------

    def _begin_telling(self, sid: str, form: Form) -> None:
        ends_badly = self.rng.random() < self.options.undelivered
        statuses = ["sent", "undelivered" if ends_badly else "delivered"]  # none is made for the first status, `queued`
        if self.options.callbacks == "twice":
            statuses = [status for status in statuses for _ in range(2)]
        if self.options.callbacks == "shuffled":
            statuses = ["queued", "sending", *statuses]
            self.rng.shuffle(statuses)
        task = asyncio.create_task(self._tell_all(sid, form, statuses), name=f"callbacks of {sid}")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell_all(self, sid: str, form: Form, statuses: list[str]) -> None:
        if self.options.callbacks == "late":
            await asyncio.sleep(self.options.late_s)
        for status in statuses:
            await self.tell(_one(form, "StatusCallback"), sid, status, to=_one(form, "To"), sender=_one(form, "From"))

    async def tell(self, url: str, sid: str, status: str, *, to: str, sender: str) -> None:
        """Make one status callback, signed."""
        assert self._session is not None
        fields = {
            "SmsSid": sid,
            "SmsStatus": status,
            "MessageStatus": status,
            "To": to,
            "MessageSid": sid,
            "AccountSid": ACCOUNT_SID,
            "From": sender,
            "ApiVersion": "2010-04-01",
        }
        if status in {"undelivered", "failed"}:
            fields["ErrorCode"] = "30003"
        parts = urlsplit(url)
        base = self.options.callback_base.rstrip("/")
        target = f"{base}{parts.path}?{parts.query}" if base else url
        headers = {"X-Twilio-Signature": sign(url, fields), "I-Twilio-Idempotency-Token": f"{sid}-{status}"}
        answered = 0
        try:
            async with self._session.post(target, data=fields, headers=headers) as response:
                answered = response.status
        except aiohttp.ClientError:
            pass  # nobody listens: noted as 0
        self.told.append(Told(url, sid, status, answered))


def sign(url: str, fields: Mapping[str, str], token: str = AUTH_TOKEN) -> str:
    """Return the X-Twilio-Signature of a form."""
    text = url + "".join(name + fields[name] for name in sorted(fields))
    return base64.b64encode(hmac.new(token.encode(), text.encode(), hashlib.sha1).digest()).decode()


def _entry(headers: Mapping[str, str], form: Form, *, taken: bool, answered: int, sid: str) -> Entry:
    query = dict(parse_qsl(urlsplit(_one(form, "StatusCallback")).query))
    delivery = query.get("delivery") or headers.get("x-request-id", "")
    sender = _one(form, "From") or _one(form, "MessagingServiceSid")
    return Entry(delivery, sender, _one(form, "To"), _one(form, "Body"), taken, answered, sid)


def _one(form: Form, name: str) -> str:
    return form.get(name, [""])[0]


def _login(header: str) -> tuple[str, str, str]:
    kind, _, value = header.partition(" ")
    return base64.b64decode(value).decode().partition(":") if kind == "Basic" else ("", "", "")


def _error(status: int, code: int, message: str) -> dict[str, Any]:
    see = f"https://www.twilio.com/docs/errors/{code}"
    return {"code": code, "message": message, "more_info": see, "status": status}


@asynccontextmanager
async def twilio(options: Options | None = None, **more: Any) -> AsyncIterator[Twilio]:
    """Run one."""
    server = Twilio(options, **more)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def main(options: Options) -> None:
    """Run one until a signal comes."""
    async with twilio(options) as server:
        ready = {"url": server.url, "account_sid": ACCOUNT_SID, "auth_token": AUTH_TOKEN}
        print(json.dumps(ready), flush=True)
        await until_told_to_stop()


if __name__ == "__main__":
    asyncio.run(main(Options(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))))
