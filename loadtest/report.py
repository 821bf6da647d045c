"""What a load test found: samples in, one report out, and the ways to show it. No clock, no network.

Rules:
- Latencies are those of the successful requests: a server that refuses fast must not look fast.
- Percentiles are by nearest rank, so each is a latency that some request really had.
- Throughput is successful requests over the whole duration.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that has ended.

    Args:
        latency_s: from sending it to having its answer whole.
        error: kind of its failure, a short word or two; None: it succeeded.
        worker: who handled it, and
        replica: which replica answered, as the answer says; None: it does not.
    """

    latency_s: float
    error: str | None = None
    worker: str | None = None
    replica: str | None = None


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies of the successful requests, in milliseconds."""

    min: float
    p50: float
    p95: float
    p99: float
    max: float
    average: float


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run.

    Args:
        duration_s: from the first request's start to the last one's end.
        total: requests that ended, successful and failed.
        unfinished: still under way when the run was interrupted; in no other figure.
        latency_ms: None when no request succeeded.
        throughput_per_s: successful requests in each second.
        errors: failed requests by kind, the most frequent first.
        workers: successful requests by worker, as far as the answers name one; and
        replicas: by replica; both the busiest first.
    """

    duration_s: float
    total: int
    successful: int
    failed: int
    unfinished: int
    is_interrupted: bool
    latency_ms: Latencies | None
    throughput_per_s: float
    errors: Mapping[str, int]
    workers: Mapping[str, int]
    replicas: Mapping[str, int]

    def as_json(self) -> dict[str, object]:
        """Return the report as plain JSON values, with the names of the fields above."""
        return asdict(self)


def summarize(
    samples: Sequence[Sample], duration_s: float, *, unfinished: int = 0, is_interrupted: bool = False
) -> Report:
    """Return the report on *samples*, in any order."""
    answered = [sample for sample in samples if sample.error is None]
    return Report(
        duration_s=duration_s,
        total=len(samples),
        successful=len(answered),
        failed=len(samples) - len(answered),
        unfinished=unfinished,
        is_interrupted=is_interrupted,
        latency_ms=_latencies([sample.latency_s * 1000 for sample in answered]) if answered else None,
        throughput_per_s=len(answered) / duration_s if duration_s > 0 else 0.0,
        errors=_count(sample.error for sample in samples),
        workers=_count(sample.worker for sample in answered),
        replicas=_count(sample.replica for sample in answered),
    )


def percentile(ordered: Sequence[float], per_mille: int) -> float:
    """Return the least of *ordered* that at least *per_mille* of 1,000 values do not exceed (nearest rank).

    Args:
        ordered: at least one value, ascending.
        per_mille: 1 to 1000; 500 is the median. Whole numbers, because 0.07 * 100 is more than 7.
    """
    rank = -(-per_mille * len(ordered) // 1000)
    return ordered[rank - 1]


def render(report: Report) -> str:
    """Return *report* as lines for people."""
    return "\n".join(_lines(report)) + "\n"


def _latencies(values_ms: list[float]) -> Latencies:
    values_ms.sort()
    return Latencies(
        min=values_ms[0],
        p50=percentile(values_ms, 500),
        p95=percentile(values_ms, 950),
        p99=percentile(values_ms, 990),
        max=values_ms[-1],
        # Rounding may carry a mean of equal values past them.
        average=min(max(sum(values_ms) / len(values_ms), values_ms[0]), values_ms[-1]),
    )


def _count(names: Iterator[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None).most_common())


def _lines(report: Report) -> Iterator[str]:
    yield f"{'Total duration:':<22}{report.duration_s:.2f} s{' (interrupted)' if report.is_interrupted else ''}"
    yield f"{'Total requests:':<22}{report.total}"
    yield f"{'Successful requests:':<22}{_share(report.successful, report.total)}"
    yield f"{'Failed requests:':<22}{_share(report.failed, report.total)}"
    if report.unfinished:
        yield f"{'Unfinished requests:':<22}{report.unfinished}"
    yield ""
    latency = report.latency_ms
    if latency is None:
        yield "Latency: none, no request succeeded"
    else:
        yield "Latency of the successful requests"
        for name, value in (
            ("Min:", latency.min),
            ("P50 (Median):", latency.p50),
            ("P95:", latency.p95),
            ("P99:", latency.p99),
            ("Max:", latency.max),
            ("Average:", latency.average),
        ):
            yield f"  {name:<20}{value:.2f} ms"
    yield ""
    yield f"{'Throughput:':<22}{report.throughput_per_s:.2f} req/s"
    for title, counts, whole in (
        ("Errors by kind", report.errors, report.failed),
        ("Answers per worker", report.workers, report.successful),
        ("Answers per replica", report.replicas, report.successful),
    ):
        if counts:
            yield ""
            yield title
            width = max(20, *(len(name) + 2 for name in counts))
            yield from (f"  {name:<{width}}{_share(count, whole)}" for name, count in counts.items())


def _share(count: int, whole: int) -> str:
    return f"{count} ({count / whole:.1%})" if whole else str(count)
