"""What a mock replica was asked, and how each request went: in memory for a look from outside, in a file for later.

Each entry has its instants in seconds since the epoch, so that the records of several replicas and the clocks of a test
can be laid side by side: `arrived_s`, `began_s` (it got its slot; null while it waits), `ended_s`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from pathlib import Path

KEPT = 2_000  # entries in memory; a prompt with its sources is some 8 KB


@dataclass(slots=True)
class Entry:
    """The record of one request; written by its own call alone."""

    n: int  # order of arrival, from 1
    path: str
    request_id: str | None
    arrived_s: float  # this and the two below: seconds since the epoch
    began_s: float | None = None  # when it got its slot
    ended_s: float | None = None
    status: str | None = None  # completed, failed or aborted; in hand: running or waiting, see as_json
    status_code: int | None = None  # None: nothing was answered
    tokens: int = 0
    asked: dict[str, object] = field(default_factory=dict)

    def as_json(self, replica: str) -> dict[str, object]:
        """Return the line of the record; *replica* is the URL of the one that was asked."""
        return {
            "n": self.n,
            "replica": replica,
            "path": self.path,
            "request_id": self.request_id,
            "status": self.status or ("waiting" if self.began_s is None else "running"),
            "status_code": self.status_code,
            "arrived_s": self.arrived_s,
            "began_s": self.began_s,
            "ended_s": self.ended_s,
            "tokens": self.tokens,
            **self.asked,
        }


class Ledger:
    """What the replica was asked: counts since the start, the last KEPT records, and the file."""

    def __init__(self, url: str, path: Path | None) -> None:
        self.counts: Counter[str] = Counter()
        self._url = url
        self._in_hand: dict[int, Entry] = {}
        self._ended: deque[Entry] = deque(maxlen=KEPT)
        self._arrived = 0
        # Unbuffered: a line survives a SIGKILL the moment it is written.
        self._file = path.open("ab", buffering=0) if path is not None else None

    def open(self, path: str, request_id: bytes | None) -> Entry:
        """Return a new entry for a request that has just arrived at *path*."""
        self._arrived += 1
        name = request_id.decode("latin-1") if request_id is not None else None
        entry = Entry(self._arrived, path, name, time.time())
        self._in_hand[entry.n] = entry
        return entry

    def end(self, entry: Entry, status: str, status_code: int | None = None) -> None:
        """Put the end of *entry* on record; the first word on it stands, later ones change nothing."""
        if entry.ended_s is not None:
            return
        entry.status, entry.status_code, entry.ended_s = status, status_code, time.time()
        del self._in_hand[entry.n]
        self._ended.append(entry)
        self.counts[status] += 1
        if self._file is not None:
            self._file.write(orjson.dumps(entry.as_json(self._url), option=orjson.OPT_APPEND_NEWLINE))

    def clear(self) -> None:
        """Forget what has ended; what is in hand stays, and so does the file."""
        self._ended.clear()
        self.counts.clear()

    def as_json(self, running: int, waiting: int) -> bytes:
        """Return the body of `GET /mock/requests`: counts by status, those in hand, and the entries by arrival."""
        entries = sorted([*self._ended, *self._in_hand.values()], key=lambda entry: entry.n)
        counts = {status: self.counts[status] for status in ("completed", "failed", "aborted")}
        in_hand = {"running": running, "waiting": waiting}
        return orjson.dumps({**counts, **in_hand, "requests": [entry.as_json(self._url) for entry in entries]})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
