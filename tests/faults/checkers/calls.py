"""The replicas' own records: which job asked what, how often, and how each call ended."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.history import Told, read

_NUMBER: Final = re.compile(r"Request (\d+)\.")
"""Every question ends so: the replicas know which request they work for, whatever the job is called."""
_REMEMBERING: Final = "Remembered so far:"
"""A chat's run calls twice: what to remember is asked with these words, and then for the reply."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What the replicas were asked.

    Attributes:
        made: all calls that have ended.
        repeated: calls made for a job although an earlier one was answered, or was broken off at a replica that nobody
            had harmed: work done twice, or thrown away and begun anew.
        crossed: calls in which one job asked another one's question.
        doubled: requests for which more than one job called.
        unbidden: requests that were refused, and called for all the same.
        answering: when the last call that answered a job began, by its id and the wall clock.
    """

    made: int
    repeated: int
    crossed: list[str]
    doubled: list[int]
    unbidden: list[int]
    answering: dict[str, float]


def check(requests: Iterable[Told], records: Iterable[Path], *, harmed: Container[str] = ()) -> Calls:
    """Read the replicas' files beside what the clients know.

    A call that its replica failed must be made again. One that was broken off is made again for two reasons: its
    worker died or was lost, which the faults account for, or the replica did not answer in time, or its connection
    broke. Whoever is not *harmed*, by its name (`replica-1`), answers in time and over a sound connection.
    """
    requests = list(requests)
    asked_by = {job_id: told for told in requests for job_id in told.ids}
    jobs: dict[int, set[str]] = {}
    # When each call of a job came, and whether any later one for the same thing repeats it.
    made: dict[tuple[str, bool], list[tuple[float, bool]]] = {}
    answering: dict[str, float] = {}
    crossed = []
    for path in records:
        for line in read(path):
            job_id, status = str(line["request_id"]), line["status"]
            is_enough = status == "completed" or (status == "aborted" and path.stem not in harmed)
            asked = str(line.get("messages", ""))
            made.setdefault((job_id, _REMEMBERING in asked), []).append((line["arrived_s"], is_enough))
            if status == "completed":
                answering[job_id] = max(line["began_s"], answering.get(job_id, 0.0))
            numbers = {int(number) for number in _NUMBER.findall(asked)}
            for number in numbers:
                jobs.setdefault(number, set()).add(job_id)
            told = asked_by.get(job_id)
            if told is not None and told.n not in numbers:
                crossed.append(job_id)
    return Calls(
        made=sum(map(len, made.values())),
        repeated=sum(is_enough for some in made.values() for _, is_enough in sorted(some)[:-1]),
        crossed=crossed,
        doubled=[number for number, ids in jobs.items() if len(ids) > 1],
        unbidden=[told.n for told in requests if told.is_refused and told.n in jobs],
        answering=answering,
    )
