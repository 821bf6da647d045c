"""The report's arithmetic, apart from any clock or network."""

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loadtest.closed import read_answer
from loadtest.report import Sample, percentile, render, summarize

latencies = st.floats(0, 1e4)
samples = st.builds(
    Sample,
    latencies,
    st.none() | st.sampled_from(["timeout", "http 503 overloaded"]),
    st.none() | st.sampled_from(["w1", "w2"]),
    st.none() | st.sampled_from(["http://a", "http://b"]),
)


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


@given(st.lists(samples), st.floats(0.01, 1e4), st.integers(0, 50))
def test_the_parts_of_a_report_add_up(run: list[Sample], duration_s: float, unfinished: int) -> None:
    """Every sample is successful or failed, every failure has its kind, and the quantiles are in order."""
    report = summarize(run, duration_s, unfinished=unfinished)
    assert report.successful + report.failed == report.total == len(run)
    assert sum(report.errors.values()) == report.failed
    assert sum(report.workers.values()) <= report.successful
    assert sum(report.replicas.values()) <= report.successful
    assert math.isclose(report.throughput_per_s * duration_s, report.successful, abs_tol=1e-6)
    latency = report.latency_ms
    assert (latency is None) == (report.successful == 0)
    if latency is not None:
        in_order = (latency.min, latency.p50, latency.p95, latency.p99, latency.max)
        assert all(low <= high for low, high in pairwise(in_order))
        assert latency.min <= latency.average <= latency.max


@given(st.lists(samples))
def test_the_order_of_the_samples_does_not_matter(run: list[Sample]) -> None:
    """Samples of several clients may be put together as they come."""
    one, other = summarize(run, 1.0), summarize(run[::-1], 1.0)
    assert (one.total, one.latency_ms and one.latency_ms.p99) == (
        other.total,
        other.latency_ms and other.latency_ms.p99,
    )
    assert dict(one.errors) == dict(other.errors)


def test_failed_requests_have_no_part_in_the_latencies() -> None:
    """A server that refuses in a millisecond does not look fast."""
    report = summarize([Sample(0.5), Sample(0.001, "http 503")], 1.0)
    assert report.latency_ms is not None
    assert report.latency_ms.min == 500


def test_the_summary_keeps_the_shape_that_people_know() -> None:
    """Each of the familiar lines is there, with its unit."""
    run = [Sample(0.010, None, "w1", "http://a"), Sample(0.030, None, "w1", "http://b"), Sample(9, "timeout")]
    assert render(summarize(run, 2.0)) == (
        "Total duration:       2.00 s\n"
        "Total requests:       3\n"
        "Successful requests:  2 (66.7%)\n"
        "Failed requests:      1 (33.3%)\n"
        "\n"
        "Latency of the successful requests\n"
        "  Min:                10.00 ms\n"
        "  P50 (Median):       10.00 ms\n"
        "  P95:                30.00 ms\n"
        "  P99:                30.00 ms\n"
        "  Max:                30.00 ms\n"
        "  Average:            20.00 ms\n"
        "\n"
        "Throughput:           1.00 req/s\n"
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
    )


def test_a_run_without_any_answer_still_has_a_report() -> None:
    """Nothing is divided by zero."""
    report = summarize([], 0.0, unfinished=3, is_interrupted=True)
    assert report.as_json()["latency_ms"] is None
    shown = render(report)
    assert "(interrupted)" in shown
    assert "Unfinished requests:  3" in shown
    assert "no request succeeded" in shown


def test_an_answer_is_sorted_by_status_and_body() -> None:
    """A success is 200 with a JSON object; everything else has a kind."""
    cases: list[tuple[int, bytes, Sample]] = [
        (200, b'{"worker":"w1","replica":"http://a"}', Sample(1.0, None, "w1", "http://a")),
        (200, b'{"worker":7}', Sample(1.0)),
        (200, b"<html>", Sample(1.0, "not json")),
        (200, b"[]", Sample(1.0, "not json")),
        (503, b'{"error":{"code":"overloaded"}}', Sample(1.0, "http 503 overloaded")),
        (502, b"Bad Gateway", Sample(1.0, "http 502")),
        (500, b'{"error":"no"}', Sample(1.0, "http 500")),
        (202, b"{}", Sample(1.0, "http 202")),
    ]
    for status, body, expected in cases:
        assert read_answer(1.0, status, body) == expected
