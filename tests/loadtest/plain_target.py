"""A server that does little and tells exactly what it did, for the load tester to be measured against.

Run as `python -m tests.loadtest.plain_target OPTIONS`, OPTIONS being JSON; prints its port. A POST is answered at once,
or after a span drawn from a lognormal distribution (`median_s`, `sigma`), or it stands still: when request number
`stall_at` has come, the whole server does nothing for `stall_s`. `GET /did` tells `spans_ms` (from having a request to
writing its answer), `stalled_s`, and of the first thousand requests the `questions` and when they came (`came_s`) and
were answered (`ended_s`), each in the order of that.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from time import perf_counter, sleep
from typing import Any, cast

import uvloop

OPTIONS: dict[str, Any] = {"median_s": 0, "sigma": 0.5, "stall_s": 0, "stall_at": 0, "seed": 1, "timings": False}
did: dict[str, Any] = {"spans_ms": [], "stalled_s": 0.0, "questions": [], "came_s": [], "ended_s": []}
rng = random.Random()
MOST = 1000
_came = 0


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
        count(began_s)
        question = json.loads(body).get("query")
        if question is not None and len(did["questions"]) < MOST:
            did["questions"].append(question)
            did["came_s"].append(began_s)
        if OPTIONS["median_s"]:
            delay_s = OPTIONS["median_s"] * rng.lognormvariate(0, OPTIONS["sigma"])
            asyncio.get_running_loop().call_later(delay_s, self._answer, began_s)
        else:
            self._answer(began_s)

    def _answer(self, began_s: float) -> None:
        number, ended_s = len(did["spans_ms"]), perf_counter()
        body: dict[str, Any] = {"job_id": f"job-{number}", "worker": "w", "replica": f"http://replica-{number % 2}"}
        span_ms = (ended_s - began_s) * 1000
        if OPTIONS["timings"]:
            spans = {"encoder_wait": span_ms / 4, "encoder": span_ms / 4, "gateway": span_ms / 4, "return": span_ms / 4}
            body["timings_ms"] = {**spans, "total": span_ms}
        self._write(json.dumps(body).encode())
        did["spans_ms"].append(span_ms)
        if number < MOST:
            did["ended_s"].append(ended_s)

    def _write(self, body: bytes) -> None:
        assert self._transport is not None
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


def count(came_s: float) -> None:
    """Count a request, and stand still if it is the one."""
    global _came
    _came += 1
    if _came == OPTIONS["stall_at"]:
        sleep(OPTIONS["stall_s"])
        did["stalled_s"] = perf_counter() - came_s


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
