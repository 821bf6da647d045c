"""Bounds on what a client may make us hold: bytes of head and body, time to send them, number of connections.

uvicorn bounds none of these with its fast parser. Three rules, kept by `BoundedHttp`, do:

- **Time.** From the first byte of a request (or the start of the connection) to the last byte of its body at most
  `receive_timeout_s` may pass. Only a request that does not arrive in one piece ever starts the timer. The rule holds
  also for a body that nobody reads any more, because its request was answered early (413).
- **Reading.** A client that takes nothing of what is written to it for `send_timeout_s` is dropped: it would hold its
  connection, and what it was to be told, until the gateway ends.
- **Bytes.** The parser keeps names and values of headers until they are whole. So bytes that it has taken without
  giving anything back - a head that does not end, or trailers - are counted, and are at most `MAX_HEAD_BYTES`.
  What it gives back as body is bounded by `read_body`, or discarded.

An offer to upgrade (`Upgrade: h2c`, which Java's client makes with its first request) is ignored, as HTTP lets us. The
parser would stop after its head and lose the body, so the request is parsed again without the offer.

Head and body of an answer leave in one piece (`_OneWrite`): uvicorn writes each by itself, and a write costs more than
anything else that an answer needs.

Too many connections are told so once they have asked, and may still reach health and metrics: a busy gateway must not
look like a dead one. Beyond `_CROWD` more, connections are dropped unheard.
"""

# ruff: noqa: D102 - the methods of BoundedHttp are the protocol's: asyncio and uvicorn say what they are

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import httptools
import orjson
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.errors import RETRY_SOON_S, ClientGone, Problem
from gateway.metrics import REFUSALS
from pipeline.job import new_id
from pipeline.settings import GatewaySettings

MAX_HEAD_BYTES: Final = 16 * 1024  # as much as Node takes; browsers and proxies stay below 8 KiB
PROBES: Final = frozenset({"/livez", "/readyz", "/healthz", "/metrics", "/sd/targets"})
_CROWD: Final = 256

_INVALID = Problem(400, "invalid_http", "the request line or its headers cannot be read")
_HEAD_TOO_LARGE = Problem(431, "head_too_large", f"the request's head is over {MAX_HEAD_BYTES} bytes")
_TOO_SLOW = Problem(408, "receive_timeout", "the request took too long to arrive")
_CROWDED = Problem(503, "too_many_connections", "too many connections are open", retry_after_s=RETRY_SOON_S)


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> bytes:
    """Return the whole body.

    Raises:
        Problem: 413, it is over *limit* bytes; what was announced as such is not even read.
        ClientGone: the client left half-way.
    """
    announced = headers.get(b"content-length")
    if announced is not None and int(announced) > limit:  # the parser has checked that it is a number
        raise _too_large(limit)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body") and len(body) <= limit:
        return body
    parts = [body]
    size = len(body)
    while message["type"] == "http.request" and message.get("more_body") and size <= limit:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
    if message["type"] != "http.request":
        raise ClientGone
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> Problem:
    return Problem(413, "body_too_large", f"the body is over {limit} bytes")


def bounded(settings: GatewaySettings) -> type[BoundedHttp]:
    """Return the protocol class that keeps the bounds of *settings*."""
    return type("BoundedHttp", (BoundedHttp,), {"limits": settings})


class _RefusedHead(Exception):  # travels through the parser only, never further
    """Stops the parser."""


class _OneWrite:
    """A transport that gathers what is written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():  # the client may have left meanwhile
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with bounds."""

    limits: ClassVar[GatewaySettings]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._partial = True  # some of a request is still to come
        self._in_body = False  # its head is whole
        self._unparsed = 0  # bytes the parser took since it last gave something back
        self._refusal = _INVALID

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(_OneWrite(transport, self.loop))  # type: ignore[arg-type]  # all that uvicorn uses of one
        surplus = len(self.connections) - self.limits.max_connections
        if surplus > _CROWD:
            REFUSALS.labels(_CROWDED.code).inc()
            transport.abort()
            return
        if surplus > 0:
            self.app = _crowded(self.app)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._partial = True
        self._unparsed += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._parse_again(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._refuse(self._refusal)
            return
        if not self._partial:
            self._stop_timer()
        elif self._unparsed > MAX_HEAD_BYTES:
            self._refuse(_HEAD_TOO_LARGE)
        elif self._timer is None:
            self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.send_timeout_s, self._on_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting_for_reader()

    # What the parser calls while it is fed.

    def on_message_begin(self) -> None:
        self._partial = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._unparsed > MAX_HEAD_BYTES and self._head_bytes() > MAX_HEAD_BYTES:
            self._refusal = _HEAD_TOO_LARGE
            raise _RefusedHead
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _RefusedHead
            return  # the parser stops now, and `_parse_again` goes on
        self._unparsed = 0
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._partial = self._in_body = False
        self._unparsed = 0
        super().on_message_complete()

    def _parse_again(self, rest: bytes) -> None:
        """Parse the present request once more, without its offer to upgrade."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(lines))
        self.parser = httptools.HttpRequestParser(self)
        self._unparsed = 0
        self.data_received(head + rest)

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.limits.receive_timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._is_answering() or self.flow.read_paused:
            self._start_timer()  # we are the slow side; what has come of the next request can wait
        elif self._in_body or self._unparsed:
            self._refuse(_TOO_SLOW)
        else:
            self.transport.close()  # opened and never used, as browsers do: nothing was asked, nothing is answered

    def _stop_waiting_for_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _on_unread(self) -> None:
        self._unread = None
        REFUSALS.labels("send_timeout").inc()
        self.transport.abort()  # `close` would wait for the reader

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """End the connection, with an answer where none is under way or given for this request."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        REFUSALS.labels(problem.code).inc()
        cycle = self.cycle
        unanswered = cycle is not None and not cycle.response_complete
        answered_early = self._in_body and not unanswered
        if not (answered_early or self._is_answering() or (unanswered and cycle.response_started)):
            self.transport.write(_raw_answer(problem))
        if unanswered:
            cycle.disconnected = True  # the request's task learns it as a disconnect and writes nothing more
            cycle.message_event.set()
        self.transport.close()


def _last_words(problem: Problem) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of an answer that ends its connection."""
    body = orjson.dumps(problem.value)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", new_id().encode()),
        (b"connection", b"close"),
        *problem.headers,
    ]
    return headers, body


def _raw_answer(problem: Problem) -> bytes:
    headers, body = _last_words(problem)
    return STATUS_LINE[problem.status] + b"".join(b"%b: %b\r\n" % header for header in headers) + b"\r\n" + body


def _crowded(app: ASGIApp) -> ASGIApp:
    """Return *app* for a connection too many: health and metrics only."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await app(scope, receive, send)
            return
        REFUSALS.labels(_CROWDED.code).inc()
        headers, body = _last_words(_CROWDED)
        await send({"type": "http.response.start", "status": _CROWDED.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return refuse
