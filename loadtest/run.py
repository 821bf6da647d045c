"""A load test from its options to its exit code: look whether the target is there, send, judge, show."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson
import uvloop

from loadtest import crew, limits, slo
from loadtest.generator import Orders
from loadtest.live import Watcher, watch
from loadtest.manifest import manifest
from loadtest.report import EXIT_USAGE, Report, render, summarize
from loadtest.verdict import decide_verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.options import LoadOptions
    from loadtest.target import Address

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
REACH_S: Final = 0.6  # with the start of the interpreter, a silent target is reported within a second


class Unreachable(Exception):
    """Nothing takes connections at the target."""


class CannotWrite(Exception):
    """A report has nowhere to go."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a report goes.

    Args:
        as_json: standard output gets JSON instead of text.
        json_file: gets the same JSON.
        html_file: gets the page.
        quiet: nothing is shown while the test runs.
    """

    as_json: bool = False
    json_file: Path | None = None
    html_file: Path | None = None
    quiet: bool = False

    def check(self) -> None:
        """Look whether the files can be written, before an hour is spent on what goes into them.

        Raises:
            CannotWrite: one cannot.
        """
        for path in (self.json_file, self.html_file):
            if path is None:
                continue
            try:
                was_there = path.exists()
                with path.open("a"):
                    pass
                if not was_there:  # should nothing come of the run, no empty report is left
                    path.unlink()
            except OSError as error:
                raise CannotWrite(f"cannot write the report to {path}: {error.strerror}") from None


def run(options: LoadOptions, outputs: Outputs | None = None) -> int:
    """Run the test, write the report, and return the exit code; a fault is one line on standard error."""
    outputs = outputs or Outputs()
    with signals_held():
        try:
            outputs.check()
            with watch(quiet=outputs.quiet) as watcher:
                report = measured(options, watcher)
            write(report, outputs)
        except (CannotWrite, limits.NoRoom, Unreachable, crew.GeneratorDied) as error:
            sys.stderr.write(f"loadtest: {error}\n")
            return EXIT_USAGE
        return report.exit_code


def write(report: Report, outputs: Outputs) -> None:
    """Write the report to wherever it goes.

    Raises:
        CannotWrite: a file that could be written at the start no longer can; what can be has been.
    """
    as_json = orjson.dumps(report.as_json()) + b"\n"
    say(as_json.decode() if outputs.as_json else render(report))
    if outputs.json_file is not None:
        save(outputs.json_file, as_json)
    if outputs.html_file is not None:
        from loadtest.page import page

        save(outputs.html_file, page(report).encode())


def say(text: str) -> None:
    """Write *text* to standard output; whoever has stopped reading it has had enough."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end


def save(path: Path, content: bytes) -> None:
    """Write a report's file.

    Raises:
        CannotWrite: it cannot be.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CannotWrite(f"cannot write the report to {path}: {error.strerror}") from None


@contextmanager
def signals_held() -> Iterator[None]:
    """Put off SIGINT and SIGTERM until a run listens to them (`measure`), so that none comes before or after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        with suppress(KeyboardInterrupt):  # one that came while the report was written: it is written
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def measured(options: LoadOptions, watcher: Watcher) -> Report:
    """Run `measure` on an event loop of its own."""
    # uvloop's, because its end does not wait for a name that is still being looked up.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(options, watcher))


async def measure(options: LoadOptions, watcher: Watcher) -> Report:
    """Run the test until it is done, or until SIGINT or SIGTERM, and return what was found.

    Raises:
        Unreachable: nothing takes connections at the target; nothing was sent.
        NoRoom: this machine does not allow as many connections as are needed.
        GeneratorDied: a generator did.
    """
    about, stopped = manifest(options), asyncio.Event()
    with _signals(stopped):
        host = await reach(options.address, options.url)
        connections = options.most_connections
        if options.plan is not None and options.connections is None:
            # Nobody asked for so many; should they not do, arrivals stand in line, and the verdict says so.
            connections = min(connections, limits.room(options.processes))
        limits.check(connections, options.processes)
        outcome = await crew.send(orders_of(options, host, connections), stopped, watcher.add)
    tally = outcome.tally
    is_open = options.plan is not None
    verdict = decide_verdict(
        lag_p99_ms=tally.lag.percentile_ms(99) if is_open and tally.lag.count else None,
        late=tally.late,
        planned=tally.planned,
        limit_ms=options.max_lag_ms,
        busiest=outcome.busiest,
        processes=options.processes,
    )
    verdict = replace(verdict, warnings=verdict.warnings + slo.unsure(options.clauses, tally.latency.count))
    return summarize(
        outcome,
        is_open=is_open,
        verdict=verdict,
        clauses=options.clauses,
        good_within_ms=slo.good_within_ms(options.clauses),
        manifest=about,
    )


def orders_of(options: LoadOptions, host: str, connections: int) -> list[Orders]:
    """Return the share of each generator: connections and clients as even as whole numbers are."""
    parts = options.processes
    messages = [message.decode("latin-1") for message in options.messages]
    return [
        Orders(
            host=host,
            address=options.address,
            requests=messages,
            connections=_share(connections, part, parts),
            timeout_s=options.timeout_s,
            limit_ms=options.max_lag_ms,
            good_ms=slo.good_within_ms(options.clauses),
            part=part,
            parts=parts,
            plan=options.plan,
            clients=_share(options.clients, part, parts),
            count=options.closed_count,
            duration_s=options.duration_s,
        )
        for part in range(parts)
    ]


async def reach(address: Address, url: str) -> str:
    """Return the numeric address that takes connections.

    Raises:
        Unreachable: none does; the message says why.
    """
    try:
        async with asyncio.timeout(REACH_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except OSError as error:  # TimeoutError is one
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or "no answer"
        if isinstance(error, socket.gaierror):
            why = error.strerror or "no such name"
        raise Unreachable(f"cannot reach {url}: {why}") from None
    peer = writer.get_extra_info("peername")
    host: str = address.host if peer is None else peer[0]  # None: it hung up at once, and is there all the same
    writer.transport.abort()
    return host


def _share(whole: int, part: int, parts: int) -> int:
    return whole // parts + (part < whole % parts)


@contextmanager
def _signals(stopped: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stopped.set)
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
