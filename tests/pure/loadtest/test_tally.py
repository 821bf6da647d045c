"""What generators count, put together."""

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.report import percentile
from loadtest.tally import Answer, Moment, Spans, Tally


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 1e5), min_size=1, max_size=200), st.integers(1, 1000))
def test_percentiles_are_right_within_one_in_a_thousand(values: list[float], per_mille: int) -> None:
    """Beside the exact figure by nearest rank, whatever the number of values."""
    spans = Spans()
    for value in values:
        spans.add(value)
    # A microsecond is the histogram's unit.
    assert spans.percentile_ms(per_mille / 10) == pytest.approx(
        percentile(sorted(values), per_mille), rel=0.001, abs=0.0011
    )


@settings(max_examples=6, deadline=None)  # a histogram is large, and each look at it slow
@given(st.lists(st.tuples(st.floats(0, 1e4), st.sampled_from([None, "timeout"])), max_size=40), st.integers(1, 4))
def test_tallies_that_are_put_together_are_as_one(run: list[tuple[float, str | None]], parts: int) -> None:
    """Over the wire, in any number of parts."""
    whole, together = Tally(2.0, 100.0), Tally(2.0, 100.0)
    shares = [Tally(2.0, 100.0) for _ in range(parts)]
    for number, (span_ms, error) in enumerate(run):
        for tally in (whole, shares[number % parts]):
            tally.planned += 1
            tally.left(span_ms / 1000)
            if error:
                tally.errors[error] += 1
            else:
                answer = Answer(None, f"job-{number}", "w", None, {"gateway": span_ms / 2, "total": span_ms / 2})
                tally.answered(answer, number=number, at_s=1.0, lag_ms=0.0, service_ms=span_ms)
    for share in shares:
        together.merge(orjson.loads(orjson.dumps(share.to_wire())))
    for name in ("planned", "late", "successful", "failed", "good", "errors", "workers"):
        assert getattr(together, name) == getattr(whole, name)
    assert [slow.number for slow in sorted(together.slowest)] == [slow.number for slow in sorted(whole.slowest)]
    assert [fall.samples for fall in together.waterfall.falls()] == [fall.samples for fall in whole.waterfall.falls()]
    for mine, its in ((together.latency, whole.latency), (together.lag, whole.lag)):
        assert mine.count == its.count
        if mine.count:
            assert mine.percentile_ms(50) == its.percentile_ms(50)
            assert (mine.least_ms, mine.greatest_ms) == (its.least_ms, its.greatest_ms)
            assert mine.spectrum() == its.spectrum()


def test_moments_travel_whole() -> None:
    """Latencies as four bytes each."""
    moment = Moment(1.5, 2, 3, 4, [0.5, 1024.25], 1)
    assert Moment.from_wire(orjson.loads(orjson.dumps(moment.to_wire()))) == moment
