"""Deliveries: each message that was accepted goes out once, or not at all, and its status says truly which.

What went out is known from the receivers' own record alone: what they had whole, what they took of it, and whether
their answer was heard. What a client may be told is `unknown` only where that record shows no answer that was heard, or
where a worker was harmed while the message was between `begin` and the settle of its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from pipeline.settings import RetrySettings
from tests.deliveries.ledger import Entry
from tests.faults.deliveries import Message
from tests.faults.history import Json

RANKS: Final = {
    "scheduled": 0, "pending": 1, "sending": 2, "unknown": 3, "sent": 4, "undelivered": 5, "failed": 6, "delivered": 7,
}  # fmt: skip
OUT: Final = frozenset({"sent", "undelivered", "delivered"})
TERMINAL: Final = OUT | {"unknown", "failed"}
ATTEMPTS: Final = RetrySettings().max_retries + 1
HEARD: Final = 200
DOUBTED: Final = frozenset({0, 500})
"""Answers after which nobody knows whether a message was taken: none at all, and Twilio's 500, as it says itself."""


@dataclass(slots=True)
class Findings:
    """What became of the messages; their numbers for each thing that is wrong.

    Attributes:
        messages: accepted; taken: by the receivers' record; unknown: those that ever were.
        statuses: how they stand in the end.
        unanswered: those of `unknown` that the record shows without an answer that was heard; unread: connections that
            a receiver dropped before it knew whose they were; begun: those of the rest of `unknown` that were on their
            way when their worker was harmed.
        answers: what the receivers said, and how often; 0: nothing, or to nobody.
        callbacks: status callbacks that were heard; unheard: those that were not.
        refused: never accepted.
        accepted_twice: under a second id.
        lost: nobody knows of it any more, or it goes on for ever.
        sent_twice: taken more than once.
        untrue: `sent`, `delivered` or `undelivered`, and not in the record, or `failed` although it was taken.
        unfounded: `failed`, though nobody refused it, and not all attempts were made.
        forgiven: refused for good by the receiver, and not `failed`.
        doubtful: `unknown` without a cause.
        changed: what arrived is not what was sent.
        strange: messages in the record that nobody sent, by their id.
        sunk: its status has fallen, or stood still.
        deaf: its status is not the highest that its provider was heard to tell.
        unlike_history: the database says something else.
        crashed: clients that ended with an error.
    """

    messages: int = 0
    taken: int = 0
    unknown: int = 0
    unanswered: int = 0
    unread: int = 0
    begun: int = 0
    callbacks: int = 0
    unheard: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    refused: list[int] = field(default_factory=list)
    accepted_twice: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    sent_twice: list[int] = field(default_factory=list)
    untrue: list[int] = field(default_factory=list)
    unfounded: list[int] = field(default_factory=list)
    forgiven: list[int] = field(default_factory=list)
    doubtful: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    sunk: list[int] = field(default_factory=list)
    deaf: list[int] = field(default_factory=list)
    unlike_history: list[int] = field(default_factory=list)
    crashed: list[int] = field(default_factory=list)

    def broken(self) -> dict[str, list[Any]]:
        """Return what must be empty, by its name."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, list)}


def check(
    messages: Iterable[Message], ledger: Iterable[Entry], callbacks: Iterable[Json], begun: Collection[str]
) -> Findings:
    """Judge every message.

    Args:
        ledger: the receivers' record; callbacks: what they have told of it (`tests.deliveries.twilio.Told`).
        begun: ids of those that were on their way when their worker was killed or frozen.
    """
    found, messages = Findings(), list(messages)
    had: dict[str, list[Entry]] = {}
    for entry in ledger:
        had.setdefault(entry.delivery, []).append(entry)
        found.answers[entry.answered] += 1
    found.unread = len(had.pop("", ()))
    told = _told(callbacks, found)
    known = {delivery_id for message in messages for delivery_id in message.ids}
    found.strange += sorted(had.keys() - known)
    for message in messages:
        entries = [entry for delivery_id in message.ids for entry in had.get(delivery_id, ())]
        _look_at(message, entries, told, begun, found)
    if len(found.doubtful) <= found.unread:  # whose connections these were, nobody can know
        found.doubtful = []
    return found


def _told(callbacks: Iterable[Json], found: Findings) -> dict[str, set[str]]:
    """Return which statuses the provider was heard to tell, by message."""
    told: dict[str, set[str]] = {}
    for line in callbacks:
        if line["answered"] != HEARD:
            found.unheard += 1
            continue
        found.callbacks += 1
        if line["status"] in OUT:
            told.setdefault(parse_qs(urlsplit(line["url"]).query)["delivery"][0], set()).add(line["status"])
    return told


def _look_at(
    message: Message, entries: list[Entry], told: Mapping[str, set[str]], begun: Collection[str], found: Findings
) -> None:
    if message.crashed is not None:
        found.crashed.append(message.n)
    if not message.ids:
        found.refused.append(message.n)
        return
    found.messages += 1
    if len(message.ids) > 1:
        found.accepted_twice.append(message.n)
    times = sum(entry.taken for entry in entries)
    found.taken += times
    if times > 1:
        found.sent_twice.append(message.n)
    given = (message.sender, message.to, message.body)
    if any((entry.sender, entry.to, entry.body) != given for entry in entries):
        found.changed.append(message.n)
    _judge_status(message, entries, told.get(message.ids[0], set()), begun, found)


def _judge_status(
    message: Message, entries: list[Entry], told: set[str], begun: Collection[str], found: Findings
) -> None:
    seen = message.seen or {"status": None, "history": [], "code": None, "attempts": 0}
    status, passed = seen["status"], [step[0] for step in seen["history"]]
    found.statuses[str(status)] += 1
    if status not in TERMINAL:
        found.lost.append(message.n)
        return
    if any(RANKS[a] >= RANKS[b] for a, b in pairwise(passed)) or passed[-1:] != [status]:
        found.sunk.append(message.n)
    row = message.recorded or {"status": None, "history": []}
    if (row["status"], row["history"]) != (status, seen["history"]):
        found.unlike_history.append(message.n)
    if told and status != max(told, key=RANKS.__getitem__):
        found.deaf.append(message.n)
    is_taken = any(entry.taken for entry in entries)
    if (status in OUT and not is_taken) or (status == "failed" and is_taken):
        found.untrue.append(message.n)
    if status == "failed" and not (message.is_bad or seen["attempts"] >= ATTEMPTS or _is_refused(entries)):
        found.unfounded.append(message.n)
    if message.is_bad and status not in {"failed", "unknown"}:
        found.forgiven.append(message.n)
    if "unknown" in passed:
        found.unknown += 1
        if any(entry.answered in DOUBTED for entry in entries):
            found.unanswered += 1
        elif message.ids[0] in begun:
            found.begun += 1
        else:
            found.doubtful.append(message.n)


def _is_refused(entries: Iterable[Entry]) -> bool:
    return any(entry.answered >= 400 for entry in entries)
