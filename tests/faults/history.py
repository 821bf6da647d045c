"""What clients did and saw, and which faults were injected: one line of JSON each, in files that outlive every process.

A verdict rests on these files and on the replicas' own records, never on what Penstock counts of itself. Events of
clients:

    {"at_s", "event": "submitted", "n", "kind", "subject"}         a request is on its way
    {"at_s", "event": "accepted", "n", "id"}                       the client heard yes
    {"at_s", "event": "refused", "n", "code"}                      the client heard no: nothing may come of it
    {"at_s", "event": "unknown", "n", "code"}                      the client heard nothing: it may have been accepted
    {"at_s", "event": "gave_up", "n", "is_quiet"}                  the run was over before the client heard anything
    {"at_s", "event": "client_crashed", "n", "code"}               what it heard, the client could not make sense of
    {"at_s", "event": "outcome", "n", "id", "outcome": {...}}      what the client was told; seen again: once more
    {"at_s", "event": "spans", "n", "spans": {...}}                `timings_ms` as a gateway answered them

Events of the nemesis:

    {"at_s", "event": "fault", "fault", "victim", "held", ...}     "repeats", where there is one: calls that may be made
                                                                   again because of it
    {"at_s", "event": "silence", "from_s", "to_s"}                 clients may have heard nothing meanwhile: Redis or a
                                                                   gateway was away, or badly connected
    {"at_s", "event": "recovered", "victim", "entries", "after_s"} what a dead worker held was in other hands, or done

Instants and spans ending in `_s` are seconds on the monotonic clock, but for `looked_s` of a fault: that is on the wall
clock, as the replicas' records are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

Json = dict[str, Any]


class Writer:
    """One history file. Unbuffered: a line is there the moment it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, **fields: Any) -> None:
        """Write one line."""
        line = {"at_s": round(time.monotonic(), 6), "event": event, **fields}
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __repr__(self) -> str:
        return f"<Writer {self.path}>"


def read(path: Path) -> Iterator[Json]:
    """Yield the lines of a history or of a replica's record; a torn last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield orjson.loads(line)


@dataclass(slots=True)
class Told:
    """What the clients know of one request, pieced together from the file.

    Attributes:
        ids: every job id that this request was accepted under; more than one is a fault of ours.
        outcomes: everything they were told of how it ended, in order.
        refusals: the code of every refusal; a client that sends again may hear several.
        gave_up: whether a client stopped waiting; is_unseen: though all had become quiet before.
        crashed: what a client could not make sense of, None without such.
        heard_s: when they last heard of its acceptance or its outcome.
        accepted_s, ended_s: when they first heard of either, on the monotonic clock.
    """

    n: int
    kind: str
    subject: str
    submitted_s: float
    ids: list[str] = field(default_factory=list)
    outcomes: list[Json] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    is_unknown: bool = False
    gave_up: bool = False
    is_unseen: bool = False
    crashed: str | None = None
    accepted_s: float | None = None
    ended_s: float | None = None
    heard_s: float | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether the clients heard yes."""
        return bool(self.ids)

    @property
    def is_refused(self) -> bool:
        """Whether the clients heard no and nothing else: no work may come of it."""
        return bool(self.refusals) and not self.is_accepted and not self.is_doubtful

    @property
    def is_doubtful(self) -> bool:
        """Whether it may have been accepted without the clients' knowledge."""
        return not self.is_accepted and (self.is_unknown or self.gave_up)


def piece_together(path: Path) -> list[Told]:
    """Return every request in a clients' file, in the order of submission."""
    found: dict[int, Told] = {}
    for line in read(path):
        if line["event"] == "submitted":
            found[line["n"]] = Told(line["n"], line["kind"], line["subject"], line["at_s"])
            continue
        told = found[line["n"]]
        match line["event"]:
            case "accepted":
                if line["id"] not in told.ids:
                    told.ids.append(line["id"])
                told.accepted_s = told.accepted_s or line["at_s"]
                told.heard_s = line["at_s"]
            case "refused":
                told.refusals.append(line["code"])
            case "unknown":
                told.is_unknown = True
            case "gave_up":
                told.gave_up = True
                told.is_unseen = line["is_quiet"]
            case "client_crashed":
                told.crashed = line["code"]
            case "outcome":
                told.outcomes.append(line["outcome"])
                told.ended_s = told.ended_s or line["at_s"]
                told.heard_s = line["at_s"]
    return list(found.values())
