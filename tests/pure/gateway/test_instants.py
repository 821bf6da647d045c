"""Instants as clients write them: each spelling of RFC 3339 is the same one, and what is none is told how to be one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.asked import EXAMPLE, Asked, instant_ms
from gateway.errors import Problem

EIGHT_MS = 1_796_112_000_000
"""2026-12-01T08:00:00Z."""


@pytest.mark.parametrize(
    ("text", "after_ms"),
    [
        ("2026-12-01T08:00:00Z", 0),
        ("2026-12-01t08:00:00z", 0),
        ("2026-12-01 08:00:00Z", 0),
        ("2026-12-01 08:00:00+00:00", 0),
        ("2026-12-01T08:00:00-00:00", 0),
        ("2026-12-01T09:30:00+01:30", 0),
        ("2026-11-30T23:00:00-09:00", 0),
        ("2026-12-01T08:00Z", 0),
        ("2026-12-01T10:00:00+0200", 0),
        ("2026-12-01T10:00:00+02", 0),
        ("2026-12-01T08:00:00.5Z", 500),
        ("2026-12-01T08:00:00,5Z", 500),
        ("2026-12-01T08:00:00.0009Z", 0),
        ("2026-12-01T08:00:00.123456789Z", 123),
        ("2026-12-01T08:00:00." + "9" * 50 + "Z", 999),
        ("2026-12-01T23:59:60Z", 16 * 3_600_000),
        ("2026-12-02T00:59:60.25+01:00", 16 * 3_600_000 + 250),
    ],
)
def test_every_spelling_of_an_instant_is_taken(text: str, after_ms: int) -> None:
    """A second 60 is the first one of the next day."""
    assert instant_ms(text, "at") == EIGHT_MS + after_ms


@pytest.mark.parametrize(
    "text", ["2026-12-01T08:00:00", "2026-12-01 08:00:00", "2026-12-01T08:00", "2026-12-01T08:00:00.5"]
)
def test_an_instant_without_an_offset_is_told_to_name_one(text: str) -> None:
    """Nobody guesses whose eight o'clock it is."""
    with pytest.raises(Problem, match=r"Z for UTC, or with one like \+01:00") as refused:
        instant_ms(text, "at")
    assert EXAMPLE in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "now", "tomorrow", "2026-12-01", "1796112000", "2026-12-01T24:00:00Z", "2026-12-01T08:60:00Z",
        "2026-12-01T08:00:61Z", "2026-12-01T08:00:60Z", "2026-12-01T23:59:60+01:00", "2026-02-30T08:00:00Z",
        "2026-13-01T08:00:00Z", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:00-01:00",
        "2026-12-01T08:00:00+24:00", "2026-12-01T08:00:00.Z", "2026-12-01T08:00:00 Z", "2026-12-01T08:00:00Z\n",
        "2026-12-01T8:00:00Z", "26-12-01T08:00:00Z", "2026-W49-2T08:00:00Z", "2026-12-01T08:00:00UTC",
        "٢٠٢٦-12-01T08:00:00Z", "2026-12-01T08.5Z",
    ],
)  # fmt: skip
def test_what_is_no_instant_is_told_how_one_looks(text: str) -> None:
    """422 with an example."""
    with pytest.raises(Problem) as refused:
        instant_ms(text, "at")
    assert refused.value.status == 422
    assert "at: " in str(refused.value)


@given(
    st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31)),
    st.integers(-23 * 60 - 59, 23 * 60 + 59),
    st.sampled_from("Tt "),
    st.integers(0, 6),
    st.booleans(),
)
def test_what_was_written_comes_back(moment: datetime, offset_min: int, between: str, digits: int, z: bool) -> None:
    """To the millisecond, however many digits a fraction has."""
    zone = UTC if z else timezone(timedelta(minutes=offset_min))
    at = moment.replace(tzinfo=zone)
    sign, minutes = "+-"[offset_min < 0], abs(offset_min)
    offset = "z" if z else f"{sign}{minutes // 60:02}:{minutes % 60:02}"
    fraction = f".{at.microsecond:06}"[: digits + 1] if digits else ""
    text = f"{at:%Y}".rjust(4, "0") + f"-{at:%m-%d}{between}{at:%H:%M:%S}{fraction}{offset}"
    kept_us = int((fraction[1:] + "000000")[:6])
    wanted = (at.replace(microsecond=kept_us) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert instant_ms(text, "at") == wanted
    for query in (text, quote(text)):  # a plus that nobody escaped is a blank
        asked = Asked(cast("Any", SimpleNamespace(query_string=f"since={query}")), {"since"})
        assert asked.instant_ms("since") == wanted


def test_a_blank_is_no_offset_where_none_was_meant() -> None:
    """`2026-12-01 08:00` lacks one."""
    asked = Asked(cast("Any", SimpleNamespace(query_string="since=2026-12-01 08:00")), {"since"})
    with pytest.raises(Problem, match="names its offset"):
        asked.instant_ms("since")
