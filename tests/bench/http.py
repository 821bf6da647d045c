"""The least HTTP client that can ask and read an answer: HTTP/1.1, connections that stay open, nothing parsed twice.

A load generator must not measure itself: a client library costs as much per call as what is to be measured here.
Answers need a content-length, which the gateway and the replicas send.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast
from urllib.parse import urlsplit

import orjson

from pipeline.job import Json
from tests.bench.loads import Call


class Connection(asyncio.Protocol):
    """One connection: a request out, an answer in."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._got = b""
        self._body_at = 0
        self._ends_at = 0

    @property
    def is_open(self) -> bool:
        """Whether it can be used."""
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by descent

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("the connection was lost"))

    def data_received(self, data: bytes) -> None:
        self._got += data
        if not self._ends_at:
            head, blank, _ = self._got.partition(b"\r\n\r\n")
            if not blank:
                return
            self._body_at = len(head) + 4
            _, found, length = head.lower().partition(b"\r\ncontent-length:")
            if not found:
                raise ValueError("an answer without content-length")
            self._ends_at = self._body_at + int(length.partition(b"\r\n")[0])
        if len(self._got) >= self._ends_at:
            assert self._answer is not None
            if not self._answer.done():
                self._answer.set_result((int(self._got[9:12]), self._got[self._body_at :]))

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and return status and body of its answer."""
        assert self._transport is not None
        self._got, self._ends_at = b"", 0
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()


class Peer:
    """One server, and the open connections to it that nobody uses now."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = f"host: {parts.netloc}\r\ncontent-type: application/json\r\ncontent-length: ".encode()
        self._idle: list[Connection] = []

    async def open(self, count: int) -> None:
        """Have *count* connections open, so that no call waits for one."""
        self._idle += [await self._connect() for _ in range(count)]

    async def post(self, path: bytes, body: bytes) -> bytes:
        """Return the body of the answer.

        Raises:
            RuntimeError: its status is not 200.
        """
        connection = await self._connection()
        request = b"POST %b HTTP/1.1\r\n%b%d\r\n\r\n%b" % (path, self._head, len(body), body)
        try:
            status, answer = await connection.send(request)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        if status != 200:
            raise RuntimeError(f"http {status} {answer[:200]!r}")
        return answer

    def close(self) -> None:
        """Close what is open."""
        for connection in self._idle:
            connection.close()

    async def _connection(self) -> Connection:
        """Return an open connection: one that lay idle for too long was closed by the server."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return await self._connect()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port)
        return connection


@asynccontextmanager
async def submitting(urls: list[str], path: str, bodies: list[Json], open_first: int = 64) -> AsyncIterator[Call]:
    """Give the call: post one of the *bodies* in turn to one of the servers in turn."""
    peers = [Peer(url) for url in urls]
    written = [orjson.dumps(body) for body in bodies]
    where = path.encode()
    for peer in peers:
        await peer.open(open_first)

    async def call(number: int) -> None:
        await peers[number % len(peers)].post(where, written[number % len(written)])

    try:
        yield call
    finally:
        for peer in peers:
            peer.close()
