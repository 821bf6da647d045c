"""Our histogram says what prometheus_client's would."""

from __future__ import annotations

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from pipeline.histogram import Histogram

BOUNDS = (0.001, 0.5, 1, 30)
values = st.lists(st.tuples(st.sampled_from(["llm", 'e"ncoder']), st.floats(0, 100) | st.sampled_from(BOUNDS)))


@given(values)
def test_exposition_is_that_of_the_library(observed: list[tuple[str, float]]) -> None:
    """Buckets, count and sum, label by label; a value on a bound lies below it."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("spans", "Spans", "stage", BOUNDS, registry=ours)
    model = prometheus_client.Histogram("spans", "Spans", ["stage"], buckets=BOUNDS, registry=theirs)
    for stage, value in observed:
        histogram.labels(stage).observe(value)
        model.labels(stage).observe(value)
    expected = [line for line in generate_latest(theirs).splitlines() if b"_created" not in line]
    assert generate_latest(ours).splitlines() == expected


def test_name_is_taken_once() -> None:
    """A second metric of the same name would be counted by nobody."""
    registry = CollectorRegistry()
    Histogram("spans", "Spans", "stage", BOUNDS, registry=registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Histogram("spans", "Spans", "stage", BOUNDS, registry=registry)
