"""When a failed job runs again: a plain decision on values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from random import Random

UNCHARGED_BASE_S = 0.25
"""A refusal that did no work is asked again soon, but never in a hot loop."""


@dataclass(frozen=True, slots=True)
class Again:
    """Run again after *delay_s*, as attempt number *attempt*."""

    delay_s: float
    attempt: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Attempts have ended."""


def backoff_s(attempt: int, base_s: float, cap_s: float, rng: Random) -> float:
    """Return the wait before *attempt* runs again, in seconds, with full jitter.

    Args:
        attempt: 1 for the first retry.
        base_s: upper bound of the first wait.
        cap_s: upper bound before jitter; the result lies in [0, cap_s].

    Raises:
        ValueError: attempt < 1.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    if attempt < 1:
        raise ValueError(f"attempt must be at least 1, not {attempt}")
    ceiling = cap_s if attempt > 64 else min(cap_s, base_s * 2.0 ** (attempt - 1))
    return rng.uniform(0.0, ceiling)


def scheduled_s(attempt: int, schedule_s: Sequence[float], rng: Random) -> float:
    """Return the wait after failed attempt number *attempt*, in seconds: what its schedule says, a tenth more at most.

    Never less: people read the schedule. The tenth keeps those that failed together from coming back together.
    """
    return schedule_s[attempt - 1] * (1 + 0.1 * rng.random())


def decide_retry(
    attempt: int,
    *,
    charged: bool,
    after_s: float | None,
    max_retries: int,
    base_s: float,
    cap_s: float,
    rng: Random,
    schedule_s: Sequence[float] | None = None,
    left_s: float = inf,
) -> Again | GiveUp:
    """Decide what follows a failed attempt.

    Args:
        attempt: number of the attempt that failed, 1 for the first.
        charged: False keeps the number: the job may wait like this until its deadline.
        after_s: the least wait the other side asked for, in seconds; jitter comes on top.
        schedule_s: the waits of a flow that has its own; they take the place of retries, base and cap. What the other
            side asks for makes such a wait longer, never shorter: a schedule also bounds how often it is asked at all.
        left_s: until the deadline; a scheduled wait that would end after it is not begun.
    """
    if charged and schedule_s is not None:
        if attempt > len(schedule_s):
            return GiveUp()
        delay_s = max(scheduled_s(attempt, schedule_s, rng), after_s or 0.0)
        return Again(delay_s, attempt + 1) if delay_s < left_s else GiveUp()
    if charged and attempt > max_retries:
        return GiveUp()
    jitter = backoff_s(attempt, base_s, cap_s, rng) if charged else UNCHARGED_BASE_S * (1 + rng.random())
    delay_s = jitter if after_s is None else after_s + min(jitter, 0.1 * after_s + 0.1)
    return Again(delay_s, attempt + 1 if charged else attempt)
