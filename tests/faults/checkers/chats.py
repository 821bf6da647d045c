"""Chats: every message gets one reply, in order, and each reply is one that a replica made of just these messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from tests.faults.chats import Burst, mark
from tests.faults.history import Json


@dataclass(slots=True)
class Findings:
    """What became of the bursts; numbers of chats, or ids of messages, for each thing that is wrong.

    Attributes:
        chats, messages, replies: how many there were.
        refused: messages that were never accepted.
        lost: accepted, and never told of.
        doubled: told of more than once.
        strange: told of, and never said.
        ill: that ended otherwise than with a reply.
        disordered: chats in which a message was answered before an earlier one.
        wrong: replies, by the first message that they answer, that are not what was asked last.
        unlike_replicas: replies that no replica has made of just these messages, in order.
        crashed: chats whose client ended with an error.
    """

    chats: int = 0
    messages: int = 0
    replies: int = 0
    refused: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    ill: list[str] = field(default_factory=list)
    disordered: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unlike_replicas: list[str] = field(default_factory=list)
    crashed: list[int] = field(default_factory=list)

    def broken(self) -> dict[str, list[Any]]:
        """Return what must be empty, by its name."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, list)}


def check(bursts: Iterable[Burst], records: Iterable[Json]) -> Findings:
    """Judge every chat.

    Args:
        records: the replicas' lines.
    """
    found = Findings()
    made: dict[str, list[list[str]]] = {}  # what was asked by the calls that were answered, by job
    for line in records:
        if line["status"] == "completed":
            said = [turn["content"] for turn in line["messages"] if turn["role"] == "user"]
            made.setdefault(str(line["request_id"]), []).append(said)
    for burst in bursts:
        found.chats += 1
        found.messages += len(burst.accepted)
        if burst.crashed is not None:
            found.crashed.append(burst.n)
        found.refused += [one for one in burst.ids if one not in burst.accepted]
        _look_at(burst, made, found)
    return found


def _look_at(burst: Burst, made: dict[str, list[list[str]]], found: Findings) -> None:
    events = burst.events or []
    told = [message_id for event in events for message_id in event["message_ids"]]
    times = Counter(told)
    found.lost += [one for one in burst.ids if one in burst.accepted and not times[one]]
    found.doubled += [one for one, count in times.items() if count > 1]
    found.strange += [one for one in times if one not in burst.ids]
    known = [burst.ids.index(one) for one in dict.fromkeys(told) if one in burst.ids]
    if known != sorted(known):
        found.disordered.append(burst.n)
    for event in events:
        if event["type"] != "reply":
            found.ill += event["message_ids"]
            continue
        found.replies += 1
        texts = [mark(burst.n, burst.ids.index(one)) for one in event["message_ids"] if one in burst.ids]
        if not texts or texts[-1] not in event["text"]:
            found.wrong.append(event["message_ids"][0])
        if not any(said[-len(texts) :] == texts for said in made.get(event["message_id"], ())):
            found.unlike_replicas.append(event["message_ids"][0])
