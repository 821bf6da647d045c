"""One generator: a process that sends, and counts what comes back.

It is started by `loadtest/crew.py` and spoken to in lines of JSON: its orders come in, it says that it is ready, the
instant of the start comes in, a moment goes out now and then, the tally at the end. It stops early when anything more
comes in, or when its standard input ends, so that it never outlives who started it.

In an open loop a thread of its own keeps the plan, because the event loop's timers come up to a millisecond late: it
sleeps until the next instant and wakes the loop through a pipe. The lag of a request is measured at the far end of
that: when it is written, or when a connection is asked for on its behalf.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections import deque
from dataclasses import dataclass
from time import perf_counter, process_time, sleep
from typing import TYPE_CHECKING, Any, Final

import orjson
import uvloop

from loadtest.arrivals import Plan, instants
from loadtest.client import NO_CONNECTION, Exchange, Peer
from loadtest.tally import Json, Moment, Tally, read_answer
from loadtest.target import Address

if TYPE_CHECKING:
    from collections.abc import Callable

SWITCH_S: Final = 0.0002  # between the pacing thread and the loop; Python's default of 5 ms would be seen in the lags
MOMENT_S: Final = 0.25  # between two moments: four to a second, so that seconds of several generators fit together
_PAUSE_S: Final = 0.05  # after a failed connection in a closed loop: a dead target is not counted dead a million times
_LOOK_S: Final = 0.1  # at the plan's thread, while it sleeps, for whether the run was stopped


@dataclass(frozen=True, slots=True)
class Orders:
    """What one generator is to do.

    Args:
        host: the numeric address that was reached.
        requests: whole requests, as latin-1 text; request n of the run is `requests[n % len(requests)]`.
        connections: at most so many of its own.
        plan: of the whole run; this generator keeps every `parts`-th arrival, from `part` on; None: closed loop.
        clients: in a closed loop, requests in flight of its own.
        count: in a closed loop, requests of the whole run; None: until `duration_s`.
        limit_ms, good_ms: see `Tally`.
    """

    host: str
    address: Address
    requests: list[str]
    connections: int
    timeout_s: float
    limit_ms: float
    good_ms: float | None
    part: int
    parts: int
    plan: Plan | None = None
    clients: int = 0
    count: int | None = None
    duration_s: float | None = None

    @classmethod
    def from_wire(cls, wire: Json) -> Orders:
        """Read what the crew sent."""
        plan = wire.pop("plan")
        return cls(address=Address(**wire.pop("address")), plan=None if plan is None else Plan(**plan), **wire)


class Generator:
    """A run under way in this process. Everything but the pacing thread belongs to the event loop."""

    def __init__(self, orders: Orders, start_s: float, say: Callable[[Json], None]) -> None:
        self._orders = orders
        self._start_s = start_s
        self._say = say
        self._requests = [request.encode("latin-1") for request in orders.requests]
        self._tally = Tally(orders.limit_ms, orders.good_ms)
        self._peer = Peer(orders.host, orders.address, orders.connections, self._on_end)
        self._loop = asyncio.get_running_loop()
        self._moment = Moment(0.0, 0, part=orders.part)
        self._started = 0
        self._next = orders.part
        self._is_planned_out = False
        self._done = asyncio.Event()
        self._is_stopped = False
        self._last_end_s = start_s

    def stop(self) -> None:
        """End the run now; what is under way counts as unfinished."""
        self._is_stopped = True
        self._done.set()

    async def run(self) -> Json:
        """Run until all have ended, or until it is stopped, and return what the crew merges."""
        spent_s, began_s = process_time(), perf_counter()
        reporter = self._loop.create_task(self._report(), name="moments")
        if self._orders.plan is None:
            await self._close_loop()
        else:
            await self._open_loop(self._orders.plan)
        reporter.cancel()
        await asyncio.gather(reporter, return_exceptions=True)
        ended_s = max(self._start_s, perf_counter() if self._is_stopped else self._last_end_s)
        self._tell()
        await self._peer.close()
        return {
            "tally": self._tally.to_wire(),
            "ended_s": ended_s,
            "busy": (process_time() - spent_s) / (perf_counter() - began_s),
            "unfinished": self._started - self._tally.ended,
            "is_interrupted": self._is_stopped,
        }

    # --- closed loop: each client sends its next request when it has the answer to the one before -----------------

    async def _close_loop(self) -> None:
        self._begin_when_due()
        await self._done.wait()

    def _begin_when_due(self) -> None:
        # The loop's timers count whole milliseconds, so they may ring before their time, and a run that began too early
        # would be told to have lasted for less than it was asked for.
        early_s = self._start_s - perf_counter()
        if early_s > 0 and not self._is_stopped:
            self._loop.call_later(early_s, self._begin_when_due)
            return
        self._start_s = self._last_end_s = perf_counter()
        for _ in range(self._orders.clients):
            self._ask_next()

    def _ask_next(self) -> None:
        orders, now = self._orders, perf_counter()
        is_over = (orders.count is not None and self._next >= orders.count) or (
            orders.duration_s is not None and now - self._start_s >= orders.duration_s
        )
        if is_over or self._is_stopped:
            self._last_end_s = now
            if self._started == self._tally.ended:
                self._done.set()
            return
        number = self._next
        self._next += orders.parts
        self._send(number, now)

    # --- open loop: requests are sent when their time has come, whatever comes back ---------------------------------

    async def _open_loop(self, plan: Plan) -> None:
        due: deque[tuple[int, float]] = deque()
        read_end, write_end = os.pipe()
        pacer = threading.Thread(target=self._keep_plan, args=(plan, due, write_end), name="pacer")
        switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._loop.add_reader(read_end, self._send_due, read_end, due)
        pacer.start()
        try:
            await self._done.wait()
        finally:
            self._is_stopped = self._is_stopped or not self._is_planned_out
            self._loop.remove_reader(read_end)
            os.close(read_end)  # a pacer that is blocked in its write wakes from this
            await asyncio.to_thread(pacer.join)
            sys.setswitchinterval(switch_s)
            os.close(write_end)

    def _keep_plan(self, plan: Plan, due: deque[tuple[int, float]], write_end: int) -> None:
        """Run in the pacing thread: put each arrival into *due* when its time comes, then wake the loop."""
        try:
            for number, at_s in instants(plan, self._orders.part, self._orders.parts):
                planned_s = self._start_s + at_s
                while (delay_s := planned_s - perf_counter()) > 0:
                    if self._is_stopped:
                        return
                    sleep(min(delay_s, _LOOK_S))
                due.append((number, planned_s))
                os.write(write_end, b".")
            os.write(write_end, b"!")
        except BrokenPipeError:
            return

    def _send_due(self, read_end: int, due: deque[tuple[int, float]]) -> None:
        for sign in os.read(read_end, 4096):
            if sign == ord("!"):
                self._is_planned_out = True
                self._end_if_all_ended()
            else:
                number, planned_s = due.popleft()
                self._tally.planned += 1
                self._send(number, planned_s)

    def _end_if_all_ended(self) -> None:
        if self._is_planned_out and self._started == self._tally.ended:
            self._done.set()

    # --- both -------------------------------------------------------------------------------------------------------

    def _send(self, number: int, planned_s: float) -> None:
        self._started += 1
        self._moment.sent += 1
        request = self._requests[number % len(self._requests)]
        self._peer.start(Exchange(number, planned_s, perf_counter() + self._orders.timeout_s, request))

    def _on_end(self, exchange: Exchange, ended_s: float, failure: str | None, status: int, body: bytes) -> None:
        tally, began_s = self._tally, exchange.began_s
        is_open = self._orders.plan is not None
        lag_ms = 0.0
        if began_s is None:
            tally.late += is_open
        elif is_open:
            lag_ms = max(0.0, began_s - exchange.planned_s) * 1000
            tally.left(lag_ms)
        answer = None if failure is not None else read_answer(status, body)
        error = failure if answer is None else answer.error
        if answer is None or error is not None or began_s is None:
            tally.errors[error or "unknown"] += 1
            self._moment.failed += 1
        else:
            at_s, service_ms = exchange.planned_s - self._start_s, (ended_s - began_s) * 1000
            tally.answered(answer, number=exchange.number, at_s=at_s, lag_ms=lag_ms, service_ms=service_ms)
            self._moment.latencies.append(lag_ms + service_ms)
        self._last_end_s = ended_s
        if is_open:
            self._end_if_all_ended()
        elif error == NO_CONNECTION:
            self._loop.call_later(_PAUSE_S, self._ask_next)
        else:
            self._ask_next()

    async def _report(self) -> None:
        while True:
            # On the marks of the run's own clock, so that the moments of all generators are of the same spans.
            since_s = perf_counter() - self._start_s
            await asyncio.sleep(MOMENT_S - since_s % MOMENT_S)
            self._tell()

    def _tell(self) -> None:
        moment, self._moment = self._moment, Moment(0.0, 0, part=self._orders.part)
        moment.at_s = max(0.0, perf_counter() - self._start_s)
        moment.in_flight = self._started - self._tally.ended
        self._say({"moment": moment.to_wire()})


async def work() -> None:
    """Obey the crew, once."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 28)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    out, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    assert isinstance(protocol, asyncio.streams.FlowControlMixin)
    out.set_write_buffer_limits(0)  # `drain` below then means that all is out
    writer = asyncio.StreamWriter(out, protocol, None, loop)

    def say(body: Any) -> None:
        writer.write(orjson.dumps(body) + b"\n")

    line = await reader.readline()
    if not line:  # the crew has gone, here and below
        return
    orders = Orders.from_wire(orjson.loads(line))
    say({"ready": os.getpid()})
    line = await reader.readline()
    if not line:
        return
    # Nothing here makes cycles request by request, and a collection in the middle of a run is a lag.
    gc.collect()
    gc.freeze()
    gc.disable()
    generator = Generator(orders, orjson.loads(line)["start_s"], say)
    told_to_stop = loop.create_task(reader.readline(), name="orders")
    told_to_stop.add_done_callback(lambda _: generator.stop())
    say(await generator.run())
    told_to_stop.cancel()
    await writer.drain()
    writer.close()


if __name__ == "__main__":
    # Whoever signals a whole group of processes means the crew, which says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    uvloop.run(work())
