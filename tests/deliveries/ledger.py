"""What a receiving server knows: each message that it had whole, whether it took it, and whether it said so.

Both servers keep one, in memory and in a file. It is what a scenario with killed workers is judged by: a message that
was taken twice was sent twice, one that was taken and never answered is one that nobody but the server knows of.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One message that came as a whole.

    Attributes:
        delivery: our id, as the message carries it.
        taken: the receiver will deliver it.
        answered: with which status or reply code; 0: the connection was dropped, or nothing was said.
    """

    delivery: str
    sender: str
    to: str
    body: str
    taken: bool
    answered: int
    provider_id: str = ""


@dataclass
class Ledger:
    """All messages of one server.

    Attributes:
        path: a file to which each one is appended as a line of JSON, before it is answered.
        grown: set with each one.
    """

    path: Path | None = None
    entries: list[Entry] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, entry: Entry) -> None:
        """Write one down."""
        self.entries.append(entry)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        self.grown.set()

    @property
    def taken(self) -> list[Entry]:
        """Those that the receiver will deliver."""
        return [entry for entry in self.entries if entry.taken]


def read(path: Path) -> list[Entry]:
    """Return what a server has written into its file."""
    return [Entry(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Faults:
    """What goes wrong, and how often: chances by name, of which at most one happens to a message.

    Attributes:
        chances: each between 0 and 1, together at most 1.
        script: happens first, one to each message; "" stands for no fault.
    """

    chances: Mapping[str, float] = field(default_factory=dict)
    script: list[str] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def draw(self) -> str:
        """Return what happens to the next message; "" for nothing."""
        if self.script:
            return self.script.pop(0)
        left = self.rng.random()
        for name, chance in self.chances.items():
            left -= chance
            if left < 0:
                return name
        return ""

    def check(self, known: frozenset[str]) -> None:
        """Refuse faults that the server does not have.

        Raises:
            ValueError: names them.
        """
        if strange := sorted({*self.chances, *filter(None, self.script)} - known):
            raise ValueError(f"no such faults: {', '.join(strange)}; known are {', '.join(sorted(known))}")
        if sum(self.chances.values()) > 1:
            raise ValueError("the chances come to more than 1")


async def until_told_to_stop() -> None:
    """Wait for SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
