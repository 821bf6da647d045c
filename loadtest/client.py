"""HTTP/1.1 as a load generator needs it: a request is written in the same turn in which its time has come.

Nothing is awaited and no task is made per request: an answer is a call back. httptools reads the answers. A client
library costs several times as much per call, and a generator must not measure itself.

A connection serves one exchange at a time and is kept. Where all are in use a new one is opened, up to a bound; beyond
it exchanges stand in line, and have not begun as long as they do. An exchange ends exactly once: with an answer, or
with the kind of its failure.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol, cast

import httptools

if TYPE_CHECKING:
    from loadtest.target import Address

TIMEOUT: Final = "timeout"
NO_CONNECTION: Final = "no connection"
LOST: Final = "connection lost"
BROKEN: Final = "broken answer"
TOO_LONG: Final = "answer too long"
MOST_BYTES: Final = 32 << 20  # of one answer's body: more is no answer to a question, and fifty of them must fit
_SWEEP_S: Final = 0.02  # between two looks for exchanges whose time is over


class Exchange:
    """One request and its answer. Instants are of `time.perf_counter`.

    Attributes:
        number: of the request in the whole run.
        planned_s: when it was to be sent.
        began_s: when it was, or when a connection was asked for on its behalf; None: it stands in line.
        ends_s: when its time is over.
    """

    __slots__ = ("began_s", "connection", "ends_s", "is_over", "number", "planned_s", "request")

    def __init__(self, number: int, planned_s: float, ends_s: float, request: bytes) -> None:
        self.number = number
        self.planned_s = planned_s
        self.ends_s = ends_s
        self.request = request
        self.began_s: float | None = None
        self.connection: Connection | None = None
        self.is_over = False


class Ended(Protocol):
    """Is told of the end of each exchange: an answer with its status, or a failure with its kind."""

    def __call__(self, exchange: Exchange, ended_s: float, failure: str | None, status: int, body: bytes) -> None:
        """Hear of it; status and body are those of an answer."""


class Connection(asyncio.Protocol):
    """One connection: written and read by its peer's exchanges, one after the other."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._has_head = False

    @property
    def is_open(self) -> bool:
        """Whether requests can be written: a server may close a connection in the moment in which it is made."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: Exchange) -> None:
        """Write a request; the connection must be idle."""
        assert self._transport is not None
        self._exchange = exchange
        exchange.connection = self
        self._transport.write(exchange.request)

    def abort(self) -> None:
        """Close it at once; nobody is told of its exchange."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note: called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by descent

    def connection_lost(self, exc: Exception | None) -> None:
        """End what was under way: called by the event loop."""
        self._transport = None
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            # An answer without a length ends with its connection; one that has a length was cut off.
            is_answer = exc is None and self._has_head and not self._parser.should_keep_alive()
            status = self._parser.get_status_code() if is_answer else 0
            body = b"".join(self._parts)
            self._peer.ended(exchange, perf_counter(), None if is_answer else LOST, status, body)
        self._peer.lost(self)

    def data_received(self, data: bytes) -> None:
        """Read on: called by the event loop."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._give_up(BROKEN)

    def on_headers_complete(self) -> None:
        """Take note that an answer has begun: called by the parser."""
        self._has_head = True

    def on_body(self, part: bytes) -> None:
        """Keep a piece of the body: called by the parser."""
        self._size += len(part)
        if self._size > MOST_BYTES:
            self._parts.clear()
            self._give_up(TOO_LONG)
        else:
            self._parts.append(part)

    def on_message_complete(self) -> None:
        """End the exchange: called by the parser."""
        status = self._parser.get_status_code()
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        self._has_head = False
        if status < 200:  # an interim answer; the real one follows
            return
        exchange, self._exchange = self._exchange, None
        if exchange is None:  # nobody asked
            self.abort()
            return
        now = perf_counter()
        if self._parser.should_keep_alive():
            self._peer.freed(self)
        elif self._transport is not None:
            self._transport.close()
        self._peer.ended(exchange, now, None, status, body)

    def _give_up(self, kind: str) -> None:
        exchange = self._exchange
        self.abort()
        if exchange is not None:
            self._peer.ended(exchange, perf_counter(), kind, 0, b"")


class Peer:
    """A server and the connections to it.

    Args:
        host: a numeric address: a name would be looked up for each connection.
        connections: how many are open at most.
        on_end: is told of each exchange's end.
    """

    def __init__(self, host: str, address: Address, connections: int, on_end: Ended) -> None:
        self._host = host
        self._address = address
        self._tls = ssl.create_default_context() if address.is_tls else None
        self._limit = connections
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._idle: list[Connection] = []
        self._line: deque[Exchange] = deque()
        self._clock: deque[Exchange] = deque()  # all that began and may not be over, the oldest first
        self._opening: set[asyncio.Task[None]] = set()
        self._open: set[Connection] = set()
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)

    def start(self, exchange: Exchange) -> None:
        """Send it now, over an idle connection if there is one."""
        self._clock.append(exchange)
        if self._idle:
            exchange.began_s = perf_counter()
            self._idle.pop().send(exchange)
        elif len(self._open) + len(self._opening) < self._limit:
            self._connect_for(exchange)
        else:
            self._line.append(exchange)

    def freed(self, connection: Connection) -> None:
        """Take a connection back, for the next in line."""
        waiting = self._next_in_line()
        if waiting is None:
            self._idle.append(connection)
        else:
            waiting.began_s = perf_counter()
            connection.send(waiting)

    def lost(self, connection: Connection) -> None:
        """Forget a connection, and open another for who stands in line."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._connect_for_next()

    def ended(self, exchange: Exchange, now: float, failure: str | None, status: int, body: bytes) -> None:
        """Tell of an exchange's end, once."""
        if not exchange.is_over:
            exchange.is_over = True
            exchange.connection = None
            self._on_end(exchange, now, failure, status, body)

    async def close(self) -> None:
        """Close every connection; nobody is told of exchanges under way."""
        self._sweeper.cancel()
        self._line.clear()
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for connection in list(self._open):
            connection.abort()

    def _next_in_line(self) -> Exchange | None:
        while self._line:
            exchange = self._line.popleft()
            if not exchange.is_over:
                return exchange
        return None

    def _connect_for_next(self) -> None:
        waiting = self._next_in_line()
        if waiting is not None:
            self._connect_for(waiting)

    def _connect_for(self, exchange: Exchange) -> None:
        exchange.began_s = perf_counter()
        task = self._loop.create_task(self._connect(exchange), name=f"connect for {exchange.number}")
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, exchange: Exchange) -> None:
        name = self._address.host if self._tls else None
        try:
            async with asyncio.timeout(max(0.0, exchange.ends_s - perf_counter())):
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self), self._host, self._address.port, ssl=self._tls, server_hostname=name
                )
        except TimeoutError:
            self._not_connected(exchange, TIMEOUT)
        except OSError:  # ssl.SSLError is one
            self._not_connected(exchange, NO_CONNECTION)
        else:
            if not connection.is_open:
                self._not_connected(exchange, LOST)
                return
            self._open.add(connection)
            if exchange.is_over:
                self.freed(connection)
            else:
                connection.send(exchange)

    def _not_connected(self, exchange: Exchange, kind: str) -> None:
        self.ended(exchange, perf_counter(), kind, 0, b"")
        self._connect_for_next()  # else whoever stands in line would wait for a connection that nobody opens

    def _sweep(self) -> None:
        now = perf_counter()
        while self._clock and (self._clock[0].is_over or self._clock[0].ends_s <= now):
            exchange = self._clock.popleft()
            if not exchange.is_over:
                if exchange.connection is not None:
                    exchange.connection.abort()
                self.ended(exchange, now, TIMEOUT, 0, b"")
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)
