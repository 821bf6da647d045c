"""A bench for the llm stage: replicas scripted byte by byte on real sockets, and the rest of the process by hand."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import REGISTRY

from pipeline.errors import PenstockError, Reject, RetryLater
from pipeline.job import Job
from pipeline.replicas import Replicas
from pipeline.settings import Settings
from stages.llm import Llm, build
from tests.conftest import PATIENCE_S

# --- A replica whose every byte is scripted -----------------------------------------------------


@dataclass
class Exchange:
    """One request as the replica read it, and the means to answer it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def until_client_leaves(self) -> None:
        try:
            while await self.reader.read(1024):
                pass
        except ConnectionError:
            pass


Behaviour = Callable[[Exchange], Awaitable[bool]]
"""Answers one request; says whether the connection stays open."""


@dataclass
class Replica:
    """A scripted server: each request gets the next behaviour, then `greet`."""

    script: list[Behaviour] = field(default_factory=list)
    url: str = ""
    exchanges: list[Exchange] = field(default_factory=list)
    connections: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    serving: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        try:
            while exchange := await self._read(reader, writer):
                self.exchanges.append(exchange)
                self.asked.set()
                behaviour = self.script.pop(0) if self.script else greet
                if not await behaviour(exchange):
                    break
        except ConnectionError:
            pass
        finally:
            self.left.set()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def ended(self) -> None:
        """Wait until every connection has ended, as they do when the stage has stopped."""
        if self.serving:
            _, left = await asyncio.wait(self.serving, timeout=PATIENCE_S)
            assert not left

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Exchange(reader, writer, first.split()[1], headers, json.loads(body))


def reply(status: int, body: bytes | str, *headers: str, keep: bool = True) -> Behaviour:
    async def behave(exchange: Exchange) -> bool:
        content = body if isinstance(body, bytes) else body.encode()
        lines = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(content)}", *headers]
        await exchange.send("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        return keep

    return behave


def say(text: str, tokens: int = 7) -> Behaviour:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    return reply(200, json.dumps({"model": "m-1", "choices": [choice], "usage": usage}))


greet = say("hello")


def raw(data: bytes) -> Behaviour:
    async def behave(exchange: Exchange) -> bool:
        await exchange.send(data)
        return False

    return behave


async def hang_up(exchange: Exchange) -> bool:
    return False


async def reset(exchange: Exchange) -> bool:
    connection = exchange.writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


async def stay_silent(exchange: Exchange) -> bool:
    await exchange.until_client_leaves()
    return False


async def stop_half_way(exchange: Exchange) -> bool:
    await exchange.send(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"choices": [')
    await exchange.until_client_leaves()
    return False


async def drip(exchange: Exchange) -> bool:
    await exchange.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    left = asyncio.ensure_future(exchange.until_client_leaves())
    while not left.done():
        await exchange.send(b"1\r\n \r\n")
        await asyncio.wait([left], timeout=0.01)
    return False


# --- The rest of the process, by hand -----------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    url: str
    ok: bool
    duration_s: float
    tokens: int
    refused: bool


class FakeReplicas(Replicas):
    """Moves jobs along a fixed list, and remembers what it was told."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.observations: list[Observation] = []

    async def move(self, job: Job) -> str | None:
        job.replica = next((url for url in self.urls if url not in job.avoid), None)
        return job.replica

    def observe(self, url: str, *, ok: bool, duration_s: float = 0.0, tokens: int = 0, refused: bool = False) -> None:
        self.observations.append(Observation(url, ok, duration_s, tokens, refused))


@dataclass
class FakeContext:
    replicas: FakeReplicas
    worker: str = "worker-1"
    batches: Any = None
    clock: Any = None
    webhooks: Any = None
    chats: Any = None
    reports: Any = None
    deliveries: Any = None


@dataclass
class Bench:
    """A started stage, its replicas, and jobs to give it."""

    stage: Llm
    replicas: list[Replica]
    registry: FakeReplicas

    def job(self, *, attempt: int = 1, flow: str = "message", **payload: Any) -> Job:
        return Job(
            id="job-1",
            flow=flow,
            payload=payload or {"prompt": "the secret question"},
            route=[],
            deadline_ms=0,
            attempt=attempt,
            replica=self.registry.urls[0],
        )

    async def failure(self, job: Job) -> Reject | RetryLater:
        with pytest.raises(PenstockError) as caught:
            await self.stage.handle(job)
        assert isinstance(caught.value, (Reject, RetryLater))
        return caught.value


Build = Callable[..., Awaitable[Bench]]


@asynccontextmanager
async def benches() -> AsyncIterator[Build]:
    """Give the means to build benches; all of them end with the context.

    A bench is built from one script per replica, or a port where nobody needs to listen, and settings of section `llm`.
    """
    async with AsyncExitStack() as stack:

        async def build_bench(*scripts: list[Behaviour] | int, **section: Any) -> Bench:
            replicas = []
            for script in scripts:
                if isinstance(script, int):
                    replicas.append(Replica(url=f"http://127.0.0.1:{script}"))
                    continue
                replica = Replica(list(script))
                server = await asyncio.start_server(replica.serve, "127.0.0.1", 0)
                await stack.enter_async_context(server)
                stack.push_async_callback(replica.ended)
                replica.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
                replicas.append(replica)
            settings = Settings.model_validate({"llm": {"model": "default-model", "max_tokens": 99} | section})
            stage = build(settings)
            assert isinstance(stage, Llm)
            registry = FakeReplicas([replica.url for replica in replicas])
            await stage.start(FakeContext(registry))
            stack.push_async_callback(stage.stop)
            return Bench(stage, replicas, registry)

        yield build_bench


def calls(outcome: str) -> float:
    """Return how many calls ended so, in this process."""
    return REGISTRY.get_sample_value("penstock_llm_calls_total", {"outcome": outcome}) or 0.0
