"""batch: what 50 questions per second notice of 10,000 messages sent in one call, and how fast these are accepted."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from typing import Any, Final

from tests.bench.figures import Report, Window, spread
from tests.bench.processes import Broken, Processes
from tests.bench.query import ask, start
from tests.servers import RedisServer

Json = dict[str, Any]

END_S: Final = 120.0
PROMPT: Final = "Write a line to {{name}} about the weather of day "
SOON_S: Final = 0.5
"""After the window has begun, the batch is sent: all of what it does to questions lies within."""


def run(
    *,
    rounds: int = 3,
    messages: int = 10_000,
    rate: float = 50.0,
    seconds: float = 12.0,
    warm: float = 1.0,
    mock_s: float = 0.05,
    slots: int = 16,
) -> Report:
    """Ask at an even rate, alone and while a batch is accepted and worked on, in each round; then cancel the rest."""
    about = {"rounds": rounds, "messages": messages, "rate": rate, "replica_ms": mock_s * 1000, "slots": slots}
    report = Report("batch", about)
    alone: list[Window] = []
    beside: list[Window] = []
    accepted_s: list[float] = []
    done: list[float] = []
    with RedisServer(appendonly=True) as redis, Processes() as processes:
        url, _ = start(processes, redis, mock_s, 3, slots=slots, more=("aggregator", "recorder"))

        def window() -> Window:
            return ask(processes, url, rate=rate, seconds=seconds, warm=warm)

        for number in range(rounds):
            alone.append(window())
            batch = _Batch(url, messages, after_s=warm + SOON_S)
            batch.start()
            beside.append(window())
            batch.join(END_S)
            standing = batch.end()
            accepted_s.append(batch.took_s)
            done.append(standing["response_count"])
            if standing["closed_ms"] is not None:
                report.notes.append(f"round {number + 1}: the batch ended before its window did")
            p99 = [window.quantile_ms(990) for window in (alone[-1], beside[-1])]
            sys.stderr.write(f"round {number + 1}: P99 {p99[0]:.0f} -> {p99[1]:.0f}\n")
        report.beside("questions, latency from the planned start", "the batch", alone, beside)
    report.row("the batch", f"{messages:,} messages", accepted_after_s=spread(accepted_s), done_in_window=spread(done))
    return report


class _Batch(threading.Thread):
    """Sends one batch beside a window, *after_s* from its start."""

    def __init__(self, url: str, messages: int, *, after_s: float) -> None:
        super().__init__(daemon=True)
        self.took_s = float("nan")
        self._url = url
        self._after_s = after_s
        rows = [{"prompt": f"{PROMPT}{number}.", "supportive_variable": {"name": "Ann"}} for number in range(messages)]
        self._body = json.dumps({"queue_id": "bench", "messages": rows}).encode()
        self._batch_id = ""

    def run(self) -> None:
        """Send it."""
        time.sleep(self._after_s)
        began = time.monotonic()
        self._batch_id = _call("POST", f"{self._url}/message/create", self._body)["batch_id"]
        self.took_s = time.monotonic() - began

    def end(self) -> Json:
        """Say how it stands, and cancel what has not ended; return when all has.

        Raises:
            Broken: it was not accepted, or does not end.
        """
        if not self._batch_id:
            raise Broken("the batch was not accepted")
        path = f"{self._url}/batch/{self._batch_id}"
        stood = standing = _call("GET", path)
        if standing["closed_ms"] is None:
            _call("POST", f"{path}/cancel")
        give_up = time.monotonic() + END_S
        while standing["closed_ms"] is None:
            if time.monotonic() > give_up:
                raise Broken(f"the batch does not end: {standing}")
            time.sleep(0.1)
            standing = _call("GET", path)
        return stood


def _call(method: str, url: str, body: bytes | None = None) -> Json:
    request = urllib.request.Request(url, body, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=END_S) as answer:
        value: Json = json.loads(answer.read())
        return value
