"""What `penstock ingest` shows while it works: a bar on a terminal, plain lines otherwise, nothing for scripts."""

from __future__ import annotations

import os
import sys
from collections import Counter
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gateway.ingest import Indexed, Report, Result, Skipped

_REASONS: Final = 10  # of files that are no documents, by their number; a folder may hold a hundred kinds


class Watcher(Protocol):
    """Is told what happens; use as `with`."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, result: Result) -> None:
        """One file is done, for better or worse."""

    def waits(self, reason: str) -> None:
        """The gateway has to be asked again."""

    def sum_up(self, report: Report) -> None:
        """All files are done."""


def watch(files: int, *, quiet: bool) -> Watcher:
    """Return the watcher that fits where we run.

    Args:
        quiet: nothing on standard output; reasons of refusals still go to standard error.
    """
    console = Console(stderr=True)
    return _Bar(files, console) if console.is_terminal and not quiet else _Lines(quiet=quiet)


class _Lines:
    """One line per file."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._last_reason = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def add(self, result: Result) -> None:
        """One file is done, for better or worse."""
        self._last_reason = ""
        self._say(describe(result))

    def waits(self, reason: str) -> None:
        """The gateway has to be asked again; said once until something goes forward."""
        if reason != self._last_reason:
            self._last_reason = reason
            sys.stderr.write(f"waiting: {reason}\n")

    def sum_up(self, report: Report) -> None:
        """All files are done."""
        self._say("\n".join(summary(report)))

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has read enough; the files are to be indexed all the same
            self._quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end


class _Bar:
    """A progress bar; files that are left out are named above it, and once more at the end."""

    def __init__(self, files: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("indexing"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[now]}"),
            console=console,
        )
        self._task = self._progress.add_task("ingest", total=files, now="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def add(self, result: Result) -> None:
        """One file is done, for better or worse."""
        if isinstance(result, Skipped) and result.is_fault:
            self._progress.console.print(describe(result), markup=False, highlight=False)
        self._progress.update(self._task, advance=1, now="")

    def waits(self, reason: str) -> None:
        """The gateway has to be asked again."""
        self._progress.update(self._task, now=f"waiting: {reason}"[:60])

    def sum_up(self, report: Report) -> None:
        """All files are done."""
        self._progress.console.print("\n".join(summary(report)), markup=False, highlight=False, soft_wrap=True)


def describe(result: Result) -> str:
    """Return one line about one file."""
    if isinstance(result, Skipped):
        return f"{'failed ' if result.is_fault else 'skipped'}  {result.name}  ({result.reason})"
    word = "indexed" if isinstance(result, Indexed) else "is there"
    note = f"; {result.note}" if isinstance(result, Indexed) and result.note else ""
    return f"{word}  {result.name}  ({_counted(result.chunks, 'chunk')}{note})"


def summary(report: Report) -> list[str]:
    """Return what came of all: each file that failed, what else was left out by its reason, and the counts."""
    failed = [item for item in report.skipped if item.is_fault]
    others = Counter(item.reason for item in report.skipped if not item.is_fault)
    lines = [f"left out {_counted(count, 'file')}: {reason}" for reason, count in others.most_common(_REASONS)]
    if failed:
        lines.append(f"{_counted(len(failed), 'file')} could not be indexed:")
        lines += [f"  {item.name}: {item.reason}" for item in failed]
    counts = [f"{_counted(len(report.indexed), 'document')} indexed ({_counted(report.chunks, 'chunk')})"]
    if report.unchanged:
        counts.append(f"{len(report.unchanged)} there already")
    if report.skipped:
        counts.append(f"{len(report.skipped)} skipped")
    return [*lines, ", ".join(counts)]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
