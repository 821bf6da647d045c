"""One outcome: every accepted request has exactly one, it never changes, and it answers what was asked."""

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
        lost: accepted, and nobody knows of them any more; or reported as lost; or their outcome vanished.
        unseen: accepted, still known, and without an outcome when the quiet phase was over; or a client still waited.
        duplicated: a second outcome, or a second job for one request.
        wrong: answered with what somebody else asked for, or completed without any answer.
        once: their outcome was not read a second time.
        by_status: first outcomes by their status.
        endings: requests by how they ended, where that was otherwise than completed (`failed/poison`); no losses.
    """

    accepted: int
    refused: int
    unknown: int
    lost: list[int]
    unseen: list[int]
    duplicated: list[int]
    wrong: list[int]
    once: list[int]
    by_status: Mapping[str, int]
    endings: Mapping[str, list[int]]


def check(requests: Iterable[Told], alive: frozenset[str]) -> Outcomes:
    """Judge every request; *alive* are the jobs that Redis still knew of at the end."""
    requests = list(requests)
    accepted = [told for told in requests if told.is_accepted]
    lost: list[int] = []
    unseen: list[int] = []
    once: list[int] = []
    endings: dict[str, list[int]] = {}
    for told in requests:
        if told.is_unseen:
            unseen.append(told.n)
        elif not told.is_accepted:
            continue
        elif not told.outcomes:
            (unseen if alive & set(told.ids) else lost).append(told.n)
        elif any(_is_loss(outcome) for outcome in told.outcomes):
            lost.append(told.n)
        else:
            if len(told.outcomes) < 2:
                once.append(told.n)
            if (word := ending(told.outcomes[0])) != "completed":
                endings.setdefault(word, []).append(told.n)
    return Outcomes(
        accepted=len(accepted),
        refused=sum(told.is_refused for told in requests),
        unknown=sum(told.is_doubtful for told in requests),
        lost=lost,
        unseen=unseen,
        duplicated=[told.n for told in accepted if len(told.ids) > 1 or _differ(told.outcomes)],
        wrong=[told.n for told in accepted if any(_is_wrong(told, outcome) for outcome in told.outcomes)],
        once=once,
        endings=endings,
        by_status=Counter(told.outcomes[0]["status"] for told in accepted if told.outcomes),
    )


def ending(outcome: Json) -> str:
    """Return how a request ended in a word: `completed`, or the status and its code (`failed/poison`)."""
    status = str(outcome["status"])
    return status if status == "completed" else f"{status}/{outcome.get('code') or status}"


def _is_loss(outcome: Json) -> bool:
    return outcome["status"] in {"lost", "vanished"} or outcome.get("code") in {"lost", "orphan"}


def _differ(outcomes: Sequence[Json]) -> bool:
    """Say whether two looks at one outcome saw different things; a look may see less, or nothing, but nothing else."""
    first, *others = [outcome for outcome in outcomes if outcome["status"] != "vanished"] or [{}]
    return any(later.get(name, value) != value for later in others for name, value in first.items())


def _is_wrong(told: Told, outcome: Json) -> bool:
    answer = outcome.get("answer")
    if told.kind != "edit" and outcome["status"] == "completed" and not answer:
        return True
    return answer is not None and not is_right(told.kind, told.n, told.subject, answer)
