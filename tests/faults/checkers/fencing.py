"""Fencing: a worker that has lost an entry to another one writes no outcome for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tests.faults.history import Json, Told


def check(requests: Iterable[Told], faults: Iterable[Json], answering: Mapping[str, float]) -> list[int]:
    """Return the requests whose outcome was written by a worker that had lost their entry (*stale*).

    A job may come back to a worker that lost it, when it is tried again: then a call that began after the loss has
    answered it.

    Args:
        faults: those with `ids` tell which jobs their victim had lost at `looked_s`, by the wall clock.
        answering: when the last call that answered a job began, by the wall clock.
    """
    lost_at_s: dict[tuple[str, str], float] = {}
    for fault in faults:
        for job_id in fault.get("ids", ()):
            lost_at_s[job_id, fault["victim"]] = fault["looked_s"]

    def is_stale(job_id: str, worker: str | None) -> bool:
        lost_s = lost_at_s.get((job_id, worker or ""))
        return lost_s is not None and answering.get(job_id, 0.0) < lost_s

    return [
        told.n
        for told in requests
        if any(is_stale(job_id, outcome.get("worker")) for job_id in told.ids for outcome in told.outcomes)
    ]
