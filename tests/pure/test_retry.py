"""When a failed job runs again: bounds of the back-off, and when it ends."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.retry import Again, GiveUp, backoff_s, decide_retry

attempts = st.integers(1, 10_000)
spans = st.floats(0.001, 3600)
seeds = st.integers(0, 2**32)


@given(attempts, spans, spans, seeds)
def test_backoff_lies_below_its_doubling_ceiling(attempt: int, base_s: float, more_s: float, seed: int) -> None:
    """Full jitter: anywhere from 0 to min(cap, base * 2 ** (attempt - 1))."""
    cap_s = base_s + more_s
    wait_s = backoff_s(attempt, base_s, cap_s, Random(seed))
    assert 0 <= wait_s <= cap_s
    if attempt < 60:
        assert wait_s <= base_s * 2 ** (attempt - 1)


def test_backoff_uses_the_whole_range() -> None:
    """Jitter around half of the ceiling, not a fixed wait."""
    rng = Random(1)
    drawn = [backoff_s(3, 1.0, 30.0, rng) for _ in range(2000)]
    assert min(drawn) < 0.1
    assert max(drawn) > 3.9
    assert 1.9 < sum(drawn) / len(drawn) < 2.1


@pytest.mark.parametrize("attempt", [0, -1])
def test_attempts_begin_with_one(attempt: int) -> None:
    """Zero is a caller's mistake."""
    with pytest.raises(ValueError):
        backoff_s(attempt, 1, 1, Random())


@given(attempts, st.none() | st.floats(0, 100), st.integers(0, 100), seeds)
def test_charged_failure_rises_or_ends(attempt: int, after_s: float | None, most: int, seed: int) -> None:
    """So many retries and no more; the wait asked for is obeyed."""
    found = decide_retry(
        attempt, charged=True, after_s=after_s, max_retries=most, base_s=0.5, cap_s=30, rng=Random(seed)
    )
    if attempt > most:
        assert found == GiveUp()
    else:
        assert isinstance(found, Again)
        assert found.attempt == attempt + 1
        assert found.delay_s >= (after_s or 0)
        assert found.delay_s <= (30 if after_s is None else after_s * 1.1 + 0.11)


@given(attempts, st.none() | st.floats(0, 100), seeds)
def test_uncharged_failure_keeps_the_attempt_and_never_ends(attempt: int, after_s: float | None, seed: int) -> None:
    """The deadline ends it; and it is never asked again in a hot loop."""
    found = decide_retry(attempt, charged=False, after_s=after_s, max_retries=0, base_s=0.5, cap_s=30, rng=Random(seed))
    assert isinstance(found, Again)
    assert found.attempt == attempt
    assert found.delay_s >= (0.25 if after_s is None else after_s)


SCHEDULE_S = (5.0, 300.0, 1_800.0)


def on_schedule(attempt: int, after_s: float | None = None, left_s: float = 1e9, seed: int = 1) -> Again | GiveUp:
    return decide_retry(
        attempt, charged=True, after_s=after_s, max_retries=0, base_s=1, cap_s=1, rng=Random(seed),
        schedule_s=SCHEDULE_S, left_s=left_s,
    )  # fmt: skip


@given(st.integers(1, 10), seeds)
def test_a_schedule_says_how_long_and_how_often(attempt: int, seed: int) -> None:
    """In place of the back-off: never sooner than it says, a tenth later at most."""
    found = on_schedule(attempt, seed=seed)
    if attempt > len(SCHEDULE_S):
        assert found == GiveUp()
    else:
        assert isinstance(found, Again)
        assert found.attempt == attempt + 1
        assert SCHEDULE_S[attempt - 1] <= found.delay_s <= SCHEDULE_S[attempt - 1] * 1.1


def test_the_wait_asked_for_makes_a_scheduled_one_longer_only() -> None:
    """Else a receiver that always asks for a second would have used up a schedule of days in seconds."""
    longer, shorter = on_schedule(1, after_s=60), on_schedule(2, after_s=60)
    assert isinstance(longer, Again)
    assert isinstance(shorter, Again)
    assert longer.delay_s == 60
    assert shorter.delay_s >= 300


def test_a_scheduled_wait_beyond_the_deadline_is_not_begun() -> None:
    """Nothing would come of it but silence until then."""
    assert on_schedule(3, left_s=1_700) == GiveUp()
    assert isinstance(on_schedule(3, left_s=2_000), Again)
