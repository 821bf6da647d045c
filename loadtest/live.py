"""What is shown while a test runs: a table that changes on a terminal, a plain line now and then anywhere else.

All of it goes to standard error, so that standard output is the report's alone.
"""

from __future__ import annotations

import sys
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from rich.console import Console, RenderableType

    from loadtest.tally import Moment

LINE_S: Final = 5.0  # between plain lines
_WINDOW_S: Final = 1.0  # what is shown is of the last second
_BARS: Final = "▁▂▃▄▅▆▇█"
_BAR_COUNT: Final = 60


class Watcher(Protocol):
    """Is told of every moment of a run."""

    def add(self, moment: Moment) -> None:
        """Show it, or do not."""


class Now:
    """The last second of a run, out of moments that come from several generators."""

    def __init__(self) -> None:
        self._moments: deque[Moment] = deque()
        self._in_flight: dict[int, int] = {}  # by generator, as its last word has it
        self.at_s = 0.0
        self.ended = 0
        self.failed = 0

    def add(self, moment: Moment) -> None:
        """Take in a moment, and forget what is too old."""
        self._moments.append(moment)
        self._in_flight[moment.part] = moment.in_flight
        self.at_s = max(self.at_s, moment.at_s)
        self.ended += len(moment.latencies) + moment.failed
        self.failed += moment.failed
        while self._moments[0].at_s < self.at_s - _WINDOW_S + 0.1:
            self._moments.popleft()

    @property
    def rate(self) -> float:
        """Successes in the last second."""
        span_s = min(_WINDOW_S, max(self.at_s, 0.01))
        return sum(len(moment.latencies) for moment in self._moments) / span_s

    @property
    def in_flight(self) -> int:
        """Requests under way, over all generators."""
        return sum(self._in_flight.values())

    def percentile_ms(self, per_mille: int) -> float | None:
        """Return a percentile of the last second's successes; None: there was none."""
        latencies = sorted(latency for moment in self._moments for latency in moment.latencies)
        return latencies[-(-per_mille * len(latencies) // 1000) - 1] if latencies else None


def line_of(now: Now) -> str:
    """Return the last second as one plain line."""
    p50, p99 = (_ms(now.percentile_ms(per_mille)) for per_mille in (500, 990))
    return (
        f"{now.at_s:7.1f} s  {now.rate:8.1f} req/s  P50 {p50}  P99 {p99}"
        f"  {now.in_flight} in flight  {now.ended} ended  {now.failed} failed"
    )


@contextmanager
def watch(*, quiet: bool, out: TextIO | None = None) -> Iterator[Watcher]:
    """Give what shows a run on *out* (standard error): live on a terminal, else a line every LINE_S seconds."""
    out = out or sys.stderr
    if quiet:
        yield _Nothing()
        return
    if not out.isatty():
        yield _Lines(out)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=out)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        view = _Table(console)

        class _OnTerminal:
            def add(self, moment: Moment) -> None:
                view.add(moment)
                live.update(view.picture())

        yield _OnTerminal()


class _Nothing:
    def add(self, moment: Moment) -> None:
        """Show nothing."""


class _Lines:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._now = Now()
        self._next_s = LINE_S

    def add(self, moment: Moment) -> None:
        """Write a line when it is time."""
        self._now.add(moment)
        if self._now.at_s >= self._next_s:
            self._next_s += LINE_S * ((self._now.at_s - self._next_s) // LINE_S + 1)
            self._out.write(line_of(self._now) + "\n")
            self._out.flush()


class _Table:
    def __init__(self, console: Console) -> None:
        self._now = Now()
        self._p99s: deque[float] = deque(maxlen=_BAR_COUNT)
        self._second = 0
        self._console = console

    def add(self, moment: Moment) -> None:
        self._now.add(moment)
        if int(self._now.at_s) > self._second:
            self._second = int(self._now.at_s)
            self._p99s.append(self._now.percentile_ms(990) or 0.0)

    def picture(self) -> RenderableType:
        from rich.table import Table

        now = self._now
        table = Table.grid(padding=(0, 2))
        for _ in range(6):
            table.add_column(justify="right")
        p50, p99 = (_ms(now.percentile_ms(per_mille)) for per_mille in (500, 990))
        table.add_row("time", "req/s", "P50", "P99", "in flight", "failed", style="dim")
        failed = f"[red]{now.failed}[/red]" if now.failed else "0"
        table.add_row(f"{now.at_s:.0f} s", f"{now.rate:.1f}", p50, p99, str(now.in_flight), failed)
        outer = Table.grid()
        outer.add_row(table)
        outer.add_row(f"[dim]P99[/dim] {bars(list(self._p99s)[-max(1, self._console.width - 8) :])}")
        return outer


def bars(values: list[float]) -> str:
    """Return *values* as a row of bars, the greatest as high as a line."""
    top = max(values, default=0.0)
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] if top else _BARS[0] for value in values)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
