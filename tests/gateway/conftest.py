"""A gateway on a real socket, served by the server that production uses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.app import create_app
from gateway.server import Server, listen
from pipeline.front import Front
from pipeline.records import Records
from pipeline.settings import Settings
from tests.gateway.fake import FakeFront

Address = tuple[str, int]


@dataclass
class Running:
    """One gateway, its pipeline, and a client of it."""

    front: FakeFront
    http: httpx.AsyncClient
    address: Address
    server: Server
    stop: asyncio.Event


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def records(tmp_path: Path) -> AsyncIterator[Records]:
    """An empty history."""
    records = Records.open(f"sqlite:///{tmp_path}/history.db")
    await records.upgrade()
    yield records
    await records.close()


@pytest.fixture
async def on_redis(front: Front, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Reach a gateway whose pipeline is the real one, on a real Redis."""
    transport = httpx.ASGITransport(create_app(settings, front))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as client:
        yield client


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start gateways with the settings a test wants; afterwards no task and no connection is left."""
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:

        async def start(*, drain_s: float = 0, **gateway: Any) -> Running:
            settings = Settings.model_validate({"gateway": {"port": 0} | gateway, "worker": {"drain_s": drain_s}})
            front, stop = FakeFront(), asyncio.Event()
            listener: socket.socket = stack.enter_context(listen(settings.gateway))
            server = Server(settings, create_app(settings, front), stop)
            serving = asyncio.create_task(server.serve(sockets=[listener]), name="gateway")
            host, port = listener.getsockname()[:2]
            transport = httpx.AsyncHTTPTransport(verify=False)
            client = httpx.AsyncClient(base_url=f"http://{host}:{port}", transport=transport, trust_env=False)

            async def end() -> None:
                await client.aclose()
                stop.set()
                await serving
                assert not server.server_state.connections

            stack.push_async_callback(end)
            return Running(front, client, (host, port), server, stop)

        yield start
    await asyncio.sleep(0)  # one turn of the loop, in which cancelled tasks end
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}


@pytest.fixture
async def gateway(start: Start) -> Running:
    """One gateway with the default settings."""
    return await start()
