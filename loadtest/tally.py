"""What one generator counts, and how the counts of several become one. No clock, no network.

Spans go into HdrHistograms, with three digits: they can be added to each other without loss, which percentiles cannot.
Recording costs three microseconds. The least, the greatest and the sum stand beside them as they were measured.
"""

from __future__ import annotations

import heapq
import math
import re
import sys
from array import array
from base64 import b64decode, b64encode
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Self

import orjson
from hdrh.histogram import HdrHistogram

from loadtest.waterfall import Waterfall

Json = dict[str, Any]

HOUR_US: Final = 3_600_000_000
SLOWEST: Final = 10
_MAX_CODE_CHARS: Final = 40
_MAX_ID_CHARS: Final = 128
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e\xa1-\uffff]")  # a terminal would obey some of them


@dataclass(frozen=True, slots=True)
class Answer:
    """What is read from one answer.

    Args:
        error: the kind of its failure; None: it succeeded.
        job_id: whatever names the job, for a look at the target's own records.
        timings_ms: spans by name, as the target tells them.
    """

    error: str | None
    job_id: str | None = None
    worker: str | None = None
    replica: str | None = None
    timings_ms: Json | None = None


def read_answer(status: int, body: bytes) -> Answer:
    """Return what an answer says: a success is 2xx with JSON; an error's kind is its status and its code."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return Answer("not json" if 200 <= status < 300 else f"http {status}")
    fields = answer if isinstance(answer, dict) else {}
    if not 200 <= status < 300:
        error = fields.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        return Answer(f"http {status} {_clean(code, _MAX_CODE_CHARS)}" if isinstance(code, str) else f"http {status}")
    job_id = fields.get("job_id", fields.get("id"))
    timings = fields.get("timings_ms")
    return Answer(
        None,
        _clean(str(job_id), _MAX_ID_CHARS) if isinstance(job_id, str | int) else None,
        _name(fields.get("worker")),
        _name(fields.get("replica")),
        timings if isinstance(timings, dict) else None,
    )


class Spans:
    """Many spans of time in milliseconds: their distribution, least, greatest and sum."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, HOUR_US, 3)
        self.count = 0
        self.least_ms = math.inf
        self.greatest_ms = 0.0
        self.sum_ms = 0.0

    def add(self, span_ms: float) -> None:
        """Count one span; what is longer than an hour counts as an hour in the percentiles."""
        self._histogram.record_value(min(max(1, round(span_ms * 1000)), HOUR_US))
        self.count += 1
        self.sum_ms += span_ms
        self.least_ms = min(self.least_ms, span_ms)
        self.greatest_ms = max(self.greatest_ms, span_ms)

    def merge(self, wire: Json) -> None:
        """Take in what another process counted.

        Args:
            wire: its `to_wire`.
        """
        if wire["count"]:
            self._histogram.decode_and_add(wire["histogram"])
            self.count += wire["count"]
            self.sum_ms += wire["sum_ms"]
            self.least_ms = min(self.least_ms, wire["least_ms"])
            self.greatest_ms = max(self.greatest_ms, wire["greatest_ms"])

    def to_wire(self) -> Json:
        """Return what `merge` reads."""
        return {
            "count": self.count,
            "sum_ms": self.sum_ms,
            "least_ms": self.least_ms if self.count else None,
            "greatest_ms": self.greatest_ms,
            "histogram": self._histogram.encode().decode("ascii"),
        }

    @property
    def mean_ms(self) -> float:
        """The average; between least and greatest, where rounding might carry the mean of equal values past them."""
        return min(max(self.sum_ms / self.count, self.least_ms), self.greatest_ms)

    def percentile_ms(self, percent: float) -> float:
        """Return the span that *percent* of all do not exceed, within one in a thousand; at least one was counted."""
        rank = math.ceil(round(percent * self.count / 100, 6))
        if rank >= self.count:
            return self.greatest_ms
        # The histogram rounds a rank to the nearest one, where the definition wants the next; so it gets a whole one.
        return self._clamp(self._histogram.get_value_at_percentile(100 * rank / self.count))

    def spectrum(self) -> list[tuple[float, float]]:
        """Return (percent, milliseconds), denser towards the end, as HdrHistogram's plots have them."""
        if not self.count:
            return []
        points = {
            item.percentile_level_iterated_to: self._clamp(item.value_iterated_to)
            for item in self._histogram.get_percentile_iterator(4)
        }
        return list(points.items())

    def _clamp(self, value_us: float) -> float:
        return min(max(value_us / 1000, self.least_ms), self.greatest_ms)


@dataclass(order=True, slots=True)
class Slow:
    """One of the slowest requests that succeeded."""

    latency_ms: float
    at_s: float
    number: int
    job_id: str | None = field(compare=False)
    worker: str | None = field(compare=False)
    replica: str | None = field(compare=False)


class Tally:
    """Everything that is counted in one run.

    Args:
        limit_ms: a send lag above it makes an arrival late.
        good_ms: a success is good up to this latency; None: every success is.
    """

    def __init__(self, limit_ms: float, good_ms: float | None) -> None:
        self._limit_ms = limit_ms
        self._good_ms = math.inf if good_ms is None else good_ms
        self.latency = Spans()
        self.service = Spans()
        self.lag = Spans()
        self.planned = 0
        self.late = 0
        self.successful = 0
        self.good = 0
        self.errors: Counter[str] = Counter()
        self.workers: Counter[str] = Counter()
        self.replicas: Counter[str] = Counter()
        self.waterfall = Waterfall()
        self.slowest: list[Slow] = []

    @property
    def failed(self) -> int:
        """Requests that ended with an error."""
        return self.errors.total()

    @property
    def ended(self) -> int:
        """Requests that ended."""
        return self.successful + self.failed

    def left(self, lag_ms: float) -> None:
        """Count a request of an open loop that left."""
        self.lag.add(lag_ms)
        if lag_ms > self._limit_ms:
            self.late += 1

    def answered(self, answer: Answer, *, number: int, at_s: float, lag_ms: float, service_ms: float) -> None:
        """Count a success.

        Args:
            at_s: its planned instant, from the start of the run.
        """
        latency_ms = lag_ms + service_ms
        self.successful += 1
        self.latency.add(latency_ms)
        self.service.add(service_ms)
        if latency_ms <= self._good_ms:
            self.good += 1
        if answer.worker is not None:
            self.workers[answer.worker] += 1
        if answer.replica is not None:
            self.replicas[answer.replica] += 1
        if answer.timings_ms is not None:
            self.waterfall.add(lag_ms, service_ms, answer.timings_ms)
        if len(self.slowest) < SLOWEST or latency_ms > self.slowest[0].latency_ms:
            self._keep(Slow(latency_ms, at_s, number, answer.job_id, answer.worker, answer.replica))

    def merge(self, wire: Json) -> None:
        """Take in what another process counted.

        Args:
            wire: its `to_wire`.
        """
        for name in ("latency", "service", "lag"):
            getattr(self, name).merge(wire[name])
        for name in ("planned", "late", "successful", "good"):
            setattr(self, name, getattr(self, name) + wire[name])
        for name in ("errors", "workers", "replicas"):
            getattr(self, name).update(wire[name])
        fall = wire["waterfall"]
        self.waterfall.merge(
            Waterfall(
                {int(key): sums for key, sums in fall["buckets"].items()},
                {int(key): count for key, count in fall["counts"].items()},
                fall["names"],
            )
        )
        for slow in wire["slowest"]:
            self._keep(Slow(**slow))

    def to_wire(self) -> Json:
        """Return what `merge` reads."""
        counts = {name: getattr(self, name) for name in ("planned", "late", "successful", "good")}
        shares = {name: dict(getattr(self, name)) for name in ("errors", "workers", "replicas")}
        spans = {name: getattr(self, name).to_wire() for name in ("latency", "service", "lag")}
        fall = {
            "buckets": {str(key): sums for key, sums in self.waterfall.buckets.items()},
            "counts": {str(key): count for key, count in self.waterfall.counts.items()},
            "names": self.waterfall.names,
        }
        return {**counts, **shares, **spans, "waterfall": fall, "slowest": self.slowest}

    def _keep(self, slow: Slow) -> None:
        if len(self.slowest) < SLOWEST:
            heapq.heappush(self.slowest, slow)
        else:
            heapq.heappushpop(self.slowest, slow)


@dataclass(slots=True)
class Moment:
    """What happened since the moment before; `latencies` are those of the successes, in milliseconds.

    `part` names the generator that tells it. What is `in_flight` holds until the same one speaks again.
    """

    at_s: float
    in_flight: int
    sent: int = 0
    failed: int = 0
    latencies: list[float] = field(default_factory=list)
    part: int = 0

    def to_wire(self) -> Json:
        """Return what `from_wire` reads: floats travel as they are in memory, since there are many."""
        packed = b64encode(array("f", self.latencies).tobytes()).decode("ascii")
        counts = {"in_flight": self.in_flight, "sent": self.sent, "failed": self.failed}
        return {"at_s": self.at_s, **counts, "l": packed, "part": self.part}

    @classmethod
    def from_wire(cls, wire: Json) -> Self:
        """Read what another process sent."""
        latencies = array("f")
        latencies.frombytes(b64decode(wire["l"]))
        return cls(wire["at_s"], wire["in_flight"], wire["sent"], wire["failed"], list(latencies), wire["part"])


def _name(value: object) -> str | None:
    # One string for each name instead of one for each answer.
    return sys.intern(_clean(value, _MAX_ID_CHARS)) if isinstance(value, str) else None


def _clean(text: str, most_chars: int) -> str:
    return _UNPRINTABLE.sub("?", text[:most_chars])
