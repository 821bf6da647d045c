"""What the load tester decides: arrivals, promises, verdicts, limits, the search. No clock, no network."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import Plan, instants
from loadtest.limits import decide_problem
from loadtest.manifest import command
from loadtest.saturate import CLOSE, Found, Trial, conclusion, decide_next, read_bounds
from loadtest.slo import Clause, Judged, good_within_ms, judge, parse, unsure
from loadtest.target import Address, read_headers, read_template, requests_of
from loadtest.verdict import decide_verdict
from loadtest.waterfall import Waterfall

# --- Arrivals ------------------------------------------------------------


def test_constant_arrivals_are_evenly_spaced() -> None:
    """The first at once, none at the end."""
    assert [at_s for _, at_s in instants(Plan(4, 1.0))] == [0, 0.25, 0.5, 0.75]


def test_poisson_arrivals_have_the_gaps_of_independent_callers() -> None:
    """Mean and deviation of the gaps are equal, and of ten thousand arrivals about as many come as were asked for."""
    times = [at_s for _, at_s in instants(Plan(100, 100.0, "poisson", seed=3))]
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert len(times) == pytest.approx(10_000, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.05)


def test_a_seed_repeats_its_arrivals() -> None:
    """Another seed draws others."""
    plans = [list(instants(Plan(50, 2.0, "poisson", seed=seed))) for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_a_ramp_goes_evenly_from_rate_to_rate() -> None:
    """From 0 to 100 per second in 10 s: a quarter of the 500 arrivals come in the first half."""
    times = [at_s for _, at_s in instants(Plan(100, 10.0, ramp_from=0.0))]
    assert len(times) == 500
    assert sum(at_s < 5 for at_s in times) == 125
    down = [at_s for _, at_s in instants(Plan(0.001, 10.0, ramp_from=100.0))]
    assert sum(at_s < 5 for at_s in down) == pytest.approx(375, abs=1)


@given(
    st.floats(0.5, 200),
    st.floats(0.1, 3),
    st.sampled_from(["constant", "poisson"]),
    st.none() | st.floats(0, 200),
    st.integers(1, 5),
    st.none() | st.integers(1, 50),
)
def test_the_parts_of_a_plan_are_the_whole(
    rate: float, duration_s: float, pace: str, ramp_from: float | None, parts: int, requests: int | None
) -> None:
    """However many processes keep it: each arrival once, in order, within its time."""
    plan = Plan(rate, duration_s, pace, ramp_from, requests, seed=5)  # type: ignore[arg-type]  # it is one of the two
    whole = list(instants(plan))
    shares = [list(instants(plan, part, parts)) for part in range(parts)]
    assert sorted(arrival for share in shares for arrival in share) == whole
    assert [number for number, _ in whole] == list(range(len(whole)))
    assert all(before <= after for (_, before), (_, after) in pairwise(whole))
    assert all(0 <= at_s < duration_s for _, at_s in whole)
    assert requests is None or len(whole) <= requests


# --- Promises ------------------------------------------------------------


def test_a_promise_is_read() -> None:
    """Units become milliseconds and shares, spaces are nothing."""
    assert parse("p99 < 0.5s, errors<25%,p99.9<=500us,rate>=100") == (
        Clause("p", 99.0, "<", 500.0, "p99<0.5s"),
        Clause("errors", 0.0, "<", 0.25, "errors<25%"),
        Clause("p", 99.9, "<=", 0.5, "p99.9<=500us"),
        Clause("rate", 0.0, ">=", 100.0, "rate>=100"),
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "'' is no clause"),
        ("p99", "'p99' is no clause"),
        ("p99<500ms,", "'' is no clause"),
        ("p99=500ms", "is no clause"),
        ("p99<500", "needs a unit"),
        ("p99<5%", "needs a unit"),
        ("p0<5ms", "a percentile lies between"),
        ("p100<5ms", "a percentile lies between"),
        ("p9.9.9<5ms", "a percentile lies between"),
        ("p<5ms", "a percentile lies between"),
        ("errors<5ms", "is a share"),
        ("errors<5", "write errors<5% for per cent"),
        ("max9<5ms", "not measured"),
        ("speed>5", "not measured"),
        ("rate>5%", "takes no unit"),
    ],
)
def test_a_wrong_promise_is_refused_with_an_example(text: str, part: str) -> None:
    """The message names the clause and shows one that is right."""
    with pytest.raises(ValueError, match=r"write for example p99<500ms") as refused:
        parse(text)
    assert part in str(refused.value)


def test_what_was_found_is_told_in_the_unit_of_its_clause() -> None:
    """Per cent, milliseconds, or so many a second."""
    found = {"errors<0.1%": 0.0005, "p99<2s": 739.839, "goodput>90": 99.5}
    judged = judge(parse(",".join(found)), lambda clause: found[clause.text])
    assert [one.found_words for one in judged] == ["0.05%", "739.839 ms", "99.5 per second"]
    assert Judged("max<1s", None, is_kept=False).found_words == "nothing to look at"


def test_a_promise_that_rests_on_chance_is_told() -> None:
    """Of so few latencies none is beyond the percentile, and one more or less would decide."""
    clauses = parse("p99<5ms,p50<5ms,max<5ms")
    (warning,) = unsure(clauses, 999)
    assert warning.startswith("p99<5ms rests on chance: of 999 latencies 9 may be longer")
    assert unsure(clauses, 1000) == ()


def test_a_clause_is_judged_by_its_sign() -> None:
    """Equal is within <=, not within <; what was not found is not kept."""
    found = {"p50<1ms": 1.0, "p50<=1ms": 1.0, "rate>1": 1.0, "rate>=1": 1.0, "max<1s": None}
    judged = judge(parse(",".join(found)), lambda clause: found[clause.text])
    assert [clause.is_kept for clause in judged] == [False, True, False, True, False]


def test_the_widest_upper_bound_says_which_requests_are_good() -> None:
    """Lower bounds and other metrics say nothing of it."""
    assert good_within_ms(parse("p50<100ms,p99<0.5s,min>1s,errors<1%")) == 500
    assert good_within_ms(parse("errors<1%,min<1s")) is None


# --- Verdict and limits ------------------------------------------------------------


@pytest.mark.parametrize(
    ("lag_p99_ms", "late", "is_valid"), [(None, 0, True), (2.0, 10, True), (2.1, 10, False), (1.0, 11, False)]
)
def test_a_run_is_invalid_when_it_sent_late(lag_p99_ms: float | None, late: int, is_valid: bool) -> None:
    """By the P99 of the lag, and by the share of late arrivals, those that never left included."""
    verdict = decide_verdict(lag_p99_ms=lag_p99_ms, late=late, planned=1000, limit_ms=2.0, busiest=0.2, processes=1)
    assert verdict.is_valid == is_valid
    assert bool(verdict.reasons) != is_valid


def test_a_busy_generator_is_a_warning() -> None:
    """A closed loop has no lag to tell of, but its generator's CPU time has."""
    verdict = decide_verdict(lag_p99_ms=None, late=0, planned=0, limit_ms=2.0, busiest=0.97, processes=2)
    assert verdict.is_valid
    assert "--processes 3" in verdict.warnings[0]


def test_what_the_machine_does_not_allow_is_said_with_a_remedy() -> None:
    """Open files of one process, and ports of all."""
    assert decide_problem(100, 164, 200, 28_000) is None
    assert decide_problem(100, 164, None, 28_000) is None
    files, ports = decide_problem(200, 264, 200, 28_000), decide_problem(30_000, 1, None, 28_000)
    assert files is not None
    assert "ulimit" in files
    assert ports is not None
    assert "ip_local_port_range" in ports


# --- Waterfall ------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e4), st.floats(0, 1)), min_size=1, max_size=50))
def test_a_waterfall_adds_up_to_latencies_within_one_per_cent(run: list[tuple[float, float, float]]) -> None:
    """The bucket of a percentile holds the request of that rank, and its mean is not further off than it is wide."""
    fall = Waterfall()
    for lag_ms, service_ms, share in run:
        fall.add(lag_ms, service_ms, {"llm": service_ms * share, "total": service_ms * share})
    whole = sorted(max(0.001, lag_ms + service_ms) for lag_ms, service_ms, _ in run)
    for found in fall.falls():
        exact = whole[math.ceil(round(found.percent * len(whole) / 100, 6)) - 1]
        assert math.fsum(found.spans_ms.values()) == pytest.approx(found.whole_ms)
        assert found.whole_ms == pytest.approx(exact, rel=0.0101, abs=0.001)


def test_spans_that_cannot_be_right_have_no_place_in_a_waterfall() -> None:
    """A repeated answer's spans are another request's; texts and negative spans are nobody's."""
    fall = Waterfall()
    for spans in ({"llm": 20.0}, {"llm": "long"}, {"llm": -1.0}, {"total": 5.0}, {}, {"llm": True}):
        fall.add(0.0, 10.0, spans)
    fall.add(0.0, 10.0, {"llm": 1e308, "encoder": 1e308})  # no sum of floats
    fall.add(0.0, 10.0, {"\x1b[31m": 1.0})
    fall.add(0.0, 10.0, {f"span {number}": 0.01 for number in range(100)})
    assert fall.falls() == ()


# --- The search ------------------------------------------------------------


def searched(low: float, high: float, holds: float, most: int = 60) -> tuple[Found, list[Trial]]:
    trials: list[Trial] = []
    while not isinstance(step := decide_next(low, high, trials), Found):
        assert low <= step <= high
        trials.append(Trial(step, "kept" if step <= holds else "broken"))
        assert len(trials) <= most
    return step, trials


@given(st.floats(1, 100), st.floats(1.1, 1000), st.floats(0, 1.2))
def test_the_search_ends_at_the_highest_rate_that_holds(low: float, times: float, share: float) -> None:
    """Within five per cent, confirmed three times, with what lies above."""
    high = low * times
    holds = low + (high - low) * share
    found, trials = searched(low, high, holds)
    assert found.rate is not None
    assert found.rate <= holds
    assert sum(trial.rate == found.rate for trial in trials) == 4
    if holds >= high:
        assert (found.rate, found.knee) == (high, None)
    else:
        assert found.knee is not None
        assert holds < found.knee.rate <= found.rate * CLOSE


def test_a_promise_that_never_holds_is_told() -> None:
    """One trial is enough."""
    found, trials = searched(10, 100, 5)
    assert (found.rate, len(trials)) == (None, 1)
    assert "No rate was found" in conclusion(found)


def test_a_rate_that_fails_its_confirmation_is_given_up() -> None:
    """The search goes on below it."""
    trials = [Trial(10, "kept"), Trial(12, "broken"), Trial(11, "kept"), Trial(11.5, "kept"), Trial(11.5, "broken")]
    assert decide_next(10, 12, trials) == 11
    trials += [Trial(11, "broken", None, ("p99<1s",))]
    step = decide_next(10, 12, trials)
    assert step == 10.5
    assert decide_next(10, 12, [*trials, Trial(10.5, "broken"), *[Trial(10, "kept")] * 3]) == Found(
        10, Trial(10.5, "broken")
    )


def test_the_load_testers_own_limit_is_told_apart() -> None:
    """The target may be able to do more."""
    assert "load tester itself" in conclusion(Found(10, Trial(11, "invalid", None, ("too late",))))


@pytest.mark.parametrize("text", ["", "10", "10:5", "0:5", "a:b", "1:inf"])
def test_wrong_bounds_are_refused(text: str) -> None:
    """With the form that is right."""
    with pytest.raises(ValueError, match="saturate"):
        read_bounds(text)


# --- What is sent ------------------------------------------------------------


def test_a_request_is_built_from_its_template() -> None:
    """The question goes into strings, wherever they are, and is escaped as JSON."""
    address = Address.of("http://host:81/base/")
    template = read_template('{"messages": [{"content": "Say: {{question}}"}], "n": 1}')
    (request,) = requests_of(address, "/v1/chat", template, ['a "b"'], {"x-a": "b"})
    head, _, body = request.partition(b"\r\n\r\n")
    assert body == rb'{"messages":[{"content":"Say: a \"b\""}],"n":1}'
    assert head.splitlines() == [
        b"POST /base/v1/chat HTTP/1.1",
        b"host: host:81",
        b"content-type: application/json",
        b"accept: application/json",
        b"x-a: b",
        b"content-length: %d" % len(body),
    ]


def test_headers_are_read_and_may_replace_ours() -> None:
    """Names in lower case; the key becomes a bearer token."""
    assert read_headers(["Accept: */*"], "k") == {"authorization": "Bearer k", "accept": "*/*"}


@pytest.mark.parametrize("line", ["nothing", "a b: c", "a: b\r\nc: d", "Host: x", "content-length: 3", ": x"])
def test_a_wrong_header_is_refused(line: str) -> None:
    """One that would break the request, or that is ours to write."""
    with pytest.raises(ValueError, match="header"):
        read_headers([line], None)


def test_a_command_is_shown_without_its_secrets() -> None:
    """However they were given."""
    words = [
        "penstock",
        "--api-key",
        "s3",
        "--api-key=s3",
        "-H",
        "authorization: s3",
        "-Hx: s3",
        "-qH",
        "x: s3",
        "-qHx: s3",
        "--header=x: s3",
        "--path",
        "/q?key=s3&page=s3",
        "--path=/q?key=s3",
        "-n",
        "1",
    ]
    shown = command([*words, "\udcff.txt"])
    assert "s3" not in shown
    assert "page=..." in shown
    shown.encode()  # also where the name of a file is no UTF-8
    assert command(words).endswith("-n 1")
