"""The arithmetic of the benchmarks: percentiles, spreads, CPU time, loads, queues on paper."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench import cpu, loads, query
from tests.bench.figures import Report, Window, quantile, ratios, spread
from tests.bench.hops import PAYLOAD_BYTES, payload
from tests.bench.queueing import Server, at_arrival, by_lot, by_turns, central_queue, fast_only, fewest
from tests.bench.tail import SIGMA, counted, service_times
from tests.conftest import PATIENCE_S

BURN = "import time\nwhile time.process_time() < {}: pass\nprint('burnt', flush=True)\ninput()\n"


def window(ended: int = 4, **cpu_us: float) -> Window:
    return Window(2.0, ended, {}, cpu_us, [4.0, 1.0, 3.0, 2.0])


# --- figures ------------------------------------------------------------------------------------


def test_percentiles_are_by_nearest_rank_in_any_order() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [quantile(values, share) for share in (10, 500, 990, 1000)] == [1, 50, 99, 100]
    assert math.isnan(quantile([], 500))


def test_cost_is_summed_over_the_named_processes_and_shared_by_the_calls() -> None:
    found = window(4, gateway=100.0, redis=300.0, replica=4000.0)
    assert found.cpu_per_call(["gateway", "redis"]) == 100
    assert found.cpu_per_call() == 1100
    assert found.rate == 2


def test_a_window_survives_the_way_between_processes() -> None:
    found = window(redis=1.5)
    assert Window.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_ratios_are_taken_within_each_round() -> None:
    """A round on a machine that is twice as slow does not widen the ratio."""
    assert ratios([10.0, 20.0, 10.0], [5.0, 10.0, 5.0]) == spread([2.0])


def test_a_report_is_readable_to_people_and_programs() -> None:
    report = Report("hops", {"rounds": 3}, notes=["a note"])
    report.row("cost", "penstock", CPU_us=spread([1.0, 3.0, 2.0]), errors="0")
    assert "2.00 [1.00 .. 3.00]" in report.as_text()
    body = json.loads(report.as_json())
    assert body["tables"]["cost"]["penstock"] == {"CPU us": {"min": 1.0, "median": 2.0, "max": 3.0}, "errors": "0"}


def test_the_payload_has_the_size_it_says() -> None:
    assert len(json.dumps(payload(), separators=(",", ":"))) == PAYLOAD_BYTES


def test_pieces_of_documents_are_as_many_as_asked_for() -> None:
    found = query.pieces(50)
    assert len(found) == 50
    assert len(set(found)) == 50


# --- CPU time -----------------------------------------------------------------------------------


def test_a_process_is_charged_what_it_burns() -> None:
    """The same as the ticks of /proc say, and as the process itself says."""
    burnt_s = 0.2
    with subprocess.Popen(
        [sys.executable, "-c", BURN.format(burnt_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = cpu.spent_us(process.pid)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks_us = (int(fields[11]) + int(fields[12])) * 1e6 / cpu.TICKS_PER_S
        assert first >= burnt_s * 1e6
        assert abs(first - ticks_us) <= 3e6 / cpu.TICKS_PER_S  # each of both counts is cut to whole ticks
        assert cpu.spent_us(process.pid) - first < 0.5 * burnt_s * 1e6  # waiting costs nothing
        process.communicate("\n")


def test_children_count_once_they_have_ended() -> None:
    """Redis rewrites its append-only file in one."""
    before = cpu.spent_us(os.getpid())
    subprocess.run([sys.executable, "-c", BURN.format(0.2)], input="\n", text=True, check=True, capture_output=True)
    assert cpu.spent_us(os.getpid()) - before >= 0.15e6


def test_a_process_that_is_gone_is_no_zero() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(ProcessLookupError):
        cpu.spent_us(process.pid)


# --- loads --------------------------------------------------------------------------------------


def test_an_even_load_is_even_and_independent_callers_are_not() -> None:
    assert loads.steady(10, 0.5) == [0, 0.1, 0.2, 0.3, 0.4]
    starts = loads.poisson(100, 100, Random(1))
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.01, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)


async def test_an_open_loop_leaves_the_warm_up_out_and_counts_from_the_plan() -> None:
    """The first two calls are not counted, and one of the other three fails."""

    async def call(number: int) -> None:
        if number == 3:
            raise RuntimeError("http 503")
        await asyncio.sleep(0)

    found = await loads.open_loop(call, [0.0, 0.01, 0.02, 0.03, 0.04], 0.015, {})
    assert (found.ended, found.errors) == (2, {"RuntimeError: http 503": 1})
    assert len(found.lags_ms) == 3
    assert found.latencies_ms[0] >= found.lags_ms[0]
    assert found.latencies_ms[1] >= found.lags_ms[2]


async def test_an_open_loop_does_not_wait_for_answers_before_it_sends() -> None:
    """A call that takes long holds up no other: here each waits until all have begun."""
    begun: list[int] = []
    all_have_begun = asyncio.Event()

    async def call(number: int) -> None:
        begun.append(number)
        if len(begun) == 10:
            all_have_begun.set()
        await all_have_begun.wait()

    async with asyncio.timeout(PATIENCE_S):
        found = await loads.open_loop(call, loads.steady(100, 0.1), 0.0, {})
    assert found.ended == 10


async def test_a_closed_loop_keeps_so_many_in_flight_and_counts_the_window_only() -> None:
    flying = most = ended = 0

    async def call(_number: int) -> None:
        nonlocal flying, most, ended
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.01)
        flying -= 1
        ended += 1

    found = await loads.closed(call, 7, 0.1, 0.1, {"self": os.getpid()})
    assert most == 7
    assert 0 < found.ended < ended
    assert found.cpu_us["self"] > 0


# --- queues on paper ----------------------------------------------------------------------------


def test_one_line_for_all_starts_the_first_at_the_first_free_slot() -> None:
    """Two slots, by hand: the third waits for the second, which ends first; the fourth for the third."""
    assert central_queue([0.0, 0.0, 1.0, 2.0], [5.0, 3.0, 1.0, 1.0], [Server(2)]) == [5.0, 3.0, 3.0, 3.0]


def test_one_line_for_all_takes_a_slow_slot_only_when_no_fast_one_is_free() -> None:
    servers = [Server(1, 10.0), Server(1)]
    assert central_queue([0.0, 0.0, 2.0], [1.0, 1.0, 1.0], servers) == [1.0, 10.0, 1.0]
    assert fast_only([0.0, 0.0, 2.0], [1.0, 1.0, 1.0], servers) == [1.0, 2.0, 1.0]


def test_lines_of_their_own_are_joined_at_arrival() -> None:
    """By hand: the third goes to the first replica by turns, and to the idle one by fewest."""
    arrivals, spans = [0.0, 0.0, 1.5], [4.0, 1.0, 1.0]
    servers = [Server(1), Server(1)]
    assert at_arrival(arrivals, spans, servers, by_turns(), Random(0)) == [4.0, 1.0, 3.5]
    assert at_arrival(arrivals, spans, servers, fewest, Random(0)) == [4.0, 1.0, 1.0]


def test_a_simulated_queue_waits_as_long_as_theory_says() -> None:
    """M/D/1: mean wait = load x service / (2 x (1 - load)); M/M/1: load x service / (1 - load)."""
    rng = Random(7)
    load, count = 0.8, 200_000
    arrivals = loads.poisson(load, count / load, rng)
    fixed = [1.0] * len(arrivals)
    drawn = [rng.expovariate(1.0) for _ in arrivals]
    for spans, expected in ((fixed, load / (2 * (1 - load))), (drawn, load / (1 - load))):
        times = central_queue(arrivals, spans, [Server(1)])
        waits = [time - span for time, span in zip(times, spans, strict=True)]
        assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.1)


@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(0.01, 5)), min_size=1, max_size=60),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_no_policy_waits_less_in_sum_than_one_line_for_all(
    jobs: list[tuple[float, float]], slots: int, seed: int
) -> None:
    """Equal replicas and equal service times: there the line for all is the best there is."""
    arrivals = [0.0]
    for gap, _ in jobs[1:]:
        arrivals.append(arrivals[-1] + gap)
    spans = [jobs[0][1]] * len(jobs)
    servers = [Server(slots), Server(slots)]
    ideal = sum(central_queue(arrivals, spans, servers))
    for choose in (fewest, by_lot, by_turns()):
        assert sum(at_arrival(arrivals, spans, servers, choose, Random(seed))) >= ideal - 1e-6


def test_service_times_have_the_mean_and_the_tail_they_say() -> None:
    spans = service_times(1, 200_000, 0.1)
    assert sum(spans) / len(spans) == pytest.approx(0.1, rel=0.02)
    p99 = math.exp(2.326 * SIGMA - SIGMA * SIGMA / 2)
    assert quantile(spans, 990) / 0.1 == pytest.approx(p99, rel=0.05)
    assert service_times(1, 10, 0.1) == spans[:10]


def test_the_warm_up_is_left_out_of_simulated_times_too() -> None:
    assert counted([5.0, 6.0, 7.0], [0.0, 1.0, 2.0], 1.0) == [6.0, 7.0]
