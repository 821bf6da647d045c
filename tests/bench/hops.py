"""hops: what three no-op hops cost, beside FastStream and beside the least that can be written by hand."""

from __future__ import annotations

import importlib.util
import json
import random
import string
import sys
from typing import Any, Final

from tests.bench import loads
from tests.bench.figures import Report, Window, errors_of, in_turns, ratios, spread
from tests.bench.processes import Processes
from tests.servers import RedisServer

Json = dict[str, Any]

SYSTEMS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "penstock": ("hops_penstock", {}),
    "floor": ("hops_floor", {}),
    "faststream": ("hops_faststream", {"BENCH_WORKERS": "64"}),
    "faststream-serial": ("hops_faststream", {"BENCH_WORKERS": "0"}),
}
"""By name: the module of its hops and its submitter, and their environment. The serial one handles one message at a
time: cheaper per message, and of no use where a message takes its time."""
USUAL: Final = "penstock,floor,faststream"
HOPS: Final = 3
PAYLOAD_BYTES: Final = 1024
NEEDS: Final = {"faststream": "faststream", "faststream-serial": "faststream"}


def payload(size: int = PAYLOAD_BYTES) -> Json:
    """Return a payload of *size* bytes as JSON."""
    rng = random.Random(0)
    text = "".join(rng.choice(string.ascii_letters + "    ") for _ in range(size))
    return {"prompt": text[: size - len('{"prompt":""}')]}


def run(
    *,
    rounds: int = 3,
    seconds: float = 3.0,
    open_seconds: float = 5.0,
    warm: float = 1.0,
    in_flight: int = 50,
    rate: float = 100.0,
    systems: str = USUAL,
    appendonly: bool = False,
) -> Report:
    """Measure each system in each round, on processes and a Redis of its own, in turns."""
    about = {"rounds": rounds, "payload_bytes": PAYLOAD_BYTES, "in_flight": in_flight, "rate": rate}
    report = Report("hops", about | {"appendonly": appendonly})
    chosen = []
    for name in systems.split(","):
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            report.notes.append(f"{name} is left out: it is not installed (pip install -e '.[bench]')")
        else:
            chosen.append(name)
    closed: dict[str, list[Window]] = {name: [] for name in chosen}
    opened: dict[str, list[Window]] = {name: [] for name in chosen}
    for number in range(rounds):
        for name in in_turns(chosen, number):
            one, other = _measure(name, seconds, open_seconds, warm, in_flight, rate, appendonly)
            closed[name].append(one)
            opened[name].append(other)
            sys.stderr.write(f"round {number + 1}: {name} {one.cpu_per_call():.0f} us, {one.rate:.0f}/s\n")
    _fill(report, closed, opened, in_flight, rate)
    return report


def _measure(
    name: str, seconds: float, open_seconds: float, warm: float, in_flight: int, rate: float, appendonly: bool
) -> tuple[Window, Window]:
    module, environ = SYSTEMS[name]
    with RedisServer(appendonly=appendonly) as redis, Processes() as processes:
        hops = [f"hop{hop + 1}" for hop in range(HOPS)]
        for number, hop in enumerate(hops):
            words = ("--work", module, redis.url, str(number))
            processes.start(hop, "tests.bench.driver", *words, talks=True, environ=environ)
        options = json.dumps({"url": redis.url, "payload": payload()})
        driver = processes.start("submitter", "tests.bench.driver", module, options, talks=True)
        for child in processes.children.values():
            child.line()
        pids = {**processes.pids(*hops), "redis": redis.pid}
        closed = driver.window(do="closed", in_flight=in_flight, warm_s=warm, seconds=seconds, pids=pids)
        offsets = loads.steady(rate, warm / 2 + open_seconds)
        opened = driver.window(do="open", offsets=offsets, warm_s=warm / 2, pids=pids)
        return closed, opened


def _fill(
    report: Report, closed: dict[str, list[Window]], opened: dict[str, list[Window]], in_flight: int, rate: float
) -> None:
    cpu = {name: [window.cpu_per_call() for window in windows] for name, windows in closed.items()}
    for name, windows in closed.items():
        report.row(
            f"closed loop, {in_flight} in flight",
            name,
            CPU_us_per_job=spread(cpu[name]),
            jobs_per_s=spread([window.rate for window in windows]),
            P50_ms=spread([window.quantile_ms(500) for window in windows]),
            P99_ms=spread([window.quantile_ms(990) for window in windows]),
            errors=errors_of(windows),
        )
        parts = {part: spread([window.cpu_per_call([part]) for window in windows]) for part in windows[0].cpu_us}
        report.tables.setdefault("CPU us per job by process, closed loop", {})[name] = parts
    for name, windows in opened.items():
        report.row(
            f"open loop, {rate:g} per s, latency from the planned start",
            name,
            P50_ms=spread([window.quantile_ms(500) for window in windows]),
            P99_ms=spread([window.quantile_ms(990) for window in windows]),
            CPU_us_per_job=spread([window.cpu_per_call() for window in windows]),
            lag_P99_ms=spread([window.lag_ms(990) for window in windows]),
            errors=errors_of(windows),
        )
    for name in closed:
        if name != "penstock" and "penstock" in closed:
            report.row("ratios within each round", f"{name} / penstock", CPU=ratios(cpu[name], cpu["penstock"]))
