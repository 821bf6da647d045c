"""The gateway as a process: listens, serves, drains.

The first SIGTERM or SIGINT closes the listening socket and lets what runs finish, for `worker.drain_s` at most; then
what still waits is told so (503 `stopping`; its jobs go on). A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp

from gateway.app import create_app
from gateway.auth import ApiKeys, refuse_open_address, remembered_keys
from gateway.discovery import enlisted
from gateway.limits import bounded
from gateway.operation import Records
from pipeline import starting
from pipeline.errors import ConfigError
from pipeline.front import Front
from pipeline.job import new_id
from pipeline.metrics import LOOP_LAG_S
from pipeline.settings import GatewaySettings, Settings

logger = structlog.get_logger()

KEEP_ALIVE_S: Final = 75  # longer than proxies keep theirs (60 s): the side that opens a connection should close it
_LAST_WORDS_S: Final = 1.0  # for the answers to requests that drain cuts short
_LOOK_EVERY_S: Final = 0.01
_SPARE_FILES: Final = 512  # connections too many, Redis, logs
_BACKLOG: Final = 2048


async def serve(
    settings: Settings,
    *,
    make_front: Callable[[Settings, str], Front] = Front.create,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serve until a signal comes.

    Args:
        on_listening: called with the gateway's address once it accepts connections.

    Raises:
        ConfigError: the address is taken, or open to strangers; API keys are malformed.
    """
    refuse_open_address(settings.gateway, ApiKeys(settings.gateway.api_keys))
    with contextlib.closing(listen(settings.gateway)) as listener:
        _allow_files(settings.gateway.max_connections + _SPARE_FILES)
        address = _address(listener)
        stop = asyncio.Event()
        with _stopped_by_signals(stop):
            name = _name(settings)
            async with (
                make_front(settings, name) as front,
                enlisted(front, settings, name, address.removeprefix("http://")),
                _history(settings) as records,
                remembered_keys(front, records),
            ):
                server = Server(settings, create_app(settings, front, records, stop), stop)
                starting.end()
                logger.info("gateway.listening", address=address)
                if on_listening is not None:
                    on_listening(address)
                await server.serve(sockets=[listener])
    logger.info("gateway.stopped")


@contextlib.asynccontextmanager
async def _history(settings: Settings) -> AsyncIterator[Records]:
    """Open the history, which connects when it is first asked."""
    from pipeline import records as history  # SQLAlchemy: what only asks for help need not wait for it

    records = history.Records.open(settings.history.url, timeout_s=settings.history.timeout_s)
    try:
        yield records
    finally:
        await records.close()


def listen(settings: GatewaySettings) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address is taken, or none of this machine's.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        # The protocol must be named: asyncio sets TCP_NODELAY only then, and answers would wait 40 ms for an ACK.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"PENSTOCK_GATEWAY__HOST: {settings.host!r} is no address: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # `::` means IPv4 too
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            why = "the port is taken; choose another with --port (PENSTOCK_GATEWAY__PORT)"
        raise ConfigError(f"the gateway cannot listen on {settings.host}:{settings.port}: {why}") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn, stopped by an event, with our bounds, and with a last answer for what drain cuts short."""

    def __init__(self, settings: Settings, app: ASGIApp, stop: asyncio.Event) -> None:
        config = uvicorn.Config(
            app,
            http=bounded(settings.gateway),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",  # what clients do wrong is counted, not logged
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self._stop = stop
        self._drain_s = settings.worker.drain_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever made the stop event."""
        yield

    async def main_loop(self) -> None:
        """Refresh the `date` header every second until told to stop, and note how late each second came."""
        loop = asyncio.get_running_loop()
        while not self._stop.is_set():
            await self.on_tick(0)
            due_s = loop.time() + 1
            try:
                async with asyncio.timeout_at(due_s):
                    await self._stop.wait()
            except TimeoutError:
                LOOP_LAG_S.observe(max(0.0, loop.time() - due_s))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain; see the module."""
        state = self.server_state
        for server in self.servers:
            server.close()
        for connection in list(state.connections):
            connection.shutdown()  # idle ones close now, busy ones after their answer
        if not await _within(self._drain_s, lambda: not state.tasks):
            logger.warning("gateway.cut_short", requests=len(state.tasks))
        for task in list(state.tasks):
            task.cancel()
        await _within(_LAST_WORDS_S, lambda: not state.tasks and not state.connections)
        for connection in list(state.connections):  # of clients that do not read
            connection.transport.abort()


async def _within(timeout_s: float, condition: Callable[[], bool]) -> bool:
    """Wait for *condition* at most so long; say whether it came to hold. Looks often: nothing else happens any more."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(_LOOK_EVERY_S)
    return True


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal(name: str) -> None:
        logger.info("gateway.draining", signal=name)
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # the next one ends the process, whatever it is doing

    for number in signals:
        loop.add_signal_handler(number, on_signal, number.name)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _name(settings: Settings) -> str:
    return f"{settings.worker.name or socket.gethostname()}-{new_id()[:8]}"


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_files(needed: int) -> None:
    """Raise this process' limit of open files to *needed*, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < needed:
        logger.warning("gateway.few_files", open_files=wanted, needed=needed, hint="raise the limit of open files")
