"""Servers that break the rules of HTTP, each in its own way, in a thread of the test's own."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s: closing sends RST


@contextmanager
def rude_target(answer: bytes | None, *, closes: bool = True) -> Iterator[str]:
    """Give the URL of a server that writes *answer* to each request, whatever it was, and then *closes*.

    Args:
        answer: None: the connection is reset as soon as it is there.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=_talk, args=(client, answer, closes), daemon=True).start()

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # closing alone does not wake who accepts
        server.join()
        listener.close()


def _talk(client: socket.socket, answer: bytes | None, closes: bool) -> None:
    with client, suppress(OSError):
        if answer is None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            return
        while client.recv(1 << 16):
            client.sendall(answer)
            if closes:
                return
