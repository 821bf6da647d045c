"""Ports of loopback for the servers of tests that have to be told one.

Asking the kernel for a free port and closing it again is a race: it gives the same one to the next who asks, or to a
client, before the server has started. These are held by a lock until the process of the tests ends, and lie below the
range that the kernel gives to clients.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import BinaryIO, Final

STRIDE: Final = 10
"""Those that follow belong to whoever has taken one: `up` gives them to its mock replicas."""
PORTS: Final = range(10_000, 32_000, STRIDE)

_held: list[BinaryIO] = []


def take_port() -> int:
    """Return a port that nobody listens on and that nobody else is given while this process lives.

    Raises:
        RuntimeError: all are taken.
    """
    folder = Path(tempfile.gettempdir(), f"penstock-test-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for port in random.sample(PORTS, len(PORTS)):
        lock = (folder / str(port)).open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return port
    raise RuntimeError(f"none of the ports {PORTS} is free")
