"""Three no-op hops by the least that can be written by hand: the floor under any system on Redis Streams in Python.

One redis-py connection per process, read without its client's per-command work; one EVALSHA per batch acknowledges,
deletes and adds to the next stream. No envelope, no lease, no owner check, no deadline, no retry: what it reads it may
lose.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, parse_url

from pipeline.job import Json
from tests.bench.loads import Call

GROUP: Final = "hops"
AT_ONCE: Final = 64
BLOCK_MS: Final = 1_000
LAST: Final = "floor:3"
KEPT: Final = 10_000

MOVE: Final = """
for i = 3, #ARGV, 2 do
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
  redis.call('XDEL', KEYS[1], ARGV[i])
  if ARGV[2] == 'last' then
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', 10000, '*', 'data', ARGV[i + 1])
  else
    redis.call('XADD', KEYS[2], '*', 'data', ARGV[i + 1])
  end
end
"""
ADD: Final = "for i = 1, #ARGV do redis.call('XADD', KEYS[1], '*', 'data', ARGV[i]) end"


class Wire:
    """One connection: a command out, a reply in."""

    def __init__(self, url: str) -> None:
        options: dict[str, Any] = dict(parse_url(url))
        kind: type[AbstractConnection] = options.pop("connection_class", Connection)
        self._connection = kind(**options, protocol=2)

    async def call(self, *args: str | bytes | int) -> Any:
        await self._connection.send_packed_command(self._connection.pack_command(*args), check_health=False)
        return await self._connection.read_response()

    async def load(self, script: str) -> str:
        await self._connection.connect()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        await self.call("SCRIPT", "LOAD", script)
        return hashlib.sha1(script.encode()).hexdigest()

    async def close(self) -> None:
        await self._connection.disconnect(nowait=True)


async def work(url: str, hop: int) -> None:
    """Be one hop until killed."""
    wire = Wire(url)
    sha = await wire.load(MOVE)
    here, there, kind = f"floor:{hop}", f"floor:{hop + 1}", "last" if hop == 2 else "next"
    try:
        await wire.call("XGROUP", "CREATE", here, GROUP, "0", "MKSTREAM")
    except exceptions.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        reply = await wire.call(
            "XREADGROUP", "GROUP", GROUP, "c", "COUNT", AT_ONCE, "BLOCK", BLOCK_MS, "STREAMS", here, ">"
        )
        if not reply:
            continue
        args: list[str | bytes | int] = [GROUP, kind]
        for entry_id, fields in reply[0][1]:
            job = orjson.loads(fields[1])
            done = job["id"].encode() if hop == 2 else orjson.dumps(job)
            args += [entry_id, done]
        await wire.call("EVALSHA", sha, 2, here, there, *args)


@asynccontextmanager
async def submitting(url: str, payload: Json) -> AsyncIterator[Call]:
    """Give the call: add one job and wait until its id comes out at the end."""
    adder, reader = Wire(url), Wire(url)
    sha = await adder.load(ADD)
    await reader.load(ADD)
    waiting: dict[str, asyncio.Future[None]] = {}
    outbox: list[bytes] = []
    wanted = asyncio.Event()

    async def add() -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            while outbox:
                batch, outbox[:] = outbox[:AT_ONCE], outbox[AT_ONCE:]
                await adder.call("EVALSHA", sha, 1, "floor:0", *batch)

    async def read() -> None:
        last: bytes = b"0"
        while True:
            reply = await reader.call("XREAD", "COUNT", 1000, "BLOCK", BLOCK_MS, "STREAMS", LAST, last)
            entries = reply[0][1] if reply else ()
            last = entries[-1][0] if entries else last
            for _, fields in entries:
                future = waiting.pop(fields[1].decode(), None)
                if future is not None and not future.done():
                    future.set_result(None)

    async def call(_number: int) -> None:
        job_id = uuid.uuid4().hex
        future = waiting[job_id] = asyncio.get_running_loop().create_future()
        outbox.append(orjson.dumps({"id": job_id, "payload": payload}))
        wanted.set()
        await future

    tasks = [asyncio.create_task(add(), name="add"), asyncio.create_task(read(), name="read")]
    try:
        yield call
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await adder.close()
        await reader.close()
