"""What a load test found, and the text that people read. No clock, no network.

Rules:
- Latencies are those of the successful requests: a server that refuses fast must not look fast.
- In an open loop a latency counts from the planned start; the service time, from the start that came about, stands
  beside it.
- A percentile is a span that so many requests did not exceed, within one in a thousand; one that rests on fewer than
  ten requests beyond it is shown with a warning.
- Throughput is successful requests over the whole duration; goodput those among them that were in time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

# Whoever reads the report's schema needs these names at run time.
from loadtest.slo import BEYOND, Clause, Judged, judge
from loadtest.tally import Moment, Slow, Spans
from loadtest.verdict import Verdict
from loadtest.waterfall import Fall

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadtest.crew import Outcome

PERCENTS: Final = (50.0, 90.0, 95.0, 99.0, 99.9)
MOST_NAMES: Final = 50  # of workers, of replicas, of kinds of errors; what is left is counted together
SCHEMA: Final = 1

EXIT_OK: Final = 0  # every request succeeded, or the promise was kept
EXIT_FAILURES: Final = 1  # no promise was asked for, and at least one request failed
EXIT_USAGE: Final = 2  # bad options, or nothing listens at the target; no request was sent
EXIT_INVALID: Final = 3  # the load tester could not keep its plan: the figures are about itself
EXIT_BROKEN: Final = 99  # the promise was broken
EXIT_INTERRUPTED: Final = 130  # stopped by a signal; the report covers what had ended by then


@dataclass(frozen=True, slots=True)
class Percentile:
    """One percentile.

    Args:
        beyond: requests that took longer than this share; below BEYOND the figure is a matter of chance.
    """

    percent: float
    ms: float
    beyond: int
    is_sure: bool


@dataclass(frozen=True, slots=True)
class Latencies:
    """A distribution in milliseconds."""

    samples: int
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float
    average: float


@dataclass(frozen=True, slots=True)
class Second:
    """What happened in one part of the run, by the time at which requests ended.

    Args:
        at_s: its start.
        span_s: its length.
        in_flight: at its end, those included that stand in line for a connection.
        p50_ms, p99_ms, max_ms: of the successes that ended in it; None: there was none.
    """

    at_s: float
    span_s: float
    sent: int
    successful: int
    failed: int
    in_flight: int
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run.

    Args:
        schema: number of this form; it changes when a field changes its meaning or goes.
        loop: `open` or `closed`.
        duration_s: from the first request's start to the last one's end.
        total: requests that ended, successful and failed.
        unfinished: still under way when the run was interrupted; in no other figure.
        latency_ms: None when no request succeeded; from the planned start in an open loop.
        service_ms: from the start that came about.
        lag_ms: how much later than planned requests left; None in a closed loop.
        late: arrivals that left later than the limit, or never.
        busiest: share of one core that the busiest generator used.
        throughput_per_s: successful requests per second.
        good_within_ms: the latency up to which a success is good; None: the promise names none, and all are.
        goodput_per_s: good requests per second.
        errors: failed requests by kind, the most frequent first.
        workers: successful requests by worker, as far as the answers name one; and
        replicas: by replica; both the busiest first.
        promise: each clause with what was found; empty: none was asked for.
        waterfall: where the time went, by percentile; empty: the answers do not tell.
        slowest: the slowest successes, slowest first.
        spectrum: (percent, milliseconds) of the latencies.
        seconds: the run over time.
        manifest: what is needed to repeat it.
    """

    schema: int
    loop: Literal["open", "closed"]
    duration_s: float
    total: int
    successful: int
    failed: int
    unfinished: int
    is_interrupted: bool
    latency_ms: Latencies | None
    service_ms: Latencies | None
    lag_ms: Latencies | None
    late: int
    busiest: float
    percentiles: tuple[Percentile, ...]
    throughput_per_s: float
    good_within_ms: float | None
    goodput_per_s: float
    errors: dict[str, int]
    workers: dict[str, int]
    replicas: dict[str, int]
    verdict: Verdict
    promise: tuple[Judged, ...]
    waterfall: tuple[Fall, ...]
    slowest: tuple[Slow, ...]
    spectrum: tuple[tuple[float, float], ...]
    seconds: tuple[Second, ...]
    manifest: dict[str, Any]

    @property
    def is_kept(self) -> bool:
        """Whether every clause of the promise held."""
        return all(judged.is_kept for judged in self.promise)

    @property
    def exit_code(self) -> int:
        """The exit code that tells how the run went; what makes the figures worthless comes first."""
        if self.is_interrupted:
            return EXIT_INTERRUPTED
        if not self.verdict.is_valid:
            return EXIT_INVALID
        if self.promise:
            return EXIT_OK if self.is_kept else EXIT_BROKEN
        return EXIT_FAILURES if self.failed else EXIT_OK

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values, with the names of the fields above."""
        return asdict(self)


def summarize(
    outcome: Outcome,
    *,
    is_open: bool,
    verdict: Verdict,
    clauses: tuple[Clause, ...] = (),
    good_within_ms: float | None = None,
    manifest: dict[str, Any] | None = None,
) -> Report:
    """Return the report on what the generators found."""
    tally, duration_s = outcome.tally, outcome.duration_s
    throughput = tally.successful / duration_s if duration_s > 0 else 0.0
    goodput = tally.good / duration_s if duration_s > 0 else 0.0

    def find(clause: Clause) -> float | None:
        spans = tally.latency
        match clause.metric:
            case "errors":
                return tally.failed / tally.ended if tally.ended else None
            case "rate":
                return throughput
            case "goodput":
                return goodput
        if not spans.count:
            return None
        ends = {"min": spans.least_ms, "max": spans.greatest_ms, "mean": spans.mean_ms}
        return ends[clause.metric] if clause.metric in ends else spans.percentile_ms(clause.percent)

    return Report(
        schema=SCHEMA,
        loop="open" if is_open else "closed",
        duration_s=duration_s,
        total=tally.ended,
        successful=tally.successful,
        failed=tally.failed,
        unfinished=outcome.unfinished,
        is_interrupted=outcome.is_interrupted,
        latency_ms=_latencies(tally.latency),
        service_ms=_latencies(tally.service),
        lag_ms=_latencies(tally.lag) if is_open else None,
        late=tally.late,
        busiest=outcome.busiest,
        percentiles=tuple(_percentile(tally.latency, percent) for percent in PERCENTS) if tally.successful else (),
        throughput_per_s=throughput,
        good_within_ms=good_within_ms,
        goodput_per_s=goodput,
        errors=_most_common(tally.errors),
        workers=_most_common(tally.workers),
        replicas=_most_common(tally.replicas),
        verdict=verdict,
        promise=judge(clauses, find),
        waterfall=tally.waterfall.falls(),
        slowest=tuple(sorted(tally.slowest, reverse=True)),
        spectrum=tuple(tally.latency.spectrum()),
        seconds=over_time(outcome.moments),
        manifest=manifest or {},
    )


def over_time(moments: Sequence[Moment], most: int = 240) -> tuple[Second, ...]:
    """Return the run in parts of equal length: seconds, or as many seconds each as keep the parts below *most*."""
    if not moments:
        return ()
    end_s = max(moment.at_s for moment in moments)
    span_s = max(1.0, -(-end_s // most))
    parts: dict[int, list[Moment]] = defaultdict(list)
    for moment in moments:
        # A moment tells of what came before it, and the one of the mark itself comes a little late.
        parts[max(0, int((moment.at_s - 0.1) // span_s))].append(moment)
    in_flight: dict[int, int] = {}  # by generator, as its last word has it
    seconds = []
    for index in sorted(parts):
        in_flight |= {moment.part: moment.in_flight for moment in sorted(parts[index], key=lambda one: one.at_s)}
        seconds.append(_second(index * span_s, span_s, parts[index], sum(in_flight.values())))
    return tuple(seconds)


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


def _second(at_s: float, span_s: float, moments: Sequence[Moment], in_flight: int) -> Second:
    latencies = sorted(latency for moment in moments for latency in moment.latencies)
    return Second(
        at_s=at_s,
        span_s=span_s,
        sent=sum(moment.sent for moment in moments),
        successful=len(latencies),
        failed=sum(moment.failed for moment in moments),
        in_flight=in_flight,
        p50_ms=percentile(latencies, 500) if latencies else None,
        p99_ms=percentile(latencies, 990) if latencies else None,
        max_ms=latencies[-1] if latencies else None,
    )


def _most_common(counts: Counter[str]) -> dict[str, int]:
    """Return the counts, the greatest first; a target that names each answer anew must not fill the report."""
    most = counts.most_common(MOST_NAMES if len(counts) <= MOST_NAMES else MOST_NAMES - 1)
    rest = counts.total() - sum(count for _, count in most)
    return dict(most) | ({"others": rest} if rest else {})


def _latencies(spans: Spans) -> Latencies | None:
    if not spans.count:
        return None
    p50, p90, p95, p99, p99_9 = (spans.percentile_ms(percent) for percent in PERCENTS)
    return Latencies(spans.count, spans.least_ms, p50, p90, p95, p99, p99_9, spans.greatest_ms, spans.mean_ms)


def _percentile(spans: Spans, percent: float) -> Percentile:
    beyond = int(round(spans.count * (100 - percent) / 100, 6))
    return Percentile(percent, spans.percentile_ms(percent), beyond, beyond >= BEYOND)


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
        yield f"Latency of the successful requests{', from the planned start' if report.loop == 'open' else ''}"
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
    if report.good_within_ms is not None:
        yield f"{'Goodput:':<22}{report.goodput_per_s:.2f} req/s within {report.good_within_ms:g} ms"
    yield from _percentile_lines(report)
    yield from _count_lines(report)
    yield from _waterfall_lines(report.waterfall)
    yield from _slowest_lines(report.slowest)
    yield from _judgement_lines(report)


def _percentile_lines(report: Report) -> Iterator[str]:
    if report.percentiles:
        columns = {"latency": report.latency_ms}
        if report.loop == "open":
            columns |= {"service time": report.service_ms, "send lag": report.lag_ms}
        yield ""
        yield f"{'Percentiles (ms)':<18}" + "".join(f"{name:>13}" for name in columns) + f"{'took longer':>13}"
        for item, name in zip(report.percentiles, ("p50", "p90", "p95", "p99", "p99_9"), strict=True):
            values = "".join(f"{getattr(spans, name):>13.2f}" for spans in columns.values() if spans is not None)
            unsure = "" if item.is_sure else "  too few"
            yield f"  {f'P{item.percent:g}':<16}{values}{item.beyond:>13}{unsure}"
    if report.loop == "open":
        yield f"{'Sent late:':<22}{report.late}"
    yield f"{'Busiest generator:':<22}{report.busiest:.0%} of a core"


def _count_lines(report: Report) -> Iterator[str]:
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


def _waterfall_lines(falls: Sequence[Fall]) -> Iterator[str]:
    if not falls:
        return
    names = list(dict.fromkeys(name for fall in falls for name in fall.spans_ms))
    width = max(20, *(len(name) + 2 for name in names))
    yield ""
    yield "Where the time went (ms)"
    yield f"  {'':<{width}}" + "".join(f"{f'P{fall.percent:g}':>11}" for fall in falls)
    for name in names:
        yield f"  {name:<{width}}" + "".join(f"{fall.spans_ms.get(name, 0.0):>11.2f}" for fall in falls)
    yield f"  {'together':<{width}}" + "".join(f"{fall.whole_ms:>11.2f}" for fall in falls)
    yield f"  {'requests':<{width}}" + "".join(f"{fall.samples:>11}" for fall in falls)


def _slowest_lines(slowest: Sequence[Slow]) -> Iterator[str]:
    if not slowest:
        return
    yield ""
    yield "Slowest requests"
    for slow in slowest:
        yield f"  {slow.latency_ms:>10.2f} ms  at {slow.at_s:>8.3f} s  {slow.job_id or f'request {slow.number}'}"


def _judgement_lines(report: Report) -> Iterator[str]:
    if report.promise:
        yield ""
        yield f"Promise {'kept' if report.is_kept else 'BROKEN'}"
        for judged in report.promise:
            yield f"  {'kept  ' if judged.is_kept else 'BROKEN'}  {judged.clause}  (found {judged.found_words})"
    for warning in report.verdict.warnings:
        yield ""
        yield f"Warning: {warning}"
    if not report.verdict.is_valid:
        yield ""
        yield "INVALID: the load tester did not keep its plan, so these figures are about itself"
        yield from (f"  {reason}" for reason in report.verdict.reasons)


def _share(count: int, whole: int) -> str:
    return f"{count} ({count / whole:.1%})" if whole else str(count)
