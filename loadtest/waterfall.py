"""Where the time went: the spans that answers tell of (`timings_ms`), gathered by how long their requests took.

Latencies are sorted into buckets that are one per cent wide, and each bucket keeps sums, so memory does not grow with
the run. The waterfall of a percentile is the mean of the bucket that holds it: its spans add up to that mean, which is
within one per cent of the percentile. Two spans are the load tester's own: `send lag`, how late the request left, and
`outside`, what the target's total leaves of the service time. A request whose target says that it took longer than the
request did (a repeated answer) has no place in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

PERCENTS: Final = (50.0, 90.0, 95.0, 99.0, 99.9)
LAG: Final = "send lag"
OUTSIDE: Final = "outside"
_LOG_WIDTH: Final = math.log(1.01)
_MOST_NAMES: Final = 40  # of spans in one run; a target that gives each answer names of its own tells of no stages
_MAX_NAME_CHARS: Final = 40
_SLACK_MS: Final = 0.05  # spans are rounded to microseconds, and the two clocks begin at different lines
_FIRST: Final = ("gateway",)
_LAST: Final = ("return",)


@dataclass(frozen=True, slots=True)
class Fall:
    """The spans of the requests at one percentile.

    Args:
        whole_ms: their mean latency; the spans add up to it.
        samples: how many requests these are.
        spans_ms: in the order in which a request passes them.
    """

    percent: float
    whole_ms: float
    samples: int
    spans_ms: Mapping[str, float]


@dataclass(slots=True)
class Waterfall:
    """Sums of spans by bucket of latency."""

    buckets: dict[int, dict[str, float]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    names: dict[str, None] = field(default_factory=dict)

    def add(self, lag_ms: float, service_ms: float, timings_ms: Mapping[str, Any]) -> None:
        """Count one answer, by the spans beside `total`; one whose spans cannot be right is left out."""
        spans = {name: span for name, span in timings_ms.items() if name != "total"}
        most_ms = service_ms + _SLACK_MS  # for each of them, too: a sum of what a target may write need not be finite
        if not spans or not all(type(span) in (int, float) and 0 <= span <= most_ms for span in spans.values()):
            return
        new = spans.keys() - self.names.keys()
        if new and (len(self.names) + len(new) > _MOST_NAMES or not all(map(_is_name, new))):
            return
        rest = service_ms - math.fsum(spans.values())
        if rest < -_SLACK_MS:
            return
        key = _bucket(lag_ms + service_ms)
        sums = self.buckets.setdefault(key, {})
        self.counts[key] = self.counts.get(key, 0) + 1
        for name, span in ((LAG, lag_ms), *spans.items(), (OUTSIDE, rest)):
            sums[name] = sums.get(name, 0.0) + span
            if name not in self.names:
                self.names[name] = None

    def merge(self, other: Waterfall) -> None:
        """Take in what another process gathered."""
        self.names |= other.names
        for key, sums in other.buckets.items():
            mine = self.buckets.setdefault(key, {})
            self.counts[key] = self.counts.get(key, 0) + other.counts[key]
            for name, span in sums.items():
                mine[name] = mine.get(name, 0.0) + span

    def falls(self) -> tuple[Fall, ...]:
        """Return the waterfall of each percentile; nothing where no answer told of its spans."""
        total = sum(self.counts.values())
        return tuple(self._fall(percent, total) for percent in PERCENTS) if total else ()

    def _fall(self, percent: float, total: int) -> Fall:
        rank = math.ceil(round(percent * total / 100, 6))
        passed = 0
        for key in sorted(self.counts):
            passed += self.counts[key]
            if passed >= rank:
                break
        sums, count = self.buckets[key], self.counts[key]
        spans = {name: sums[name] / count for name in self._in_order() if name in sums}
        return Fall(percent, math.fsum(spans.values()), count, spans)

    def _in_order(self) -> list[str]:
        ends = (LAG, OUTSIDE, *_FIRST, *_LAST)
        middle = [name for name in self.names if name not in ends]
        return [LAG, *_FIRST, *middle, *_LAST, OUTSIDE]


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _MAX_NAME_CHARS and text.isprintable()


def _bucket(latency_ms: float) -> int:
    return math.floor(math.log(max(latency_ms, 0.001)) / _LOG_WIDTH)
