"""Redis' time as seen from a process: never further off than half a round trip."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import clock as clock_module
from pipeline.clock import Clock

HOUR_US = 3_600_000_000


class Machine:
    """A machine's monotonic clock and a Redis whose clock is *ahead_us* ahead of it; both moved by the test."""

    def __init__(self, ahead_us: int) -> None:
        self.now_us = 1_000_000_000
        self.ahead_us = ahead_us

    def monotonic_us(self) -> int:
        return self.now_us

    def redis_us(self) -> int:
        return self.now_us + self.ahead_us

    def exchange(self, clock: Clock, there_us: int, back_us: int) -> None:
        """Ask Redis for its time; the way there and back take so long."""
        sent_us = self.now_us
        self.now_us += there_us
        redis_us = self.redis_us()
        self.now_us += back_us
        clock.observe(redis_us, sent_us)

    def error_us(self, clock: Clock) -> int:
        return abs(clock.now_us() - self.redis_us())


delays = st.integers(0, 200_000)


@given(
    st.integers(-HOUR_US, 10**15),
    st.lists(st.tuples(delays, delays, st.integers(0, 5_000_000)), min_size=1, max_size=20),
)
def test_error_is_at_most_half_the_sharpest_round_trip(ahead_us: int, trips: list[tuple[int, int, int]]) -> None:
    """Of the last 30 s: a machine whose own clock is an hour off sees Redis' time all the same."""
    machine = Machine(ahead_us)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock_module, "monotonic_us", machine.monotonic_us)
        clock = Clock()
        recent: list[tuple[int, int]] = []
        for there_us, back_us, pause_us in trips:
            machine.exchange(clock, there_us, back_us)
            recent.append((machine.now_us, there_us + back_us))
            worst = max(trip for _, trip in recent)
            assert machine.error_us(clock) <= worst / 2 + 1
            machine.now_us += pause_us
        assert clock.now_ms() == clock.now_us() // 1000


@given(delays, delays)
def test_sharper_observation_replaces_a_blunt_one(there_us: int, back_us: int) -> None:
    """And a blunt one does not replace a sharp one."""
    machine = Machine(10**15)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock_module, "monotonic_us", machine.monotonic_us)
        clock = Clock()
        machine.exchange(clock, 100_000, 150_000)
        machine.exchange(clock, 10, 10)
        assert machine.error_us(clock) <= 11
        machine.exchange(clock, there_us, back_us)
        assert machine.error_us(clock) <= 21


@given(st.integers(1_000_000, HOUR_US), st.booleans())
def test_clock_follows_when_redis_clock_is_set(jump_us: int, forward: bool) -> None:
    """At the first reply that contradicts what was believed."""
    machine = Machine(10**15)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock_module, "monotonic_us", machine.monotonic_us)
        clock = Clock()
        machine.exchange(clock, 50, 50)
        machine.ahead_us += jump_us if forward else -jump_us
        machine.exchange(clock, 5_000, 5_000)
        assert machine.error_us(clock) <= 5_001


def test_old_measurement_gives_way_to_a_blunt_new_one() -> None:
    """Crystals drift."""
    machine = Machine(10**15)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock_module, "monotonic_us", machine.monotonic_us)
        clock = Clock()
        machine.exchange(clock, 5, 5)
        machine.now_us += 31_000_000
        machine.ahead_us += 2_000
        machine.exchange(clock, 3_000, 3_000)
        assert machine.error_us(clock) <= 3_001
        machine.exchange(clock, 100, 100)
        assert machine.error_us(clock) <= 101
