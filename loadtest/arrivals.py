"""When each request is to be sent: instants planned beforehand, whatever the target does. No clock, no network.

All plans are one idea: the k-th arrival comes when the rate, summed over time, has reached the k-th mark. Marks at
whole numbers make an even pace, marks with exponential gaps make independent callers (Poisson). A ramp only bends the
time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

Pace = Literal["constant", "poisson"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The arrivals of one open-loop run.

    Args:
        rate: requests per second, at the end of the run where it ramps.
        duration_s: no arrival is planned at or after it.
        pace: `constant` gaps, or those of independent callers (`poisson`).
        ramp_from: the rate at the start, from where it goes evenly to `rate`; None: `rate` all the time.
        requests: at most so many arrivals; None: as many as come.
        seed: the same seed gives the same instants.
    """

    rate: float
    duration_s: float
    pace: Pace = "constant"
    ramp_from: float | None = None
    requests: int | None = None
    seed: int = 0


def instants(plan: Plan, part: int = 0, parts: int = 1) -> Iterator[tuple[int, float]]:
    """Yield number and planned instant, in seconds from the start, of every *parts*-th arrival from *part* on.

    The parts together are the whole plan, so that it does not depend on how many processes keep it.
    """
    begin = plan.rate if plan.ramp_from is None else plan.ramp_from
    bend = (plan.rate - begin) / (2 * plan.duration_s)
    for number, mark in islice(enumerate(_marks(plan)), plan.requests):
        at_s = _time_of(mark, begin, bend)
        if at_s is None or at_s >= plan.duration_s:
            return
        if number % parts == part:
            yield number, at_s


def _marks(plan: Plan) -> Iterator[float]:
    if plan.pace == "constant":
        yield from map(float, count())
        return
    rng = Random(plan.seed)
    mark = 0.0
    while True:
        mark += rng.expovariate(1.0)
        yield mark


def _time_of(mark: float, begin: float, bend: float) -> float | None:
    """Return when begin * t + bend * t^2 reaches *mark*; None: never, because the ramp goes down to nothing before."""
    if mark == 0:
        return 0.0
    below = begin * begin + 4 * bend * mark
    if below < 0:
        return None
    # The usual formula subtracts numbers that are nearly equal when the ramp is flat; this form does not.
    return 2 * mark / (begin + math.sqrt(below))
