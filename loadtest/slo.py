"""Promises: `p99<500ms,errors<0.1%`. Their grammar, and whether a run kept them. No clock, no network.

A promise is one or more clauses with commas between; each must hold:

    p50 .. p99.999, max, mean, min    latency of the successful requests; us, ms or s
    errors                            share of requests that failed; % (or 0.001)
    rate, goodput                     requests per second that succeeded, or succeeded in time; no unit

Signs are < <= > >=. A latency of nothing keeps no promise: where no request succeeded, every latency clause is broken.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

_CLAUSE: Final = re.compile(r"\s*([a-z]+)([0-9.]*)\s*(<=|>=|<|>)\s*([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|%)?\s*")
_SIGNS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_MS: Final = {"us": 0.001, "ms": 1.0, "s": 1000.0}
_LATENCIES: Final = ("p", "max", "mean", "min")
_RATES: Final = ("rate", "goodput")
BEYOND: Final = 10
_HELP: Final = "write for example p99<500ms, max<2s, errors<0.1%, rate>100"


@dataclass(frozen=True, slots=True)
class Clause:
    """One condition.

    Args:
        metric: `p`, `max`, `mean`, `min` (milliseconds), `errors` (a share, 0 to 1), `rate` or `goodput` (per second).
        percent: which percentile `p` is; 0 for others.
        text: as it was written.
    """

    metric: str
    percent: float
    sign: str
    bound: float
    text: str

    @property
    def is_latency(self) -> bool:
        """Whether it speaks of milliseconds."""
        return self.metric in _LATENCIES


@dataclass(frozen=True, slots=True)
class Judged:
    """A clause beside what was found; `found` is None where there was nothing to look at."""

    clause: str
    found: float | None
    is_kept: bool

    @property
    def found_words(self) -> str:
        """What was found, in the unit that people write it in."""
        if self.found is None:
            return "nothing to look at"
        if self.clause.startswith("errors"):
            return f"{100 * self.found:.4g}%"
        return f"{self.found:.6g} {'per second' if self.clause.startswith(_RATES) else 'ms'}"


def parse(text: str) -> tuple[Clause, ...]:
    """Return the clauses of *text*.

    Raises:
        ValueError: it is no promise; the message names the clause and shows one that is right.
    """
    return tuple(_clause(part) for part in text.split(","))


def good_within_ms(clauses: tuple[Clause, ...]) -> float | None:
    """Return the latency up to which a request counts as good: the widest upper bound; None: there is no bound."""
    bounds = [c.bound for c in clauses if c.is_latency and c.metric != "min" and c.sign in ("<", "<=")]
    return max(bounds, default=None)


def unsure(clauses: tuple[Clause, ...], count: int) -> tuple[str, ...]:
    """Return a warning for each clause whose percentile rests on fewer than BEYOND of *count* latencies beyond it."""
    return tuple(
        f"{clause.text} rests on chance: of {count} latencies {beyond} may be longer, and {BEYOND} or more are needed"
        for clause in clauses
        if clause.metric == "p" and (beyond := int(round(count * (100 - clause.percent) / 100, 6))) < BEYOND
    )


def judge(clauses: tuple[Clause, ...], find: Callable[[Clause], float | None]) -> tuple[Judged, ...]:
    """Return each clause with what *find* found for it."""
    judged = []
    for clause in clauses:
        found = find(clause)
        is_kept = found is not None and _SIGNS[clause.sign](found, clause.bound)
        judged.append(Judged(clause.text, found, is_kept))
    return tuple(judged)


def _clause(text: str) -> Clause:
    matched = _CLAUSE.fullmatch(text)
    if matched is None:
        raise ValueError(f"slo: {text.strip()!r} is no clause; {_HELP}")
    metric, digits, sign, bound_text, unit = matched.groups()
    bound = float(bound_text)
    if metric == "p":
        if not re.fullmatch(r"\d{1,2}(\.\d{1,3})?", digits) or not 0 < float(digits) < 100:
            raise ValueError(f"slo: {text.strip()!r}: a percentile lies between p1 and p99.999; {_HELP}")
    elif digits or metric not in (*_LATENCIES, *_RATES, "errors"):
        raise ValueError(f"slo: {text.strip()!r} speaks of {metric + digits!r}, which is not measured; {_HELP}")
    if metric in _LATENCIES:
        if unit not in _MS:
            raise ValueError(f"slo: {text.strip()!r} needs a unit: us, ms or s; {_HELP}")
        bound *= _MS[unit]
    elif metric == "errors":
        if unit not in ("%", None):
            raise ValueError(f"slo: {text.strip()!r} is a share, not a time; {_HELP}")
        bound /= 100 if unit == "%" else 1
        if bound > 1:
            raise ValueError(
                f"slo: {text.strip()!r} is more than all: write errors<{bound_text}% for per cent; {_HELP}"
            )
    elif unit is not None:
        raise ValueError(f"slo: {text.strip()!r} counts requests per second and takes no unit; {_HELP}")
    return Clause(metric, float(digits) if digits else 0.0, sign, bound, "".join(text.split()))
