"""HTTP/1.1 as the llm stage needs it: one POST, one whole answer, over connections that are kept.

Nothing else is here: no redirects, cookies, proxies, streams. That is why it exists: a call costs a fifth of what it
costs through a library (docs/PERFORMANCE.md). httptools reads the answers, as it reads the gateway's requests.

A connection serves one call at a time; it is idle, in use, or gone. The pool is not bounded: whoever calls is.
An idle connection goes when its time is over, when its other end closes it, or when anything comes over it unasked.
A call that is cancelled, or whose answer breaks, takes its connection with it.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, cast
from urllib.parse import quote, urlsplit

import httptools
from msgspec import Struct

MAX_HEAD_BYTES: Final = 64 * 1024  # four times what servers send at most

_PATH: Final = "/%:@!$&'()*+,;=~"  # what may stand in a path as it is
_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS


class Unreachable(Exception):
    """No connection came about, or it ended before anything was written: nobody has read the request."""


class HungUp(Exception):
    """The connection ended before its answer had begun.

    Attributes:
        was_kept: it had served a call before, so that it may have been closed while it lay idle.
    """

    def __init__(self, words: str, *, was_kept: bool) -> None:
        super().__init__(words)
        self.was_kept = was_kept


class BrokenAnswer(Exception):
    """What came back is not one whole HTTP answer."""


class TooLarge(BrokenAnswer):
    """The answer is larger than allowed."""


class Response(Struct, frozen=True):
    """A whole answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class Target:
    """Where calls go, taken apart once, and the connections to it that nobody uses now, the latest last."""

    host: str
    port: int
    tls: bool
    head: bytes
    idle: dict[_Connection, None] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str]) -> Target:
        """Return the target of POSTs to *url* that all carry *headers*.

        Raises:
            ValueError: it is no address.
        """
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port if parts.port is not None else 443 if tls else 80
        path = quote(parts.path or "/", safe=_PATH) + (f"?{parts.query}" if parts.query else "")
        host = parts.netloc.encode("idna").decode()
        lines = [f"POST {path} HTTP/1.1", f"host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
        return cls(parts.hostname or "", port, tls, "\r\n".join(lines).encode("ascii"))


class Pool:
    """Connections to any number of targets."""

    def __init__(self, *, connect_timeout_s: float, keep_alive_s: float, max_answer_bytes: int) -> None:
        """Open nothing yet.

        Args:
            keep_alive_s: how long a connection may lie idle.
            max_answer_bytes: of one answer, head and all.
        """
        self._connect_timeout_s = connect_timeout_s
        self._keep_alive_s = keep_alive_s
        self._max_answer_bytes = max_answer_bytes
        self._open: set[_Connection] = set()

    async def post(
        self,
        target: Target,
        request_id: str,
        body: bytes,
        *,
        fresh: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send *body* and return the whole answer.

        Args:
            fresh: over a new connection.
            headers: of this call only.
        Raises:
            Unreachable, HungUp, BrokenAnswer: none came.
        """
        connection = None if fresh else self._take(target)
        if connection is None:
            connection = await self._connect(target)
        own = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items()).encode("ascii")
        head = b"%b\r\nx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n" % (
            target.head,
            request_id.encode(),
            own,
            len(body),
        )
        response = await connection.exchange(head + body)
        if connection.is_usable:
            connection.rest(target.idle, self._keep_alive_s)
        else:
            connection.abort()
        return _decoded(response, self._max_answer_bytes)

    async def close(self) -> None:
        """Close all connections; whoever still calls hears of it."""
        left = list(self._open)
        for connection in left:
            connection.abort()
        await asyncio.gather(*(connection.ended for connection in left))

    def _take(self, target: Target) -> _Connection | None:
        while target.idle:
            connection = next(reversed(target.idle))
            connection.wake()
            if connection.is_usable:
                return connection
        return None

    async def _connect(self, target: Target) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._open, self._max_answer_bytes),
                    target.host,
                    target.port,
                    ssl=self._tls if target.tls else None,
                )
        except TimeoutError as error:
            raise Unreachable(f"no connection within {self._connect_timeout_s:g} s") from error
        except OSError as error:
            raise Unreachable(str(error)) from error
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        import httpx  # late: most replicas are called over plain HTTP, and it takes 0.1 s of a start

        return httpx.create_ssl_context()

    def __repr__(self) -> str:
        return f"<Pool open={len(self._open)}>"


class _Connection(asyncio.Protocol):
    """One connection; the parser calls it back with what an answer is made of."""

    def __init__(self, register: set[_Connection], max_answer_bytes: int) -> None:
        self._register = register
        self._max_answer_bytes = max_answer_bytes
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._calls = 0
        self._answer: asyncio.Future[Response] | None = None
        self.ended = asyncio.get_running_loop().create_future()
        self._is_sound = True  # nothing has come that nobody asked for, and the answer does not end the connection
        self._idle: dict[_Connection, None] | None = None  # where it lies while nobody uses it
        self._timer: asyncio.TimerHandle | None = None
        self._size = 0  # of all that came since the present call began
        self._forget()

    def _forget(self) -> None:
        self._has_head = False
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    @property
    def is_usable(self) -> bool:
        """Whether another call may go over it."""
        transport = self._transport
        return self._is_sound and not transport.is_closing() and not transport.get_write_buffer_size()

    async def exchange(self, request: bytes) -> Response:
        """Send a request and return its answer."""
        if self._transport.is_closing():
            if not self._calls:
                raise Unreachable("the connection ended as soon as it was there")
            raise HungUp("", was_kept=True)
        self._forget()
        self._size = 0
        self._calls += 1
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:
            self.abort()
            raise
        finally:
            self._answer = None

    def rest(self, idle: dict[_Connection, None], keep_alive_s: float) -> None:
        """Lie in *idle*, for so long at most."""
        self._idle = idle
        idle[self] = None
        self._timer = asyncio.get_running_loop().call_later(keep_alive_s, self.abort)

    def wake(self) -> None:
        """Leave the idle ones."""
        if self._idle is not None and self._timer is not None:
            self._timer.cancel()
            del self._idle[self]
            self._idle = None

    def abort(self) -> None:
        """End it at once."""
        self.wake()
        self._transport.abort()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by descent
        self._register.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._register.discard(self)
        self.ended.set_result(None)
        self.wake()
        ends_by_closing = not self._headers.keys() & {"content-length", "transfer-encoding"}
        if not self._has_head:
            self._fail(HungUp(str(exc or ""), was_kept=self._calls > 1))
        elif ends_by_closing and exc is None:
            self._complete()
        else:
            self._fail(BrokenAnswer("the connection ended within it"))

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        if self._answer is None or self._answer.done():
            self._is_sound = False
            self.abort()
        elif self._size > self._max_answer_bytes:
            self._fail(TooLarge(f"it is over {self._max_answer_bytes} bytes"))
        else:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._is_sound = False  # it has changed to a protocol that nobody asked for; its head is the answer
        except httptools.HttpParserError as error:
            self._fail(BrokenAnswer(str(error)))
        if not self._has_head and self._size > MAX_HEAD_BYTES:
            self._fail(BrokenAnswer("its head is too large"))

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._forget()
        if self._answer is None or self._answer.done():
            self._is_sound = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if 100 <= self._parser.get_status_code() < 200 and not self._parser.should_upgrade():
            self._has_head = False  # "100 Continue" and the like: the answer is still to come
            return
        self._is_sound = self._is_sound and self._parser.should_keep_alive()
        self._complete()

    def _complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            status = self._parser.get_status_code()
            self._answer.set_result(Response(status, self._headers, b"".join(self._body)))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def __repr__(self) -> str:
        return f"<_Connection calls={self._calls} sound={self._is_sound} idle={self._idle is not None}>"


def _decoded(response: Response, max_bytes: int) -> Response:
    """Return *response* with its body unpacked, where it was packed although nobody asked for that."""
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return response
    if encoding not in {"gzip", "x-gzip", "deflate"}:
        raise BrokenAnswer(f"its encoding is {encoding}")
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        body = unpacker.decompress(response.body, max_bytes)
    except zlib.error as error:
        raise BrokenAnswer(str(error)) from error
    if unpacker.unconsumed_tail:
        raise TooLarge(f"it is over {max_bytes} bytes")
    return Response(response.status, response.headers, body)
