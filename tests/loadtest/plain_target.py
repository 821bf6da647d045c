"""A server that does little and tells exactly what it did, for the load tester to be measured against.

Run as `python -m tests.loadtest.plain_target OPTIONS`, OPTIONS being JSON; prints its port. A POST is answered at once,
or after a span drawn from a lognormal distribution (`median_s`, `sigma`), or it stands still: `stall_after_s` from the
first request on the whole server does nothing for `stall_s`. `GET /did` tells `spans_ms` (from having a request to
having written its answer), `stalled_s`, and the questions that came.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from time import perf_counter, sleep
from typing import Any, cast

import uvloop

OPTIONS: dict[str, Any] = {"median_s": 0, "sigma": 0.5, "stall_s": 0, "stall_after_s": 0, "seed": 1, "timings": False}
did: dict[str, Any] = {"spans_ms": [], "stalled_s": 0.0, "questions": []}
rng = random.Random()
_is_stall_set = False


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        began_s = perf_counter()
        self._got += data
        head, blank, body = self._got.partition(b"\r\n\r\n")
        if not blank:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if len(body) < length:
            return
        self._got = b""
        if head.startswith(b"GET"):
            self._write(json.dumps(did).encode())
            return
        set_stall()
        question = json.loads(body).get("query")
        if question is not None and len(did["questions"]) < 1000:
            did["questions"].append(question)
        if OPTIONS["median_s"]:
            delay_s = OPTIONS["median_s"] * rng.lognormvariate(0, OPTIONS["sigma"])
            asyncio.get_running_loop().call_later(delay_s, self._answer, began_s)
        else:
            self._answer(began_s)

    def _answer(self, began_s: float) -> None:
        number = len(did["spans_ms"])
        body: dict[str, Any] = {"job_id": f"job-{number}", "worker": "w", "replica": f"http://replica-{number % 2}"}
        span_ms = (perf_counter() - began_s) * 1000
        if OPTIONS["timings"]:
            spans = {"encoder_wait": span_ms / 4, "encoder": span_ms / 4, "gateway": span_ms / 4, "return": span_ms / 4}
            body["timings_ms"] = {**spans, "total": span_ms}
        self._write(json.dumps(body).encode())
        did["spans_ms"].append((perf_counter() - began_s) * 1000)

    def _write(self, body: bytes) -> None:
        assert self._transport is not None
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


def set_stall() -> None:
    """From the first request on, once."""
    global _is_stall_set
    if OPTIONS["stall_s"] and not _is_stall_set:
        _is_stall_set = True
        asyncio.get_running_loop().call_later(OPTIONS["stall_after_s"], stall)


def stall() -> None:
    began_s = perf_counter()
    sleep(OPTIONS["stall_s"])
    did["stalled_s"] = perf_counter() - began_s


async def main() -> None:
    OPTIONS.update(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
    rng.seed(OPTIONS["seed"])
    server = await asyncio.get_running_loop().create_server(
        Connection, "127.0.0.1", OPTIONS.get("port", 0), backlog=4096
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
