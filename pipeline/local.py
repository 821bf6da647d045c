"""What `penstock up` does: the whole pipeline on this machine, each part a process, kept running until told to stop.

Starts, in this order, without waiting longer than it must: mock replicas (unless real ones are given), Redis (unless
one is given), the gateway, the stages that a question passes. Says `ready <address>` once, on standard output, when the
gateway can answer; log lines of every process go to standard error. Then, or after a while without an answer, come the
other stages and the recorder: each process spends half a second of a core on its imports, and the first answer should
wait for none that it does without. What the gateway accepts for the others meanwhile waits for them in Redis.

Stops in the opposite order: first the gateway, so that nothing new is accepted and what was accepted is answered, then
the stages, the recorder, the mock replicas, and Redis last.

One data directory belongs to one `up`: a lock says so, and Redis inherits it (see `private_redis`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from pipeline import private_redis
from pipeline.addresses import is_loopback
from pipeline.errors import ConfigError
from pipeline.settings import RetrieverSettings, Settings
from pipeline.supervisor import Program, Supervisor

FIRST: Final = ("encoder", "retriever", "llm")
"""Stages that a question passes."""
LATER: Final = ("aggregator", "webhook", "chat", "image", "report", "delivery")
"""Stages that start when questions are answered: what comes for them earlier waits in Redis."""
MOCKS: Final = 3
OTHERS_S: Final = 10.0  # the other stages start by then: what the first ones wait for may take long, a replica say
READY_POLL_S: Final = 0.02
READY_HINT_S: Final = 10.0  # how often to say what `up` still waits for
PREDECESSOR_S: Final = 10.0  # a killed predecessor's Redis needs a moment to write its last
STOP_MARGIN_S: Final = 5.0  # beyond the time that a worker grants to running work
MOCK_STOP_S: Final = 5.0
RECORDER_STOP_S: Final = 15.0  # for the transaction under way; what is not written waits in Redis
REDIS_STOP_S: Final = 30.0  # writes its last second to disk

_log = structlog.get_logger()

Step = Callable[[str], Awaitable[bool]]
"""Something to do through the gateway, given its address; True: all went well."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        settings: of all processes; their own environment is made from it where `up` decides differently.
        data_dir: for Redis' files, the index, the history, the lock.
        start_redis: False when a running one was named.
        start_mocks: False when real replicas were named.
        fill: indexes first documents where nothing was ever indexed; done before `ready` is said, so that the first
            question finds something.
        before_fill: what of that needs no pipeline, imports say; done while the processes start.
        after_ready: done once `ready` was said.
    """

    settings: Settings
    data_dir: Path
    start_redis: bool
    start_mocks: bool
    fill: Step | None = None
    before_fill: Step | None = None
    after_ready: Step | None = None
    environ: Mapping[str, str] = field(default_factory=dict)


async def up(plan: Plan) -> None:
    """Run everything until SIGINT, SIGTERM or SIGHUP, then drain. A second signal kills at once.

    Raises:
        ConfigError: wrong settings, a busy port, a data directory in use, or a child that refuses its settings.
    """
    gateway = plan.settings.gateway
    port = free_port(gateway.host, gateway.port)
    mocks = _mock_addresses(port) if plan.start_mocks else []
    with locked(plan.data_dir) as lock, _stop_signals() as signals:
        async with Supervisor(out=sys.stderr.fileno()) as supervisor:
            try:
                await _until(signals.stop, supervisor, _run(plan, supervisor, port, mocks, lock))
            finally:
                drained = asyncio.create_task(_drain(supervisor, plan.settings), name="drain")
                await asyncio.wait({drained, signals.kill}, return_when=asyncio.FIRST_COMPLETED)
                if not drained.done():
                    _log.warning("second signal: killed without draining")
                    supervisor.kill()
                await drained
                (plan.data_dir / "up.json").unlink(missing_ok=True)


def running(data_dir: Path) -> dict[str, Any] | None:
    """Return what the `up` on *data_dir* says about itself; None without one.

    That is `pid`, `url`, `redis_url`, `replicas`, and `trial_url`: the receiver on loopback that may be told.
    """
    try:
        said: dict[str, Any] = json.loads((data_dir / "up.json").read_text())
        os.kill(said["pid"], 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return said


# --- Parts -------------------------------------------------------------------------------------


async def _run(plan: Plan, supervisor: Supervisor, port: int, mocks: Sequence[int], lock: int) -> None:
    """Start everything, say when it is ready, take the first steps."""
    settings, data_dir = plan.settings, plan.data_dir
    environ = dict(plan.environ) | {"PENSTOCK_GATEWAY__PORT": str(port), "PENSTOCK_METRICS__PORT": "0"}  # one port each
    redis_url = settings.redis.url
    trial_url = settings.webhook.trial_url
    if not trial_url and is_loopback(settings.gateway.host):
        trial_url = environ["PENSTOCK_WEBHOOK__TRIAL_URL"] = _receiver_after(port)
    unfilled = _mark_if_empty(settings.retriever, data_dir / "index.unfilled")
    for number, mock_port in enumerate(mocks, start=1):
        mock = _program(f"mock{number}", ["loadtest.mock", str(mock_port)], environ)
        supervisor.start(replace(mock, quiet=True))
    if mocks:
        environ["PENSTOCK_LLM__URLS"] = ",".join(_local(mock_port) for mock_port in mocks)
        if not settings.images.url:
            environ["PENSTOCK_IMAGES__URL"] = _local(mocks[0])
    if plan.start_redis:
        redis_url = await _start_redis(supervisor, data_dir, lock)
        environ["PENSTOCK_REDIS__URL"] = redis_url
    supervisor.start(_program("gateway", ["gateway"], environ))  # first: its start takes longest
    for stage in FIRST:
        supervisor.start(_program(stage, ["stages", stage], environ))
    start_others = partial(_start_others, supervisor, environ, draws=bool(mocks or settings.images.url))
    others = asyncio.get_running_loop().call_later(OTHERS_S, start_others)
    url = f"http://{_authority(_reachable(settings.gateway.host), port)}"
    replicas = [_local(mock_port) for mock_port in mocks] or list(settings.llm.urls)
    said = {"pid": os.getpid(), "url": url, "redis_url": redis_url, "replicas": replicas, "trial_url": trial_url}
    fills = plan.fill is not None and unfilled.exists()
    try:
        if fills and plan.before_fill is not None:
            await _try(plan.before_fill, url)
        await _until_ready(settings.gateway.host, port)
        _write(data_dir / "up.json", json.dumps(said) + "\n")
        if plan.fill is not None and fills and await _try(plan.fill, url):
            unfilled.unlink(missing_ok=True)
        sys.stdout.write(f"ready {url}\n")
        sys.stdout.flush()
    finally:
        others.cancel()
    start_others()
    if plan.after_ready is not None:
        await _try(plan.after_ready, url)


def _start_others(supervisor: Supervisor, environ: Mapping[str, str], *, draws: bool) -> None:
    """Start what the first answer does without, once: the other stages, and the recorder.

    Args:
        draws: whether there is somebody to make pictures.
    """
    if "recorder" in supervisor.children:
        return
    for stage in LATER:
        if stage != "image" or draws:
            supervisor.start(_program(stage, ["stages", stage], environ))
    environ = {**environ, "PENSTOCK_HISTORY__AUTO_UPGRADE": "true"}
    supervisor.start(_program("recorder", ["stages", "recorder"], environ))


async def _try(step: Step, url: str) -> bool:
    try:
        return await step(url)
    except Exception:  # noqa: BLE001 - the outermost edge of somebody else's task
        _log.exception("a first step failed; everything keeps running")
        return False


def _program(name: str, module: Sequence[str], environ: Mapping[str, str]) -> Program:
    """Return one of our own processes. `-P`: a folder named `gateway` where the user stands is not ours."""
    return Program(name, [sys.executable, "-P", "-m", *module], {**_import_path(), **environ})


def _import_path() -> dict[str, str]:
    """Return what lets children import us where we run from a source tree that is not installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").exists():
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _mark_if_empty(retriever: RetrieverSettings, mark: Path) -> Path:
    """Remember in the file *mark*, beyond a crash, that the index is still to be filled; returns that file.

    An index on a server is not ours to fill: others may share it.
    """
    index = retriever.path
    if retriever.qdrant_url:
        mark.unlink(missing_ok=True)
    elif not index.is_dir() or not any(index.iterdir()):
        mark.touch()
    return mark


async def _start_redis(supervisor: Supervisor, data_dir: Path, lock: int) -> str:
    """Start Redis and wait until it answers; return its address."""
    binary = private_redis.find_binary()
    directory, log_file = data_dir / "redis", data_dir / "redis.log"
    directory.mkdir(mode=0o700, exist_ok=True)
    address = private_redis.socket_path(data_dir)
    private_redis.make_socket_directory(address)
    rewrites: list[asyncio.Task[None]] = []

    def started(times: int) -> None:
        for rewrite in rewrites:
            rewrite.cancel()
        rewrites.clear()
        if times > 1 or private_redis.has_data(directory):
            rewrites.append(asyncio.create_task(_rewrite_log(address), name="rewrite the append-only file"))

    child = supervisor.start(
        Program(
            "redis",
            private_redis.command(binary, directory, address, log_file),
            pass_fds=(lock,),
            stderr=log_file,
            orphan_signal=signal.SIGTERM,  # it writes its last second to disk, and ends its rewriting child too
            started=started,
        )
    )
    answers = asyncio.create_task(private_redis.wait_until_ready(address), name="wait for redis")
    try:
        while not answers.done():
            await asyncio.wait({answers}, timeout=READY_POLL_S)
            if child.starts > 1:
                raise ConfigError(f"{binary} does not start:\n{private_redis.last_words(log_file)}")
    finally:
        answers.cancel()
    _log.info("redis answers", binary=binary, data=str(directory), pid=child.pid)
    return private_redis.url(address)


async def _rewrite_log(address: Path) -> None:
    """Have Redis write its append-only file anew after it was loaded.

    Redis 7.0 can lose synced writes when a file whose end was torn is loaded a second time; a fresh file has no torn
    end.
    """
    await private_redis.wait_until_ready(address)
    try:
        reply = await private_redis.ask(address, "BGREWRITEAOF")
    except OSError as error:
        reply = str(error)
    if not reply.startswith("+"):
        _log.warning("redis did not rewrite its append-only file after loading it", reply=reply)


async def _until_ready(host: str, port: int) -> None:
    """Wait until the gateway's `/readyz` says 200; now and then log what it says instead."""
    loop = asyncio.get_running_loop()
    hint_at = loop.time() + READY_HINT_S
    while True:
        status, body = await _get(_reachable(host), port, "/readyz")
        if status == 200:
            return
        if loop.time() >= hint_at:
            hint_at = loop.time() + READY_HINT_S
            _log.info("not ready yet", status=status, why=body[:500])
        await asyncio.sleep(READY_POLL_S)


async def _get(host: str, port: int, path: str) -> tuple[int, str]:
    """Return status and body of one plain HTTP GET; status 0 while nobody listens.

    By hand, because an HTTP client's import would be the slowest part of `up`.
    """
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return 0, ""
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {_authority(host, port)}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await asyncio.wait_for(reader.read(), timeout=5)).partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), body.decode(errors="replace")
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0, ""
    finally:
        writer.close()


async def _drain(supervisor: Supervisor, settings: Settings) -> None:
    """Stop everything in order: who accepts first, who remembers last."""
    drain_s = settings.worker.drain_s
    _log.info("draining", at_most_s=drain_s)
    mocks = [name for name in supervisor.children if name.startswith("mock")]
    await supervisor.stop(["gateway"], drain_s + STOP_MARGIN_S)
    others = [name for name in (*FIRST, *LATER) if name != "delivery"]
    await asyncio.gather(
        supervisor.stop(others, drain_s + STOP_MARGIN_S),
        supervisor.stop(["delivery"], max(drain_s, settings.deliveries.drain_s) + STOP_MARGIN_S),
    )
    await supervisor.stop(["recorder"], RECORDER_STOP_S)
    await supervisor.stop(mocks, MOCK_STOP_S)
    await supervisor.stop(["redis"], REDIS_STOP_S)
    _log.info("stopped")


# --- Signals, lock, addresses ------------------------------------------------------------------


@dataclass(slots=True)
class _Signals:
    stop: asyncio.Future[None]
    kill: asyncio.Future[None]


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Signals]:
    """Turn the first stop signal into `stop` and the second into `kill`."""
    loop = asyncio.get_running_loop()
    signals = _Signals(loop.create_future(), loop.create_future())

    def note() -> None:
        wanted = signals.kill if signals.stop.done() else signals.stop
        if not wanted.done():
            wanted.set_result(None)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, note)
    try:
        yield signals
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _until(stop: asyncio.Future[None], supervisor: Supervisor, work: Coroutine[Any, Any, None]) -> None:
    """Run *work* beside the supervisor until *stop*; errors of either come out at once."""
    working = asyncio.create_task(work, name="run")
    refused = asyncio.create_task(supervisor.refused(), name="refused")
    try:
        waiting: set[asyncio.Future[None]] = {working, refused, stop}
        while not stop.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                await future
    finally:
        for task in (working, refused):
            task.cancel()
        await asyncio.wait({working, refused})


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[int]:
    """Hold the lock of *data_dir*, which is made where it is missing; yields the lock's descriptor.

    Raises:
        ConfigError: another `up` runs on it, or it cannot be written.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"--data-dir {data_dir} cannot be used: {error.strerror}") from error
    try:
        _take_lock(descriptor, data_dir)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, data_dir: Path) -> None:
    give_up_s = time.monotonic() + PREDECESSOR_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace")
            if _lives(owner) or time.monotonic() > give_up_s:
                who = f"process {owner}" if owner else "another process"
                raise ConfigError(
                    f"{data_dir} is in use by {who}: stop that `penstock up`, or choose another --data-dir"
                ) from None
            time.sleep(0.05)  # its Redis still writes; it will let go
        else:
            return


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def free_port(host: str, port: int) -> int:
    """Return *port* if it can be listened on, or any free one for 0.

    Raises:
        ConfigError: it is taken, or *host* is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is taken: choose another with --port (0: any free)") from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _mock_addresses(gateway_port: int) -> list[int]:
    """Return ports for the mock replicas: those after the gateway's where free, so that addresses stay the same."""
    return [_port_near(wanted) for wanted in range(gateway_port + 1, gateway_port + 1 + MOCKS)]


def _port_near(wanted: int) -> int:
    try:
        return free_port("127.0.0.1", wanted if wanted <= 65_535 else 0)
    except ConfigError:
        return free_port("127.0.0.1", 0)


def _receiver_after(gateway_port: int) -> str:
    """Return where `penstock verify` may listen for a webhook.

    Only this very address is called though it is on loopback, and nobody else can know it: it is written where only
    the user of this `up` reads. So no client can have anything else on this machine called, also where a proxy in front
    lets strangers in.
    """
    return f"{_local(_port_near(gateway_port + 1 + MOCKS))}/{secrets.token_urlsafe(24)}"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all, for this user alone: an address may hold a password."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    part.write_text(text)
    part.replace(path)
