"""Batches: each closes once, all of it counted, in the order given, told of under one id; all who know say the same.

From what clients, replicas and receivers wrote down, and beside it what Redis and the history hold in the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tests.faults.batches import Batch, mark
from tests.faults.history import Json, read
from tests.faults.load import KEPT_BY

ENDED_WELL = "completed"


@dataclass(slots=True)
class Findings:
    """What became of the batches; numbers of batches, or ids of messages and webhooks, for each thing that is wrong.

    Attributes:
        accepted: batches; messages: theirs.
        doubled: accepted under a second id.
        unclosed: never seen closed.
        reopened: its standing or its results changed after it was closed.
        miscounted: its counts do not say how many messages it has, or how many of them did not end well.
        disordered: its results are not those of its messages, in the order given.
        wrong: messages with an answer that is not theirs, or with none.
        ill: messages that ended otherwise than well, each with its status and code.
        silent: of which the receiver was not told, in a way that it could acknowledge.
        misheard: of which it was told under a second id, or something else than the results, or not well signed.
        late: webhook ids that came again after their acknowledged delivery was settled.
        repeated: deliveries of what the receiver had acknowledged already.
        unlike_redis, unlike_history: whose results are not what Redis or the history holds.
        unlike_replicas: messages that completed without such a call, or calls for messages that nobody accepted.
    """

    accepted: int = 0
    messages: int = 0
    doubled: list[int] = field(default_factory=list)
    unclosed: list[int] = field(default_factory=list)
    reopened: list[int] = field(default_factory=list)
    miscounted: list[int] = field(default_factory=list)
    disordered: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ill: dict[str, str] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)
    misheard: list[int] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    repeated: int = 0
    unlike_redis: list[int] = field(default_factory=list)
    unlike_history: list[int] = field(default_factory=list)
    unlike_replicas: list[str] = field(default_factory=list)

    def broken(self) -> dict[str, list[Any]]:
        """Return what must be empty, by its name. How messages may end, and what may be told twice, others know."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, list)}


def check(batches: Iterable[Batch], news: Sequence[Json], records: Iterable[Path]) -> Findings:
    """Judge every batch.

    Args:
        news: the receiver's lines.
        records: the replicas' files.
    """
    batches = list(batches)
    found = Findings()
    told: dict[str, list[Json]] = {}
    for line in news:
        told.setdefault(line["webhook_id"], []).append(line)
    for batch in batches:
        if not batch.batch_id:
            continue
        found.accepted += 1
        found.messages += batch.size
        _look_at(batch, found)
        _listen(batch, told, found)
    known = {f"msg_{batch.batch_id}": batch for batch in batches}
    strangers = sorted(webhook_id for webhook_id in told if webhook_id not in known)
    by_batch = {batch.batch_id: batch.n for batch in batches}
    for webhook_id in strangers:  # a second id for a batch, or for nothing that was accepted
        found.misheard.append(by_batch.get(told[webhook_id][0]["batch_id"], 0))
    _ask_replicas(batches, records, found)
    return found


def _look_at(batch: Batch, found: Findings) -> None:
    """Hold what a client saw of one batch against what it sent, and against what Redis and the history hold."""
    if len(batch.batches) > 1:
        found.doubled.append(batch.n)
    if not batch.seen:
        found.unclosed.append(batch.n)
        return
    first, *later = batch.seen
    standing, results = first["standing"], first["results"]
    if not later or any((look["standing"], look["digest"]) != (standing, first["digest"]) for look in later):
        found.reopened.append(batch.n)
    if [one["id"] for one in results] != list(batch.ids) or len(results) != batch.size:
        found.disordered.append(batch.n)
    ill = {one["id"]: f"{one['status']}/{one['code']}" for one in results if one["status"] != ENDED_WELL}
    found.ill |= ill
    found.wrong += [
        one["id"]
        for position, one in enumerate(results)
        if one["status"] == ENDED_WELL and not _is_right(batch, position, one["answer"] or "")
    ]
    status = "completed_with_errors" if ill else ENDED_WELL
    counts = (status, batch.size, batch.size, len(ill))
    if _counts(standing) != counts or standing["closed_ms"] is None:
        found.miscounted.append(batch.n)
    kept, recorded = batch.kept, batch.recorded or {"batch": None, "messages": []}
    if kept is None or kept["digest"] != first["digest"] or kept["messages"] != results:
        found.unlike_redis.append(batch.n)
    elif _counts_in_redis(kept["batch"]) != (*counts, standing["closed_ms"]):
        found.miscounted.append(batch.n)
    row = recorded["batch"] or {}
    if (*_counts(row), row.get("closed_ms")) != (*counts, standing["closed_ms"]) or recorded["messages"] != results:
        found.unlike_history.append(batch.n)


def _counts(row: Json) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("status", "request_count", "response_count", "failed_count"))


def _counts_in_redis(fields: Mapping[str, str]) -> tuple[Any, ...]:
    numbers = [int(fields.get(name, "-1")) for name in ("req.count", "res.count", "failed.count", "closed_ms")]
    return fields.get("status"), *numbers


def _is_right(batch: Batch, position: int, answer: str) -> bool:
    if batch.kind == "retrieve":
        return f"the {KEPT_BY[batch.subject]} key" in answer
    return mark(batch.n, position) in answer


def _listen(batch: Batch, told: Mapping[str, Sequence[Json]], found: Findings) -> None:
    """Hold what the receiver was told against what the client saw, and when it was told against what history says."""
    heard = told.get(f"msg_{batch.batch_id}", ())
    acknowledged = [line for line in heard if line["status"] == 204]
    if not acknowledged:
        found.silent.append(batch.n)
    found.repeated += max(0, len(acknowledged) - 1)
    event = "message.completed" if batch.kind == "single" else "batch.completed"
    wanted = (None, event, batch.queue, batch.seen[0]["digest"] if batch.seen else "")
    if any((line["problem"], line["type"], line["queue"], line["digest"]) != wanted for line in heard):
        found.misheard.append(batch.n)
    if batch.recorded is None:
        return
    jobs = batch.recorded["webhooks"]
    if [job["status"] for job in jobs] != ["completed"]:
        found.unlike_history.append(batch.n)
        return
    settled_s = (jobs[0]["finished_ms"] + 1) / 1000  # the history has whole milliseconds, rounded down
    if any(line["arrived_s"] > settled_s for line in heard):
        found.late.append(f"msg_{batch.batch_id}")


def _ask_replicas(batches: Iterable[Batch], records: Iterable[Path], found: Findings) -> None:
    """Hold what completed against the calls that the replicas have answered."""
    marks = {message_id: mark(batch.n, position) for batch in batches for position, message_id in enumerate(batch.ids)}
    answered: Counter[str] = Counter()
    strange: set[str] = set()
    is_ours: Callable[[str], bool] = lambda text: "Batch " in text and ", message " in text  # noqa: E731
    for path in records:
        for line in read(path):
            message_id, text = str(line["request_id"]), str(line.get("messages", ""))
            if message_id in marks and marks[message_id] in text:
                answered[message_id] += line["status"] == ENDED_WELL
            elif message_id in marks or is_ours(text):
                strange.add(message_id)
    completed = {one["id"] for batch in batches if batch.seen for one in batch.seen[0]["results"]} - found.ill.keys()
    found.unlike_replicas += sorted(strange | {message_id for message_id in completed if not answered[message_id]})
