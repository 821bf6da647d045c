"""Whether a run may be believed: an open loop that sent late has measured itself. No clock, no network.

A request is late when it left later than the limit after its planned instant, or never left at all. A run is invalid
when the 99th percentile of the lags passes the limit, or when more than one in a hundred arrivals was late.
"""

from __future__ import annotations

from dataclasses import dataclass

LATE_SHARE = 0.01
BUSY_SHARE = 0.9  # of one core: from here on a generator's own queue shows in what it measures


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the load tester says of itself.

    Args:
        is_valid: a closed loop always is, since it keeps no plan.
        reasons: why it is not.
        warnings: what to keep in mind about a valid run.
    """

    is_valid: bool
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def decide_verdict(
    *, lag_p99_ms: float | None, late: int, planned: int, limit_ms: float, busiest: float, processes: int
) -> Verdict:
    """Return whether a run may be believed.

    Args:
        lag_p99_ms: None in a closed loop.
        late: arrivals that left later than the limit, or never.
        planned: arrivals whose time had come.
        busiest: share of one core that the busiest generator used.
    """
    remedy = f"use more generators (--processes {processes + 1}), a lower rate, or a machine that does nothing else"
    reasons = []
    if lag_p99_ms is not None and lag_p99_ms > limit_ms:
        reasons.append(f"the send lag's P99 is {lag_p99_ms:.2f} ms, above {limit_ms:g} ms: {remedy}")
    if lag_p99_ms is not None and late > planned * LATE_SHARE:
        reasons.append(f"{late} of {planned} arrivals ({late / planned:.1%}) left late or never: {remedy}")
    warnings = []
    if busiest > BUSY_SHARE:
        warnings.append(f"a generator used {busiest:.0%} of a core, so it may have measured itself: {remedy}")
    return Verdict(not reasons, tuple(reasons), tuple(warnings))
