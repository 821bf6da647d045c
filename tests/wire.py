"""A wire that can die silently: a proxy before Redis whose connections go half-open by their client's name."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from pathlib import Path
from typing import Self

from pipeline.private_redis import url
from tests.servers import RedisServer

_NAME = re.compile(rb"SETNAME\r\n\$\d+\r\n([^\r]+)\r\n")


class _Connection:
    name = ""
    is_dead = False


class Wire:
    """Between clients and *server*; use as `async with`, and give clients its `url`.

    A dead connection stays open at both ends and carries nothing: Redis may still serve what waits on it.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._directory = Path(tempfile.mkdtemp(prefix="penstock-wire-"))
        self._socket = self._directory / "wire.sock"
        self._connections: list[_Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return url(self._socket)

    def knows(self, name: str) -> bool:
        """Say whether the client *name* has a living connection."""
        return any(connection.name == name and not connection.is_dead for connection in self._connections)

    def kill(self, name: str) -> None:
        """Let every present connection of the client *name* die silently; new ones work."""
        found = [connection for connection in self._connections if connection.name == name and not connection.is_dead]
        assert found, f"{name} has no connection"
        for connection in found:
            connection.is_dead = True

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection()
        self._connections.append(connection)
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._server.socket)
        there = self._spawn(self._pump(connection, reader, upstream_writer))
        back = self._spawn(self._pump(connection, upstream_reader, writer))
        try:
            await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
            if connection.is_dead:  # the other end never learns of it
                await asyncio.Event().wait()
        finally:
            for task in (there, back):
                task.cancel()
            for one in (writer, upstream_writer):
                one.close()

    async def _pump(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if found := _NAME.search(data):
                connection.name = found[1].decode()
            if not connection.is_dead:
                writer.write(data)

    def _spawn(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]  # a coroutine of ours
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_unix_server(lambda r, w: self._spawn(self._carry(r, w)), self._socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self._directory, ignore_errors=True)
