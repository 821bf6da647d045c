"""Order: of a document's versions the one that was accepted last stands in the index, whatever overtook it.

An editor sends versions of one document, each after the one before was accepted. Whoever asks after a version was done
must be told of that version, or of a later one.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.faults.history import Told
from tests.faults.load import page_in


def told_of_a_page(requests: Iterable[Told]) -> int:
    """Return how many asked after a version was done and were told of some: without any, the check below is empty."""
    return sum(
        int(told.subject) > 0 and any(page_in(outcome.get("answer") or "") > 0 for outcome in told.outcomes)
        for told in requests
        if told.kind == "consult"
    )


def check(requests: Iterable[Told]) -> list[int]:
    """Return the requests that were told of an older version than one that was done before they were sent."""
    return [
        told.n
        for told in requests
        if told.kind == "consult"
        and any(page_in(outcome["answer"]) < int(told.subject) for outcome in told.outcomes if outcome.get("answer"))
    ]
