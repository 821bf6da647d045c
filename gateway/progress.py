"""What `penstock ingest` shows while it works: a bar on a terminal, plain lines otherwise, nothing for scripts."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gateway.ingest import Indexed, Report, Result


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
        if not self._quiet:
            sys.stdout.write(describe(result) + "\n")
            sys.stdout.flush()

    def waits(self, reason: str) -> None:
        """The gateway has to be asked again; said once until something goes forward."""
        if reason != self._last_reason:
            self._last_reason = reason
            sys.stderr.write(f"waiting: {reason}\n")

    def sum_up(self, report: Report) -> None:
        """All files are done."""
        if not self._quiet:
            sys.stdout.write(summary(report) + "\n")


class _Bar:
    """A progress bar; files that are left out are named above it."""

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
        if not isinstance(result, Indexed) and result.is_fault:
            self._progress.console.print(describe(result), markup=False, highlight=False)
        self._progress.update(self._task, advance=1, now="")

    def waits(self, reason: str) -> None:
        """The gateway has to be asked again."""
        self._progress.update(self._task, now=f"waiting: {reason}"[:60])

    def sum_up(self, report: Report) -> None:
        """All files are done."""
        self._progress.console.print(summary(report), markup=False, highlight=False)


def describe(result: Result) -> str:
    """Return one line about one file."""
    if isinstance(result, Indexed):
        return f"indexed  {result.name}  ({result.chunks} chunk{'' if result.chunks == 1 else 's'})"
    return f"skipped  {result.name}  ({result.reason})"


def summary(report: Report) -> str:
    """Return one line about all."""
    chunks = sum(item.chunks for item in report.indexed)
    skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
    return f"{len(report.indexed)} documents, {chunks} chunks indexed{skipped}"
