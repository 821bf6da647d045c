"""The process: starting, refusing to start, draining."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.server import listen, serve
from pipeline.errors import ConfigError
from pipeline.settings import GatewaySettings, Settings
from tests.gateway.conftest import Start
from tests.gateway.fake import FakeFront
from tests.gateway.raw import connect, request


async def test_a_drain_lets_running_requests_finish(start: Start) -> None:
    """New connections are refused at once; the answer that was awaited still comes, and says that it is the last."""
    gateway = await start(drain_s=5)
    async with connect(gateway.address) as idle, connect(gateway.address) as busy:
        await busy.send(request())
        job = await gateway.front.next_job()
        gateway.stop.set()
        assert await idle.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*gateway.address)
        gateway.front.finish(job.id)
        assert (await busy.reply())[0] == 200
        assert await busy.rest() == b""


async def test_a_request_that_outlasts_the_drain_is_told_so(start: Start) -> None:
    """503 with the job's id: the job goes on, and another gateway can tell its outcome."""
    gateway = await start(drain_s=0.05)
    async with connect(gateway.address) as client:
        await client.send(request())
        job = await gateway.front.next_job()
        gateway.stop.set()
        status, body = await client.reply()
    assert (status, body["error"]["code"], body["job_id"]) == (503, "stopping", job.id)
    assert gateway.front.cancels == []


async def test_answers_leave_at_once(start: Start) -> None:
    """Nagle's algorithm is off: else head and body of an answer would wait for each other."""
    gateway = await start()
    assert (await gateway.http.get("/livez")).status_code == 200
    (connection,) = gateway.server.server_state.connections
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_an_answer_leaves_in_one_piece(start: Start) -> None:
    """Each piece costs a system call, and may cost a packet."""
    gateway = await start()
    await gateway.http.get("/livez")
    (connection,) = gateway.server.server_state.connections
    pieces: list[bytes] = []

    class Spy:
        def __init__(self, transport: asyncio.Transport) -> None:
            self._transport = transport

        def write(self, data: bytes) -> None:
            pieces.append(data)
            self._transport.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self._transport, name)

    transport: Any = connection.transport
    transport._transport = Spy(transport._transport)  # the same connection is used again
    assert (await gateway.http.get("/livez")).status_code == 200
    (piece,) = pieces
    assert piece.startswith(b"HTTP/1.1 200")


def test_an_address_that_is_no_address_is_a_config_error() -> None:
    """The message names the setting."""
    with pytest.raises(ConfigError, match="PENSTOCK_GATEWAY__HOST"):
        listen(GatewaySettings(host="999.1.1.1", port=0))


def test_an_address_that_is_taken_is_a_config_error() -> None:
    """The message names the address, and the option that chooses another."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is taken; choose another with --port"):
            listen(GatewaySettings(port=port))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
async def test_an_open_address_without_keys_is_refused(host: str) -> None:
    """Before anything is opened."""
    with pytest.raises(ConfigError, match="PENSTOCK_GATEWAY__HOST"):
        await serve(Settings(gateway=GatewaySettings(host=host)), make_front=_no_front)


def _no_front(settings: Settings, name: str) -> FakeFront:
    raise AssertionError("opened although the settings cannot work")


PROGRAM = """
import uvloop
from gateway.server import serve
from pipeline.settings import load
from tests.gateway.fake import FakeFront
settings = load({}, {"gateway": {"port": 0}, "worker": {"drain_s": 60}})
uvloop.run(serve(settings, make_front=lambda *_: FakeFront(), on_listening=lambda a: print(a, flush=True)))
print("drained", flush=True)
"""


@contextlib.asynccontextmanager
async def _process() -> AsyncIterator[tuple[asyncio.subprocess.Process, tuple[str, int]]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )
    try:
        assert process.stdout is not None
        while not (line := await process.stdout.readline()).startswith(b"http://"):
            assert line, "the process ended before it was listening"
        url = httpx.URL(line.decode().strip())
        assert url.port is not None
        yield process, (url.host, url.port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_a_signal_drains_the_process() -> None:
    """SIGTERM: exit code 0, by the way of the drain."""
    async with _process() as (process, address):
        async with connect(address) as client:
            process.send_signal(signal.SIGTERM)
            assert await client.rest() == b""
        assert process.stdout is not None
        assert b"drained" in await process.stdout.read()
        assert await process.wait() == 0


async def test_a_second_signal_ends_the_process_at_once() -> None:
    """Whatever still runs."""
    async with _process() as (process, address), connect(address) as idle, connect(address) as client:
        await client.send(request()[:-1])
        await client.send(request()[-1:])
        await _until_answering(address)
        process.send_signal(signal.SIGTERM)
        assert await idle.rest() == b""  # the first signal was obeyed
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == -signal.SIGTERM


async def _until_answering(address: tuple[str, int]) -> None:
    """Return when the process has read what was sent to it before."""
    async with connect(address) as probe:
        await probe.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await probe.reply())[0] == 200
