"""Replicas that take as long as they are told: `python -m tests.bench.replica SLOTS FACTOR...`, one per factor.

A prompt is its own service time in seconds; a replica takes that times its factor, runs `SLOTS` calls at once and lets
the others wait in order. So the same job takes the same time wherever the pipeline puts it, and a queue can be
simulated with the very service times of the run. On asyncio's own loop: its timers come at most a millisecond late.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from functools import partial
from typing import Final, cast

TOKENS: Final = 100
ANSWER: Final = json.dumps(
    {
        "id": "bench",
        "object": "chat.completion",
        "created": 0,
        "model": "default",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "done"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": TOKENS, "total_tokens": TOKENS + 1},
    }
).encode()
HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
REPLY: Final = HEAD % len(ANSWER) + ANSWER


class Slots:
    """One replica."""

    def __init__(self, slots: int, factor: float) -> None:
        self._free = slots
        self._factor = factor
        self._waiting: deque[tuple[float, asyncio.Transport]] = deque()

    def serve(self, span_s: float, transport: asyncio.Transport) -> None:
        """Answer on *transport* when the call has had a slot for its time."""
        if self._free:
            self._free -= 1
            asyncio.get_running_loop().call_later(span_s * self._factor, self._end, transport)
        else:
            self._waiting.append((span_s, transport))

    def _end(self, transport: asyncio.Transport) -> None:
        if not transport.is_closing():
            transport.write(REPLY)
        self._free += 1
        if self._waiting:
            self.serve(*self._waiting.popleft())


class Server(asyncio.Protocol):
    """One connection to a replica."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._got = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, blank, body = self._got.partition(b"\r\n\r\n")
        if not blank:
            return
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            self._got = b""
            self._slots.serve(float(json.loads(body)["messages"][-1]["content"]), self._transport)


async def main(slots: int, factors: list[float]) -> None:
    """Serve until killed; the first line says where."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(partial(Server, Slots(slots, factor)), "127.0.0.1", 0) for factor in factors]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    sys.stdout.write(json.dumps([f"http://127.0.0.1:{port}" for port in ports]) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), [float(factor) for factor in sys.argv[2:]]))
