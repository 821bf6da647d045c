"""What a benchmark found: windows in, spreads over rounds out, and the ways to show them. No clock, no process.

Rules:
- A figure is taken once per round; what is shown is the median of the rounds, with the least and the greatest.
- A ratio is taken within each round, between windows of that round, before the spread is: what slows a whole round
  slows both sides.
- Percentiles are by nearest rank, of the calls that succeeded; failures stand beside them.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from loadtest.report import percentile

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two readings of the clocks.

    Attributes:
        ended: calls that ended well inside the window.
        errors: the others, by kind.
        cpu_us: CPU time that each process took in it.
        latencies_ms: of those that ended well; in an open loop from their planned start.
        lags_ms: how much later than planned each call was really sent; empty in a closed loop.
    """

    seconds: float
    ended: int
    errors: dict[str, int]
    cpu_us: dict[str, float]
    latencies_ms: list[float]
    lags_ms: list[float] = field(default_factory=list)

    @classmethod
    def from_json(cls, body: Json) -> Window:
        """Read what a driver wrote."""
        return cls(**body)

    def as_json(self) -> Json:
        """Return what `from_json` reads."""
        return asdict(self)

    @property
    def rate(self) -> float:
        """Calls that ended well, per second."""
        return self.ended / self.seconds

    def cpu_per_call(self, names: Iterable[str] | None = None) -> float:
        """Return CPU microseconds per ended call, summed over the named processes; None: over all."""
        chosen = self.cpu_us if names is None else {name: self.cpu_us[name] for name in names}
        return sum(chosen.values()) / max(1, self.ended)

    def quantile_ms(self, per_mille: int) -> float:
        """Return a percentile of the latencies; NaN where there is none."""
        return quantile(self.latencies_ms, per_mille)

    def lag_ms(self, per_mille: int) -> float:
        """Return a percentile of the send lags; NaN where there is none."""
        return quantile(self.lags_ms, per_mille)


def quantile(values: Sequence[float], per_mille: int) -> float:
    """Return a percentile of *values*, in any order, by nearest rank; NaN of nothing."""
    return percentile(sorted(values), per_mille) if values else float("nan")


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over the rounds."""

    min: float
    median: float
    max: float

    def __str__(self) -> str:
        return f"{number(self.median)} [{number(self.min)} .. {number(self.max)}]"


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of one figure's rounds; at least one."""
    return Spread(min(values), statistics.median(values), max(values))


def ratios(those: Sequence[float], these: Sequence[float]) -> Spread:
    """Return how many times *those* are *these*, round by round."""
    return spread([that / this for that, this in zip(those, these, strict=True)])


def errors_of(windows: Iterable[Window]) -> str:
    """Return how many calls failed, and in which ways."""
    kinds: Counter[str] = Counter()
    for window in windows:
        kinds.update(window.errors)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "0"


def in_turns(rivals: Sequence[T], round_number: int) -> list[T]:
    """Return the order of one round: each rival is first in some round, so that none always follows the same one."""
    first = round_number % max(1, len(rivals))
    return [*rivals[first:], *rivals[:first]]


def number(value: float) -> str:
    """Return *value* with about three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


@dataclass(slots=True)
class Report:
    """The figures of one benchmark.

    Attributes:
        tables: by title; each is rows by name, each row spreads (or words) by column.
        notes: what must be known to read the figures.
    """

    name: str
    about: Json
    tables: dict[str, dict[str, Mapping[str, Spread | str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def row(self, table: str, name: str, **columns: Spread | str) -> None:
        """Add one row; underscores in column names become blanks."""
        named = {column.replace("_", " "): value for column, value in columns.items()}
        self.tables.setdefault(table, {})[name] = named

    def beside(self, table: str, other: str, alone: Sequence[Window], beside: Sequence[Window]) -> None:
        """Add rows that compare the same calls alone and beside something else, round by round."""
        for name, windows in (("alone", alone), (f"beside {other}", beside)):
            self.row(
                table,
                name,
                P50_ms=spread([window.quantile_ms(500) for window in windows]),
                P99_ms=spread([window.quantile_ms(990) for window in windows]),
                lag_P99_ms=spread([window.lag_ms(990) for window in windows]),
                errors=errors_of(windows),
            )
        times = [ratios([b.quantile_ms(p) for b in beside], [a.quantile_ms(p) for a in alone]) for p in (500, 990)]
        self.row(table, "times", P50_ms=times[0], P99_ms=times[1])

    def as_json(self) -> str:
        """Return everything for programs."""
        body = {"bench": self.name, **self.about, "tables": self.tables, "notes": self.notes}
        return json.dumps(body, indent=1, default=asdict)

    def as_text(self) -> str:
        """Return everything for people: median [least .. greatest] of the rounds."""
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        lines = [f"{self.name}: {about}", "median [least .. greatest] of the rounds"]
        for title, rows in self.tables.items():
            lines += ["", title, *_grid(rows)]
        return "\n".join([*lines, "", *self.notes]) + "\n"


def _grid(rows: Mapping[str, Mapping[str, Spread | str]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [["", *columns]] + [[name, *(str(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    return [
        "  " + "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
