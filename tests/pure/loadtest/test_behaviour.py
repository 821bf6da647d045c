"""Behaviours: latencies as written and as drawn, and changes as tests send them."""

import math
from random import Random
from statistics import fmean, median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.behaviour import MAX_LATENCY_S, MAX_SIGMA, Behaviour, Latency, Mode, parse_latency
from loadtest.mock import MockOptions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", Latency(0.0)),
        ("0.05", Latency(0.05)),
        ("fixed:0.05", Latency(0.05)),
        (" lognormal:0.4,0.5 ", Latency(0.4, 0.5)),
    ],
)
def test_latency_is_read_in_each_of_its_forms(text: str, expected: Latency) -> None:
    """A bare number is a fixed latency."""
    assert parse_latency(text) == expected


@pytest.mark.parametrize(
    "text", ["", "fast", "fixed:", "fixed:1,2", "lognormal:1", "uniform:1,2", "0.05s", "lognormal:1,x"]
)
def test_latency_in_another_form_is_refused_with_the_forms_there_are(text: str) -> None:
    """The message says what to write."""
    with pytest.raises(ValueError, match="lognormal:MEDIAN,SIGMA"):
        parse_latency(text)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "lognormal:0,1", "lognormal:1,-1", "lognormal:1,4"])
def test_latency_out_of_range_is_refused(text: str) -> None:
    """Not a number is in no range."""
    with pytest.raises(ValueError, match="latency"):
        parse_latency(text)


@given(st.floats(0.001, MAX_LATENCY_S), st.floats(0, MAX_SIGMA))
def test_a_latency_reads_back_from_its_text(median_s: float, sigma: float) -> None:
    """What `GET /mock/behaviour` shows may be posted again."""
    latency = parse_latency(str(Latency(median_s, sigma)))
    assert math.isclose(latency.median_s, median_s, rel_tol=1e-5)
    assert math.isclose(latency.sigma, sigma, rel_tol=1e-5, abs_tol=1e-300)


def test_lognormal_latencies_have_the_median_and_mean_of_their_distribution() -> None:
    """A simulated load has the shape it was asked for."""
    rng = Random("shape")
    drawn = [Latency(0.4, 0.5).draw_s(rng) for _ in range(20_000)]
    assert median(drawn) == pytest.approx(0.4, rel=0.02)
    assert fmean(drawn) == pytest.approx(0.4 * math.exp(0.5**2 / 2), rel=0.02)


def test_latencies_repeat_with_their_seed() -> None:
    """Two runs with one seed meet the same waits."""
    one, same, other = ([Latency(1, 1).draw_s(rng) for _ in range(5)] for rng in (Random(7), Random(7), Random(8)))
    assert one == same != other


def test_a_change_touches_only_the_fields_it_names() -> None:
    """A test that slows a replica down leaves its failures alone."""
    before = Behaviour(Latency(0.1), fail_rate=0.5, status=503)
    after = before.changed({"latency": 2, "status": None, "mode": "hang"})
    assert after == Behaviour(Latency(2.0), fail_rate=0.5, mode=Mode.HANG)
    assert before.status == 503


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"latncy": 1}, "unknown field 'latncy'; known are fail_rate, latency"),
        ({"latency": None}, "latency cannot be None"),
        ({"latency": True}, "latency cannot be True"),
        ({"mode": "wild"}, "mode must be one of normal, garbage"),
        ({"slots": 1.5}, "slots cannot be 1.5"),
        ({"slots": -1}, "slots must be 0"),
        ({"fail_rate": 1.1}, "fail_rate is a share"),
        ({"fail_rate": "1"}, "fail_rate cannot be '1'"),
        ({"tokens_per_second": -1}, "tokens_per_second must be 0"),
        ({"status": 200}, "status must be an error's"),
        ({"status": "503"}, "status cannot be '503'"),
        ({"retry_after_s": -1}, "retry_after_s must be 0"),
    ],
)
def test_a_wrong_change_is_refused_by_its_field(patch: dict[str, object], message: str) -> None:
    """A misspelt behaviour never passes for the old one."""
    with pytest.raises(ValueError, match=message):
        Behaviour().changed(patch)


@given(
    st.builds(
        Behaviour,
        st.just(Latency(0.25, 0.5)),
        st.floats(0, 1e6),
        st.integers(0, 1000),
        st.floats(0, 1),
        st.none() | st.integers(400, 599),
        st.none() | st.floats(0, 1e6),
        st.sampled_from(Mode),
    )
)
def test_a_behaviour_reads_back_from_its_json(behaviour: Behaviour) -> None:
    """What is shown can be set."""
    assert Behaviour().changed(behaviour.as_json()) == behaviour


def test_options_out_of_range_are_refused_by_name() -> None:
    """A command line can print the message as it is."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"port": 70_000}, "port must lie in 0 to 65535"),
        ({"host": ""}, "host must be"),
        ({"latency": "slow"}, "latency must read"),
        ({"fail_rate": 2.0}, "fail_rate is a share"),
        ({"slots": -1}, "slots must be 0"),
        ({"tokens_per_second": math.inf}, "tokens_per_second must be 0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            MockOptions(**options)
