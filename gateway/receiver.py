"""A receiver of webhooks on loopback, for as long as `penstock verify` waits for one: notes what it is told."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

MOST_BYTES: Final = 1 << 20
TAKEN_S: Final = 10.0
"""How long another run of `penstock verify` may listen there."""
AGAIN_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """What was told: headers by lower-case name, and the body as it came."""

    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Receiver:
    """Where it listens, and what it was told."""

    url: str = ""
    told: asyncio.Queue[Request] = field(default_factory=asyncio.Queue)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take one request on one connection."""
        try:
            with suppress(
                asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, KeyError, ConnectionError
            ):
                self.told.put_nowait(await _read(reader))
                writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
                await writer.drain()
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    return Request(headers, await reader.readexactly(min(int(headers["content-length"]), MOST_BYTES)))


@asynccontextmanager
async def receiving(url: str = "") -> AsyncIterator[Receiver]:
    """Run a receiver at *url*, on loopback; "": on a free port.

    Raises:
        OSError: somebody else listens there.
    """
    receiver = Receiver(url)
    server = await _listen(receiver, urlsplit(url).port or 0)
    async with server:
        receiver.url = url or f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/verify"
        yield receiver


async def _listen(receiver: Receiver, port: int) -> asyncio.Server:
    give_up_s = time.monotonic() + TAKEN_S
    while True:
        try:
            return await asyncio.start_server(receiver.serve, "127.0.0.1", port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > give_up_s:
                raise
        await asyncio.sleep(AGAIN_S)
