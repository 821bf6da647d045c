"""Fencing: a worker that lost an entry writes no outcome for it (invariant 3)."""

from __future__ import annotations

from collections.abc import Iterable

from tests.faults.history import Json, Told


def check(requests: Iterable[Told], faults: Iterable[Json]) -> list[int]:
    """Return the requests whose outcome was written by a worker that had lost their entry (*stale*)."""
    lost_by: dict[str, set[str]] = {}
    for fault in faults:
        for job_id in fault.get("ids", ()):
            lost_by.setdefault(job_id, set()).add(fault["victim"])
    return [
        told.n
        for told in requests
        if any(outcome.get("worker") in lost_by.get(job_id, ()) for job_id in told.ids for outcome in told.outcomes)
    ]
