"""Talks to a gateway byte by byte, as no HTTP library would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import orjson

from pipeline.job import Json
from tests.conftest import PATIENCE_S


@dataclass
class Connection:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> tuple[int, Json]:
        """Read one JSON answer."""
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status, *lines = head.decode().splitlines()
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            assert headers["content-type"] == "application/json"
            assert headers["x-request-id"]
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), orjson.loads(body)

    async def rest(self) -> bytes:
        """Read until the gateway closes the connection, and return what still came."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


@asynccontextmanager
async def connect(address: tuple[str, int]) -> AsyncIterator[Connection]:
    """Open a connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def request(path: str = "/query", body: bytes = b'{"query": "?"}', **headers: str) -> bytes:
    """Return the bytes of a POST."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode() + body
