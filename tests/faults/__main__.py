"""The fault suite: `python -m tests.faults`, or `just faults`.

    python -m tests.faults                          the whole matrix, once
    python -m tests.faults --scenario 3 --seed 7    one cell again
    python -m tests.faults --slice --any-machine    short forms of some cells, as CI runs them
    python -m tests.faults --scenario 21            the long run, 15 minutes (see docs/RELIABILITY.md)
    python -m tests.faults --durability             what an accepted job survives; --write puts it into the docs

The exit code is 0 when every cell is green, 1 when one is red (or the slice did less than it must), 2 when the command
line makes no sense, 130 after Ctrl-C, which tells of the cells before it. `--keep` leaves the files of every cell;
those of a red one always stay.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import uvloop

from tests.faults import cell, durability, report
from tests.faults.sabotage import ROOT
from tests.faults.scenarios import Scenario, load_all
from tests.faults.verdict import Verdict, append, appendable

WIDTH: Final = 100
SLICE_ACCEPTS: Final = 5_000
SLICE_KILLS: Final = 15
"""What the slice as a whole must have done, or it says too little."""
SLICE_WITHIN_S: Final = 180.0
"""What it should take. A busy machine may take longer, which is said and is no failure."""

FOR_CELLS: Final = ("scenario", "jobs", "slice", "any_machine", "until_red", "json", "keep")
"""Options that say something about cells only."""


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    scenarios = load_all()
    parser = _parser(scenarios)
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    if options.write and not options.durability:
        parser.error("--write goes with --durability")
    if options.durability:
        if strange := [f"--{name.replace('_', '-')}" for name in FOR_CELLS if getattr(options, name)]:
            parser.error(f"{', '.join(strange)}: not with --durability, which runs no cell of the matrix")
        return measure_durability(seed, write=options.write)
    chosen = options.scenario or [number for number, one in scenarios.items() if not one.is_long]
    wanted = [scenarios[number] for number in chosen if scenarios[number].in_slice or not options.slice]
    if not wanted:
        parser.error("nothing to run: none of these scenarios is in the slice")
    verdicts: list[Verdict] = []
    began_s = time.monotonic()
    try:
        for one in wanted:
            jobs = options.jobs or (one.in_slice if options.slice else one.jobs)
            verdicts.append(run_cell(one, seed, jobs, keep=options.keep, any_machine=options.any_machine))
            if options.json:
                record = {"date": datetime.now(UTC).date().isoformat(), "commit": commit()}
                append(options.json, record | verdicts[-1].as_json())
            if options.until_red and not verdicts[-1].is_green:
                break
    except KeyboardInterrupt:
        if verdicts:
            print(f"before that: {summary(verdicts)}")
        return 130
    print(summary(verdicts))
    is_green = all(verdict.is_green for verdict in verdicts)
    if options.slice and not options.scenario and not options.jobs and len(verdicts) == len(wanted):
        is_green &= tell_of_the_slice(verdicts, time.monotonic() - began_s)
    return 0 if is_green else 1


def measure_durability(seed: int, *, write: bool) -> int:
    """Print what an accepted job survives, and put it into the docs if told to; return the exit code."""
    table = durability.measure_all(seed)
    print(table)
    if write:
        durability.write(table)
    return 0


def tell_of_the_slice(verdicts: list[Verdict], seconds: float) -> bool:
    """Say what the slice as a whole has done, and whether that is enough."""
    accepted, kills = sum(one.accepted for one in verdicts), sum(one.kills for one in verdicts)
    late = f": WARNING, it should take at most {SLICE_WITHIN_S:.0f} s" if seconds > SLICE_WITHIN_S else ""
    print(f"the slice took {seconds:.0f} s{late}")
    claims = {
        f"the slice has at least {SLICE_ACCEPTS:,} jobs accepted, not {accepted:,}": accepted >= SLICE_ACCEPTS,
        f"the slice has at least {SLICE_KILLS} kills, not {kills}": kills >= SLICE_KILLS,
    }
    for claim, held in claims.items():
        if not held:
            print(f"BROKEN {claim}")
    return all(claims.values())


def commit() -> str | None:
    """Return the commit that is tested, with `+` when there are changes beside it; None where nobody knows."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=ROOT, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()


def run_cell(scenario: Scenario, seed: int, jobs: int, *, keep: bool, any_machine: bool = False) -> Verdict:
    """Run one cell in a folder of its own, and say how it went."""
    folder = Path(tempfile.mkdtemp(prefix="penstock-faults-", dir="/tmp"))  # short: it holds a unix socket
    print(f"{scenario.number:>2} {scenario.title}: seed {seed}, {jobs} requests", flush=True)
    try:
        run = cell.run(scenario.number, scenario.title, scenario.run, seed, jobs, folder, any_machine=any_machine)
        verdict = uvloop.run(run)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"   interrupted; its files: {folder}", flush=True)
        raise KeyboardInterrupt from None
    for word, claims in (("BROKEN", verdict.broken), ("DOUBT", verdict.doubts)):
        for claim in claims:
            print(textwrap.indent(textwrap.fill(f"{word} {claim}", WIDTH, subsequent_indent="  "), "   "), flush=True)
    print(textwrap.indent(line(verdict), "   "), flush=True)
    if verdict.is_green and not keep:
        shutil.rmtree(folder)
    else:
        print(f"   its files: {folder}", flush=True)
    return verdict


def line(verdict: Verdict) -> str:
    """Return one verdict in a few short lines."""
    share = "-" if verdict.hit_share is None else f"{verdict.hit_share:.0%}"
    recovered = (
        "-" if verdict.recovered_max_s is None else f"{verdict.recovered_p50_s:.1f}/{verdict.recovered_max_s:.1f} s"
    )
    lines = [
        f"{'green' if verdict.is_green else 'RED'} in {verdict.seconds:.0f} s: accepted {verdict.accepted}, "
        f"lost {verdict.lost}, destroyed {verdict.destroyed}, duplicated {verdict.duplicated}, "
        f"unseen {verdict.unseen}, wrong {verdict.wrong}, stale {verdict.stale}",
        f"{verdict.faults} faults, {share} met work; recovered {recovered}; refused {verdict.refused}, "
        f"unknown {verdict.unknown}, calls made again {verdict.calls_repeated} of {verdict.calls_excused} excused, "
        f"stale writes refused {verdict.refusals}; {verdict.server or 'no pipeline'}; "
        f"memory {report.grown(verdict.grown_mib)}",
    ]
    if verdict.redone:
        lines.append(f"done twice, since the record was destroyed: {verdict.redone}")
    more = [_words(verdict.by_status), _words(verdict.endings), _words(verdict.figures)]
    if told := "; ".join(words for words in more if words):
        lines.append(told)
    return "\n".join(textwrap.fill(one, WIDTH, subsequent_indent="  ") for one in lines)


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def summary(verdicts: list[Verdict]) -> str:
    """Return what all cells together showed."""
    total = {name: sum(getattr(v, name) for v in verdicts) for name in report.TOTALS}
    servers = " and ".join(sorted({verdict.server for verdict in verdicts if verdict.server})) or "no server"
    red = [str(verdict.number) for verdict in verdicts if not verdict.is_green]
    word = f"RED: scenario {', '.join(red)}" if red else "all green"
    told = ", ".join(f"{name} {count}" for name, count in total.items())
    return f"{len(verdicts)} cells on {servers}, {told}: {word}"


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Return a whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"a whole number of at least {least}, not {text!r}")
    return int(text)


def _parser(scenarios: dict[int, Scenario]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="just faults", description="Harm a running system and check what it promises."
    )
    parser.add_argument(
        "--scenario", type=int, action="append", choices=list(scenarios), help="only this one; repeatable"
    )
    parser.add_argument("--seed", type=natural, help="of every choice; printed, so that a run can be repeated")
    parser.add_argument("--jobs", type=positive, help="requests of each cell")
    parser.add_argument("--slice", action="store_true", help="some cells in a short form, about three minutes")
    parser.add_argument("--any-machine", action="store_true", help="spans that are too long are only told")
    parser.add_argument("--until-red", action="store_true", help="stop at the first cell that is not green")
    parser.add_argument("--json", type=appendable, help="append the verdicts to this file, one line each")
    parser.add_argument("--keep", action="store_true", help="keep the files of green cells, too")
    parser.add_argument("--durability", action="store_true", help="measure what an accepted job survives, as a table")
    parser.add_argument("--write", action="store_true", help="put that table into docs/OPERATIONS.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
