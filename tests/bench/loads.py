"""Closed and open loops over any call, with the readings of the CPU clocks where the counted part begins and ends.

A closed loop keeps so many calls in flight: it shows what a call costs. An open loop sends at planned instants,
whatever comes back: it shows what callers meet; its latencies count from the planned start, so a late sender shows as
latency and not as a gap. The plan is kept by a thread that sleeps, because the event loop's own timers come up to a
millisecond late; how late each call really left is reported (`lags_ms`).
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from random import Random
from time import perf_counter, sleep
from typing import Final

from tests.bench import cpu
from tests.bench.figures import Window

Call = Callable[[int], Awaitable[None]]
"""One call, given its number; raises when it does not succeed."""

SWITCH_S: Final = 0.0005  # between the pacing thread and the loop; Python's default of 5 ms would be seen in the lags
LEAD_S: Final = 0.05
LEFT_S: Final = 30.0
"""How long after the last planned start an answer is waited for; later ones count as errors."""


async def closed(call: Call, in_flight: int, warm_s: float, seconds: float, pids: Mapping[str, int]) -> Window:
    """Keep *in_flight* calls going; count those that end in the *seconds* after *warm_s*."""
    numbers = count()
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    counting = stopping = False

    async def client() -> None:
        while not stopping:
            began = perf_counter()
            try:
                await call(next(numbers))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported by its kind
                if counting:
                    errors[_kind(error)] += 1
                await asyncio.sleep(0.01)
            else:
                if counting:
                    latencies.append((perf_counter() - began) * 1000)

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(client())
        await asyncio.sleep(warm_s)
        counting = True
        before, began = cpu.spent_by(pids), perf_counter()
        await asyncio.sleep(seconds)
        after, ended = cpu.spent_by(pids), perf_counter()
        counting, stopping = False, True
    return Window(ended - began, len(latencies), dict(errors), cpu.between(before, after), latencies)


async def open_loop(call: Call, offsets: Sequence[float], warm_s: float, pids: Mapping[str, int]) -> Window:
    """Start one call at each of the *offsets* (seconds, rising); count those planned after *warm_s*.

    The window ends when the last counted call has ended.
    """
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    lags: list[float] = []
    errors: Counter[str] = Counter()
    tasks: set[asyncio.Task[None]] = set()
    all_started = asyncio.Event()
    numbers = count()
    started_at = perf_counter() + LEAD_S
    before: dict[str, float] = {}
    counted_from = 0.0

    async def one(number: int, planned: float, *, counts: bool) -> None:
        try:
            await call(number)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported by its kind
            if counts:
                errors[_kind(error)] += 1
        else:
            if counts:
                latencies.append((perf_counter() - planned) * 1000)

    def begin() -> None:
        nonlocal before, counted_from
        for _ in os.read(read_end, 4096):
            number = next(numbers)
            planned = started_at + offsets[number]
            counts = offsets[number] >= warm_s
            if counts:
                if not before:
                    before, counted_from = cpu.spent_by(pids), perf_counter()
                lags.append((perf_counter() - planned) * 1000)
            task = loop.create_task(one(number, planned, counts=counts))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if number == len(offsets) - 1:
                all_started.set()

    read_end, write_end = os.pipe()
    pacer = threading.Thread(target=_keep_time, args=(started_at, offsets, write_end), name="pacer")
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    loop.add_reader(read_end, begin)
    pacer.start()
    try:
        await all_started.wait()
        left = set(tasks)
        if left:
            _, late = await asyncio.wait(left, timeout=LEFT_S)
            for task in late:
                task.cancel()
                errors["no answer"] += 1
            await asyncio.gather(*late, return_exceptions=True)
    finally:
        loop.remove_reader(read_end)
        pacer.join()
        sys.setswitchinterval(switch_s)
        os.close(read_end)
        os.close(write_end)
    after, ended = cpu.spent_by(pids), perf_counter()
    return Window(ended - counted_from, len(latencies), dict(errors), cpu.between(before, after), latencies, lags)


def steady(rate: float, seconds: float) -> list[float]:
    """Return the starts of an even load, in seconds."""
    return [number / rate for number in range(int(rate * seconds))]


def poisson(rate: float, seconds: float, rng: Random) -> list[float]:
    """Return the starts of a load of independent callers, in seconds."""
    starts: list[float] = []
    at = rng.expovariate(rate)
    while at < seconds:
        starts.append(at)
        at += rng.expovariate(rate)
    return starts


def _keep_time(started_at: float, offsets: Sequence[float], write_end: int) -> None:
    for offset in offsets:
        delay = started_at + offset - perf_counter()
        if delay > 0:
            sleep(delay)
        os.write(write_end, b"\0")


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200].rstrip(": ")
