"""The replicas' own records: which job asked what, how often, and how each call ended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.history import Told, read

_NUMBER: Final = re.compile(r"Request (\d+)\.")
"""Every question ends so: the replicas know which request they work for, whatever the job is called."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What the replicas were asked.

    Attributes:
        made: all calls; completed, aborted: those that ended so.
        repeated: calls answered beyond the first for the same job: work done twice.
        strangers: calls for jobs that no client was told of (accepted without its knowledge, or sent again).
        crossed: calls in which one job asked another one's question.
        doubled: requests for which more than one job called.
        unbidden: requests that were refused, and called for all the same.
        answering: when the last call that answered a job began, by its id and the wall clock.
    """

    made: int
    completed: int
    aborted: int
    repeated: int
    strangers: int
    crossed: list[str]
    doubled: list[int]
    unbidden: list[int]
    answering: dict[str, float]


def check(requests: Iterable[Told], records: Iterable[Path]) -> Calls:
    """Read the replicas' files beside what the clients know."""
    requests = list(requests)
    asked_by = {job_id: told for told in requests for job_id in told.ids}
    jobs: dict[int, set[str]] = {}
    ended: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    answering: dict[str, float] = {}
    strangers, crossed = 0, []
    for path in records:
        for line in read(path):
            job_id, status = str(line["request_id"]), line["status"]
            ended[status] += 1
            if status == "completed":
                answered[job_id] += 1
                answering[job_id] = max(line["began_s"], answering.get(job_id, 0.0))
            numbers = {int(number) for number in _NUMBER.findall(str(line.get("messages", "")))}
            for number in numbers:
                jobs.setdefault(number, set()).add(job_id)
            told = asked_by.get(job_id)
            if told is None:
                strangers += 1
            elif told.n not in numbers:
                crossed.append(job_id)
    return Calls(
        made=ended.total(),
        completed=ended["completed"],
        aborted=ended["aborted"],
        repeated=sum(count - 1 for count in answered.values() if count > 1),
        strangers=strangers,
        crossed=crossed,
        doubled=[number for number, ids in jobs.items() if len(ids) > 1],
        unbidden=[told.n for told in requests if told.is_refused and told.n in jobs],
        answering=answering,
    )
