"""`penstock status`: what runs and how deep each queue is, as a table for people; on a terminal it goes on by itself.

The picture is `pipeline.picture`'s; here it is put into lines. A terminal narrower than `WIDE` gets the columns that an
operator needs first, and never more lines than fit; what is not a terminal gets everything, once. Redis may go away and
come back meanwhile: that is said above the last picture, and looking goes on.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import BrokerUnavailable, PenstockError
from pipeline.picture import Holding, Picture, look_closely

if TYPE_CHECKING:
    from pipeline.connection import Link
    from pipeline.overview import ReplicaView, StreamView, WorkerView
    from pipeline.picture import ReplicaHealth

WIDE: Final = 120
ENDLESS: Final = 1_000  # columns of a pipe: whoever reads it cuts lines better than we do
ANSWER_S: Final = 2.0  # a Redis that is silent for so long is told to be away
LOOK_S: Final = 30.0  # one that answers, but is not done with a look (some fifty commands) by then, is told to be slow
_FRAME: Final = 3  # lines of a table besides its rows: names, rule, blank
_LEAST_ROWS: Final = 2
_COLOURS: Final = {"ok": "green", "failing": "yellow", "probed": "yellow", "resting": "red", "unserved": "red"}
_WORRY_MS: Final = 60_000  # an entry that old is worth a colour: most work is done in seconds


@dataclass(frozen=True, slots=True)
class Away:
    """Redis cannot be looked at.

    Attributes:
        what: in a few words; `reason` says more.
        since_s: on the monotonic clock.
    """

    what: str
    reason: str
    since_s: float


# --- Lines -------------------------------------------------------------------------------------


def render(picture: Picture, *, width: int, height: int | None = None) -> RenderableType:
    """Return the tables.

    Args:
        height: lines there are; None: as many as it takes. What does not fit is counted instead of shown.
    """
    is_wide = width >= WIDE
    sections = [
        _Section("stream", *_streams(picture, is_wide=is_wide)),
        _Section("replica", *_replicas(picture, is_wide=is_wide)),
        _Section("worker", *_workers(picture, is_wide=is_wide)),
        _Section("gateway", ("gateway", "pid", "host"), _gateways(picture)),
    ]
    if height is not None:
        _fit(sections, height - 1)
    return Group(_headline(picture), *(section.render() for section in sections))


def away_line(away: Away, now_s: float, *, has_picture: bool) -> Text:
    """Return what is said while there is no picture of now."""
    below = " Below is what was last seen." if has_picture else " Start Redis, or name another: --redis-url."
    text = f"{away.what} for {_span((now_s - away.since_s) * 1000)}: {away.reason}. Trying again.{below}"
    return Text(text, style="bold red")


@dataclass(slots=True)
class _Section:
    """One table."""

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[str | Text, ...]]
    left_out: int = 0

    @property
    def lines(self) -> int:
        return len(self.rows) + _FRAME + bool(self.left_out) if self.rows else 1

    def render(self) -> RenderableType:
        if not self.rows:
            return Text(f"no {self.name}")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for column in self.columns:
            is_number = column in _NUMBERS
            table.add_column(
                column,
                justify="right" if is_number else "left",
                no_wrap=True,
                overflow="ellipsis",
                min_width=len(column) if is_number else None,
            )
        for row in self.rows:
            table.add_row(*row)
        more = [Text(f"and {_counted(self.left_out, f'more {self.name}')}", style="dim")] if self.left_out else []
        return Group(Text(), table, *more)


_NUMBERS: Final = frozenset(
    {"depth", "lag", "pending", "oldest", "load", "calls", "answer", "tokens/s", "pid", "quiet", "failures", "held for"}
)


def _fit(sections: Sequence[_Section], height: int) -> None:
    """Leave rows out, the longest table's first, until all lines fit or no table has more than a few."""
    while sum(section.lines for section in sections) > height:
        longest = max(sections, key=lambda section: len(section.rows))
        if len(longest.rows) <= _LEAST_ROWS:
            return
        longest.rows.pop()
        longest.left_out += 1


def _headline(picture: Picture) -> Text:
    seen = picture.seen
    line = Text(f"{_counted(seen.live_jobs, 'job')} alive, {seen.delayed} delayed, ")
    line.append(_counted(seen.dead_letters, "dead letter"), style="yellow" if seen.dead_letters else "")
    if seen.record_backlog:
        events = f", {_counted(seen.record_backlog, 'event')} to be recorded (oldest {_span(seen.record_oldest_ms)})"
        line.append(events, style="yellow" if seen.record_oldest_ms > _WORRY_MS else "")
    return line


def _streams(picture: Picture, *, is_wide: bool) -> tuple[tuple[str, ...], list[tuple[str | Text, ...]]]:
    def row(view: StreamView) -> tuple[str | Text, ...]:
        depth = view.waiting + view.in_hand
        age_ms = picture.oldest_ms.get(view.stream, 0)
        oldest = Text(_span(age_ms) if depth else "", style="yellow" if age_ms > _WORRY_MS else "")
        cells = (view.stream, str(depth), str(view.waiting), str(view.in_hand), oldest)
        return (*cells, _span(view.oldest_ms) if view.in_hand else "") if is_wide else cells

    shown = [view for view in picture.seen.streams if view.waiting or view.in_hand or _is_plain(view.stream)]
    columns = ("stream", "depth", "lag", "pending", "oldest", *(("held for",) if is_wide else ()))
    return columns, [row(view) for view in shown]


def _is_plain(stream: str) -> bool:
    """Whether a stream is that of normal priority: those of the others are shown while they hold something."""
    return not stream.endswith((":high", ":low"))


def _replicas(picture: Picture, *, is_wide: bool) -> tuple[tuple[str, ...], list[tuple[str | Text, ...]]]:
    def row(view: ReplicaView) -> tuple[str | Text, ...]:
        health = picture.health[view.url]
        speed = "" if health.tokens_per_s is None else f"{health.tokens_per_s:.0f}"
        took = "" if view.service_ms is None else _span(view.service_ms)
        name = view.url if is_wide else view.url.removeprefix("http://")
        cells = (name, str(view.leases), f"{view.running}/{view.slots}", took, speed, _state(health))
        if not is_wide:
            return cells
        quiet = "" if health.quiet_ms is None else _span(health.quiet_ms)
        return (*cells, str(health.failures), quiet)

    columns = ("replica", "load", "calls", "answer", "tokens/s", "health")
    return (*columns, "failures", "quiet") if is_wide else columns, [row(view) for view in picture.seen.replicas]


def _state(health: ReplicaHealth) -> Text:
    words = {
        "resting": f"resting {_span(health.rests_ms)}",
        "failing": f"failing ({health.failures})",
        "unserved": "no worker",
    }
    return Text(words.get(health.word, health.word), style=_COLOURS[health.word])


def _workers(picture: Picture, *, is_wide: bool) -> tuple[tuple[str, ...], list[tuple[str | Text, ...]]]:
    def row(view: WorkerView) -> tuple[str | Text, ...]:
        trouble = "; ".join(filter(None, view.stages.values()))
        cells = _held(view.worker, str(view.pid), picture.holdings.get(view.consumer, Holding()))
        state = Text(trouble or "ready", style="red" if trouble else "green")
        return (*cells, state, view.host, view.metrics) if is_wide else (*cells, state)

    rows = [row(view) for view in picture.seen.workers]
    for name, holding in sorted(picture.lapsed.items()):
        state = Text("gone: being taken over", style="red")
        cells = _held(name.rpartition(":")[0] or name, "", holding)
        rows.append((*cells, state, "", "") if is_wide else (*cells, state))
    columns = ("worker", "pid", "holds", "held for", "state")
    return (*columns, "host", "metrics") if is_wide else columns, rows


def _gateways(picture: Picture) -> list[tuple[str | Text, ...]]:
    return [(view.address, str(view.pid), view.host) for view in picture.seen.gateways]


def _held(worker: str, pid: str, holding: Holding) -> tuple[str | Text, ...]:
    holds = ", ".join(f"{count} {stage}" for stage, count in sorted(holding.entries.items()))
    return worker, pid, holds or "-", _span(holding.oldest_ms) if holding.total else ""


def _span(span_ms: float) -> str:
    """Return a span in the unit that people would say it in."""
    span_s = span_ms / 1000
    if span_s < 1:
        return f"{span_ms:.0f} ms"
    if span_s < 100:
        return f"{span_s:.1f} s"
    if span_s < 6_000:
        return f"{span_s / 60:.0f} min"
    return f"{span_s / 3600:.0f} h" if span_s < 172_800 else f"{span_s / 86_400:.0f} d"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --- Looking -----------------------------------------------------------------------------------


def make_console() -> Console:
    """Return the console to print on: without a terminal, lines are as long as they are."""
    console = Console(markup=False, highlight=False)
    if console.is_terminal or os.environ.get("COLUMNS"):
        return console
    return Console(width=ENDLESS, markup=False, highlight=False)


async def follow(connect: Callable[[], Link], console: Console, every_s: float) -> None:
    """Show the picture, over and over, until cancelled; leave the last one behind.

    Args:
        connect: makes a connection to where Redis is now, one that waits ANSWER_S for a reply; asked again after each
            failure.
    """
    picture: Picture | None = None
    away: Away | None = None
    link: Link | None = None

    def screen() -> RenderableType:
        height = console.height
        parts: list[RenderableType] = []
        if away is not None:
            parts.append(away_line(away, time.monotonic(), has_picture=picture is not None))
            height -= len(console.render_lines(parts[0], pad=False))
        if picture is not None:
            parts.append(render(picture, width=console.width, height=height))
        return Group(*parts)

    try:
        with Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
            while True:
                began_s = time.monotonic()
                try:
                    link = link or connect()
                    async with asyncio.timeout(LOOK_S):
                        picture = await look_closely(link, thorough=False)
                    away = None
                except TROUBLE as error:
                    away = Away(*reason_of(error), away.since_s if away else began_s)
                    if link is not None:
                        await link.close()
                    link = None
                live.update(screen(), refresh=True)
                await asyncio.sleep(max(0.0, began_s + every_s - time.monotonic()))
    finally:
        if link is not None:
            await link.close()
        with suppress(BrokenPipeError):
            console.print(screen())


TROUBLE: Final = (PenstockError, TimeoutError, ValueError, LookupError)
"""What looking may end with: Redis is away, or holds what we never wrote."""


def reason_of(error: Exception) -> tuple[str, str]:
    """Return why there is no picture: what is the matter, and the reason."""
    if isinstance(error, TimeoutError):
        return "Redis is slow", f"it answers, but a look took more than {LOOK_S:g} s"
    if isinstance(error, BrokerUnavailable):
        return "Redis is away", str(error).rstrip(": .")  # an error that says nothing leaves its colon behind
    if isinstance(error, PenstockError):
        return "No picture", str(error)
    return "No picture", f"a key holds what Penstock never wrote ({type(error).__name__}: {error})"
