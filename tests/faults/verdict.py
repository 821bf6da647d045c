"""What one cell showed: plain figures, as they stand in the matrix, and the promises that did not hold.

Verdicts are kept as lines of JSON, in a file that each run adds to.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from tests.faults.history import Json


@dataclass(slots=True)
class Verdict:
    """What one cell showed.

    Attributes:
        asked: how many requests the cell was told to send (`--jobs`); jobs: how many it sent.
        endings: how requests ended that did not end well, by status and code.
        refusals_by_code: how often clients were refused; the sum may be more than `refused`, since some send again.
        lost, unseen, duplicated, wrong, stale, out_of_order: requests, as the clients' and replicas' files tell.
        destroyed: accepted requests that were lost because the scenario destroyed their record, on purpose.
        redone: those that were done twice for the same reason: nobody was left to know of the first time.
        load_left, endless_keys, work_left: keys, as Redis tells when all is quiet.
        faults: how many were injected; aimed: those of an instant (a kill, a freeze), which should meet work in hand;
            hits: those that did; kills: SIGKILLs, of whatever process. A fault that lasts (a bad network, a drain)
            meets whatever comes.
        recovered_p50_s, recovered_max_s: how long the work of killed or frozen workers lay there; None without any.
        refusals: settles refused as stale, as the processes count that live at the end; the counts of earlier lives
            died with them.
        calls_repeated: calls made for a job of which a replica had answered one already, or had one broken off;
            calls_excused: how many the faults account for.
        grown_mib: by how much memory has grown from the begin of the load until all was quiet, in MiB: of Redis, and
            of every process of ours that lived all the time.
        limit_s: how long the cell may take; server: what kept the data, with its version.
        figures: what else a scenario has measured.
        broken: what was promised and did not hold; empty when the cell is green.
        doubts: what `--any-machine` does not hold against it: spans that were too long.
    """

    number: int
    title: str
    seed: int
    asked: int = 0
    jobs: int = 0
    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    endings: dict[str, int] = field(default_factory=dict)
    refusals_by_code: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    destroyed: int = 0
    redone: int = 0
    unseen: int = 0
    duplicated: int = 0
    wrong: int = 0
    stale: int = 0
    out_of_order: int = 0
    load_left: int = 0
    endless_keys: int = 0
    work_left: int = 0
    faults: int = 0
    aimed: int = 0
    hits: int = 0
    kills: int = 0
    recovered_p50_s: float | None = None
    recovered_max_s: float | None = None
    refusals: int = 0
    calls_repeated: int = 0
    calls_excused: int = 0
    grown_mib: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    limit_s: float = 0.0
    server: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @property
    def is_green(self) -> bool:
        """Whether every promise held."""
        return not self.broken

    @property
    def hit_share(self) -> float | None:
        """Share of the aimed faults that met work in hand; None where none was injected."""
        return self.hits / self.aimed if self.aimed else None

    def as_json(self) -> Json:
        """Return all of it."""
        return {**asdict(self), "green": self.is_green}


def appendable(text: str) -> Path:
    """Return the file called so on a command line, to which lines can be added.

    Raises:
        argparse.ArgumentTypeError: none can be. It is said before anything has run that should be told there.
    """
    try:
        Path(text).open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {error.strerror}") from None
    return Path(text)


def append(path: Path, record: Json) -> None:
    """Add one line to a file."""
    with path.open("ab") as file:
        file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
