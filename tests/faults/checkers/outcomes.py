"""One outcome: every accepted request has exactly one, the right one, and it never changes (invariants 1, 2 and 12)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tests.faults.history import Json, Told
from tests.faults.load import is_right


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of the requests.

    Attributes:
        lost: accepted, and nobody knows of them any more; or reported as lost.
        unseen: accepted, still known, and without an outcome when the quiet phase was over.
        duplicated: a second outcome, or a second job for one request.
        wrong: answered with what somebody else asked for.
        by_status: first outcomes by their status.
    """

    accepted: int
    refused: int
    unknown: int
    lost: list[int]
    unseen: list[int]
    duplicated: list[int]
    wrong: list[int]
    by_status: Mapping[str, int]


def check(requests: Iterable[Told], alive: frozenset[str]) -> Outcomes:
    """Judge every request; *alive* are the jobs that Redis still knew of at the end."""
    requests = list(requests)
    accepted = [told for told in requests if told.is_accepted]
    lost: list[int] = []
    unseen: list[int] = []
    for told in accepted:
        if told.outcomes and not _is_loss(told.outcomes[0]):
            continue
        (unseen if not told.outcomes and alive & set(told.ids) else lost).append(told.n)
    return Outcomes(
        accepted=len(accepted),
        refused=sum(told.refused is not None and not told.is_accepted for told in requests),
        unknown=sum(told.is_unknown and not told.is_accepted for told in requests),
        lost=lost,
        unseen=unseen,
        duplicated=[told.n for told in accepted if len(told.ids) > 1 or _differ(told.outcomes)],
        wrong=[told.n for told in accepted if any(_is_wrong(told, outcome) for outcome in told.outcomes)],
        by_status=Counter(told.outcomes[0]["status"] for told in accepted if told.outcomes),
    )


def _is_loss(outcome: Json) -> bool:
    return outcome["status"] == "lost" or outcome.get("code") == "lost"


def _differ(outcomes: Sequence[Json]) -> bool:
    """Say whether two looks at one outcome saw different things; a look may see less, but nothing else."""
    first = outcomes[0] if outcomes else {}
    return any(later.get(name, value) != value for later in outcomes[1:] for name, value in first.items())


def _is_wrong(told: Told, outcome: Json) -> bool:
    answer = outcome.get("answer")
    return answer is not None and not is_right(told.kind, told.n, told.subject, answer)
