"""Replicas on paper: the same arrivals and service times as in the real run, under policies that cost nothing.

A job that needs s seconds takes s x factor on a replica that is slower by that factor. Each replica runs `slots` jobs
at once. All policies here take the jobs in the order of their arrival.

- `central_queue`: one line for all; who is first goes to a free slot at once, the fastest one. On equal replicas no
  policy that knows no service times does better.
- `fast_only`: the same, without the replicas that are slower than the fastest.
- `at_arrival`: each replica has a line of its own, and a job joins one when it arrives: by fewest jobs there (what
  "least connections" does), by turns, or by lot.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Server:
    """One replica: how many jobs it runs at once, and how many times slower than the fastest it is."""

    slots: int
    factor: float = 1.0


def central_queue(arrivals: Sequence[float], service: Sequence[float], servers: Sequence[Server]) -> list[float]:
    """Return each job's time from arrival to end, in one line for all."""
    free: list[tuple[float, int]] = []  # (factor, number), the fastest first
    for number, server in enumerate(servers):
        free += [(server.factor, number)] * server.slots
    heapq.heapify(free)
    busy: list[tuple[float, float, int]] = []  # (end, factor, number)
    times: list[float] = []
    for arrival, span in zip(arrivals, service, strict=True):
        start = arrival
        while busy and busy[0][0] <= start:
            _, factor, number = heapq.heappop(busy)
            heapq.heappush(free, (factor, number))
        if not free:
            start, factor, number = heapq.heappop(busy)
            heapq.heappush(free, (factor, number))
        factor, number = heapq.heappop(free)
        end = start + span * factor
        heapq.heappush(busy, (end, factor, number))
        times.append(end - arrival)
    return times


def fast_only(arrivals: Sequence[float], service: Sequence[float], servers: Sequence[Server]) -> list[float]:
    """Return each job's time where the slower replicas are left alone."""
    fastest = min(server.factor for server in servers)
    return central_queue(arrivals, service, [server for server in servers if server.factor == fastest])


Choice = Callable[[Sequence[int], Random], int]
"""Given how many jobs each replica has, the one that gets the next."""


def fewest(loads: Sequence[int], rng: Random) -> int:
    """Least connections; ties by lot."""
    least = min(loads)
    return rng.choice([number for number, load in enumerate(loads) if load == least])


def by_lot(loads: Sequence[int], rng: Random) -> int:
    """Any."""
    return rng.randrange(len(loads))


def by_turns() -> Choice:
    """Return a choice that goes round."""
    turn = -1

    def choose(loads: Sequence[int], _rng: Random) -> int:
        nonlocal turn
        turn = (turn + 1) % len(loads)
        return turn

    return choose


def at_arrival(
    arrivals: Sequence[float], service: Sequence[float], servers: Sequence[Server], choose: Choice, rng: Random
) -> list[float]:
    """Return each job's time where each joins one replica's own line when it arrives."""
    slots: list[list[float]] = [[0.0] * server.slots for server in servers]  # when each slot is free
    ends: list[list[float]] = [[] for _ in servers]  # of the jobs there
    times = []
    for arrival, span in zip(arrivals, service, strict=True):
        for there in ends:
            while there and there[0] <= arrival:
                heapq.heappop(there)
        chosen = choose([len(there) for there in ends], rng)
        end = max(arrival, heapq.heappop(slots[chosen])) + span * servers[chosen].factor
        heapq.heappush(slots[chosen], end)
        heapq.heappush(ends[chosen], end)
        times.append(end - arrival)
    return times
