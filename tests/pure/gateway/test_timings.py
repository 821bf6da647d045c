"""The timings of an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.query import whole_timings

SPANS = st.floats(0, 1e6)


@given(
    st.dictionaries(st.sampled_from(["encoder_wait", "encoder", "llm_wait", "llm"]), SPANS),
    SPANS,
    st.floats(-1e6, 1e12),
)
def test_timings_always_add_up_and_none_is_negative(
    stages_ms: dict[str, float], elapsed_ms: float, since_finished_ms: float
) -> None:
    """Whatever the clocks say."""
    spans = whole_timings(stages_ms, elapsed_ms=elapsed_ms, since_finished_ms=since_finished_ms)
    total = spans.pop("total")
    assert sum(spans.values()) == pytest.approx(total, abs=0.0006)
    assert min(spans.values()) >= 0
    assert {name: spans[name] for name in stages_ms} == pytest.approx(stages_ms, abs=0.0006)


def test_the_total_is_what_the_client_waited() -> None:
    """Stages as they say, the way back as the clocks say, the gateway what is left."""
    spans = whole_timings({"llm": 30.0}, elapsed_ms=40.0, since_finished_ms=2.0)
    assert spans == {"llm": 30.0, "gateway": 8.0, "return": 2.0, "total": 40.0}


def test_an_answer_repeated_later_keeps_the_jobs_own_total() -> None:
    """The job's spans are older than the request that hears of them."""
    spans = whole_timings({"llm": 30.0}, elapsed_ms=1.0, since_finished_ms=60_000.0)
    assert spans == {"llm": 30.0, "gateway": 0.0, "return": 0.0, "total": 30.0}
