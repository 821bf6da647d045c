"""The report's arithmetic, apart from any clock or network."""

import math
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.crew import Outcome
from loadtest.report import (
    EXIT_BROKEN,
    EXIT_FAILURES,
    EXIT_INTERRUPTED,
    EXIT_INVALID,
    EXIT_OK,
    Report,
    over_time,
    percentile,
    render,
    summarize,
)
from loadtest.slo import parse
from loadtest.tally import Answer, Moment, Tally, read_answer
from loadtest.verdict import Verdict

latencies = st.floats(0, 1e4)
samples = st.tuples(
    latencies,
    st.builds(
        Answer,
        st.none() | st.sampled_from(["timeout", "http 503 overloaded"]),
        st.none() | st.text(max_size=3),
        st.none() | st.sampled_from(["w1", "w2"]),
        st.none() | st.sampled_from(["http://a", "http://b"]),
    ),
)
VALID = Verdict(is_valid=True)


def tally_of(run: list[tuple[float, Answer]], good_ms: float | None = None) -> Tally:
    tally = Tally(2.0, good_ms)
    for number, (latency_ms, answer) in enumerate(run):
        if answer.error is None:
            tally.answered(answer, number=number, at_s=0.0, lag_ms=0.0, service_ms=latency_ms)
        else:
            tally.errors[answer.error] += 1
    return tally


def report_of(run: list[tuple[float, Answer]], duration_s: float = 1.0, slo: str | None = None) -> Report:
    clauses = () if slo is None else parse(slo)
    return summarize(Outcome(tally_of(run), duration_s), is_open=False, verdict=VALID, clauses=clauses)


@given(st.lists(latencies, min_size=1), st.integers(1, 1000))
def test_a_percentile_is_a_value_that_enough_do_not_exceed(values: list[float], per_mille: int) -> None:
    """Nearest rank: the least observed value at or below which the share lies."""
    ordered = sorted(values)
    found = percentile(ordered, per_mille)
    assert found in ordered
    assert sum(value <= found for value in ordered) * 1000 >= per_mille * len(ordered)
    assert sum(value < found for value in ordered) * 1000 < per_mille * len(ordered)


def test_percentiles_of_a_hundred_values_are_what_the_name_says() -> None:
    """The 99th of a hundred is the 99th, not the last one, and not something between two."""
    ordered = [float(n) for n in range(1, 101)]
    assert [percentile(ordered, per_mille) for per_mille in (500, 950, 990, 1000)] == [50, 95, 99, 100]


@settings(max_examples=12, deadline=None)  # a histogram is large, and each look at it slow
@given(st.lists(samples, max_size=30), st.floats(0.01, 1e4))
def test_the_parts_of_a_report_add_up(run: list[tuple[float, Answer]], duration_s: float) -> None:
    """Every request is successful or failed, every failure has its kind, and the percentiles are in order."""
    report = report_of(run, duration_s)
    assert report.successful + report.failed == report.total == len(run)
    assert sum(report.errors.values()) == report.failed
    assert sum(report.workers.values()) <= report.successful
    assert sum(report.replicas.values()) <= report.successful
    assert len(report.slowest) == min(10, report.successful)
    assert math.isclose(report.throughput_per_s * duration_s, report.successful, abs_tol=1e-6)
    latency = report.latency_ms
    assert (latency is None) == (report.successful == 0)
    if latency is not None:
        in_order = (latency.min, latency.p50, latency.p90, latency.p95, latency.p99, latency.p99_9, latency.max)
        assert all(low <= high for low, high in pairwise(in_order))
        assert latency.min <= latency.average <= latency.max


def test_failed_requests_have_no_part_in_the_latencies() -> None:
    """A server that refuses in a millisecond does not look fast."""
    report = report_of([(500.0, Answer(None)), (1.0, Answer("http 503"))])
    assert report.latency_ms is not None
    assert report.latency_ms.min == 500


def test_the_summary_keeps_the_shape_that_people_know() -> None:
    """Each of the familiar lines is there, with its unit."""
    run = [
        (10.0, Answer(None, "a", "w1", "http://a")),
        (30.0, Answer(None, None, "w1", "http://b")),
        (9.0, Answer("timeout")),
    ]
    assert render(report_of(run, 2.0)) == (
        "Total duration:       2.00 s\n"
        "Total requests:       3\n"
        "Successful requests:  2 (66.7%)\n"
        "Failed requests:      1 (33.3%)\n"
        "\n"
        "Latency of the successful requests\n"
        "  Min:                10.00 ms\n"
        "  P50 (Median):       10.01 ms\n"
        "  P95:                30.00 ms\n"
        "  P99:                30.00 ms\n"
        "  Max:                30.00 ms\n"
        "  Average:            20.00 ms\n"
        "\n"
        "Throughput:           1.00 req/s\n"
        "\n"
        "Percentiles (ms)        latency  took longer\n"
        "  P50                     10.01            1  too few\n"
        "  P90                     30.00            0  too few\n"
        "  P95                     30.00            0  too few\n"
        "  P99                     30.00            0  too few\n"
        "  P99.9                   30.00            0  too few\n"
        "Busiest generator:    0% of a core\n"
        "\n"
        "Errors by kind\n"
        "  timeout             1 (100.0%)\n"
        "\n"
        "Answers per worker\n"
        "  w1                  2 (100.0%)\n"
        "\n"
        "Answers per replica\n"
        "  http://a            1 (50.0%)\n"
        "  http://b            1 (50.0%)\n"
        "\n"
        "Slowest requests\n"
        "       30.00 ms  at    0.000 s  request 1\n"
        "       10.00 ms  at    0.000 s  a\n"
    )


def test_the_widest_table_fits_a_terminal_of_eighty_columns() -> None:
    """Latencies of up to an hour included."""
    tally = Tally(2.0, None)
    tally.left(1000.0)
    tally.answered(Answer(None), number=0, at_s=0.0, lag_ms=1000.0, service_ms=3_600_000.0)
    shown = render(summarize(Outcome(tally, 3600.0), is_open=True, verdict=VALID))
    assert "too few" in shown
    assert max(map(len, shown.splitlines())) < 80


def test_a_percentile_with_fewer_than_ten_requests_beyond_it_is_marked() -> None:
    """Of a thousand requests ten lie beyond P99, and one beyond P99.9."""
    report = report_of([(float(n), Answer(None)) for n in range(1, 1001)])
    assert [(item.percent, item.beyond, item.is_sure) for item in report.percentiles[3:]] == [
        (99, 10, True),
        (99.9, 1, False),
    ]


def test_a_run_without_any_answer_still_has_a_report() -> None:
    """Nothing is divided by zero."""
    outcome = Outcome(Tally(2.0, None), 0.0, unfinished=3, is_interrupted=True)
    report = summarize(outcome, is_open=True, verdict=VALID, clauses=parse("p99<1s,errors<1%,rate>0"))
    assert report.as_json()["latency_ms"] is None
    shown = render(report)
    assert "(interrupted)" in shown
    assert "Unfinished requests:  3" in shown
    assert "no request succeeded" in shown
    assert [judged.is_kept for judged in report.promise] == [False, False, False]


def test_the_exit_code_says_first_what_makes_the_figures_worthless() -> None:
    """Interrupted, then invalid, then the promise; failures count only where nothing was promised."""
    well, ill = [(10.0, Answer(None))], [(10.0, Answer(None)), (10.0, Answer("timeout"))]
    assert report_of(well).exit_code == EXIT_OK
    assert report_of(ill).exit_code == EXIT_FAILURES
    assert report_of(ill, slo="p99<1s").exit_code == EXIT_OK
    assert report_of(ill, slo="errors<1%").exit_code == EXIT_BROKEN
    invalid = summarize(
        Outcome(tally_of(ill), 1.0), is_open=True, verdict=Verdict(is_valid=False), clauses=parse("errors<1%")
    )
    assert invalid.exit_code == EXIT_INVALID
    cut = summarize(
        Outcome(tally_of(ill), 1.0, is_interrupted=True), is_open=True, verdict=Verdict(is_valid=False), clauses=()
    )
    assert cut.exit_code == EXIT_INTERRUPTED


def test_goodput_counts_successes_that_were_in_time() -> None:
    """Two of three are within the bound, in two seconds."""
    tally = tally_of([(10.0, Answer(None)), (20.0, Answer(None)), (21.0, Answer(None))], good_ms=20.0)
    report = summarize(Outcome(tally, 2.0), is_open=False, verdict=VALID, good_within_ms=20.0)
    assert (report.goodput_per_s, report.throughput_per_s) == (1.0, 1.5)
    assert "Goodput:              1.00 req/s within 20 ms" in render(report)


def test_an_answer_is_sorted_by_status_and_body() -> None:
    """A success is 2xx with JSON; everything else has a kind."""
    cases: list[tuple[int, bytes, Answer]] = [
        (200, b'{"worker":"w1","replica":"http://a"}', Answer(None, None, "w1", "http://a")),
        (200, b'{"job_id":"j","timings_ms":{"total":1}}', Answer(None, "j", timings_ms={"total": 1})),
        (200, b'{"worker":7,"id":8,"timings_ms":[]}', Answer(None, "8")),
        (202, b"[]", Answer(None)),
        (200, b"<html>", Answer("not json")),
        (200, b"", Answer("not json")),
        (503, b'{"error":{"code":"overloaded"}}', Answer("http 503 overloaded")),
        (502, b"Bad Gateway", Answer("http 502")),
        (500, b'{"error":"no"}', Answer("http 500")),
        (302, b"{}", Answer("http 302")),
        # Nothing that a terminal would obey comes through, and nothing of any length.
        (200, b'{"worker":"\\u001b[31mred","job_id":"\\u009b1"}', Answer(None, "?1", "?[31mred")),
        (500, b'{"error":{"code":"\\u0007bell"}}', Answer("http 500 ?bell")),
        (200, b'{"worker":"%b"}' % (b"w" * 500), Answer(None, None, "w" * 128)),
    ]
    for status, body, expected in cases:
        assert read_answer(status, body) == expected


def test_names_without_an_end_do_not_fill_the_report() -> None:
    """A target may name every answer anew; what is beyond fifty names is counted together."""
    report = report_of([(1.0, Answer(None, worker=f"w{number}")) for number in range(80)] * 2)
    assert len(report.workers) == 50
    assert report.workers["others"] == 62
    assert sum(report.workers.values()) == 160


def test_of_each_generator_the_last_word_says_what_is_in_flight() -> None:
    """One that speaks twice in a breath, at its end, is not counted twice; one that is late is not left out."""
    moments = [Moment(0.75, 50), Moment(1.0, 50), Moment(1.05, 7), Moment(0.8, 9, part=1)]
    assert [second.in_flight for second in over_time(moments)] == [7 + 9]


def test_the_run_over_time_is_in_seconds_and_never_in_too_many_parts() -> None:
    """Moments of two generators fall into the same second; a long run gets wider parts."""
    moments = [Moment(1.01, 3, 5, 1, [10.0, 30.0]), Moment(1.02, 4, 5, 0, [20.0], 1), Moment(1.6, 2, 1, 0, [5.0])]
    first, second = over_time(moments)
    assert (first.at_s, first.sent, first.successful, first.failed, first.in_flight) == (0, 10, 3, 1, 7)
    assert (first.p50_ms, first.max_ms) == (20.0, 30.0)
    assert (second.at_s, second.sent, second.in_flight) == (1, 1, 2 + 4)
    long = over_time([Moment(float(at_s), 0, 1) for at_s in range(1, 1001)], most=100)
    assert len(long) <= 101
    assert sum(part.sent for part in long) == 1000
