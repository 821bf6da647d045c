"""Shares of the priorities: of ten in a row, at least two normal and one low."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.priorities import CYCLE, Shares


@given(st.lists(st.integers(0, 25), max_size=30))
def test_any_ten_in_a_row_keep_the_shares(takes: list[int]) -> None:
    """Whatever the sizes of the takes, and wherever one begins to count."""
    shares = Shares()
    order: list[int] = []
    for size in takes:
        ahead = shares.ahead(size)
        assert shares.owed(size) == (ahead.count(1), ahead.count(2), ahead.count(3))
        order += ahead
        shares.took(size)
    for start in range(len(order) - 9):
        ten = order[start : start + 10]
        assert ten.count(2) >= 2
        assert ten.count(3) >= 1


def test_a_cycle_is_ten() -> None:
    """Seven high, two normal, one low."""
    assert [CYCLE.count(number) for number in (1, 2, 3)] == [7, 2, 1]


@given(st.integers(0, 30), st.integers(0, 30))
def test_only_what_was_taken_counts(asked: int, taken: int) -> None:
    """Asking moves nothing."""
    shares, other = Shares(), Shares()
    shares.owed(asked)
    shares.took(taken)
    other.took(taken)
    assert shares.ahead(10) == other.ahead(10)
