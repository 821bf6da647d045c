"""The accounts balance: every submitted request was accepted, refused or unknown, and for a reason that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tests.faults.history import Told


@dataclass(frozen=True, slots=True)
class Accounts:
    """What the clients were told.

    Attributes:
        silent: requests of which the clients were told nothing at all.
        crashed: what clients could not make sense of, with the request's number.
        refusals: how often a client was refused, by code; also those that were accepted later.
    """

    silent: list[int]
    crashed: list[str]
    refusals: Mapping[str, int]


def check(requests: Iterable[Told]) -> Accounts:
    """Balance the accounts."""
    requests = list(requests)
    return Accounts(
        silent=[
            told.n for told in requests if not (told.is_accepted or told.is_doubtful or told.refusals or told.crashed)
        ],
        crashed=[f"{told.n}: {told.crashed}" for told in requests if told.crashed is not None],
        refusals=Counter(code for told in requests for code in told.refusals),
    )
