"""The quarantine: empty hands for a suspect, and no more of the others' time than it must have."""

from __future__ import annotations

import asyncio

import pytest

from pipeline import quarantine as quarantine_module
from pipeline.quarantine import LEAST_REST_S, LONGEST_PATIENCE_S, Quarantine
from tests.conftest import wait_until

LEASE_S = 0.03


class Hands:
    """What somebody holds."""

    def __init__(self, *held: str) -> None:
        self.held = list(held)


def with_hands(*hands: Hands) -> Quarantine:
    quarantine = Quarantine(LEASE_S)
    quarantine.holders += hands
    return quarantine


async def test_all_hands_must_be_empty() -> None:
    """Those of every worker of the process; nobody may bring entries meanwhile."""
    one, other = Hands("a"), Hands("b")
    quarantine = Quarantine(60.0)
    quarantine.holders += [one, other]
    beginning = asyncio.create_task(quarantine.begin())
    await wait_until(lambda: quarantine.is_on)
    one.held.clear()
    assert not (await asyncio.wait([beginning], timeout=3 * quarantine_module.LOOK_S))[0]
    other.held.clear()
    assert await beginning
    assert quarantine.is_on


async def test_what_is_on_its_way_counts_as_held() -> None:
    """A read or a claim that has been sent may bring entries."""
    quarantine = with_hands(Hands())
    with quarantine.bringing(), quarantine.bringing():
        assert not await quarantine.begin()
    assert await quarantine.begin()


async def test_failed_read_brings_nothing() -> None:
    """Its error must not keep the hands full for ever."""
    quarantine = with_hands(Hands())
    with pytest.raises(ConnectionError), quarantine.bringing():
        raise ConnectionError
    assert await quarantine.begin()


async def test_patience_doubles_with_each_wait_in_vain() -> None:
    """Calls may be longer than a lease; after a suspect had its turn the first patience holds again."""
    hands = Hands("long")
    quarantine = with_hands(hands)
    for factor in (2, 4, 8):
        assert not await quarantine.begin()
        assert quarantine._patience_s == factor * LEASE_S
    hands.held.clear()
    assert await quarantine.begin()
    assert quarantine._patience_s == LEASE_S


async def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it was in vain."""
    monkeypatch.setattr(quarantine_module, "LONGEST_PATIENCE_S", 1.5 * LEASE_S)
    assert LONGEST_PATIENCE_S > LEASE_S
    quarantine = with_hands(Hands("long"))
    for _ in range(3):
        assert not await quarantine.begin()
    assert quarantine._patience_s == 1.5 * LEASE_S


@pytest.mark.parametrize("stopped_s", [0.0, 0.5, 7.0])
async def test_reading_goes_on_for_as_long_as_it_was_stopped(monkeypatch: pytest.MonkeyPatch, stopped_s: float) -> None:
    """Before the next suspect has its turn, and for a second at least."""
    now_us = 10**12
    monkeypatch.setattr(quarantine_module, "monotonic_us", lambda: now_us)
    quarantine = with_hands(Hands())
    assert quarantine.is_due()
    assert await quarantine.begin()
    assert not quarantine.is_due()
    now_us += int(stopped_s * 1e6)
    quarantine.end()
    now_us += int(max(stopped_s, LEAST_REST_S) * 1e6) - 1
    assert not quarantine.is_due()
    now_us += 1
    assert quarantine.is_due()


async def test_end_of_nothing_asks_for_no_rest() -> None:
    """A suspect that ends when the quarantine is over already."""
    quarantine = with_hands(Hands())
    quarantine.end()
    assert quarantine.is_due()


async def test_cancelled_wait_lets_reading_go_on() -> None:
    """The worker is stopped while it waits for empty hands."""
    quarantine = Quarantine(60.0)
    quarantine.holders.append(Hands("long"))
    beginning = asyncio.create_task(quarantine.begin())
    await wait_until(lambda: quarantine.is_on)
    beginning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beginning
    assert not quarantine.is_on
