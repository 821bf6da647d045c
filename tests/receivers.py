"""Receivers of webhooks: real HTTP servers on loopback that note what they are told and behave as a test says."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from standardwebhooks import Webhook as Verifier

Json = dict[str, Any]


@dataclass(frozen=True)
class News:
    """One request that a receiver got."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def id(self) -> str:
        """The header `webhook-id`."""
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> Json:
        """Return the body, as somebody who holds *secret* may believe it."""
        body: Json = Verifier(secret).verify(self.raw, self.headers)
        return body


async def read_news(reader: asyncio.StreamReader) -> News:
    """Read one request."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
    return News(head[0].split()[1], headers, await reader.readexactly(int(headers["content-length"])))


Behaviour = Callable[["Receiver", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Receiver:
    """One receiver.

    Attributes:
        behaviours: how it treats the first requests, one each; afterwards it says 204.
        got: what it was told, in order.
        told: set with each request.
        gone: set when a connection's other end has gone.
    """

    behaviours: list[Behaviour] = field(default_factory=list)
    got: list[News] = field(default_factory=list)
    url: str = ""
    told: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, with one request."""
        try:
            news = await read_news(reader)
            behave = self.behaviours.pop(0) if self.behaviours else answer(204)
            self.got.append(news)
            self.told.set()
            await behave(self, writer)
            await reader.read()
            self.gone.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()


def answer(status: int, *headers: str, body: bytes = b"") -> Behaviour:
    """Give a whole answer."""

    async def behave(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} X", *headers, f"content-length: {len(body)}", "connection: close"]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()

    return behave


def say(data: bytes, *, then_close: bool = True) -> Behaviour:
    """Send these bytes, then hang up, or stay."""

    async def behave(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if then_close:
            writer.write_eof()

    return behave


async def stay_silent(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
    """Take the news and say nothing until the other end goes."""


async def flood(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
    """Answer well and never end the body."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
    while True:
        writer.write(b"x" * 65_536)
        await writer.drain()


async def flood_of_headers(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
    """Begin an answer whose head never ends."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: and more\r\n" * 1_000)
        await writer.drain()


@asynccontextmanager
async def receiving(
    behaviours: Sequence[Behaviour] = (), *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Receiver]:
    """Run a receiver on loopback; its URL's host is *host*."""
    receiver = Receiver(list(behaviours))
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        receiver.url = f"http{'s' if tls else ''}://{host}:{port}/hook"
        yield receiver
