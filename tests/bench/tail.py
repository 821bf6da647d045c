"""tail: how long the unlucky wait at unequal replicas, by balancing policy, beside an ideal central queue."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Final

from pipeline.front import Front
from tests.bench import loads
from tests.bench.figures import Report, in_turns, quantile, ratios, spread
from tests.bench.hops_penstock import job_of, settings
from tests.bench.loads import Call
from tests.bench.processes import Processes
from tests.bench.queueing import Server, at_arrival, by_lot, by_turns, central_queue, fast_only, fewest
from tests.servers import RedisServer

CASES: Final = {"equal": (1.0, 1.0, 1.0), "one-slow": (1.0, 1.0, 10.0)}
POLICIES: Final = "expected-finish,least-loaded,round-robin,random"
SLOTS: Final = 4
SIGMA: Final = 0.8
"""Of the lognormal service times: P99 is then 4.7 times the mean."""
LIFE_MS: Final = 600_000

Simulation = Callable[[list[float], list[float], list[Server], Random], list[float]]
SIMULATED: Final[dict[str, Simulation]] = {
    "central queue": lambda arrivals, spans, servers, _rng: central_queue(arrivals, spans, servers),
    "fast replicas only": lambda arrivals, spans, servers, _rng: fast_only(arrivals, spans, servers),
    "least connections at arrival": lambda a, s, servers, rng: at_arrival(a, s, servers, fewest, rng),
    "round-robin at arrival": lambda a, s, servers, rng: at_arrival(a, s, servers, by_turns(), rng),
    "random at arrival": lambda a, s, servers, rng: at_arrival(a, s, servers, by_lot, rng),
}


def run(
    *,
    rounds: int = 3,
    seconds: float = 15.0,
    warm: float = 3.0,
    mean_ms: float = 100.0,
    cases: str = ",".join(CASES),
    utilisation: str = "50,80",
    policies: str = POLICIES,
) -> Report:
    """Send the same arrivals with the same service times through the llm stage once per policy, in each round.

    The simulated queues get exactly these arrivals and service times, and leave out the same jobs of the warm-up.
    """
    about = {"rounds": rounds, "seconds": seconds, "mean_ms": mean_ms, "slots": SLOTS, "sigma": SIGMA}
    report = Report("tail", about)
    for case in cases.split(","):
        for load in utilisation.split(","):
            servers = [Server(SLOTS, factor) for factor in CASES[case]]
            rate = int(load) / 100 * sum(SLOTS / server.factor for server in servers) / (mean_ms / 1000)
            found = _cell(servers, rate, rounds, seconds, warm, mean_ms / 1000, policies.split(","))
            _fill(report, f"{case} replicas, {load} % load, {rate:.0f} jobs/s; latencies in mean service times", found)
    report.notes.append("`at arrival` and the two ideals are simulated with the arrivals and service times of the run")
    report.notes.append("better ideal: the lower P99 of central queue and fast replicas only, round by round")
    return report


def service_times(seed: int, count: int, mean_s: float) -> list[float]:
    """Return lognormal service times."""
    rng = Random(f"{seed}:service")
    median_s = mean_s * math.exp(-SIGMA * SIGMA / 2)
    return [rng.lognormvariate(math.log(median_s), SIGMA) for _ in range(count)]


def counted(times: list[float], arrivals: list[float], warm: float) -> list[float]:
    """Return the times of the jobs that arrived after the warm-up."""
    return [time for time, arrival in zip(times, arrivals, strict=True) if arrival >= warm]


def _cell(
    servers: list[Server], rate: float, rounds: int, seconds: float, warm: float, mean_s: float, policies: list[str]
) -> dict[str, list[tuple[float, float, int]]]:
    """Return (P50, P99, errors) per round, in mean service times, by policy and by simulated queue."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    for number in range(rounds):
        arrivals = loads.poisson(rate, warm + seconds, Random(f"{number}:arrivals"))
        spans = service_times(number, len(arrivals), mean_s)
        for policy in in_turns(policies, number):
            row = _measure(policy, servers, arrivals, number, warm, mean_s)
            found.setdefault(policy, []).append(row)
            sys.stderr.write(f"round {number + 1}: {policy}: P99 {row[1]:.2f}\n")
        for name, simulate in SIMULATED.items():
            times = counted(simulate(arrivals, spans, servers, Random(number)), arrivals, warm)
            found.setdefault(name, []).append((quantile(times, 500) / mean_s, quantile(times, 990) / mean_s, 0))
    return found


def _measure(
    policy: str, servers: list[Server], arrivals: list[float], seed: int, warm: float, mean_s: float
) -> tuple[float, float, int]:
    with RedisServer() as redis, Processes() as processes:
        factors = [f"{server.factor:g}" for server in servers]
        replicas = processes.start("replicas", "tests.bench.replica", str(SLOTS), *factors, talks=True)
        environ = {
            "PENSTOCK_REDIS__URL": redis.url,
            "PENSTOCK_LLM__URLS": ",".join(json.loads(replicas.line())),
            "PENSTOCK_LLM__SLOTS": str(SLOTS),
            "PENSTOCK_BALANCING__POLICY": policy,
        }
        processes.start("llm", "stages", "llm", environ=environ)
        options = json.dumps({"url": redis.url, "seed": seed, "count": len(arrivals), "mean_s": mean_s})
        driver = processes.start("submitter", "tests.bench.driver", "tail", options, talks=True)
        driver.line()
        window = driver.window(do="open", offsets=arrivals, warm_s=warm, pids={})
    errors = sum(window.errors.values())
    latencies = window.latencies_ms + [math.inf] * errors  # what never came took longest
    return quantile(latencies, 500) / 1000 / mean_s, quantile(latencies, 990) / 1000 / mean_s, errors


def _fill(report: Report, title: str, found: dict[str, list[tuple[float, float, int]]]) -> None:
    p99 = {name: [row[1] for row in rows] for name, rows in found.items()}
    better = [min(pair) for pair in zip(p99["central queue"], p99["fast replicas only"], strict=True)]
    for name, rows in found.items():
        report.row(
            title,
            name if name not in SIMULATED else f"({name})",
            P50=spread([row[0] for row in rows]),
            P99=spread(p99[name]),
            P99_to_better_ideal=ratios(p99[name], better),
            P99_to_least_connections=ratios(p99[name], p99["least connections at arrival"]),
            errors=str(sum(row[2] for row in rows)),
        )


# --- The submitter: runs in the driver's process ------------------------------------------------


@asynccontextmanager
async def submitting(url: str, seed: int, count: int, mean_s: float) -> AsyncIterator[Call]:
    """Give the call: a prompt that is its own service time, straight to the llm stage. Begins when a call succeeds."""
    spans = service_times(seed, count, mean_s)
    async with Front(settings(url), "bench") as front:

        async def ask(span_s: float) -> None:
            job = job_of(front, {"prompt": f"{span_s:.6f}"}, ("llm",), LIFE_MS)
            await front.submit(job)
            completion = await front.wait(job.id, job.tenant, job.deadline_ms)
            if completion.status != "completed":
                raise RuntimeError(completion.status)

        async def call(number: int) -> None:
            await ask(spans[number])

        await ask(0.001)
        yield call
