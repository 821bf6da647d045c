"""The bytes of one connection to Redis: a command out, its reply in.

redis-py makes the connection: address, TLS, credentials. What comes after goes past its reader and the streams of
asyncio, which take twice the processor time for each call (`docs/PERFORMANCE.md`, "Less for each turn").
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

import hiredis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio.connection import AbstractConnection

_INCOMPLETE: Final = object()


class Wire(asyncio.Protocol):
    """Takes over the transport of a connection that redis-py has just made.

    Replies are bytes, integers, lists and None, as hiredis reads them; an error is a `hiredis.ReplyError`, returned.

    Attributes:
        is_lost: nothing more will come, and nothing can be sent.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self.is_lost = False
        self._parser = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._replies: deque[Any] = deque()  # those that nobody has taken yet
        self._waiter: asyncio.Future[None] | None = None  # woken when there is one; it carries none, lest one be lost
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        writer = cast("asyncio.StreamWriter", connection._writer)  # noqa: SLF001 - redis-py shows it nowhere else
        self._transport = cast("asyncio.Transport", writer.transport)
        self._transport.set_protocol(self)

    def send(self, args: Sequence[str | bytes | int | float]) -> None:
        """Send one command."""
        self._transport.write(hiredis.pack_command(tuple(args)))  # type: ignore[arg-type]  # its stub: a tuple of one

    async def reply(self) -> Any:
        """Return the next reply, in the order of the commands.

        Raises:
            ConnectionError: the connection is lost.
            hiredis.ProtocolError: what came is not what Redis says.
        """
        while not self._replies:
            if self.is_lost:
                raise self._lost()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._replies.popleft()

    # --- what the transport tells --------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not _INCOMPLETE:
                self._replies.append(reply)
        except hiredis.ProtocolError as error:
            self._end(error)
            self._transport.abort()
        if self._replies:
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Hear that the connection has ended."""
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self.is_lost:
            return
        self.is_lost, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _lost(self) -> Exception:
        if isinstance(self._error, hiredis.ProtocolError):
            return self._error
        return ConnectionError(str(self._error or "the connection was closed"))

    def __repr__(self) -> str:
        return f"<Wire is_lost={self.is_lost} unread={len(self._replies)}>"
